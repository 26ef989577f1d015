"""Threads that are kept for one kind of work, so that another kind can't take them all."""

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

from anyio import CapacityLimiter
from anyio.lowlevel import RunVar
from anyio.to_thread import run_sync

Found = TypeVar("Found")
Arguments = TypeVarTuple("Arguments")


class Threads:
    """So many threads of each event loop.

    Args:
        kind: Of work, in a word; no two have the same.
        count: The most that are busy at a time; who comes later waits.
    """

    def __init__(self, kind: str, count: int) -> None:
        self._limiter: RunVar[CapacityLimiter] = RunVar(kind)
        self._count = count

    async def run(
        self,
        work: Callable[[*Arguments], Found],
        *arguments: *Arguments,
        abandon_on_cancel: bool = False,
    ) -> Found:
        """What `work` returns, done in one of them; with `abandon_on_cancel` its end is not waited for."""
        limiter = self._limiter.get(None)
        if limiter is None:
            limiter = CapacityLimiter(self._count)
            self._limiter.set(limiter)
        return await run_sync(work, *arguments, limiter=limiter, abandon_on_cancel=abandon_on_cancel)
