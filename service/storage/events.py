"""What happens to a job, in the order in which it happened: the source of event streams and webhooks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from coterie.search.store import JOB_ENDED
from coterie.service.storage.outbox import enqueue_deliveries
from coterie.service.storage.tables import EventRow, JobRow

CHANNEL = "coterie_events"  # on PostgreSQL, every commit with an event notifies it, with the job's id


class EventKind(StrEnum):
    """What an event is about, and what its data hold.

    job: `id, state, reason, priority`, when one of them changes. trial: `id, number, state, reason, family,
    epochs, values, on_front`, when it is new or its state changes. measurement: `trial_id, number, epoch,
    values, device_seconds`. front: `trial_id, hypervolume, size, displaced`, after a trial joined it;
    `displaced` are the ids of the trials that left it.
    """

    JOB = "job"
    TRIAL = "trial"
    MEASUREMENT = "measurement"
    FRONT = "front"


def record_event(
    session: Session, job: JobRow, kind: EventKind, data: Mapping[str, Any], now: datetime
) -> None:
    """Add an event to those of a job, whose row the caller has locked and writes with the transaction.

    So whoever sees an event sees all that came before it. What webhooks are to be told is noted with it.
    """
    job.last_event += 1
    session.add(EventRow(job_id=job.id, sequence=job.last_event, kind=kind, data=dict(data), at=now))
    with session.no_autoflush:  # the job's row is written once, whatever else changes in it
        if session.connection().dialect.name == "postgresql":
            session.execute(select(func.pg_notify(CHANNEL, job.id)))
        enqueue_deliveries(session, job.tenant, job.id, job.last_event, kind, now)


@dataclass(frozen=True)
class News:
    """What a job's events are beyond a position.

    Attributes:
        events: The first of them, in order.
        newest: Sequence of the newest of all.
        ended: Whether the job has ended, so that no event follows `newest`.
    """

    events: Sequence[EventRow]
    newest: int
    ended: bool


class EventRepository:
    """Events of jobs, whosever they are."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def news(self, positions: Mapping[str, int], limit: int) -> dict[str, News]:
        """What came after these positions, up to `limit` events a job; without jobs that do not exist."""
        # Before the events: where it says that there is no more, all are seen below.
        jobs = self._session.execute(
            select(JobRow.id, JobRow.last_event, JobRow.state).where(JobRow.id.in_(positions))
        )
        return {
            job_id: News(
                self._after(job_id, positions[job_id], limit) if newest > positions[job_id] else (),
                newest,
                state in JOB_ENDED,
            )
            for job_id, newest, state in jobs.all()
        }

    def _after(self, job_id: str, position: int, limit: int) -> Sequence[EventRow]:
        return self._session.scalars(
            select(EventRow)
            .where(EventRow.job_id == job_id, EventRow.sequence > position)
            .order_by(EventRow.sequence)
            .limit(limit)
        ).all()
