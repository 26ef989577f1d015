"""Running a server on this machine: one a data folder, on a port that is its own before anything starts."""

import asyncio
import fcntl
import gc
import ipaddress
import json
import logging
import os
import resource
import shlex
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from errno import EADDRINUSE
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI
from rich.console import Console

from coterie.service import VERSION
from coterie.service.config import Settings
from coterie.service.planner import PLANNER
from coterie.service.ray_head import TOKEN_FILE
from coterie.service.request_id import RequestIdFilter

if TYPE_CHECKING:
    from coterie.service.storage.database import Database

LOCK_FILE = "lock"
BACKLOG = 128
FREE_CONNECTIONS_SECONDS = 5  # for answers under way when the server is told to stop
DASHBOARD_POLL_SECONDS = 0.2
_ADVICE = "Ctrl-C stops it; jobs that run go on when it is started again."
OTHER_FILES = 500  # besides those of connections: the database's, those that are sent, Ray's pipes


class CannotServe(Exception):
    """The server can't start; says why, and what to do."""


def serve(settings: Settings, console: Console) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP, then end what was started.

    Raises:
        CannotServe: If the data folder or the port is not to be had, or the server fails as it starts.
    """
    with locked(settings.data_dir) as lock, _listening(settings.host, settings.port) as listener:
        url = _url(listener)
        _tell_owner(lock, url)
        from coterie.service.app import create_app  # slow, and the two checks above need none of it

        access = _access(settings, listener)
        _log()
        _allow_files(settings.max_connections)
        app = create_app(settings)
        lines = [f"Coterie {VERSION} serves {url}", *_places(url, settings), *access, _ADVICE]
        server = _Server(server_config(app, settings), app, lines, console)
        with _hangup_handled_by(server):
            try:
                server.run(sockets=[listener])
            except SystemExit as error:  # uvicorn's way to say that the lifespan failed, which it has logged
                raise CannotServe("The server could not start: the log above says why.") from error
    console.print("Stopped.")


def server_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """How uvicorn serves the app."""
    from coterie.service.protocol import Protocol  # slow, like the app

    return uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        log_config=None,
        log_level="warning",
        lifespan="on",
        server_header=False,
        proxy_headers=False,  # nothing here depends on what a proxy, or anyone, says of the client
        limit_concurrency=settings.max_connections,
        timeout_graceful_shutdown=FREE_CONNECTIONS_SECONDS,
    )


def upgrade_database(settings: Settings) -> None:
    """Run the migrations that the database has not seen.

    Raises:
        CannotServe: If a server runs on the data folder, or the database is not to be had.
    """
    from coterie.service.storage import migrate  # slow, as Alembic is
    from coterie.service.storage.database import DatabaseUnavailable

    with locked(settings.data_dir):
        try:
            migrate.upgrade(settings.url)
        except (migrate.SchemaMismatch, DatabaseUnavailable) as error:
            raise CannotServe(f"The database can't be used: {error}.") from error


def owner_of(data_dir: Path) -> tuple[int, str] | None:
    """Process id and URL of the server that last had `data_dir`; None where none has told them."""
    try:
        document = json.loads((data_dir / LOCK_FILE).read_text(encoding="utf-8"))
        return int(document["pid"]), str(document["url"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # none yet, half written, or not ours
        return None


class _Server(uvicorn.Server):
    """uvicorn, saying where it is once it is there, and ending gracefully however often it is asked."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, lines: list[str], console: Console) -> None:
        super().__init__(config)
        self._app = app
        self._lines = lines
        self._console = console

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        _spare_the_collector()
        for line in self._lines:
            self._console.print(line)
        self._dashboard = asyncio.create_task(self._show_dashboard())
        self._planner = asyncio.create_task(asyncio.to_thread(PLANNER.start))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._dashboard.cancel()
        self._app.state.context.hub.end_streams()  # or they would be waited for
        await super().shutdown(sockets)

    async def _show_dashboard(self) -> None:
        """Ray starts while the server already answers."""
        dispatcher = self._app.state.context.dispatcher
        while dispatcher.dashboard_url is None:
            await asyncio.sleep(DASHBOARD_POLL_SECONDS)
        self._console.print(f"  Ray dashboard  {dispatcher.dashboard_url}")
        _spare_the_collector()  # what talks to Ray is there now too

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End gracefully: uvicorn's forced end after a second Ctrl-C would leave Ray behind."""
        self.should_exit = True


