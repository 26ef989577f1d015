"""`coterie serve` with its real Ray: who may start, and that the end is the end of everything."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from coterie.service.client import ApiError, Client

pytestmark = pytest.mark.slow

SERVE = [sys.executable, "-m", "coterie.service.cli", "serve"]


@pytest.fixture(autouse=True)
def _heard_interrupts() -> None:
    """A shell's background jobs ignore Ctrl-C, and so would their children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("COTERIE_")}


def serve(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*SERVE, *arguments], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@contextmanager
def running(data_dir: Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A server that takes jobs, and its URL."""
    with serve("--port", "0", "--data-dir", str(data_dir)) as process:
        try:
            url = read_places(process)
            with Client(url) as client:
                wait_until_ready(client)
            yield process, url
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(60)


def read_places(process: "subprocess.Popen[str]") -> str:
    """Read what a server says of itself, its Ray dashboard last, and give its URL."""
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if "Ray dashboard  http://127.0.0.1:" in line:
            return said[0].split()[-1]
    raise AssertionError(f"the server ended: {said}")


def wait_until_ready(client: Client) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            client.ready()
        except ApiError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        else:
            return


def children(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_server_that_is_told_to_stop_ends_its_ray(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path) as (process, _):
        ray = children(process)
        assert ray
        process.send_signal(number)
        time.sleep(0.05)
        process.send_signal(number)  # an impatient user's second Ctrl-C
        said, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    assert said == "Stopped.\n"
    _, alive = psutil.wait_procs(ray, timeout=5)
    assert alive == []


def test_a_second_server_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    with running(tmp_path / "data") as (process, url):
        port = url.rpartition(":")[2]
        for data_dir, words in (
            ("data", f"in use by process {process.pid}, which serves {url}"),
            ("other", f"Port {port} of 127.0.0.1 is in use"),
        ):
            second = serve("--port", port, "--data-dir", str(tmp_path / data_dir))
            said, log = second.communicate(timeout=30)
            assert (second.returncode, said) == (2, "")
            assert words in log
        with Client(url) as client:
            assert client.ready()["status"] == "ready"
