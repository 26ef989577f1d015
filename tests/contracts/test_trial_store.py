"""The contract of `coterie.search.store.TrialStore`, held to every store."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import pytest
from sqlalchemy import select

from coterie.search.spec import JobSpec
from coterie.search.store import (
    Candidate,
    Ending,
    Fenced,
    FrontUpdate,
    InMemoryStore,
    JobState,
    Measurement,
    Reference,
    ReferenceKey,
    StoredFile,
    Trial,
    TrialEnded,
    TrialState,
    TrialStore,
)
from coterie.service.storage import migrate
from coterie.service.storage.database import Database
from coterie.service.storage.repositories import JobRepository, TrialRepository
from coterie.service.storage.store import SqlTrialStore
from coterie.service.storage.tables import JobRow, MeasurementRow, TrialRow

SPEC = JobSpec.model_validate({"dataset": {"source": "digits"}, "budget": {"trials": 5}})
LEASE = timedelta(seconds=30)
KEY = ReferenceKey(data="d", task="left", backbone="mlp-24-2", recipe="adam", epochs=20, seed=2**63 - 1)
REFERENCE = Reference(validation={"error": 0.25}, test={"error": 0.5}, device_seconds=1.5, latency_ms=0.25)
COMPLETED = Ending(
    state=TrialState.COMPLETED,
    values={"delta_m": 1.5, "macs": 100.0, "latency_ms": None},
    test={"delta_m": 1.25},
    tasks={"left": {"validation": {"error": 0.125}, "test": {"error": 0.25}}},
    grouping=[["left"], ["right", "up"]],
    epochs=20,
    device_seconds=4.5,
    files={"weights.safetensors": StoredFile(size=10, sha256="ab" * 32)},
)


class Job(Protocol):
    """A job under test: gives stores, and shows what they have done."""

    def attempt(self) -> TrialStore: ...
    def front(self) -> set[str]: ...
    def history(self) -> list[tuple[str, float | None]]: ...
    def measurements(self) -> dict[tuple[str, int], Measurement]: ...
    def state(self) -> tuple[JobState, str | None]: ...


class MemoryJob:
    def __init__(self) -> None:
        self._latest: InMemoryStore | None = None

    def attempt(self) -> InMemoryStore:
        self._latest = InMemoryStore() if self._latest is None else self._latest.attempt()
        return self._latest

    @property
    def _store(self) -> InMemoryStore:
        assert self._latest is not None
        return self._latest

    def front(self) -> set[str]:
        return self._store.front

    def history(self) -> list[tuple[str, float | None]]:
        return self._store.history

    def measurements(self) -> dict[tuple[str, int], Measurement]:
        return self._store.measurements

    def state(self) -> tuple[JobState, str | None]:
        return self._store.state


class SqlJob:
    def __init__(self, database: Database) -> None:
        self.database = database
        with database.write() as session:
            self.id = JobRepository(session).create(SPEC, {}, _now())[0].id

    def attempt(self) -> SqlTrialStore:
        with self.database.write() as session:
            jobs = JobRepository(session)
            jobs.requeue(self.id, jobs.get(self.id).attempt, "its driver is gone", _now())
            claimed = jobs.claim_next(_now(), LEASE)
            assert claimed is not None
            assert claimed.job_id == self.id
        return SqlTrialStore(self.database, self.id, claimed.attempt)

    def front(self) -> set[str]:
        with self.database.read() as session:
            return {row.id for row in TrialRepository(session).front(self.id)}

    def history(self) -> list[tuple[str, float | None]]:
        with self.database.read() as session:
            rows = TrialRepository(session).history(self.id, after=0, limit=1000)
            return [(row.trial_id, row.hypervolume) for row, _ in rows]

    def measurements(self) -> dict[tuple[str, int], Measurement]:
        with self.database.read() as session:
            return {
                (row.trial_id, row.epoch): Measurement(
                    epoch=row.epoch,
                    values=row.values,
                    tasks=row.tasks,
                    device_seconds=row.device_seconds,
                    worker=row.worker,
                )
                for row in session.scalars(select(MeasurementRow))
            }

    def state(self) -> tuple[JobState, str | None]:
        with self.database.read() as session:
            row = JobRepository(session).get(self.id)
            return JobState(row.state), row.reason


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    url = f"sqlite:///{tmp_path / 'coterie.db'}"
    migrate.prepare(url)
    database = Database(url)
    yield database
    database.close()


@pytest.fixture(params=["memory", "sql"])
def job(request: pytest.FixtureRequest) -> Job:
    return MemoryJob() if request.param == "memory" else SqlJob(request.getfixturevalue("database"))


@pytest.fixture
def sql_job(database: Database) -> SqlJob:
    return SqlJob(database)


def _now() -> datetime:
    return datetime.now(UTC)


def _trial(number: int = 0, name: str = "trial") -> Trial:
    return Trial(
        id=f"{name}_{number}",
        number=number,
        candidate=Candidate(
            family="dmtg", backbone="mlp", parameters={"groups": 2, "lr": 0.005, "flag": True}
        ),
        choices={"family": "dmtg", "dmtg.groups": 2},
        seed=2**63 - 1,
    )


def _measurement(epoch: int = 1, error: float = 0.5) -> Measurement:
    return Measurement(
        epoch=epoch,
        values={"total_error": error},
        tasks={"left": {"error": error}},
        device_seconds=epoch * 0.5,
        worker="host:1",
    )


def _front(hypervolume: float | None = 2.5, displaced: tuple[str, ...] = ()) -> FrontUpdate:
    return FrontUpdate(on_front=True, displaced=displaced, hypervolume=hypervolume, size=1)


WRITES: dict[str, Callable[[TrialStore], None]] = {
    "beat": lambda store: store.beat(),
    "add_trial": lambda store: store.add_trial(_trial(9)),
    "start_trial": lambda store: store.start_trial("trial_0"),
    "measure": lambda store: store.measure("trial_0", _measurement(7)),
    "preempt": lambda store: store.preempt("trial_0"),
    "end_trial": lambda store: store.end_trial("trial_0", COMPLETED, _front(9.0)),
    "set_reference_point": lambda store: store.set_reference_point({"delta_m": -1.0}),
    "add_reference": lambda store: store.add_reference(KEY, REFERENCE),
    "finish": lambda store: store.finish(JobState.FAILED, "wrong"),
}
TRIAL_WRITES = ("start_trial", "measure", "preempt", "end_trial")


def _everything(job: Job, store: TrialStore) -> Any:
    """All that can be seen of a job, but the time."""
    found = store.resume()
    return (
        (found.trials, found.reference_device_seconds, found.reference_point),
        (job.front(), job.history(), job.measurements(), job.state(), store.find_references([KEY])),
    )


def test_a_new_job_has_nothing_to_resume(job: Job) -> None:
    found = job.attempt().resume()
    assert (list(found.trials), found.seconds, found.reference_device_seconds, found.reference_point) == (
        [],
        0,
        0,
        None,
    )
    assert job.state() == (JobState.RUNNING, None)


def test_a_trial_is_resumed_as_it_was_left(job: Job) -> None:
    store = job.attempt()
    store.add_trial(_trial(0))
    assert list(store.resume().trials) == [_trial(0)]
    store.start_trial("trial_0")
    store.measure("trial_0", _measurement(1))
    store.measure("trial_0", _measurement(2))
    [found] = store.resume().trials
    assert (found.state, found.epochs, found.device_seconds, found.crashes) == (TrialState.RUNNING, 2, 1.0, 0)
    assert (found.candidate, found.choices, found.seed) == (_trial().candidate, _trial().choices, 2**63 - 1)


def test_an_ended_trial_is_resumed_whole(job: Job) -> None:
    store = job.attempt()
    store.add_trial(_trial(0))
    store.end_trial("trial_0", COMPLETED, _front())
    [found] = job.attempt().resume().trials
    assert (found.state, found.ending, found.epochs, found.device_seconds) == (
        TrialState.COMPLETED,
        COMPLETED,
        20,
        4.5,
    )


def test_trials_come_by_number(job: Job) -> None:
    store = job.attempt()
    for number in (2, 0, 1):
        store.add_trial(_trial(number))
    assert [trial.number for trial in store.resume().trials] == [0, 1, 2]


def test_number_and_id_of_a_trial_are_new(job: Job) -> None:
    store = job.attempt()
    store.add_trial(_trial(0))
    for twin in (_trial(0, "other"), replace(_trial(1), id="trial_0")):
        with pytest.raises(ValueError, match="id and number must be new"):
            store.add_trial(twin)
    assert len(store.resume().trials) == 1


def test_a_measurement_that_comes_twice_is_kept_once_as_it_last_came(job: Job) -> None:
    store = job.attempt()
    store.add_trial(_trial(0))
    for error in (0.5, 0.25):
        store.measure("trial_0", _measurement(1, error))
    assert job.measurements() == {("trial_0", 1): _measurement(1, 0.25)}


def test_a_preempted_trial_waits_again_with_what_it_has(job: Job) -> None:
    store = job.attempt()
    store.add_trial(_trial(0))
    store.measure("trial_0", _measurement(3))
    store.preempt("trial_0")
    store.preempt("trial_0")
    [found] = store.resume().trials
    assert (found.state, found.crashes, found.epochs, found.device_seconds) == (TrialState.PENDING, 2, 3, 1.5)


@pytest.mark.parametrize("write", TRIAL_WRITES)
@pytest.mark.parametrize(
    "state", [TrialState.COMPLETED, TrialState.STOPPED, TrialState.FAILED, TrialState.CANCELLED]
)
def test_an_ended_trial_never_changes(job: Job, state: TrialState, write: str) -> None:
    store = job.attempt()
    store.add_trial(_trial(0))
    store.end_trial("trial_0", Ending(state=state, reason="so it is", epochs=3), None)
    before = _everything(job, store)
    with pytest.raises(TrialEnded, match=state):
        WRITES[write](store)
    assert _everything(job, store) == before


@pytest.mark.parametrize("write", TRIAL_WRITES)
def test_an_unknown_trial_is_a_key_error(job: Job, write: str) -> None:
    with pytest.raises(KeyError):
        WRITES[write](job.attempt())


@pytest.mark.parametrize("write", WRITES)
def test_an_older_attempt_can_write_nothing(job: Job, write: str) -> None:
    old = job.attempt()
    old.add_trial(_trial(0))
    new = job.attempt()
    before = _everything(job, new)
    with pytest.raises(Fenced):
        WRITES[write](old)
    assert _everything(job, new) == before
    new.start_trial("trial_0")


@pytest.mark.parametrize("write", WRITES)
def test_nothing_is_written_after_the_end_of_the_job(job: Job, write: str) -> None:
    store = job.attempt()
    store.add_trial(_trial(0))
    store.finish(JobState.SUCCEEDED, "budget used")
    before = _everything(job, store)
    assert job.state() == (JobState.SUCCEEDED, "budget used")
    with pytest.raises(Fenced):
        WRITES[write](store)
    assert _everything(job, store) == before


def test_the_end_of_the_job_cancels_what_has_not_ended(job: Job) -> None:
    store = job.attempt()
    for number in range(3):
        store.add_trial(_trial(number))
    store.end_trial("trial_0", COMPLETED, _front())
    store.measure("trial_1", _measurement(4))
    store.finish(JobState.SUCCEEDED, None)
    found = store.resume().trials
    assert [trial.state for trial in found] == [
        TrialState.COMPLETED,
        TrialState.CANCELLED,
        TrialState.CANCELLED,
    ]
    assert found[1].ending == Ending(state=TrialState.CANCELLED, epochs=4, device_seconds=2.0)


def test_the_front_moves_with_the_trial(job: Job) -> None:
    store = job.attempt()
    for number in range(3):
        store.add_trial(_trial(number))
    store.end_trial("trial_0", COMPLETED, _front(None))
    store.end_trial("trial_1", COMPLETED, _front(1.5, displaced=("trial_0",)))
    store.end_trial("trial_2", COMPLETED, FrontUpdate(on_front=False, displaced=(), hypervolume=1.5, size=1))
    assert job.front() == {"trial_1"}
    assert job.history() == [("trial_0", None), ("trial_1", 1.5), ("trial_2", 1.5)]


def test_the_reference_point_is_kept(job: Job) -> None:
    job.attempt().set_reference_point({"delta_m": -100.0, "macs": 5000.0})
    assert job.attempt().resume().reference_point == {"delta_m": -100.0, "macs": 5000.0}


def test_the_first_reference_stays_and_each_is_charged(job: Job) -> None:
    store = job.attempt()
    other = replace(KEY, seed=1)
    assert store.find_references([KEY, other]) == {}
    store.add_reference(KEY, REFERENCE)
    store.add_reference(KEY, replace(REFERENCE, latency_ms=9.0, device_seconds=2.0))
    assert store.find_references([KEY, other]) == {KEY: REFERENCE}
    assert job.attempt().resume().reference_device_seconds == 3.5


def test_only_the_time_that_earlier_attempts_ran_counts(job: Job) -> None:
    first = job.attempt()
    time.sleep(0.1)
    first.beat()
    time.sleep(0.4)  # nobody runs
    second = job.attempt()
    seconds = second.resume().seconds
    assert 0.1 <= seconds < 0.4
    time.sleep(0.1)
    second.beat()
    assert second.resume().seconds == seconds
    assert job.attempt().resume().seconds >= seconds + 0.1


def test_what_comes_out_is_the_callers(job: Job) -> None:
    store = job.attempt()
    store.add_trial(_trial(0))
    store.end_trial("trial_0", COMPLETED, None)
    [found] = store.resume().trials
    assert found.ending is not None
    found.ending.values["delta_m"] = 99.0
    found.choices["more"] = 1  # type: ignore[index]
    [again] = store.resume().trials
    assert again.ending == COMPLETED
    assert again.choices == _trial().choices


def test_threads_may_share_a_store(job: Job) -> None:
    store = job.attempt()

    def run(number: int) -> None:
        store.add_trial(_trial(number))
        store.measure(f"trial_{number}", _measurement(1))
        store.end_trial(f"trial_{number}", COMPLETED, _front())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, range(24)))
    found = store.resume().trials
    assert [trial.number for trial in found] == list(range(24))
    assert {trial.state for trial in found} == {TrialState.COMPLETED}
    assert sorted(trial_id for trial_id, _ in job.history()) == sorted(trial.id for trial in found)


# SQL alone


def test_a_write_that_fails_leaves_nothing_behind(sql_job: SqlJob) -> None:
    store = sql_job.attempt()
    store.add_trial(_trial(0))
    before = _everything(sql_job, store)
    unstorable = Ending(state=TrialState.COMPLETED, tasks={"left": object()})
    with pytest.raises(Exception, match="not JSON serializable"):
        store.end_trial("trial_0", unstorable, _front())
    assert _everything(sql_job, store) == before


def test_what_is_not_finite_is_stored_as_missing(sql_job: SqlJob) -> None:
    store = sql_job.attempt()
    store.add_trial(_trial(0))
    store.measure("trial_0", _measurement(1, float("nan")))
    store.end_trial("trial_0", Ending(state=TrialState.COMPLETED, values={"delta_m": float("-inf")}), None)
    [found] = store.resume().trials
    assert found.ending is not None
    assert found.ending.values == {"delta_m": None}
    assert sql_job.measurements()["trial_0", 1].values == {"total_error": None}


def test_every_write_extends_the_lease(sql_job: SqlJob) -> None:
    store = sql_job.attempt()
    with sql_job.database.write() as session:
        session.scalars(select(JobRow)).one().lease_expires_at = _now()
    store.beat()
    with sql_job.database.read() as session:
        [running] = JobRepository(session).running()
    assert running.lease_expires_at > _now() + LEASE / 2


def test_a_store_reaches_only_its_own_job(sql_job: SqlJob) -> None:
    first = sql_job.attempt()
    first.add_trial(_trial(0))
    second = SqlJob(sql_job.database).attempt()
    with pytest.raises(KeyError):
        second.start_trial("trial_0")
    second.add_trial(_trial(0, "other"))
    assert [trial.id for trial in second.resume().trials] == ["other_0"]


def test_the_driver_is_fenced_at_once_when_its_job_is_given_up_or_cancelled(sql_job: SqlJob) -> None:
    store = sql_job.attempt()
    store.add_trial(_trial(0))
    store.start_trial("trial_0")
    with sql_job.database.write() as session:
        assert JobRepository(session).requeue(sql_job.id, 1, "silent", _now())
    with pytest.raises(Fenced):
        store.measure("trial_0", _measurement())
    newer = sql_job.attempt()
    with sql_job.database.write() as session:
        JobRepository(session).cancel(sql_job.id, _now())
    with pytest.raises(Fenced):
        newer.measure("trial_0", _measurement())
    assert [trial.state for trial in newer.resume().trials] == [TrialState.CANCELLED]


def test_two_processes_write_without_waiting_in_vain(sql_job: SqlJob) -> None:
    """Two engines share nothing but the file, as two processes do."""
    store = sql_job.attempt()
    server = Database(str(sql_job.database.engine.url))

    def submit(number: int) -> None:
        with server.write() as session:
            JobRepository(session).create(SPEC, {}, _now())

    with ThreadPoolExecutor(4) as pool:
        submitted = [pool.submit(submit, number) for number in range(20)]
        added = [pool.submit(store.add_trial, _trial(number)) for number in range(20)]
        for done in submitted + added:
            done.result()
    server.close()
    with sql_job.database.read() as session:
        assert len(session.scalars(select(TrialRow)).all()) == 20
        assert len(session.scalars(select(JobRow)).all()) == 21
