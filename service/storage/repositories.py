"""Every query but a driver's own (`store.py`). A repository lives within the caller's transaction."""

import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any, TypeVar

from sqlalchemy import BigInteger, ColumnElement, Select, bindparam, delete, func, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from coterie.search.spec import JobSpec, TaskChoice
from coterie.search.store import JOB_ENDED, JobState, Setting, TrialState
from coterie.service.storage import shown
from coterie.service.storage.database import take_long
from coterie.service.storage.events import EventKind
from coterie.service.storage.queue import Hold, Place, lock_queue, read_places, read_queue, start_order
from coterie.service.storage.shown import ShownRow
from coterie.service.storage.states import end_job, release_job, tell_job
from coterie.service.storage.store import visible_subsets
from coterie.service.storage.tables import (
    DEFAULT_TENANT,
    AffinityRow,
    AttemptRow,
    ConfirmationRow,
    EventRow,
    JobReferenceRow,
    JobRow,
    ReferenceRow,
    SubsetRow,
    TrialRow,
)
from coterie.service.storage.tenants import NO_LIMITS, Limits

Found = TypeVar("Found")
_JOBS = JobRow.metadata.tables[JobRow.__tablename__]


class NotFound(LookupError):
    """What an id names does not exist."""


class Conflict(Exception):
    """The state of the thing forbids what is asked."""


@dataclass(frozen=True)
class Idempotency:
    """A client's name for one request, and the digest of what it asked."""

    key: str
    digest: str


@dataclass(frozen=True)
class Claimed:
    """A job that is now this dispatcher's to start."""

    job_id: str
    attempt: int
    name: str


