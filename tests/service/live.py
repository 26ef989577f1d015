"""A server on a real port, without Ray, and a job on it whose networks are real files."""

import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from coterie.models.backbones import MLP
from coterie.models.export import Preprocessing, write_architecture
from coterie.models.families import Grouped
from coterie.search.data.digits import Digits
from coterie.search.store import (
    Candidate,
    Ending,
    FolderArtifacts,
    FrontUpdate,
    JobState,
    Role,
    StoredFile,
    Trial,
    TrialState,
    Verdict,
    VerdictKind,
)
from coterie.service.app import create_app
from coterie.service.config import Settings
from coterie.service.protocol import Protocol
from coterie.service.serving import server_config
from coterie.service.storage.store import SqlTrialStore
from tests.service.conftest import RecordingDispatcher, Server, confirm
from tests.service.side_runs import measure_affinities, use_references

LEFT = ["left_parity", "left_large", "left_loop"]
RIGHT = ["right_parity", "right_large", "right_loop"]
ALL = [*LEFT, *RIGHT]
VERDICT = "Learn these tasks in two groups: left_parity, left_large, left_loop; the others."


class LiveServer(Server):
    """As `Server`, with a URL that other processes can reach."""

    def __init__(
        self, url: str, settings: Settings, dispatcher: RecordingDispatcher, client: httpx.Client
    ) -> None:
        super().__init__(settings, dispatcher, client)
        self.url = url


@contextmanager
def live_server(
    data_dir: Path, *, protocol: type[Protocol] = Protocol, **chosen: Any
) -> Iterator[LiveServer]:
    settings = Settings(data_dir=data_dir, _env_file=None, **chosen)
    dispatcher = RecordingDispatcher()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = server_config(create_app(settings, dispatcher), settings)
        config.http = protocol
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        try:
            with httpx.Client(base_url=url, timeout=60) as client:  # the first job waits for torch
                live = LiveServer(url, settings, dispatcher, client)
                yield live
                live.database.close()
        finally:
            server.should_exit = True
            thread.join()


def say(address: tuple[str, int], *parts: bytes, pause: float = 0.0) -> tuple[int, dict[str, str], bytes]:
    """As `exchange`: status, headers and body of the answer, the status 0 where there is none."""
    head, _, body = exchange(address, *parts, pause=pause).partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status.split()[1]) if status else 0, headers, body


def exchange(address: tuple[str, int], *parts: bytes, pause: float = 0.0) -> bytes:
    """Send what may be no HTTP, and read until the server closes."""
    with socket.create_connection(address, timeout=10) as connection:
        for part in parts:
            try:
                connection.sendall(part)
            except OSError:
                break  # it had enough, and its answer is there to be read
            time.sleep(pause)
        answer = b""
        try:
            while chunk := connection.recv(65536):
                answer += chunk
        except ConnectionResetError:
            pass
    return answer


def add_trial(
    server: LiveServer,
    store: SqlTrialStore,
    job_id: str,
    number: int,
    *,
    family: str,
    groups: list[list[str]],
    delta_m: float,
    width: int = 8,
    on_front: bool = True,
) -> str:
    """Complete a trial, with its network's files; its macs and params are those of the network."""
    trial_id = _trial_id(number)
    parameters = {"width": width, "depth": 2, "lr": 0.005, "weight_decay": 1e-6, "batch_size": 64, "split": 0}
    store.add_trial(
        Trial(
            id=trial_id,
            number=number,
            candidate=Candidate(family=family, backbone="mlp", parameters=parameters),
            choices={},
            seed=number,
        )
    )
    store.start_trial(trial_id)
    folder = FolderArtifacts(server.settings.artifacts_of(job_id)).trial_folder(trial_id)
    document = _write_network(folder, family, groups, width)
    costs = {"macs": float(document["macs"]), "params": float(document["params"]), "latency_ms": 0.1}
    store.end_trial(
        trial_id,
        Ending(
            state=TrialState.COMPLETED,
            values={"delta_m": delta_m, "total_error": 30.0, **costs},
            test={
                "delta_m": delta_m - 1,
                "total_error": 36.0,
                **{f"task.{name}.error": 0.06 for name in ALL},
                **costs,
            },
            grouping=groups,
            epochs=2,
            files={file.name: _describe(file) for file in folder.iterdir()},
        ),
        FrontUpdate(on_front=on_front, displaced=(), hypervolume=float(number + 1), size=1),
    )
    return trial_id


def _write_network(folder: Path, family: str, groups: list[list[str]], width: int) -> dict[str, int]:
    tasks = Digits.tasks()
    backbone = MLP(input_shape=Digits.shape(), width=width, depth=2)
    network = Grouped(backbone=backbone, tasks=tasks, grouping=groups)
    document = write_architecture(
        folder,
        network.prune(),
        family=family,
        tasks=tasks,
        backbone=backbone,
        grouping=network.grouping,
        preprocessing=Preprocessing(mean=(3.0,), std=(5.0,)),
        metadata={},
    )
    cost: dict[str, int] = document["cost"]
    return cost


def _describe(file: Path) -> StoredFile:
    content = file.read_bytes()
    return StoredFile(size=len(content), sha256=hashlib.sha256(content).hexdigest())


def finished_job(server: LiveServer, name: str = "digits") -> str:
    """A succeeded job: three points on the front, two of them confirmed, and a trial behind it."""
    job_id = server.submit(name=name)
    store = server.claim()
    store.set_reference_point({"delta_m": -300.0, "macs": 1e6})
    add_trial(server, store, job_id, 0, family="single", groups=[[name] for name in ALL], delta_m=8.0)
    add_trial(server, store, job_id, 1, family="grouped", groups=[LEFT, RIGHT], delta_m=4.0)
    add_trial(server, store, job_id, 2, family="shared", groups=[ALL], delta_m=-2.5)
    add_trial(server, store, job_id, 3, family="dmtg", groups=[ALL], delta_m=-9.0, on_front=False)
    for seed, noise in enumerate((-0.5, 0.0, 0.5)):
        confirm(store, _trial_id(1), Role.POINT, 4.0 + noise, 2000.0, seed)
        confirm(store, _trial_id(1), Role.SHARED, -6.0 - noise, 2100.0, seed)
        confirm(store, _trial_id(2), Role.POINT, -2.0 + 3 * noise, 1000.0, seed)
        confirm(store, _trial_id(2), Role.SHARED, -2.1 - 3 * noise, 1000.0, seed)
    measure_affinities(store)
    use_references(store)
    store.set_verdict(
        Verdict(kind=VerdictKind.GROUPS, words=VERDICT, trial_id=_trial_id(1), grouping=[LEFT, RIGHT])
    )
    store.finish(JobState.SUCCEEDED, None)
    return job_id


def _trial_id(number: int) -> str:
    return f"trial_{number:016x}"
