"""Event streams: what happens to a job, told to all who watch it on this server.

A `Hub` reads the new events of each watched job once and keeps the newest in memory, encoded, for all of the
job's streams. A stream knows only its position: what is no longer in memory, since the client was away or is
slow, it reads from SQL itself. So a stream that waits holds neither a connection nor a thread, and none can
miss an event or see one twice.
"""

import asyncio
import json
import logging
import math
import random
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence, Set
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import islice

import anyio
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from sse_starlette import ServerSentEvent

from coterie.service.storage.changes import listen
from coterie.service.storage.database import Database, DatabaseUnavailable
from coterie.service.storage.events import EventKind, EventRepository
from coterie.service.storage.tables import EventRow
from coterie.service.views import event_view

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 15  # proxies close what is silent for a minute
PAGE_EVENTS = 200  # read and sent at a time
BUFFER_BYTES = 200_000  # of a job's newest events
READERS = 4  # threads, and connections, for clients that catch up
RETRY_SECONDS = 1.0  # while the database is away
# When clients come back after their stream broke: not all at once.
RECONNECT_MILLISECONDS = (1000, 3000)


@dataclass(frozen=True)
class Frame:
    """An event as it is sent."""

    sequence: int
    kind: str
    content: bytes


@dataclass(frozen=True)
class Batch:
    """What came after a position: frames in order, the newest sequence of the job, whether it has ended."""

    frames: Sequence[Frame]
    newest: int
    ended: bool


@dataclass
class Topic:
    """A job that is watched.

    Attributes:
        position: Sequence of the newest event that was read.
        floor: Sequence of the newest event that is not in `frames`.
        over: Whether nothing follows: the job has ended and all was read, or it is gone.
        changed: Set, and replaced, when something was read.
    """

    position: int
    floor: int
    over: bool = False
    streams: int = 0
    size: int = 0
    frames: deque[Frame] = field(default_factory=deque)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, batch: Batch) -> None:
        """Take what came after `position`, and let the streams look if that is anything."""
        for frame in batch.frames:
            self.frames.append(frame)
            self.size += len(frame.content)
            self.position = frame.sequence
        while self.size > BUFFER_BYTES:
            oldest = self.frames.popleft()
            self.size -= len(oldest.content)
            self.floor = oldest.sequence
        self.over = batch.ended and self.position >= batch.newest
        if batch.frames or self.over:
            self.wake()

    def wake(self) -> None:
        """Let the streams look."""
        self.changed.set()
        self.changed = asyncio.Event()

    def after(self, position: int) -> list[Frame] | None:
        """The next `PAGE_EVENTS` after a position; None where memory does not reach back so far."""
        if position < self.floor:
            return None
        new = max(0, self.position - position)  # sequences have no gaps
        return list(islice(reversed(self.frames), new))[::-1][:PAGE_EVENTS]


class TooManyStreams(Exception):
    """A token has as many open event streams as it may."""


