"""Event streams: what happened and what happens, to everyone, once."""

import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from coterie.service import hub
from coterie.service.protocol import Protocol
from coterie.service.routes import events as events_route
from coterie.service.storage import changes, migrate
from coterie.service.storage.database import Database
from tests.service.conftest import Problem
from tests.service.streams import (
    StreamServer,
    begin,
    end,
    happen,
    recorded,
    stream_server,
    told,
    wait_until,
)

KINDS = ("trial", "measurement", "front", "job")


@pytest.fixture(params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StreamServer]:
    """A server on each kind of database in turn."""
    if request.param == "sqlite":
        with stream_server(tmp_path / "data") as server:
            yield server
    else:
        yield request.getfixturevalue("postgres_server")


@pytest.fixture
def postgres_url(postgres_database: Database) -> str:
    return postgres_database.engine.url.render_as_string(hide_password=False)


@pytest.fixture
def postgres_server(postgres_url: str, tmp_path: Path) -> Iterator[StreamServer]:
    with stream_server(tmp_path / "data", database_url=postgres_url) as server:
        yield server


@pytest.fixture
def sqlite_server(tmp_path: Path) -> Iterator[StreamServer]:
    with stream_server(tmp_path / "data") as server:
        yield server


def test_a_stream_tells_what_happened_then_what_happens_and_ends_with_the_job(server: StreamServer) -> None:
    job_id = begin(server.database)
    happen(server.database, job_id, "trial", number=0, text="lines\r\nand\u2028more: ünïcode")
    before = len(recorded(server.database, job_id))
    with server.follow(job_id) as stream:
        assert stream.response.headers["content-type"].startswith("text/event-stream")
        assert stream.response.headers["cache-control"] == "no-store"
        events = stream.take(before)
        happen(server.database, job_id, "measurement", epoch=1)
        events.append(next(stream))
        end(server.database, job_id)
        events += list(stream)
    assert told(events) == recorded(server.database, job_id)
    assert {event["job_id"] for event in events} == {job_id}
    assert (events[-1]["kind"], events[-1]["data"]["state"]) == ("job", "cancelled")


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_lost_or_doubled_wherever_a_client_breaks_off(server: StreamServer, seed: int) -> None:
    draw = random.Random(seed)
    job_id = begin(server.database)
    events: list[dict[str, Any]] = []

    def write() -> None:
        for number in range(60):
            happen(server.database, job_id, draw.choice(KINDS), number=number)
            time.sleep(draw.choice((0, 0, 0.01)))
        end(server.database, job_id)

    writer = threading.Thread(target=write)
    writer.start()
    reads = random.Random(seed + 1000)
    while True:
        with server.follow(job_id, last=events[-1]["sequence"] if events else None) as stream:
            if stream.response.status_code == 204:
                break
            for event in stream:
                events.append(event)
                if reads.random() < 0.15:
                    break
    writer.join()
    assert told(events) == recorded(server.database, job_id)


def test_a_client_may_come_back_after_every_event(sqlite_server: StreamServer) -> None:
    server = sqlite_server
    job_id = begin(server.database)
    for number in range(8):
        happen(server.database, job_id, KINDS[number % 4], number=number)
    end(server.database, job_id)
    events = recorded(server.database, job_id)
    for last in range(len(events)):
        with server.follow(job_id, last=last) as stream:
            assert told(list(stream)) == events[last:]
    with server.follow(job_id, last=len(events)) as stream:
        assert (stream.response.status_code, stream.response.read()) == (204, b"")


def test_a_client_that_falls_behind_memory_reads_on_from_sql(
    server: StreamServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "BUFFER_BYTES", 2000)
    monkeypatch.setattr(hub, "PAGE_EVENTS", 7)
    job_id = begin(server.database)
    with server.follow(job_id) as slow, server.follow(job_id) as quick:
        next(slow)
        next(quick)
        for number in range(100):
            happen(server.database, job_id, "measurement", number=number, padding="x" * 300)
        end(server.database, job_id)
        expected = recorded(server.database, job_id)[1:]
        assert told(list(quick)) == expected
        assert told(list(slow)) == expected


def test_a_stream_may_be_of_some_kinds_and_its_client_learns_how_far_it_is(server: StreamServer) -> None:
    job_id = begin(server.database)
    with server.follow(job_id, kinds=["front", "job"]) as stream:
        next(stream)
        happen(server.database, job_id, "front", size=1)
        happen(server.database, job_id, "measurement", epoch=1)
        assert next(stream)["data"] == {"size": 1}
        happen(server.database, job_id, "front", size=2)
        assert next(stream)["data"] == {"size": 2}
    end(server.database, job_id)
    with server.follow(job_id, last=stream.last_id, kinds="measurement") as stream:
        assert list(stream) == []
    assert stream.last_id == len(recorded(server.database, job_id))
    with server.follow(job_id, last=stream.last_id, kinds="measurement") as stream:
        assert stream.response.status_code == 204


def test_a_stream_ends_when_it_was_asked_to(server: StreamServer) -> None:
    job_id = begin(server.database)
    began = time.monotonic()
    with server.follow(job_id, timeout_seconds=0.5) as stream:
        assert [event["sequence"] for event in stream] == [1]
    assert 0.5 <= time.monotonic() - began < 5


