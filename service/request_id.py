"""A name for each request, in its answer, in the log lines that it causes and in what it changed."""

import logging
import re
import secrets
from contextvars import ContextVar

HEADER = "X-Request-ID"
_SANE = re.compile(r"[0-9A-Za-z._:=-]{1,100}")  # safe in a log line; the audit log has room for it
_BYTES = 8

current_request_id: ContextVar[str | None] = ContextVar("current_request_id", default=None)


def make_request_id(proposed: str | None = None) -> str:
    """Take the id that a client or a proxy proposed, if it is sane, or make one."""
    if proposed is not None and _SANE.fullmatch(proposed):
        return proposed
    return f"req_{secrets.token_hex(_BYTES)}"


class RequestIdFilter(logging.Filter):
    """Gives log records a `request_id`: that of the request which is answered, or `-`."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record through."""
        record.request_id = current_request_id.get() or "-"
        return True
