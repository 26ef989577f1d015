"""Every query but a driver's own (`store.py`). A repository lives within the caller's transaction."""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeVar

from sqlalchemy import Select, func, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from coterie.search.spec import JobSpec, TaskChoice
from coterie.search.store import JOB_ENDED, JobState, Setting, TrialState
from coterie.service.storage.store import end_job, visible_subsets
from coterie.service.storage.tables import (
    AffinityRow,
    AttemptRow,
    ConfirmationRow,
    FrontHistoryRow,
    JobReferenceRow,
    JobRow,
    MeasurementRow,
    ReferenceRow,
    SubsetRow,
    TrialRow,
)

DEFAULT_TENANT = "default"
Row = TypeVar("Row", JobRow, TrialRow)


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
        submission_id: Ray's name of the driver's job; None until it was submitted.
        last_seen_at: The driver's last write, or when it was claimed.
    """

    job_id: str
    attempt: int
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


class JobRepository:
    """Jobs and attempts at them."""

    def __init__(self, session: Session) -> None:
        self._session = session

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
            tenant=DEFAULT_TENANT,
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
        return row, True

    def get(self, job_id: str) -> JobRow:
        """One job.

        Raises:
            NotFound: If there is none with this id.
        """
        return _found(self._session.scalar(select(JobRow).where(JobRow.id == job_id)), "job", job_id)

    def page(
        self, *, state: JobState | None, name: str | None, before: int | None, limit: int
    ) -> Sequence[JobRow]:
        """Up to `limit` jobs of lower position than `before`, newest first."""
        query = select(JobRow).order_by(JobRow.position.desc()).limit(limit)
        if state is not None:
            query = query.where(JobRow.state == state)
        if name is not None:
            query = query.where(JobRow.name == name)
        if before is not None:
            query = query.where(JobRow.position < before)
        return self._session.scalars(query).all()

    def usage(self, job_ids: Sequence[str]) -> dict[str, Usage]:
        """What each of these jobs has used."""
        counts: dict[str, dict[TrialState, int]] = {job_id: {} for job_id in job_ids}
        seconds = dict.fromkeys(job_ids, 0.0)
        device_seconds = dict.fromkeys(job_ids, 0.0)
        by_state = self._session.execute(
            select(TrialRow.job_id, TrialRow.state, func.count(), func.sum(TrialRow.device_seconds))
            .where(TrialRow.job_id.in_(job_ids))
            .group_by(TrialRow.job_id, TrialRow.state)
        )
        for job_id, state, count, charged in by_state:
            counts[job_id][TrialState(state)] = count
            device_seconds[job_id] += charged
        for row in self._session.scalars(select(AttemptRow).where(AttemptRow.job_id.in_(job_ids))):
            seconds[row.job_id] += (row.last_seen_at - row.started_at).total_seconds()
            device_seconds[row.job_id] += row.side_device_seconds
        return {
            job_id: Usage(
                trials=counts[job_id], seconds=seconds[job_id], device_seconds=device_seconds[job_id]
            )
            for job_id in job_ids
        }

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
            .filter_by(**row.side_setting, method="one_step")
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
        end_job(self._session, job_id, JobState.CANCELLED, None, now)
        self._session.refresh(row)
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
        self._release(row, JobState.PAUSED, None, now, preempted=True)
        return row

    def resume(self, job_id: str) -> JobRow:
        """Queue a paused job.

        Raises:
            NotFound: If there is none with this id.
            Conflict: If it is not paused.
        """
        row = self._locked(job_id)
        if row.state != JobState.PAUSED:
            raise Conflict(f"job {job_id} is {row.state}: only a paused job can be resumed")
        row.state = JobState.QUEUED
        return row

    def claim_next(self, now: datetime, lease: timedelta) -> Claimed | None:
        """Take the queued job of highest priority, the oldest of these, and begin a new attempt at it."""
        row = self._session.scalar(
            select(JobRow)
            .where(JobRow.state == JobState.QUEUED)
            .order_by(JobRow.priority.desc(), JobRow.position)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        if row is None:
            return None
        row.state = JobState.RUNNING
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
            )
        )
        return Claimed(row.id, row.attempt, row.name)

    def running(self) -> list[RunningJob]:
        """The running jobs, oldest first."""
        rows = self._session.execute(
            select(JobRow, AttemptRow)
            .join(AttemptRow, (AttemptRow.job_id == JobRow.id) & (AttemptRow.attempt == JobRow.attempt))
            .where(JobRow.state == JobState.RUNNING)
            .order_by(JobRow.position)
        )
        return [
            RunningJob(
                job_id=job.id,
                attempt=job.attempt,
                submission_id=job.submission_id,
                lease_expires_at=job.lease_expires_at or attempt.last_seen_at,
                last_seen_at=attempt.last_seen_at,
                driver=attempt.driver,
            )
            for job, attempt in rows
        ]

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
        self._release(row, JobState.QUEUED, reason, now, preempted=preempted)
        return True

    def fail_queued(self, job_id: str, reason: str, now: datetime) -> bool:
        """End a job that waits as failed; False where it does not wait."""
        row = self._session.scalar(
            select(JobRow).where(JobRow.id == job_id, JobRow.state == JobState.QUEUED).with_for_update()
        )
        if row is not None:
            end_job(self._session, job_id, JobState.FAILED, reason, now)
        return row is not None

    def attempts_without_progress(self, job_id: str) -> int:
        """How many of the last attempts in a row recorded no epoch, no ended trial and no side run."""
        last_epoch = (
            select(func.max(MeasurementRow.at))
            .join(TrialRow, TrialRow.id == MeasurementRow.trial_id)
            .where(TrialRow.job_id == job_id)
            .scalar_subquery()
        )
        ended_a_trial = select(func.max(TrialRow.attempt)).where(TrialRow.job_id == job_id)
        trained = select(func.max(AttemptRow.attempt)).where(
            AttemptRow.job_id == job_id,
            or_(AttemptRow.side_device_seconds > 0, AttemptRow.started_at < last_epoch),
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
            select(JobRow).where(JobRow.tenant == DEFAULT_TENANT, JobRow.idempotency_key == idempotency.key)
        ).one()
        if row.idempotency_digest != idempotency.digest:
            raise Conflict(f"this Idempotency-Key was used for another body: it made job {row.id}")
        return row

    def _locked(self, job_id: str) -> JobRow:
        return _found(
            self._session.scalar(select(JobRow).where(JobRow.id == job_id).with_for_update()), "job", job_id
        )

    def _release(
        self, row: JobRow, state: JobState, reason: str | None, now: datetime, *, preempted: bool
    ) -> None:
        """Take a job from the attempt that runs it, if one does."""
        self._session.execute(
            update(AttemptRow)
            .where(AttemptRow.job_id == row.id, AttemptRow.ended_at.is_(None))
            .values(reason=reason or state, preempted=preempted, ended_at=now)
        )
        self._session.execute(
            update(TrialRow)
            .where(TrialRow.job_id == row.id, TrialRow.state == TrialState.RUNNING)
            .values(state=TrialState.PENDING)
        )
        row.state = state
        row.reason = reason
        row.lease_expires_at = None
        row.eta_seconds = row.eta_at = None

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


class TrialRepository:
    """Trials, their measurements, and the front that they make."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def get(self, trial_id: str) -> TrialRow:
        """One trial.

        Raises:
            NotFound: If there is none with this id.
        """
        return _found(
            self._session.scalar(select(TrialRow).where(TrialRow.id == trial_id)), "trial", trial_id
        )

    def page(
        self,
        job_id: str,
        *,
        state: TrialState | None,
        family: str | None,
        descending: bool,
        after: int | None,
        limit: int,
    ) -> Sequence[TrialRow]:
        """Up to `limit` trials of a job that follow number `after`, by number."""
        query = select(TrialRow).where(TrialRow.job_id == job_id).limit(limit)
        query = query.order_by(TrialRow.number.desc() if descending else TrialRow.number)
        if state is not None:
            query = query.where(TrialRow.state == state)
        if family is not None:
            query = query.where(TrialRow.family == family)
        if after is not None:
            query = query.where(TrialRow.number < after if descending else TrialRow.number > after)
        return self._session.scalars(query).all()

    def measurements(self, trial_id: str, *, after: int, limit: int) -> Sequence[MeasurementRow]:
        """Up to `limit` measurements of a trial beyond epoch `after`, by epoch."""
        return self._session.scalars(
            select(MeasurementRow)
            .where(MeasurementRow.trial_id == trial_id, MeasurementRow.epoch > after)
            .order_by(MeasurementRow.epoch)
            .limit(limit)
        ).all()

    def completed(self, job_id: str) -> Sequence[TrialRow]:
        """A job's completed trials, by number."""
        return self._session.scalars(_completed(job_id)).all()

    def front(self, job_id: str) -> Sequence[TrialRow]:
        """The trials on a job's front, by number."""
        return self._session.scalars(_completed(job_id).where(TrialRow.on_front)).all()

    def history(self, job_id: str, *, after: int, limit: int) -> Sequence[tuple[FrontHistoryRow, int]]:
        """Up to `limit` states of a job's front beyond sequence `after`, each with its trial's number."""
        rows = self._session.execute(
            select(FrontHistoryRow, TrialRow.number)
            .join(TrialRow, TrialRow.id == FrontHistoryRow.trial_id)
            .where(FrontHistoryRow.job_id == job_id, FrontHistoryRow.sequence > after)
            .order_by(FrontHistoryRow.sequence)
            .limit(limit)
        )
        return [(row, number) for row, number in rows]


def _completed(job_id: str) -> Select[TrialRow]:
    return (
        select(TrialRow)
        .where(TrialRow.job_id == job_id, TrialRow.state == TrialState.COMPLETED)
        .order_by(TrialRow.number)
    )


def _task_weights(row: JobRow) -> dict[str, float]:
    """The job's tasks by name; where its spec names none they are all of its source's."""
    own_metrics = [name.removeprefix("task.") for name in row.directions if name.startswith("task.")]
    weights = {name.rpartition(".")[0]: 1.0 for name in own_metrics}
    chosen = (
        TaskChoice(name=task) if isinstance(task, str) else TaskChoice(**task) for task in row.spec["tasks"]
    )
    return weights | {task.name: task.weight for task in chosen}


def _found(row: Row | None, kind: str, row_id: str) -> Row:
    if row is None:
        raise NotFound(f"there is no {kind} {row_id}")
    return row
