"""Writes what a search does into its store, in order, without holding up the search."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Self, TypeVar

from coterie.search.store import Fenced, FilesUnavailable, StoreUnavailable, TrialStore

logger = logging.getLogger(__name__)

T = TypeVar("T")

BEAT_SECONDS = 2.0  # how often an idle recorder says that it lives; a lease outlasts several of them
YIELD_SECONDS = 0.01  # about what the search needs to propose the next trial and hand it to Ray
FIRST_RETRY_SECONDS = 0.5
LONGEST_RETRY_SECONDS = 5.0  # a lease outlasts several of them


class Recorder:
    """A thread that applies writes to a store one by one.

    A store that is away for a while is tried again until it is back. A write that is fenced, or that fails
    for good, stops the recorder; `check` then raises that error in the caller's thread, where it ends the
    search.

    Use it as a context manager: leaving it without an error waits until every write is durable.
    """

    def __init__(self, store: TrialStore) -> None:
        self._store = store
        self._queue: queue.Queue[Callable[[TrialStore], None] | None] = queue.Queue()
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._stop.set()
        self._queue.put(None)
        self._thread.join()
        if kind is None:
            self.check()

    def write(self, action: Callable[[TrialStore], None]) -> None:
        """Apply `action` to the store after all that was written before."""
        self._queue.put(action)

    @property
    def behind(self) -> int:
        """How many writes wait to be applied."""
        return self._queue.qsize()

    def flush(self) -> None:
        """Wait until every write so far is durable.

        Raises:
            Fenced: If this attempt is over.
        """
        done = threading.Event()
        self._queue.put(lambda _: done.set())
        while not done.wait(0.1):
            self.check()

    def check(self) -> None:
        """Raise what stopped the recorder, if anything did."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while True:
                try:
                    action = self._queue.get(timeout=BEAT_SECONDS)
                except queue.Empty:
                    action = _beat
                if action is None:
                    return
                self._yield()
                self._apply(action)
        except BaseException as error:
            if not isinstance(error, Fenced):
                logger.exception("the recorder stopped")
            self._error = error

    def _yield(self) -> None:
        """Let the search decide and start what follows first: the two threads share one interpreter."""
        if self._queue.empty():
            self._stop.wait(YIELD_SECONDS)

    def _apply(self, action: Callable[[TrialStore], None]) -> None:
        patiently(lambda: action(self._store), self._stop)


def patiently(action: Callable[[], T], stop: threading.Event | None = None) -> T:
    """What `action` gives, tried again for as long as the store is away, or files can't be reached.

    Raises:
        StoreUnavailable, FilesUnavailable: If it was still away when `stop` was set.
    """
    stop, wait = stop or threading.Event(), FIRST_RETRY_SECONDS
    began, next_word = time.monotonic(), 0.0
    while True:
        try:
            found = action()
        except (StoreUnavailable, FilesUnavailable) as error:
            away = time.monotonic() - began
            if away >= next_word:  # twice as rarely each time: it may take days
                logger.warning("the store is away, for %.0f s so far: %s", away, error)
                next_word = 2 * max(away, wait)
            if stop.wait(wait):
                raise
            wait = min(2 * wait, LONGEST_RETRY_SECONDS)
        else:
            if next_word:
                logger.warning("the store is back after %.0f s", time.monotonic() - began)
            return found


def _beat(store: TrialStore) -> None:
    store.beat()
