import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import pytest

from coterie.service.ray_head import (
    LOG_FILE,
    MARKER_VARIABLE,
    RECORD_FILE,
    TOKEN_FILE,
    RayHead,
    RayHeadError,
    end_leftovers,
    start_head,
)

SMALL_STORE = 80_000_000
QUICK = 1.5  # seconds for ending a head

# A driver with an actor of its own; both say where they run.
DRIVER = """
import os, sys, time, ray

ray.init(log_to_driver=False)

@ray.remote(num_cpus=0)
class Actor:
    def pid(self):
        return os.getpid()

actor = Actor.remote()
print("driver", os.getpid(), "actor", ray.get(actor.pid.remote()), flush=True)
time.sleep(float(sys.argv[1]))
"""

# A server that dies without a chance to clean up.
SERVER = """
import sys, time
from pathlib import Path
from coterie.service.ray_head import start_head

head = start_head(Path(sys.argv[1]), num_cpus=1, object_store_bytes=int(sys.argv[2]))
print(head.dashboard_url, flush=True)
time.sleep(600)
"""

T = TypeVar("T")
Start = Callable[..., RayHead]


def server_process(data_dir: Path) -> subprocess.Popen[str]:
    # With a folder for temporary files that is too long for Ray's sockets, as computing centres have.
    return subprocess.Popen(
        [sys.executable, "-c", SERVER, str(data_dir), str(SMALL_STORE)],
        env=os.environ | {"TMPDIR": str(data_dir)},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    """A data folder in which nothing runs once the test is over, however it ends."""
    folder = tmp_path / "data"
    folder.mkdir()
    yield folder
    end_leftovers(folder)


@pytest.fixture
def start(data_dir: Path) -> Iterator[Start]:
    with contextlib.ExitStack() as stack:

        def started(folder: Path = data_dir, **options: Any) -> RayHead:
            head = start_head(folder, **{"num_cpus": 1, "object_store_bytes": SMALL_STORE, **options})
            stack.callback(head.stop)
            return head

        yield started


class JobApi:
    """The job API over plain HTTP: what the tests need of it, without what `ray` keeps in a process."""

    def __init__(self, dashboard_url: str, token_file: Path) -> None:
        headers = {"Authorization": f"Bearer {token_file.read_text()}"}
        self.http = httpx.Client(base_url=dashboard_url, headers=headers, trust_env=False, timeout=30)

    def run_driver(self, script: Path, seconds: float) -> list[int]:
        """Submit the driver and return its own pid and its actor's."""
        script.write_text(DRIVER)
        entrypoint = f"{sys.executable} {script} {seconds}"
        job = self.http.post("/api/jobs/", json={"entrypoint": entrypoint}).raise_for_status().json()
        return wait_for(lambda: self.pids_in_log(job["submission_id"]))

    def pids_in_log(self, job_id: str) -> list[int]:
        answer = self.http.get(f"/api/jobs/{job_id}/logs").raise_for_status().json()
        words = (answer["logs"] or "").split()
        return [int(words[words.index(name) + 1]) for name in ("driver", "actor") if name in words]

    def __enter__(self) -> "JobApi":
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()


def wait_for(condition: Callable[[], T], seconds: float = 30) -> T:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return value


def family(pid: int) -> list[psutil.Process]:
    """A process and everything that it has started, by descent rather than by marker."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def living(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def carries(marker: str, process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.environ().get(MARKER_VARIABLE) == marker
    return False


def record_in(data_dir: Path) -> dict[str, Any]:
    record = json.loads((data_dir / RECORD_FILE).read_text())
    assert isinstance(record, dict)
    return record


def listening_addresses(processes: list[psutil.Process]) -> set[str]:
    return {
        connection.laddr.ip.removeprefix("::ffff:")
        for process in living(processes)
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }


def test_a_head_takes_a_job_and_leaves_nothing_when_stopped(
    start: Start, data_dir: Path, tmp_path: Path
) -> None:
    head = start()
    record = record_in(data_dir)
    assert head.alive()
    with JobApi(head.dashboard_url, head.token_file) as api:
        driver, actor = api.run_driver(tmp_path / "driver.py", 60)
    processes = family(record["pid"])
    assert {driver, actor} <= {process.pid for process in processes}
    assert all(carries(head.marker, process) for process in living(processes))
    assert listening_addresses(processes) == {"127.0.0.1"}

    began = time.monotonic()
    head.stop()
    assert time.monotonic() - began < QUICK

    assert not head.alive()
    assert living(processes) == []
    assert not any(carries(head.marker, process) for process in psutil.process_iter())
    assert not Path(record["temp_dir"]).exists()
    assert sorted(path.name for path in data_dir.iterdir()) == sorted([LOG_FILE, TOKEN_FILE])
    head.stop()


@pytest.mark.slow
def test_what_a_killed_server_left_is_ended(data_dir: Path, tmp_path: Path) -> None:
    with server_process(data_dir) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        with JobApi(url, data_dir / TOKEN_FILE) as api:
            pids = api.run_driver(tmp_path / "driver.py", 600)
        record = record_in(data_dir)
        processes = family(record["pid"])
        server.kill()
    assert set(pids) <= {process.pid for process in living(processes)}

    began = time.monotonic()
    assert end_leftovers(data_dir) >= len(pids)
    assert time.monotonic() - began < QUICK

    assert living(processes) == []
    assert not any(carries(record["marker"], process) for process in psutil.process_iter())
    assert not Path(record["temp_dir"]).exists()
    assert end_leftovers(data_dir) == 0


@pytest.mark.slow
def test_two_heads_run_side_by_side_each_with_its_own_token(
    start: Start, data_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    first, second = start(), start(tmp_path / "other")
    with (
        JobApi(first.dashboard_url, first.token_file) as first_api,
        JobApi(second.dashboard_url, second.token_file) as second_api,
    ):
        first_pids = first_api.run_driver(tmp_path / "first.py", 60)
        second_pids = second_api.run_driver(tmp_path / "second.py", 60)
        with JobApi(first.dashboard_url, second.token_file) as mistaken:
            assert mistaken.http.get("/api/jobs/").status_code == httpx.codes.FORBIDDEN
        first_processes = family(record_in(data_dir)["pid"])
        second_processes = family(record_in(tmp_path / "other")["pid"])
        assert set(first_pids) <= {process.pid for process in living(first_processes)}
        first.stop()
        assert living(first_processes) == []
        assert set(second_pids) <= {process.pid for process in living(second_processes)}
        assert second.alive()
        assert len(second_api.http.get("/api/jobs/").raise_for_status().json()) == 1


@pytest.mark.slow
def test_the_job_client_of_ray_needs_the_token(start: Start, tmp_path: Path) -> None:
    head = start()
    submit = "; ".join(
        (
            "import sys",
            "from ray.job_submission import JobSubmissionClient",
            "client = JobSubmissionClient({!r}, headers={!r})",
            "client.submit_job(entrypoint='true')",
        )
    )
    without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}

    def submits(headers: dict[str, str], environment: dict[str, str]) -> bool:
        code = submit.format(head.dashboard_url, headers)
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0 or "AuthenticationError" in done.stderr
        return done.returncode == 0

    assert not submits({}, without)
    assert not submits({"Authorization": "Bearer guessed"}, without)
    assert submits(head.headers(), without)
    assert submits({}, without | head.environment())
    with httpx.Client(base_url=head.dashboard_url, trust_env=False) as http:
        answer = http.post("/api/jobs/", json={"entrypoint": "true"})
    assert answer.status_code == httpx.codes.UNAUTHORIZED


@pytest.mark.slow
def test_a_head_that_lost_a_part_is_not_alive(start: Start, data_dir: Path) -> None:
    head = start()
    processes = family(record_in(data_dir)["pid"])
    [raylet] = [process for process in processes if process.name() == "raylet"]
    raylet.kill()
    wait_for(lambda: not head.alive(), seconds=10)
    head.stop()
    assert living(processes) == []


def test_the_token_is_its_owners_and_kept_over_restarts(data_dir: Path) -> None:
    token_file = data_dir / TOKEN_FILE

    def start_and_give_up() -> str:
        with pytest.raises(RayHeadError, match="not ready in time"):
            start_head(data_dir, num_cpus=1, object_store_bytes=SMALL_STORE, timeout=0)
        assert token_file.stat().st_mode & 0o777 == 0o600
        return token_file.read_text()

    token = start_and_give_up()
    assert len(token) == 64
    token_file.chmod(0o644)
    assert start_and_give_up() == token


def test_a_recorded_pid_that_now_is_anothers_is_spared(data_dir: Path, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as stranger:
        try:
            created = psutil.Process(stranger.pid).create_time()
            write_record(data_dir, tmp_path, pid=stranger.pid, create_time=created - 60)
            assert end_leftovers(data_dir) == 0
            assert stranger.poll() is None
            assert not (data_dir / RECORD_FILE).exists()

            write_record(data_dir, tmp_path, pid=stranger.pid, create_time=created)
            assert end_leftovers(data_dir) == 1
        finally:
            stranger.kill()


def test_a_server_killed_before_it_knew_the_pid_left_enough_to_end_its_child(
    data_dir: Path, tmp_path: Path
) -> None:
    marker = write_record(data_dir, tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(600)"],
        env=os.environ | {MARKER_VARIABLE: marker},
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"here\n"
            assert end_leftovers(data_dir) == 1
        finally:
            child.kill()


def write_record(data_dir: Path, tmp_path: Path, **process: float) -> str:
    temp_dir = tmp_path / "ray"
    temp_dir.mkdir(exist_ok=True)
    record = {"marker": "test-marker", "temp_dir": str(temp_dir), "dashboard_url": "http://127.0.0.1:1"}
    (data_dir / RECORD_FILE).write_text(json.dumps(record | process))
    return "test-marker"


@pytest.mark.slow
def test_a_failed_start_says_why_and_leaves_nothing(data_dir: Path) -> None:
    with pytest.raises(RayHeadError, match=r"ended with code 1.*\n(.*\n)*.*minimum allowed"):
        start_head(data_dir, num_cpus=1, object_store_bytes=1)
    assert sorted(path.name for path in data_dir.iterdir()) == sorted([LOG_FILE, TOKEN_FILE])


@pytest.mark.slow
def test_a_start_that_takes_too_long_is_given_up(data_dir: Path) -> None:
    with pytest.raises(RayHeadError, match="not ready in time"):
        start_head(data_dir, num_cpus=1, object_store_bytes=SMALL_STORE, timeout=1.5)
    assert sorted(path.name for path in data_dir.iterdir()) == sorted([LOG_FILE, TOKEN_FILE])


@pytest.mark.slow
def test_an_interrupted_start_leaves_nothing(data_dir: Path) -> None:
    with server_process(data_dir) as server:
        wait_for(lambda: (data_dir / RECORD_FILE).exists() and record_in(data_dir)["pid"])
        wait_for(lambda: len(family(record_in(data_dir)["pid"])) > 1)  # it has children of its own
        processes = family(record_in(data_dir)["pid"])
        server.send_signal(signal.SIGINT)
        server.wait(timeout=10)
    assert living(processes) == []
    assert sorted(path.name for path in data_dir.iterdir()) == sorted([LOG_FILE, TOKEN_FILE])
