"""Claims queued jobs, submits each as one Ray Job, and keeps SQL and Ray in step.

SQL is the truth: what a job's state says is made true in Ray, never the other way round, except that a driver
that Ray says is gone gives its job back to the queue.

Several servers may share a database. A job belongs to the Ray that it was claimed for: to the embedded one of
a server, or to a cluster, which every server with its address looks after. Only who reaches a job's Ray asks
it, but a driver that no longer writes is heard of nowhere, so any server gives its job back.
"""

import hashlib
import json
import logging
import os
import shlex
import shutil
import sys
import threading
import time
import uuid
from collections import deque
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from coterie.search.artifacts import Location, reaching
from coterie.search.disk import full_disk_told
from coterie.search.store import GOES_ON, JOB_ENDED, DiskFull, FilesUnavailable, StoreUnavailable
from coterie.service.config import Settings
from coterie.service.files import ORDER_FILE, claim_root, drop_working_files, remove_job_files
from coterie.service.liveness import Listener
from coterie.service.planner import own_gpus
from coterie.service.ray_head import RayHead, RayHeadError, start_head
from coterie.service.storage.database import Database
from coterie.service.storage.files import FileRepository
from coterie.service.storage.queue import spent_tenants
from coterie.service.storage.repositories import Claimed, JobRepository, RunningJob

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
REST_SECONDS = 20.0  # before a job is tried again whose files can't be kept
RETRY_SECONDS = 5.0  # after Ray or the database failed
ANSWER_SECONDS = 20.0  # Ray takes up to 10 to find the agent that starts a job
# In a row, before the embedded head is started anew: one that has lost its job agent lives, and takes no job.
MOST_RAY_FAILURES = 6
MOST_FRUITLESS_ATTEMPTS = 3  # drivers in a row that died without any progress
STARTING_LEASES = 4  # a driver has Ray, Python and torch to load, on a machine that may be busy
SERVER_ID_FILE = "server_id"

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
        self._owner = _owner(settings)
        self._no_proxy = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")  # as who reads them does
        self._listener = Listener(settings.lease_seconds)
        self._live: set[str] = set()  # submission ids of drivers that are not known to be gone
        self._resting: dict[str, float] = {}  # until when a job is not started, by the monotonic clock
        self._left: deque[str] = deque()  # jobs that may have ended, and so need their working files no more
        self._problem: str | None = "Ray is starting"
        self._shortage: str | None = None  # that keeps jobs from starting
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
        problem = self._problem or self._shortage
        return (True, "Ray takes jobs") if problem is None else (False, problem)

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
        gpus = own_gpus() if self._settings.gpus is None else self._settings.gpus
        return float(self._settings.node_cpus), float(gpus)

    def _run(self) -> None:
        failures, told = 0, None
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
                    with full_disk_told():
                        self._tick()
                    if told is not None:
                        logger.info("the dispatcher does its work again")
                    failures, told, self._problem = 0, None, None
                    pause = POLL_SECONDS
                except Exception as error:  # the loop must outlive whatever Ray or the database do
                    self._listener.forget()
                    failures += not isinstance(error, StoreUnavailable | FilesUnavailable)
                    if told is not type(error):  # once, however long it lasts; readiness goes on telling it
                        logger.exception("the dispatcher can't do its work, and tries until it can")
                    told = type(error)
                    self._problem = _in_public(error)
                    pause = RETRY_SECONDS
                self._wake.wait(pause)
                self._wake.clear()
        finally:
            if self._head is not None:
                self._drop_head("the server was stopped")

    def _connect(self) -> None:
        """Reach Ray. An embedded head starts empty, so whatever SQL says is running there is not."""
        claim_root(self._settings, self._database)
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
        direct = ",".join(filter(None, (self._no_proxy, "127.0.0.1")))
        os.environ |= head.environment() | {"NO_PROXY": direct, "no_proxy": direct}
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
                if job.owner == self._owner:
                    jobs.requeue(job.job_id, job.attempt, reason, _now(), preempted=True)

    def _tick(self) -> None:
        with self._database.read() as session:
            running = JobRepository(session).running()
            tenants = {job.tenant for job in running}
            spent = spent_tenants(session, tenants, self._settings.tenant_limits, _now())
        silence = self._listener.look({job.job_id: _signs_of_life(job) for job in running})
        own = [job for job in running if job.owner == self._owner]
        for submission_id in sorted(self._live - {job.submission_id for job in own}):
            self._end_driver(submission_id)
        for job in own:
            self._check(job)
        for job in running:
            if silence[job.job_id] >= self._longest_silence(job):
                if job.submission_id in self._live:  # first of all: one that was stopped may hold a lock
                    self._client.stop_job(job.submission_id)
                self._give_up(job, "its driver was silent for too long")
            elif job.tenant in spent:
                self._preempt(job, "its tenant has used its device-seconds of this month")
        self._drop_working_files()
        if self._problem is not None:  # or each try would be an attempt at some job
            claim_root(self._settings, self._database)
        self._shortage = self._find_shortage()
        if self._shortage is None:
            self._claim()

    def _find_shortage(self) -> str | None:
        """What a driver would need, and is not there."""
        needed = self._settings.min_free_bytes
        folders = {"data": self._settings.data_dir}
        jobs_dir = self._settings.jobs_dir
        if isinstance(jobs_dir, Path):
            jobs_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            folders["artifacts"] = jobs_dir
        for name, folder in folders.items():
            free = shutil.disk_usage(folder).free
            if free < needed:
                return (
                    f"no job starts: the disk of the {name} folder has {free / 1e6:,.0f} MB free, and needs "
                    f"at least {needed / 1e6:,.0f} MB (COTERIE_MIN_FREE_BYTES)"
                )
        return None

    def _claim(self) -> None:
        """Start jobs while there is room. A driver that is still ending takes a place, and keeps its job."""
        now = time.monotonic()
        self._resting = {job_id: end for job_id, end in self._resting.items() if end > now}
        while len(self._live) < self._settings.max_running_jobs and not self._stopping.is_set():
            with self._database.read() as session:  # SQLite's one lock is not taken in vain
                if not JobRepository(session).any_waits():
                    return
            with self._database.write() as session:
                jobs = JobRepository(session)
                ending = self._live - {job.submission_id for job in jobs.running()}
                claimed = jobs.claim_next(
                    _now(),
                    self._lease,
                    self._owner,
                    places=self._settings.max_running_jobs - len(ending),
                    defaults=self._settings.tenant_limits,
                    busy={_job_of(submission_id) for submission_id in ending} | self._resting.keys(),
                )
            if claimed is None:
                return
            try:
                self._submit(claimed)
            except Exception as error:  # for no fault of the job's
                if isinstance(error, FilesUnavailable):
                    self._rest(claimed.job_id)
                reason = "it could not be handed to Ray"
                with self._database.write() as session:
                    JobRepository(session).requeue(
                        claimed.job_id, claimed.attempt, reason, _now(), preempted=True
                    )
                raise

    def _longest_silence(self, job: RunningJob) -> float:
        """Seconds; a driver that was submitted and has yet to write is given the time to start."""
        starts = job.submission_id is not None and job.driver is None
        return self._settings.lease_seconds * (STARTING_LEASES if starts else 1)

    def _end_driver(self, submission_id: str) -> None:
        """The attempt is over in SQL: its driver has no more to do, and its place is free once it is gone."""
        status = self._status(submission_id)
        if status is not None and status not in GONE:
            self._client.stop_job(submission_id)
            return
        self._live.discard(submission_id)
        job_id = _job_of(submission_id)
        self._left.append(job_id)
        with self._database.read() as session:
            reason = FileRepository(session).reasons([job_id]).get(job_id)
        if reason is not None and reason.endswith(GOES_ON):
            self._rest(job_id)

    def _rest(self, job_id: str) -> None:
        """Let others go first for a while: its files can't be kept, and it may be the only one."""
        self._resting[job_id] = time.monotonic() + REST_SECONDS

    def _drop_working_files(self) -> None:
        """Of the jobs that have ended; one that is paused or queued goes on from its checkpoints.

        A job whose driver is not gone yet comes back here once it is.
        """
        with_driver = {_job_of(submission_id) for submission_id in self._live}
        while self._left:
            job_id = self._left[0]
            if job_id not in with_driver:
                with self._database.read() as session:
                    state = FileRepository(session).states([job_id]).get(job_id)
                if state is None:  # it was deleted, while its driver may still have written
                    remove_job_files(self._settings, job_id)
                elif state in JOB_ENDED:
                    drop_working_files(self._settings, job_id)
            self._left.popleft()

    def _check(self, job: RunningJob) -> None:
        """Give a job whose driver is gone back to the queue."""
        if job.submission_id is None:
            return
        status = self._status(job.submission_id)
        if status is None and job.submission_id not in self._live:
            return  # another server is submitting it just now, or it stays silent
        if status is None or status in GONE:
            self._live.discard(job.submission_id)
            self._give_up(job, f"its driver ended early (Ray says {status or 'nothing of it'})")
        else:
            self._live.add(job.submission_id)

    def _preempt(self, job: RunningJob, reason: str) -> None:
        with self._database.write() as session:
            if JobRepository(session).requeue(job.job_id, job.attempt, reason, _now(), preempted=True):
                logger.warning("attempt %d at %s is over: %s", job.attempt, job.job_id, reason)

    def _give_up(self, job: RunningJob, reason: str) -> None:
        with self._database.write() as session:
            jobs = JobRepository(session)
            never_began = job.submission_id is None  # which is no fault of the job's
            if not jobs.requeue(job.job_id, job.attempt, reason, _now(), preempted=never_began):
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
        # Ray shows a job's entrypoint and environment to everyone, so what is secret goes by a file.
        order = self._settings.artifacts_of(job_id) / ORDER_FILE
        _write_private(order, json.dumps(self._settings.model_dump(mode="json")))
        python = sys.executable if self._settings.ray_address is None else "python"
        command = [python, "-P", "-m", "coterie.service.worker", job_id, str(attempt), str(order)]
        submission_id = _submission_of(claimed)
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

    def _status(self, submission_id: str) -> str | None:
        """What Ray says of a driver; None where it knows of none."""
        try:
            return str(self._client.get_job_status(submission_id).value)
        except RuntimeError as error:
            if str(error).startswith("Request failed with status code 404"):
                return None
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


