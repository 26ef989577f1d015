"""What is kept beside a job's rows is what they say."""

from collections import Counter

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from coterie.search.store import TrialState
from coterie.service.storage.repositories import JobRepository
from coterie.service.storage.tables import AttemptRow, TrialRow, TrialValueRow


def check_counted(session: Session, job_id: str) -> None:
    """A job's counters, and its trials' values."""
    job = JobRepository(session).get(job_id)
    trials = session.scalars(select(TrialRow).where(TrialRow.job_id == job_id)).all()
    attempts = session.scalars(select(AttemptRow).where(AttemptRow.job_id == job_id)).all()
    found = Counter(trial.state for trial in trials)
    assert {state: getattr(job, f"trials_{state}") for state in TrialState} == {
        state: found[state] for state in TrialState
    }
    side = sum(attempt.side_device_seconds for attempt in attempts)
    assert job.device_seconds == pytest.approx(sum(trial.device_seconds for trial in trials) + side)
    assert job.seconds == pytest.approx(sum(attempt.seconds for attempt in attempts))
    assert job.stored_bytes == sum(file["size"] for trial in trials for file in trial.files.values())
    values = session.scalars(select(TrialValueRow).where(TrialValueRow.job_id == job_id))
    assert {(row.number, row.metric): row.value for row in values} == {
        (trial.number, metric): value
        for trial in trials
        if trial.state in (TrialState.COMPLETED, TrialState.STOPPED)
        for metric, value in trial.values.items()
        if value is not None
    }
