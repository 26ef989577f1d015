"""`coterie demo`: a search from beginning to end, over HTTP, with a server of its own.

The search names a grouping; whether it is any good is another question, so it is put to the test: the
grouping, and one network shared by all tasks of no fewer macs, are trained again on fresh seeds.
"""

import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from types import FrameType

import yaml
from rich.console import Console

from coterie.models.backbones import MLP
from coterie.models.cost import count_cost
from coterie.models.families import Shared
from coterie.models.tasks import Task, TaskKind, TaskSet
from coterie.service.client import ApiError, Client, Document, Job, Trial, Unreachable
from coterie.service.console import figure, mean_error, show_front, watch
from coterie.service.ray_head import TOKEN_FILE, end_leftovers
from coterie.service.serving import locked, owner_of

NAME = "demo"
PORT = 8000
JOB_FILE = "demo.yaml"
SERVER_LOG = "server.log"
NETWORK_FOLDER = "network"

READY_SECONDS = 120.0  # Ray takes 3 to 10 s to start, more on a busy machine
STOP_SECONDS = 60.0
POLL_SECONDS = 0.2
DASHBOARD_SECONDS = 10.0
LOG_LINES = 20

SEEDS = 3  # fresh trainings of each side of the test
GROUPING_FAMILIES = ("grouped", "affinity", "dmtg")
# What both sides of the test have in common.
RECIPE = ("depth", "lr", "weight_decay", "batch_size", "balancing")
TEST_NAMES = {"grouped": "demo: the grouping", "shared": "demo: shared"}


class DemoFailed(Exception):
    """The demo could not be run to its end."""


@dataclass(frozen=True)
class Runs:
    """Trainings of one candidate with fresh seeds.

    Attributes:
        trials: Those that completed.
    """

    trials: Sequence[Trial]

    @property
    def gains(self) -> list[float]:
        """delta_m of each on the validation split."""
        return [_value(trial, "delta_m") for trial in self.trials]

    @property
    def best(self) -> Trial:
        """The one of the highest delta_m on the validation split."""
        return max(self.trials, key=lambda trial: _value(trial, "delta_m"))

    def describe(self) -> str:
        """Gain, cost and error in words."""
        gain, spread = statistics.mean(self.gains), statistics.stdev(self.gains)
        error = statistics.mean(mean_error(trial.test) or 0.0 for trial in self.trials)
        macs = figure("macs", _value(self.trials[0], "macs"))
        return f"delta_m {gain:+.2f} ± {spread:.2f}, {macs} macs, test error {error:.2f}%"


@dataclass(frozen=True)
class Conclusion:
    """What the demo recommends.

    Attributes:
        sentence: Says it, and why.
        trial: The network that goes with it.
    """

    sentence: str
    trial: Trial


def run(console: Console, folder: Path) -> None:
    """Run the demo and keep what it makes in `folder`.

    Raises:
        CannotServe: If a server is at work on the folder.
        DemoFailed: If the server does not get ready, or a job fails.
        KeyboardInterrupt: On SIGINT, SIGTERM and SIGHUP, once everything it started has ended.
    """
    began = time.monotonic()
    with (
        _signals_interrupt(),
        _server(console, folder) as url,
        Client(url) as client,
        jobs_cancelled(client),
    ):
        job = _search(console, client, folder)
        console.print("\nThe front: no other trial has both a higher delta_m and fewer macs.\n")
        show_front(console, job.front())
        conclusion = _conclude(console, client, job)
        conclusion.trial.download(folder / NETWORK_FOLDER)
        console.print(f"\n{conclusion.sentence}", soft_wrap=False)
        console.print("\nStopping the server ...")
    _show_what_is_left(console, folder, conclusion.trial)
    console.print(f"\nDone in {time.monotonic() - began:.0f} s; nothing is left running.")


def _search(console: Console, client: Client, folder: Path) -> Job:
    """Run the built-in job."""
    spec = yaml.safe_load(files("coterie.service").joinpath(JOB_FILE).read_text(encoding="utf-8"))
    job = client.submit(spec)
    trials, epochs = job.document["spec"]["budget"]["trials"], job.document["spec"]["budget"]["epochs"]
    console.print(f"Submitted {job.id}: {trials} trials of {epochs} epochs on {spec['dataset']['source']}.")
    if dashboard := _dashboard(job):
        console.print(f"  in Ray         {dashboard}\n  Ray's token    {folder / TOKEN_FILE}")
    watch(console, job)
    if job.state != "succeeded":
        raise DemoFailed(f"The job {job.state}: {job.reason}\n{job.logs(LOG_LINES)}")
    return job


