"""What a server is told by its operator: `COTERIE_*` variables, a `.env` file, or the command line."""

import os
from pathlib import Path
from typing import Annotated, Self

import platformdirs
from pydantic import AfterValidator, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from coterie.service.storage.database import sqlite_file


def _default_data_dir() -> Path:
    return platformdirs.user_data_path("coterie", appauthor=False)


def _absolute(path: Path) -> Path:
    """Jobs run in folders of their own, so no path may depend on the server's."""
    return path.expanduser().absolute()


class Settings(BaseSettings):
    """Settings of a server and of the drivers that it starts."""

    model_config = SettingsConfigDict(
        env_prefix="COTERIE_", env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True
    )

    data_dir: Annotated[Path, AfterValidator(_absolute)] = Field(
        default_factory=_default_data_dir, description="Folder of database, artifacts, logs and Ray's state."
    )
    database_url: str | None = Field(
        default=None, description="SQLAlchemy URL; by default a SQLite file in the data folder."
    )
    ray_address: str | None = Field(
        default=None, description="Address of a Ray cluster; by default the server starts a head of its own."
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    max_running_jobs: int = Field(default=1, ge=1, description="Jobs that run at a time; the others wait.")
    cpus: int | None = Field(default=None, ge=1, description="CPU cores of the embedded head; default all.")
    gpus: int | None = Field(
        default=None, ge=0, description="GPUs of the embedded head; default what Ray finds."
    )
    lease_seconds: float = Field(
        default=30, gt=0, description="A driver that was not heard of for so long is taken for dead."
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
    def node_cpus(self) -> int:
        """CPU cores of the embedded head."""
        return self.cpus or os.cpu_count() or 1

    def artifacts_of(self, job_id: str) -> Path:
        """The folder of a job's artifacts and logs, existing or not."""
        return self.data_dir / "jobs" / job_id

    def log_of(self, job_id: str) -> Path:
        """The log of a job's drivers, existing or not."""
        return self.artifacts_of(job_id) / "worker.log"
