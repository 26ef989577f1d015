"""What every use-case works with."""

from dataclasses import dataclass
from typing import Protocol

from sqlalchemy.orm import Session

from coterie.service.auth import ANYONE, Caller
from coterie.service.config import Settings
from coterie.service.hub import Hub
from coterie.service.storage.database import Database
from coterie.service.storage.repositories import JobRepository
from coterie.service.storage.trials import TrialRepository


class Dispatcher(Protocol):
    """What the HTTP side needs of the part that runs jobs. Every call comes from a thread of its own."""

    @property
    def dashboard_url(self) -> str | None:
        """Address of the Ray dashboard; None where there is none."""

    @property
    def node_resources(self) -> tuple[float, float]:
        """CPUs and GPUs of the largest node: no trial may ask for more."""

    def start(self) -> None:
        """Begin to run queued jobs."""

    def stop(self) -> None:
        """Stop, and leave nothing running."""

    def ready(self) -> tuple[bool, str]:
        """Whether jobs can run, and what was found."""

    def stop_job(self, job_id: str) -> None:
        """End what runs for a job that was cancelled or paused."""


@dataclass(frozen=True)
class Context:
    """A server's settings, its database, its dispatcher and its event streams, and who asks."""

    settings: Settings
    database: Database
    dispatcher: Dispatcher
    hub: Hub
    caller: Caller = ANYONE

    def jobs(self, session: Session) -> JobRepository:
        """The caller's jobs: others do not exist for them."""
        return JobRepository(session, self.caller.tenant)

    def trials(self, session: Session) -> TrialRepository:
        """The caller's trials."""
        return TrialRepository(session, self.caller.tenant)