class Hub:
    """Reads the events of watched jobs, once for all of a job's streams. Lives on one event loop.

    Args:
        database: Where the jobs are.
        most_streams: Open at a time for one token.
    """

    def __init__(self, database: Database, most_streams: int) -> None:
        self._database = database
        self._most_streams = most_streams
        self._open: Counter[str] = Counter()  # streams by their token's id
        self._topics: dict[str, Topic] = {}
        self._stale: set[str] = set()  # watched jobs that may have new events
        self._work = asyncio.Event()  # set while there are stale jobs
        self._watched = asyncio.Event()  # set while there are topics
        self._reader = CapacityLimiter(1)
        self._readers = CapacityLimiter(READERS)
        self._ending = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Read while the block runs."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listen, self._database, self._watched, self._note)
            tasks.start_soon(self._read)
            try:
                yield
            finally:
                self.end_streams()
                tasks.cancel_scope.cancel()

    def end_streams(self) -> None:
        """End all streams, now and from here on, so that the server can: clients go on at another one."""
        self._ending = True
        for topic in self._topics.values():
            topic.wake()

    async def stream(
        self,
        job_id: str,
        *,
        after: int,
        newest: int,
        kinds: Set[EventKind],
        seconds: float | None,
        token_id: str | None,
        allowed: Callable[[], Awaitable[bool]],
    ) -> AsyncIterator[bytes]:
        """A job's events as Server-Sent Events, until the job has ended and all was sent.

        Args:
            job_id: A job that exists.
            after: Sequence to begin after.
            newest: Sequence of the job's newest event, as it was lately.
            kinds: Which events to send. Of others the client learns the ids, to come back with.
            seconds: End after so long, whatever is left; 0 gives what there is, up to `PAGE_EVENTS`.
            token_id: Of whose streams these are; None where nobody counts them.
            allowed: Whether the client may still see them, asked now and then.
        """
        yield ServerSentEvent(retry=random.randint(*RECONNECT_MILLISECONDS), sep="\n").encode()
        position = after
        now = anyio.current_time()
        deadline = math.inf if seconds is None else now + seconds
        ask_at = now + HEARTBEAT_SECONDS
        with self._counted(token_id), self._watching(job_id, newest) as topic:
            while not self._ending:
                now = anyio.current_time()
                if now >= ask_at:
                    if not await _ask(allowed):
                        return
                    ask_at = now + HEARTBEAT_SECONDS
                changed = topic.changed  # before the look, or what comes after it would be missed
                pause = min(deadline, ask_at) - now
                frames: Sequence[Frame] | None = topic.after(position)
                if frames is None or (not frames and position < newest):
                    with anyio.move_on_after(max(pause, RETRY_SECONDS)):
                        frames = await self._catch_up(job_id, position)
                    pause = min(pause, RETRY_SECONDS)
                if frames:
                    position = frames[-1].sequence
                    yield _select(frames, kinds)
                elif topic.over and frames is not None:
                    return
                else:
                    with anyio.move_on_after(pause):
                        await changed.wait()
                if anyio.current_time() >= deadline:
                    return

    def check_room(self, token_id: str | None) -> None:
        """Raise TooManyStreams if a token has as many open streams as it may, so that others come in too."""
        if token_id is not None and self._open[token_id] >= self._most_streams:
            raise TooManyStreams(
                f"this token has {self._most_streams} open event streams here, the most it may: end one first"
            )

    @contextmanager
    def _counted(self, token_id: str | None) -> Iterator[None]:
        if token_id is None:
            yield
            return
        self._open[token_id] += 1
        try:
            yield
        finally:
            self._open[token_id] -= 1
            if not self._open[token_id]:
                del self._open[token_id]

    @contextmanager
    def _watching(self, job_id: str, newest: int) -> Iterator[Topic]:
        topic = self._topics.setdefault(job_id, Topic(newest, newest))
        topic.streams += 1
        self._watched.set()
        self._note(job_id)  # for what happened since `newest` was read
        try:
            yield topic
        finally:
            topic.streams -= 1
            if not topic.streams:
                del self._topics[job_id]
            if not self._topics:
                self._watched.clear()

    def _note(self, job_id: str | None) -> None:
        """That this job may have new events, or all may."""
        self._stale.update(self._topics if job_id is None else self._topics.keys() & {job_id})
        if self._stale:
            self._work.set()

    async def _read(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            stale, self._stale = self._stale, set()
            topics = {job_id: self._topics[job_id] for job_id in stale & self._topics.keys()}
            positions = {job_id: topic.position for job_id, topic in topics.items()}
            found = await self._news(positions, self._reader)
            if found is None:
                await anyio.sleep(RETRY_SECONDS)
                self._note(None)
                continue
            for job_id, topic in topics.items():
                # One that is gone was deleted, which only a job that has ended can be.
                batch = found.get(job_id, Batch((), topic.position, ended=True))
                topic.add(batch)
                if topic.position < batch.newest:
                    self._note(job_id)

    async def _catch_up(self, job_id: str, position: int) -> Sequence[Frame] | None:
        found = await self._news({job_id: position}, self._readers)
        if found is None:
            return None
        return found[job_id].frames if job_id in found else ()

    async def _news(self, positions: Mapping[str, int], limiter: CapacityLimiter) -> dict[str, Batch] | None:
        """What came after these positions; None where the database is away, which passes."""
        try:
            return await run_sync(self._read_news, positions, limiter=limiter, abandon_on_cancel=True)
        except DatabaseUnavailable as error:
            logger.warning("can't read events: %s", error)
        except Exception:  # the streams of all jobs hang on it
            logger.exception("can't read events")
        return None

    def _read_news(self, positions: Mapping[str, int]) -> dict[str, Batch]:
        with self._database.read() as session:
            news = EventRepository(session).news(positions, PAGE_EVENTS)
            return {
                job_id: Batch([_encode(row) for row in found.events], found.newest, found.ended)
                for job_id, found in news.items()
            }


async def _ask(allowed: Callable[[], Awaitable[bool]]) -> bool:
    """While the database is away nobody is turned away: it lets nothing be seen either."""
    try:
        return await allowed()
    except DatabaseUnavailable:
        return True


def heartbeat() -> ServerSentEvent:
    """A comment, which clients ignore."""
    return ServerSentEvent(comment="heartbeat", sep="\n")


def _encode(row: EventRow) -> Frame:
    """In ASCII, as there are readers that take U+2028 for the end of a line."""
    text = json.dumps(event_view(row).model_dump(mode="json"), allow_nan=False, separators=(",", ":"))
    event = ServerSentEvent(text, id=str(row.sequence), event=row.kind, sep="\n")
    return Frame(row.sequence, row.kind, event.encode())


def _select(frames: Sequence[Frame], kinds: Set[str]) -> bytes:
    wanted = [frame.content for frame in frames if frame.kind in kinds]
    if frames[-1].kind not in kinds:  # an id without data: the client notes how far it is
        wanted.append(ServerSentEvent(id=str(frames[-1].sequence), sep="\n").encode())
    return b"".join(wanted)
