"""The process that plans: what it answers, and what its end means for who waits and for who comes next."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from coterie.search.faults import Fault, SpecError
from coterie.search.spec import JobSpec
from coterie.service import jobs, planner
from coterie.service.planner import Planner, PlannerUnavailable, PlanningFailed
from tests.service.conftest import SPEC, Problem, open_server
from tests.service.live import finished_job, live_server
from tests.service.streams import wait_until

LIGHT_SERVER = Path(__file__).parents[1] / "e2e" / "light_server.py"
SUBMISSION = JobSpec.model_validate(SPEC)
# As the process does, but with functions that do what libraries and plans may do.
ODD_PROCESS = """
import os, time
from coterie.service import planner, planning

def speak():
    print("a library's words")
    os.system("echo those of its child")
    return "answer"

planning.FUNCTIONS = {"speak": speak, "hang": lambda: time.sleep(100)}
planner.main()
"""


@pytest.fixture
def own() -> Iterator[Planner]:
    """One whose process no other test uses."""
    own = Planner()
    yield own
    own.close()


def in_its_place(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Have a shell script started as the process that plans."""
    program = folder / "planner"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o700)
    monkeypatch.setattr(planner.sys, "executable", str(program))


def pid_of(own: Planner) -> int:
    assert own._child is not None
    return own._child._process.pid


def test_a_killed_process_is_replaced_and_nothing_is_lost(own: Planner) -> None:
    directions = own.plan_job(SUBMISSION)
    assert directions["delta_m"] == "maximize"
    first = pid_of(own)
    os.kill(first, signal.SIGKILL)
    assert own.plan_job(SUBMISSION) == directions
    assert pid_of(own) != first
    assert not psutil.pid_exists(first)
    assert own.count_gpus() >= 0


def test_faults_are_told_as_they_were_found(own: Planner) -> None:
    with pytest.raises(SpecError) as raised:
        own.plan_job(JobSpec.model_validate({**SPEC, "tasks": ["left_parity", "parity", "loop"]}))
    found: tuple[Fault, ...] = raised.value.faults
    assert [fault.pointer for fault in found] == ["/tasks/1", "/tasks/2"]
    assert "'parity' is no task of 'digits'" in found[0].detail
    with pytest.raises(PlanningFailed, match="KeyError: 'nothing'"):
        own.catalogue("nothing")  # type: ignore[arg-type]
    assert own.catalogue("backbones")


def test_what_libraries_print_is_no_answer_and_a_plan_does_not_outlive_the_server() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", ODD_PROCESS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write('["speak"]\n["hang"]\n')
        process.stdin.flush()
        assert json.loads(process.stdout.readline()) == {"result": "answer"}
        process.stdin.close()
        assert process.wait(5) == 0
        assert process.stdout.read() == ""
        assert set(process.stderr.read().splitlines()) == {"a library's words", "those of its child"}


