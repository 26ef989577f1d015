"""`coterie serve` without Ray: the same server, but each driver is a light process that trains nothing.

    python light_server.py DATA_FOLDER    (other settings by COTERIE_* variables)

Server, dispatcher, database, and the drivers' processes, fences and writes are the real ones. What is light:
in place of a Ray head there is a fork server, in place of a Ray Job a process forked from it, and in place of
a search `TRIALS` trials with a measurement each that nobody trained. A driver outlives its server, as one on
Ray does.
"""

import json
import multiprocessing
import os
import shlex
import sys
import time
from datetime import UTC, datetime, timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from socket import gethostname
from types import SimpleNamespace
from typing import Any

from coterie.search.store import ENDED, Candidate, Ending, JobState, Measurement, Trial, TrialState
from coterie.service import dispatcher
from coterie.service.config import Settings
from coterie.service.console import make_console
from coterie.service.serving import serve
from coterie.service.storage.database import Database
from coterie.service.storage.repositories import JobRepository
from coterie.service.storage.store import SqlTrialStore

TRIALS = 2
TRIAL_SECONDS = 0.1
POLL_SECONDS = 0.05


class LightRay:
    """As much of Ray's head and of its job API as the dispatcher uses."""

    dashboard_url = "http://127.0.0.1:9"

    def __init__(self, *_: object, **__: object) -> None:
        self._processes = multiprocessing.get_context("forkserver")
        # What a driver imports, so that it need not.
        self._processes.set_forkserver_preload([name for name in sys.modules if name.startswith("coterie.")])
        self._drivers: dict[str, ForkServerProcess] = {}

    def submit_job(self, *, entrypoint: str, submission_id: str, metadata: object) -> None:
        job_id, attempt, order = shlex.split(entrypoint)[-3:]
        driver = self._processes.Process(target=drive, args=(job_id, int(attempt), order))
        driver.start()
        self._drivers[submission_id] = driver

    def get_job_status(self, submission_id: str) -> Any:
        if submission_id not in self._drivers:
            raise RuntimeError("Request failed with status code 404: there is no such job")
        code = self._drivers[submission_id].exitcode
        return SimpleNamespace(value="RUNNING" if code is None else "SUCCEEDED" if code == 0 else "FAILED")

    def stop_job(self, submission_id: str) -> None:
        self._drivers[submission_id].terminate()

    def alive(self) -> bool:
        return True

    def environment(self) -> dict[str, str]:
        return {}

    def headers(self) -> dict[str, str]:
        return {}

    def stop(self) -> None:
        for driver in self._drivers.values():
            driver.kill()


def drive(job_id: str, attempt: int, order: str) -> None:
    """A driver: what of the job is not done yet, as SQL has it."""
    settings = Settings.model_validate(json.loads(Path(order).read_text()))
    database = Database(settings.url)
    with database.write() as session:
        if not JobRepository(session).set_driver(
            job_id, attempt, f"{gethostname()}:{os.getpid()}", datetime.now(UTC)
        ):
            return
    store = SqlTrialStore(database, job_id, attempt, timedelta(seconds=settings.lease_seconds))
    known = {trial.number: trial for trial in store.resume().trials}
    for number in range(TRIALS):
        trial = known.get(number)
        if trial is None:
            trial = Trial(
                id=f"trial_{job_id.removeprefix('job_')}_{number}",
                number=number,
                candidate=Candidate(family="shared", backbone="mlp", parameters={}),
                choices={},
                seed=number,
            )
            store.add_trial(trial)
        if trial.state not in ENDED:
            run(store, trial.id)
    store.finish(JobState.SUCCEEDED, None)
    database.close()


def run(store: SqlTrialStore, trial_id: str) -> None:
    store.start_trial(trial_id)
    time.sleep(TRIAL_SECONDS)
    worker = f"{gethostname()}:{os.getpid()}"
    store.measure(
        trial_id,
        Measurement(epoch=1, values={"total_error": 1.0}, tasks={}, device_seconds=1.0, worker=worker),
    )
    store.end_trial(
        trial_id,
        Ending(state=TrialState.COMPLETED, values={"total_error": 1.0}, epochs=1, device_seconds=1.0),
        None,
    )


def main() -> None:
    ray = LightRay()
    for name, part in {
        "start_head": lambda *_, **__: ray,
        "job_client": lambda *_, **__: ray,
        "POLL_SECONDS": POLL_SECONDS,
    }.items():
        setattr(dispatcher, name, part)
    serve(Settings(data_dir=Path(sys.argv[1]), port=0), make_console())


if __name__ == "__main__":
    main()
