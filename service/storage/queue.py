"""The order in which queued jobs start: one function, for claims and for the places that are shown."""

import heapq
import itertools
import math
import statistics
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import BindParameter, Row, bindparam, func, select
from sqlalchemy.orm import Session

from coterie.search.store import JobState
from coterie.service.storage.tables import AttemptRow, JobRow, TenantRow, TenantUsageRow
from coterie.service.storage.tenants import NO_LIMITS, Limits, TenantRepository, limits_of, month_of

TYPICAL_JOBS = 20  # newest ones that succeeded: how long the next ones will run
FORESIGHT = timedelta(days=365)  # a start beyond that is no forecast
# Of PostgreSQL's advisory locks: one number of 64 bits, and the first of two of 32 bits.
_CLAIMS_LOCK = 0x636F746572696501
_QUOTA_LOCK = 0x636F7465


class QuotaExceeded(Exception):
    """A tenant has as much as it may have."""


class Hold(StrEnum):
    """What a queued job waits for."""

    PLACE = "place"
    RUNNING_LIMIT = "running_limit"
    DEVICE_SECONDS = "device_seconds"


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A queued job.

    Attributes:
        position: Lower is older.
        new: Whether it never ran: one that goes on does not use its tenant's turn again.
        seconds_left: Time that it is expected to run; infinite where nothing is known.
    """

    job_id: str
    tenant: str
    priority: int
    position: int
    new: bool = True
    seconds_left: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Share:
    """A tenant's part in what runs, on all servers.

    Attributes:
        running: Its running jobs.
        served_at: When one of its jobs last began; None before the first.
        device_seconds: What its jobs were charged this month.
    """

    running: int = 0
    served_at: datetime | None = None
    device_seconds: float = 0.0
    limits: Limits = NO_LIMITS

    @property
    def spent(self) -> bool:
        """Whether it has used this month's device-seconds."""
        limit = self.limits.max_device_seconds
        return limit is not None and self.device_seconds >= limit


@dataclass(frozen=True, kw_only=True)
class Place:
    """A queued job's place.

    Attributes:
        position: From 1, over all tenants' jobs.
        hold: What it waits for.
        starts_at: When it is expected to start; None where nothing is known.
    """

    position: int
    hold: Hold
    starts_at: datetime | None


@dataclass(frozen=True, kw_only=True)
class Queue:
    """What waits, and what decides who is next."""

    waiting: Sequence[Waiting]
    shares: Mapping[str, Share]

    def order(self) -> Iterator[tuple[Waiting, Hold]]:
        """As `start_order`."""
        return start_order(self.waiting, self.shares)


def start_order(waiting: Iterable[Waiting], shares: Mapping[str, Share]) -> Iterator[tuple[Waiting, Hold]]:
    """The order in which jobs start while none ends, and what each waits for.

    Higher priority first; of equal priority, the tenant of which fewest jobs run, each start counted; of
    equal shares, the tenant whose turn is longest ago; then the older job. The turn matters where one job
    runs at a time: whenever one is chosen, nothing runs, and all shares are equal.

    A job whose tenant has reached a limit comes behind all that may start: first those whose tenant runs as
    many as it may, then those whose tenant has used its device-seconds.

    Args:
        waiting: The queued jobs, in any order.
        shares: Of every tenant that has one of them; one that is left out runs nothing, without limits.
    """
    tenants = defaultdict(Share, shares)
    able: list[Waiting] = []
    at_limit: list[Waiting] = []
    spent: list[Waiting] = []
    for job in waiting:
        (spent if tenants[job.tenant].spent else able).append(job)
    running = {tenant: share.running for tenant, share in tenants.items()}
    served = {
        tenant: (0, -math.inf if share.served_at is None else share.served_at.timestamp())
        for tenant, share in tenants.items()
    }
    turns = itertools.count()

    def fairly(jobs: Iterable[Waiting], *, within_limits: bool) -> Iterator[Waiting]:
        ordered = sorted(jobs, key=lambda job: (-job.priority, job.position))
        for _, level in itertools.groupby(ordered, key=lambda job: job.priority):
            queues: defaultdict[str, deque[Waiting]] = defaultdict(deque)
            for job in level:
                queues[job.tenant].append(job)
            heap = [
                (running[tenant], served[tenant], line[0].position, tenant) for tenant, line in queues.items()
            ]
            heapq.heapify(heap)
            while heap:
                *_, tenant = heapq.heappop(heap)
                most = tenants[tenant].limits.max_running_jobs
                if within_limits and most is not None and running[tenant] >= most:
                    at_limit.extend(queues[tenant])
                    continue
                job = queues[tenant].popleft()
                yield job
                running[tenant] += 1
                if job.new:
                    served[tenant] = (1, next(turns))  # later than any start so far
                if queues[tenant]:
                    heapq.heappush(
                        heap, (running[tenant], served[tenant], queues[tenant][0].position, tenant)
                    )

    yield from ((job, Hold.PLACE) for job in fairly(able, within_limits=True))
    yield from ((job, Hold.RUNNING_LIMIT) for job in fairly(at_limit, within_limits=False))
    yield from ((job, Hold.DEVICE_SECONDS) for job in fairly(spent, within_limits=False))


