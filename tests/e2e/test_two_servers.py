"""Two servers, each with a data folder and a Ray of its own, on one PostgreSQL: a job runs once."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from coterie.search.data.digits import Digits
from coterie.search.objective import metric_directions
from coterie.search.spec import JobSpec
from coterie.service.ray_head import end_leftovers
from coterie.service.storage import migrate
from coterie.service.storage.database import Database
from coterie.service.storage.repositories import JobRepository
from tests.e2e.light_server import TRIALS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LIGHT = [sys.executable, str(Path(__file__).with_name("light_server.py"))]
REAL = [sys.executable, "-m", "coterie.service.cli", "serve", "--port", "0", "--data-dir"]
JOBS = {"a": 90, "b": 70, "c": 40}  # by tenant; all of a's are older than all of b's
PRIORITIES = (0, 5, 10)
PLACES = 2  # of each server
# Servers note the time before they wait for each other to claim.
SLIP = timedelta(seconds=0.5)


class Stage:
    """The database, and servers on it."""

    def __init__(self, url: str, folder: Path) -> None:
        migrate.prepare(url)
        self.database = Database(url)
        self.folder = folder
        self.servers: list[subprocess.Popen[bytes]] = []
        self.directions = metric_directions(Digits.tasks())

    def serve(self, command: Sequence[str], **settings: object) -> subprocess.Popen[bytes]:
        data_dir = self.folder / f"server_{len(self.servers)}"
        chosen = {"database_url": self.database.engine.url.render_as_string(hide_password=False), **settings}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COTERIE_")}
        environment |= {f"COTERIE_{name.upper()}": str(value) for name, value in chosen.items()}
        with (self.folder / f"{data_dir.name}.log").open("wb") as log:
            server = subprocess.Popen([*command, str(data_dir)], env=environment, stdout=log, stderr=log)
        self.servers.append(server)
        return server

    def submit(self, tenant: str, **fields: Any) -> str:
        spec = JobSpec.model_validate(
            {"dataset": {"source": "digits"}, "budget": {"trials": TRIALS, "epochs": 1}, **fields}
        )
        with self.database.write() as session:
            return JobRepository(session, tenant).create(spec, self.directions, datetime.now(UTC))[0].id

    def rows(self, query: str) -> list[Any]:
        with self.database.read() as session:
            return list(session.execute(text(query)))

    def wait_for(self, query: str, seconds: float) -> Any:
        """The rows of a query, once there are some."""
        deadline = time.monotonic() + seconds
        while not (found := self.rows(query)):
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.05)
        return found

    def logs(self) -> str:
        return "\n".join(log.read_text()[-3000:] for log in sorted(self.folder.glob("*.log")))

    def close(self) -> None:
        for server in self.servers:
            server.terminate()
        for number, server in enumerate(self.servers):
            server.wait(60)
            end_leftovers(self.folder / f"server_{number}")
        self.database.close()


@pytest.fixture
def stage(postgres: Callable[[], str], tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(postgres(), tmp_path)
    yield stage
    stage.close()


def test_two_hundred_jobs_run_once_in_order_though_a_server_is_killed(stage: Stage) -> None:
    """Light jobs (see light_server.py), so that there can be many of them."""
    chosen = random.Random(0)
    for tenant, count in JOBS.items():
        for _ in range(count):
            stage.submit(tenant, priority=chosen.choice(PRIORITIES))
    began = time.monotonic()
    first, _ = (
        stage.serve(LIGHT, max_running_jobs=PLACES, lease_seconds=15, min_free_bytes=0) for _ in range(2)
    )
    stage.wait_for("SELECT 1 FROM jobs WHERE state = 'succeeded' HAVING count(*) >= 60", 120)
    first.send_signal(signal.SIGKILL)
    killed_at = datetime.now(UTC)
    stage.wait_for("SELECT 1 FROM jobs HAVING count(*) FILTER (WHERE ended_at IS NULL) = 0", 300)
    print(f"{sum(JOBS.values())} jobs took {time.monotonic() - began:.0f} s")

    jobs = stage.rows("SELECT * FROM jobs ORDER BY started_at")
    assert Counter(job.state for job in jobs) == {"succeeded": sum(JOBS.values())}
    check_that_each_ran_once(stage, jobs)
    before = [job for job in jobs if job.started_at < killed_at - SLIP]
    assert {job.owner for job in before} == {job.owner for job in jobs}
    assert len({job.owner for job in jobs if job.started_at > killed_at + SLIP}) == 1
    check_priorities(jobs)
    check_shares(before)


def check_that_each_ran_once(stage: Stage, jobs: Sequence[Any]) -> None:
    trials = stage.rows("SELECT job_id, number, state, attempt FROM trials")
    assert len(trials) == len({(trial.job_id, trial.number) for trial in trials}) == len(jobs) * TRIALS
    assert {trial.state for trial in trials} == {"completed"}
    assert stage.rows("SELECT count(*) FROM measurements") == [(len(trials),)]
    # A driver outlives its server; only what that had claimed and not yet submitted begins anew.
    anew = [job for job in jobs if job.attempt > 1]
    assert len(anew) <= PLACES
    for job in anew:
        given_up = stage.rows(f"SELECT driver FROM attempts WHERE job_id = '{job.id}' AND attempt = 1")
        assert given_up == [(None,)]
    charged = dict(stage.rows("SELECT tenant, sum(device_seconds) FROM tenant_usage GROUP BY tenant"))
    assert charged == {tenant: count * TRIALS * 1.0 for tenant, count in JOBS.items()}


def check_priorities(jobs: Sequence[Any]) -> None:
    """Each server claims in order, and both together but for the moment in which one waits for the other."""
    for owner in {job.owner for job in jobs}:
        claimed = [job.priority for job in jobs if job.owner == owner and job.attempt == 1]
        assert claimed == sorted(claimed, reverse=True)
    for index, job in enumerate(jobs):
        overtaken = [other for other in jobs[index:] if other.priority > job.priority]
        assert all(other.started_at - job.started_at < SLIP for other in overtaken)


def check_shares(jobs: Sequence[Any]) -> None:
    """By age alone, all of one tenant's jobs would start first; while all wait, they start alike."""
    for priority in PRIORITIES:
        level = [job.tenant for job in jobs if job.priority == priority]
        left, started = Counter(level), Counter(dict.fromkeys(JOBS, 0))
        for tenant in level:
            if all(left[name] > 0 for name in JOBS):
                started[tenant] += 1
                assert max(started.values()) - min(started.values()) <= 2 * PLACES
            left[tenant] -= 1


