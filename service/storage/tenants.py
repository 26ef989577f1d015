"""Tenants: what each may use, and what it does use."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from sqlalchemy import func, select, union
from sqlalchemy.orm import Session

from coterie.search.store import JobState
from coterie.service.storage.tables import JobRow, TenantRow, TenantUsageRow, TokenRow


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one tenant may use; None is without limit. Device-seconds are those of a calendar month, UTC."""

    max_queued_jobs: int | None = None
    max_running_jobs: int | None = None
    max_device_seconds: float | None = None
    max_stored_bytes: int | None = None


NO_LIMITS = Limits()


@dataclass(frozen=True, kw_only=True)
class TenantUsage:
    """What a tenant uses: jobs and bytes now, device-seconds in one calendar month."""

    queued_jobs: int
    running_jobs: int
    device_seconds: float
    stored_bytes: int


def limits_of(row: TenantRow | None, defaults: Limits) -> Limits:
    """A tenant's own limits, and `defaults` where it has none."""
    own = {} if row is None else {name: getattr(row, name) for name in vars(defaults)}
    return replace(defaults, **{name: value for name, value in own.items() if value is not None})


def month_of(at: datetime) -> str:
    """The calendar month that device-seconds are counted in, as 2026-11, in UTC."""
    return f"{at.astimezone(UTC):%Y-%m}"


class TenantRepository:
    """Tenants. One that nobody set anything for is as good as any other."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def names(self) -> Sequence[str]:
        """All that have limits, tokens or jobs, by name."""
        named = union(select(TenantRow.name), select(TokenRow.tenant), select(JobRow.tenant))
        return sorted(self._session.scalars(named))

    def limits(self, name: str, defaults: Limits) -> Limits:
        """What a tenant may use, with `defaults` where nobody set anything."""
        return limits_of(self._session.get(TenantRow, name), defaults)

    def set_limits(self, name: str, limits: Mapping[str, float | None], now: datetime) -> None:
        """Set the limits given, by name, None taking one back; the others stay."""
        row = self._session.get(TenantRow, name, with_for_update=True)
        if row is None:
            row = TenantRow(name=name, created_at=now)
            self._session.add(row)
        for limit, value in limits.items():
            setattr(row, limit, value)

    def usage(self, name: str, now: datetime) -> TenantUsage:
        """What a tenant uses now, and in this month."""
        queued, running, stored = self._session.execute(
            select(
                func.count().filter(JobRow.state == JobState.QUEUED),
                func.count().filter(JobRow.state == JobState.RUNNING),
                func.coalesce(func.sum(JobRow.stored_bytes), 0),
            ).where(JobRow.tenant == name)
        ).one()
        spent = self._session.scalar(
            select(TenantUsageRow.device_seconds).where(
                TenantUsageRow.tenant == name, TenantUsageRow.month == month_of(now)
            )
        )
        return TenantUsage(
            queued_jobs=queued, running_jobs=running, device_seconds=spent or 0.0, stored_bytes=int(stored)
        )
