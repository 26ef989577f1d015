"""`coterie demo`: a search from beginning to end, over HTTP, with a server of its own.

The job confirms the best of its front on fresh seeds, so what it says about the tasks is more than luck.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from types import FrameType

import yaml
from rich.console import Console

from coterie.service.client import ApiError, Client, Job, Trial, Unreachable
from coterie.service.console import show_front, show_verdict, watch
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


class DemoFailed(Exception):
    """The demo could not be run to its end."""


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
        console.print()
        show_verdict(console, job)
        trial = recommended(client, job)
        trial.download(folder / NETWORK_FOLDER)
        console.print("\nStopping the server ...")
    _show_what_is_left(console, folder, trial)
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


def recommended(client: Client, job: Job) -> Trial:
    """The trial that the verdict speaks of, or else the one of the highest delta_m."""
    verdict = job.document["verdict"]
    if verdict is not None and verdict["trial_id"] is not None:
        return client.trial(verdict["trial_id"])
    return job.best(metric="delta_m")


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
    for job in client.jobs(name=NAME):
        if not job.ended:
            job.cancel()