def test_the_jobs_of_a_machine_that_dies_go_on_at_another_server(stage: Stage) -> None:
    """Real servers, Rays and training. The first server is killed with all its Ray, as a power cut does."""
    small = {"tasks": ["left_parity", "right_parity"], "search": {"families": ["shared"]}}
    long = stage.submit("a", **small, budget={"trials": 4, "epochs": 60}, priority=1)
    short = [stage.submit(tenant, **small, budget={"trials": 1, "epochs": 1}) for tenant in ("a", "b", "b")]
    settings = {"cpus": 1, "lease_seconds": 10, "min_free_bytes": 0}
    first = stage.serve(REAL, **settings)
    stage.wait_for(f"SELECT 1 FROM jobs WHERE id = '{long}' AND state = 'running'", 60)
    second = stage.serve(REAL, **settings)
    stage.wait_for(f"SELECT 1 FROM jobs WHERE id = '{long}' AND trials_running > 0", 120)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert end_leftovers(stage.folder / "server_0") > 0
    stage.wait_for("SELECT 1 FROM jobs HAVING count(*) FILTER (WHERE ended_at IS NULL) = 0", 180)
    jobs = {job.id: job for job in stage.rows("SELECT * FROM jobs")}
    assert {job.state for job in jobs.values()} == {"succeeded"}
    assert [jobs[job_id].attempt for job_id in (long, *short)] == [2, 1, 1, 1]
    assert len({job.owner for job in jobs.values()}) == 1
    trials = stage.rows("SELECT job_id, number, state FROM trials")
    assert Counter(trial.job_id for trial in trials) == {long: 4} | dict.fromkeys(short, 1)
    assert {trial.state for trial in trials} == {"completed"}
    assert second.poll() is None
