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
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# SQLite counts up only a column of type INTEGER.
_Counter = BigInteger().with_variant(Integer, "sqlite")


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
        list[list[str]]: JSON(none_as_null=True),
        list[list[float | None]]: JSON(),
        str: Text(),
    }


class JobRow(Table):
    """A search job. `attempt` is the fence: only the driver of that attempt may write."""

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("tenant", "idempotency_key"),
        Index(None, "state", "priority", "position"),
        Index(None, "name"),
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
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]


class AttemptRow(Table):
    """One driver's run of a job. Between `started_at` and `last_seen_at` the job is charged."""

    __tablename__ = "attempts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    driver: Mapped[str | None]  # host:pid
    reason: Mapped[str | None]  # why it was given up
    preempted: Mapped[bool]  # given up for no fault of its own
    started_at: Mapped[datetime]
    last_seen_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    side_device_seconds: Mapped[float]  # for references, subset networks, affinities and confirming runs


class TrialRow(Table):
    """One training of one candidate with one seed. `attempt` is the one that ended it."""

    __tablename__ = "trials"
    __table_args__ = (
        UniqueConstraint("job_id", "number"),
        Index(None, "job_id", "state", "number"),
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
    trial_id: Mapped[str] = mapped_column(ForeignKey("trials.id", ondelete="CASCADE"))
    hypervolume: Mapped[float | None]
    size: Mapped[int]
    at: Mapped[datetime]


class ReferenceRow(Table):
    """A single-task reference network, shared by all jobs that need the same."""

    __tablename__ = "reference_networks"
    __table_args__ = (
        UniqueConstraint("data", "task", "backbone", "recipe", "epochs", "seed"),
        {"sqlite_autoincrement": True},
    )

    position: Mapped[int] = mapped_column(_Counter, primary_key=True)
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
        Index(None, "data", "backbone", "recipe", "epochs", "position"),
        UniqueConstraint("job_id", "run", "subset", "seed"),
        {"sqlite_autoincrement": True},
    )

    position: Mapped[int] = mapped_column(_Counter, primary_key=True)
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
    """How much tasks help each other, measured in one training; shared by all jobs on the same data."""

    __tablename__ = "affinities"
    __table_args__ = (
        UniqueConstraint("data", "backbone", "recipe", "epochs", "method", "tasks", "seed"),
        {"sqlite_autoincrement": True},
    )

    position: Mapped[int] = mapped_column(_Counter, primary_key=True)
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
