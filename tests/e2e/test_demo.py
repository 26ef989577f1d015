"""`coterie demo`, the whole of it: its figures are the database's, and it leaves nothing running."""

import json
import os
import re
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DEMO = [sys.executable, "-m", "coterie.service.cli", "demo"]
GREATEST_SECONDS = 240


@pytest.fixture(autouse=True)
def _heard_interrupts() -> None:
    """A shell's background jobs ignore Ctrl-C, and so would their children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def port_8000_taken() -> Iterator[None]:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            other.bind(("127.0.0.1", 8000))
            other.listen()
        except OSError:
            pytest.skip("port 8000 is another program's, and the test needs it free too")
        yield


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("COTERIE_")}


def rows(folder: Path, query: str, *values: Any) -> list[sqlite3.Row]:
    connection = sqlite3.connect(folder / ".demo" / "coterie.db")
    connection.row_factory = sqlite3.Row
    try:
        return connection.execute(query, values).fetchall()
    finally:
        connection.close()


def trials_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """The trials of the newest job of this name, from SQL."""
    found = rows(
        folder,
        "SELECT * FROM trials WHERE state = 'completed' AND job_id = "
        "(SELECT id FROM jobs WHERE name = ? ORDER BY created_at DESC LIMIT 1)",
        name,
    )
    parts = ("values", "test", "grouping", "parameters")
    return [{**dict(row), **{part: json.loads(row[part] or "null") for part in parts}} for row in found]


def left_running(folder: Path) -> list[str]:
    """Processes that work in the demo's folder, or have it in their command or environment."""
    found = []
    for process in psutil.process_iter():
        try:
            traces = [process.cwd(), *process.cmdline(), *process.environ().values()]
        except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
            continue
        if process.pid != os.getpid() and any(str(folder / ".demo") in trace for trace in traces):
            found.append(f"{process.pid} {process.cmdline()}")
    return found


def run_demo(folder: Path) -> str:
    began = time.monotonic()
    done = subprocess.run(
        DEMO, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - began < GREATEST_SECONDS
    assert done.stderr == ""
    assert left_running(folder) == []
    return done.stdout


def check_front(output: str, folder: Path) -> None:
    on_front = {trial["id"]: trial for trial in trials_of(folder, "demo") if trial["on_front"]}
    table = output.partition("The front:")[2].partition("Tasks:")[0]
    shown = {line.split()[0]: line.split() for line in table.splitlines() if line.startswith("trial_")}
    assert shown  # two trials run at a time, so how many end on the front differs from run to run
    assert shown.keys() == on_front.keys()
    for trial_id, (_, family, _, delta_m, macs, params, error) in shown.items():
        trial = on_front[trial_id]
        assert family == trial["family"]
        assert delta_m == f"{trial['values']['delta_m']:+.2f}"
        assert macs == f"{trial['values']['macs']:,.0f}"
        assert params == f"{trial['values']['params']:,.0f}"
        assert error == f"{trial['test']['total_error'] / 6:.2f}%"


def check_verdict(output: str, folder: Path) -> None:
    """What was confirmed is in SQL, on seeds that the search has not used, and so are the words."""
    [job] = rows(folder, "SELECT * FROM jobs ORDER BY created_at DESC LIMIT 1")
    words = " ".join(output.split())
    assert json.loads(job["verdict"])["words"] in words
    confirmations = rows(folder, "SELECT * FROM confirmations WHERE job_id = ?", job["id"])
    searched = {trial["seed"] for trial in trials_of(folder, "demo")}
    points: dict[str, list[float]] = {}
    for run in confirmations:
        assert run["state"] == "completed"
        assert run["seed"] not in searched
        if run["role"] == "point":
            points.setdefault(run["trial_id"], []).append(json.loads(run["values"])["delta_m"])
    assert points
    on_front = {trial["id"] for trial in trials_of(folder, "demo") if trial["on_front"]}
    for trial_id, gains in points.items():
        assert trial_id in on_front
        assert len(gains) == 5
        assert f"{statistics.mean(gains):+.1f} ± {statistics.stdev(gains):.1f}" in output


def check_snippet(output: str, folder: Path) -> None:
    lines = output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip().startswith("import pathlib"))
    snippet = "\n".join(line.strip() for line in lines[start : start + 3])
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "left_parity" in done.stdout


def test_two_demos_in_a_row_the_first_with_its_port_taken(tmp_path: Path) -> None:
    with port_8000_taken():
        first = run_demo(tmp_path)
    assert "Port 8000 is taken" in first
    assert not re.search(r"page +http://127\.0\.0\.1:8000/", first.partition("Submitted")[0])
    second = run_demo(tmp_path)
    assert re.search(r"page +http://127\.0\.0\.1:8000/", second.partition("Submitted")[0])
    for output in (first, second):
        assert re.search(r"in Ray +http://127\.0\.0\.1:\d+/#/jobs/job_", output)
        assert "coterie serve --data-dir .demo" in output
    check_front(second, tmp_path)
    check_verdict(second, tmp_path)
    check_snippet(second, tmp_path)
    assert [row["state"] for row in rows(tmp_path, "SELECT state FROM jobs")] == ["succeeded"] * 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_demo_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    with subprocess.Popen(
        DEMO,
        cwd=tmp_path,
        env={**environment(), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "demo: running" in line:
                break
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "Interrupted: the job was cancelled and the server stopped.\n"
    assert left_running(tmp_path) == []
    assert [row["state"] for row in rows(tmp_path, "SELECT state FROM jobs")] == ["cancelled"]
