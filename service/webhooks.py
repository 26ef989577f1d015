"""What can be done with webhooks."""

from datetime import UTC, datetime
from threading import BoundedSemaphore

from coterie.search.faults import Fault, SpecError
from coterie.service import schemas
from coterie.service.body import parse_json, validate
from coterie.service.context import Context
from coterie.service.cursors import decode_cursor, encode_cursor
from coterie.service.public_network import AddressForbidden, parse_url, resolve
from coterie.service.storage.audit import audit
from coterie.service.storage.events import EventKind
from coterie.service.storage.outbox import DeliveryState
from coterie.service.storage.tables import DeliveryRow, WebhookRow
from coterie.service.storage.webhooks import WebhookRepository

_ORDER = "deliveries"
_LOOK_UPS = BoundedSemaphore(4)  # a name server that is silent must not hold all of the server's threads


class LookUpBusy(Exception):
    """The server looks up as many names as it does at a time."""


def create_webhook(context: Context, body: bytes) -> schemas.NewWebhook:
    """Make the webhook that a body describes; its secret is shown this once.

    Raises:
        MalformedBody: If the body is no JSON.
        SpecError: If it breaks the schema, or its URL is none that the server may call.
        Conflict: If there are too many.
        LookUpBusy: If the hosts of others are looked up, which may take long.
    """
    spec = validate(schemas.WebhookSpec, parse_json(body))
    if not _LOOK_UPS.acquire(blocking=False):
        raise LookUpBusy("the server looks up the hosts of other webhooks: try again in a moment")
    try:
        host = parse_url(spec.url).raw_host.decode()
        resolve(host, allow_private=context.settings.webhook_allow_private)
    except AddressForbidden as error:
        raise SpecError([Fault("/url", str(error))]) from error
    finally:
        _LOOK_UPS.release()
    with context.database.write() as session:
        row = WebhookRepository(session, context.caller.tenant).create(
            spec.url, spec.kinds, datetime.now(UTC)
        )
        audit(session, context.caller, "webhook.create", row.id, kinds=row.kinds)
    return schemas.NewWebhook(**_view(row).model_dump(), secret=row.secret)


def list_webhooks(context: Context) -> schemas.Page[schemas.Webhook]:
    """All of the tenant's, oldest first: they are few."""
    with context.database.read() as session:
        rows = WebhookRepository(session, context.caller.tenant).list()
    return schemas.Page(items=[_view(row) for row in rows], next_cursor=None)


def show_webhook(context: Context, webhook_id: str) -> schemas.Webhook:
    """One webhook, or NotFound."""
    with context.database.read() as session:
        return _view(WebhookRepository(session, context.caller.tenant).get(webhook_id))


def delete_webhook(context: Context, webhook_id: str) -> None:
    """Remove a webhook with what is on its way to it, or NotFound."""
    with context.database.write() as session:
        WebhookRepository(session, context.caller.tenant).delete(webhook_id)
        audit(session, context.caller, "webhook.delete", webhook_id)


def list_deliveries(
    context: Context, webhook_id: str, *, state: DeliveryState | None, limit: int, cursor: str | None
) -> schemas.Page[schemas.Delivery]:
    """A page of a webhook's deliveries, newest first.

    Raises:
        NotFound: If there is no such webhook.
        InvalidQuery: If the cursor is not of this list.
    """
    before = decode_cursor(_ORDER, cursor)
    with context.database.read() as session:
        found = WebhookRepository(session, context.caller.tenant).deliveries(
            webhook_id, state=state, before=before, limit=limit + 1
        )
    shown = found[:limit]
    return schemas.Page(
        items=[_delivery(row, kind) for row, kind in shown],
        next_cursor=encode_cursor(_ORDER, shown[-1][0].position) if len(found) > limit else None,
    )


def retry_delivery(context: Context, webhook_id: str, delivery_id: str) -> schemas.Delivery:
    """Make a delivery again that was given up or waits, soon.

    Raises:
        NotFound: If there is no such webhook or delivery.
        Conflict: If it was delivered, or the webhook is disabled.
    """
    with context.database.write() as session:
        row, kind = WebhookRepository(session, context.caller.tenant).retry(
            webhook_id, delivery_id, datetime.now(UTC)
        )
        audit(session, context.caller, "webhook.redeliver", delivery_id)
    return _delivery(row, kind)


def _view(row: WebhookRow) -> schemas.Webhook:
    return schemas.Webhook(
        id=row.id,
        url=row.url,
        kinds=row.kinds,
        created_at=row.created_at,
        disabled_at=row.disabled_at,
    )


def _delivery(row: DeliveryRow, kind: str) -> schemas.Delivery:
    return schemas.Delivery(
        id=row.id,
        job_id=row.job_id,
        sequence=row.sequence,
        kind=EventKind(kind),
        state=DeliveryState(row.state),
        attempts=row.attempts,
        due_at=row.due_at,
        last_status=row.last_status,
        last_error=row.last_error,
        created_at=row.created_at,
        delivered_at=row.delivered_at,
    )
