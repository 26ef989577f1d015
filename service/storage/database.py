"""Transactions: the one place that knows how engines differ."""

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnectionFree
from sqlalchemy.orm import DeclarativeBase, Session

from coterie.search.store import StoreUnavailable

BUSY_TIMEOUT_SECONDS = 30  # server and drivers write to one SQLite file, each only for milliseconds
STATEMENT_SECONDS = 30  # the longest that one may take on PostgreSQL, with its wait for locks
CONNECTIONS = 20  # kept open by a process at the most, as many as requests are answered at a time
MORE_CONNECTIONS = 20  # for a moment
LARGEST_IDLE_WAL_BYTES = 64_000_000  # what a long write, as an upgrade, has left behind is cut to this
WAL_RETRY_SECONDS = 0.02
DRIVERS = ("sqlite", "sqlite+pysqlite", "postgresql", "postgresql+psycopg")
_WRITES = "coterie_writes"
_DAMAGED = ("SQLITE_NOTADB", "SQLITE_CORRUPT")
_READ_ONLY = "25006"  # PostgreSQL's code for a write to a standby
# Of libpq; what the URL says goes before. A network that swallows everything is noticed within half a minute.
POSTGRES_OPTIONS: dict[str, str | int] = {
    "application_name": "coterie",
    "connect_timeout": 10,  # s
    "keepalives_idle": 10,  # s
    "keepalives_interval": 5,  # s
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,  # ms
    # A process that was stopped within a transaction must not hold its locks for ever.
    "options": f"-c statement_timeout={STATEMENT_SECONDS}s "
    f"-c idle_in_transaction_session_timeout={STATEMENT_SECONDS}s",
}


class DatabaseUnavailable(StoreUnavailable):
    """The database could not be reached or was locked for too long; the same call may work later."""


class Database:
    """Sessions on one database.

    Application code never commits: `write()` does, once, when its block ends, or rolls back if it raises.

    Args:
        url: SQLAlchemy URL. A SQLite file is created for its owner alone.
    """

    def __init__(self, url: str) -> None:
        self.engine = _open(url)
        self._closed = False
        event.listen(self.engine, "checkin", self._close_late)
        self._writer = self.engine.execution_options(**{_WRITES: True})
        self._reader = self.engine
        if self.engine.dialect.name == "postgresql":  # whose statements would each see another moment
            self._reader = self.engine.execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that may write. On SQLite it holds the write lock from its first statement."""
        with _translated(), Session(self._writer, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that only reads, all of it as of one moment."""
        with _translated(), Session(self._reader, expire_on_commit=False) as session:
            yield session

    def check_reachable(self) -> None:
        """Make a round trip.

        Raises:
            DatabaseUnavailable: If it fails.
        """
        with self.read() as session:
            session.execute(text("SELECT 1"))

    def close(self) -> None:
        """Close all connections, those in use as soon as they are given back."""
        self._closed = True
        self.engine.dispose()

    def _close_late(self, connection: Any, _: object) -> None:
        """A thread whose work nobody waits for any more may outlast the server's lifespan."""
        if self._closed and connection is not None:
            connection.close()


def insert(session: Session, table: type[DeclarativeBase]) -> postgresql.Insert | sqlite.Insert:
    """An INSERT with ON CONFLICT clauses, in the words of the session's engine."""
    if session.connection().dialect.name == "sqlite":
        return sqlite.insert(table)
    return postgresql.insert(table)


def append_in_order(session: Session, table: str) -> None:
    """Let no other transaction add to `table` until this one has ended.

    So nobody ever sees a row appear whose counter is below that of one seen before. On SQLite only one
    transaction writes at a time anyway.
    """
    if session.connection().dialect.name != "sqlite":
        session.execute(text(f"LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE"))


def take_long(session: Session) -> None:
    """Let the statements of this transaction take as long as they need."""
    if session.connection().dialect.name != "sqlite":
        session.execute(text("SET LOCAL statement_timeout = 0"))


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except NoConnectionFree as error:
        raise DatabaseUnavailable("all its connections are in use") from error
    except DBAPIError as error:
        if not _may_pass(error):
            raise
        raise DatabaseUnavailable(str(error.orig)) from error


def _may_pass(error: DBAPIError) -> bool:
    """Whether the database failed, out of reach, locked, full or damaged, and not the statement."""
    cause = error.orig
    if isinstance(cause, sqlite3.Error):
        name = getattr(cause, "sqlite_errorname", None)  # "SQLITE_ERROR" is a wrong statement's
        return name in _DAMAGED or (isinstance(cause, sqlite3.OperationalError) and name != "SQLITE_ERROR")
    return (
        error.connection_invalidated
        or isinstance(error, OperationalError | InterfaceError)
        or getattr(cause, "sqlstate", None) == _READ_ONLY
    )


def sqlite_file(url: str) -> Path | None:
    """The file of a SQLite database; None for another engine.

    Raises:
        ValueError: If it is no URL of an engine that is supported, or SQLite's file is not given by its
            absolute path.
    """
    parts = None
    with suppress(ArgumentError):
        parts = make_url(url)
    if parts is None or parts.drivername not in DRIVERS:
        raise ValueError("database_url: must be like postgresql+psycopg://host/name or sqlite:////path")
    if parts.get_backend_name() == "postgresql":
        return None
    if not parts.database or not Path(parts.database).is_absolute():
        raise ValueError(
            "database_url: SQLite needs a file by its absolute path, as in sqlite:////data/coterie.db"
        )
    return Path(parts.database)


def _open(url: str) -> Engine:
    file = sqlite_file(url)
    settings: dict[str, Any] = {
        "json_serializer": partial(json.dumps, allow_nan=False),
        "pool_size": CONNECTIONS,
        "max_overflow": MORE_CONNECTIONS,
    }
    if file is None:
        return _open_server(make_url(url), settings)
    _create_private(file)
    engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_SECONDS}, **settings)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _open_server(url: URL, settings: dict[str, Any]) -> Engine:
    defaults = {name: value for name, value in POSTGRES_OPTIONS.items() if name not in url.query}
    try:
        return create_engine(url, pool_pre_ping=True, connect_args=defaults, **settings)
    except ImportError as error:
        raise DatabaseUnavailable(
            f"its driver is not installed: run `pip install 'coterie[postgres]'` ({error})"
        ) from error


def _create_private(file: Path) -> None:
    """Create the file before SQLite does; its -wal and -shm files get the same mode.

    One that is there is not opened: a process that closes any descriptor of a file loses all its locks on it
    (POSIX), and then another process, ending, would take the database for unused and delete its log.
    """
    with suppress(FileExistsError):
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


def _prepare_sqlite(connection: sqlite3.Connection, _: Any) -> None:
    connection.isolation_level = None  # the driver's own BEGIN comes too late to be IMMEDIATE
    _use_wal(connection)
    # NORMAL would be faster, but the last commits of a WAL are then lost with the power.
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA journal_size_limit = {LARGEST_IDLE_WAL_BYTES}")
    connection.execute("PRAGMA foreign_keys = ON")


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to a write-ahead log; SQLite itself does not wait for others that have just opened the file."""
    deadline = time.monotonic() + BUSY_TIMEOUT_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(WAL_RETRY_SECONDS)
        else:
            return


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
