"""Who calls, and what they may do."""

from dataclasses import dataclass
from enum import StrEnum

from coterie.service.storage.tables import DEFAULT_TENANT


class Role(StrEnum):
    """What a token allows within its tenant; each role may do what the ones before may.

    A reader reads. A submitter submits, cancels, pauses, resumes, reorders and deletes jobs. An admin makes
    and revokes tokens, keeps webhooks, reads the audit log.
    """

    READER = "reader"
    SUBMITTER = "submitter"
    ADMIN = "admin"

    def includes(self, other: "Role") -> bool:
        """Whether this role may do what `other` may."""
        order = list(Role)
        return order.index(self) >= order.index(other)


@dataclass(frozen=True)
class Caller:
    """Who makes a request.

    Attributes:
        tenant: Whose jobs they see: no other's.
        role: What they may do.
        token_id: Of their token; None where the server runs open.
        request_id: Of the request, for log and audit; None outside one.
    """

    tenant: str
    role: Role
    token_id: str | None = None
    request_id: str | None = None


class Forbidden(Exception):
    """The caller may not do this; says who may."""


# Whoever reaches a server that has no tokens, which only listens on loopback.
ANYONE = Caller(DEFAULT_TENANT, Role.ADMIN)
