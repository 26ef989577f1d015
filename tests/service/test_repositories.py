import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import event, select

from coterie.search.spec import JobSpec
from coterie.search.store import (
    AffinityResult,
    Candidate,
    Confirmation,
    Ending,
    Fenced,
    JobState,
    Measurement,
    Reference,
    ReferenceKey,
    Role,
    Setting,
    SubsetResult,
    Trial,
    TrialState,
)
from coterie.service.storage.database import Database
from coterie.service.storage.repositories import (
    Claimed,
    Conflict,
    Idempotency,
    JobRepository,
    NotFound,
    Usage,
    usage_of,
)
from coterie.service.storage.store import SqlTrialStore
from coterie.service.storage.tables import AttemptRow, JobRow, TrialRow
from coterie.service.storage.trials import TrialRepository

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
LEASE = timedelta(seconds=30)
DIRECTIONS = {"delta_m": "maximize", "task.left.error": "minimize", "task.up.right.error": "minimize"}
KEY = ReferenceKey(data="d", task="left", backbone="b", recipe="r", epochs=1, seed=1)
REFERENCE = Reference(validation={}, test={}, device_seconds=1.5, latency_ms=1.0)
SETTING = Setting(data="d", backbone="b", recipe="r", epochs=1)
SUBSET = SubsetResult(tasks=("left",), weights=(1.0,), seed=1, validation={}, test={})
AFFINITY = AffinityResult(
    method="one_step",
    tasks=("left", "up.right"),
    weights=(1.0, 1.0),
    seed=1,
    matrix=[[None, 1.0], [2.0, None]],
)


def _create(
    database: Database,
    *,
    priority: int = 0,
    key: Idempotency | None = None,
    tasks: list[object] | None = None,
    tenant: str | None = None,
) -> str:
    spec = JobSpec.model_validate(
        {
            "dataset": {"source": "digits"},
            "budget": {"trials": 2},
            "priority": priority,
            "tasks": tasks or [],
        }
    )
    with database.write() as session:
        return JobRepository(session, tenant).create(spec, DIRECTIONS, NOW, key)[0].id


def _claim(database: Database, now: datetime = NOW) -> Claimed | None:
    with database.write() as session:
        return JobRepository(session).claim_next(now, LEASE)


def _start(
    database: Database, tasks: list[object] | None = None, tenant: str | None = None
) -> tuple[str, SqlTrialStore]:
    """A running job, first of those that wait, and its driver's store."""
    job_id = _create(database, tasks=tasks, tenant=tenant)
    claimed = _claim(database)
    assert claimed is not None
    assert claimed.job_id == job_id
    return job_id, SqlTrialStore(database, job_id, claimed.attempt)


def _pause(database: Database, job_id: str) -> None:
    with database.write() as session:
        JobRepository(session).pause(job_id, NOW)


def _resume(database: Database, job_id: str) -> None:
    with database.write() as session:
        JobRepository(session).resume(job_id, NOW)


def _requeue(database: Database, job_id: str, attempt: int) -> bool:
    with database.write() as session:
        return JobRepository(session).requeue(job_id, attempt, "its driver is gone", NOW)


def _usage(database: Database, job_id: str) -> Usage:
    with database.read() as session:
        return usage_of(JobRepository(session).get(job_id))


def _trial(number: int) -> Trial:
    candidate = Candidate(family="shared", backbone="mlp", parameters={})
    return Trial(id=f"trial_{number}", number=number, candidate=candidate, choices={}, seed=1)


def _measurement(epoch: int) -> Measurement:
    return Measurement(epoch=epoch, values={}, tasks={}, device_seconds=1.0, worker="host:1")


def _confirmation(trial_id: str, seed: int) -> Confirmation:
    return Confirmation(
        trial_id=trial_id,
        role=Role.POINT,
        candidate=_trial(0).candidate,
        seed=seed,
        ending=Ending(state=TrialState.COMPLETED, device_seconds=2.0),
    )


def test_times_come_back_in_utc_to_the_microsecond(database: Database) -> None:
    job_id = _create(database)
    with database.read() as session:
        assert JobRepository(session).get(job_id).created_at == NOW


def test_a_key_makes_one_job(database: Database) -> None:
    first = _create(database, key=Idempotency("k", "digest"))
    assert _create(database, key=Idempotency("k", "digest")) == first
    with pytest.raises(Conflict, match=first):
        _create(database, key=Idempotency("k", "another"))
    assert _create(database) != first
    with database.read() as session:
        assert len(session.scalars(select(JobRow)).all()) == 2


