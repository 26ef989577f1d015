"""The dispatcher against a Ray that does as it is told: what it makes of silence, faults and cancels."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coterie.search.spec import JobSpec
from coterie.search.store import FolderArtifacts, JobState
from coterie.service import dispatcher as module
from coterie.service.config import Settings
from coterie.service.dispatcher import Dispatcher
from coterie.service.storage import migrate
from coterie.service.storage.database import Database, DatabaseUnavailable
from coterie.service.storage.repositories import JobRepository
from coterie.service.storage.tables import JobRow

NOT_FOUND = "Request failed with status code 404: Job x does not exist."


@dataclass
class FakeRay:
    """The job API, and the head behind it."""

    jobs: dict[str, str] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)
    fault: Exception | None = None
    on_submit: Callable[[], object] = lambda: None
    heads: int = 0
    lives: bool = True

    def submit_job(self, *, submission_id: str, **_: Any) -> None:
        self.on_submit()
        self._answer()
        self.jobs[submission_id] = "RUNNING"

    def get_job_status(self, submission_id: str) -> Any:
        self._answer()
        if submission_id not in self.jobs:
            raise RuntimeError(NOT_FOUND)
        return SimpleNamespace(value=self.jobs[submission_id])

    def stop_job(self, submission_id: str) -> None:
        self._answer()
        self.stopped.append(submission_id)

    def _answer(self) -> None:
        if self.fault is not None:
            raise self.fault

    def start(self, *_: Any, **__: Any) -> Any:
        self.heads += 1
        self.lives = True
        return SimpleNamespace(
            alive=lambda: self.lives,
            stop=lambda: None,
            dashboard_url="http://127.0.0.1:1",
            environment=dict,
            headers=dict,
        )


@dataclass
class Stage:
    ray: FakeRay
    settings: Settings
    database: Database
    dispatcher: Dispatcher

    def submit(self) -> str:
        spec = JobSpec.model_validate({"dataset": {"source": "digits"}, "budget": {"trials": 2}})
        with self.database.write() as session:
            return JobRepository(session).create(spec, {}, datetime.now(UTC))[0].id

    def cancel(self, job_id: str) -> None:
        with self.database.write() as session:
            JobRepository(session).cancel(job_id, datetime.now(UTC))

    def pause(self, job_id: str) -> None:
        with self.database.write() as session:
            JobRepository(session).pause(job_id, datetime.now(UTC))

    def resume(self, job_id: str) -> None:
        with self.database.write() as session:
            JobRepository(session).resume(job_id)

    def write_checkpoint(self, job_id: str) -> Path:
        checkpoint = (
            FolderArtifacts(self.settings.artifacts_of(job_id)).checkpoint_folder("trial_0") / "state"
        )
        checkpoint.parent.mkdir(parents=True)
        checkpoint.touch()
        return checkpoint

    @staticmethod
    def wait_for(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def job(self, job_id: str) -> JobRow:
        with self.database.read() as session:
            return JobRepository(session).get(job_id)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    settings = Settings(data_dir=tmp_path, _env_file=None)
    migrate.prepare(settings.url)
    database, ray = Database(settings.url), FakeRay()
    monkeypatch.setattr(module, "start_head", ray.start)
    monkeypatch.setattr(module, "job_client", lambda *_: ray)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # the dispatcher changes it
    dispatcher = Dispatcher(settings, database)
    dispatcher._connect()
    yield Stage(ray, settings, database, dispatcher)
    database.close()


def test_a_job_is_submitted_once_and_the_next_one_waits(stage: Stage) -> None:
    first, second = stage.submit(), stage.submit()
    stage.dispatcher._tick()
    stage.dispatcher._tick()
    assert stage.ray.jobs == {f"{first}-1": "RUNNING"}
    assert [stage.job(job).state for job in (first, second)] == [JobState.RUNNING, JobState.QUEUED]


@pytest.mark.parametrize(
    "fault",
    [
        RuntimeError("Request failed with status code 500: no agent at 127.0.0.1:40404, job 404."),
        ConnectionError("the dashboard is busy"),
        TimeoutError("the dashboard is slow"),
    ],
)
def test_a_job_outlives_a_dashboard_in_trouble(stage: Stage, fault: Exception) -> None:
    job = stage.submit()
    stage.dispatcher._tick()
    stage.ray.fault = fault
    with pytest.raises(type(fault)):
        stage.dispatcher._tick()
    stage.ray.fault = None
    stage.dispatcher._tick()
    assert (stage.job(job).state, stage.job(job).attempt) == (JobState.RUNNING, 1)


def test_a_job_whose_driver_is_unknown_to_ray_begins_a_new_attempt(stage: Stage) -> None:
    job = stage.submit()
    stage.dispatcher._tick()
    stage.ray.jobs.clear()
    stage.dispatcher._tick()
    assert stage.ray.jobs == {f"{job}-2": "RUNNING"}


def test_what_ray_does_not_take_waits_and_is_not_blamed_for_it(stage: Stage) -> None:
    job = stage.submit()
    faults: list[Exception] = [RuntimeError("No available agent")] * (module.MOST_FRUITLESS_ATTEMPTS + 1)

    def refuse() -> None:
        if faults:
            raise faults.pop()

    stage.ray.on_submit = refuse
    while faults:
        with pytest.raises(RuntimeError, match="No available agent"):
            stage.dispatcher._tick()
        assert stage.job(job).state == JobState.QUEUED
    stage.dispatcher._tick()
    assert stage.job(job).state == JobState.RUNNING
    assert list(stage.ray.jobs) == [f"{job}-{module.MOST_FRUITLESS_ATTEMPTS + 2}"]


def test_a_job_that_is_cancelled_while_it_is_submitted_is_stopped(stage: Stage) -> None:
    job = stage.submit()
    stage.ray.on_submit = lambda: stage.cancel(job)
    stage.dispatcher._tick()
    stage.dispatcher._tick()
    assert stage.ray.stopped == [f"{job}-1"]


def test_a_cancelled_job_keeps_its_place_until_its_driver_is_gone(stage: Stage) -> None:
    first, second = stage.submit(), stage.submit()
    stage.dispatcher._tick()
    stage.cancel(first)
    stage.dispatcher._tick()
    assert (stage.ray.stopped, stage.job(second).state) == ([f"{first}-1"], JobState.QUEUED)
    stage.ray.jobs[f"{first}-1"] = "STOPPED"
    stage.dispatcher._tick()
    assert stage.job(second).state == JobState.RUNNING


def test_a_paused_job_gives_its_place_up_and_goes_on_from_its_checkpoints(stage: Stage) -> None:
    first, second = stage.submit(), stage.submit()
    stage.dispatcher._tick()
    checkpoint = stage.write_checkpoint(first)
    stage.pause(first)
    stage.dispatcher.stop_job(first)
    stage.dispatcher._tick()
    assert stage.ray.stopped == [f"{first}-1"]
    stage.ray.jobs[f"{first}-1"] = "STOPPED"
    stage.dispatcher._tick()
    assert (stage.job(first).state, stage.job(second).state) == (JobState.PAUSED, JobState.RUNNING)
    stage.resume(first)
    stage.cancel(second)
    stage.ray.jobs[f"{second}-1"] = "STOPPED"
    stage.dispatcher._tick()
    assert stage.ray.jobs[f"{first}-2"] == "RUNNING"
    assert checkpoint.exists()


def test_pausing_wakes_the_dispatcher(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 60.0)
    job = stage.submit()
    stage.dispatcher.start()
    try:
        stage.wait_for(lambda: f"{job}-1" in stage.ray.jobs)
        stage.pause(job)
        stage.dispatcher.stop_job(job)
        stage.wait_for(lambda: f"{job}-1" in stage.ray.stopped)
    finally:
        stage.dispatcher.stop()


@pytest.mark.parametrize("paused_first", [False, True])
def test_a_job_that_is_cancelled_leaves_no_checkpoints(stage: Stage, paused_first: bool) -> None:
    job = stage.submit()
    stage.dispatcher._tick()
    checkpoint = stage.write_checkpoint(job)
    if paused_first:
        stage.pause(job)
        stage.dispatcher.stop_job(job)
        stage.ray.jobs[f"{job}-1"] = "STOPPED"
        stage.dispatcher._tick()
        assert checkpoint.exists()
    stage.cancel(job)
    stage.dispatcher.stop_job(job)
    stage.dispatcher._tick()
    assert checkpoint.exists() is not paused_first  # a driver that is not gone may still write
    stage.ray.jobs[f"{job}-1"] = "STOPPED"
    stage.dispatcher._tick()
    assert not checkpoint.exists()


def test_a_silent_driver_is_stopped_before_its_job_goes_on(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = stage.submit()
    stage.dispatcher._tick()
    late = datetime.now(UTC) + timedelta(minutes=5)
    monkeypatch.setattr(module, "_now", lambda: late)
    stage.dispatcher._tick()
    assert (stage.ray.stopped, stage.job(job).state) == ([f"{job}-1"], JobState.QUEUED)
    stage.ray.jobs[f"{job}-1"] = "STOPPED"
    stage.dispatcher._tick()
    assert stage.job(job).attempt == 2


def test_a_job_whose_drivers_die_again_and_again_fails(stage: Stage) -> None:
    job = stage.submit()
    for attempt in range(1, module.MOST_FRUITLESS_ATTEMPTS + 1):
        stage.dispatcher._tick()
        stage.ray.jobs[f"{job}-{attempt}"] = "FAILED"
    stage.dispatcher._tick()
    assert stage.job(job).state == JobState.FAILED


def test_the_dispatcher_outlives_ray_and_a_database_that_is_away_with_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = stage.submit()
    requeue_all, faults = stage.dispatcher._requeue_all, [DatabaseUnavailable("locked")]

    def away_once(reason: str) -> None:
        if faults:
            raise faults.pop()
        requeue_all(reason)

    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)
    stage.dispatcher._tick()
    monkeypatch.setattr(stage.dispatcher, "_requeue_all", away_once)
    stage.ray.jobs.clear()
    stage.ray.lives = False
    stage.dispatcher.start()
    try:
        stage.wait_for(lambda: f"{job}-2" in stage.ray.jobs)
        assert (faults, stage.ray.heads, list(stage.ray.jobs)) == ([], 2, [f"{job}-2"])
    finally:
        stage.dispatcher.stop()
    assert stage.job(job).state == JobState.QUEUED


def test_a_head_that_lives_but_does_nothing_is_started_anew(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = stage.submit()

    def refuse() -> None:
        if stage.ray.heads == 1:
            raise RuntimeError("its agent is gone")

    stage.ray.on_submit = refuse
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)
    stage.dispatcher.start()
    try:
        stage.wait_for(lambda: bool(stage.ray.jobs))
        assert (stage.ray.heads, list(stage.ray.jobs)) == (2, [f"{job}-{module.MOST_RAY_FAILURES + 1}"])
    finally:
        stage.dispatcher.stop()
