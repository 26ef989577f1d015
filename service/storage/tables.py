"""The tables. Times are UTC; JSON columns hold no NaN (the engine's serializer refuses it)."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# SQLite counts up only a column of type INTEGER.
_Counter = BigInteger().with_variant(Integer, "sqlite")
ON_FRONT = text("on_front")  # SQLite uses the index for just these words
DEFAULT_TENANT = "default"


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime, in UTC; SQLite alone would forget the zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Store in UTC."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Give the zone back."""
        return (
            None
            if value is None
            else value.replace(tzinfo=UTC)
            if value.tzinfo is None
            else value.astimezone(UTC)
        )


class Table(DeclarativeBase):
    """Base of the tables. No relationships: each query says what it reads."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy's own declaration
        datetime: UtcDateTime(),
        dict[str, Any]: JSON(),
        list[str]: JSON(),
        list[list[str]]: JSON(none_as_null=True),
        list[list[float | None]]: JSON(),
        str: Text(),
    }


class JobRow(Table):
    """A search job. `attempt` is the fence: only the driver of that attempt may write."""

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("tenant", "idempotency_key"),
        Index(None, "state", "position"),
        Index(None, "tenant", "position"),
        Index(None, "tenant", "state", "position"),
        Index(None, "tenant", "name", "position"),
        Index(None, "tenant", "started_at"),
        {"sqlite_autoincrement": True},
    )

    position: Mapped[int] = mapped_column(_Counter, primary_key=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    name: Mapped[str]
    tenant: Mapped[str] = mapped_column(String(100))
    state: Mapped[str] = mapped_column(String(20))
    reason: Mapped[str | None]
    spec: Mapped[dict[str, Any]]
    directions: Mapped[dict[str, Any]]  # of every metric that the job's trials have
    priority: Mapped[int]
    attempt: Mapped[int]
    owner: Mapped[str | None] = mapped_column(String(64))  # whose Ray it was claimed for last
    beats: Mapped[int] = mapped_column(BigInteger, server_default="0")  # writes of its drivers so far
    lease_expires_at: Mapped[datetime | None]
    submission_id: Mapped[str | None]
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    idempotency_digest: Mapped[str | None] = mapped_column(String(64))
    hypervolume: Mapped[float | None]
    reference_point: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    memory_until: Mapped[int | None] = mapped_column(
        BigInteger
    )  # last subset network of others that it knows
    side_setting: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    verdict: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    eta_seconds: Mapped[float | None]  # from `eta_at` on
    eta_at: Mapped[datetime | None]
    last_event: Mapped[int] = mapped_column(server_default="0")  # sequence of its newest event
    # Counted as they change, so that a list of jobs need not look at their trials.
    trials_pending: Mapped[int] = mapped_column(server_default="0")
    trials_running: Mapped[int] = mapped_column(server_default="0")
    trials_completed: Mapped[int] = mapped_column(server_default="0")
    trials_stopped: Mapped[int] = mapped_column(server_default="0")
    trials_failed: Mapped[int] = mapped_column(server_default="0")
    trials_cancelled: Mapped[int] = mapped_column(server_default="0")
    seconds: Mapped[float] = mapped_column(server_default="0")  # that its drivers ran
    device_seconds: Mapped[float] = mapped_column(server_default="0")  # of trials and what ran beside them
    stored_bytes: Mapped[int] = mapped_column(BigInteger, server_default="0")  # of its trials' files
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]


class AttemptRow(Table):
    """One driver's run of a job. `seconds` is what the job is charged, by the driver's monotonic clock."""

    __tablename__ = "attempts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    driver: Mapped[str | None]  # host:pid
    reason: Mapped[str | None]  # why it was given up
    preempted: Mapped[bool]  # given up for no fault of its own
    started_at: Mapped[datetime]
    last_seen_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    seconds: Mapped[float] = mapped_column(server_default="0")
    side_device_seconds: Mapped[float]  # for references, subset networks, affinities and confirming runs
    last_write_digest: Mapped[str | None] = mapped_column(String(64))  # tells the driver that it was kept
    events_before: Mapped[int] = mapped_column(server_default="0")  # how many the job had when it began


class TrialRow(Table):
    """One training of one candidate with one seed. `attempt` is the one that ended it."""

    __tablename__ = "trials"
    __table_args__ = (
        UniqueConstraint("job_id", "number"),
        Index(None, "job_id", "state", "number"),
        Index(None, "job_id", "family", "number"),
        Index("ix_trials_front", "job_id", "number", sqlite_where=ON_FRONT, postgresql_where=ON_FRONT),
        {"sqlite_autoincrement": True},
    )

    position: Mapped[int] = mapped_column(_Counter, primary_key=True)
    id: Mapped[str] = mapped_column(String(100), unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    number: Mapped[int]
    state: Mapped[str] = mapped_column(String(20))
    reason: Mapped[str | None]
    family: Mapped[str] = mapped_column(String(100))
    backbone: Mapped[str] = mapped_column(String(100))
    parameters: Mapped[dict[str, Any]]
    choices: Mapped[dict[str, Any]]
    seed: Mapped[int] = mapped_column(BigInteger)
    origin: Mapped[str] = mapped_column(String(20), server_default="")  # older versions did not note it
    grouping: Mapped[list[list[str]] | None]
    values: Mapped[dict[str, Any]]
    test: Mapped[dict[str, Any]]
    tasks: Mapped[dict[str, Any]]
    epochs: Mapped[int]
    device_seconds: Mapped[float]
    crashes: Mapped[int]
    worker: Mapped[str | None]
    on_front: Mapped[bool]
    files: Mapped[dict[str, Any]]
    attempt: Mapped[int | None]
    started_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]


class TrialValueRow(Table):
    """An ended trial's validation value of one metric, so that trials are sorted and chosen by index."""

    __tablename__ = "trial_values"
    __table_args__ = (Index(None, "job_id", "metric", "value", "number"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    metric: Mapped[str] = mapped_column(String(300), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)  # of the trial
    value: Mapped[float]


class MeasurementRow(Table):
    """What one epoch of a trial gave."""

    __tablename__ = "measurements"

    trial_id: Mapped[str] = mapped_column(ForeignKey("trials.id", ondelete="CASCADE"), primary_key=True)
    epoch: Mapped[int] = mapped_column(primary_key=True)
    values: Mapped[dict[str, Any]]
    tasks: Mapped[dict[str, Any]]
    device_seconds: Mapped[float]
    worker: Mapped[str]
    at: Mapped[datetime]


class FrontHistoryRow(Table):
    """The front after a trial."""

    __tablename__ = "front_history"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    sequence: Mapped[int] = mapped_column(primary_key=True)
    trial_id: Mapped[str] = mapped_column(ForeignKey("trials.id", ondelete="CASCADE"), index=True)
    hypervolume: Mapped[float | None]
    size: Mapped[int]
    at: Mapped[datetime]


class ReferenceRow(Table):
    """A single-task reference network, shared by all jobs of a tenant that need the same."""

    __tablename__ = "reference_networks"
    __table_args__ = (
        UniqueConstraint("tenant", "data", "task", "backbone", "recipe", "epochs", "seed"),
        {"sqlite_autoincrement": True},
    )

    position: Mapped[int] = mapped_column(_Counter, primary_key=True)
    tenant: Mapped[str] = mapped_column(String(100), server_default=DEFAULT_TENANT)  # others do not see it
    data: Mapped[str]
    task: Mapped[str]
    backbone: Mapped[str]
    recipe: Mapped[str]
    epochs: Mapped[int]
    seed: Mapped[int] = mapped_column(BigInteger)
    validation: Mapped[dict[str, Any]]
    test: Mapped[dict[str, Any]]
    device_seconds: Mapped[float]
    latency_ms: Mapped[float]
    at: Mapped[datetime]


class JobReferenceRow(Table):
    """Which references a job measures against."""

    __tablename__ = "job_references"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    reference: Mapped[int] = mapped_column(
        ForeignKey("reference_networks.position", ondelete="CASCADE"), primary_key=True
    )


class SubsetRow(Table):
    """A network for a subset of the tasks; it outlives its job, as other jobs may know it already."""

    __tablename__ = "subset_networks"
    __table_args__ = (
        Index(None, "tenant", "data", "backbone", "recipe", "epochs", "position"),
        UniqueConstraint("job_id", "run", "subset", "seed"),
        {"sqlite_autoincrement": True},
    )

    position: Mapped[int] = mapped_column(_Counter, primary_key=True)
    tenant: Mapped[str] = mapped_column(String(100), server_default=DEFAULT_TENANT)  # others do not see it
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id", ondelete="SET NULL"))
    run: Mapped[int]
    data: Mapped[str]
    backbone: Mapped[str]
    recipe: Mapped[str]
    epochs: Mapped[int]
    subset: Mapped[str]  # canonical JSON: [[task, weight], ...]
    seed: Mapped[int] = mapped_column(BigInteger)
    validation: Mapped[dict[str, Any]]
    test: Mapped[dict[str, Any]]
    at: Mapped[datetime]


class AffinityRow(Table):
    """How much tasks help each other, measured in one training; shared by a tenant's jobs."""

    __tablename__ = "affinities"
    __table_args__ = (
        UniqueConstraint("tenant", "data", "backbone", "recipe", "epochs", "method", "tasks", "seed"),
        {"sqlite_autoincrement": True},
    )

    position: Mapped[int] = mapped_column(_Counter, primary_key=True)
    tenant: Mapped[str] = mapped_column(String(100), server_default=DEFAULT_TENANT)  # others do not see it
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id", ondelete="SET NULL"))  # that measured it
    data: Mapped[str]
    backbone: Mapped[str]
    recipe: Mapped[str]
    epochs: Mapped[int]
    method: Mapped[str] = mapped_column(String(100))
    tasks: Mapped[str]  # canonical JSON: [[task, weight], ...]
    seed: Mapped[int] = mapped_column(BigInteger)
    matrix: Mapped[list[list[float | None]]]
    at: Mapped[datetime]


class ConfirmationRow(Table):
    """One training with a fresh seed of a point of the front, or of what that is compared with."""

    __tablename__ = "confirmations"

    trial_id: Mapped[str] = mapped_column(ForeignKey("trials.id", ondelete="CASCADE"), primary_key=True)
    role: Mapped[str] = mapped_column(String(20), primary_key=True)
    seed: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    sequence: Mapped[int]  # within the job
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    state: Mapped[str] = mapped_column(String(20))
    reason: Mapped[str | None]
    family: Mapped[str] = mapped_column(String(100))
    backbone: Mapped[str] = mapped_column(String(100))
    parameters: Mapped[dict[str, Any]]
    grouping: Mapped[list[list[str]] | None]
    values: Mapped[dict[str, Any]]
    test: Mapped[dict[str, Any]]
    tasks: Mapped[dict[str, Any]]
    epochs: Mapped[int]
    device_seconds: Mapped[float]
    at: Mapped[datetime]


class DatabaseRow(Table):
    """One row: what tells this database, and what was copied from it, from others."""

    __tablename__ = "database"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)


class EventRow(Table):
    """Something that happened to a job. Its sequence has no gaps: writers hold the job's row."""

    __tablename__ = "events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    sequence: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(20))
    data: Mapped[dict[str, Any]]
    at: Mapped[datetime]


class TenantRow(Table):
    """Who may use how much; null, and a tenant without a row, is the server's default."""

    __tablename__ = "tenants"

    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    max_queued_jobs: Mapped[int | None]
    max_running_jobs: Mapped[int | None]
    max_device_seconds: Mapped[float | None]  # a calendar month, UTC
    max_stored_bytes: Mapped[int | None] = mapped_column(BigInteger)
    created_at: Mapped[datetime]


class TenantUsageRow(Table):
    """Device-seconds that a tenant's jobs were charged in a month, jobs deleted since included."""

    __tablename__ = "tenant_usage"

    tenant: Mapped[str] = mapped_column(String(100), primary_key=True)
    month: Mapped[str] = mapped_column(String(7), primary_key=True)  # as 2026-11, UTC
    device_seconds: Mapped[float]


class TokenRow(Table):
    """An access token. The token itself is known to its holder alone."""

    __tablename__ = "tokens"
    __table_args__ = (Index(None, "tenant", "position"), {"sqlite_autoincrement": True})

    position: Mapped[int] = mapped_column(_Counter, primary_key=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    tenant: Mapped[str] = mapped_column(String(100))
    role: Mapped[str] = mapped_column(String(20))
    name: Mapped[str]  # what its maker calls it
    digest: Mapped[str] = mapped_column(String(64), unique=True)  # SHA-256 of the token
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class AuditRow(Table):
    """A change, and who made it."""

    __tablename__ = "audit"
    __table_args__ = (
        Index(None, "tenant", "position"),
        Index(None, "tenant", "action", "position"),
        {"sqlite_autoincrement": True},
    )

    position: Mapped[int] = mapped_column(_Counter, primary_key=True)
    at: Mapped[datetime]
    tenant: Mapped[str] = mapped_column(String(100))
    token_id: Mapped[str | None] = mapped_column(String(64))  # null where the server is open, or by the CLI
    action: Mapped[str] = mapped_column(String(100))  # as job.cancel
    target: Mapped[str] = mapped_column(String(200))  # id of what was changed
    request_id: Mapped[str | None] = mapped_column(String(100))
    detail: Mapped[dict[str, Any]]


class WebhookRow(Table):
    """An address that is told of a tenant's events."""

    __tablename__ = "webhooks"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(100), index=True)
    url: Mapped[str]
    secret: Mapped[str]  # signs what is sent, so it can't be hashed
    kinds: Mapped[list[str]]  # of events
    created_at: Mapped[datetime]
    disabled_at: Mapped[datetime | None]  # when its receiver said that it is gone for good


class DeliveryRow(Table):
    """An event on its way to a webhook."""

    __tablename__ = "deliveries"
    __table_args__ = (
        Index(None, "state", "due_at"),
        Index(None, "webhook_id", "position"),
        Index(None, "job_id"),
        UniqueConstraint("webhook_id", "job_id", "sequence"),
        {"sqlite_autoincrement": True},
    )

    position: Mapped[int] = mapped_column(_Counter, primary_key=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    webhook_id: Mapped[str] = mapped_column(ForeignKey("webhooks.id", ondelete="CASCADE"))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    sequence: Mapped[int]  # of the job's event
    state: Mapped[str] = mapped_column(String(20))  # pending, delivered or dead
    attempts: Mapped[int]
    due_at: Mapped[datetime | None]  # the next attempt; a server that makes it moves this on first
    last_status: Mapped[int | None]
    last_error: Mapped[str | None]
    created_at: Mapped[datetime]
    delivered_at: Mapped[datetime | None]
