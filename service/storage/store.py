"""The SQL `TrialStore`: a driver's view of its own job."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import func, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from coterie.search.store import (
    ENDED,
    Candidate,
    Ending,
    Fenced,
    FrontUpdate,
    JobState,
    Measurement,
    Reference,
    ReferenceKey,
    Resumed,
    StoredFile,
    Trial,
    TrialEnded,
    TrialState,
)
from coterie.service.storage.database import Database
from coterie.service.storage.tables import (
    AttemptRow,
    FrontHistoryRow,
    JobRow,
    MeasurementRow,
    ReferenceRow,
    TrialRow,
)

LEASE = timedelta(seconds=30)


class SqlTrialStore:
    """`TrialStore` of one attempt at one job. Every write also extends the attempt's lease.

    Numbers that are not finite are stored as None: JSON has no word for them.

    Args:
        database: Where the job is.
        job_id: Of the job.
        attempt: As the dispatcher claimed it.
        lease: How long after a write the attempt still counts as alive.
    """

    def __init__(self, database: Database, job_id: str, attempt: int, lease: timedelta = LEASE) -> None:
        self._database = database
        self._job_id = job_id
        self._attempt = attempt
        self._lease = lease

    def resume(self) -> Resumed:  # noqa: D102 - TrialStore says it
        with self._database.read() as session:
            rows = session.scalars(
                select(TrialRow).where(TrialRow.job_id == self._job_id).order_by(TrialRow.number)
            )
            attempts = session.scalars(select(AttemptRow).where(AttemptRow.job_id == self._job_id)).all()
            return Resumed(
                trials=[_trial(row) for row in rows],
                seconds=sum(
                    (row.last_seen_at - row.started_at).total_seconds()
                    for row in attempts
                    if row.attempt < self._attempt
                ),
                reference_device_seconds=sum(row.reference_device_seconds for row in attempts),
                reference_point=session.scalar(
                    select(JobRow.reference_point).where(JobRow.id == self._job_id)
                ),
            )

    def beat(self) -> None:  # noqa: D102
        with self._writing():
            pass

    def add_trial(self, trial: Trial) -> None:  # noqa: D102
        with self._writing() as session:
            same_number = (TrialRow.job_id == self._job_id) & (TrialRow.number == trial.number)
            if (
                session.scalar(select(TrialRow.id).where(or_(TrialRow.id == trial.id, same_number)))
                is not None
            ):
                raise ValueError(f"trial {trial.id}, number {trial.number}: id and number must be new")
            session.add(
                TrialRow(
                    id=trial.id,
                    job_id=self._job_id,
                    number=trial.number,
                    state=trial.state,
                    family=trial.candidate.family,
                    backbone=trial.candidate.backbone,
                    parameters=_finite(trial.candidate.parameters),
                    choices=_finite(trial.choices),
                    seed=trial.seed,
                    values={},
                    test={},
                    tasks={},
                    epochs=trial.epochs,
                    device_seconds=trial.device_seconds,
                    crashes=trial.crashes,
                    on_front=False,
                    files={},
                )
            )

    def start_trial(self, trial_id: str) -> None:  # noqa: D102
        with self._writing() as session:
            _run(self._live(session, trial_id))

    def measure(self, trial_id: str, measurement: Measurement) -> None:  # noqa: D102
        with self._writing() as session:
            row = self._live(session, trial_id)
            _run(row)
            row.epochs = measurement.epoch
            row.device_seconds = measurement.device_seconds
            row.worker = measurement.worker
            session.merge(
                MeasurementRow(
                    trial_id=trial_id,
                    epoch=measurement.epoch,
                    values=_finite(measurement.values),
                    tasks=_finite(measurement.tasks),
                    device_seconds=measurement.device_seconds,
                    worker=measurement.worker,
                    at=_now(),
                )
            )

    def preempt(self, trial_id: str) -> None:  # noqa: D102
        with self._writing() as session:
            row = self._live(session, trial_id)
            row.state = TrialState.PENDING
            row.crashes += 1

    def end_trial(self, trial_id: str, ending: Ending, front: FrontUpdate | None) -> None:  # noqa: D102
        with self._writing() as session:
            row = self._live(session, trial_id)
            row.state = ending.state
            row.reason = ending.reason
            row.values = _finite(ending.values)
            row.test = _finite(ending.test)
            row.tasks = _finite(ending.tasks)
            row.grouping = ending.grouping
            row.epochs = ending.epochs
            row.device_seconds = ending.device_seconds
            row.files = {
                name: {"size": file.size, "sha256": file.sha256} for name, file in ending.files.items()
            }
            row.attempt = self._attempt
            row.ended_at = _now()
            if front is not None:
                self._move_front(session, row, front)

    def set_reference_point(self, point: Mapping[str, float]) -> None:  # noqa: D102
        with self._writing() as session:
            session.execute(
                update(JobRow).where(JobRow.id == self._job_id).values(reference_point=dict(point))
            )

    def find_references(self, keys: Sequence[ReferenceKey]) -> dict[ReferenceKey, Reference]:  # noqa: D102
        with self._database.read() as session:
            found = {key: session.scalar(_reference_query(key)) for key in keys}
        return {
            key: Reference(
                validation=row.validation,
                test=row.test,
                device_seconds=row.device_seconds,
                latency_ms=row.latency_ms,
            )
            for key, row in found.items()
            if row is not None
        }

    def add_reference(self, key: ReferenceKey, reference: Reference) -> None:  # noqa: D102
        with self._writing() as session:
            session.execute(
                update(AttemptRow)
                .where(AttemptRow.job_id == self._job_id, AttemptRow.attempt == self._attempt)
                .values(
                    reference_device_seconds=AttemptRow.reference_device_seconds + reference.device_seconds
                )
            )
            row = ReferenceRow(
                **_columns(key),
                validation=_finite(reference.validation),
                test=_finite(reference.test),
                device_seconds=reference.device_seconds,
                latency_ms=reference.latency_ms,
                at=_now(),
            )
            with suppress(IntegrityError), session.begin_nested():  # another job was faster
                session.add(row)

    def finish(self, state: JobState, reason: str | None) -> None:  # noqa: D102
        now = _now()
        with self._writing() as session:
            end_job(session, self._job_id, state, reason, now)

    @contextmanager
    def _writing(self) -> Iterator[Session]:
        """A transaction that holds the job's row and has seen that this attempt is the current one."""
        now = _now()
        with self._database.write() as session:
            current = session.execute(
                update(JobRow)
                .where(
                    JobRow.id == self._job_id,
                    JobRow.attempt == self._attempt,
                    JobRow.state == JobState.RUNNING,
                )
                .values(lease_expires_at=now + self._lease)
                .returning(JobRow.id)
            ).first()
            if current is None:
                raise Fenced(f"attempt {self._attempt} at {self._job_id} is over")
            session.execute(
                update(AttemptRow)
                .where(AttemptRow.job_id == self._job_id, AttemptRow.attempt == self._attempt)
                .values(last_seen_at=now)
            )
            yield session

    def _live(self, session: Session, trial_id: str) -> TrialRow:
        row = session.scalar(select(TrialRow).where(TrialRow.id == trial_id, TrialRow.job_id == self._job_id))
        if row is None:
            raise KeyError(trial_id)
        if row.state in ENDED:
            raise TrialEnded(f"trial {trial_id} is {row.state}: an ended trial never changes")
        return row

    def _move_front(self, session: Session, row: TrialRow, front: FrontUpdate) -> None:
        row.on_front = front.on_front
        session.execute(
            update(TrialRow)
            .where(TrialRow.job_id == self._job_id, TrialRow.id.in_(front.displaced))
            .values(on_front=False)
        )
        session.execute(update(JobRow).where(JobRow.id == self._job_id).values(hypervolume=front.hypervolume))
        before = session.scalar(
            select(func.max(FrontHistoryRow.sequence)).where(FrontHistoryRow.job_id == self._job_id)
        )
        session.add(
            FrontHistoryRow(
                job_id=self._job_id,
                sequence=(before or 0) + 1,
                trial_id=row.id,
                hypervolume=front.hypervolume,
                size=front.size,
                at=_now(),
            )
        )


