"""Who changed what: a row for every change, in the change's own transaction."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from coterie.service.auth import Caller
from coterie.service.storage.tables import AuditRow


def audit(session: Session, caller: Caller, action: str, target: str, **detail: Any) -> None:
    """Add a row to the log of changes.

    Args:
        session: The transaction of the change: both are kept, or neither.
        caller: Who makes it.
        action: What is done, as `job.cancel`: what is changed, and the verb.
        target: Id of what is changed.
        detail: What else is worth knowing, in JSON: a few numbers or names, never a secret.
    """
    session.add(
        AuditRow(
            at=datetime.now(UTC),
            tenant=caller.tenant,
            token_id=caller.token_id,
            action=action,
            target=target,
            request_id=caller.request_id,
            detail=detail,
        )
    )


class AuditRepository:
    """The changes that were made in a tenant."""

    def __init__(self, session: Session, tenant: str) -> None:
        self._session = session
        self._tenant = tenant

    def page(self, *, action: str | None, before: int | None, limit: int) -> Sequence[AuditRow]:
        """Up to `limit` changes of lower position than `before`, newest first."""
        query = (
            select(AuditRow)
            .where(AuditRow.tenant == self._tenant)
            .order_by(AuditRow.position.desc())
            .limit(limit)
        )
        if action is not None:
            query = query.where(AuditRow.action == action)
        if before is not None:
            query = query.where(AuditRow.position < before)
        return self._session.scalars(query).all()
