"""What is on its way to webhooks: the outbox.

A delivery is written in the transaction of its event, so that none is lost and none is sent of what was
rolled back. It is sent at least once: a server that dies while it sends leaves it to the next.
"""

import secrets
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import Select, delete, select, update
from sqlalchemy.orm import Session

from coterie.service.storage.tables import DeliveryRow, EventRow, WebhookRow

SUBSCRIBABLE = frozenset({"job", "trial", "front"})  # measurements come too often for a request each


class DeliveryState(StrEnum):
    """How far a delivery is: on its way, there, or given up."""

    PENDING = "pending"
    DELIVERED = "delivered"
    DEAD = "dead"


@dataclass(frozen=True, kw_only=True)
class Due:
    """A delivery that is this server's to make.

    Attributes:
        id: Stable over all attempts.
        attempt: Which attempt it is, from 1.
        event: What to tell.
    """

    id: str
    webhook_id: str
    url: str
    secret: str
    attempt: int
    event: EventRow


def enqueue_deliveries(
    session: Session, tenant: str, job_id: str, sequence: int, kind: str, now: datetime
) -> None:
    """Note that a tenant's webhooks are to be told of an event. A cheap query where there are none."""
    if kind not in SUBSCRIBABLE:
        return
    webhooks = session.scalars(
        select(WebhookRow)
        .where(WebhookRow.tenant == tenant, WebhookRow.disabled_at.is_(None))
        .with_for_update(read=True, key_share=True)  # or one that is deleted now would undo the event
    )
    session.add_all(
        DeliveryRow(
            id=f"delivery_{secrets.token_hex(12)}",
            webhook_id=webhook.id,
            job_id=job_id,
            sequence=sequence,
            state=DeliveryState.PENDING,
            attempts=0,
            due_at=now,
            created_at=now,
        )
        for webhook in webhooks
        if kind in webhook.kinds
    )


class OutboxRepository:
    """Deliveries of all tenants, for those who make them."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def waits(self, now: datetime, busy: Collection[str]) -> bool:
        """Whether there is something to claim, so that SQLite's write lock is not taken for nothing."""
        return self._session.scalar(self._due(now, busy).limit(1)) is not None

    def claim(self, now: datetime, until: datetime, limit: int, busy: Collection[str]) -> list[Due]:
        """Take due deliveries, one a webhook, and move them on: they are due again `until`, if they fail.

        Args:
            now: The time.
            until: When another server may take them: longer than an attempt lasts.
            limit: The most to take.
            busy: Webhooks to leave alone, as one of their deliveries is under way here.
        """
        rows = self._session.scalars(
            self._due(now, busy).limit(limit).with_for_update(skip_locked=True)
        ).all()
        first = {row.webhook_id: row for row in reversed(rows)}
        return [self._take(row, until) for row in first.values()]

    def settle(self, due: Due, state: DeliveryState, now: datetime, **outcome: Any) -> None:
        """Note how an attempt ended, unless the delivery has changed since."""
        self._session.execute(
            update(DeliveryRow)
            .where(
                DeliveryRow.id == due.id,
                DeliveryRow.attempts == due.attempt,
                DeliveryRow.state == DeliveryState.PENDING,
            )
            .values(state=state, delivered_at=now if state == DeliveryState.DELIVERED else None, **outcome)
        )

    def leave_alone(self, webhook_id: str, until: datetime) -> None:
        """Make nothing that waits for this webhook before `until`."""
        self._session.execute(
            update(DeliveryRow)
            .where(
                DeliveryRow.webhook_id == webhook_id,
                DeliveryRow.state == DeliveryState.PENDING,
                DeliveryRow.due_at < until,
            )
            .values(due_at=until)
        )

    def disable(self, webhook_id: str, reason: str, now: datetime) -> None:
        """Tell a webhook nothing more: what was on its way to it is dead."""
        self._session.execute(update(WebhookRow).where(WebhookRow.id == webhook_id).values(disabled_at=now))
        self._session.execute(
            update(DeliveryRow)
            .where(DeliveryRow.webhook_id == webhook_id, DeliveryRow.state == DeliveryState.PENDING)
            .values(state=DeliveryState.DEAD, due_at=None, last_error=reason)
        )

    def forget(self, now: datetime, age: timedelta) -> None:
        """Remove deliveries that ended and are older than `age`."""
        self._session.execute(
            delete(DeliveryRow).where(
                DeliveryRow.state != DeliveryState.PENDING, DeliveryRow.created_at < now - age
            )
        )

    def _due(self, now: datetime, busy: Collection[str]) -> Select[DeliveryRow]:
        return (
            select(DeliveryRow)
            .where(
                DeliveryRow.state == DeliveryState.PENDING,
                DeliveryRow.due_at <= now,
                DeliveryRow.webhook_id.not_in(busy),
            )
            .order_by(DeliveryRow.due_at)
        )

    def _take(self, row: DeliveryRow, until: datetime) -> Due:
        row.attempts += 1
        row.due_at = until
        webhook = self._session.get_one(WebhookRow, row.webhook_id)
        event = self._session.get_one(EventRow, (row.job_id, row.sequence))
        return Due(
            id=row.id,
            webhook_id=webhook.id,
            url=webhook.url,
            secret=webhook.secret,
            attempt=row.attempts,
            event=event,
        )
