"""A real server under real faults: processes killed or stopped, and SQL looked at afterwards."""

import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import pytest

from coterie.service.ray_head import MARKER_VARIABLE, RECORD_FILE, end_leftovers

POLL_SECONDS = 0.05


class Server:
    """`coterie serve` as a subprocess on a data folder; may be killed and started again.

    Args:
        data_dir: Its data folder.
        database_url: Of a PostgreSQL; without it SQLite in the data folder.
        environment: Further variables.
    """

    def __init__(self, data_dir: Path, database_url: str | None = None, **environment: str) -> None:
        self.data_dir = data_dir
        self._postgres = None if database_url is None else database_url.replace("+psycopg", "")
        self._environment = environment
        if database_url is not None:
            self._environment |= {"COTERIE_DATABASE_URL": database_url}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = ["serve", f"--port={self.port}", f"--data-dir={self.data_dir}"]
        with (self.data_dir.parent / "serve.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "coterie.service.cli", *command],
                env=os.environ | self._environment,
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        """End the server as a crash would; its Ray and the jobs' drivers live on."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(30)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()
        end_leftovers(self.data_dir)
        self.http.close()

    def submit(self, spec: dict[str, Any]) -> str:
        self.wait_for(lambda: self.get("/healthz"))
        answer = self.http.post("/v1/jobs", json=spec)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def get(self, path: str, **query: Any) -> Any:
        """The JSON answer, or None where the server does not listen."""
        with suppress(httpx.TransportError):
            return self.http.get(path, params=query).json()

    def trials(self, job: str) -> list[dict[str, Any]]:
        answer = self.get(f"/v1/jobs/{job}/trials", limit=1000)
        return [] if answer is None else list(answer["items"])

    def measurements(self, trial: str) -> list[dict[str, Any]]:
        return list(self.get(f"/v1/trials/{trial}/measurements", limit=1000)["items"])

    def ended(self, job: str) -> list[dict[str, Any]]:
        return [trial for trial in self.trials(job) if trial["ended_at"] is not None]

    def sql(self, query: str, *values: object) -> list[Any]:
        """What the database itself says; `?` stands for a value."""
        return self._select(query, values)[1]

    def rows(self, query: str, *values: object) -> list[dict[str, Any]]:
        """The same by column, with its JSON read."""
        columns, rows = self._select(query, values)
        return [{name: _read(value) for name, value in zip(columns, row, strict=True)} for row in rows]

    def _select(self, query: str, values: tuple[object, ...]) -> tuple[list[str], list[Any]]:
        if self._postgres is None:
            with closing(sqlite3.connect(self.data_dir / "coterie.db", timeout=30)) as database:
                found = database.execute(query, values)
                return [column[0] for column in found.description], found.fetchall()
        with closing(psycopg.connect(self._postgres)) as postgres:
            answer = postgres.execute(query.replace("?", "%s").encode(), values)
            return [column.name for column in answer.description or ()], answer.fetchall()

    def ray_marker(self) -> str | None:
        """What the processes of its Ray head have in their environments; None while there is no head."""
        record = self.data_dir / RECORD_FILE
        with suppress(FileNotFoundError):
            return str(json.loads(record.read_text())["marker"])
        return None

    def ray_processes(self) -> list[psutil.Process]:
        marker, found = self.ray_marker(), []
        for process in psutil.process_iter() if marker is not None else ():
            with suppress(psutil.Error):  # it has ended, or is another user's
                if process.environ().get(MARKER_VARIABLE) == marker:
                    found.append(process)
        return found

    def running_trial(self, job: str) -> dict[str, Any] | None:
        """A trial in the middle of its training, with the process that trains it."""
        epochs = self.get(f"/v1/jobs/{job}")["spec"]["budget"]["epochs"]
        for trial in self.trials(job):
            if trial["state"] == "running" and trial["worker"] and 0 < trial["epochs"] < epochs - 2:
                return dict(trial)
        return None

    def wait_for(self, holds: Callable[[], Any], seconds: float = 90) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := holds():
                return found
            time.sleep(POLL_SECONDS)
        raise AssertionError(f"not within {seconds} s; the log ends with: {self.log()[-3000:]}")

    def wait_until_over(self, job: str, seconds: float = 120) -> dict[str, Any]:
        def over() -> Any:
            found = self.get(f"/v1/jobs/{job}")
            return found if found and found["ended_at"] else None

        return dict(self.wait_for(over, seconds))

    def log(self) -> str:
        parts = [self.data_dir.parent / "serve.log", *self.data_dir.glob("jobs/*/worker.log")]
        return "\n".join(part.read_text() for part in parts if part.exists())


def alive(worker: str) -> bool:
    """Whether a process `host:pid` runs; one that has ended may wait for whoever adopted it to notice."""
    try:
        return psutil.Process(int(worker.rsplit(":", 1)[1])).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _read(value: Any) -> Any:
    """SQLite gives JSON as text: objects and arrays."""
    return json.loads(value) if isinstance(value, str) and value[:1] in ("{", "[") else value


@contextmanager
def serving(folder: Path, database_url: str | None = None, **environment: str) -> Iterator[Server]:
    """A server on an empty data folder: `data` in `folder`, which may exist."""
    data_dir = folder / "data"
    data_dir.mkdir(exist_ok=True)
    running = Server(data_dir, database_url, **environment)
    running.start()
    try:
        yield running
    finally:
        running.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path) as running:
        yield running
