"""A job's driver, run as one Ray Job: `python -m coterie.service.worker JOB_ID ATTEMPT SETTINGS_FILE`."""

import json
import logging
import os
import signal
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import ray

from coterie.search.plan import SpecError, make_plan
from coterie.search.runner import drive as drive_search
from coterie.search.spec import JobSpec
from coterie.search.store import Fenced, FolderArtifacts, JobState
from coterie.search.trial import worker_name
from coterie.service.config import Settings
from coterie.service.storage.database import Database
from coterie.service.storage.repositories import JobRepository
from coterie.service.storage.store import SqlTrialStore

logger = logging.getLogger("coterie.worker")

FENCED = 3  # exit code: another attempt has taken over, or the job was cancelled


def drive(settings: Settings, job_id: str, attempt: int) -> int:
    """Run one attempt at a job to its end; Ray's address is in the environment.

    Returns:
        The process's exit code.
    """
    database = Database(settings.url)
    with database.write() as session:
        jobs = JobRepository(session)
        if not jobs.set_driver(job_id, attempt, worker_name(), datetime.now(UTC)):
            return FENCED
        spec = JobSpec.model_validate(jobs.get(job_id).spec)
    store = SqlTrialStore(database, job_id, attempt, timedelta(seconds=settings.lease_seconds))
    try:
        plan = make_plan(spec)
    except SpecError as error:  # what the job was submitted with is not installed any more
        store.finish(JobState.FAILED, str(error))
        return 1
    ray.init(address=os.environ["RAY_ADDRESS"], logging_level=logging.WARNING)
    # Ray's own handler would run the interpreter's exit work first; the store needs none of it.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
    try:
        state, reason = drive_search(plan, store, FolderArtifacts(settings.artifacts_of(job_id)))
    except Fenced as error:
        logger.warning("%s", error)
        return FENCED
    logger.info("%s %s%s", job_id, state, f": {reason}" if reason else "")
    return 0 if state is JobState.SUCCEEDED else 1


def main() -> None:
    """Read the arguments and drive."""
    job_id, attempt, settings_file = sys.argv[1:]
    settings = Settings.model_validate(json.loads(Path(settings_file).read_text()))
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=[
            logging.StreamHandler(),
            logging.FileHandler(settings.log_of(job_id)),
        ],
    )
    logger.info("attempt %s at %s", attempt, job_id)
    try:
        code = drive(settings, job_id, int(attempt))
    except Exception:
        logger.exception("the driver ended early")
        code = 1
    sys.stdout.flush()
    os._exit(code)  # nothing that Ray would still do at exit matters: the store has everything


if __name__ == "__main__":
    main()
