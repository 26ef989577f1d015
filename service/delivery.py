"""Telling webhooks of events: each server delivers what is due, and no two of them the same at a time.

What is sent follows Standard Webhooks (https://www.standardwebhooks.com): headers `webhook-id`,
`webhook-timestamp` and `webhook-signature`, an HMAC-SHA256 over id, timestamp and body with the webhook's
secret. A delivery is made at least once, always with the same id; their order is not promised.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import random
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import cached_property, partial

import anyio
import certifi
import httpcore
from anyio import CapacityLimiter
from anyio.abc import TaskGroup
from anyio.to_thread import run_sync

from coterie.service import VERSION
from coterie.service.public_network import PublicNetwork, parse_url
from coterie.service.storage.database import Database
from coterie.service.storage.outbox import DeliveryState, Due, OutboxRepository
from coterie.service.storage.tables import EventRow
from coterie.service.views import event_view

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
TROUBLE_SECONDS = 5.0  # while the database is away
CONNECT_SECONDS = 5.0  # for each address of a host
ATTEMPT_SECONDS = 15.0  # for all of an attempt, however slowly the receiver reads and answers
CLAIM_SECONDS = 60.0  # after which another server takes what a dead one was sending
MOST_UNDER_WAY = 16  # of a server at a time, each to another webhook: a slow one holds up only itself
# Before the second attempt and each later one: 11 attempts in about a day.
RETRY_SECONDS = (5, 30, 120, 600, 1800, 3600, 7200, 14_400, 28_800, 28_800)
# So long a webhook whose receiver failed is told nothing else: what waits for it must not take all places.
LEFT_ALONE_SECONDS = 60.0
JITTER = 0.2  # of it, more or less: what failed together need not come back together
KEPT = timedelta(days=30)  # what became of a delivery
FORGET_SECONDS = 3600.0
LIMIT_ERROR = 300  # characters of what went wrong
GONE = 410


class Deliverer:
    """Delivers until its block ends. What it was sending then is sent again by another server.

    Args:
        database: Where the outbox is.
        allow_private: Whether webhooks may be in the server's own network.
    """

    def __init__(self, database: Database, *, allow_private: bool) -> None:
        self._database = database
        self._network = PublicNetwork(allow_private=allow_private)
        self._busy: set[str] = set()  # webhooks that are being told something
        self._idle = asyncio.Event()  # set when one of them no longer is
        self._thread = CapacityLimiter(1)
        self._forget_at = time.monotonic()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Deliver while the block runs."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._run, tasks)
            try:
                yield
            finally:
                tasks.cancel_scope.cancel()

    async def _run(self, tasks: TaskGroup) -> None:
        while True:
            pause = POLL_SECONDS
            self._idle.clear()
            try:
                claimed = await run_sync(self._claim, limiter=self._thread, abandon_on_cancel=True)
            except Exception as error:  # the database is away, or worse: the server's other parts go on
                logger.warning("can't read which webhooks are to be told, trying again: %s", error)
                claimed, pause = [], TROUBLE_SECONDS
            for due in claimed:
                self._busy.add(due.webhook_id)
                tasks.start_soon(self._deliver, due)
            if not claimed or len(self._busy) == MOST_UNDER_WAY:
                with anyio.move_on_after(pause):
                    await self._idle.wait()

    async def _deliver(self, due: Due) -> None:
        try:
            status, error = await self._post(due)
            settle = partial(self._settle, due, status, error)
            await run_sync(settle, limiter=self._thread, abandon_on_cancel=True)
        except Exception:
            logger.exception(
                "delivery %s: what became of it could not be stored, so it is made again", due.id
            )
        finally:
            self._busy.discard(due.webhook_id)
            self._idle.set()

    async def _post(self, due: Due) -> tuple[int | None, str | None]:
        """The receiver's status, and what went wrong."""
        body = _body(due.event)
        try:
            url = parse_url(due.url)
            target = httpcore.URL(
                scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
            )
            with anyio.fail_after(ATTEMPT_SECONDS):
                # Closed with the answer: what follows its head is never read, a redirect never followed.
                async with (
                    httpcore.AsyncConnectionPool(self._tls, network_backend=self._network) as connection,
                    connection.stream(
                        "POST",
                        target,
                        headers=_headers(due, body, int(time.time())),
                        content=body,
                        extensions={"timeout": {"connect": CONNECT_SECONDS}},
                    ) as answer,
                ):
                    status = answer.status
        except TimeoutError:
            return None, f"no answer within {ATTEMPT_SECONDS:g} s"
        except Exception as error:  # whatever its receiver does is the delivery's failure alone
            return None, f"{type(error).__name__}: {error}"[:LIMIT_ERROR]
        return status, None if 200 <= status < 300 else f"answered {status}"

    def _claim(self) -> list[Due]:
        now = datetime.now(UTC)
        room = MOST_UNDER_WAY - len(self._busy)
        if time.monotonic() >= self._forget_at:
            self._forget_at = time.monotonic() + FORGET_SECONDS
            with self._database.write() as session:
                OutboxRepository(session).forget(now, KEPT)
        with self._database.read() as session:
            if not room or not OutboxRepository(session).waits(now, self._busy):
                return []
        with self._database.write() as session:
            until = now + timedelta(seconds=CLAIM_SECONDS)
            return OutboxRepository(session).claim(now, until, room, self._busy)

    def _settle(self, due: Due, status: int | None, error: str | None) -> None:
        now = datetime.now(UTC)
        state, due_at = DeliveryState.DEAD, None
        if error is None:
            state = DeliveryState.DELIVERED
        elif status != GONE and due.attempt <= len(RETRY_SECONDS):
            pause = RETRY_SECONDS[due.attempt - 1] * random.uniform(1 - JITTER, 1 + JITTER)
            state, due_at = DeliveryState.PENDING, now + timedelta(seconds=pause)
        with self._database.write() as session:
            outbox = OutboxRepository(session)
            if state is not DeliveryState.DELIVERED:
                outbox.leave_alone(due.webhook_id, now + timedelta(seconds=LEFT_ALONE_SECONDS))
            outbox.settle(due, state, now, due_at=due_at, last_status=status, last_error=error)
            if status == GONE:
                outbox.disable(due.webhook_id, "the receiver answered 410 to another delivery", now)

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        """The machine's own certificates too: a team's receiver may have one that is known there only."""
        context = ssl.create_default_context()
        context.load_verify_locations(certifi.where())
        return context


def sign(secret: str, delivery_id: str, timestamp: int, body: bytes) -> str:
    """The signature of Standard Webhooks, version 1, with a secret as `whsec_` and base64."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = hmac.new(key, f"{delivery_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def _headers(due: Due, body: bytes, timestamp: int) -> list[tuple[str, str]]:
    return [
        ("Content-Type", "application/json"),
        ("User-Agent", f"Coterie/{VERSION}"),
        ("webhook-id", due.id),
        ("webhook-timestamp", str(timestamp)),
        ("webhook-signature", sign(due.secret, due.id, timestamp, body)),
    ]


def _body(event: EventRow) -> bytes:
    told = event_view(event).model_dump(mode="json")
    return json.dumps({"type": told["kind"], "timestamp": told["at"], "data": told}, allow_nan=False).encode()