def test_the_job_of_highest_priority_is_claimed_first_then_the_oldest(database: Database) -> None:
    jobs = [_create(database, priority=priority) for priority in (0, 5, 5, -1)]
    claimed = [_claim(database) for _ in jobs]
    assert [found and found.job_id for found in claimed] == [jobs[1], jobs[2], jobs[0], jobs[3]]
    assert _claim(database) is None


def test_a_claimed_job_runs_under_a_lease(database: Database) -> None:
    job_id = _create(database)
    claimed = _claim(database)
    assert claimed is not None
    assert (claimed.attempt, claimed.name) == (1, "search")
    with database.write() as session:
        jobs = JobRepository(session)
        assert jobs.set_submission(job_id, 1, "job-1")
        assert jobs.set_driver(job_id, 1, "host:1", NOW + timedelta(seconds=3))
        [running] = jobs.running()
    assert (running.job_id, running.attempt, running.submission_id, running.driver) == (
        job_id,
        1,
        "job-1",
        "host:1",
    )
    assert (running.lease_expires_at, running.last_seen_at) == (NOW + LEASE, NOW + timedelta(seconds=3))


@pytest.mark.parametrize("step", [timedelta(hours=-5), timedelta(hours=5)])
def test_a_job_is_charged_its_drivers_own_time_whatever_the_clock_says(
    database: Database, step: timedelta
) -> None:
    job_id = _create(database)
    _claim(database)
    with database.write() as session:
        JobRepository(session).set_driver(job_id, 1, "host:1", datetime.now(UTC) + step)
    store = SqlTrialStore(database, job_id, 1)
    time.sleep(0.1)
    store.beat()
    assert 0.1 <= _usage(database, job_id).seconds < 60
    time.sleep(0.1)
    store.beat()
    assert 0.2 <= _usage(database, job_id).seconds < 60


def test_a_job_that_was_given_up_is_claimed_anew_and_its_trials_wait(database: Database) -> None:
    job_id = _create(database)
    _claim(database)
    store = SqlTrialStore(database, job_id, 1)
    for number in range(2):
        store.add_trial(_trial(number))
        store.start_trial(f"trial_{number}")
    store.end_trial("trial_0", Ending(state=TrialState.COMPLETED), None)
    assert _requeue(database, job_id, 1)
    with database.read() as session:
        row = JobRepository(session).get(job_id)
        assert (row.state, row.reason) == (JobState.QUEUED, "its driver is gone")
        assert [TrialRepository(session).get(f"trial_{n}").state for n in (0, 1)] == ["completed", "pending"]
    again = _claim(database)
    assert again is not None
    assert again.attempt == 2


def test_an_attempt_that_is_over_can_change_nothing(database: Database) -> None:
    job_id = _create(database)
    _claim(database)
    _requeue(database, job_id, 1)
    _claim(database)
    assert not _requeue(database, job_id, 1)
    with database.write() as session:
        jobs = JobRepository(session)
        assert not jobs.set_submission(job_id, 1, "old")
        assert not jobs.set_driver(job_id, 1, "old:1", NOW)
        assert jobs.running()[0].submission_id is None


def test_attempts_that_end_no_trial_are_counted(database: Database) -> None:
    job_id = _create(database)

    def fruitless() -> int:
        with database.read() as session:
            return JobRepository(session).attempts_without_progress(job_id)

    for attempt in (1, 2):
        _claim(database)
        assert fruitless() == attempt - 1
        _requeue(database, job_id, attempt)
    assert fruitless() == 2
    _claim(database)
    with database.write() as session:
        JobRepository(session).requeue(job_id, 3, "the server was restarted", NOW, preempted=True)
    assert fruitless() == 2
    _claim(database)
    store = SqlTrialStore(database, job_id, 4)
    store.add_trial(_trial(0))
    store.end_trial("trial_0", Ending(state=TrialState.FAILED), None)
    assert fruitless() == 0
    _requeue(database, job_id, 4)
    assert fruitless() == 0
    _claim(database)
    _requeue(database, job_id, 5)
    assert fruitless() == 1
    _claim(database)
    _pause(database, job_id)
    assert fruitless() == 1
    _resume(database, job_id)
    _claim(database)
    _requeue(database, job_id, 7)
    assert fruitless() == 2