def _owner(settings: Settings) -> str:
    """Names the Ray that the server's jobs run on: its own, by an id in its data folder, or a cluster."""
    if settings.ray_address is not None:
        return f"ray_{hashlib.sha256(settings.ray_address.encode()).hexdigest()[:32]}"
    file = settings.data_dir / SERVER_ID_FILE
    if not file.exists():
        written = file.with_suffix(".new")
        written.write_text(f"server_{uuid.uuid4().hex}")
        written.rename(file)
    return file.read_text()


def _write_private(file: Location, text: str) -> None:
    """Write a file for this user alone; in a place without folders it is for whoever may read there."""
    if not isinstance(file, Path):
        with reaching(file):
            file.write_text(text)
        return
    with reaching(file):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "w") as opened:
            opened.write(text)


def _in_public(error: Exception) -> str:
    """What readiness tells anybody who asks: no paths, hosts or users."""
    if isinstance(error, StoreUnavailable):
        return "the database does not answer"
    if isinstance(error, DiskFull):
        return "there is no space left on the disk"
    if isinstance(error, FilesUnavailable):
        return "the place of the artifacts does not answer"
    return f"Ray does not do what it is asked to ({type(error).__name__}); the server's log says why"


def _signs_of_life(job: RunningJob) -> tuple[object, ...]:
    return job.attempt, job.submission_id, job.driver, job.beats


def _submission_of(claimed: Claimed) -> str:
    return f"{claimed.job_id}-{claimed.attempt}"


def _job_of(submission_id: str) -> str:
    return submission_id.rpartition("-")[0]


def _now() -> datetime:
    return datetime.now(UTC)
