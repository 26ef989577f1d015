"""Claims queued jobs, submits each as one Ray Job, and keeps SQL and Ray in step.

SQL is the truth: what a job's state says is made true in Ray, never the other way round, except that a driver
that Ray says is gone gives its job back to the queue.
"""

import json
import logging
import os
import shlex
import sys
import threading
import time
from collections import deque
from datetime import UTC, datetime, timedelta
from typing import Any

import torch

from coterie.search.store import JOB_ENDED, FolderArtifacts, StoreUnavailable
from coterie.service.config import Settings
from coterie.service.ray_head import RayHead, RayHeadError, start_head
from coterie.service.storage.database import Database
from coterie.service.storage.repositories import Claimed, JobRepository, RunningJob

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
RETRY_SECONDS = 5.0  # after Ray or the database failed
ANSWER_SECONDS = 20.0  # Ray takes up to 10 to find the agent that starts a job
# In a row, before the embedded head is started anew: one that has lost its job agent lives, and takes no job.
MOST_RAY_FAILURES = 6
MOST_FRUITLESS_ATTEMPTS = 3  # drivers in a row that died without any progress

# States of a Ray Job after which its driver is gone.
GONE = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})


class Dispatcher:
    """One thread of a server that runs the queued jobs.

    Args:
        settings: Of the server.
        database: Where the jobs are.
    """

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._database = database
        self._head: RayHead | None = None
        self._client: Any = None
        self._live: set[str] = set()  # submission ids of drivers that are not known to be gone
        self._left: deque[str] = deque()  # jobs that may have ended, and so need their working files no more
        self._problem: str | None = "Ray is starting"
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dispatcher", daemon=True)

    def start(self) -> None:
        """Begin, without waiting for Ray."""
        self._thread.start()

    def stop(self) -> None:
        """End, and with it the embedded Ray: its jobs go back to the queue, to go on where they were."""
        self._stopping.set()
        self._wake.set()
        self._thread.join()

    def ready(self) -> tuple[bool, str]:
        """Whether jobs can run, and what is in the way."""
        return (True, "Ray takes jobs") if self._problem is None else (False, self._problem)

    def stop_job(self, job_id: str) -> None:
        """Look at once whether `job_id`, which was cancelled or paused in SQL, has a driver to stop."""
        logger.info("job %s was cancelled or paused", job_id)
        self._left.append(job_id)
        self._wake.set()

    @property
    def dashboard_url(self) -> str | None:
        """Where Ray's dashboard is."""
        return self._head.dashboard_url if self._head is not None else None

    @property
    def node_resources(self) -> tuple[float, float]:
        """CPUs and GPUs of the largest node that a trial can be on; no limit is known of a remote cluster."""
        if self._settings.ray_address is not None:
            return float("inf"), float("inf")
        gpus = torch.cuda.device_count() if self._settings.gpus is None else self._settings.gpus
        return float(self._settings.node_cpus), float(gpus)

    def _run(self) -> None:
        failures = 0
        try:
            while not self._stopping.is_set():
                try:
                    if self._head is not None and not self._head.alive():
                        self._drop_head("Ray ended")
                    if self._head is not None and failures >= MOST_RAY_FAILURES:
                        failures = 0
                        self._drop_head("Ray did not do what it was asked to")
                    if self._client is None:
                        self._connect()
                    self._tick()
                    failures = 0
                    self._problem = None
                    pause = POLL_SECONDS
                except Exception as error:  # the loop must outlive whatever Ray or the database do
                    failures += not isinstance(error, StoreUnavailable)
                    logger.exception("the dispatcher could not do its work and tries again")
                    self._problem = f"{type(error).__name__}: {error}".splitlines()[0]
                    pause = RETRY_SECONDS
                self._wake.wait(pause)
                self._wake.clear()
        finally:
            if self._head is not None:
                self._drop_head("the server was stopped")

    def _connect(self) -> None:
        """Reach Ray. An embedded head starts empty, so whatever SQL says is running is not."""
        if self._settings.ray_address is not None:
            self._client = job_client(self._settings.ray_address)
            return
        if self._head is None:
            began = time.monotonic()
            self._head = start_head(
                self._settings.data_dir, num_cpus=self._settings.node_cpus, num_gpus=self._settings.gpus
            )
            logger.info("Ray takes jobs after %.1f s", time.monotonic() - began)
        self._requeue_all("the server was restarted")
        head = self._head
        # Ray's client follows these before the address that it is given, and a proxy can't reach loopback.
        os.environ |= head.environment() | {"NO_PROXY": f"{os.environ.get('NO_PROXY', '')},127.0.0.1"}
        self._client = job_client(head.dashboard_url, head.headers())

    def _drop_head(self, reason: str) -> None:
        assert self._head is not None
        self._problem = reason
        try:
            self._head.stop()
        except RayHeadError:
            logger.exception("parts of Ray are left; the next start ends them")
        self._head, self._client = None, None
        self._live.clear()
        self._requeue_all(reason)

    def _requeue_all(self, reason: str) -> None:
        with self._database.write() as session:
            jobs = JobRepository(session)
            for job in jobs.running():
                jobs.requeue(job.job_id, job.attempt, reason, _now(), preempted=True)

    def _tick(self) -> None:
        with self._database.read() as session:
            running = JobRepository(session).running()
        for submission_id in sorted(self._live - {job.submission_id for job in running}):
            self._end_driver(submission_id)
        for job in running:
            self._check(job)
        self._drop_working_files()
        while len(self._live) < self._settings.max_running_jobs and not self._stopping.is_set():
            with self._database.write() as session:
                claimed = JobRepository(session).claim_next(_now(), self._lease)
            if claimed is None:
                return
            try:
                self._submit(claimed)
            except Exception:  # for no fault of the job's
                with self._database.write() as session:
                    JobRepository(session).requeue(
                        claimed.job_id, claimed.attempt, "Ray did not take it", _now(), preempted=True
                    )
                raise

    def _end_driver(self, submission_id: str) -> None:
        """The attempt is over in SQL: its driver has no more to do, and its place is free once it is gone."""
        if self._status(submission_id) not in GONE:
            self._client.stop_job(submission_id)
            return
        self._live.discard(submission_id)
        self._left.append(_job_of(submission_id))

    def _drop_working_files(self) -> None:
        """Of the jobs that have ended; one that is paused or queued goes on from its checkpoints.

        A job whose driver is not gone yet comes back here once it is.
        """
        with_driver = {_job_of(submission_id) for submission_id in self._live}
        while self._left:
            job_id = self._left[0]
            if job_id not in with_driver:
                with self._database.read() as session:
                    ended = JobRepository(session).get(job_id).state in JOB_ENDED
                if ended:
                    FolderArtifacts(self._settings.artifacts_of(job_id)).drop_working_files()
            self._left.popleft()

    def _check(self, job: RunningJob) -> None:
        """Give a job whose driver is gone or silent back to the queue."""
        if job.submission_id is None:
            if job.lease_expires_at < _now():
                self._give_up(job, "it was claimed but never submitted")
            return
        self._live.add(job.submission_id)
        status = self._status(job.submission_id)
        if status in GONE:
            self._live.discard(job.submission_id)
            self._give_up(job, f"its driver ended early (Ray says {status})")
        elif job.lease_expires_at < _now():
            self._client.stop_job(job.submission_id)
            self._give_up(job, "its driver was silent for too long")

    def _give_up(self, job: RunningJob, reason: str) -> None:
        with self._database.write() as session:
            jobs = JobRepository(session)
            if not jobs.requeue(job.job_id, job.attempt, reason, _now()):
                return  # it ended by itself meanwhile
            fruitless = jobs.attempts_without_progress(job.job_id)
            logger.warning("attempt %d at %s is over: %s", job.attempt, job.job_id, reason)
            if fruitless >= MOST_FRUITLESS_ATTEMPTS:
                jobs.fail_queued(
                    job.job_id,
                    f"{fruitless} drivers in a row ended without progress; the job's log says why",
                    _now(),
                )
                self._left.append(job.job_id)

    def _submit(self, claimed: Claimed) -> None:
        job_id, attempt = claimed.job_id, claimed.attempt
        folder = self._settings.artifacts_of(job_id)
        folder.mkdir(parents=True, exist_ok=True)
        # Ray shows a job's entrypoint and environment to everyone, so what is secret goes by a file.
        order = folder / "driver.json"
        descriptor = os.open(order, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(self._settings.model_dump(mode="json"), file)
        python = sys.executable if self._settings.ray_address is None else "python"
        command = [python, "-P", "-m", "coterie.service.worker", job_id, str(attempt), str(order)]
        submission_id = f"{job_id}-{attempt}"
        with self._database.write() as session:
            if not JobRepository(session).set_submission(job_id, attempt, submission_id):
                return  # it was cancelled or paused meanwhile
        self._live.add(submission_id)
        self._client.submit_job(
            entrypoint=shlex.join(command),
            submission_id=submission_id,
            metadata={"coterie_job": job_id, "name": claimed.name},
        )
        logger.info("attempt %d at %s was submitted", attempt, job_id)

    def _status(self, submission_id: str) -> str:
        """What Ray says of a driver; one that it doesn't know is gone."""
        try:
            return str(self._client.get_job_status(submission_id).value)
        except RuntimeError as error:
            if str(error).startswith("Request failed with status code 404"):
                return "STOPPED"
            raise

    @property
    def _lease(self) -> timedelta:
        return timedelta(seconds=self._settings.lease_seconds)


def job_client(address: str, headers: dict[str, str] | None = None) -> Any:
    """Ray's client of the job API at `address`, which by itself would wait for answers without end."""
    from ray.job_submission import JobSubmissionClient  # takes a second, which the server need not wait

    class _Client(JobSubmissionClient):
        def _do_request(self, *arguments: Any, **options: Any) -> Any:
            return super()._do_request(*arguments, timeout=ANSWER_SECONDS, **options)

    return _Client(address, headers=headers)


def _job_of(submission_id: str) -> str:
    return submission_id.rpartition("-")[0]


def _now() -> datetime:
    return datetime.now(UTC)