SIDE_RUNS: dict[str, Callable[[SqlTrialStore], None]] = {
    "reference": lambda store: store.add_reference(KEY, REFERENCE),
    "subset networks": lambda store: store.add_subsets(SETTING, 0, [SUBSET], 1.0),
    "affinity": lambda store: store.add_affinity(SETTING, AFFINITY, 1.0),
    "confirming run": lambda store: store.add_confirmation(_confirmation("trial_0", 1)),
}


@pytest.mark.parametrize("run", SIDE_RUNS)
def test_what_is_trained_beside_the_trials_is_progress(database: Database, run: str) -> None:
    job_id, store = _start(database)
    store.add_trial(_trial(0))
    _requeue(database, job_id, 1)
    _claim(database)
    SIDE_RUNS[run](SqlTrialStore(database, job_id, 2))
    _requeue(database, job_id, 2)
    with database.read() as session:
        assert JobRepository(session).attempts_without_progress(job_id) == 0


def test_an_epoch_is_progress_whatever_the_clocks_say(database: Database) -> None:
    job_id = _create(database)
    for attempt in (1, 2, 3):
        _claim(database, datetime.now(UTC) + timedelta(days=1))
        store = SqlTrialStore(database, job_id, attempt)
        if attempt == 1:
            store.add_trial(_trial(0))
        store.measure("trial_0", _measurement(attempt))
        _requeue(database, job_id, attempt)
    with database.read() as session:
        assert JobRepository(session).attempts_without_progress(job_id) == 0
    _claim(database, datetime.now(UTC) + timedelta(days=1))
    _requeue(database, job_id, 4)
    with database.read() as session:
        assert JobRepository(session).attempts_without_progress(job_id) == 1


def test_an_errors_words_are_stored_whatever_is_in_them(database: Database) -> None:
    job_id, store = _start(database)
    store.add_trial(_trial(0))
    store.end_trial("trial_0", Ending(state=TrialState.FAILED, reason="a\0b\ud800c"), None)
    store.finish(JobState.FAILED, "\0")
    with database.read() as session:
        assert session.scalars(select(TrialRow.reason)).one() == "a\ufffdb?c"
        assert JobRepository(session).get(job_id).reason == "\ufffd"


def test_a_paused_job_waits_with_its_trials_and_its_driver_is_fenced(database: Database) -> None:
    job_id, store = _start(database)
    for number in range(3):
        store.add_trial(_trial(number))
    store.measure("trial_0", _measurement(3))
    store.end_trial("trial_1", Ending(state=TrialState.COMPLETED), None)
    store.set_estimate(60.0)
    with database.write() as session:
        row = JobRepository(session).pause(job_id, NOW)
        assert (row.state, row.reason, row.lease_expires_at) == (JobState.PAUSED, None, None)
        assert (row.eta_seconds, row.eta_at) == (None, None)
        assert JobRepository(session).running() == []
    with pytest.raises(Fenced):
        store.measure("trial_0", _measurement(4))
    states = [(trial.state, trial.epochs, trial.crashes) for trial in store.resume().trials]
    assert states == [("pending", 3, 0), ("completed", 0, 0), ("pending", 0, 0)]
    assert _claim(database) is None
    with database.read() as session:
        attempt = session.scalars(select(AttemptRow)).one()
        assert (attempt.ended_at, attempt.preempted) == (NOW, True)


def test_a_resumed_job_goes_on_with_a_new_attempt(database: Database) -> None:
    job_id, store = _start(database)
    store.add_trial(_trial(0))
    _pause(database, job_id)
    _resume(database, job_id)
    again = _claim(database)
    assert again == Claimed(job_id, 2, "search")
    with pytest.raises(Fenced):
        store.beat()
    SqlTrialStore(database, job_id, 2).start_trial("trial_0")


def test_a_job_can_be_paused_before_it_runs(database: Database) -> None:
    job_id = _create(database)
    _pause(database, job_id)
    assert _claim(database) is None
    _resume(database, job_id)
    assert _claim(database) == Claimed(job_id, 1, "search")


def test_time_paused_is_not_charged(database: Database) -> None:
    job_id = _create(database)
    for attempt, start in ((1, NOW), (2, NOW + timedelta(hours=1))):
        _claim(database, start)
        with database.write() as session:
            JobRepository(session).set_driver(job_id, attempt, "host:1", start + timedelta(seconds=attempt))
        _pause(database, job_id)
        _resume(database, job_id)
    assert _usage(database, job_id).seconds == 0