def places_of(
    order: Iterable[tuple[Waiting, Hold]], running_until: Iterable[float], now: datetime
) -> dict[str, Place]:
    """Each waiting job's place by its id; as many jobs run at a time as do now.

    Args:
        order: As `start_order` has it.
        running_until: When each running job is expected to end, in POSIX seconds; infinite where unknown.
        now: The time. A job that should have ended by now tells nothing any more.
    """
    free = [end if end >= now.timestamp() else math.inf for end in running_until]
    heapq.heapify(free)
    horizon = (now + FORESIGHT).timestamp()
    found = {}
    for position, (job, hold) in enumerate(order, start=1):
        starts_at = None
        if hold is Hold.PLACE and free and free[0] < horizon:
            starts_at = datetime.fromtimestamp(free[0], UTC)
            heapq.heapreplace(free, free[0] + job.seconds_left)
        found[job.job_id] = Place(position=position, hold=hold, starts_at=starts_at)
    return found


def lock_queue(session: Session) -> None:
    """Let no other transaction claim until this one has ended; on SQLite only one writes anyway."""
    if session.connection().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(_CLAIMS_LOCK)))


def check_quota(session: Session, tenant: str, defaults: Limits, now: datetime) -> None:
    """Called once the transaction has queued a job, so that of several at a time none goes unseen.

    Raises:
        QuotaExceeded: If the tenant has more than it may have.
    """
    limits = limits_of(session.get(TenantRow, tenant), defaults)
    if limits.max_queued_jobs is None and limits.max_stored_bytes is None:
        return
    if session.connection().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(_QUOTA_LOCK, func.hashtext(tenant))))
    used = TenantRepository(session).usage(tenant, now)
    if limits.max_queued_jobs is not None and used.queued_jobs > limits.max_queued_jobs:
        raise QuotaExceeded(
            f"queued jobs of tenant {tenant}: at most {limits.max_queued_jobs:,}, found "
            f"{used.queued_jobs - 1:,}; wait until some have started, or cancel some"
        )
    if limits.max_stored_bytes is not None and used.stored_bytes >= limits.max_stored_bytes:
        raise QuotaExceeded(
            f"bytes stored for tenant {tenant}: must be below {limits.max_stored_bytes:,}, found "
            f"{used.stored_bytes:,}; delete jobs that are not needed any more"
        )


def read_queue(session: Session, defaults: Limits, now: datetime) -> Queue:
    """What waits now; `defaults` are the limits of tenants that have none of their own."""
    return _read_queue(session, defaults, now, _typical_seconds(session))


def _read_queue(session: Session, defaults: Limits, now: datetime, typical: float) -> Queue:
    rows = session.execute(_QUEUED).all()
    waiting = [
        Waiting(
            job_id=row.id,
            tenant=row.tenant,
            priority=row.priority,
            position=row.position,
            new=row.started_at is None,
            seconds_left=_seconds_left(row.budget, row.seconds, typical),
        )
        for row in rows
    ]
    return Queue(
        waiting=waiting, shares=_read_shares(session, {job.tenant for job in waiting}, defaults, now)
    )


