"""Tokens, tenants and the log of changes: what an admin does, and at a terminal the operator."""

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta

from coterie.search.faults import Fault, SpecError
from coterie.service import schemas
from coterie.service.auth import Caller, Role
from coterie.service.cursors import decode_cursor, encode_cursor
from coterie.service.storage.audit import AuditRepository, audit
from coterie.service.storage.database import Database
from coterie.service.storage.tables import TokenRow
from coterie.service.storage.tenants import Limits, TenantRepository, month_of
from coterie.service.storage.tokens import TokenRepository

_TOKENS = "tokens"
_AUDIT = "audit"
_SPAN = re.compile(r"([0-9]{1,5})([hdw])")
_PAGE = 1000
_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,99}")
_UNITS = {"h": "hours", "d": "days", "w": "weeks"}


def operator(tenant: str) -> Caller:
    """Whoever works on the database itself, for one tenant."""
    return Caller(tenant, Role.ADMIN)


def _check_name(tenant: str) -> None:
    if not _NAME.fullmatch(tenant):
        raise ValueError(f"tenant: must be 1 to 100 letters, digits and . _ -, found {tenant}")


def parse_expiry(text: str, now: datetime) -> datetime:
    """When `30d`, `12h`, `8w` from now is, or the beginning of the day `2027-01-01`, in UTC.

    Raises:
        ValueError: If it is none of these, or not in the future.
    """
    span = _SPAN.fullmatch(text)
    try:
        if span:
            at = now + timedelta(**{_UNITS[span[2]]: int(span[1])})
        else:
            at = datetime.fromisoformat(text)
            at = at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"expires: must be like 30d, 12h or 2027-01-01, found {text}") from None
    if at <= now:
        raise ValueError(f"expires: must be in the future, found {text}")
    return at


def create_token(
    database: Database, caller: Caller, *, role: Role, name: str, expires_at: datetime | None
) -> schemas.NewToken:
    """Make a token of the caller's tenant; nobody can read it again.

    Raises:
        SpecError: If it would have expired already.
        ValueError: If the tenant's name can be none.
    """
    _check_name(caller.tenant)
    now = datetime.now(UTC)
    if expires_at is not None and expires_at <= now:
        raise SpecError([Fault("/expires_at", "must be in the future")])
    try:
        until = None if expires_at is None else expires_at.astimezone(UTC)
    except OverflowError:
        raise SpecError([Fault("/expires_at", "must be before the year 9999 ends, in UTC")]) from None
    with database.write() as session:
        row, token = TokenRepository(session).create(caller.tenant, role, name, until, now)
        audit(session, caller, "token.create", row.id, role=role, name=name)
    return schemas.NewToken(**_token_view(row).model_dump(), token=token)


def list_tokens(
    database: Database, tenant: str | None, *, limit: int, cursor: str | None = None
) -> schemas.Page[schemas.Token]:
    """A page of a tenant's tokens, or of all, newest first.

    Raises:
        InvalidQuery: If the cursor is not of this list.
    """
    before = decode_cursor(_TOKENS, cursor)
    with database.read() as session:
        rows = TokenRepository(session, tenant).page(before=before, limit=limit + 1)
    shown = rows[:limit]
    return schemas.Page(
        items=[_token_view(row) for row in shown],
        next_cursor=encode_cursor(_TOKENS, shown[-1].position) if len(rows) > limit else None,
    )


def all_tokens(database: Database, tenant: str | None) -> Iterator[schemas.Token]:
    """A tenant's tokens, or all there are, newest first."""
    cursor = None
    while True:
        page = list_tokens(database, tenant, limit=_PAGE, cursor=cursor)
        yield from page.items
        cursor = page.next_cursor
        if cursor is None:
            return


def revoke_token(database: Database, caller: Caller | None, token_id: str) -> None:
    """End a token; one that was revoked stays so.

    Args:
        database: Where it is.
        caller: Who does it, to a token of their tenant; None for the operator, to any.
        token_id: Its id.

    Raises:
        NotFound: If there is none with this id.
    """
    with database.write() as session:
        row = TokenRepository(session, None if caller is None else caller.tenant).get(token_id)
        if row.revoked_at is None:
            row.revoked_at = datetime.now(UTC)
            audit(session, caller or operator(row.tenant), "token.revoke", token_id)


def set_limits(database: Database, tenant: str, given: Mapping[str, str]) -> None:
    """Set the limits given of a tenant, in words; `none` takes one back, and the others stay.

    Raises:
        ValueError: If one is no number of its kind, or the name can be none.
    """
    _check_name(tenant)
    asked = {limit: None if text == "none" else text for limit, text in given.items()}
    limits = schemas.TenantLimits.model_validate(asked).model_dump(include=set(given))
    with database.write() as session:
        TenantRepository(session).set_limits(tenant, limits, datetime.now(UTC))
        audit(session, operator(tenant), "tenant.set", tenant, **limits)


def tenant_names(database: Database) -> Sequence[str]:
    """All tenants that have limits, tokens or jobs, by name."""
    with database.read() as session:
        return TenantRepository(session).names()


def show_tenant(database: Database, name: str, defaults: Limits) -> schemas.Tenant:
    """A tenant's limits, `defaults` where it has none of its own, and what it uses now and in this month."""
    now = datetime.now(UTC)
    with database.read() as session:
        tenants = TenantRepository(session)
        limits, usage = tenants.limits(name, defaults), tenants.usage(name, now)
    return schemas.Tenant(
        name=name,
        limits=schemas.TenantLimits(**vars(limits)),
        usage=schemas.TenantUsage(
            month=month_of(now),
            queued_jobs=usage.queued_jobs,
            running_jobs=usage.running_jobs,
            device_seconds=usage.device_seconds,
            stored_bytes=usage.stored_bytes,
        ),
    )


def list_tenants(database: Database, defaults: Limits) -> list[schemas.Tenant]:
    """All tenants, by name."""
    with database.read() as session:
        names = TenantRepository(session).names()
    return [show_tenant(database, name, defaults) for name in names]


def list_changes(
    database: Database, tenant: str, *, action: str | None, limit: int, cursor: str | None
) -> schemas.Page[schemas.Change]:
    """A page of the changes that were made in a tenant, newest first.

    Raises:
        InvalidQuery: If the cursor is not of this list.
    """
    before = decode_cursor(_AUDIT, cursor)
    with database.read() as session:
        rows = AuditRepository(session, tenant).page(action=action, before=before, limit=limit + 1)
    shown = rows[:limit]
    return schemas.Page(
        items=[
            schemas.Change(
                at=row.at,
                action=row.action,
                target=row.target,
                token_id=row.token_id,
                request_id=row.request_id,
                detail=row.detail,
            )
            for row in shown
        ],
        next_cursor=encode_cursor(_AUDIT, shown[-1].position) if len(rows) > limit else None,
    )


def _token_view(row: TokenRow) -> schemas.Token:
    return schemas.Token(
        id=row.id,
        tenant=row.tenant,
        role=Role(row.role),
        name=row.name,
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
    )
