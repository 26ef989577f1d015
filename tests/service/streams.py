"""Servers on real ports whose event streams can be followed, and events to follow."""

import json
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import uvicorn
from fastapi import FastAPI
from rich.console import Console
from sqlalchemy import select
from sqlalchemy.orm import Session

from coterie.search.spec import JobSpec
from coterie.search.store import JobState
from coterie.service import serving
from coterie.service.app import create_app
from coterie.service.config import Settings
from coterie.service.storage.database import Database
from coterie.service.storage.events import EventKind, record_event
from coterie.service.storage.tables import DEFAULT_TENANT, EventRow, JobRow
from tests.service.conftest import SPEC, RecordingDispatcher

PATIENCE_SECONDS = 20.0


@dataclass(frozen=True)
class StreamServer:
    """A server in a thread of its own."""

    url: str
    app: FastAPI
    database: Database
    uvicorn: uvicorn.Server

    def follow(self, job_id: str, last: int | None = None, **query: Any) -> "Stream":
        """Open a stream; `close` it, or leave its block."""
        headers = {} if last is None else {"Last-Event-ID": str(last)}
        client = httpx.Client(base_url=self.url, timeout=PATIENCE_SECONDS)
        request = client.build_request("GET", f"/v1/jobs/{job_id}/events", params=query, headers=headers)
        return Stream(client, client.send(request, stream=True))

    def stop(self) -> None:
        """Ask it to end, as a signal does."""
        self.uvicorn.should_exit = True


class Stream:
    """What a client sees of a stream: a strict reader of its own, which knows nothing of ours."""

    def __init__(self, client: httpx.Client, response: httpx.Response) -> None:
        self._client = client
        self.response = response
        self._lines = response.iter_lines()
        self.comments: list[str] = []
        self.last_id: int | None = None

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.response.close()
        self._client.close()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        fields: dict[str, str] = {}
        for line in self._lines:
            name, _, value = line.partition(": ")
            if line.startswith(":"):
                self.comments.append(value)
            elif line:
                assert name in ("id", "event", "data", "retry"), line
                assert name not in fields, line
                fields[name] = value
            else:
                if "id" in fields:
                    self.last_id = int(fields["id"])
                if "data" in fields:
                    event: dict[str, Any] = json.loads(fields["data"])
                    assert event["sequence"] == self.last_id
                    assert event["kind"] == fields["event"]
                    return event
                fields = {}
        raise StopIteration

    def take(self, count: int) -> list[dict[str, Any]]:
        return [next(self) for _ in range(count)]


@contextmanager
def stream_server(data_dir: Path, *, port: int = 0, **given: Any) -> Iterator[StreamServer]:
    settings = Settings(data_dir=data_dir, _env_file=None, **given)
    app = create_app(settings, RecordingDispatcher())
    with (
        socket.socket() as listener,
        patch.object(serving.PLANNER, "start"),  # it would import torch for nothing
    ):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = serving._Server(serving.server_config(app, settings), app, [], Console(quiet=True))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        wait_until(lambda: server.started or not thread.is_alive())
        assert server.started
        database = Database(settings.url)
        try:
            yield StreamServer(url, app, database, server)
        finally:
            server.should_exit = True
            thread.join()
            database.close()


def begin(database: Database, tenant: str = DEFAULT_TENANT) -> str:
    """A job with its first event, without what a submission checks, which takes seconds to import."""
    job_id = f"job_{secrets.token_hex(4)}"
    with database.write() as session:
        session.add(
            JobRow(
                id=job_id,
                name="watched",
                tenant=tenant,
                state=JobState.QUEUED,
                spec=JobSpec.model_validate(SPEC).model_dump(mode="json"),
                directions={},
                priority=0,
                attempt=0,
                created_at=datetime.now(UTC),
            )
        )
    happen(database, job_id, "job", state="queued")
    return job_id


def happen(database: Database, job_id: str, kind: str = "trial", **data: Any) -> None:
    """Record an event, as any writer does."""
    with database.write() as session:
        record_event(session, _locked(session, job_id), EventKind(kind), data, datetime.now(UTC))


def end(database: Database, job_id: str) -> None:
    with database.write() as session:
        row = _locked(session, job_id)
        row.state = JobState.CANCELLED
        record_event(session, row, EventKind.JOB, {"state": row.state}, datetime.now(UTC))


def _locked(session: Session, job_id: str) -> JobRow:
    return session.scalars(select(JobRow).where(JobRow.id == job_id).with_for_update()).one()


def recorded(database: Database, job_id: str) -> list[tuple[int, str, dict[str, Any]]]:
    """What SQL says happened."""
    with database.read() as session:
        rows = session.scalars(select(EventRow).filter_by(job_id=job_id).order_by(EventRow.sequence)).all()
    found = [(row.sequence, row.kind, row.data) for row in rows]
    assert [sequence for sequence, *_ in found] == list(range(1, len(found) + 1))
    return found


def told(events: list[dict[str, Any]]) -> list[tuple[int, str, dict[str, Any]]]:
    """What a client was told, to compare with `recorded`."""
    return [(event["sequence"], event["kind"], event["data"]) for event in events]


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
