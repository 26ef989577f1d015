"""The SQL `TrialStore`: a driver's view of its own job."""

import hashlib
import json
import math
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from datetime import UTC, datetime, timedelta
from functools import wraps
from typing import Any, Concatenate, ParamSpec

from sqlalchemy import ColumnElement, func, or_, select, tuple_, update
from sqlalchemy.orm import Session, defer

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
from coterie.service.storage.database import Database, append_in_order, insert
from coterie.service.storage.events import EventKind, record_event
from coterie.service.storage.states import count_trial, end_job, move_trial, tell_trial
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
    TenantUsageRow,
    TrialRow,
    TrialValueRow,
)
from coterie.service.storage.tenants import month_of

LEASE = timedelta(seconds=30)
CLOCK_DIGITS = 3  # of seconds: a finer clock would only be longer to print

Arguments = ParamSpec("Arguments")


@dataclass
class _Write:
    """A transaction that holds the job's row, of the attempt that is the current one.

    Attributes:
        charged: Device-seconds that the tenant is yet to be charged.
    """

    session: Session
    job: JobRow
    attempt: AttemptRow
    now: datetime
    charged: float = 0.0

    def tell(self, kind: EventKind, **data: Any) -> None:
        record_event(self.session, self.job, kind, data, self.now)

    def move(self, trial: TrialRow, state: TrialState) -> None:
        move_trial(self.session, self.job, trial, state, self.now)

    def run(self, trial: TrialRow) -> None:
        trial.started_at = trial.started_at or self.now
        self.move(trial, TrialState.RUNNING)

    def charge(self, device_seconds: float) -> None:
        self.job.device_seconds += device_seconds
        self.charged += device_seconds

    def charge_trial(self, trial: TrialRow, device_seconds: float) -> None:
        self.charge(device_seconds - trial.device_seconds)
        trial.device_seconds = device_seconds

    def charge_side(self, device_seconds: float) -> None:
        self.attempt.side_device_seconds += device_seconds
        self.charge(device_seconds)

    def own(self, trial_id: str) -> TrialRow:
        row = self.session.scalar(
            select(TrialRow).where(TrialRow.id == trial_id, TrialRow.job_id == self.job.id)
        )
        if row is None:
            raise KeyError(trial_id)
        return row

    def live(self, trial_id: str) -> TrialRow:
        row = self.own(trial_id)
        if row.state in ENDED:
            raise TrialEnded(f"trial {trial_id} is {row.state}: an ended trial never changes")
        return row

    def finish(self) -> None:
        """Write all that changed, and charge the tenant: last, as its drivers wait for each other there."""
        self.session.flush()
        if not self.charged:
            return
        row = {"tenant": self.job.tenant, "month": month_of(self.now), "device_seconds": self.charged}
        self.session.execute(
            insert(self.session, TenantUsageRow)
            .values(row)
            .on_conflict_do_update(
                index_elements=[TenantUsageRow.tenant, TenantUsageRow.month],
                set_={"device_seconds": TenantUsageRow.device_seconds + self.charged},
            )
        )


