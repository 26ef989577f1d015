"""Hearing that jobs have new events, whoever wrote them: another server, a driver, this one."""

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any

import anyio
from anyio.to_thread import run_sync
from sqlalchemy import Connection, Engine

from coterie.service.storage.database import POSTGRES_OPTIONS, Database
from coterie.service.storage.events import CHANNEL

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.25  # SQLite tells nobody; a look costs some microseconds
FIRST_RETRY_SECONDS = 0.5  # doubled each time that the database can't be reached, up to
LAST_RETRY_SECONDS = 10.0
# A notification may be lost unseen: behind a pooler that knows no LISTEN, or on a connection that is dead on
# one side only.
RECHECK_SECONDS = 5.0

Report = Callable[[str | None], None]


async def listen(database: Database, watched: asyncio.Event, report: Report) -> None:
    """Report jobs with new events until cancelled, however often the database goes away.

    Args:
        database: Where the jobs are.
        watched: Set while somebody wants to know; SQLite is left alone while nobody does.
        report: Called with a job's id; with None where any job may have new events.
    """
    engine = database.engine
    pause = FIRST_RETRY_SECONDS

    def succeed(job_id: str | None) -> None:
        nonlocal pause
        pause = FIRST_RETRY_SECONDS
        report(job_id)

    while True:
        try:
            if engine.dialect.name == "postgresql":
                await _hear(engine, succeed)
            else:
                await _poll(engine, watched, succeed)
        except Exception as error:  # of driver, network or disk: whatever it is, all is to try again
            logger.warning("can't hear of events, trying again in %.1f s: %s", pause, error)
            await anyio.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, LAST_RETRY_SECONDS)


async def _hear(engine: Engine, report: Report) -> None:
    """PostgreSQL tells it, on a connection of its own. What it told before the connection is lost."""
    import psycopg  # only where it is PostgreSQL

    positional, named = engine.dialect.create_connect_args(engine.url)
    options: dict[str, Any] = {**POSTGRES_OPTIONS, **named}
    connection = await psycopg.AsyncConnection.connect(*positional, autocommit=True, **options)
    async with connection:
        await connection.execute(f"LISTEN {CHANNEL}")
        while True:
            report(None)
            async for notification in connection.notifies(timeout=RECHECK_SECONDS):
                report(notification.payload)


async def _poll(engine: Engine, watched: asyncio.Event, report: Report) -> None:
    """SQLite keeps a number that changes with each commit of another connection."""
    connection = await run_sync(engine.connect)
    try:
        seen = None
        while True:
            await watched.wait()
            found = await run_sync(_data_version, connection)
            if found != seen:
                seen = found
                report(None)
            await anyio.sleep(POLL_SECONDS)
    finally:
        with anyio.CancelScope(shield=True):
            await run_sync(connection.close)


def _data_version(connection: Connection) -> int:
    """Asked of the driver: within a transaction, as SQLAlchemy would begin one, it never changes."""
    driver: Any = connection.connection.driver_connection
    version: int = driver.execute("PRAGMA data_version").fetchone()[0]
    return version
