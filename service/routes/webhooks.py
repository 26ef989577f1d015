"""/v1/webhooks: make, list, delete; what became of what was sent."""

from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Response
from pydantic import Field

from coterie.service import schemas, webhooks
from coterie.service.errors import problem_responses
from coterie.service.routes.parameters import NO_QUERY, AdminContext, PageParameters
from coterie.service.routes.reading import json_body_of, read_body
from coterie.service.storage.outbox import DeliveryState

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"])

WebhookId = Annotated[str, Path(pattern="^webhook_[0-9A-Za-z_-]{1,50}$", description="Id of a webhook.")]
DeliveryId = Annotated[str, Path(pattern="^delivery_[0-9A-Za-z_-]{1,50}$", description="Id of a delivery.")]
_ERRORS = problem_responses(HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND)
_BODY = json_body_of("WebhookSpec")


class DeliveriesParameters(PageParameters):
    """Which deliveries."""

    state: DeliveryState | None = Field(default=None, description="Only deliveries in this state.")


@router.post(
    "",
    status_code=HTTPStatus.CREATED,
    openapi_extra=_BODY,
    dependencies=[NO_QUERY],
    responses=problem_responses(
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.CONFLICT,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        HTTPStatus.UNPROCESSABLE_ENTITY,
        HTTPStatus.SERVICE_UNAVAILABLE,
    ),
)
def create_webhook(
    context: AdminContext, response: Response, body: Annotated[bytes, Depends(read_body)]
) -> schemas.NewWebhook:
    """Have events of all the tenant's jobs sent to a URL. The answer alone has the secret.

    Each event is a POST of `{type, timestamp, data}`, signed as Standard Webhooks has it; `data` is the event
    as the stream tells it. It is sent at least once, again over about a day until it is answered with 2xx,
    always with the same `webhook-id`, and in no promised order. An answer of 410 disables the webhook; what
    was still to be sent of a job that is deleted is not sent any more.
    """
    webhook = webhooks.create_webhook(context, body)
    response.headers["Location"] = f"/v1/webhooks/{webhook.id}"
    return webhook


@router.get("", dependencies=[NO_QUERY], responses=problem_responses(HTTPStatus.BAD_REQUEST))
def list_webhooks(context: AdminContext) -> schemas.Page[schemas.Webhook]:
    """List the tenant's webhooks, oldest first."""
    return webhooks.list_webhooks(context)


@router.get("/{webhook_id}", dependencies=[NO_QUERY], responses=_ERRORS)
def show_webhook(context: AdminContext, webhook_id: WebhookId) -> schemas.Webhook:
    """Show a webhook."""
    return webhooks.show_webhook(context, webhook_id)


@router.delete("/{webhook_id}", status_code=HTTPStatus.NO_CONTENT, dependencies=[NO_QUERY], responses=_ERRORS)
def delete_webhook(context: AdminContext, webhook_id: WebhookId) -> None:
    """Send a webhook nothing more, and forget what was sent."""
    webhooks.delete_webhook(context, webhook_id)


@router.get("/{webhook_id}/deliveries", responses=_ERRORS)
def list_deliveries(
    context: AdminContext, webhook_id: WebhookId, query: Annotated[DeliveriesParameters, Query()]
) -> schemas.Page[schemas.Delivery]:
    """List what was sent to a webhook or is on its way, newest first; what ended is kept for 30 days."""
    return webhooks.list_deliveries(
        context, webhook_id, state=query.state, limit=query.limit, cursor=query.cursor
    )


@router.post(
    "/{webhook_id}/deliveries/{delivery_id}/retry",
    dependencies=[NO_QUERY],
    responses=problem_responses(HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT),
)
def retry_delivery(context: AdminContext, webhook_id: WebhookId, delivery_id: DeliveryId) -> schemas.Delivery:
    """Send a delivery that is dead or waits, at once and with all its attempts before it."""
    return webhooks.retry_delivery(context, webhook_id, delivery_id)
