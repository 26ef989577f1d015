"""Following a job from Python and from the command line, whatever servers do meanwhile."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coterie.service import access, client, gate, hub
from coterie.service.auth import Role
from coterie.service.client import ApiError, Client, Job, Unreachable
from coterie.service.storage.database import Database
from tests.service.streams import (
    PATIENCE_SECONDS,
    StreamServer,
    begin,
    end,
    happen,
    recorded,
    stream_server,
    told,
    wait_until,
)

COTERIE = [sys.executable, "-m", "coterie.service.cli"]


class Follower:
    """A client that follows a job in a thread of its own."""

    def __init__(self, url: str, job_id: str, token: str | None = None) -> None:
        self.events: list[dict[str, Any]] = []
        self.error: Exception | None = None
        self._client = Client(url, token=token)
        self._job_id = job_id
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            for event in Job(self._client, {"id": self._job_id}).events():
                self.events.append(event)
        except (ApiError, Unreachable) as error:
            self.error = error

    def wait(self, count: int) -> None:
        wait_until(lambda: len(self.events) >= count)

    def join(self) -> list[dict[str, Any]]:
        self._thread.join(PATIENCE_SECONDS)
        assert not self._thread.is_alive()
        self._client.close()
        return self.events


@pytest.fixture(autouse=True)
def quick_return(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LAST_PAUSE_SECONDS", 0.2)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StreamServer]:
    with stream_server(tmp_path / "data") as server:
        yield server


def test_a_job_is_followed_to_its_end(server: StreamServer) -> None:
    job_id = begin(server.database)
    follower = Follower(server.url, job_id)
    for number in range(5):
        happen(server.database, job_id, "trial", number=number, text="a\u2028b\u0085c")
    end(server.database, job_id)
    assert told(follower.join()) == recorded(server.database, job_id)


def test_a_job_is_followed_from_where_one_was(server: StreamServer) -> None:
    job_id = begin(server.database)
    happen(server.database, job_id, "trial", number=0)
    end(server.database, job_id)
    with Client(server.url) as client:
        job = Job(client, {"id": job_id})
        assert [event["sequence"] for event in job.events(after=2)] == [3]
        assert list(job.events(after=3)) == []
        with pytest.raises(ApiError, match="newest event"):
            next(job.events(after=4))


def test_a_server_that_restarts_is_waited_for(tmp_path: Path) -> None:
    with stream_server(tmp_path / "data") as server:
        port = int(server.url.rpartition(":")[2])
        job_id = begin(server.database)
        follower = Follower(server.url, job_id)
        follower.wait(1)
    database = Database(f"sqlite:///{tmp_path / 'data' / 'coterie.db'}")
    happen(database, job_id, "trial", number=0)
    time.sleep(0.5)  # the client knocks meanwhile
    with stream_server(tmp_path / "data", port=port) as server:
        follower.wait(2)
        happen(database, job_id, "trial", number=1)
        end(database, job_id)
        assert told(follower.join()) == recorded(database, job_id)
    database.close()


def test_a_server_that_was_never_there_is_not_waited_for() -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(Unreachable):
        next(Job(client, {"id": "job_0"}).events())


def test_a_token_that_is_revoked_ends_the_stream(
    server: StreamServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "CACHE_SECONDS", 0.05)
    monkeypatch.setattr(hub, "HEARTBEAT_SECONDS", 0.1)
    made = access.create_token(
        server.database, access.operator("default"), role=Role.READER, name="", expires_at=None
    )
    job_id = begin(server.database)
    follower = Follower(server.url, job_id, made.token)
    follower.wait(1)
    time.sleep(0.3)
    happen(server.database, job_id, "trial", number=0)
    follower.wait(2)
    access.revoke_token(server.database, None, made.id)
    follower.join()
    assert isinstance(follower.error, ApiError)
    assert follower.error.status == 401


def test_the_command_line_prints_a_line_an_event(server: StreamServer) -> None:
    job_id = begin(server.database)
    happen(server.database, job_id, "trial", number=3, state="failed", reason="two\nlines\x1b[31m")
    happen(server.database, job_id, "measurement", epoch=1, values={"total_error": 0.25, "macs": None})
    end(server.database, job_id)
    lines = _coterie(server, "events", job_id).splitlines()
    assert len(lines) == 4
    assert lines[1].split() == [
        *("2", recorded_at(server, job_id), "trial"),
        *("number", "3,", "state", "failed,", "reason", "two", "lines", "[31m"),
    ]
    assert "total_error 0.25" in lines[2]
    documents = [json.loads(line) for line in _coterie(server, "events", job_id, "--json").splitlines()]
    assert told(documents) == recorded(server.database, job_id)
    assert len(_coterie(server, "events", job_id, "--after", "3").splitlines()) == 1


def test_the_command_line_keeps_webhooks(tmp_path: Path) -> None:
    with stream_server(tmp_path / "data", webhook_allow_private=True) as server:
        made = json.loads(
            _coterie(server, "webhook", "create", "http://127.0.0.1:9/", "--kind", "job", "--json")
        )
        assert made["secret"].startswith("whsec_")
        assert made["kinds"] == ["job"]
        other = _coterie(server, "webhook", "create", "http://127.0.0.1:9/").strip()
        assert other.startswith("whsec_")
        assert made["id"] in _coterie(server, "webhook", "list")
        begin(server.database)
        [item] = json.loads(_coterie(server, "webhook", "deliveries", made["id"], "--json"))
        assert item["id"] in _coterie(server, "webhook", "deliveries", made["id"])
        assert "on its way" in _coterie(server, "webhook", "retry", made["id"], item["id"])
        _coterie(server, "webhook", "delete", made["id"])
        [left] = json.loads(_coterie(server, "webhook", "list", "--json"))
        assert left["kinds"] == ["job", "trial", "front"]


def recorded_at(server: StreamServer, job_id: str) -> str:
    with Client(server.url) as client:
        events = list(Job(client, {"id": job_id}).events())
    return str(events[1]["at"][:19])


@pytest.mark.slow
def test_a_server_that_is_killed_loses_nothing_to_a_client_that_goes_on_at_another(
    postgres_database: Database, tmp_path: Path
) -> None:
    url = postgres_database.engine.url.render_as_string(hide_password=False)
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from tests.service.streams import stream_server\n"
        "with stream_server(Path(sys.argv[1]), database_url=sys.argv[2]) as server:\n"
        "    print(server.url, flush=True)\n"
        "    time.sleep(600)\n"
    )
    servers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / name), url], stdout=subprocess.PIPE, text=True
        )
        for name in "ab"
    ]
    try:
        job_id = begin(postgres_database)
        urls = [server.stdout.readline().strip() for server in servers if server.stdout]
        stop = threading.Event()

        def write() -> None:
            while not stop.is_set():
                happen(postgres_database, job_id, "trial", at=time.time())
            end(postgres_database, job_id)

        writer = threading.Thread(target=write)
        writer.start()
        first = Follower(urls[0], job_id)
        first.wait(100)
        servers[0].send_signal(signal.SIGKILL)
        time.sleep(0.5)
        stop.set()
        writer.join()
        with Client(urls[1]) as client:
            rest = list(Job(client, {"id": job_id}).events(after=first.events[-1]["sequence"]))
        assert told([*first.events, *rest]) == recorded(postgres_database, job_id)
    finally:
        for server in servers:
            server.kill()
            server.communicate()


def _coterie(server: StreamServer, *arguments: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COTERIE_")}
    done = subprocess.run(
        [*COTERIE, *arguments],
        capture_output=True,
        text=True,
        env={**kept, "COTERIE_SERVER": server.url, "NO_COLOR": "1"},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
