"""The Ray head that the server starts for itself where it is given no cluster.

What this file relies on, as seen with Ray 2.60 on Linux:

- **Every process of a head carries our marker** in its environment, also job supervisors, drivers' shells
  and actors, which Ray starts in sessions of their own. Ray's agents and dashboard modules would overwrite
  it with their process title; ``SPT_NOENV`` forbids that. Without it those processes stay behind, and a
  dashboard agent whose raylet was killed keeps a core busy.
- **Every port is on loopback** with ``RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0``, Ray's switch for one host only.
  With ``--node-ip-address=127.0.0.1`` alone Ray takes the host's outward address and listens everywhere.
- **No port is fixed, none can be lost in a race**: Ray's servers bind port 0 and tell what they got, and the
  dashboard's port is reserved for it. The Ray Client server alone can't be given port 0; it is left out.
- **A head takes jobs** once ``ray start`` has written its address (its last act, after the raylet has
  registered with its agent's ports), and the job API and the agent answer. Submitting earlier blocks for up
  to 10 s in steps of 0.5 s, or fails with "No available agent".
- **SIGTERM takes over 20 s**, SIGKILL a fraction of one; since SQL is the only truth, nothing is lost by it.

A client of the job API needs nothing but the token: ``JobSubmissionClient(head.dashboard_url,
headers=head.headers())`` needs no variable for it. Without the headers it takes the token from
``RAY_AUTH_TOKEN_PATH``, provided that ``RAY_AUTH_MODE=token`` was set before ``ray`` was imported. Either way
``RAY_API_SERVER_ADDRESS`` and ``RAY_ADDRESS`` override the address that it is given, and it goes through
``HTTP_PROXY`` unless ``NO_PROXY`` names 127.0.0.1.
"""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import psutil

RECORD_FILE = "ray.json"
TOKEN_FILE = "ray_token"
LOG_FILE = "ray.log"

MARKER_VARIABLE = "COTERIE_RAY_HEAD"

# Room for the data sets and checkpoints of one host; Ray refuses less than 75 MB.
DEFAULT_OBJECT_STORE_BYTES = 200_000_000

# Ray has sockets 91 characters below it, and the kernel takes 107.
_LONGEST_TEMP_PARENT = 16

# SIGKILL ends a process at once unless the kernel holds it, e.g. in a broken driver or a dead network disk.
_KILL_TIMEOUT = 10.0
_POLL_INTERVAL = 0.02
_SCAN_INTERVAL = 0.05
_LOG_LINES_SHOWN = 20

# Create times come from the boot time, which shifts a little when the clock is set.
_CREATE_TIME_TOLERANCE = 2.0

# A shell's settings for another Ray would win over ours.
_FOREIGN_SETTINGS = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "COTERIE_TOKEN")


class RayHeadError(RuntimeError):
    """A Ray head could not be started or ended."""


@dataclass(frozen=True, kw_only=True)
class RayHead:
    """A running Ray head, from `start_head`.

    Attributes:
        address: The GCS, `127.0.0.1:PORT`, for `ray.init`.
        dashboard_url: The dashboard and its job API, `http://127.0.0.1:PORT`.
        token_file: Holds the token that every client needs; whoever reads it can run code here.
        marker: The value of `COTERIE_RAY_HEAD` in every process of this head.
    """

    address: str
    dashboard_url: str
    token_file: Path
    marker: str
    _record: "_Record" = field(repr=False)
    _process: subprocess.Popen[bytes] = field(repr=False, compare=False)

    def environment(self) -> dict[str, str]:
        """The variables with which a client or driver reaches this head and no other.

        They must be set before `ray` is imported. Jobs submitted to this head have them already.
        """
        return {
            **_client_environment(self.token_file),
            "RAY_ADDRESS": self.address,
            "RAY_API_SERVER_ADDRESS": self.dashboard_url,
        }

    def headers(self) -> dict[str, str]:
        """The HTTP headers that the job API and the dashboard ask for."""
        return _headers(self.token_file)

    def alive(self) -> bool:
        """Whether the head runs; it ends itself within a second or so of losing one of its parts."""
        return self._process.poll() is None

    def stop(self) -> None:
        """End every process of this head and remove its traces, jobs and their logs in Ray included.

        Can be called again.
        """
        _end(self._record, self.token_file.parent)
        self._process.wait()


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What a later server needs to end this head."""

    marker: str
    temp_dir: str
    dashboard_url: str
    pid: int | None = None
    create_time: float | None = None

    @staticmethod
    def load(data_dir: Path) -> "_Record | None":
        try:
            return _Record(**json.loads((data_dir / RECORD_FILE).read_text()))
        except FileNotFoundError:
            return None

    def save(self, data_dir: Path) -> None:
        _write_private(data_dir / RECORD_FILE, json.dumps(asdict(self), indent=2))

    def processes(self) -> Iterator[psutil.Process]:
        """The head's processes that live, found by marker and by the recorded pid unless that was reused."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # it ended, or is another user's
                if process.environ().get(MARKER_VARIABLE) == self.marker or self._started(process):
                    yield process

    def _started(self, process: psutil.Process) -> bool:
        return (
            self.create_time is not None
            and process.pid == self.pid
            and abs(process.create_time() - self.create_time) < _CREATE_TIME_TOLERANCE
            and process.status() != psutil.STATUS_ZOMBIE
        )


