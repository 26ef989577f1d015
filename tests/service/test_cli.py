"""The command line: the real one, as a subprocess, against a real server."""

import csv
import fcntl
import io
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from onnxruntime import InferenceSession
from rich.console import Console

from coterie.models.export import load_architecture
from coterie.search.store import JobState, Verdict, VerdictKind
from coterie.service import VERSION, console
from coterie.service.client import Client
from tests.service.conftest import SPEC
from tests.service.live import ALL, VERDICT, LiveServer, add_trial, finished_job, live_server

COTERIE = [sys.executable, "-m", "coterie.service.cli"]
TRIAL = "trial_0000000000000000"
CLOSED = "http://127.0.0.1:9"  # the discard port: nobody listens


@pytest.fixture(autouse=True)
def _heard_interrupts() -> None:
    """A shell's background jobs ignore Ctrl-C, and so would their children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("live") / "data") as server:
        yield server


@pytest.fixture(scope="module")
def job(live: LiveServer) -> str:
    return finished_job(live)


def environment(server: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COTERIE_")}
    return {**kept, "COTERIE_SERVER": server, "NO_COLOR": "1"}


def coterie(
    *arguments: str, server: str = CLOSED, cwd: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*COTERIE, *arguments],
        capture_output=True,
        text=True,
        env=environment(server),
        cwd=cwd,
        timeout=60,
        check=False,
    )


def write_job(folder: Path, **fields: object) -> str:
    path = folder / "job.json"
    path.write_text(json.dumps({**SPEC, **fields}))
    return str(path)


def test_the_version() -> None:
    assert coterie("--version").stdout == f"coterie {VERSION}\n"


def test_help_names_every_command() -> None:
    shown = coterie("--help").stdout
    for command in (
        "serve",
        "demo",
        "submit",
        "jobs",
        "show",
        "logs",
        "front",
        "affinity",
        "best",
        "export",
        "cancel",
        "pause",
        "resume",
        "delete",
        "priority",
        "events",
        "datasets",
        "gc",
        "audit",
        "db",
        "token",
        "tenant",
        "webhook",
    ):
        assert f" {command} " in shown


@pytest.mark.parametrize("arguments", ["--help", "jobs --help", "jobs", "cancel x"])
def test_commands_that_only_ask_the_server_import_nothing_heavy(arguments: str) -> None:
    code = (
        "import sys, atexit, coterie.service.cli as cli\n"
        "heavy = ('torch', 'ray', 'numpy', 'sqlalchemy', 'fastapi')\n"
        "atexit.register(lambda: print('heavy:', [name for name in heavy if name in sys.modules]))\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments.split()],
        capture_output=True,
        text=True,
        env=environment(CLOSED),
        check=False,
    )
    assert "heavy: []" in done.stdout


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        ("jobs", {"id", "state", "progress"}),
        ("show {job}", {"id", "state", "progress"}),
        ("front {job}", {"objectives", "points", "hypervolume"}),
        ("best {job}", {"id", "family", "values"}),
        ("affinity {job}", {"method", "tasks", "matrix", "standard_error"}),
        ("datasets", {"name", "tasks"}),
    ],
)
def test_json_is_what_the_api_says(live: LiveServer, job: str, command: str, keys: set[str]) -> None:
    done = coterie(*command.format(job=job).split(), "--json", server=live.url)
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert keys <= set(document[0] if isinstance(document, list) else document)


def test_jobs_are_listed_with_whole_ids(live: LiveServer, job: str) -> None:
    done = coterie("jobs", server=live.url)
    line = next(line for line in done.stdout.splitlines() if job in line)
    assert line.split()[:3] == [job, "succeeded", "4/4"]
    assert coterie("jobs", "--state", "paused", server=live.url).stdout == ""


def test_a_job_in_full(live: LiveServer, job: str) -> None:
    shown = coterie("show", job, server=live.url).stdout
    assert "succeeded" in shown
    assert "4 completed" in shown
    assert "single, shared, grouped, dmtg" in shown
    assert VERDICT in shown


def test_the_front_says_what_the_api_says(live: LiveServer, job: str) -> None:
    with Client(live.url) as client:
        points = client.job(job).front()["points"]
    lines = coterie("front", job, server=live.url).stdout.splitlines()
    assert lines[0].split() == ["trial", "family", "grouping", "delta_m", "macs", "params", "test", "error"]
    for point in points:
        line = next(line for line in lines if line.startswith(point["trial_id"])).split()
        assert line[1] == point["family"]
        assert float(line[3]) == point["values"]["delta_m"]
        assert line[4].replace(",", "") == f"{point['values']['macs']:.0f}"
        assert line[5].replace(",", "") == f"{point['values']['params']:.0f}"
        assert line[6] == f"{point['test']['total_error'] / 6:.2f}%"
    assert [line.split()[2] for line in lines[1:4]] == ["A|B|C|D|E|F", "ABC|DEF", "ABCDEF"]
    assert lines[4] == "Tasks: " + ", ".join(
        f"{letter} {name}" for letter, name in zip("ABCDEF", ALL, strict=True)
    )


def test_the_front_says_what_fresh_seeds_gave_and_what_is_noise(live: LiveServer, job: str) -> None:
    with Client(live.url) as client:
        points = [point for point in client.job(job).front()["points"] if point["confirmed"]]
    assert [point["confirmed"]["over_shared"]["within_noise"] for point in points] == [False, True]
    lines = coterie("front", job, server=live.url).stdout.splitlines()
    told = lines[lines.index("") + 1 :]
    assert told[0].startswith("Trained again with 3 fresh seeds: mean ± standard deviation")
    assert told[1].split() == ["trial", "delta_m", "test", "delta_m", "over", "shared"]
    gain = points[0]["confirmed"]["over_shared"]
    assert re.split("  +", told[2]) == [
        points[0]["trial_id"],
        "+4.0 ± 0.5",
        "+3.0 ± 0.5",
        f"+10.0 ({gain['low']:+.1f} to {gain['high']:+.1f})",
    ]
    assert re.split("  +", told[3])[:3] == [points[1]["trial_id"], "-2.0 ± 1.5", "-3.0 ± 1.5"]
    assert " noise (-" in told[3]


def test_affinities_are_a_table_a_method(live: LiveServer, job: str) -> None:
    lines = coterie("affinity", job, server=live.url).stdout.splitlines()
    assert lines[0] == "one_step  mlp, 20 epochs, 2 seeds, train split"
    assert "In units of 1e-5." in lines[1]
    assert lines[2].split() == [*"ABCDEF"]
    assert lines[3].split() == ["A", ALL[0], "-15.0", "-30.0", "-45.0", "-60.0", "-75.0"]
    assert lines[4].split() == ["±5.0", "±10.0", "±15.0", "±20.0", "±25.0"]
    pairwise = lines[lines.index("") + 1 :]
    assert pairwise[0] == "pairwise  mlp, 20 epochs, 2 seeds, validation split"
    assert pairwise[3].split() == ["A", ALL[0], "-50.0", *"----"]
    assert pairwise[5].split() == ["B", ALL[1], "+20.0", *"----"]
    assert pairwise[6].split() == ["±10.0"]


def test_a_job_that_measured_no_affinity_says_so(live: LiveServer) -> None:
    job_id = live.submit()
    done = coterie("affinity", job_id, server=live.url)
    assert (done.returncode, done.stdout) == (0, "")
    assert "Nothing was measured" in done.stderr
    live.client.post(f"/v1/jobs/{job_id}/cancel")


def test_the_front_as_csv(live: LiveServer, job: str) -> None:
    done = coterie("front", job, "--csv", server=live.url)
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["family"] for row in rows] == ["single", "grouped", "shared"]
    assert rows[1]["grouping"] == "left_parity left_large left_loop|right_parity right_large right_loop"
    assert float(rows[1]["delta_m"]) == 4.0
    assert float(rows[1]["test_delta_m"]) == 3.0
    assert [row["confirmed_seeds"] for row in rows] == ["", "3", "3"]
    assert float(rows[1]["confirmed_delta_m_mean"]) == 4.0
    assert float(rows[1]["confirmed_test_delta_m_std"]) == 0.5
    assert [row["over_shared_within_noise"] for row in rows] == ["", "False", "True"]


def test_a_front_within_limits(live: LiveServer, job: str) -> None:
    shown = coterie("front", job, "--max-macs", "2000", server=live.url).stdout
    assert "shared" in shown
    assert "single" not in shown
    nothing = coterie("front", job, "--max-macs", "1", server=live.url)
    assert (nothing.returncode, nothing.stdout) == (0, "")


def test_the_best_trial_under_a_limit(live: LiveServer, job: str) -> None:
    done = coterie("best", job, "--max-macs", "3000", server=live.url)
    assert done.stdout.startswith("trial_0000000000000001\n")
    assert "delta_m +4.00" in done.stdout
    missed = coterie("best", job, "--max-params", "1", server=live.url)
    assert missed.returncode == 2
    assert "nearest is trial_0000000000000002" in missed.stderr


def test_an_exported_network_loads(live: LiveServer, job: str, tmp_path: Path) -> None:
    done = coterie("export", TRIAL, "-o", "network", server=live.url, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "network\n")
    network = load_architecture(tmp_path / "network")
    assert set(network(torch.zeros(1, 12, 12))) == set(ALL)
    coterie("export", TRIAL, "-o", "only.safetensors", server=live.url, cwd=tmp_path)
    weights = (tmp_path / "network" / "weights.safetensors").read_bytes()
    assert (tmp_path / "only.safetensors").read_bytes() == weights
    assert coterie("export", TRIAL, server=live.url, cwd=tmp_path).stdout == f"{TRIAL}\n"


def test_a_network_is_exported_whole_by_its_files_ending_or_by_its_format(
    live: LiveServer, job: str, tmp_path: Path
) -> None:
    done = coterie("export", TRIAL, "-o", "network.onnx", server=live.url, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "network.onnx\n")
    outputs = InferenceSession(tmp_path / "network.onnx").get_outputs()
    assert {output.name for output in outputs} == set(ALL)
    done = coterie("export", TRIAL, "--format", "pt2", server=live.url, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{TRIAL}.pt2\n")
    assert set(torch.export.load(tmp_path / f"{TRIAL}.pt2").module()(torch.zeros(1, 12, 12))) == set(ALL)


def test_a_job_is_submitted_and_cancelled(live: LiveServer, tmp_path: Path) -> None:
    submitted = coterie("submit", write_job(tmp_path), server=live.url)
    job_id = submitted.stdout.strip()
    assert job_id.startswith("job_")
    assert coterie("cancel", job_id, server=live.url).stdout == f"{job_id}: cancelled\n"
    again = coterie("cancel", job_id, server=live.url)
    assert again.returncode == 2
    assert "cancelled" in again.stderr


def test_a_job_is_deleted_where_that_is_confirmed(live: LiveServer) -> None:
    job_id = live.submit()
    refused = coterie("delete", job_id, "--yes", server=live.url)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "is queued: only a job that has ended can be deleted" in refused.stderr
    live.client.post(f"/v1/jobs/{job_id}/cancel")
    unsure = coterie("delete", job_id, server=live.url)
    assert (unsure.returncode, unsure.stdout) == (2, "")
    assert "--yes" in unsure.stderr
    assert coterie("show", job_id, server=live.url).returncode == 0
    assert coterie("delete", job_id, "--yes", server=live.url).stdout == f"{job_id}: deleted\n"
    assert coterie("show", job_id, server=live.url).returncode == 2


def test_the_queue_is_shown_and_reordered(live: LiveServer) -> None:
    first, second = live.submit(name="first"), live.submit(name="second")
    assert coterie("priority", second, "-5", server=live.url).stdout == f"{second}: queued\n"
    listed = coterie("jobs", "--state", "queued", server=live.url).stdout
    assert re.search(rf"{first} +queued \(1\)", listed)
    assert re.search(rf"{second} +queued \(2\)", listed)
    moved = json.loads(coterie("priority", second, "7", "--json", server=live.url).stdout)
    assert (moved["priority"], moved["spec"]["priority"], moved["queue"]["position"]) == (7, 0, 1)
    assert re.search(r"queue +place 1", coterie("show", second, server=live.url).stdout)
    refused = coterie("priority", first, "1001", server=live.url)
    assert refused.returncode == 2
    assert "/priority" in refused.stderr
    for job_id in (first, second):
        live.client.post(f"/v1/jobs/{job_id}/cancel")
    refused = coterie("priority", first, "1", server=live.url)
    assert "is cancelled: its priority can't be changed any more" in refused.stderr


def test_a_job_is_paused_and_resumed(live: LiveServer) -> None:
    job_id = live.submit()
    assert coterie("pause", job_id, server=live.url).stdout == f"{job_id}: paused\n"
    again = coterie("pause", job_id, server=live.url)
    assert (again.returncode, again.stdout) == (2, "")
    assert "is paused: only a queued or running job can be paused" in again.stderr
    assert coterie("jobs", "--state", "paused", server=live.url).stdout.split()[5:7] == [job_id, "paused"]
    assert json.loads(coterie("resume", job_id, "--json", server=live.url).stdout)["state"] == "queued"
    live.client.post(f"/v1/jobs/{job_id}/cancel")


def test_a_bad_job_is_refused_at_its_lines(live: LiveServer, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("dataset: {source: digits}\nbudget:\n  trials: -1\nsurprise: 1\n")
    done = coterie("submit", str(path), server=live.url)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{path}:3: /budget/trials: " in done.stderr
    assert f"{path}:4: /surprise: " in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        "show job_0",
        "front job_0",
        "logs job_0",
        "affinity job_0",
        "cancel ../x",
        "pause job_0",
        "resume job_0",
        "export trial_0",
        "jobs --state done",
        "jobs --limit 0",
        "submit nowhere.yaml",
        "front {job} --json --csv",
        "export {trial} --format pickle",
        "export {trial} -o /proc/nowhere",
        "best {job} --metric beauty",
        "jobs --server localhost",
        "jobs --server http://127.0.0.1:9",
        "dance",
        "show",
        "serve --port 70000",
    ],
)
def test_wrong_use_is_code_2_with_words_and_no_trace(
    live: LiveServer, job: str, command: str, tmp_path: Path
) -> None:
    done = coterie(*command.format(job=job, trial=TRIAL).split(), server=live.url, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.strip()
    assert "Traceback" not in done.stderr


def test_no_server_is_said_with_what_to_do() -> None:
    done = coterie("jobs", server=CLOSED)
    assert f"No server answers at {CLOSED}" in done.stderr
    assert "coterie serve" in done.stderr


def end_next_job(live: LiveServer, state: JobState, *, trials: int = 1) -> threading.Thread:
    """Run the next job that comes, with one trial or none, as a driver would."""

    def drive() -> None:
        deadline = time.monotonic() + 30
        while not (queued := live.client.get("/v1/jobs?state=queued").json()["items"]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        store = live.claim()
        number = 100 + len(live.client.get("/v1/jobs").json()["items"])
        job_id = queued[0]["id"]
        if trials:
            add_trial(live, store, job_id, number, family="shared", groups=[ALL], delta_m=1.5)
        if state is JobState.SUCCEEDED:
            store.set_verdict(Verdict(kind=VerdictKind.TOGETHER, words=VERDICT))
        time.sleep(0.3)
        store.finish(state, "because" if state is JobState.FAILED else None)

    thread = threading.Thread(target=drive)
    thread.start()
    return thread


@pytest.mark.parametrize(("state", "code"), [(JobState.SUCCEEDED, 0), (JobState.FAILED, 1)])
def test_watching_shows_plain_lines_and_ends_with_the_jobs_code(
    live: LiveServer, tmp_path: Path, state: JobState, code: int
) -> None:
    driver = end_next_job(live, state)
    done = coterie("submit", write_job(tmp_path, name="watched"), "--watch", server=live.url)
    driver.join()
    assert done.returncode == code
    lines = done.stderr.splitlines()
    assert lines[0].startswith("Submitted job_")
    assert all(line.startswith(("watched: ", "job_")) for line in lines[1:])
    assert "\x1b" not in done.stdout + done.stderr
    assert f"watched: {state}, 1 of 4 trials, best delta_m +1.50" in lines
    assert done.stdout.startswith("trial ")
    if state is JobState.FAILED:
        assert lines[-1].endswith(": failed, because")
    else:
        assert done.stdout.endswith(f"\n\n{VERDICT}\n")


def test_watching_a_job_that_reached_nothing_shows_no_table(live: LiveServer, tmp_path: Path) -> None:
    driver = end_next_job(live, JobState.FAILED, trials=0)
    done = coterie("submit", write_job(tmp_path), "--watch", server=live.url)
    driver.join()
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith(": failed, because\n")


def test_watching_with_json_prints_the_job_that_ended(live: LiveServer, tmp_path: Path) -> None:
    driver = end_next_job(live, JobState.SUCCEEDED)
    done = coterie("submit", write_job(tmp_path), "--watch", "--json", server=live.url)
    driver.join()
    assert json.loads(done.stdout)["state"] == "succeeded"


def test_ctrl_c_stops_the_watching_and_not_the_job(live: LiveServer, tmp_path: Path) -> None:
    with subprocess.Popen(
        [*COTERIE, "submit", write_job(tmp_path), "--watch"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(live.url),
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("Submitted job_")
        assert "queued" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=10)
    assert process.returncode == 130
    job_id = said.split("coterie cancel ")[1].split("`")[0]
    assert "the job goes on" in said
    with Client(live.url) as client:
        assert client.job(job_id).state == "queued"
        client.job(job_id).cancel()


def on_a_terminal(*arguments: str, server: str, columns: int) -> str:
    """What a command writes to a terminal of this width."""
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.execve(sys.executable, [*COTERIE, *arguments], {**environment(server), "TERM": "xterm"})
    written = b""
    while True:
        try:
            written += os.read(terminal, 4096)
        except OSError:  # how Linux says that the other side is gone
            break
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return written.decode().replace("\r\n", "\n")


def without_styles(text: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).splitlines()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_ids_stay_whole_on_a_narrow_terminal(live: LiveServer, job: str) -> None:
    assert TRIAL in on_a_terminal("front", job, server=live.url, columns=40)
    assert job in on_a_terminal("jobs", server=live.url, columns=40)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("command", ["front", "affinity", "show"])
def test_what_is_known_of_a_job_fits_80_columns(live: LiveServer, job: str, command: str) -> None:
    lines = without_styles(on_a_terminal(command, job, server=live.url, columns=80))
    assert max(map(len, map(str.rstrip, lines))) <= 80


@pytest.mark.parametrize(("tasks", "width"), [(6, 80), (9, 80), (40, 80), (3, 40)])
def test_affinities_of_many_tasks_with_long_names_fit_the_terminal(tasks: int, width: int) -> None:
    names = [f"{'a long name of a task, number ' * 3}{number}" for number in range(tasks)]
    matrix = [[-123.44 if i != j else None for j in range(tasks)] for i in range(tasks)]
    item = {
        "method": "pairwise",
        "description": "Gain.",
        "tasks": names,
        "backbone": "mlp",
        "epochs": 20,
        "seeds": 2,
        "split": "validation",
        "matrix": matrix,
        "standard_error": [[None if cell is None else 99.96 for cell in row] for row in matrix],
    }
    shown = Console(file=io.StringIO(), width=width, highlight=False)
    console.show_affinities(shown, [item])
    assert isinstance(shown.file, io.StringIO)
    written = shown.file.getvalue()
    assert max(len(line.rstrip()) for line in written.splitlines()) <= width
    assert written.count("-123.4") == written.count("±100.0") == tasks * (tasks - 1)
    assert all(f"er {number} " in written for number in range(tasks))


def test_affinities_of_one_seed_speak_of_no_spread() -> None:
    item = {
        "method": "pairwise",
        "description": "Gain.",
        "tasks": ["one", "two"],
        "backbone": "mlp",
        "epochs": 20,
        "seeds": 1,
        "split": "validation",
        "matrix": [[None, 5.0], [-2.0, None]],
        "standard_error": [[None, None], [None, None]],
    }
    shown = Console(file=io.StringIO(), width=80, highlight=False)
    console.show_affinities(shown, [item])
    assert isinstance(shown.file, io.StringIO)
    assert shown.file.getvalue().splitlines()[:2] == [
        "pairwise  mlp, 20 epochs, 1 seed, validation split",
        "Gain.",
    ]


def test_points_of_much_noise_fit_80_columns(live: LiveServer, job: str) -> None:
    with Client(live.url) as client:
        front = client.job(job).front()
    for found in (point["confirmed"] for point in front["points"] if point["confirmed"]):
        found["validation"]["delta_m"] = {"mean": -116.25, "std": 110.37}
        found["test"]["delta_m"] = {"mean": -116.25, "std": 110.37}
        found["over_shared"] |= {"low": -118.57, "high": 101.79, "within_noise": True}
    shown = Console(file=io.StringIO(), width=80, highlight=False)
    console.show_front(shown, front)
    assert isinstance(shown.file, io.StringIO)
    lines = shown.file.getvalue().splitlines()
    assert any(line.endswith("noise (-118.6 to +101.8)") for line in lines)
    assert max(len(line.rstrip()) for line in lines) <= 80


def test_a_closed_pipe_ends_quietly(live: LiveServer, job: str) -> None:
    command = f"{sys.executable} -m coterie.service.cli front {job} --csv | head -c 1"
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, env=environment(live.url), check=False
    )
    assert "Traceback" not in done.stderr


def test_a_data_folder_in_use_is_said_with_whom(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        json.dump({"pid": 4711, "url": "http://127.0.0.1:8000"}, lock)
        lock.flush()
        done = coterie("serve", "--port", "0", "--data-dir", str(tmp_path))
        others = [
            coterie("db", "upgrade", "--data-dir", str(tmp_path)),
            coterie("demo", "--data-dir", str(tmp_path)),
        ]
    assert [each.returncode for each in (done, *others)] == [2, 2, 2]
    assert "process 4711, which serves http://127.0.0.1:8000" in done.stderr
    assert "--data-dir" in done.stderr


def test_a_busy_port_is_said_with_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = coterie("serve", "--port", str(port), "--data-dir", str(tmp_path))
    assert done.returncode == 2
    assert f"Port {port} of 127.0.0.1 is in use" in done.stderr
    assert f"--port {port + 1}" in done.stderr
    assert not (tmp_path / "coterie.db").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "coterie token create --role admin --data-dir"),
        (["--host", "::"], "coterie token create --role admin --data-dir"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--data-dir", "/proc/nowhere"], "can't be used"),
    ],
)
def test_a_server_that_may_not_start_says_why(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = coterie("serve", "--port", "0", "--data-dir", str(tmp_path), *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_settings_are_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COTERIE, "serve", "--data-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**environment(CLOSED), "COTERIE_LEASE_SECONDS": "soon"},
        check=False,
    )
    assert done.returncode == 2
    assert "lease_seconds" in done.stderr


def test_a_database_is_made_and_brought_up_to_date(tmp_path: Path) -> None:
    for _ in range(2):
        done = coterie("db", "upgrade", "--data-dir", str(tmp_path))
        assert (done.returncode, done.stdout) == (0, "The database is up to date.\n")
    assert (tmp_path / "coterie.db").exists()
