from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select

from coterie.search.spec import JobSpec
from coterie.search.store import Candidate, Ending, JobState, Reference, ReferenceKey, Trial, TrialState
from coterie.service.storage.database import Database
from coterie.service.storage.repositories import (
    Claimed,
    Conflict,
    Idempotency,
    JobRepository,
    NotFound,
    TrialRepository,
)
from coterie.service.storage.store import SqlTrialStore
from coterie.service.storage.tables import JobRow

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
LEASE = timedelta(seconds=30)


def _create(database: Database, *, priority: int = 0, key: Idempotency | None = None) -> str:
    spec = JobSpec.model_validate(
        {"dataset": {"source": "digits"}, "budget": {"trials": 2}, "priority": priority}
    )
    with database.write() as session:
        return JobRepository(session).create(spec, {"delta_m": "maximize"}, NOW, key)[0].id


def _claim(database: Database, now: datetime = NOW) -> Claimed | None:
    with database.write() as session:
        return JobRepository(session).claim_next(now, LEASE)


def _requeue(database: Database, job_id: str, attempt: int) -> bool:
    with database.write() as session:
        return JobRepository(session).requeue(job_id, attempt, "its driver is gone", NOW)


def _trial(number: int) -> Trial:
    candidate = Candidate(family="shared", backbone="mlp", parameters={})
    return Trial(id=f"trial_{number}", number=number, candidate=candidate, choices={}, seed=1)


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


def test_a_job_is_charged_from_its_drivers_start(database: Database) -> None:
    job_id = _create(database)
    _claim(database)
    started = datetime.now(UTC) - timedelta(seconds=10)
    with database.write() as session:
        JobRepository(session).set_driver(job_id, 1, "host:1", started)
    SqlTrialStore(database, job_id, 1).beat()
    with database.read() as session:
        assert JobRepository(session).usage([job_id])[job_id].seconds == pytest.approx(10, abs=2)


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
    key = ReferenceKey(data="d", task="t", backbone="b", recipe="r", epochs=1, seed=1)
    SqlTrialStore(database, job_id, 6).add_reference(
        key, Reference(validation={}, test={}, device_seconds=1.0, latency_ms=1.0)
    )
    assert fruitless() == 0


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
    key = ReferenceKey(data="d", task="t", backbone="b", recipe="r", epochs=1, seed=1)
    store.add_reference(key, Reference(validation={}, test={}, device_seconds=1.5, latency_ms=1.0))
    with database.read() as session:
        usage = JobRepository(session).usage([job_id, other])
    assert usage[job_id].trials == {TrialState.COMPLETED: 2, TrialState.FAILED: 1}
    assert usage[job_id].device_seconds == 7.5
    assert (usage[other].trials, usage[other].seconds, usage[other].device_seconds) == ({}, 0.0, 0.0)
