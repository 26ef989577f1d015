"""Transactions: the one place that knows how engines differ."""

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError
from sqlalchemy.orm import Session

from coterie.search.store import StoreUnavailable

BUSY_TIMEOUT_SECONDS = 30  # server and drivers write to one SQLite file, each only for milliseconds
_WRITES = "coterie_writes"


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
        self._writer = self.engine.execution_options(**{_WRITES: True})

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that may write. On SQLite it holds the write lock from its first statement."""
        with _translated(), Session(self._writer, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that only reads."""
        with _translated(), Session(self.engine, expire_on_commit=False) as session:
            yield session

    def check_reachable(self) -> None:
        """Make a round trip.

        Raises:
            DatabaseUnavailable: If it fails.
        """
        with self.read() as session:
            session.execute(text("SELECT 1"))

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def append_in_order(session: Session, table: str) -> None:
    """Let no other transaction add to `table` until this one has ended.

    So nobody ever sees a row appear whose counter is below that of one seen before. On SQLite only one
    transaction writes at a time anyway.
    """
    if session.connection().dialect.name != "sqlite":
        session.execute(text(f"LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE"))


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except OperationalError as error:
        raise DatabaseUnavailable(str(error.orig)) from error


def sqlite_file(url: str) -> Path | None:
    """The file of a SQLite database; None for another engine.

    Raises:
        ValueError: If it is no URL, or SQLite's file is not given by its absolute path.
    """
    try:
        parts = make_url(url)
    except ArgumentError:
        raise ValueError(
            "database_url: must be like postgresql+psycopg://host/name or sqlite:////path"
        ) from None
    if parts.get_backend_name() != "sqlite":
        return None
    if not parts.database or not Path(parts.database).is_absolute():
        raise ValueError(
            "database_url: SQLite needs a file by its absolute path, as in sqlite:////data/coterie.db"
        )
    return Path(parts.database)


def _open(url: str) -> Engine:
    serializer = partial(json.dumps, allow_nan=False)
    file = sqlite_file(url)
    if file is None:
        try:
            return create_engine(url, json_serializer=serializer, pool_pre_ping=True)
        except (ImportError, NoSuchModuleError) as error:
            raise DatabaseUnavailable(f"its driver is not installed: {error}") from error
    _create_private(file)
    engine = create_engine(url, json_serializer=serializer, connect_args={"timeout": BUSY_TIMEOUT_SECONDS})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _create_private(file: Path) -> None:
    """Create the file before SQLite does; its -wal and -shm files get the same mode."""
    os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))


def _prepare_sqlite(connection: sqlite3.Connection, _: Any) -> None:
    connection.isolation_level = None  # the driver's own BEGIN comes too late to be IMMEDIATE
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA foreign_keys = ON")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