def _write(
    body: Callable[Concatenate["SqlTrialStore", _Write, Arguments], None],
) -> Callable[Concatenate["SqlTrialStore", Arguments], None]:
    """Make `body` one write of the store: in a transaction, fenced, and done once however often it is tried.

    The attempt's row holds a digest of the newest write. A write that finds its own there was kept by an
    earlier try whose answer was lost.
    """

    @wraps(body)
    def write(store: "SqlTrialStore", /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        with store._lock:
            what = repr((store._name, store._written, body.__name__, args, kwargs))
            digest = hashlib.sha256(what.encode()).hexdigest()
            # Without autoflush a row is written once, with all that changed in it.
            with store._database.write() as session, session.no_autoflush:
                entered = store._enter(session, digest)
                if entered is not None:
                    body(store, entered, *args, **kwargs)
                    entered.finish()
            store._written += 1

    return write


class SqlTrialStore:
    """`TrialStore` of one attempt at one job. Every write also extends the attempt's lease.

    Numbers that are not finite are stored as None: JSON has no word for them. The job is charged the time
    from here to the last write.

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
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._name = secrets.token_hex(8)  # no other store's write is taken for one of its own
        self._written = 0

    def resume(self) -> Resumed:  # noqa: D102 - TrialStore says it
        with self._database.read() as session:
            rows = session.scalars(
                select(TrialRow).where(TrialRow.job_id == self._job_id).order_by(TrialRow.number)
            )
            attempts = session.scalars(select(AttemptRow).where(AttemptRow.job_id == self._job_id)).all()
            return Resumed(
                trials=[_trial(row) for row in rows],
                seconds=sum(row.seconds for row in attempts if row.attempt < self._attempt),
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

    @_write
    def beat(self, write: _Write) -> None:  # noqa: D102
        pass

    @_write
    def add_trial(self, write: _Write, trial: Trial) -> None:  # noqa: D102
        same_number = (TrialRow.job_id == self._job_id) & (TrialRow.number == trial.number)
        twins = select(TrialRow.id).where(or_(TrialRow.id == trial.id, same_number))
        if write.session.scalars(twins).first() is not None:
            raise ValueError(f"trial {trial.id}, number {trial.number}: id and number must be new")
        row = TrialRow(
            id=trial.id,
            job_id=self._job_id,
            number=trial.number,
            state=trial.state,
            family=trial.candidate.family,
            backbone=trial.candidate.backbone,
            parameters=_finite(trial.candidate.parameters),
            choices=_finite(trial.choices),
            seed=trial.seed,
            origin=trial.origin,
            values={},
            test={},
            tasks={},
            epochs=trial.epochs,
            device_seconds=trial.device_seconds,
            crashes=trial.crashes,
            on_front=False,
            files={},
        )
        write.session.add(row)
        write.charge(trial.device_seconds)
        count_trial(write.job, trial.state, 1)
        tell_trial(write.session, write.job, row, write.now)

    @_write
    def start_trial(self, write: _Write, trial_id: str) -> None:  # noqa: D102
        write.run(write.live(trial_id))

    @_write
    def measure(self, write: _Write, trial_id: str, measurement: Measurement) -> None:  # noqa: D102
        trial = write.live(trial_id)
        trial.epochs = measurement.epoch
        trial.worker = measurement.worker
        write.charge_trial(trial, measurement.device_seconds)
        write.run(trial)
        values = _finite(measurement.values)
        row = {
            "values": values,
            "tasks": _finite(measurement.tasks),
            "device_seconds": measurement.device_seconds,
            "worker": measurement.worker,
            "at": write.now,
        }
        write.session.execute(
            insert(write.session, MeasurementRow)
            .values(trial_id=trial_id, epoch=measurement.epoch, **row)
            .on_conflict_do_update(index_elements=[MeasurementRow.trial_id, MeasurementRow.epoch], set_=row)
        )
        write.tell(
            EventKind.MEASUREMENT,
            trial_id=trial_id,
            number=trial.number,
            epoch=measurement.epoch,
            values=values,
            device_seconds=measurement.device_seconds,
        )

    @_write
    def preempt(self, write: _Write, trial_id: str) -> None:  # noqa: D102
        trial = write.live(trial_id)
        trial.crashes += 1
        write.move(trial, TrialState.PENDING)

    @_write
    def end_trial(  # noqa: D102
        self, write: _Write, trial_id: str, ending: Ending, front: FrontUpdate | None
    ) -> None:
        trial = write.live(trial_id)
        trial.reason = _storable(ending.reason)
        trial.values = _finite(ending.values)
        trial.test = _finite(ending.test)
        trial.tasks = _finite(ending.tasks)
        trial.grouping = ending.grouping
        trial.epochs = ending.epochs
        trial.files = {
            name: {"size": file.size, "sha256": file.sha256} for name, file in ending.files.items()
        }
        trial.attempt = self._attempt
        trial.ended_at = write.now
        trial.on_front = front is not None and front.on_front
        write.charge_trial(trial, ending.device_seconds)
        write.job.stored_bytes += sum(file.size for file in ending.files.values())
        write.move(trial, ending.state)
        if ending.state in (TrialState.COMPLETED, TrialState.STOPPED):
            write.session.add_all(
                TrialValueRow(job_id=self._job_id, metric=metric, number=trial.number, value=value)
                for metric, value in trial.values.items()
                if value is not None
            )
        if front is not None:
            _move_front(write, trial, front)

    @_write
    def set_reference_point(self, write: _Write, point: Mapping[str, float]) -> None:  # noqa: D102
        write.job.reference_point = dict(point)

    def find_references(self, keys: Sequence[ReferenceKey]) -> dict[ReferenceKey, Reference]:  # noqa: D102
        with self._database.read() as session:
            rows = self._stored_references(session, self._tenant(), keys)
        return {
            key: Reference(
                validation=row.validation,
                test=row.test,
                device_seconds=row.device_seconds,
                latency_ms=row.latency_ms,
            )
            for key, row in rows.items()
        }

    @_write
    def add_reference(self, write: _Write, key: ReferenceKey, reference: Reference) -> None:  # noqa: D102
        write.charge_side(reference.device_seconds)
        write.session.execute(
            insert(write.session, ReferenceRow)
            .values(
                tenant=write.job.tenant,
                **asdict(key),
                validation=_finite(reference.validation),
                test=_finite(reference.test),
                device_seconds=reference.device_seconds,
                latency_ms=reference.latency_ms,
                at=write.now,
            )
            .on_conflict_do_nothing()  # another job was faster
        )

    @_write
    def use_references(self, write: _Write, keys: Sequence[ReferenceKey]) -> None:  # noqa: D102
        rows = self._stored_references(write.session, write.job.tenant, keys)
        missing = [key for key in keys if key not in rows]
        if missing:
            raise KeyError(missing[0])
        uses = [{"job_id": self._job_id, "reference": row.position} for row in rows.values()]
        if uses:
            write.session.execute(insert(write.session, JobReferenceRow).on_conflict_do_nothing(), uses)

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

    @_write
    def add_subsets(  # noqa: D102
        self,
        write: _Write,
        setting: Setting,
        run: int,
        results: Sequence[SubsetResult],
        device_seconds: float,
    ) -> None:
        append_in_order(write.session, SubsetRow.__tablename__)
        of_run = (SubsetRow.job_id == self._job_id) & (SubsetRow.run == run)
        if write.session.scalar(select(SubsetRow.position).where(of_run).limit(1)) is not None:
            raise ValueError(f"run: must be new, {run} holds other results")
        write.charge_side(device_seconds)
        for result in results:
            row = SubsetRow(
                tenant=write.job.tenant,
                job_id=self._job_id,
                run=run,
                **asdict(setting),
                subset=_weighted(result),
                seed=result.seed,
                validation=_finite(result.validation),
                test=_finite(result.test),
                at=write.now,
            )
            write.session.add(row)
            write.session.flush()  # one by one: their order is the results'

    def find_affinities(self, setting: Setting) -> list[AffinityResult]:  # noqa: D102
        with self._database.read() as session:
            rows = session.scalars(
                select(AffinityRow)
                .filter_by(**asdict(setting))
                .where(AffinityRow.tenant == self._tenant())
                .order_by(AffinityRow.position)
            )
            return [affinity_of(row) for row in rows]

    @_write
    def add_affinity(  # noqa: D102
        self, write: _Write, setting: Setting, result: AffinityResult, device_seconds: float
    ) -> None:
        append_in_order(write.session, AffinityRow.__tablename__)
        write.charge_side(device_seconds)
        write.session.execute(
            insert(write.session, AffinityRow)
            .values(
                tenant=write.job.tenant,
                job_id=self._job_id,
                **asdict(setting),
                method=result.method,
                tasks=_weighted(result),
                seed=result.seed,
                matrix=_finite(result.matrix),
                at=write.now,
            )
            .on_conflict_do_nothing()  # another job was faster
        )

    @_write
    def charge_side(self, write: _Write, device_seconds: float) -> None:  # noqa: D102
        write.charge_side(device_seconds)

    @_write
    def use_setting(self, write: _Write, setting: Setting) -> None:  # noqa: D102
        write.job.side_setting = asdict(setting)

    @_write
    def add_confirmation(self, write: _Write, confirmation: Confirmation) -> None:  # noqa: D102
        write.own(confirmation.trial_id)
        key = confirmation.trial_id, confirmation.role, confirmation.seed
        if write.session.get(ConfirmationRow, key) is not None:
            raise ValueError(
                f"confirmation: trial, role and seed must be new, found {', '.join(map(str, key))}"
            )
        ending, candidate = confirmation.ending, confirmation.candidate
        last = write.session.scalar(
            select(func.max(ConfirmationRow.sequence)).where(ConfirmationRow.job_id == self._job_id)
        )
        write.charge_side(ending.device_seconds)
        write.session.add(
            ConfirmationRow(
                trial_id=confirmation.trial_id,
                role=confirmation.role,
                seed=confirmation.seed,
                sequence=(last or 0) + 1,
                job_id=self._job_id,
                state=ending.state,
                reason=_storable(ending.reason),
                family=candidate.family,
                backbone=candidate.backbone,
                parameters=_finite(candidate.parameters),
                grouping=ending.grouping,
                values=_finite(ending.values),
                test=_finite(ending.test),
                tasks=_finite(ending.tasks),
                epochs=ending.epochs,
                device_seconds=ending.device_seconds,
                at=write.now,
            )
        )

    @_write
    def set_verdict(self, write: _Write, verdict: Verdict) -> None:  # noqa: D102
        write.job.verdict = asdict(verdict)

    @_write
    def set_estimate(self, write: _Write, seconds_left: float | None) -> None:  # noqa: D102
        write.job.eta_seconds = seconds_left
        write.job.eta_at = None if seconds_left is None else write.now

    @_write
    def finish(self, write: _Write, state: JobState, reason: str | None) -> None:  # noqa: D102
        end_job(write.session, write.job, state, _storable(reason), write.now)

    def _enter(self, session: Session, digest: str) -> _Write | None:
        """Lock the job and say that its driver lives; None where the write of this digest was kept before.

        Raises:
            Fenced: If this attempt is not the current one.
        """
        now = datetime.now(UTC)
        query = (
            select(JobRow, AttemptRow)
            .join(AttemptRow, AttemptRow.job_id == JobRow.id)
            .where(JobRow.id == self._job_id, AttemptRow.attempt == self._attempt)
            .options(defer(JobRow.spec), defer(JobRow.directions))  # long, and nothing to a write
            .with_for_update()
        )
        found = session.execute(query).one_or_none()
        if found is None:
            raise Fenced(f"job {self._job_id} is deleted")
        job, attempt = found
        if attempt.last_write_digest == digest:
            return None
        if job.attempt != self._attempt or job.state != JobState.RUNNING:
            raise Fenced(f"attempt {self._attempt} at {self._job_id} is over")
        seconds = round(time.monotonic() - self._began, CLOCK_DIGITS)
        job.seconds += seconds - attempt.seconds
        job.beats += 1
        job.lease_expires_at = now + self._lease
        attempt.seconds = seconds
        attempt.last_seen_at = now
        attempt.last_write_digest = digest
        return _Write(session, job, attempt, now)

    def _tenant(self) -> ColumnElement[str]:
        return select(JobRow.tenant).where(JobRow.id == self._job_id).scalar_subquery()

    @staticmethod
    def _stored_references(
        session: Session, tenant: str | ColumnElement[str], keys: Sequence[ReferenceKey]
    ) -> dict[ReferenceKey, ReferenceRow]:
        names = [field.name for field in fields(ReferenceKey)]
        key = tuple_(*(getattr(ReferenceRow, name) for name in names))
        rows = session.scalars(
            select(ReferenceRow).where(
                ReferenceRow.tenant == tenant,
                ReferenceRow.data.in_({wanted.data for wanted in keys}),  # one: SQLite finds it by index
                key.in_([astuple(wanted) for wanted in keys]),
            )
        )
        return {ReferenceKey(**{name: getattr(row, name) for name in names}): row for row in rows}


def _storable(text: str | None) -> str | None:
    """An error's words as every database holds them: no NUL, no half of a character."""
    return None if text is None else text.replace("\0", "\ufffd").encode(errors="replace").decode()


def _move_front(write: _Write, trial: TrialRow, front: FrontUpdate) -> None:
    write.session.execute(
        update(TrialRow)
        .where(TrialRow.job_id == write.job.id, TrialRow.id.in_(front.displaced))
        .values(on_front=False)
    )
    write.job.hypervolume = front.hypervolume
    before = write.session.scalar(
        select(func.max(FrontHistoryRow.sequence)).where(FrontHistoryRow.job_id == write.job.id)
    )
    write.session.add(
        FrontHistoryRow(
            job_id=write.job.id,
            sequence=(before or 0) + 1,
            trial_id=trial.id,
            hypervolume=front.hypervolume,
            size=front.size,
            at=write.now,
        )
    )
    if front.on_front:
        write.tell(
            EventKind.FRONT,
            trial_id=trial.id,
            hypervolume=front.hypervolume,
            size=front.size,
            displaced=list(front.displaced),
        )


def visible_subsets(session: Session, job: JobRow, setting: Setting) -> list[SubsetRow]:
    """What `TrialStore.find_subsets` says a job knows."""
    rows = session.scalars(
        select(SubsetRow)
        .filter_by(tenant=job.tenant, **asdict(setting))
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


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
