"""The SQL `TrialStore`: a driver's view of its own job."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Select, func, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from coterie.search.store import (
    ENDED,
    AffinityResult,
    Candidate,
    Confirmation,
    Ending,
    Fenced,
    FrontUpdate,
    JobState,
    Measurement,
    Reference,
    ReferenceKey,
    Resumed,
    Role,
    Setting,
    StoredFile,
    SubsetResult,
    Trial,
    TrialEnded,
    TrialState,
    Verdict,
)
from coterie.service.storage.database import Database, append_in_order
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
    Table,
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
                side_device_seconds=sum(row.side_device_seconds for row in attempts),
                reference_point=session.scalar(
                    select(JobRow.reference_point).where(JobRow.id == self._job_id)
                ),
                confirmations=[
                    confirmation_of(row)
                    for row in session.scalars(
                        select(ConfirmationRow)
                        .where(ConfirmationRow.job_id == self._job_id)
                        .order_by(ConfirmationRow.sequence)
                    )
                ],
            )

    def beat(self) -> None:  # noqa: D102
        with self._writing():
            pass

    def add_trial(self, trial: Trial) -> None:  # noqa: D102
        columns = {
            "id": trial.id,
            "job_id": self._job_id,
            "number": trial.number,
            "state": trial.state,
            "family": trial.candidate.family,
            "backbone": trial.candidate.backbone,
            "parameters": _finite(trial.candidate.parameters),
            "choices": _finite(trial.choices),
            "seed": trial.seed,
            "origin": trial.origin,
            "values": {},
            "test": {},
            "tasks": {},
            "epochs": trial.epochs,
            "device_seconds": trial.device_seconds,
            "crashes": trial.crashes,
            "on_front": False,
            "files": {},
        }
        with self._writing() as session:
            same_number = (TrialRow.job_id == self._job_id) & (TrialRow.number == trial.number)
            stored = session.scalars(select(TrialRow).where(or_(TrialRow.id == trial.id, same_number))).all()
            if not stored:
                session.add(TrialRow(**columns))
            elif not all(_holds(row, columns) for row in stored):
                raise ValueError(f"trial {trial.id}, number {trial.number}: id and number must be new")

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
        self._change_job(reference_point=dict(point))

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
            self._charge(session, reference.device_seconds)
            row = ReferenceRow(
                **asdict(key),
                validation=_finite(reference.validation),
                test=_finite(reference.test),
                device_seconds=reference.device_seconds,
                latency_ms=reference.latency_ms,
                at=_now(),
            )
            with suppress(IntegrityError), session.begin_nested():  # another job was faster
                session.add(row)

    def use_references(self, keys: Sequence[ReferenceKey]) -> None:  # noqa: D102
        with self._writing() as session:
            for key in keys:
                reference = session.scalar(_reference_query(key))
                if reference is None:
                    raise KeyError(key)
                session.merge(JobReferenceRow(job_id=self._job_id, reference=reference.position))

    def measurements_at(self, epochs: Sequence[int]) -> dict[str, dict[int, Measurement]]:  # noqa: D102
        found: dict[str, dict[int, Measurement]] = {}
        with self._database.read() as session:
            rows = session.scalars(
                select(MeasurementRow)
                .join(TrialRow, TrialRow.id == MeasurementRow.trial_id)
                .where(TrialRow.job_id == self._job_id, MeasurementRow.epoch.in_(epochs))
                .order_by(TrialRow.number, MeasurementRow.epoch)
            )
            for row in rows:
                found.setdefault(row.trial_id, {})[row.epoch] = _measurement(row)
        return found

    def find_subsets(self, setting: Setting) -> list[SubsetResult]:  # noqa: D102
        with self._database.read() as session:
            job = session.scalars(select(JobRow).where(JobRow.id == self._job_id)).one()
            rows = visible_subsets(session, job, setting)
        return [subset_of(row, self._job_id) for row in rows]

    def add_subsets(  # noqa: D102
        self, setting: Setting, run: int, results: Sequence[SubsetResult], device_seconds: float
    ) -> None:
        columns = [
            {
                **asdict(setting),
                "job_id": self._job_id,
                "run": run,
                "subset": _weighted(result),
                "seed": result.seed,
                "validation": _finite(result.validation),
                "test": _finite(result.test),
            }
            for result in results
        ]
        with self._writing() as session:
            append_in_order(session, SubsetRow.__tablename__)
            stored = session.scalars(
                select(SubsetRow)
                .where(SubsetRow.job_id == self._job_id, SubsetRow.run == run)
                .order_by(SubsetRow.position)
            ).all()
            if not stored:
                self._charge(session, device_seconds)
                for new in columns:
                    session.add(SubsetRow(**new, at=_now()))
                    session.flush()  # one by one: their order is the results'
            elif len(stored) != len(columns) or not all(map(_holds, stored, columns)):
                raise ValueError(f"run: must be new, {run} holds other results")

    def find_affinities(self, setting: Setting) -> list[AffinityResult]:  # noqa: D102
        with self._database.read() as session:
            rows = session.scalars(
                select(AffinityRow).filter_by(**asdict(setting)).order_by(AffinityRow.position)
            )
            return [affinity_of(row) for row in rows]

    def add_affinity(  # noqa: D102
        self, setting: Setting, result: AffinityResult, device_seconds: float
    ) -> None:
        key = {
            **asdict(setting),
            "method": result.method,
            "tasks": _weighted(result),
            "seed": result.seed,
        }
        mine = {"job_id": self._job_id, "matrix": _finite(result.matrix)}
        with self._writing() as session:
            append_in_order(session, AffinityRow.__tablename__)
            stored = session.scalar(select(AffinityRow).filter_by(**key))
            if stored is not None and stored.job_id == self._job_id:
                if not _holds(stored, mine):
                    raise ValueError(f"result: must be the first of its tasks and seed, found {result}")
                return
            self._charge(session, device_seconds)
            if stored is None:
                session.add(AffinityRow(**key, **mine, at=_now()))

    def charge_side(self, device_seconds: float) -> None:  # noqa: D102
        with self._writing() as session:
            self._charge(session, device_seconds)

    def use_setting(self, setting: Setting) -> None:  # noqa: D102
        self._change_job(side_setting=asdict(setting))

    def add_confirmation(self, confirmation: Confirmation) -> None:  # noqa: D102
        ending = confirmation.ending
        columns = {
            "trial_id": confirmation.trial_id,
            "role": confirmation.role,
            "seed": confirmation.seed,
            "job_id": self._job_id,
            "state": ending.state,
            "reason": ending.reason,
            "family": confirmation.candidate.family,
            "backbone": confirmation.candidate.backbone,
            "parameters": _finite(confirmation.candidate.parameters),
            "grouping": ending.grouping,
            "values": _finite(ending.values),
            "test": _finite(ending.test),
            "tasks": _finite(ending.tasks),
            "epochs": ending.epochs,
            "device_seconds": ending.device_seconds,
        }
        with self._writing() as session:
            self._own(session, confirmation.trial_id)
            stored = session.get(
                ConfirmationRow, (confirmation.trial_id, confirmation.role, confirmation.seed)
            )
            if stored is None:
                self._charge(session, ending.device_seconds)
                last = session.scalar(
                    select(func.max(ConfirmationRow.sequence)).where(ConfirmationRow.job_id == self._job_id)
                )
                session.add(ConfirmationRow(**columns, sequence=(last or 0) + 1, at=_now()))
            elif not _holds(stored, columns):
                raise ValueError(
                    f"confirmation: trial, role and seed must be new, found {confirmation.trial_id}, "
                    f"{confirmation.role}, {confirmation.seed}"
                )

    def set_verdict(self, verdict: Verdict) -> None:  # noqa: D102
        self._change_job(verdict=asdict(verdict))

    def set_estimate(self, seconds_left: float | None) -> None:  # noqa: D102
        self._change_job(eta_seconds=seconds_left, eta_at=None if seconds_left is None else _now())

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

    def _change_job(self, **values: object) -> None:
        with self._writing() as session:
            session.execute(update(JobRow).where(JobRow.id == self._job_id).values(**values))

    def _charge(self, session: Session, device_seconds: float) -> None:
        session.execute(
            update(AttemptRow)
            .where(AttemptRow.job_id == self._job_id, AttemptRow.attempt == self._attempt)
            .values(side_device_seconds=AttemptRow.side_device_seconds + device_seconds)
        )

    def _own(self, session: Session, trial_id: str) -> TrialRow:
        row = session.scalar(select(TrialRow).where(TrialRow.id == trial_id, TrialRow.job_id == self._job_id))
        if row is None:
            raise KeyError(trial_id)
        return row

    def _live(self, session: Session, trial_id: str) -> TrialRow:
        row = self._own(session, trial_id)
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
        .values(
            state=state, reason=reason, ended_at=now, lease_expires_at=None, eta_seconds=None, eta_at=None
        )
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


def visible_subsets(session: Session, job: JobRow, setting: Setting) -> list[SubsetRow]:
    """What `TrialStore.find_subsets` says a job knows."""
    rows = session.scalars(
        select(SubsetRow)
        .filter_by(**asdict(setting))
        .where(or_(SubsetRow.job_id == job.id, SubsetRow.position <= job.memory_until))
        .order_by(SubsetRow.position)
    )
    chosen: dict[tuple[str, int], SubsetRow] = {}
    for row in rows:
        known = chosen.setdefault((row.subset, row.seed), row)
        if known.job_id != job.id and row.job_id == job.id:
            chosen[row.subset, row.seed] = row
    return sorted(chosen.values(), key=lambda row: row.position)


def confirmation_of(row: ConfirmationRow) -> Confirmation:
    """A row as a search sees it."""
    return Confirmation(
        trial_id=row.trial_id,
        role=Role(row.role),
        candidate=Candidate(family=row.family, backbone=row.backbone, parameters=row.parameters),
        seed=row.seed,
        ending=_ending(row),
    )


def subset_of(row: SubsetRow, job_id: str) -> SubsetResult:
    """A row as the search of job `job_id` sees it."""
    return SubsetResult(
        **_tasks_of(row.subset),
        seed=row.seed,
        validation=row.validation,
        test=row.test,
        run=row.run if row.job_id == job_id else None,
    )


def affinity_of(row: AffinityRow) -> AffinityResult:
    """A row as a search sees it."""
    return AffinityResult(method=row.method, **_tasks_of(row.tasks), seed=row.seed, matrix=row.matrix)


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
        origin=row.origin,
        state=state,
        crashes=row.crashes,
        ending=_ending(row) if state in ENDED else None,
        epochs=row.epochs,
        device_seconds=row.device_seconds,
    )


def _ending(row: TrialRow | ConfirmationRow) -> Ending:
    files = row.files if isinstance(row, TrialRow) else {}
    return Ending(
        state=TrialState(row.state),
        reason=row.reason,
        values=row.values,
        test=row.test,
        tasks=row.tasks,
        grouping=row.grouping,
        epochs=row.epochs,
        device_seconds=row.device_seconds,
        files={name: StoredFile(**file) for name, file in files.items()},
    )


def _measurement(row: MeasurementRow) -> Measurement:
    return Measurement(
        epoch=row.epoch,
        values=row.values,
        tasks=row.tasks,
        device_seconds=row.device_seconds,
        worker=row.worker,
    )


def _weighted(result: SubsetResult | AffinityResult) -> str:
    """The tasks with their weights, as the tables key them: equal text for equal numbers."""
    pairs = [[task, float(weight)] for task, weight in zip(result.tasks, result.weights, strict=True)]
    return json.dumps(pairs, separators=(",", ":"))


def _tasks_of(weighted: str) -> dict[str, Any]:
    pairs = json.loads(weighted)
    return {"tasks": tuple(task for task, _ in pairs), "weights": tuple(weight for _, weight in pairs)}


def _holds(row: Table, columns: Mapping[str, Any]) -> bool:
    """Whether a row is what is to be written: then an earlier try of this write was kept."""
    return all(getattr(row, name) == value for name, value in columns.items())


def _reference_query(key: ReferenceKey) -> Select[ReferenceRow]:
    return select(ReferenceRow).filter_by(**asdict(key))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _now() -> datetime:
    return datetime.now(UTC)
