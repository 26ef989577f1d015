"""The contract of `coterie.search.store.TrialStore`, held to every store."""

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, event, select

from coterie.search.spec import JobSpec
from coterie.search.store import (
    AffinityResult,
    Candidate,
    Confirmation,
    Ending,
    Fenced,
    FrontUpdate,
    InMemoryStore,
    JobState,
    Measurement,
    Reference,
    ReferenceKey,
    Role,
    Setting,
    StoredFile,
    SubsetResult,
    Trial,
    TrialEnded,
    TrialState,
    TrialStore,
    Verdict,
    VerdictKind,
)
from coterie.service.storage.database import Database
from coterie.service.storage.repositories import JobRepository
from coterie.service.storage.store import SqlTrialStore
from coterie.service.storage.tables import AttemptRow, JobRow, MeasurementRow, TrialRow
from coterie.service.storage.trials import TrialRepository

SPEC = JobSpec.model_validate({"dataset": {"source": "digits"}, "budget": {"trials": 5}})
LEASE = timedelta(seconds=30)
KEY = ReferenceKey(data="d", task="left", backbone="mlp-24-2", recipe="adam", epochs=20, seed=2**63 - 1)
REFERENCE = Reference(validation={"error": 0.25}, test={"error": 0.5}, device_seconds=1.5, latency_ms=0.25)
SETTING = Setting(data="d", backbone="mlp-24-2", recipe="adam", epochs=20)
AFFINITY = AffinityResult(
    method="one_step",
    tasks=("left", "right"),
    weights=(1.0, 0.5),
    seed=2**63 - 1,
    matrix=[[None, 0.25], [-0.5, None]],
)
VERDICT = Verdict(
    kind=VerdictKind.GROUPS, words="In two groups.", trial_id="trial_0", grouping=[["left"], ["right", "up"]]
)
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
    def used_references(self) -> set[ReferenceKey]: ...
    def setting(self) -> Setting | None: ...
    def verdict(self) -> Verdict | None: ...
    def estimate(self) -> float | None: ...


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

    def used_references(self) -> set[ReferenceKey]:
        return self._store.used_references

    def setting(self) -> Setting | None:
        return self._store.setting

    def verdict(self) -> Verdict | None:
        return self._store.verdict

    def estimate(self) -> float | None:
        return self._store.estimate


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
            return [(row.trial_id, row.hypervolume) for row in rows]

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

    def used_references(self) -> set[ReferenceKey]:
        with self.database.read() as session:
            return {
                ReferenceKey(
                    data=row.data,
                    task=row.task,
                    backbone=row.backbone,
                    recipe=row.recipe,
                    epochs=row.epochs,
                    seed=row.seed,
                )
                for row in JobRepository(session).references(self.id)
            }

    def setting(self) -> Setting | None:
        with self.database.read() as session:
            found = JobRepository(session).get(self.id).side_setting
        return None if found is None else Setting(**found)

    def verdict(self) -> Verdict | None:
        with self.database.read() as session:
            found = JobRepository(session).get(self.id).verdict
        return None if found is None else Verdict(**found)

    def estimate(self) -> float | None:
        with self.database.read() as session:
            row = JobRepository(session).get(self.id)
        assert (row.eta_seconds is None) == (row.eta_at is None)
        return row.eta_seconds

    def charged(self) -> float:
        with self.database.read() as session:
            return JobRepository(session).get(self.id).device_seconds

    def delete(self) -> None:
        with self.database.write() as session:
            session.execute(delete(JobRow).where(JobRow.id == self.id))


@pytest.fixture(params=["memory", "sqlite_database", "postgres_database"])
def job(request: pytest.FixtureRequest) -> Job:
    return MemoryJob() if request.param == "memory" else SqlJob(request.getfixturevalue(request.param))


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
        origin="grouping",
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


def _subset(*tasks: str, seed: int = 2**63 - 1, error: float = 0.25, run: int | None = None) -> SubsetResult:
    return SubsetResult(
        tasks=tasks,
        weights=(1.0,) * len(tasks),
        seed=seed,
        validation={task: {"error": error} for task in tasks},
        test={task: {"error": 2 * error} for task in tasks},
        run=run,
    )


def _confirmation(
    seed: int = 2**63 - 1, role: Role = Role.POINT, delta_m: float = 1.5, trial_id: str = "trial_0"
) -> Confirmation:
    return Confirmation(
        trial_id=trial_id,
        role=role,
        candidate=_trial().candidate,
        seed=seed,
        ending=replace(COMPLETED, values={"delta_m": delta_m, "macs": None}, files={}),
    )


