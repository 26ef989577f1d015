"""Changes of state: each is counted on the job's row and told as an event, in the same transaction.

Whoever changes a job or one of its trials holds the job's row, so that what they count and tell comes one
after another.
"""

from datetime import datetime

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from coterie.search.store import ENDED, JobState, TrialState
from coterie.service.storage.events import EventKind, record_event
from coterie.service.storage.tables import AttemptRow, JobRow, TrialRow


def tell_job(session: Session, job: JobRow, now: datetime) -> None:
    """Tell that a job's state, reason or priority changed."""
    data = {"id": job.id, "state": job.state, "reason": job.reason, "priority": job.priority}
    record_event(session, job, EventKind.JOB, data, now)


def count_trial(job: JobRow, state: str, by: int) -> None:
    """Count trials of a job in a state."""
    counter = f"trials_{state}"
    setattr(job, counter, getattr(job, counter) + by)


def move_trial(session: Session, job: JobRow, trial: TrialRow, state: TrialState, now: datetime) -> None:
    """Bring a trial into another state; what the event tells beside it must stand in the row already."""
    if trial.state == state:
        return
    count_trial(job, trial.state, -1)
    count_trial(job, state, 1)
    trial.state = state
    tell_trial(session, job, trial, now)


def tell_trial(session: Session, job: JobRow, trial: TrialRow, now: datetime) -> None:
    """Tell that a trial is new, or that its state changed."""
    data = {
        "id": trial.id,
        "number": trial.number,
        "state": trial.state,
        "reason": trial.reason,
        "family": trial.family,
        "epochs": trial.epochs,
        "values": trial.values,
        "on_front": trial.on_front,
    }
    record_event(session, job, EventKind.TRIAL, data, now)


def end_job(session: Session, job: JobRow, state: JobState, reason: str | None, now: datetime) -> None:
    """End a job, its current attempt, and its unfinished trials with it; nothing is told of it later."""
    _end_attempt(session, job, now)
    for trial in _unfinished(session, job):
        trial.ended_at = now
        move_trial(session, job, trial, TrialState.CANCELLED, now)
    job.ended_at = now
    _leave(session, job, state, reason, now)


def release_job(
    session: Session, job: JobRow, state: JobState, reason: str | None, now: datetime, *, preempted: bool
) -> None:
    """Take a job from the attempt that runs it, if one does; its running trials wait for the next."""
    _end_attempt(session, job, now, reason=reason or state, preempted=preempted)
    for trial in _unfinished(session, job):
        move_trial(session, job, trial, TrialState.PENDING, now)
    _leave(session, job, state, reason, now)


def _leave(session: Session, job: JobRow, state: JobState, reason: str | None, now: datetime) -> None:
    job.state = state
    job.reason = reason
    job.lease_expires_at = job.eta_seconds = job.eta_at = None
    tell_job(session, job, now)


def _end_attempt(session: Session, job: JobRow, now: datetime, **values: object) -> None:
    session.execute(
        update(AttemptRow)
        .where(AttemptRow.job_id == job.id, AttemptRow.ended_at.is_(None))
        .values(ended_at=now, **values)
    )


def _unfinished(session: Session, job: JobRow) -> list[TrialRow]:
    unfinished = TrialRow.state.not_in(ENDED)
    query = select(TrialRow).where(TrialRow.job_id == job.id, unfinished).order_by(TrialRow.number)
    return list(session.scalars(query))