@dataclass(frozen=True, kw_only=True)
class RunningJob:
    """A job that some driver should be running.

    Attributes:
        driver: `host:pid`; None until the driver has said so.
        owner: Whose Ray runs it, as it was claimed.
        submission_id: Ray's name of the driver's job; None until it was submitted.
        beats: Counted up by each write of the driver.
        last_seen_at: The driver's last write, or when it was claimed.
    """

    job_id: str
    tenant: str
    attempt: int
    owner: str | None
    beats: int
    submission_id: str | None
    lease_expires_at: datetime
    last_seen_at: datetime
    driver: str | None


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a job has used: trials by state, seconds that it ran, device-seconds of all that it trained."""

    trials: Mapping[TrialState, int]
    seconds: float
    device_seconds: float


def usage_of(job: JobRow) -> Usage:
    """What a job has used, as its row counts it."""
    counts = {state: getattr(job, f"trials_{state}") for state in TrialState}
    return Usage(trials=counts, seconds=job.seconds, device_seconds=job.device_seconds)


class JobRepository:
    """Jobs and attempts at them.

    Args:
        session: The transaction.
        tenant: Whose jobs there are; None for all, as for the part that runs them.
    """

    def __init__(self, session: Session, tenant: str | None = None) -> None:
        self._session = session
        self._tenant = tenant

    def create(
        self,
        spec: JobSpec,
        directions: Mapping[str, str],
        now: datetime,
        idempotency: Idempotency | None = None,
    ) -> tuple[JobRow, bool]:
        """Queue a job; with a key that was used before, find the job that it made. Says whether it is new.

        Raises:
            Conflict: If the key was used for another request.
        """
        row = JobRow(
            id=f"job_{secrets.token_hex(8)}",
            name=spec.name,
            tenant=self._tenant or DEFAULT_TENANT,
            state=JobState.QUEUED,
            spec=spec.model_dump(mode="json"),
            directions=dict(directions),
            priority=spec.priority,
            attempt=0,
            idempotency_key=idempotency and idempotency.key,
            idempotency_digest=idempotency and idempotency.digest,
            created_at=now,
        )
        try:
            with self._session.begin_nested():
                self._session.add(row)
        except IntegrityError:
            if idempotency is None:
                raise
            return self._made_before(idempotency), False
        tell_job(self._session, row, now)
        return row, True

    def get(self, job_id: str) -> JobRow:
        """One job.

        Raises:
            NotFound: If there is none with this id.
        """
        return found(self._session.scalar(self._own().where(JobRow.id == job_id)), "job", job_id)

    def shown(self, job_id: str) -> ShownRow:
        """One job as it is shown, with what this transaction changed of it.

        Raises:
            NotFound: If there is none with this id.
        """
        self._session.flush()
        return self._one(shown.JOB, job_id)

    def frame(self, job_id: str) -> ShownRow:
        """What is needed of one job to show what belongs to it.

        Raises:
            NotFound: If there is none with this id.
        """
        return self._one(shown.JOB_FRAME, job_id)

    def page(
        self, *, state: JobState | None, name: str | None, descending: bool, after: int | None, limit: int
    ) -> Sequence[ShownRow]:
        """Up to `limit` jobs that follow position `after`, in the order in which they were submitted."""
        query = _page(
            owned=self._tenant is not None,
            by_state=state is not None,
            by_name=name is not None,
            descending=descending,
            onward=after is not None,
        )
        values = {"tenant": self._tenant, "state": state, "name": name, "after": after, "limit": limit}
        return self._session.execute(query, values).all()

    def references(self, job_id: str) -> Sequence[ReferenceRow]:
        """The reference networks that a job measures against, in the order in which they were stored."""
        return self._session.scalars(
            select(ReferenceRow)
            .join(JobReferenceRow, JobReferenceRow.reference == ReferenceRow.position)
            .where(JobReferenceRow.job_id == job_id)
            .order_by(ReferenceRow.position)
        ).all()

    def subsets(self, job_id: str) -> Sequence[SubsetRow]:
        """The subset networks that a job knows, others' included, as its driver sees them."""
        row = self.get(job_id)
        return (
            []
            if row.side_setting is None
            else visible_subsets(self._session, row, Setting(**row.side_setting))
        )

    def affinities(self, job_id: str) -> Sequence[AffinityRow]:
        """The one-step affinities of a job's tasks with its weights, in its setting, any job's."""
        row = self.get(job_id)
        if row.side_setting is None:
            return []
        found = self._session.scalars(
            select(AffinityRow)
            .filter_by(**row.side_setting, method="one_step", tenant=row.tenant)
            .order_by(AffinityRow.position)
        )
        weights = _task_weights(row)
        return [affinity for affinity in found if dict(json.loads(affinity.tasks)) == weights]

    def confirmations(self, job_id: str) -> Sequence[ConfirmationRow]:
        """A job's confirming runs, in the order in which they ended."""
        return self._session.scalars(
            select(ConfirmationRow).where(ConfirmationRow.job_id == job_id).order_by(ConfirmationRow.sequence)
        ).all()

    def cancel(self, job_id: str, now: datetime) -> JobRow:
        """End a job that has not ended, at once: its driver is fenced from here on.

        Raises:
            NotFound: If there is none with this id.
            Conflict: If it has ended.
        """
        row = self._locked(job_id)
        if row.state in JOB_ENDED:
            raise Conflict(f"job {job_id} is {row.state}: it can't be cancelled any more")
        end_job(self._session, row, JobState.CANCELLED, None, now)
        return row

    def pause(self, job_id: str, now: datetime) -> JobRow:
        """Let a job wait until it is resumed: its driver is fenced from here on, its running trials wait too.

        Raises:
            NotFound: If there is none with this id.
            Conflict: If it is neither queued nor running.
        """
        row = self._locked(job_id)
        if row.state not in (JobState.QUEUED, JobState.RUNNING):
            raise Conflict(f"job {job_id} is {row.state}: only a queued or running job can be paused")
        release_job(self._session, row, JobState.PAUSED, None, now, preempted=True)
        return row

    def resume(self, job_id: str, now: datetime) -> JobRow:
        """Queue a paused job.

        Raises:
            NotFound: If there is none with this id.
            Conflict: If it is not paused.
        """
        row = self._locked(job_id)
        if row.state != JobState.PAUSED:
            raise Conflict(f"job {job_id} is {row.state}: only a paused job can be resumed")
        row.state = JobState.QUEUED
        tell_job(self._session, row, now)
        return row

    def set_priority(self, job_id: str, priority: int, now: datetime) -> JobRow:
        """Let a job that has not ended start sooner or later, now or when it is queued again.

        Raises:
            NotFound: If there is none with this id.
            Conflict: If it has ended.
        """
        row = self._locked(job_id)
        if row.state in JOB_ENDED:
            raise Conflict(f"job {job_id} is {row.state}: its priority can't be changed any more")
        row.priority = priority
        tell_job(self._session, row, now)
        return row

    def delete(self, job_id: str) -> JobRow:
        """Delete a job that has ended, with all that is its alone; gives what it was.

        What others may know already stays: references, subset networks, affinities, and what it used.

        Raises:
            NotFound: If there is none with this id.
            Conflict: If it has not ended.
        """
        row = self._locked(job_id)
        if row.state not in JOB_ENDED:
            raise Conflict(f"job {job_id} is {row.state}: only a job that has ended can be deleted")
        take_long(self._session)  # a large job has millions of rows
        self._session.execute(delete(JobRow).where(JobRow.position == row.position))
        return row

    def places(self, defaults: Limits, now: datetime) -> dict[str, Place]:
        """The places of all queued jobs, those of others too, by id, as `read_places` has them."""
        return read_places(self._session, defaults, now)

    def claim_next(
        self,
        now: datetime,
        lease: timedelta,
        owner: str | None = None,
        *,
        places: int | None = None,
        defaults: Limits = NO_LIMITS,
        busy: Collection[str] = (),
    ) -> Claimed | None:
        """Take the queued job that is next, as `start_order` has it, and begin a new attempt at it.

        Args:
            now: The time.
            lease: How long the attempt counts as alive before its driver is heard of.
            owner: Whose Ray will run it.
            places: How many jobs that Ray runs at a time; None without limit.
            defaults: The limits of tenants that have none of their own.
            busy: Jobs that can't begin, as a driver of theirs is still ending.
        """
        lock_queue(self._session)
        if places is not None and self._running_of(owner) >= places:
            return None
        queue = read_queue(self._session, defaults, now)
        able = (
            job for job in queue.waiting if job.job_id not in busy
        )  # those hold up nobody of their tenant
        for waiting, hold in start_order(able, queue.shares):
            if hold is not Hold.PLACE:
                return None
            row = self._session.scalar(
                select(JobRow)
                .where(JobRow.id == waiting.job_id, JobRow.state == JobState.QUEUED)
                .with_for_update(skip_locked=True)  # it is being cancelled or changed just now
            )
            if row is not None:
                return self._begin(row, owner, now, lease)
        return None

    def _running_of(self, owner: str | None) -> int:
        count = select(func.count()).where(JobRow.state == JobState.RUNNING, JobRow.owner == owner)
        return self._session.scalar(count) or 0

    def _begin(self, row: JobRow, owner: str | None, now: datetime, lease: timedelta) -> Claimed:
        row.state = JobState.RUNNING
        row.owner = owner
        row.reason = None
        row.attempt += 1
        row.submission_id = None
        row.lease_expires_at = now + lease
        row.started_at = row.started_at or now
        row.eta_seconds = row.eta_at = None
        if row.memory_until is None:
            row.memory_until = self._session.scalar(select(func.max(SubsetRow.position))) or 0
        self._session.add(
            AttemptRow(
                job_id=row.id,
                attempt=row.attempt,
                started_at=now,
                last_seen_at=now,
                preempted=False,
                side_device_seconds=0.0,
                events_before=row.last_event,
            )
        )
        tell_job(self._session, row, now)
        return Claimed(row.id, row.attempt, row.name)

    def any_waits(self) -> bool:
        """Whether some job is queued."""
        queued = select(JobRow.position).where(JobRow.state == JobState.QUEUED).limit(1)
        return self._session.scalar(queued) is not None

    def running(self) -> list[RunningJob]:
        """The running jobs, oldest first."""
        rows = self._session.execute(
            select(
                JobRow.id.label("job_id"),
                JobRow.tenant,
                JobRow.attempt,
                JobRow.owner,
                JobRow.beats,
                JobRow.submission_id,
                func.coalesce(JobRow.lease_expires_at, AttemptRow.last_seen_at).label("lease_expires_at"),
                AttemptRow.last_seen_at,
                AttemptRow.driver,
            )
            .join(AttemptRow, (AttemptRow.job_id == JobRow.id) & (AttemptRow.attempt == JobRow.attempt))
            .where(JobRow.state == JobState.RUNNING)
            .order_by(JobRow.position)
        )
        return [RunningJob(**row._mapping) for row in rows]

    def set_submission(self, job_id: str, attempt: int, submission_id: str) -> bool:
        """Note under which name Ray runs the attempt; False where the attempt is over."""
        row = self._current(job_id, attempt)
        if row is not None:
            row.submission_id = submission_id
        return row is not None

    def set_driver(self, job_id: str, attempt: int, driver: str, now: datetime) -> bool:
        """Note which process drives the attempt. The job is charged from here; False where it is over."""
        if self._current(job_id, attempt) is None:
            return False
        self._change_attempt(job_id, attempt, driver=driver, started_at=now, last_seen_at=now)
        return True

    def requeue(
        self, job_id: str, attempt: int, reason: str, now: datetime, *, preempted: bool = False
    ) -> bool:
        """Give an attempt up: the job waits for a new one, its running trials too. False where it is over.

        A preempted attempt ended for no fault of its own and does not count as one without progress.
        """
        row = self._current(job_id, attempt)
        if row is None:
            return False
        release_job(self._session, row, JobState.QUEUED, reason, now, preempted=preempted)
        return True

    def fail_queued(self, job_id: str, reason: str, now: datetime) -> bool:
        """End a job that waits as failed; False where it does not wait."""
        row = self._session.scalar(
            select(JobRow).where(JobRow.id == job_id, JobRow.state == JobState.QUEUED).with_for_update()
        )
        if row is not None:
            end_job(self._session, row, JobState.FAILED, reason, now)
        return row is not None

    def attempts_without_progress(self, job_id: str) -> int:
        """How many of the last attempts in a row recorded no epoch, no ended trial and no side run."""
        last_epoch = (
            select(func.max(EventRow.sequence))
            .where(EventRow.job_id == job_id, EventRow.kind == EventKind.MEASUREMENT)
            .scalar_subquery()
        )
        ended_a_trial = select(func.max(TrialRow.attempt)).where(TrialRow.job_id == job_id)
        trained = select(func.max(AttemptRow.attempt)).where(
            AttemptRow.job_id == job_id,
            or_(AttemptRow.side_device_seconds > 0, AttemptRow.events_before < last_epoch),
        )
        last = max(self._session.scalar(query) or 0 for query in (ended_a_trial, trained))
        return (
            self._session.scalar(
                select(func.count())
                .select_from(AttemptRow)
                .where(
                    AttemptRow.job_id == job_id,
                    AttemptRow.attempt > last,
                    AttemptRow.ended_at.is_not(None),
                    AttemptRow.preempted.is_(False),
                )
            )
            or 0
        )

    def _made_before(self, idempotency: Idempotency) -> JobRow:
        row = self._session.scalars(
            select(JobRow).where(
                JobRow.tenant == (self._tenant or DEFAULT_TENANT), JobRow.idempotency_key == idempotency.key
            )
        ).one()
        if row.idempotency_digest != idempotency.digest:
            raise Conflict(f"this Idempotency-Key was used for another body: it made job {row.id}")
        return row

    def _one(self, columns: tuple[ColumnElement[Any], ...], job_id: str) -> ShownRow:
        query = _one_job(columns, owned=self._tenant is not None)
        row = self._session.execute(query, {"job_id": job_id, "tenant": self._tenant}).first()
        return found(row, "job", job_id)

    def _own(self) -> Select[JobRow]:
        query = select(JobRow)
        return query if self._tenant is None else query.where(JobRow.tenant == self._tenant)

    def _locked(self, job_id: str) -> JobRow:
        return found(
            self._session.scalar(self._own().where(JobRow.id == job_id).with_for_update()), "job", job_id
        )

    def _current(self, job_id: str, attempt: int) -> JobRow | None:
        return self._session.scalar(
            select(JobRow)
            .where(JobRow.id == job_id, JobRow.attempt == attempt, JobRow.state == JobState.RUNNING)
            .with_for_update()
        )

    def _change_attempt(self, job_id: str, attempt: int, **values: object) -> None:
        self._session.execute(
            update(AttemptRow)
            .where(AttemptRow.job_id == job_id, AttemptRow.attempt == attempt)
            .values(**values)
        )


