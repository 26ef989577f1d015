"""A server without Ray: real database, real files, and a dispatcher that only notes what it is asked."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from fastapi import FastAPI
from sqlalchemy import select

from coterie.search.store import (
    Candidate,
    Confirmation,
    Ending,
    FolderArtifacts,
    FrontUpdate,
    Measurement,
    Role,
    StoredFile,
    Trial,
    TrialState,
)
from coterie.service.app import create_app
from coterie.service.config import Settings
from coterie.service.storage import migrate
from coterie.service.storage.database import Database
from coterie.service.storage.repositories import JobRepository
from coterie.service.storage.store import SqlTrialStore
from coterie.service.storage.tables import TrialRow

SPEC: dict[str, Any] = {"name": "digits", "dataset": {"source": "digits"}, "budget": {"trials": 4}}
LEASE = timedelta(seconds=30)


class RecordingDispatcher:
    """Runs nothing."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.state = (True, "Ray takes jobs")
        self.dashboard_url: str | None = "http://127.0.0.1:8265"
        self.node_resources = (4.0, 1.0)

    def start(self) -> None:
        self.calls.append("start")

    def stop(self) -> None:
        self.calls.append("stop")

    def ready(self) -> tuple[bool, str]:
        return self.state

    def stop_job(self, job_id: str) -> None:
        self.calls.append(f"stop {job_id}")


class AppTransport(httpx.BaseTransport):
    """Calls an ASGI app that runs in a portal's event loop."""

    def __init__(self, app: FastAPI, portal: BlockingPortal) -> None:
        self._asgi = httpx.ASGITransport(app, raise_app_exceptions=False)
        self._portal = portal

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        async def respond() -> httpx.Response:
            response = await self._asgi.handle_async_request(request)
            body = b"".join([chunk async for chunk in response.aiter_raw()])  # compressed, if it is
            return httpx.Response(response.status_code, headers=response.headers, content=body)

        return self._portal.call(respond)


class Server:
    """An app whose lifespan is open, with its parts."""

    def __init__(self, settings: Settings, dispatcher: RecordingDispatcher, client: httpx.Client) -> None:
        self.settings = settings
        self.dispatcher = dispatcher
        self.client = client
        self.database = Database(settings.url)
        self.break_connections: Callable[[], object] = self.database.engine.dispose  # those of the app

    def submit(self, **fields: Any) -> str:
        answer = self.client.post("/v1/jobs", json={**SPEC, **fields})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def claim(self) -> SqlTrialStore:
        """Begin an attempt at the next queued job, as the dispatcher and its driver do."""
        now = datetime.now(UTC)
        with self.database.write() as session:
            jobs = JobRepository(session)
            claimed = jobs.claim_next(now, LEASE)
            assert claimed is not None
            jobs.set_submission(claimed.job_id, claimed.attempt, f"{claimed.job_id}-{claimed.attempt}")
            jobs.set_driver(claimed.job_id, claimed.attempt, "host:1", now)
        return SqlTrialStore(self.database, claimed.job_id, claimed.attempt)

    def write_file(self, trial_id: str, name: str, content: bytes) -> None:
        """Put this in the place of a trial's file, as if the trial had written it."""
        [file] = self.settings.data_dir.glob(f"jobs/*/**/{trial_id}/{name}")
        file.write_bytes(content)
        with self.database.write() as session:
            row = session.scalars(select(TrialRow).where(TrialRow.id == trial_id)).one()
            row.files = {**row.files, name: {**row.files[name], "size": len(content)}}


def trial(number: int, family: str = "shared") -> Trial:
    return Trial(
        id=f"trial_{number}",
        number=number,
        candidate=Candidate(family=family, backbone="mlp", parameters={"lr": 0.005}),
        choices={"lr": 0.005},
        seed=number + 7,
        origin="tpe",
    )


