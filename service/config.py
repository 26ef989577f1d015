"""What a server is told by its operator: `COTERIE_*` variables, a `.env` file, or the command line."""

import os
import re
from pathlib import Path
from typing import Annotated, Self

import platformdirs
from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from coterie.search.artifacts import Location, location_of
from coterie.service.storage.database import sqlite_file
from coterie.service.storage.tenants import Limits

JOB_ID = re.compile("job_[0-9A-Za-z_-]{1,60}")


def _default_data_dir() -> Path:
    return platformdirs.user_data_path("coterie", appauthor=False)


def _absolute(path: Path) -> Path:
    """Jobs run in folders of their own, so no path may depend on the server's."""
    return path.expanduser().absolute()


def _location(text: str) -> str:
    """A folder by its absolute path, or a URL as it is."""
    if "://" not in text:
        return str(_absolute(Path(text)))
    if "@" in text.partition("://")[2].partition("/")[0]:
        raise ValueError("artifacts: must hold no password; s3fs reads AWS_* variables and ~/.aws")
    try:
        location_of(text)
    except ImportError as error:
        raise ValueError(f"artifacts: {error}; for S3 run `pip install 'coterie[s3]'`") from error
    except ValueError as error:
        raise ValueError(
            f"artifacts: must be a folder by its path, or a URL that fsspec writes to, found {text}"
        ) from error
    return text.rstrip("/")


def _words(value: object) -> object:
    """A list as a variable has it: with commas or blanks between."""
    return re.split(r"[,\s]+", value.strip(", \t")) if isinstance(value, str) else value


class Settings(BaseSettings):
    """Settings of a server and of the drivers that it starts."""

    model_config = SettingsConfigDict(
        env_prefix="COTERIE_", env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True
    )

    data_dir: Annotated[Path, AfterValidator(_absolute)] = Field(
        default_factory=_default_data_dir, description="Folder of database, artifacts, logs and Ray's state."
    )
    artifacts: Annotated[str, BeforeValidator(str), AfterValidator(_location)] | None = Field(
        default=None,
        description="Folder of the jobs' files, or a URL that fsspec knows, as s3://bucket/prefix. Servers "
        "that share a database share it too, and no others. By default in the data folder.",
    )
    database_url: str | None = Field(
        default=None, description="SQLAlchemy URL; by default a SQLite file in the data folder."
    )
    ray_address: str | None = Field(
        default=None, description="Address of a Ray cluster; by default the server starts a head of its own."
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    max_connections: int = Field(
        default=1000, ge=1, description="Connections at a time, event streams included; others get a 503."
    )
    cors_origins: Annotated[
        tuple[Annotated[str, Field(pattern=r"^https?://[^/\s*]+$")], ...], NoDecode, BeforeValidator(_words)
    ] = Field(
        default=(),
        description="Origins of web pages that may call the API, as https://example.org; by default none.",
    )
    requests_per_second: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Requests that a token may make on average, of this server; by default no limit.",
    )
    max_running_jobs: int = Field(
        default=1,
        ge=1,
        description="Jobs that run at a time on the embedded head, or on the cluster whichever server starts "
        "them; the others wait.",
    )
    cpus: int | None = Field(default=None, ge=1, description="CPU cores of the embedded head; default all.")
    gpus: int | None = Field(
        default=None, ge=0, description="GPUs of the embedded head; default what Ray finds."
    )
    lease_seconds: float = Field(
        default=30,
        ge=10,  # a driver beats every 2 s, and waits up to 5 s for a database that is away
        description="A driver, or a process that trains, that was silent for so long is taken for dead.",
    )
    min_free_bytes: int = Field(
        default=200_000_000,
        ge=0,
        description="While less is free on the disk of the data folder or of the artifacts, no job starts; "
        "queued ones wait.",
    )
    retention_days: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="`coterie gc` deletes jobs that ended longer ago, with their files; by default none.",
    )
    event_retention_days: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="`coterie gc` removes the events of the trials and epochs of jobs that ended longer ago; "
        "by default none.",
    )
    tenant_max_queued_jobs: int | None = Field(
        default=None, ge=0, description="Jobs of one tenant that may be queued; default without limit."
    )
    tenant_max_running_jobs: int | None = Field(
        default=None, ge=0, description="Jobs of one tenant that may run at a time; default without limit."
    )
    tenant_max_device_seconds: float | None = Field(
        default=None,
        ge=0,
        description="Device-seconds that one tenant may use in a calendar month, UTC; default without limit.",
    )
    tenant_max_stored_bytes: int | None = Field(
        default=None,
        ge=0,
        description="Bytes that weights and architectures of one tenant may take; default without limit.",
    )

    webhook_allow_private: bool = Field(
        default=False, description="Whether webhooks may be in the server's own network, or on its machine."
    )

    @model_validator(mode="after")
    def _reachable_database(self) -> Self:
        file = sqlite_file(self.url)
        if file is not None and self.ray_address is not None:
            raise ValueError(
                "ray_address: a remote Ray needs a database that its workers can reach, and SQLite is a file "
                "on this machine; set COTERIE_DATABASE_URL to PostgreSQL"
            )
        return self

    @property
    def url(self) -> str:
        """The database's SQLAlchemy URL."""
        return self.database_url or f"sqlite:///{self.data_dir / 'coterie.db'}"

    @property
    def tenant_limits(self) -> Limits:
        """The limits of tenants that have none of their own."""
        return Limits(
            max_queued_jobs=self.tenant_max_queued_jobs,
            max_running_jobs=self.tenant_max_running_jobs,
            max_device_seconds=self.tenant_max_device_seconds,
            max_stored_bytes=self.tenant_max_stored_bytes,
        )

    @property
    def node_cpus(self) -> int:
        """CPU cores of the embedded head."""
        return self.cpus or os.cpu_count() or 1

    @property
    def jobs_dir(self) -> Location:
        """The folder that holds a folder for each job, existing or not."""
        return location_of(self.artifacts) if self.artifacts else self.data_dir / "jobs"

    def artifacts_of(self, job_id: str) -> Location:
        """The folder of a job's artifacts and logs, existing or not.

        Raises:
            ValueError: If this is no id, and might lead elsewhere.
        """
        if not JOB_ID.fullmatch(job_id):
            raise ValueError(f"job_id: must be as job_1, found {job_id!r}")
        return self.jobs_dir / job_id

    def log_of(self, job_id: str) -> Location:
        """The log of a job's drivers, existing or not, as `job_log` has it."""
        return self.artifacts_of(job_id) / "worker.log"