@cache
def _one_job(columns: tuple[ColumnElement[Any], ...], *, owned: bool) -> Select[Any]:
    query = select(*columns).where(_JOBS.c.id == bindparam("job_id"))
    return query.where(_JOBS.c.tenant == bindparam("tenant")) if owned else query


@cache
def _page(*, owned: bool, by_state: bool, by_name: bool, descending: bool, onward: bool) -> Select[Any]:
    """Made once: to put a statement together takes as long as to run it."""
    columns, position, after = _JOBS.c, _JOBS.c.position, bindparam("after", type_=BigInteger)
    query = select(*shown.JOB).limit(bindparam("limit"))
    if owned:
        query = query.where(columns.tenant == bindparam("tenant"))
    if by_state:
        query = query.where(columns.state == bindparam("state"))
    if by_name:
        query = query.where(columns.name == bindparam("name"))
    if onward:
        query = query.where(position < after if descending else position > after)
    return query.order_by(position.desc() if descending else position)


def _task_weights(row: JobRow) -> dict[str, float]:
    """The job's tasks by name; where its spec names none they are all of its source's."""
    own_metrics = [name.removeprefix("task.") for name in row.directions if name.startswith("task.")]
    weights = {name.rpartition(".")[0]: 1.0 for name in own_metrics}
    chosen = (
        TaskChoice(name=task) if isinstance(task, str) else TaskChoice(**task) for task in row.spec["tasks"]
    )
    return weights | {task.name: task.weight for task in chosen}


def found(row: Found | None, kind: str, row_id: str) -> Found:
    """The row.

    Raises:
        NotFound: If there is none.
    """
    if row is None:
        raise NotFound(f"there is no {kind} {row_id}")
    return row
