"""A process that is watched: real ones, stopped and hung."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

SILENCE = 1.0

# Computes for longer than it may be silent, as a long epoch does: torch lets the interpreter go.
COMPUTES = """
x = torch.randn(600, 600)
began = time.monotonic()
while time.monotonic() - began < 3 * {silence}:
    x = torch.linalg.matrix_exp(x / x.norm())
print("done", flush=True)
"""
# Native code that keeps the interpreter to itself.
HANGS = "ctypes.PyDLL(None).sleep(60)"
WAITS = "sys.stdin.read()"


@contextmanager
def watched(then: str) -> Iterator[subprocess.Popen[str]]:
    """A process that is watched and then does that."""
    program = (
        "import ctypes, sys, time, torch\n"
        "from coterie.search.watchdog import end_if_silent\n"
        f"end_if_silent({SILENCE}); end_if_silent({SILENCE})\n"
        "print('watched', flush=True)\n" + then.format(silence=SILENCE)
    )
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "watched\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_stopped_process_is_ended() -> None:
    with watched(WAITS) as process:
        process.send_signal(signal.SIGSTOP)
        assert process.wait(20) == -signal.SIGKILL
        assert process.stderr is not None
        assert process.stderr.read() == f"process {process.pid} was silent for 1 s and was ended\n"


def test_a_process_that_hangs_in_native_code_is_ended() -> None:
    with watched(HANGS) as process:
        assert process.wait(20) == -signal.SIGKILL


def test_a_long_computation_is_no_silence() -> None:
    with watched(COMPUTES) as process:
        answer, _ = process.communicate()
        assert (answer, process.returncode) == ("done\n", 0)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_is_watched_by_one_that_ends_with_it(ending: signal.Signals) -> None:
    with watched(WAITS) as process:
        [watcher] = psutil.Process(process.pid).children()
        process.send_signal(ending)
        process.wait(20)
        watcher.wait(20)


def test_a_process_goes_on_without_its_watcher() -> None:
    with watched(WAITS) as process:
        [watcher] = psutil.Process(process.pid).children()
        watcher.kill()
        time.sleep(2 * SILENCE)
        _, errors = process.communicate("")
        assert process.returncode == 0
        assert "it is not watched any more" in errors