def complete(
    store: SqlTrialStore,
    number: int,
    delta_m: float,
    macs: float,
    update: FrontUpdate,
    *,
    artifacts: FolderArtifacts | None = None,
    family: str = "shared",
) -> None:
    """Run a trial from its start to its completion."""
    store.add_trial(trial(number, family))
    name = f"trial_{number}"
    for epoch in (1, 2):
        store.measure(
            name,
            Measurement(
                epoch=epoch,
                values={"total_error": 1 / epoch},
                tasks={"left_parity": {"error": 1 / epoch}},
                device_seconds=float(epoch),
                worker="host:2",
            ),
        )
    files = {}
    if artifacts is not None:
        (artifacts.trial_folder(name) / "weights.safetensors").write_bytes(b"weights")
        (artifacts.trial_folder(name) / "architecture.json").write_text('{"family": "shared"}')
        files = {
            "weights.safetensors": StoredFile(size=7, sha256="ab" * 32),
            "architecture.json": StoredFile(size=20, sha256="cd" * 32),
        }
    store.end_trial(
        name,
        Ending(
            state=TrialState.COMPLETED,
            values={"delta_m": delta_m, "macs": macs, "params": macs / 2, "latency_ms": None},
            test={"delta_m": delta_m - 1},
            tasks={"left_parity": {"validation": {"error": 0.25}, "test": {"error": 0.5}}},
            grouping=[["left_parity"]],
            epochs=2,
            device_seconds=2.0,
            files=files,
        ),
        update,
    )


def confirm(store: SqlTrialStore, trial_id: str, role: Role, delta_m: float, macs: float, seed: int) -> None:
    """Record a confirming run that completed; on the test split it reached 1 less."""
    store.add_confirmation(
        Confirmation(
            trial_id=trial_id,
            role=role,
            candidate=Candidate(family="shared", backbone="mlp", parameters={"lr": 0.005}),
            seed=seed,
            ending=Ending(
                state=TrialState.COMPLETED,
                values={"delta_m": delta_m, "macs": macs},
                test={"delta_m": delta_m - 1, "macs": macs},
                epochs=2,
                device_seconds=1.0,
            ),
        )
    )


def on_front(hypervolume: float, size: int, *displaced: str) -> FrontUpdate:
    return FrontUpdate(on_front=True, displaced=displaced, hypervolume=hypervolume, size=size)


def dominated(hypervolume: float, size: int) -> FrontUpdate:
    return FrontUpdate(on_front=False, displaced=(), hypervolume=hypervolume, size=size)


@contextmanager
def open_server(data_dir: Path, **settings: Any) -> Iterator[Server]:
    chosen = Settings(data_dir=data_dir, _env_file=None, **settings)
    dispatcher = RecordingDispatcher()
    app = create_app(chosen, dispatcher)
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(app.router.lifespan_context(app)),
        httpx.Client(transport=AppTransport(app, portal), base_url="http://127.0.0.1") as client,
    ):
        server = Server(chosen, dispatcher, client)
        server.break_connections = app.state.context.database.engine.dispose
        yield server
        server.database.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with open_server(tmp_path / "data") as server:
        yield server


@pytest.fixture
def client(server: Server) -> httpx.Client:
    return server.client


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    url = f"sqlite:///{tmp_path / 'coterie.db'}"
    migrate.prepare(url)
    database = Database(url)
    yield database
    database.close()


@pytest.fixture
def searched(server: Server) -> tuple[Server, str]:
    """A running job with three completed trials, two of them on the front, and one that runs."""
    job_id = server.submit()
    store = server.claim()
    store.set_reference_point({"delta_m": -10.0, "macs": 1000.0})
    artifacts = FolderArtifacts(server.settings.artifacts_of(job_id))
    # Hypervolume: (delta_m + 10) x (1000 - macs), what both cover counted once.
    complete(store, 0, 5.0, 500.0, on_front(7500.0, 1), artifacts=artifacts)
    complete(store, 1, 2.0, 600.0, dominated(7500.0, 1))
    complete(store, 2, 0.0, 100.0, on_front(11500.0, 2), family="dmtg")
    store.add_trial(trial(3))
    store.start_trial("trial_3")
    return server, job_id


Problem = Callable[..., dict[str, Any]]


@pytest.fixture
def problem() -> Problem:
    """Checks that an answer is a problem document of this status, and gives it."""

    def check(answer: httpx.Response, status: int, pointer: str | None = None) -> dict[str, Any]:
        assert answer.status_code == status, answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        document: dict[str, Any] = answer.json()
        assert document["status"] == status
        assert document["type"].startswith("urn:coterie:problem:")
        assert document["title"]
        assert document["detail"]
        assert document["instance"] == answer.request.url.path
        assert document["request_id"] == answer.headers["x-request-id"]
        if pointer is not None:
            assert pointer in [fault["pointer"] for fault in document["errors"]], document
        return document

    return check