def test_a_client_need_not_wait_at_all(server: StreamServer) -> None:
    job_id = begin(server.database)
    happen(server.database, job_id, "trial", number=0)
    with server.follow(job_id, timeout_seconds=0) as stream:
        assert told(list(stream)) == recorded(server.database, job_id)
    with server.follow(job_id, last=2, timeout_seconds=0) as stream:
        assert list(stream) == []


def test_a_client_that_does_not_wait_gets_a_page_whoever_else_watches(server: StreamServer) -> None:
    job_id = begin(server.database)
    with server.follow(job_id) as watching:
        for number in range(2 * hub.PAGE_EVENTS):
            happen(server.database, job_id, "trial", number=number)
        with server.follow(job_id, timeout_seconds=0) as at_once:
            assert [event["sequence"] for event in at_once] == list(range(1, hub.PAGE_EVENTS + 1))
        for sequence in range(1, 2 * hub.PAGE_EVENTS + 2):
            assert next(watching)["sequence"] == sequence
        with server.follow(job_id, timeout_seconds=0) as at_once:
            assert len(list(at_once)) == hub.PAGE_EVENTS


def test_a_token_has_room_for_others_in_its_streams(tmp_path: Path, problem: Problem) -> None:
    with stream_server(tmp_path / "data", max_connections=6) as server:
        job_id = begin(server.database)
        answer = httpx.post(f"{server.url}/v1/tokens", json={"role": "admin"})
        headers = {"Authorization": f"Bearer {answer.json()['token']}"}
        url = f"{server.url}/v1/jobs/{job_id}/events"

        def refused() -> httpx.Response:
            return httpx.get(url, params={"timeout_seconds": 0}, headers=headers)

        with ExitStack() as streams:
            for _ in range(3):
                stream = streams.enter_context(httpx.stream("GET", url, headers=headers))
                assert stream.status_code == 200
            wait_until(lambda: refused().status_code == 429)
            assert "3 open event streams" in problem(refused(), 429)["detail"]
        wait_until(lambda: refused().status_code == 200)


def test_the_header_wins_over_the_query(sqlite_server: StreamServer) -> None:
    job_id = begin(sqlite_server.database)
    happen(sqlite_server.database, job_id)
    happen(sqlite_server.database, job_id)
    with sqlite_server.follow(job_id, after=2) as stream:
        assert next(stream)["sequence"] == 3
    with sqlite_server.follow(job_id, last=1, after=2) as stream:
        assert next(stream)["sequence"] == 2


@pytest.mark.parametrize(
    ("query", "headers", "pointer"),
    [
        ("", {"Last-Event-ID": "x"}, "/header/Last-Event-ID"),
        ("", {"Last-Event-ID": "-1"}, "/header/Last-Event-ID"),
        ("", {"Last-Event-ID": "+1"}, "/header/Last-Event-ID"),
        ("", {"Last-Event-ID": "9" * 30}, "/header/Last-Event-ID"),
        ("", {"Last-Event-ID": "99"}, "/header/Last-Event-ID"),
        ("?after=99", {}, "/query/after"),
        ("?after=-1", {}, "/query/after"),
        ("?after=1e3", {}, "/query/after"),
        ("?kinds=colour", {}, "/query/kinds/0"),
        ("?timeout_seconds=-1", {}, "/query/timeout_seconds"),
        ("?timeout_seconds=nan", {}, "/query/timeout_seconds"),
        ("?colour=red", {}, "/query/colour"),
    ],
)
def test_a_bad_place_to_begin_is_refused(
    server_and_job: tuple[StreamServer, str],
    problem: Problem,
    query: str,
    headers: dict[str, str],
    pointer: str,
) -> None:
    server, job_id = server_and_job
    problem(httpx.get(f"{server.url}/v1/jobs/{job_id}/events{query}", headers=headers), 400, pointer)


@pytest.fixture(scope="module")
def server_and_job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StreamServer, str]]:
    with stream_server(tmp_path_factory.mktemp("data")) as server:
        yield server, begin(server.database)


def test_there_are_no_events_of_what_is_no_job(
    server_and_job: tuple[StreamServer, str], problem: Problem
) -> None:
    problem(httpx.get(f"{server_and_job[0].url}/v1/jobs/job_0/events"), 404)


def test_a_silent_stream_has_a_heartbeat(
    sqlite_server: StreamServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_route, "HEARTBEAT_SECONDS", 0.1)
    job_id = begin(sqlite_server.database)
    with sqlite_server.follow(job_id, timeout_seconds=0.6) as stream:
        assert len(list(stream)) == 1
    assert len(stream.comments) >= 2
    assert set(stream.comments) == {"heartbeat"}


def test_nobody_is_left_behind_when_clients_go(server: StreamServer) -> None:
    job_id = begin(server.database)
    topics = server.app.state.context.hub._topics
    with ExitStack() as stack:
        for _ in range(5):
            next(stack.enter_context(server.follow(job_id)))
        assert topics[job_id].streams == 5
    wait_until(lambda: not topics)