WRITES: dict[str, Callable[[TrialStore], None]] = {
    "beat": lambda store: store.beat(),
    "add_trial": lambda store: store.add_trial(_trial(9)),
    "start_trial": lambda store: store.start_trial("trial_0"),
    "measure": lambda store: store.measure("trial_0", _measurement(7)),
    "preempt": lambda store: store.preempt("trial_0"),
    "end_trial": lambda store: store.end_trial("trial_0", COMPLETED, _front(9.0)),
    "set_reference_point": lambda store: store.set_reference_point({"delta_m": -1.0}),
    "add_reference": lambda store: store.add_reference(KEY, REFERENCE),
    "use_references": lambda store: store.use_references([KEY]),
    "add_subsets": lambda store: store.add_subsets(SETTING, 3, [_subset("left")], 2.0),
    "add_affinity": lambda store: store.add_affinity(SETTING, AFFINITY, 2.0),
    "charge_side": lambda store: store.charge_side(2.0),
    "use_setting": lambda store: store.use_setting(SETTING),
    "add_confirmation": lambda store: store.add_confirmation(_confirmation()),
    "set_verdict": lambda store: store.set_verdict(VERDICT),
    "set_estimate": lambda store: store.set_estimate(60.0),
    "finish": lambda store: store.finish(JobState.FAILED, "wrong"),
}
TRIAL_WRITES = ("start_trial", "measure", "preempt", "end_trial")
NEW_EACH_TIME = ("add_trial", "add_subsets", "add_confirmation")


def _everything(job: Job, store: TrialStore) -> Any:
    """All that can be seen of a job, but the time."""
    found = store.resume()
    return (
        (found.trials, found.side_device_seconds, found.reference_point, found.confirmations),
        (job.front(), job.history(), job.measurements(), job.state(), job.verdict(), job.estimate()),
        (store.find_references([KEY]), job.used_references(), job.setting()),
        (store.find_subsets(SETTING), store.find_affinities(SETTING)),
    )


