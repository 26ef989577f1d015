"""A job's driver, run as one Ray Job: `python -m coterie.service.worker JOB_ID ATTEMPT SETTINGS_FILE`."""

import json
import logging
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import ray

from coterie.search.artifacts import Location, artifacts_at, location_of, reaching
from coterie.search.faults import SpecError
from coterie.search.plan import make_plan
from coterie.search.recorder import Recorder, patiently
from coterie.search.runner import drive as drive_search
from coterie.search.spec import JobSpec
from coterie.search.store import GOES_ON, Fenced, FilesUnavailable, JobState
from coterie.search.trial import worker_name
from coterie.service.body import validate
from coterie.service.config import Settings
from coterie.service.job_log import kept_log
from coterie.service.storage.database import Database
from coterie.service.storage.repositories import JobRepository
from coterie.service.storage.store import SqlTrialStore

logger = logging.getLogger("coterie.worker")

# Exit codes beside 0 and 1.
FENCED = 3  # another attempt has taken over, or the job was cancelled
GAVE_BACK = 4  # the job is queued again


def drive(settings: Settings, job_id: str, attempt: int) -> int:
    """Run one attempt at a job to its end; Ray's address is in the environment.

    It waits for a database that is away, however long that takes.

    Returns:
        The process's exit code.
    """
    database = Database(settings.url)
    spec = patiently(lambda: _begin(database, job_id, attempt))
    if spec is None:
        return FENCED
    store = SqlTrialStore(database, job_id, attempt, timedelta(seconds=settings.lease_seconds))
    try:
        with Recorder(store):  # which says that the driver lives
            plan = make_plan(validate(JobSpec, spec))
            ray.init(address=os.environ["RAY_ADDRESS"], logging_level=logging.WARNING)
        # Ray's own handler would run the interpreter's exit work first; the store needs none of it.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
        artifacts = artifacts_at(settings.artifacts_of(job_id))
        state, reason = drive_search(plan, store, artifacts, silence=settings.lease_seconds)
    except SpecError as error:  # what it was submitted with is not installed any more, or another version's
        fault = str(error)
        patiently(lambda: store.finish(JobState.FAILED, fault))
        return 1
    except Fenced as error:
        logger.warning("%s", error)
        return FENCED
    except FilesUnavailable as error:
        why = f"{error}; {GOES_ON}"
        logger.warning("%s waits: %s", job_id, why)
        patiently(lambda: _give_back(database, job_id, attempt, why))
        return GAVE_BACK
    logger.info("%s %s%s", job_id, state, f": {reason}" if reason else "")
    return 0 if state is JobState.SUCCEEDED else 1


def _begin(database: Database, job_id: str, attempt: int) -> Mapping[str, Any] | None:
    """Say who drives the attempt, and read what to search; None where it is over already."""
    with database.write() as session:
        jobs = JobRepository(session)
        if not jobs.set_driver(job_id, attempt, worker_name(), datetime.now(UTC)):
            return None
        return jobs.get(job_id).spec


def _give_back(database: Database, job_id: str, attempt: int, reason: str) -> None:
    with database.write() as session:
        JobRepository(session).requeue(job_id, attempt, reason, datetime.now(UTC), preempted=True)


def _read_order(file: Location) -> Settings:
    with reaching(file, FileNotFoundError):
        text = file.read_text()
    return Settings.model_validate(json.loads(text))


def _log_file(path: Path) -> list[logging.Handler]:
    """The job's log, if it can be had."""
    with suppress(OSError):
        return [logging.FileHandler(path)]
    return []


def main() -> None:
    """Read the arguments and drive."""
    job_id, attempt, settings_file = sys.argv[1:]
    logging.raiseExceptions = False  # a log that can't be written, on a full disk, is no reason to say more
    settings = patiently(lambda: _read_order(location_of(settings_file)))
    with ExitStack() as stack:
        try:
            log = stack.enter_context(kept_log(settings.log_of(job_id), int(attempt)))
        except (OSError, FilesUnavailable):  # Ray's own log of the job has it then
            log = Path(os.devnull)
        logging.basicConfig(
            level=logging.INFO,
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            handlers=[logging.StreamHandler(), *_log_file(log)],
        )
        logger.info("attempt %s at %s", attempt, job_id)
        try:
            code = drive(settings, job_id, int(attempt))
        except Exception:
            logger.exception("the driver ended early")
            code = 1
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)  # nothing that Ray would still do at exit matters: the store has everything


if __name__ == "__main__":
    main()