def end_job(session: Session, job_id: str, state: JobState, reason: str | None, now: datetime) -> None:
    """End a job, its current attempt, and its unfinished trials with it."""
    session.execute(
        update(JobRow)
        .where(JobRow.id == job_id)
        .values(state=state, reason=reason, ended_at=now, lease_expires_at=None)
    )
    session.execute(
        update(AttemptRow)
        .where(AttemptRow.job_id == job_id, AttemptRow.ended_at.is_(None))
        .values(ended_at=now)
    )
    session.execute(
        update(TrialRow)
        .where(TrialRow.job_id == job_id, TrialRow.state.not_in(ENDED))
        .values(state=TrialState.CANCELLED, ended_at=now)
    )


def _run(row: TrialRow) -> None:
    row.state = TrialState.RUNNING
    row.started_at = row.started_at or _now()


def _trial(row: TrialRow) -> Trial:
    state = TrialState(row.state)
    return Trial(
        id=row.id,
        number=row.number,
        candidate=Candidate(family=row.family, backbone=row.backbone, parameters=row.parameters),
        choices=row.choices,
        seed=row.seed,
        state=state,
        crashes=row.crashes,
        ending=_ending(row) if state in ENDED else None,
        epochs=row.epochs,
        device_seconds=row.device_seconds,
    )


def _ending(row: TrialRow) -> Ending:
    return Ending(
        state=TrialState(row.state),
        reason=row.reason,
        values=row.values,
        test=row.test,
        tasks=row.tasks,
        grouping=row.grouping,
        epochs=row.epochs,
        device_seconds=row.device_seconds,
        files={name: StoredFile(**file) for name, file in row.files.items()},
    )


def _columns(key: ReferenceKey) -> dict[str, Any]:
    return {
        "data": key.data,
        "task": key.task,
        "backbone": key.backbone,
        "recipe": key.recipe,
        "epochs": key.epochs,
        "seed": key.seed,
    }


def _reference_query(key: ReferenceKey) -> Any:
    return select(ReferenceRow).filter_by(**_columns(key))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _now() -> datetime:
    return datetime.now(UTC)