def test_a_new_job_has_nothing_to_resume(job: Job) -> None:
    found = job.attempt().resume()
    assert (list(found.trials), found.seconds, found.side_device_seconds, found.reference_point) == (
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
    assert found.origin == "grouping"


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
    assert job.attempt().resume().side_device_seconds == 3.5


@pytest.mark.parametrize("write", NEW_EACH_TIME)
def test_what_must_be_new_is_refused_the_second_time(job: Job, write: str) -> None:
    store = job.attempt()
    store.add_trial(_trial(0))
    WRITES[write](store)
    before = _everything(job, store)
    with pytest.raises(ValueError, match="must be new"):
        WRITES[write](store)
    assert _everything(job, store) == before


def test_the_first_affinity_stays_and_each_is_charged(job: Job) -> None:
    store = job.attempt()
    store.add_affinity(SETTING, AFFINITY, 2.0)
    store.add_affinity(SETTING, replace(AFFINITY, matrix=[[None] * 2] * 2), 0.5)
    assert store.find_affinities(SETTING) == [AFFINITY]
    assert store.resume().side_device_seconds == 2.5


def test_a_job_notes_which_stored_references_it_uses(job: Job) -> None:
    store = job.attempt()
    other = replace(KEY, seed=1)
    store.add_reference(KEY, REFERENCE)
    for _ in range(2):
        store.use_references([KEY])
    with pytest.raises(KeyError):
        store.use_references([other])
    assert job.used_references() == {KEY}
    store.add_reference(other, REFERENCE)
    store.use_references([KEY, other])
    assert job.used_references() == {KEY, other}


def test_measurements_come_by_trial_and_epoch(job: Job) -> None:
    store = job.attempt()
    for number in range(3):
        store.add_trial(_trial(number))
    for number, epoch in ((0, 1), (0, 2), (0, 3), (1, 1), (2, 2)):
        store.measure(f"trial_{number}", _measurement(epoch))
    assert job.attempt().measurements_at([1, 3]) == {
        "trial_0": {1: _measurement(1), 3: _measurement(3)},
        "trial_1": {1: _measurement(1)},
    }
    assert store.measurements_at([]) == {}


def test_subset_networks_come_by_setting_as_they_were_stored_and_are_charged(job: Job) -> None:
    store = job.attempt()
    assert store.find_subsets(SETTING) == []
    first, second = [_subset("right", "up"), _subset("left")], [_subset("left", seed=1), _subset("right")]
    store.add_subsets(SETTING, 0, first, 2.0)
    store.add_subsets(replace(SETTING, epochs=5), 1, [_subset("up")], 0.25)
    store.add_subsets(SETTING, 2, second, 1.5)
    newer = job.attempt()
    assert newer.find_subsets(SETTING) == [
        *(replace(result, run=0) for result in first),
        *(replace(result, run=2) for result in second),
    ]
    assert newer.find_subsets(replace(SETTING, epochs=5)) == [_subset("up", run=1)]
    assert newer.resume().side_device_seconds == 3.75


def test_of_subset_networks_with_equal_tasks_weights_and_seed_the_first_counts(job: Job) -> None:
    store = job.attempt()
    lighter = replace(_subset("left", "up"), weights=(1.0, 0.5))
    store.add_subsets(SETTING, 0, [_subset("left", "up"), lighter], 1.0)
    store.add_subsets(SETTING, 1, [_subset("left", "up", error=0.75), _subset("left", "up", seed=1)], 1.0)
    assert store.find_subsets(SETTING) == [
        _subset("left", "up", run=0),
        replace(lighter, run=0),
        _subset("left", "up", seed=1, run=1),
    ]


def test_affinities_come_by_setting_and_are_charged(job: Job) -> None:
    store = job.attempt()
    other = replace(AFFINITY, seed=1)
    for result in (AFFINITY, other):
        store.add_affinity(SETTING, result, 1.25)
    store.add_affinity(replace(SETTING, data="other"), AFFINITY, 1.0)
    assert store.find_affinities(SETTING) == [AFFINITY, other]
    assert store.resume().side_device_seconds == 3.5


def test_a_side_run_that_gave_nothing_is_charged(job: Job) -> None:
    job.attempt().charge_side(1.5)
    store = job.attempt()
    store.charge_side(0.25)
    assert store.resume().side_device_seconds == 1.75
    assert store.find_subsets(SETTING) == []


def test_the_last_setting_counts(job: Job) -> None:
    store = job.attempt()
    assert job.setting() is None
    store.use_setting(replace(SETTING, epochs=1))
    store.use_setting(SETTING)
    assert job.setting() == SETTING


def test_confirming_runs_are_resumed_in_their_order_and_charged(job: Job) -> None:
    store = job.attempt()
    store.add_trial(_trial(0))
    store.end_trial("trial_0", COMPLETED, _front())
    failed = Ending(state=TrialState.FAILED, reason="ran out of memory", epochs=2, device_seconds=0.5)
    runs = [
        _confirmation(seed=5),
        _confirmation(seed=5, role=Role.SHARED),
        replace(_confirmation(seed=3), ending=failed),
    ]
    for run in runs:
        store.add_confirmation(run)
    found = job.attempt().resume()
    assert list(found.confirmations) == runs
    assert found.side_device_seconds == 9.5
    assert job.history() == [("trial_0", 2.5)]


def test_a_confirming_run_is_for_a_trial_of_the_job(job: Job) -> None:
    store = job.attempt()
    with pytest.raises(KeyError):
        store.add_confirmation(_confirmation())
    assert list(store.resume().confirmations) == []


def test_the_last_verdict_counts(job: Job) -> None:
    store = job.attempt()
    assert job.verdict() is None
    store.set_verdict(VERDICT)
    assert job.verdict() == VERDICT
    unknown = Verdict(kind=VerdictKind.UNKNOWN, words="Nothing was confirmed.")
    store.set_verdict(unknown)
    assert job.verdict() == unknown


def test_the_last_estimate_counts(job: Job) -> None:
    store = job.attempt()
    assert job.estimate() is None
    store.set_estimate(60.0)
    store.set_estimate(30.0)
    assert job.estimate() == 30.0
    store.set_estimate(None)
    assert job.estimate() is None


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
    store.add_subsets(SETTING, 0, [_subset("left")], 1.0)
    store.find_subsets(SETTING)[0].validation["left"]["error"] = 9.0  # type: ignore[index]
    assert store.find_subsets(SETTING) == [_subset("left", run=0)]


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


def test_an_estimate_is_of_one_attempt_alone(sql_job: SqlJob) -> None:
    sql_job.attempt().set_estimate(60.0)
    store = sql_job.attempt()
    assert sql_job.estimate() is None
    store.set_estimate(60.0)
    store.finish(JobState.SUCCEEDED, None)
    assert sql_job.estimate() is None


def test_a_job_knows_the_subset_networks_that_were_stored_before_it_began(database: Database) -> None:
    earlier = SqlJob(database)
    store = earlier.attempt()
    store.add_subsets(SETTING, 0, [_subset("left"), _subset("right")], 1.0)
    later = SqlJob(database)
    store.add_subsets(SETTING, 1, [_subset("up")], 1.0)
    knowing = later.attempt()
    known = [_subset("left"), _subset("right"), _subset("up")]
    assert knowing.find_subsets(SETTING) == known
    store.add_subsets(SETTING, 2, [_subset("left", "up")], 1.0)
    assert later.attempt().find_subsets(SETTING) == known
    assert later.charged() == 0
    assert SqlJob(database).attempt().find_subsets(SETTING) == [*known, _subset("left", "up")]


def test_a_jobs_own_subset_network_counts_before_anothers(database: Database) -> None:
    first = SqlJob(database).attempt()
    first.add_subsets(SETTING, 0, [_subset("left"), _subset("right")], 1.0)
    second = SqlJob(database).attempt()
    second.add_subsets(SETTING, 0, [_subset("left", error=0.75)], 1.0)
    assert second.find_subsets(SETTING) == [_subset("right"), _subset("left", error=0.75, run=0)]
    third = SqlJob(database).attempt()
    assert third.find_subsets(SETTING) == [_subset("left"), _subset("right")]


_EXAMPLES = itertools.count()


@given(
    steps=st.lists(
        st.tuples(
            st.integers(0, 2),  # the job that does it; the last one is watched
            st.sampled_from(["write", "new attempt", "delete"]),
            st.sampled_from([("left",), ("right",), ("left", "right")]),
            st.integers(0, 1),  # seed
        ),
        max_size=12,
    ),
    begins=st.integers(0, 12),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_a_job_knows_of_others_never_changes_once_it_began(
    database: Database, steps: list[tuple[int, str, tuple[str, ...], int]], begins: int
) -> None:
    setting = replace(SETTING, data=f"example {next(_EXAMPLES)}")
    others = [SqlJob(database) for _ in range(2)]
    stores = [other.attempt() for other in others]
    deleted: set[int] = set()
    watched: SqlJob | None = None
    own: list[SubsetResult] = []
    before: list[SubsetResult] = []
    for run, (which, action, tasks, seed) in enumerate(steps):
        if run == begins:
            watched = SqlJob(database)
            stores.append(watched.attempt())
            before = stores[2].find_subsets(setting)
        if which in deleted or (which == 2 and watched is None):
            continue
        result = _subset(*tasks, seed=seed, error=run / 16)
        if action == "new attempt":
            stores[which] = (watched if which == 2 and watched else others[which]).attempt()
        elif action != "delete":
            stores[which].add_subsets(setting, run, [result], 1.0)
            if which == 2:
                own.append(replace(result, run=run))
        elif which != 2:
            others[which].delete()
            deleted.add(which)
    if watched is None:
        return
    expected = {(result.tasks, result.seed): result for result in before}
    for result in reversed(own):
        expected[result.tasks, result.seed] = result
    found = stores[2].find_subsets(setting)
    assert {(result.tasks, result.seed): result for result in found} == expected
    assert len(found) == len(expected)


def test_subset_networks_that_another_job_is_just_storing_stay_unknown(postgres_database: Database) -> None:
    """PostgreSQL counts a row when it is written and shows it when it is committed, maybe out of order."""
    slow = SqlJob(postgres_database)
    slow.attempt()
    with postgres_database.write() as session:
        attempt = JobRepository(session).get(slow.id).attempt
    quick = SqlJob(postgres_database).attempt()
    watched = SqlJob(postgres_database)
    written, may_commit = threading.Event(), threading.Event()
    connection = Database(postgres_database.engine.url.render_as_string(hide_password=False))

    def hold(_: object) -> None:
        written.set()
        may_commit.wait()

    event.listen(connection.engine, "commit", hold)
    with ThreadPoolExecutor(2) as pool:
        try:
            held = pool.submit(
                SqlTrialStore(connection, slow.id, attempt).add_subsets, SETTING, 0, [_subset("left")], 1.0
            )
            assert written.wait(10)
            waits = pool.submit(quick.add_subsets, SETTING, 0, [_subset("right")], 1.0)
            time.sleep(0.2)  # long enough for it to be stored, were it not held back
            store = watched.attempt()
            before = store.find_subsets(SETTING)
        finally:
            may_commit.set()
        held.result(), waits.result()
    assert store.find_subsets(SETTING) == before
    connection.close()


def test_the_first_of_two_jobs_affinities_stays_and_both_are_charged(database: Database) -> None:
    first, second = SqlJob(database), SqlJob(database)
    stores = [job.attempt() for job in (first, second)]
    stores[0].add_affinity(SETTING, AFFINITY, 1.0)
    stores[1].add_affinity(SETTING, replace(AFFINITY, matrix=[[None, 9.0], [9.0, None]]), 2.0)
    assert [store.find_affinities(SETTING) for store in stores] == [[AFFINITY]] * 2
    assert (first.charged(), second.charged()) == (1.0, 2.0)
    first.delete()
    assert stores[1].find_affinities(SETTING) == [AFFINITY]


def test_side_runs_are_charged_to_the_attempt_that_trained_them(sql_job: SqlJob) -> None:
    old = sql_job.attempt()
    old.add_trial(_trial(0))
    old.add_subsets(SETTING, 0, [_subset("left")], 1.0)
    new = sql_job.attempt()
    new.add_affinity(SETTING, AFFINITY, 2.0)
    new.add_confirmation(_confirmation())
    with sql_job.database.read() as session:
        attempts = session.scalars(select(AttemptRow).order_by(AttemptRow.attempt))
        assert [row.side_device_seconds for row in attempts] == [1.0, 6.5]


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
