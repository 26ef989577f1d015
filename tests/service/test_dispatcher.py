"""The dispatcher against a Ray that does as it is told: what it makes of silence, faults and cancels."""

import errno
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coterie.search.spec import JobSpec
from coterie.search.store import GOES_ON, FilesUnavailable, FolderArtifacts, JobState
from coterie.service import dispatcher as module
from coterie.service import liveness
from coterie.service.config import Settings
from coterie.service.dispatcher import Dispatcher
from coterie.service.storage import migrate
from coterie.service.storage.database import Database, DatabaseUnavailable
from coterie.service.storage.repositories import JobRepository
from coterie.service.storage.store import SqlTrialStore
from coterie.service.storage.tables import JobRow

STEP = 5.0
SILENT = "its driver was silent for too long"
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
    clock: float = 1e6

    def submit(self, tenant: str | None = None) -> str:
        spec = JobSpec.model_validate({"dataset": {"source": "digits"}, "budget": {"trials": 2}})
        with self.database.write() as session:
            return JobRepository(session, tenant).create(spec, {}, datetime.now(UTC))[0].id

    def cancel(self, job_id: str) -> None:
        with self.database.write() as session:
            JobRepository(session).cancel(job_id, datetime.now(UTC))

    def pause(self, job_id: str) -> None:
        with self.database.write() as session:
            JobRepository(session).pause(job_id, datetime.now(UTC))

    def resume(self, job_id: str) -> None:
        with self.database.write() as session:
            JobRepository(session).resume(job_id, datetime.now(UTC))

    def write_checkpoint(self, job_id: str) -> Path:
        checkpoint = (
            FolderArtifacts(self.settings.artifacts_of(job_id)).checkpoint_folder("trial_0") / "state"
        )
        checkpoint.parent.mkdir(parents=True)
        checkpoint.touch()
        return checkpoint

    def submit_and_start(self) -> str:
        """A job whose driver has said who it is."""
        job_id = self.submit()
        self.dispatcher._tick()
        with self.database.write() as session:
            assert JobRepository(session).set_driver(job_id, 1, "host:1", datetime.now(UTC))
        return job_id

    def claim(self, owner: str) -> str:
        """As another server does."""
        with self.database.write() as session:
            claimed = JobRepository(session).claim_next(datetime.now(UTC), timedelta(seconds=30), owner)
        assert claimed is not None
        return claimed.job_id

    def let_pass(self, seconds: float, each: Callable[[], object] = lambda: None) -> None:
        """Ticks, `STEP` seconds apart by the server's own clock, after one to begin from."""
        for passed in range(math.ceil(seconds / STEP) + 1):
            self.clock += STEP if passed else 0
            each()
            self.dispatcher._tick()

    @staticmethod
    def wait_for(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def job(self, job_id: str) -> JobRow:
        with self.database.read() as session:
            return JobRepository(session).get(job_id)


Open = Callable[[Settings], Stage]


@pytest.fixture
def open_stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens servers; each has a Ray of its own unless it is told of one."""
    databases = []

    def open_with(settings: Settings) -> Stage:
        migrate.prepare(settings.url)
        database, ray = Database(settings.url), FakeRay()
        databases.append(database)
        dispatcher = Dispatcher(settings, database)
        with monkeypatch.context() as patch:
            patch.setattr(module, "start_head", ray.start)
            patch.setattr(module, "job_client", lambda *_: ray)
            dispatcher._connect()
        return Stage(ray, settings, database, dispatcher)

    monkeypatch.setattr(os, "environ", dict(os.environ))  # the dispatcher changes it
    yield open_with
    for database in databases:
        database.close()


@pytest.fixture
def stage(tmp_path: Path, open_stage: Open, monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = open_stage(Settings(data_dir=tmp_path, _env_file=None))
    monkeypatch.setattr(module, "start_head", stage.ray.start)
    monkeypatch.setattr(module, "job_client", lambda *_: stage.ray)
    monkeypatch.setattr(liveness, "monotonic", lambda: stage.clock)
    return stage


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


def test_a_silent_driver_is_stopped_before_its_job_goes_on(stage: Stage) -> None:
    job = stage.submit_and_start()
    stage.let_pass(stage.settings.lease_seconds)
    assert stage.ray.stopped == [f"{job}-1"]
    assert (stage.job(job).state, stage.job(job).reason) == (JobState.QUEUED, SILENT)
    stage.dispatcher._tick()
    assert stage.job(job).state == JobState.QUEUED
    stage.ray.jobs[f"{job}-1"] = "STOPPED"
    stage.dispatcher._tick()
    assert stage.job(job).attempt == 2


def test_a_driver_is_given_the_time_to_start(stage: Stage) -> None:
    job, lease = stage.submit(), stage.settings.lease_seconds
    stage.dispatcher._tick()
    stage.let_pass(module.STARTING_LEASES * lease - STEP)
    assert stage.job(job).state == JobState.RUNNING
    stage.let_pass(STEP)
    assert stage.job(job).reason == SILENT


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


def test_a_full_disk_is_told_once_and_no_reason_to_start_ray_anew(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "coterie")
    job, refused = stage.submit(), count()

    def refuse() -> None:
        if next(refused) < 2 * module.MOST_RAY_FAILURES:
            raise OSError(errno.ENOSPC, "No space left on device")

    stage.ray.on_submit = refuse
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)
    stage.dispatcher.start()
    try:
        stage.wait_for(lambda: stage.dispatcher.ready()[0])
    finally:
        stage.dispatcher.stop()
    assert (stage.ray.heads, list(stage.ray.jobs)) == (1, [f"{job}-{2 * module.MOST_RAY_FAILURES + 1}"])
    assert caplog.text.count("Traceback") == 2  # the disk's error, and what is made of it
    assert "the dispatcher does its work again" in caplog.text


def test_a_job_whose_files_can_not_be_kept_lets_others_go_first(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = stage.submit(), stage.submit()
    stage.dispatcher._tick()
    with stage.database.write() as session:
        why = f"no space left; {GOES_ON}"
        assert JobRepository(session).requeue(first, 1, why, datetime.now(UTC), preempted=True)
    stage.ray.jobs[f"{first}-1"] = "FAILED"
    stage.dispatcher._tick()
    assert [stage.job(job).state for job in (first, second)] == [JobState.QUEUED, JobState.RUNNING]
    stage.cancel(second)
    stage.ray.jobs[f"{second}-1"] = "STOPPED"
    stage.dispatcher._tick()
    assert stage.job(first).state == JobState.QUEUED
    later = time.monotonic() + module.REST_SECONDS
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: later))
    stage.dispatcher._tick()
    assert stage.job(first).attempt == 2


def test_while_the_place_of_files_is_away_no_job_begins(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, away = stage.submit(), [True]
    claim_root = module.claim_root

    def reach(*arguments: Any) -> None:
        if away:
            raise FilesUnavailable("the artifacts can't be reached")
        claim_root(*arguments)

    def write(*arguments: Any) -> None:
        reach(stage.settings, stage.database)
        write_private(*arguments)

    write_private = module._write_private
    monkeypatch.setattr(module, "_write_private", write)
    monkeypatch.setattr(module, "claim_root", reach)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(module, "REST_SECONDS", 0.0)
    stage.dispatcher._problem = None
    stage.dispatcher.start()
    try:
        stage.wait_for(lambda: not stage.dispatcher.ready()[0])
        time.sleep(0.2)
        assert stage.job(job).attempt == 1
        away.clear()
        stage.wait_for(lambda: bool(stage.ray.jobs))
    finally:
        stage.dispatcher.stop()
    assert list(stage.ray.jobs) == [f"{job}-2"]


def test_a_driver_that_writes_is_left_alone_whatever_the_clocks_say(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = stage.submit()
    stage.dispatcher._tick()
    store = SqlTrialStore(stage.database, job, 1)
    for step in (timedelta(days=1), timedelta(days=-1)):
        stepped = datetime.now(UTC) + step
        monkeypatch.setattr(module, "_now", lambda stepped=stepped: stepped)
        stage.let_pass(2 * stage.settings.lease_seconds, each=store.beat)
    assert (stage.job(job).state, stage.job(job).attempt) == (JobState.RUNNING, 1)


def test_after_an_outage_every_driver_has_a_whole_lease(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, lease = stage.submit_and_start(), stage.settings.lease_seconds
    stage.let_pass(lease - STEP)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(module, "POLL_SECONDS", 60.0)
    monkeypatch.setattr(module, "MOST_RAY_FAILURES", math.inf)
    stage.ray.fault = ConnectionError("the dashboard is busy")
    stage.dispatcher.start()
    try:
        stage.wait_for(lambda: not stage.dispatcher.ready()[0])
        stage.ray.fault = None
        stage.wait_for(lambda: stage.dispatcher.ready()[0])
        stage.let_pass(lease - STEP)
        assert stage.job(job).attempt == 1
        stage.let_pass(STEP)
        assert stage.job(job).reason == SILENT
    finally:
        stage.dispatcher.stop()


def test_a_job_that_another_server_claimed_and_never_submitted_is_given_back(stage: Stage) -> None:
    job = stage.submit()
    assert stage.claim("server_dead") == job
    stage.let_pass(stage.settings.lease_seconds - STEP)
    assert stage.job(job).state == JobState.RUNNING
    stage.let_pass(STEP)
    assert stage.ray.jobs == {f"{job}-2": "RUNNING"}


def test_the_jobs_of_another_server_are_let_alone_when_this_one_starts_anew(stage: Stage) -> None:
    others, own = stage.submit(), stage.submit()
    stage.claim("server_2")
    stage.dispatcher._tick()
    stage.dispatcher._drop_head("the server was stopped")
    assert (stage.job(others).state, stage.job(own).state) == (JobState.RUNNING, JobState.QUEUED)
    stage.dispatcher._connect()
    stage.dispatcher._tick()
    assert (stage.job(others).attempt, list(stage.ray.jobs)) == (1, [f"{own}-1", f"{own}-2"])


def test_a_server_keeps_its_id_and_another_has_another(tmp_path: Path, open_stage: Open) -> None:
    settings = [Settings(data_dir=tmp_path / name, _env_file=None) for name in ("one", "one", "two")]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    first, again, other = (open_stage(chosen).dispatcher._owner for chosen in settings)
    assert first == again
    assert first != other
    assert first.startswith("server_")


@pytest.fixture
def cluster(tmp_path: Path, open_stage: Open, postgres: Callable[[], str]) -> tuple[Stage, Stage]:
    """Two servers on one database and one Ray cluster, for two jobs at a time."""
    url, servers = postgres(), []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        settings = Settings(
            data_dir=tmp_path / name,
            database_url=url,
            ray_address="http://ray.example:8265",
            max_running_jobs=2,
            _env_file=None,
        )
        servers.append(open_stage(settings))
    first, second = servers
    second.dispatcher._client = second.ray = first.ray
    return first, second


def test_a_job_on_a_cluster_outlives_the_server_that_submitted_it(
    cluster: tuple[Stage, Stage], open_stage: Open
) -> None:
    first, second = cluster
    job = first.submit()
    first.dispatcher._tick()
    second.dispatcher._tick()
    restarted = open_stage(first.settings)
    restarted.dispatcher._client = first.ray
    restarted.dispatcher._tick()
    assert (first.job(job).state, first.job(job).attempt) == (JobState.RUNNING, 1)
    first.ray.jobs[f"{job}-1"] = "FAILED"
    second.dispatcher._tick()  # the first one is gone, and nobody waits for it
    assert first.job(job).attempt == 2


def test_servers_on_a_cluster_share_its_places(cluster: tuple[Stage, Stage]) -> None:
    first, second = cluster
    jobs = [first.submit() for _ in range(4)]
    for server in (first, second, first, second):
        server.dispatcher._tick()
    assert sorted(first.ray.jobs) == sorted(f"{job}-1" for job in jobs[:2])
    first.cancel(jobs[0])
    second.dispatcher._tick()  # whose driver is still ending
    assert len(first.ray.jobs) == 2


def test_a_job_that_is_just_being_submitted_is_not_taken_for_gone(cluster: tuple[Stage, Stage]) -> None:
    first, second = cluster
    job = first.submit()
    first.ray.on_submit = second.dispatcher._tick
    first.dispatcher._tick()
    assert (first.job(job).state, first.job(job).attempt) == (JobState.RUNNING, 1)


def test_a_job_that_is_resumed_while_its_driver_ends_begins_no_second_one(
    tmp_path: Path, open_stage: Open
) -> None:
    stage = open_stage(Settings(data_dir=tmp_path, max_running_jobs=2, _env_file=None))
    job = stage.submit()
    stage.dispatcher._tick()
    stage.pause(job)
    stage.resume(job)
    stage.dispatcher._tick()
    assert (stage.ray.stopped, list(stage.ray.jobs)) == ([f"{job}-1"], [f"{job}-1"])
    stage.ray.jobs[f"{job}-1"] = "STOPPED"
    stage.dispatcher._tick()
    assert list(stage.ray.jobs) == [f"{job}-1", f"{job}-2"]


def test_a_job_that_is_deleted_leaves_nothing_once_its_driver_is_gone(stage: Stage) -> None:
    job = stage.submit()
    stage.dispatcher._tick()
    stage.cancel(job)
    with stage.database.write() as session:
        JobRepository(session).delete(job)
    stage.dispatcher.stop_job(job)
    checkpoint = stage.write_checkpoint(job)
    stage.dispatcher._tick()
    assert checkpoint.exists()  # its driver is told to stop
    stage.ray.jobs[f"{job}-1"] = "STOPPED"
    stage.dispatcher._tick()
    assert not stage.settings.artifacts_of(job).exists()


def test_no_job_starts_while_the_disk_of_the_artifacts_is_nearly_full(
    open_stage: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts = tmp_path / "share" / "jobs"
    stage = open_stage(Settings(data_dir=tmp_path, artifacts=artifacts, _env_file=None))
    free = {stage.settings.data_dir: 10**12, artifacts: 10**6}
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[folder]))
    job = stage.submit()
    stage.dispatcher._tick()
    assert stage.job(job).state == "queued"
    stage.dispatcher._problem = None
    ready, words = stage.dispatcher.ready()
    assert not ready
    assert "the disk of the artifacts folder has 1 MB free" in words
    free[artifacts] = 10**12
    stage.dispatcher._tick()
    assert stage.job(job).state == "running"


def test_no_job_starts_while_the_disk_is_nearly_full(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    job, free = stage.submit(), 150_000_000
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    stage.dispatcher._problem = None
    stage.dispatcher._tick()
    ready, reason = stage.dispatcher.ready()
    assert (ready, stage.job(job).state) == (False, JobState.QUEUED)
    assert "150 MB free, and needs at least 200 MB" in reason
    free = 200_000_000
    stage.dispatcher._tick()
    assert (stage.dispatcher.ready()[0], stage.job(job).state) == (True, JobState.RUNNING)


def test_a_tenant_that_has_spent_its_device_seconds_gives_its_place_up(
    tmp_path: Path, open_stage: Open
) -> None:
    stage = open_stage(Settings(data_dir=tmp_path, tenant_max_device_seconds=60, _env_file=None))
    spender, other = stage.submit("spender"), stage.submit("other")
    stage.dispatcher._tick()
    store = SqlTrialStore(stage.database, spender, 1)
    store.charge_side(59.0)
    stage.dispatcher._tick()
    assert stage.job(spender).state == JobState.RUNNING
    store.charge_side(1.0)
    stage.dispatcher._tick()
    assert (stage.job(spender).state, stage.job(spender).reason) == (
        JobState.QUEUED,
        "its tenant has used its device-seconds of this month",
    )
    with stage.database.read() as session:
        assert JobRepository(session).attempts_without_progress(spender) == 0
    stage.dispatcher._tick()
    stage.ray.jobs[f"{spender}-1"] = "STOPPED"
    stage.dispatcher._tick()
    assert list(stage.ray.jobs) == [f"{spender}-1", f"{other}-1"]
