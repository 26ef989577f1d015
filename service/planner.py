"""The process that plans for a server, so that torch's 200 MB and planning's seconds of CPU are not in it.

There is one for each process that serves. It takes a question a line on its stdin and gives an answer a line
on its stdout, both JSON, until its stdin ends: so it outlives its server by no more than its start takes,
however that ended.
"""

import atexit
import contextlib
import json
import logging
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any, BinaryIO, Literal

from coterie.models.tasks import Direction
from coterie.search.faults import Fault, SpecError
from coterie.search.spec import JobSpec
from coterie.search.store import AffinityResult, SubsetResult
from coterie.service.documents import Document

Kind = Literal["datasets", "families", "backbones", "metrics"]

CALL_SECONDS = 60.0  # a plan takes a fraction of one, and the start of the process some on a busy machine
WAIT_SECONDS = 30.0
MOST_WAITING = 16  # requests, that which is answered included: each holds one of the server's 40 threads
ATTEMPTS = 2  # whatever ended the process may have had nothing to do with what it was asked
END_SECONDS = 5.0
# Planned before anybody asks: it loads the sources, and a second's worth of torch that no import of it does.
_FIRST_PLAN = json.dumps(["plan_job", {"dataset": {"source": "digits"}, "budget": {"trials": 1}}]).encode()

logger = logging.getLogger(__name__)


class PlannerUnavailable(Exception):
    """Nothing can be planned now; the message says why."""


class PlanningFailed(Exception):
    """Planning met a fault of ours; the message has the traceback, for the server's log."""


class Planner:
    """A process that plans, started when it is first needed and again when it has ended. For any thread."""

    def __init__(self) -> None:
        self._places = threading.BoundedSemaphore(MOST_WAITING)
        self._turn = threading.Lock()
        self._child: _Child | None = None
        atexit.register(self.close)

    def start(self) -> None:
        """Start the process, without waiting until it can answer."""
        if self._turn.acquire(blocking=False):  # else somebody asks it already
            try:
                with contextlib.suppress(OSError):  # who asks first is told
                    self._living()
            finally:
                self._turn.release()

    def close(self) -> None:
        """End the process, whatever it does; what is asked next starts another."""
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def plan_job(self, spec: JobSpec) -> dict[str, Direction]:
        """Find out which way each metric of the job is better.

        Raises:
            SpecError: If the job can't be, with every fault.
            PlannerUnavailable: If nothing can be planned now.
        """
        directions = self._call("plan_job", spec.model_dump(mode="json"))
        return {metric: Direction(direction) for metric, direction in directions.items()}

    def tabulate_affinities(
        self, spec: Mapping[str, Any], one_step: Sequence[AffinityResult], subsets: Sequence[SubsetResult]
    ) -> Document:
        """Average what was measured, as `coterie.service.planning` has it.

        Raises:
            SpecError: If the job with this spec can't be any more.
            PlannerUnavailable: If nothing can be planned now.
        """
        results = ([asdict(result) for result in given] for given in (one_step, subsets))
        tables: Document = self._call("tabulate_affinities", spec, *results)
        return tables

    def catalogue(self, kind: Kind) -> list[Document]:
        """What a spec can name.

        Raises:
            PlannerUnavailable: If nothing can be planned now.
        """
        items: list[Document] = self._call("catalogue", kind)
        return items

    def count_gpus(self) -> int:
        """Count the GPUs of this machine.

        Raises:
            PlannerUnavailable: If nothing can be planned now.
        """
        return int(self._call("count_gpus"))

    def _call(self, function: str, *arguments: Any) -> Any:
        question = json.dumps([function, *arguments]).encode() + b"\n"
        if not self._places.acquire(blocking=False):
            raise PlannerUnavailable("too many other jobs are being planned; try again in a moment")
        try:
            if not self._turn.acquire(timeout=WAIT_SECONDS):
                raise PlannerUnavailable("other jobs take long to plan; try again in a minute")
            try:
                answer = self._ask(question)
            finally:
                self._turn.release()
        finally:
            self._places.release()
        if "faults" in answer:
            raise SpecError([Fault(**fault) for fault in answer["faults"]])
        if "traceback" in answer:
            raise PlanningFailed(answer["traceback"])
        return answer["result"]

    def _ask(self, question: bytes) -> Document:
        for _ in range(ATTEMPTS):
            try:
                child = self._living()
            except OSError as error:
                logger.error("the process that plans jobs can't be started: %s", error)
                raise PlannerUnavailable("no process can be started to plan it; try again later") from error
            answer = child.ask(question, CALL_SECONDS)
            if answer is not None:
                return answer
            self.close()
            if child.overdue:
                logger.error("the process that plans jobs was ended: no answer in %g s", CALL_SECONDS)
                raise PlannerUnavailable(f"planning took more than {CALL_SECONDS:g} s, and was ended")
            logger.error("the process that plans jobs ended with code %s", child.exit_code)
        raise PlannerUnavailable(
            f"the process that plans it ended {ATTEMPTS} times; the server's log may say why"
        )

    def _living(self) -> "_Child":
        if self._child is not None and self._child.exit_code is not None:
            logger.warning("the process that plans jobs ended with code %d", self._child.exit_code)
            self.close()
        if self._child is None:
            self._child = _Child()
        return self._child


class _Child:
    """One process, from its start to its end; for one thread at a time."""

    def __init__(self) -> None:
        self.overdue = False
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # the terminal's Ctrl-C is the server's affair, which still has to answer
        )

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def ask(self, question: bytes, seconds: float) -> Document | None:
        """The answer; None if the process ended first, which it does after so many seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        clock = threading.Timer(seconds, self._give_up)
        clock.daemon = True
        clock.start()
        try:
            self._process.stdin.write(question)
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except (OSError, ValueError):  # no one reads; or `end` was called
            return None
        finally:
            clock.cancel()
        return json.loads(answer) if answer.endswith(b"\n") else None

    def end(self) -> None:
        """End it, and leave nothing open."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):  # an unread rest of a question
            self._process.stdin.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _give_up(self) -> None:
        self.overdue = True
        self._process.kill()


PLANNER = Planner()  # a process's one


@cache
def own_gpus() -> int:
    """The GPUs of this machine, counted once.

    Raises:
        PlannerUnavailable: If nothing can be planned now.
    """
    return PLANNER.count_gpus()


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is for the log
    from coterie.service.planning import FUNCTIONS  # with torch

    questions: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin.buffer, questions), daemon=True).start()
    _answer(FUNCTIONS, _FIRST_PLAN)
    with contextlib.suppress(BrokenPipeError):  # the server ended, and so will this
        while True:
            answers.write(_answer(FUNCTIONS, questions.get()) + b"\n")
            answers.flush()


def _read(asked: BinaryIO, questions: "queue.SimpleQueue[bytes]") -> None:
    """In a thread of its own, so that the server's end is seen in the middle of a plan too."""
    for line in asked:
        questions.put(line)
    os._exit(0)  # nothing is kept here that could be lost


def _answer(functions: Mapping[str, Callable[..., Any]], question: bytes) -> bytes:
    function, *arguments = json.loads(question)
    try:
        return json.dumps({"result": functions[function](*arguments)}).encode()
    except SpecError as error:
        return json.dumps({"faults": [asdict(fault) for fault in error.faults]}).encode()
    except Exception:
        return json.dumps({"traceback": traceback.format_exc()}).encode()


if __name__ == "__main__":
    main()