@pytest.fixture
def quick_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "RECHECK_SECONDS", 0.2)


def test_a_client_that_reads_nothing_is_let_go(
    sqlite_server: StreamServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Protocol, "stall_seconds", 0.3)
    job_id = begin(sqlite_server.database)
    topics = sqlite_server.app.state.context.hub._topics
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, _, port = sqlite_server.url.removeprefix("http://").partition(":")
        client.connect((host, int(port)))
        client.sendall(f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        wait_until(lambda: topics)
        for number in range(100):
            happen(sqlite_server.database, job_id, "trial", number=number, padding="x" * 100_000)
        wait_until(lambda: not topics)
    assert caplog.text == ""


def test_the_stream_of_a_deleted_job_ends(quick_look: None, server: StreamServer) -> None:
    job_id = begin(server.database)
    with server.follow(job_id) as stream:
        next(stream)
        with server.database.write() as session:
            session.execute(text("DELETE FROM jobs"))
        assert list(stream) == []


def test_streams_end_at_once_when_the_server_does(tmp_path: Path) -> None:
    with stream_server(tmp_path / "data") as server, ExitStack() as stack:
        job_id = begin(server.database)
        streams = [stack.enter_context(server.follow(job_id)) for _ in range(3)]
        for stream in streams:
            next(stream)
        began = time.monotonic()
        server.stop()
        assert [list(stream) for stream in streams] == [[], [], []]
        assert time.monotonic() - began < 2


def test_two_servers_tell_the_same(postgres_url: str, tmp_path: Path) -> None:
    with (
        stream_server(tmp_path / "a", database_url=postgres_url) as first,
        stream_server(tmp_path / "b", database_url=postgres_url) as second,
    ):
        job_id = begin(first.database)
        with first.follow(job_id) as here, second.follow(job_id) as there:
            for number in range(20):
                happen(first.database, job_id, "trial", number=number)
            events = here.take(10)
            seen = there.take(10)
            first.stop()
            assert told(seen) == told(events)
            end(second.database, job_id)
            events += list(here)
            seen += list(there)
        with second.follow(job_id, last=events[-1]["sequence"]) as there:  # where the first one broke off
            events += [] if there.response.status_code == 204 else list(there)
        assert told(events) == told(seen) == recorded(second.database, job_id)


def end_listeners(database: Database) -> list[bool]:
    with database.write() as session:
        ended = text(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND query LIKE 'LISTEN%'"
        )
        return list(session.scalars(ended))


def test_a_broken_connection_to_postgresql_hides_nothing(
    postgres_server: StreamServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "RECHECK_SECONDS", 1000)  # so that the new connection alone can tell
    server = postgres_server
    job_id = begin(server.database)
    with server.follow(job_id) as stream:
        next(stream)
        for number in range(3):
            wait_until(lambda: end_listeners(server.database) == [True])  # it may be connecting again
            happen(server.database, job_id, "trial", number=number)
            assert next(stream)["data"] == {"number": number}
        end(server.database, job_id)
        list(stream)


def test_a_database_that_goes_away_breaks_no_stream(
    postgres: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_route, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(hub, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(changes, "LAST_RETRY_SECONDS", 0.3)
    url = make_url(postgres())
    migrate.prepare(url.render_as_string(hide_password=False))
    admin = create_engine(url.set(database="postgres"), isolation_level="AUTOCOMMIT")

    def connections(allowed: bool) -> None:
        with admin.connect() as connection:
            connection.execute(text(f"ALTER DATABASE {url.database} ALLOW_CONNECTIONS {allowed}"))
            if not allowed:
                connection.execute(
                    text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"),
                    {"name": url.database},
                )

    with stream_server(tmp_path / "data", database_url=url.render_as_string(hide_password=False)) as server:
        job_id = begin(server.database)
        with server.follow(job_id) as stream:
            next(stream)
            connections(False)
            time.sleep(1.5)
            connections(True)
            happen(server.database, job_id, "trial", number=1)
            assert next(stream)["data"] == {"number": 1}
            assert len(stream.comments) > 5
    admin.dispose()


def test_what_another_process_writes_into_sqlite_is_told(sqlite_server: StreamServer) -> None:
    job_id = begin(sqlite_server.database)
    file = make_url(str(sqlite_server.database.engine.url)).database
    script = (
        "import sqlite3, sys\n"
        "c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "for n in (2, 3):\n"
        "    c.execute('BEGIN IMMEDIATE')\n"
        "    c.execute('UPDATE jobs SET last_event = ?', (n,))\n"
        "    c.execute('INSERT INTO events VALUES (?, ?, ?, ?, ?)', "
        "(sys.argv[2], n, 'trial', '{\"number\": %d}' % n, '2026-11-25 00:00:00.000000'))\n"
        "    c.execute('COMMIT')\n"
    )
    with sqlite_server.follow(job_id) as stream:
        next(stream)
        subprocess.run([sys.executable, "-c", script, str(file), job_id], check=True)
        assert [event["data"] for event in stream.take(2)] == [{"number": 2}, {"number": 3}]