def test_only_what_waits_or_runs_can_be_paused_and_only_what_is_paused_resumed(database: Database) -> None:
    job_id = _create(database)
    with pytest.raises(Conflict, match="is queued: only a paused job can be resumed"):
        _resume(database, job_id)
    _claim(database)
    with pytest.raises(Conflict, match="is running: only a paused job can be resumed"):
        _resume(database, job_id)
    _pause(database, job_id)
    with pytest.raises(Conflict, match="is paused: only a queued or running job can be paused"):
        _pause(database, job_id)
    with database.write() as session:
        assert JobRepository(session).cancel(job_id, NOW).state == JobState.CANCELLED
    with pytest.raises(Conflict, match="is cancelled: only a queued or running job can be paused"):
        _pause(database, job_id)
    with pytest.raises(Conflict, match="is cancelled: only a paused job can be resumed"):
        _resume(database, job_id)
    for call in (_pause, _resume):
        with pytest.raises(NotFound, match="no job job_x"):
            call(database, "job_x")


def test_a_paused_job_can_be_cancelled_with_its_trials(database: Database) -> None:
    job_id, store = _start(database)
    store.add_trial(_trial(0))
    store.start_trial("trial_0")
    _pause(database, job_id)
    with database.write() as session:
        JobRepository(session).cancel(job_id, NOW)
    assert [trial.state for trial in store.resume().trials] == [TrialState.CANCELLED]


def test_a_job_shows_the_references_that_it_uses(database: Database) -> None:
    job_id, store = _start(database)
    for seed in (1, 2, 3):
        store.add_reference(replace(KEY, seed=seed), REFERENCE)
    store.use_references([replace(KEY, seed=3), KEY])
    with database.read() as session:
        assert [row.seed for row in JobRepository(session).references(job_id)] == [1, 3]


def test_a_job_shows_the_subset_networks_that_its_driver_knows(database: Database) -> None:
    _, first = _start(database)
    first.add_subsets(SETTING, 0, [SUBSET, replace(SUBSET, seed=2)], 1.0)
    job_id, store = _start(database)
    first.add_subsets(SETTING, 1, [replace(SUBSET, seed=3)], 1.0)
    store.add_subsets(SETTING, 0, [SUBSET], 1.0)
    store.add_subsets(replace(SETTING, epochs=2), 1, [SUBSET], 1.0)
    with database.read() as session:
        assert JobRepository(session).subsets(job_id) == []
    store.use_setting(SETTING)
    with database.read() as session:
        found = JobRepository(session).subsets(job_id)
    assert [(row.seed, row.job_id == job_id) for row in found] == [(2, False), (1, True)]


@pytest.mark.parametrize(
    ("tasks", "shown"),
    [
        ([], [1]),
        (["left", "up.right"], [1]),
        (["up.right", {"name": "left", "weight": 0.5}], [2]),
    ],
)
def test_a_job_shows_the_affinities_of_its_tasks_with_its_weights(
    database: Database, tasks: list[object], shown: list[int]
) -> None:
    _, other = _start(database)
    job_id, store = _start(database, tasks=tasks)
    other.add_affinity(SETTING, AFFINITY, 1.0)
    other.add_affinity(SETTING, replace(AFFINITY, weights=(0.5, 1), seed=2), 1.0)
    other.add_affinity(SETTING, replace(AFFINITY, tasks=("left", "down"), seed=3), 1.0)
    other.add_affinity(SETTING, replace(AFFINITY, method="another", seed=4), 1.0)
    other.add_affinity(replace(SETTING, epochs=2), replace(AFFINITY, seed=5), 1.0)
    with database.read() as session:
        assert JobRepository(session).affinities(job_id) == []
    store.use_setting(SETTING)
    with database.read() as session:
        assert [row.seed for row in JobRepository(session).affinities(job_id)] == shown


