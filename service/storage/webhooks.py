"""Webhooks of a tenant, and what became of the deliveries to them."""

import base64
import secrets
from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Row, Select, func, select
from sqlalchemy.orm import Session

from coterie.service.storage.database import append_in_order
from coterie.service.storage.outbox import DeliveryState
from coterie.service.storage.repositories import Conflict, NotFound
from coterie.service.storage.tables import DeliveryRow, EventRow, WebhookRow

# Of a tenant. Each costs a row for every event, and one of a server's attempts while its receiver hangs.
MOST_WEBHOOKS = 8
SECRET_BYTES = 32  # Standard Webhooks takes 24 to 64


class WebhookRepository:
    """Webhooks of a tenant."""

    def __init__(self, session: Session, tenant: str) -> None:
        self._session = session
        self._tenant = tenant

    def create(self, url: str, kinds: Sequence[str], now: datetime) -> WebhookRow:
        """Add a webhook with a new secret.

        Raises:
            Conflict: If the tenant has `MOST_WEBHOOKS`.
        """
        append_in_order(self._session, WebhookRow.__tablename__)  # or two at once might both find room
        own = select(func.count()).select_from(WebhookRow).where(WebhookRow.tenant == self._tenant)
        if (self._session.scalar(own) or 0) >= MOST_WEBHOOKS:
            raise Conflict(f"there are {MOST_WEBHOOKS} webhooks, the most there can be: delete one first")
        row = WebhookRow(
            id=f"webhook_{secrets.token_hex(8)}",
            tenant=self._tenant,
            url=url,
            secret=f"whsec_{base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()}",
            kinds=list(kinds),
            created_at=now,
        )
        self._session.add(row)
        return row

    def list(self) -> Sequence[WebhookRow]:
        """All, oldest first; there are never more than `MOST_WEBHOOKS`."""
        return self._session.scalars(
            select(WebhookRow)
            .where(WebhookRow.tenant == self._tenant)
            .order_by(WebhookRow.created_at, WebhookRow.id)
        ).all()

    def get(self, webhook_id: str) -> WebhookRow:
        """One webhook.

        Raises:
            NotFound: If the tenant has none with this id.
        """
        row = self._session.scalar(
            select(WebhookRow).where(WebhookRow.id == webhook_id, WebhookRow.tenant == self._tenant)
        )
        if row is None:
            raise NotFound(f"there is no webhook {webhook_id}")
        return row

    def delete(self, webhook_id: str) -> None:
        """Remove a webhook and its deliveries.

        Raises:
            NotFound: If the tenant has none with this id.
        """
        self._session.delete(self.get(webhook_id))

    def deliveries(
        self, webhook_id: str, *, state: DeliveryState | None, before: int | None, limit: int
    ) -> Sequence[Row[DeliveryRow, str]]:
        """Up to `limit` deliveries of lower position than `before`, newest first, with their events' kinds.

        Raises:
            NotFound: If the tenant has no such webhook.
        """
        self.get(webhook_id)
        query = _with_kind().where(DeliveryRow.webhook_id == webhook_id)
        if state is not None:
            query = query.where(DeliveryRow.state == state)
        if before is not None:
            query = query.where(DeliveryRow.position < before)
        return self._session.execute(query.order_by(DeliveryRow.position.desc()).limit(limit)).all()

    def retry(self, webhook_id: str, delivery_id: str, now: datetime) -> Row[DeliveryRow, str]:
        """Let a delivery be made now, with all its attempts before it; gives it with its event's kind.

        Raises:
            NotFound: If the tenant has no such webhook, or that no such delivery.
            Conflict: If it was delivered, or the webhook is disabled.
        """
        webhook = self.get(webhook_id)
        found = self._session.execute(
            _with_kind()
            .where(DeliveryRow.id == delivery_id, DeliveryRow.webhook_id == webhook_id)
            .with_for_update(of=DeliveryRow)
        ).first()
        if found is None:
            raise NotFound(f"there is no delivery {delivery_id} of this webhook")
        if webhook.disabled_at is not None:
            raise Conflict("the webhook is disabled since its receiver answered 410 Gone: make a new one")
        row = found[0]
        if row.state == DeliveryState.DELIVERED:
            raise Conflict(f"delivery {delivery_id} was delivered")
        row.state = DeliveryState.PENDING
        row.attempts = 0
        row.due_at = now
        return found


def _with_kind() -> Select[DeliveryRow, str]:
    return select(DeliveryRow, EventRow.kind).join(
        EventRow, (EventRow.job_id == DeliveryRow.job_id) & (EventRow.sequence == DeliveryRow.sequence)
    )
