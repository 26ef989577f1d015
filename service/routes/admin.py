"""/v1/tokens, /v1/tenant, /v1/audit: who may do what in the caller's tenant, and who did."""

from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import Field

from coterie.search.faults import Fault, SpecError
from coterie.service import access, schemas
from coterie.service.auth import Role
from coterie.service.body import parse_json, validate
from coterie.service.errors import problem_responses
from coterie.service.routes.parameters import (
    NO_QUERY,
    AdminContext,
    ContextOf,
    PageParameters,
    PageQuery,
)
from coterie.service.routes.reading import json_body_of, read_body

router = APIRouter(prefix="/v1", tags=["access"])
TokenId = Annotated[str, Path(pattern="^token_[0-9a-f]{16}$", description="Id of a token.")]
_TOKEN_BODY = json_body_of("TokenRequest")


class AuditParameters(PageParameters):
    """Which changes."""

    action: str | None = Field(
        default=None,
        pattern=r"^[a-z]{1,30}\.[a-z]{1,30}$",
        description="Only changes of this kind, as job.cancel.",
    )


@router.post(
    "/tokens",
    status_code=HTTPStatus.CREATED,
    openapi_extra=_TOKEN_BODY,
    dependencies=[NO_QUERY],
    responses=problem_responses(
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        HTTPStatus.UNPROCESSABLE_ENTITY,
    ),
)
def create_token(
    context: AdminContext, request: Request, body: Annotated[bytes, Depends(read_body)]
) -> schemas.NewToken:
    """Make an access token of the caller's tenant. The answer shows it, and nothing ever does again.

    On a server that has none yet it is the first, and from then on a token is needed: so that must be an
    admin's.
    """
    asked = validate(schemas.TokenRequest, parse_json(body))
    if context.caller.token_id is None and asked.role is not Role.ADMIN:
        fault = "must be admin: this is the first token, and without an admin's nobody could make another"
        raise SpecError([Fault("/role", fault)])
    made = access.create_token(
        context.database, context.caller, role=asked.role, name=asked.name, expires_at=asked.expires_at
    )
    request.app.state.gate.forget()
    return made


@router.get("/tokens", responses=problem_responses(HTTPStatus.BAD_REQUEST))
def list_tokens(context: AdminContext, query: PageQuery) -> schemas.Page[schemas.Token]:
    """List the access tokens of the caller's tenant, newest first, those that are no longer good too."""
    return access.list_tokens(context.database, context.caller.tenant, limit=query.limit, cursor=query.cursor)


@router.delete(
    "/tokens/{token_id}",
    status_code=HTTPStatus.NO_CONTENT,
    dependencies=[NO_QUERY],
    responses=problem_responses(HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND),
)
def revoke_token(context: AdminContext, request: Request, token_id: TokenId) -> None:
    """Revoke an access token of the caller's tenant: it opens nothing any more, elsewhere within seconds."""
    access.revoke_token(context.database, context.caller, token_id)
    request.app.state.gate.forget()


@router.get("/tenant", dependencies=[NO_QUERY], responses=problem_responses(HTTPStatus.BAD_REQUEST))
def show_tenant(context: ContextOf) -> schemas.Tenant:
    """Show what the caller's tenant may use, and what it uses now and in this month."""
    return access.show_tenant(context.database, context.caller.tenant, context.settings.tenant_limits)


@router.get("/audit", responses=problem_responses(HTTPStatus.BAD_REQUEST))
def list_changes(
    context: AdminContext, query: Annotated[AuditParameters, Query()]
) -> schemas.Page[schemas.Change]:
    """List the changes that were made in the caller's tenant, and who made them, newest first."""
    return access.list_changes(
        context.database,
        context.caller.tenant,
        action=query.action,
        limit=query.limit,
        cursor=query.cursor,
    )