def test_what_is_trained_beside_the_trials_is_shared_within_the_tenant_alone(database: Database) -> None:
    _, mine = _start(database, tenant="mine")
    mine.add_reference(KEY, REFERENCE)
    mine.add_subsets(SETTING, 0, [SUBSET], 1.0)
    mine.add_affinity(SETTING, AFFINITY, 1.0)
    _, foreign = _start(database, tenant="foreign")
    assert foreign.find_references([KEY]) == {}
    assert foreign.find_subsets(SETTING) == []
    assert foreign.find_affinities(SETTING) == []
    with pytest.raises(KeyError):
        foreign.use_references([KEY])
    theirs = replace(AFFINITY, matrix=[[None, 9.0], [9.0, None]])
    foreign.add_reference(KEY, replace(REFERENCE, latency_ms=9.0))
    foreign.add_affinity(SETTING, theirs, 1.0)
    job_id, colleague = _start(database, tenant="mine")
    for store, latency_ms, affinity in ((colleague, 1.0, AFFINITY), (foreign, 9.0, theirs)):
        assert store.find_references([KEY]) == {KEY: replace(REFERENCE, latency_ms=latency_ms)}
        assert store.find_affinities(SETTING) == [affinity]
        store.use_references([KEY])
        store.use_setting(SETTING)
    assert colleague.find_subsets(SETTING) == [SUBSET]
    with database.read() as session:
        jobs = JobRepository(session)
        assert [row.latency_ms for row in jobs.references(job_id)] == [1.0]
        assert [row.matrix for row in jobs.affinities(job_id)] == [AFFINITY.matrix]
        assert len(jobs.subsets(job_id)) == 1


def test_many_references_are_found_by_one_query(database: Database) -> None:
    _, store = _start(database)
    keys = [replace(KEY, seed=seed, task=f"task {seed % 7}") for seed in range(1000)]
    for key in keys[::100]:
        store.add_reference(key, REFERENCE)
    statements: list[str] = []
    event.listen(database.engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    assert set(store.find_references(keys)) == set(keys[::100])
    assert len([statement for statement in statements if "SELECT" in statement]) == 1


def test_a_job_shows_its_confirming_runs_in_order(database: Database) -> None:
    job_id, store = _start(database)
    store.add_trial(_trial(0))
    for seed in (3, 1, 2):
        store.add_confirmation(_confirmation("trial_0", seed))
    with database.read() as session:
        assert [row.seed for row in JobRepository(session).confirmations(job_id)] == [3, 1, 2]
    assert _usage(database, job_id).device_seconds == 6.0


def test_only_a_waiting_job_fails_without_a_driver(database: Database) -> None:
    job_id = _create(database)
    _claim(database)
    SqlTrialStore(database, job_id, 1).add_trial(_trial(0))
    with database.write() as session:
        assert not JobRepository(session).fail_queued(job_id, "too many", NOW)
    _requeue(database, job_id, 1)
    with database.write() as session:
        assert JobRepository(session).fail_queued(job_id, "too many", NOW)
    with database.read() as session:
        row = JobRepository(session).get(job_id)
        assert (row.state, row.reason, row.ended_at) == (JobState.FAILED, "too many", NOW)
        assert TrialRepository(session).get("trial_0").state == TrialState.CANCELLED


def test_what_has_ended_cannot_be_cancelled(database: Database) -> None:
    job_id = _create(database)
    with database.write() as session:
        assert JobRepository(session).cancel(job_id, NOW).state == JobState.CANCELLED
    with pytest.raises(Conflict, match="is cancelled"), database.write() as session:
        JobRepository(session).cancel(job_id, NOW)
    assert _claim(database) is None


def test_unknown_ids_are_not_found(database: Database) -> None:
    with database.read() as session:
        with pytest.raises(NotFound, match="no job job_x"):
            JobRepository(session).get("job_x")
        with pytest.raises(NotFound, match="no trial trial_x"):
            TrialRepository(session).get("trial_x")


def test_usage_sums_trials_references_and_attempts(database: Database) -> None:
    job_id, other = _create(database), _create(database)
    _claim(database)
    store = SqlTrialStore(database, job_id, 1)
    for number, state in enumerate((TrialState.COMPLETED, TrialState.COMPLETED, TrialState.FAILED)):
        store.add_trial(_trial(number))
        store.end_trial(f"trial_{number}", Ending(state=state, device_seconds=2.0), None)
    store.add_reference(KEY, REFERENCE)
    usage, nothing = _usage(database, job_id), dict.fromkeys(TrialState, 0)
    assert usage.trials == nothing | {TrialState.COMPLETED: 2, TrialState.FAILED: 1}
    assert usage.device_seconds == 7.5
    assert _usage(database, other) == Usage(trials=nothing, seconds=0.0, device_seconds=0.0)