def start_head(
    data_dir: Path,
    *,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    object_store_bytes: int = DEFAULT_OBJECT_STORE_BYTES,
    timeout: float = 60,
) -> RayHead:
    """Start a Ray head on loopback and return when it takes jobs.

    First ends what an earlier server left, so the caller must be the only server on `data_dir`. The folder
    gets a token (kept over restarts), a log and a record of what was started.

    Args:
        data_dir: An existing folder.
        num_cpus: CPUs to schedule on; all where None.
        num_gpus: GPUs to schedule on; those that Ray detects where None.
        object_store_bytes: Shared memory for Ray's objects, at least 75 MB.
        timeout: Seconds until the start is given up.

    Raises:
        RayHeadError: The head did not come up, or an earlier one can't be ended; nothing of it is left.
    """
    data_dir = data_dir.resolve()
    end_leftovers(data_dir)
    token_file = _ensure_token(data_dir)
    process = None
    with _reserved_port() as port:
        record = _Record(
            marker=uuid.uuid4().hex,
            temp_dir=_make_temp_dir(),
            dashboard_url=f"http://127.0.0.1:{port}",
        )
        # Recorded before anything runs: whoever is killed in between leaves nothing unknown.
        record.save(data_dir)
        try:
            with (data_dir / LOG_FILE).open("wb") as log:
                process = subprocess.Popen(
                    _command(record.temp_dir, port, num_cpus, num_gpus, object_store_bytes),
                    env=_head_environment(record.marker, record.temp_dir, token_file),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a terminal's Ctrl-C is the server's to handle
                )
            record = replace(record, pid=process.pid, create_time=psutil.Process(process.pid).create_time())
            record.save(data_dir)
            address = _wait_until_ready(process, record, data_dir, time.monotonic() + timeout)
        except BaseException:
            _end(record, data_dir)
            if process is not None:
                process.wait()
            raise
    return RayHead(
        address=address,
        dashboard_url=record.dashboard_url,
        token_file=token_file,
        marker=record.marker,
        _record=record,
        _process=process,
    )


def end_leftovers(data_dir: Path) -> int:
    """End the head that a killed server left in `data_dir`, and return how many processes that were.

    Raises:
        RayHeadError: A process survived, e.g. another user's.
    """
    record = _Record.load(data_dir)
    return 0 if record is None else _end(record, data_dir)


def without_ray_client(ray_params: Any, head: bool) -> None:
    """Leave out the Ray Client server; `ray start` calls this by name (`RAY_START_HOOK`)."""
    ray_params.ray_client_server_port = None