def _spare_the_collector() -> None:
    """Let Python's collector pass over what is there for good, which holds answers up for 90 ms."""
    gc.collect()
    gc.freeze()


def _log() -> None:
    handler = logging.StreamHandler()
    handler.addFilter(RequestIdFilter())
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s [%(request_id)s]: %(message)s",
        handlers=[handler],
    )


def _allow_files(connections: int) -> None:
    """Let the process have a file open for each connection; many systems allow 1,024 until they are asked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


@contextmanager
def opened_database(settings: Settings) -> Iterator["Database"]:
    """The database, made if there is none; whether or not a server uses it too.

    Raises:
        CannotServe: If it has another version's schema, or is not to be had.
    """
    from coterie.service.storage import migrate  # slow, like the server
    from coterie.service.storage.database import Database, DatabaseUnavailable

    try:
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CannotServe(f"The data folder {settings.data_dir} can't be used: {error.strerror}.") from error
    try:
        migrate.prepare(settings.url)
        database = Database(settings.url)
        try:
            yield database
        finally:
            database.close()
    except (migrate.SchemaMismatch, DatabaseUnavailable) as error:
        raise CannotServe(f"The database can't be used: {error}.") from error


def _places(url: str, settings: Settings) -> list[str]:
    own_ray = settings.ray_address is None
    return [
        f"  page           {url}/",
        f"  API docs       {url}/docs",
        f"  data           {settings.data_dir}",
        *([f"  Ray's token    {settings.data_dir / TOKEN_FILE}"] if own_ray else []),
    ]


def _access(settings: Settings, listener: socket.socket) -> list[str]:
    """Who may use the server, in words.

    Raises:
        CannotServe: If other machines could, and nobody has a token.
    """
    from coterie.service.storage.tokens import TokenRepository  # slow, like the server

    with opened_database(settings) as database, database.read() as session:
        tokens = TokenRepository(session)
        needed, usable = tokens.exist(), tokens.any_usable(datetime.now(UTC))
    make = f"  coterie token create --role admin --data-dir {shlex.quote(str(settings.data_dir))}"
    if not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        if not usable:
            raise CannotServe(
                f"--host {settings.host} lets other machines in, and nobody has an access token yet. "
                f"Make one first:\n{make}"
            )
        return [
            "  access         with a token, from any machine; put TLS in front, or others on the way read it",
        ]
    if needed:
        return ["  access         with a token, from this machine"]
    return ["  access         open to all on this machine, until the first token is made:", f"  {make}"]


@contextmanager
def locked(data_dir: Path) -> Iterator[Any]:
    """Hold the data folder's lock. The kernel frees it with this process, however that ends.

    Raises:
        CannotServe: If another process has it.
    """
    path = data_dir / LOCK_FILE
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise CannotServe(f"The data folder {data_dir} can't be used: {error.strerror}.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotServe(_taken(data_dir)) from None
        except OSError as error:
            raise CannotServe(f"{path} can't be locked: {error.strerror}.") from error
        yield file


def _taken(data_dir: Path) -> str:
    owner = owner_of(data_dir)
    who = f"process {owner[0]}, which serves {owner[1]}" if owner else "another process"
    return (
        f"The data folder {data_dir} is in use by {who}.\n"
        "Stop that server first, or give this one another folder: --data-dir FOLDER"
    )


def _tell_owner(lock: Any, url: str) -> None:
    lock.truncate(0)
    json.dump({"pid": os.getpid(), "url": url}, lock)
    lock.flush()


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket: taken before anything is started, so that a busy port costs nothing."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise CannotServe(f"--host {host}: {error.strerror or error}.") from error
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server may follow another at once
        try:
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError as error:
            raise CannotServe(_no_port(host, port, error)) from error
        yield listener


def _no_port(host: str, port: int, error: OSError) -> str:
    if error.errno == EADDRINUSE:
        return (
            f"Port {port} of {host} is in use by another program.\n"
            f"Stop that one, or choose another port: --port {port + 1} (0 takes any free one)"
        )
    return f"Port {port} of {host} can't be used: {error.strerror}."


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def _hangup_handled_by(server: _Server) -> Iterator[None]:
    """End as gracefully when the terminal closes, unless told to ignore that (nohup)."""
    before = signal.getsignal(signal.SIGHUP)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, server.handle_exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)