def read_places(session: Session, defaults: Limits, now: datetime) -> dict[str, Place]:
    """The place of every job that waits now, by its id; `defaults` as `read_queue` has them."""
    typical = _typical_seconds(session)
    running = session.execute(_RUNNING).all()
    until = [
        row.last_seen_at.timestamp() + _seconds_left(row.budget, row.seconds, typical)
        if row.eta_seconds is None
        else row.eta_at.timestamp() + row.eta_seconds
        for row in running
    ]
    return places_of(_read_queue(session, defaults, now, typical).order(), until, now)


def spent_tenants(session: Session, tenants: Iterable[str], defaults: Limits, now: datetime) -> set[str]:
    """Those of the tenants that have used this month's device-seconds."""
    shares = _with_limits(session, list(tenants), defaults, now)
    return {name for name, share in shares.items() if share.spent}


def _read_shares(
    session: Session, tenants: Iterable[str], defaults: Limits, now: datetime
) -> dict[str, Share]:
    names = list(tenants)
    if not names:
        return {}
    counts = _by_tenant(session.execute(_RUN_BY_TENANTS, {"names": names}))
    last_starts = _by_tenant(session.execute(_LAST_STARTS, {"names": names}))
    return {
        name: replace(share, running=counts.get(name, 0), served_at=last_starts.get(name))
        for name, share in _with_limits(session, names, defaults, now).items()
    }


def _with_limits(session: Session, names: Sequence[str], defaults: Limits, now: datetime) -> dict[str, Share]:
    device_seconds = _by_tenant(session.execute(_CHARGED, {"names": names, "month": month_of(now)}))
    rows = {row.name: row for row in session.scalars(_TENANTS, {"names": names})}
    return {
        name: Share(device_seconds=device_seconds.get(name, 0.0), limits=limits_of(rows.get(name), defaults))
        for name in names
    }


def _by_tenant(rows: Iterable[Row[str, Any]]) -> dict[str, Any]:
    return {row[0]: row[1] for row in rows}


def _typical_seconds(session: Session) -> float:
    """Median time that the newest jobs ran which succeeded; infinite before the first."""
    newest = session.scalars(_NEWEST).all()
    return statistics.median(newest) if newest else math.inf


def _seconds_left(budget: float | None, used: float, typical: float) -> float:
    return max(0.0, min(math.inf if budget is None else budget, typical) - used)


# The statements are made once: to put one together takes as long as to run it.
# From how long a job will run; its spec is long, and one number of it is enough.
_ESTIMATED = select(
    JobRow.id,
    JobRow.tenant,
    JobRow.priority,
    JobRow.position,
    JobRow.started_at,
    JobRow.seconds,
    JobRow.spec["budget"]["seconds"].as_float().label("budget"),
)
_QUEUED = _ESTIMATED.where(JobRow.state == JobState.QUEUED)
_RUNNING = (
    _ESTIMATED.add_columns(JobRow.eta_seconds, JobRow.eta_at, AttemptRow.last_seen_at)
    .join(AttemptRow, (AttemptRow.job_id == JobRow.id) & (AttemptRow.attempt == JobRow.attempt))
    .where(JobRow.state == JobState.RUNNING)
)
_NEWEST = (
    select(JobRow.seconds)
    .where(JobRow.state == JobState.SUCCEEDED)
    .order_by(JobRow.position.desc())
    .limit(TYPICAL_JOBS)
)
_NAMES: BindParameter[Any] = bindparam("names", expanding=True)
_BY_TENANT = select(JobRow.tenant).where(JobRow.tenant.in_(_NAMES)).group_by(JobRow.tenant)
_RUN_BY_TENANTS = _BY_TENANT.add_columns(func.count()).where(JobRow.state == JobState.RUNNING)
_LAST_STARTS = _BY_TENANT.add_columns(func.max(JobRow.started_at))
_CHARGED = select(TenantUsageRow.tenant, TenantUsageRow.device_seconds).where(
    TenantUsageRow.tenant.in_(_NAMES), TenantUsageRow.month == bindparam("month")
)
_TENANTS = select(TenantRow).where(TenantRow.name.in_(_NAMES))