def _command(
    temp_dir: str, dashboard_port: int, num_cpus: int | None, num_gpus: int | None, object_store_bytes: int
) -> list[str]:
    command = [
        *(sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1",
        "--include-dashboard=true",
        f"--dashboard-port={dashboard_port}",
        "--port=0",
        "--dashboard-agent-listen-port=0",
        "--dashboard-agent-grpc-port=0",
        "--runtime-env-agent-port=0",
        "--metrics-export-port=0",
        "--min-worker-port=0",
        "--max-worker-port=0",
        f"--object-store-memory={object_store_bytes}",
        f"--temp-dir={temp_dir}",
        "--no-monitor",  # the autoscaler's: 50 MB and a fixed port, with nothing to scale
        "--log-color=false",
    ]
    if num_cpus is not None:
        command.append(f"--num-cpus={num_cpus}")
    if num_gpus is not None:
        command.append(f"--num-gpus={num_gpus}")
    return command


def _client_environment(token_file: Path) -> dict[str, str]:
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def _head_environment(marker: str, temp_dir: str, token_file: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in _FOREIGN_SETTINGS}
    return {
        **inherited,
        **_client_environment(token_file),
        MARKER_VARIABLE: marker,
        "SPT_NOENV": "1",
        "TMPDIR": temp_dir,  # what killed processes leave there goes with it
        "RAY_START_HOOK": f"{without_ray_client.__module__}.{without_ray_client.__name__}",
        "DASHBOARD_METRIC_PORT": "0",  # fixed otherwise
    }


def _headers(token_file: Path) -> dict[str, str]:
    return {"Authorization": f"Bearer {token_file.read_text()}"}


@contextlib.contextmanager
def _reserved_port() -> Iterator[int]:
    """A loopback port that, while held here, the kernel gives to nobody who doesn't ask for it by number."""
    with socket.socket() as holder:
        # Both sides reuse addresses and this one never listens: then the dashboard can bind it beside us.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def _wait_until_ready(
    process: subprocess.Popen[bytes], record: _Record, data_dir: Path, deadline: float
) -> str:
    """The head's address, once it takes jobs."""
    # Not through a proxy that the environment names.
    with httpx.Client(headers=_headers(data_dir / TOKEN_FILE), trust_env=False, timeout=5) as http:
        while True:
            if process.poll() is not None:
                raise _failed_start(f"`ray start` ended with code {process.returncode}", data_dir)
            address = _read(Path(record.temp_dir, "ray_current_cluster"))
            if address and _takes_jobs(http, record):
                return address
            if time.monotonic() > deadline:
                raise _failed_start("it was not ready in time", data_dir)
            time.sleep(_POLL_INTERVAL)


def _takes_jobs(http: httpx.Client, record: _Record) -> bool:
    [port_file] = Path(record.temp_dir, "session_latest").glob("dashboard_agent_listen_port_*")
    agent_url = f"http://127.0.0.1:{_read(port_file)}"
    try:
        return all(
            http.get(url).is_success
            for url in (f"{record.dashboard_url}/api/jobs/", f"{agent_url}/api/local_raylet_healthz")
        )
    except (httpx.TransportError, httpx.InvalidURL):  # port -1 says that the agent could not listen
        return False


def _failed_start(reason: str, data_dir: Path) -> RayHeadError:
    log = data_dir / LOG_FILE
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES_SHOWN:])
    return RayHeadError(f"Ray head did not start: {reason}. The end of {log}:\n{tail}")


def _end(record: _Record, data_dir: Path) -> int:
    """Kill the head's processes, remove its folder and its record; return how many processes there were."""
    ended = 0
    deadline = time.monotonic() + _KILL_TIMEOUT
    # Again until none is found twice: a process can start another one while it is being looked for, and
    # shows no environment in the moment when it executes a program.
    scans_without = 0
    while scans_without < 2:
        found = list(record.processes())
        scans_without = 0 if found else scans_without + 1
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        while not all(_is_gone(process) for process in found):
            if time.monotonic() > deadline:
                left = ", ".join(str(process.pid) for process in found if not _is_gone(process))
                raise RayHeadError(f"Ray head: processes outlived SIGKILL for {_KILL_TIMEOUT:.0f} s: {left}")
            time.sleep(_POLL_INTERVAL)
        ended += len(found)
        time.sleep(_SCAN_INTERVAL)
    shutil.rmtree(record.temp_dir, ignore_errors=True)
    if (recorded := _Record.load(data_dir)) and recorded.marker == record.marker:
        (data_dir / RECORD_FILE).unlink()
    return ended


def _is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _make_temp_dir() -> str:
    parent = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="coterie-", dir=parent if len(parent) <= _LONGEST_TEMP_PARENT else "/tmp")


def _ensure_token(data_dir: Path) -> Path:
    """The token's file; kept over restarts, so that a browser needs it once."""
    path = data_dir / TOKEN_FILE
    if path.exists():
        path.chmod(0o600)
    else:
        _write_private(path, secrets.token_hex(32))
    return path


def _write_private(path: Path, text: str) -> None:
    """Replace a file whole, readable by its owner only."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # made with mode 0600
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    Path(name).replace(path)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
