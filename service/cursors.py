"""Cursors: where a page of a list ended. Clients give them back and never look inside."""

import base64
import binascii
import re
from collections.abc import Sequence

from coterie.search.plan import Fault

_TEXT = re.compile(r"([a-z-]+):(0|[1-9][0-9]{0,17})")  # 18 digits fit 64 bits


class InvalidQuery(Exception):
    """A query or header parameter that can't be used.

    Attributes:
        faults: What is wrong, at least one.
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("; ".join(f"{fault.pointer}: {fault.detail}" for fault in faults))
        self.faults = tuple(faults)


def encode_cursor(order: str, position: int) -> str:
    """The cursor after `position` in a list of this order."""
    return base64.urlsafe_b64encode(f"{order}:{position}".encode()).decode().rstrip("=")


def decode_cursor(order: str, cursor: str | None) -> int | None:
    """The position in a cursor of a list of this order.

    Raises:
        InvalidQuery: If the cursor is not one of ours, or of another order.
    """
    if cursor is None:
        return None
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode(
            "ascii"
        )
    except (binascii.Error, ValueError):
        text = ""
    found = _TEXT.fullmatch(text)
    if found is None or found[1] != order:
        raise InvalidQuery(
            [Fault("/query/cursor", "must be the next_cursor of a page of this list, in this order")]
        )
    return int(found[2])