def _dashboard(job: Job) -> str | None:
    """The job's page in the Ray dashboard, which it has once it was submitted there."""
    deadline = time.monotonic() + DASHBOARD_SECONDS
    while job.document["links"]["ray_dashboard"] is None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        job.refresh()
    link: str | None = job.document["links"]["ray_dashboard"]
    return link


def _conclude(console: Console, client: Client, job: Job) -> Conclusion:
    """Put the best grouping that was found to the test."""
    fallback = job.best(metric="delta_m")
    candidate = best_grouping(job)
    if candidate is None:
        return Conclusion("No trial grouped the tasks, so there is no grouping to recommend.", fallback)
    width = matching_width(candidate)
    if width is None:
        return Conclusion(
            "Whether the best grouping pays can't be told: no `shared` network is as large as it.",
            fallback,
        )
    console.print(
        f"\nThe best grouping found is {spell(candidate)} ({candidate.id}). "
        f"Does it beat one network for all tasks, {width} features wide? "
        f"Training both on {SEEDS} fresh seeds.\n",
        soft_wrap=False,
    )
    recipe = {name: candidate.document["candidate"][name] for name in RECIPE}
    split, own_width = (candidate.document["candidate"][name] for name in ("split", "width"))
    grouped = {**recipe, "width": own_width, "split": split, "grouping": [candidate.grouping]}
    tests = [
        client.submit(test_spec(job, "grouped", grouped)),
        client.submit(test_spec(job, "shared", {**recipe, "width": width})),
    ]
    of_grouping, of_shared = (_runs(watch(console, test)) for test in tests)
    return judge(candidate, of_grouping, of_shared, fallback)


def best_grouping(job: Job) -> Trial | None:
    """The trial of the highest delta_m that has groups in earnest: of the front, or else of all."""
    trials = [trial for trial in job.trials(state="completed") if _is_grouping(trial)]
    on_front = [trial for trial in trials if trial.document["on_front"]]
    return max(on_front or trials, key=lambda trial: _value(trial, "delta_m"), default=None)


def _is_grouping(trial: Trial) -> bool:
    """Neither all tasks together nor each alone."""
    groups = trial.grouping or []
    return trial.family in GROUPING_FAMILIES and 1 < len(groups) < sum(map(len, groups))


def matching_width(candidate: Trial) -> int | None:
    """The least width of the backbone at which `shared` has at least the candidate's macs."""
    architecture = candidate.architecture()
    backbone = MLP.from_dict(architecture["backbone"])
    tasks = TaskSet(
        Task(name=task["name"], kind=TaskKind(task["kind"]), outputs=task["outputs"])
        for task in architecture["tasks"]
    )
    for width in sorted(MLP.choices["width"]):
        wider = replace(backbone, width=int(width))
        shared = Shared(backbone=wider, tasks=tasks).prune()
        if count_cost(shared, wider.input_shape).macs >= _value(candidate, "macs"):
            return wider.width
    return None


def test_spec(job: Job, family: str, parameters: Document) -> Document:
    """A job that trains one candidate on seeds that the search has not used."""
    spec = job.document["spec"]
    return {
        "name": TEST_NAMES[family],
        **{part: spec[part] for part in ("dataset", "tasks", "objectives", "resources")},
        "search": {
            "families": [family],
            "backbones": spec["search"]["backbones"],
            "space": {family: parameters},
            "sampler": {"name": "random"},
        },
        "budget": {"trials": SEEDS, "epochs": spec["budget"]["epochs"]},
        "seed": spec["seed"] + 1,
    }


def _runs(job: Job) -> Runs:
    trials = list(job.trials(state="completed"))
    if len(trials) != SEEDS:
        raise DemoFailed(
            f"{job.document['name']}: {len(trials)} of {SEEDS} runs completed\n{job.logs(LOG_LINES)}"
        )
    return Runs(trials)


def judge(candidate: Trial, grouped: Runs, shared: Runs, fallback: Trial) -> Conclusion:
    """Recommend a side only if each of its runs has a higher delta_m than every run of the other.

    Args:
        candidate: Where the grouping comes from.
        grouped: Its runs.
        shared: The runs of one network for all tasks.
        fallback: The network to show where neither side wins.
    """
    figures = f"the grouping {grouped.describe()}; shared {shared.describe()}"
    if min(grouped.gains) > max(shared.gains):
        sentence = (
            f"Recommended: the grouping {spell(candidate)}, because on fresh seeds each of its {SEEDS} "
            "runs has a higher delta_m than every run of one shared network of no fewer macs "
            f"({figures})."
        )
        return Conclusion(sentence, grouped.best)
    if min(shared.gains) > max(grouped.gains):
        sentence = (
            f"No grouping is recommended: on fresh seeds each of {SEEDS} runs of one shared network of no "
            "fewer macs has a higher delta_m than every run of the best grouping found; whether another one "
            f"pays, or this one at equal macs, can't be told at this budget ({figures})."
        )
        return Conclusion(sentence, shared.best)
    sentence = (
        "Whether the grouping pays can't be told at this budget: on fresh seeds neither side has a higher "
        f"delta_m in all of its {SEEDS} runs ({figures})."
    )
    return Conclusion(sentence, fallback)