def test_a_process_that_ends_at_each_question_is_started_twice(
    own: Planner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    in_its_place(tmp_path, monkeypatch, f"echo started >> {tmp_path}/starts; read question; exit 3")
    with pytest.raises(PlannerUnavailable, match="ended 2 times"):
        own.plan_job(SUBMISSION)
    assert (tmp_path / "starts").read_text() == "started\n" * 2
    assert caplog.text.count("the process that plans jobs ended with code 3") == 2


def test_a_process_that_can_not_be_started_is_told(own: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner.sys, "executable", "/nowhere/python")
    own.start()
    with pytest.raises(PlannerUnavailable, match="no process can be started"):
        own.plan_job(SUBMISSION)


def test_over_http_a_plan_that_takes_too_long_is_ended(
    own: Planner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: Problem
) -> None:
    monkeypatch.setattr(jobs, "PLANNER", own)
    with open_server(tmp_path / "data") as server:
        with monkeypatch.context() as patch:
            in_its_place(tmp_path, patch, "exec sleep 100")
            patch.setattr(planner, "CALL_SECONDS", 0.2)
            document = problem(server.client.post("/v1/jobs", json=SPEC), 503)
            assert document["type"] == "urn:coterie:problem:planner-unavailable"
            assert document["detail"] == "planning took more than 0.2 s, and was ended"
        assert server.client.post("/v1/jobs", json=SPEC).status_code == 201


def test_a_fault_of_ours_is_in_the_log_and_in_no_answer(
    own: Planner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    problem: Problem,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(jobs, "PLANNER", own)
    answer = json.dumps({"traceback": "Traceback:\nKeyError: 'secret'"})
    in_its_place(tmp_path, monkeypatch, f"read question; cat <<'END'\n{answer}\nEND\nread question")
    with open_server(tmp_path / "data") as server:
        document = problem(server.client.post("/v1/jobs", json=SPEC), 500)
    assert "secret" not in str(document)
    assert "KeyError: 'secret'" in caplog.text


def test_who_waits_for_plans_holds_up_nobody_else(
    tmp_path: Path, problem: Problem, monkeypatch: pytest.MonkeyPatch, own: Planner
) -> None:
    """Each that waits for its turn holds one of the server's threads."""
    monkeypatch.setattr(jobs, "PLANNER", own)
    asked = 60
    with live_server(tmp_path) as server, ThreadPoolExecutor(asked) as threads:
        with own._turn:
            answers = [threads.submit(server.client.post, "/v1/jobs", json=SPEC) for _ in range(asked)]
            done, waiting = wait(answers, timeout=2)
            assert len(waiting) == planner.MOST_WAITING
            for answer in done:
                problem(answer.result(), 503)
            began = time.monotonic()
            assert server.client.get("/healthz").status_code == 200
            assert server.client.get("/v1/jobs").status_code == 200
            assert time.monotonic() - began < 1
        assert {answer.result().status_code for answer in waiting} == {201}


@contextmanager
def light_server(data_dir: Path) -> Iterator[tuple[psutil.Process, httpx.Client]]:
    """A real server in a process of its own, with light jobs."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COTERIE_")}
    with subprocess.Popen(
        [sys.executable, str(LIGHT_SERVER), str(data_dir)],
        env={**environment, "COTERIE_MIN_FREE_BYTES": "0"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            with httpx.Client(base_url=url, timeout=60) as client:
                yield psutil.Process(process.pid), client
        finally:
            process.kill()


def planner_of(server: psutil.Process) -> psutil.Process:
    [found] = [child for child in server.children() if planner.__name__ in child.cmdline()]
    return found


def test_a_server_never_loads_torch_and_its_planner_ends_with_it(tmp_path: Path) -> None:
    with live_server(tmp_path) as live:
        finished = finished_job(live)
    with light_server(tmp_path) as (server, client):
        wait_until(lambda: any(planner.__name__ in child.cmdline() for child in server.children()))
        first = planner_of(server)  # it starts before anyone asks
        for path in (
            *("datasets", "families", "backbones", "metrics"),
            *(f"jobs/{finished}/{part}" for part in ("front", "affinity", "references", "trials")),
        ):
            answer = client.get(f"/v1/{path}")
            assert answer.status_code == 200, answer.text
        assert client.get(f"/v1/jobs/{finished}/affinity").json()["items"]
        assert client.post("/v1/jobs", json=SPEC).status_code == 201
        assert planner_of(server) == first
        first.kill()
        assert client.post("/v1/jobs", json=SPEC).status_code == 201
        assert client.get("/v1/families").json()["items"]
        second = planner_of(server)
        assert second != first
        loaded = Path(f"/proc/{server.pid}/maps").read_text()
        assert "pydantic_core" in loaded
        assert "libtorch" not in loaded
        assert "libtorch" in Path(f"/proc/{second.pid}/maps").read_text()
        server.kill()
        assert psutil.wait_procs([second], timeout=5)[1] == []


def test_a_server_that_stops_ends_its_planner(tmp_path: Path) -> None:
    with light_server(tmp_path) as (server, client):
        assert client.post("/v1/jobs", json=SPEC).status_code == 201
        children = [planner_of(server)]
        server.send_signal(signal.SIGINT)
        server.wait(30)
        assert psutil.wait_procs(children, timeout=0.1)[1] == []
