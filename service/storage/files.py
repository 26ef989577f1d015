"""What SQL knows of the files of jobs, whosever they are, and which jobs are old."""

from collections.abc import Collection, Sequence
from datetime import datetime

from sqlalchemy import delete, exists, func, select
from sqlalchemy.orm import Session

from coterie.search.store import JOB_ENDED, TrialState
from coterie.service.storage.database import take_long
from coterie.service.storage.events import EventKind
from coterie.service.storage.tables import DatabaseRow, DeliveryRow, EventRow, JobRow, TrialRow

IDS_AT_A_TIME = 500  # far below what a statement may hold
_PASSING = (EventKind.TRIAL, EventKind.MEASUREMENT)


class FileRepository:
    """Jobs and trials as those see them who tidy up.

    Args:
        session: The transaction.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    def database_id(self) -> str:
        """What tells this database from others."""
        return self._session.scalars(select(DatabaseRow.id)).one()

    def states(self, job_ids: Sequence[str]) -> dict[str, str]:
        """The states of these jobs by id; without those that do not exist."""
        found: dict[str, str] = {}
        for start in range(0, len(job_ids), IDS_AT_A_TIME):
            some = job_ids[start : start + IDS_AT_A_TIME]
            rows = self._session.execute(select(JobRow.id, JobRow.state).where(JobRow.id.in_(some)))
            found |= dict(rows.all())
        return found

    def reasons(self, job_ids: Sequence[str]) -> dict[str, str | None]:
        """Why these jobs are in their state, by id; without those that do not exist."""
        rows = self._session.execute(select(JobRow.id, JobRow.reason).where(JobRow.id.in_(job_ids)))
        return dict(rows.all())

    def files(self, job_id: str) -> dict[str, Collection[str]]:
        """The names of the files of a job's completed trials, by the trial's id."""
        query = select(TrialRow.id, TrialRow.files).where(
            TrialRow.job_id == job_id, TrialRow.state == TrialState.COMPLETED
        )
        return {trial_id: files.keys() for trial_id, files in self._session.execute(query)}

    def ended_before(self, at: datetime) -> list[tuple[str, str]]:
        """Tenant and id of the jobs that ended before a time, oldest first."""
        query = (
            select(JobRow.tenant, JobRow.id)
            .where(JobRow.state.in_(JOB_ENDED), JobRow.ended_at < at)
            .order_by(JobRow.position)
        )
        return [(tenant, job_id) for tenant, job_id in self._session.execute(query)]

    def passing_events(self, at: datetime) -> list[tuple[str, int]]:
        """Jobs that ended before a time, and how many events of trials and epochs each still has.

        Without those of which a webhook was told something that is not forgotten yet: it may be sent again.
        """
        query = (
            select(JobRow.id, func.count())
            .join(EventRow, EventRow.job_id == JobRow.id)
            .where(
                JobRow.state.in_(JOB_ENDED),
                JobRow.ended_at < at,
                EventRow.kind.in_(_PASSING),
                ~exists().where(DeliveryRow.job_id == JobRow.id),
            )
            .group_by(JobRow.id, JobRow.position)
            .order_by(JobRow.position)
        )
        return [(job_id, events) for job_id, events in self._session.execute(query)]

    def remove_passing_events(self, job_id: str) -> None:
        """Remove the events of a job's trials and epochs; the others keep their sequence.

        What the job itself went through stays, and with it its end, which is its newest event: so who reads
        on after any event, one that is gone included, comes to the end.
        """
        take_long(self._session)
        self._session.execute(delete(EventRow).where(EventRow.job_id == job_id, EventRow.kind.in_(_PASSING)))