def spell(trial: Trial) -> str:
    """A trial's groups in words."""
    return " and ".join("{" + ", ".join(group) + "}" for group in trial.grouping or [])


def _value(trial: Trial, metric: str) -> float:
    value = trial.values[metric]
    assert value is not None, f"{trial.id} completed without {metric}"
    return value


def _show_what_is_left(console: Console, folder: Path, trial: Trial) -> None:
    bin_folder = os.path.relpath(Path(sys.executable).parent)
    shape = ", ".join(map(str, [1, *_input_shape(folder)]))
    url = f"http://127.0.0.1:{PORT}"
    prose = (
        f"Kept in {folder}: the database coterie.db, the networks of all trials, the server's log, and in "
        f"{folder / NETWORK_FOLDER} the network of {trial.id} ({trial.family}). With {bin_folder}/python:"
    )
    console.print(f"\n{prose}\n", soft_wrap=False)
    for line in (
        "    import pathlib, torch",
        "    from coterie.models.export import load_architecture",
        f'    print(load_architecture(pathlib.Path("{folder / NETWORK_FOLDER}"))(torch.zeros({shape})))',
        "",
        "To look at the jobs again, or submit your own:",
        "",
        f"    {bin_folder}/coterie serve --data-dir {folder}",
        "",
        f"    page           {url}/",
        f"    API docs       {url}/docs",
        f"    Ray dashboard  where the server says; its token: {folder / TOKEN_FILE}",
    ):
        console.print(line)


def _input_shape(folder: Path) -> list[int]:
    document = yaml.safe_load((folder / NETWORK_FOLDER / "architecture.json").read_text(encoding="utf-8"))
    return list(document["backbone"]["input_shape"])


@contextmanager
def _server(console: Console, folder: Path) -> Iterator[str]:
    """A server of our own on `folder`, ready for jobs; it ends with the block."""
    with locked(folder):
        pass  # else the server would have to say so in its log
    port = PORT if _is_free(PORT) else 0
    if port != PORT:
        console.print(f"Port {PORT} is taken: the server gets another one.")
    command = [
        sys.executable,
        "-m",
        "coterie.service.cli",
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with (folder / SERVER_LOG).open("w") as log:
        process = subprocess.Popen(
            [*command, "--data-dir", str(folder.absolute())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={name: value for name, value in os.environ.items() if not name.startswith("COTERIE_")},
            cwd=folder,  # where no .env of the user's is
            start_new_session=True,  # Ctrl-C is for us: the job is cancelled before the server is stopped
        )
    try:
        yield _wait_until_ready(console, process, folder)
    finally:
        _end(process, folder)


def _wait_until_ready(console: Console, process: "subprocess.Popen[bytes]", folder: Path) -> str:
    console.print("Starting a server and its Ray ...")
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        owner = owner_of(folder)
        if owner is not None and owner[0] == process.pid and _is_ready(owner[1]):
            console.print(f"  page           {owner[1]}/\n  API docs       {owner[1]}/docs")
            return owner[1]
        time.sleep(POLL_SECONDS)
    log = (folder / SERVER_LOG).read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    raise DemoFailed("\n".join(["The server did not get ready. Its log ends with:", *log]))


def _is_ready(url: str) -> bool:
    with Client(url, timeout=5.0) as client:
        try:
            client.ready()
        except (Unreachable, ApiError):
            return False
        return True


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except OSError:
            return False
        return True


def _end(process: "subprocess.Popen[bytes]", folder: Path) -> None:
    """End the server, which ends its Ray. More Ctrl-C change nothing: the wait is bounded."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _INTERRUPTS}
    try:
        process.terminate()
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        end_leftovers(folder.absolute())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    # What the one who started us ignores, as nohup does, stays ignored.
    heard = [number for number in _INTERRUPTS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def jobs_cancelled(client: Client) -> Iterator[None]:
    """No job of a killed predecessor runs beside ours, none of ours goes on if the block is left early."""
    _cancel_jobs(client)
    try:
        yield
    except BaseException:
        with suppress(Unreachable):  # of a server that is gone, the next demo cancels them
            _cancel_jobs(client)
        raise


def _cancel_jobs(client: Client) -> None:
    for name in (NAME, *TEST_NAMES.values()):
        for job in client.jobs(name=name):
            if not job.ended:
                job.cancel()
