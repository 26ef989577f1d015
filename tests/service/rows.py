"""Rows of jobs and trials, straight into the tables: many of them in no time."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import insert
from sqlalchemy.orm import Session

from coterie.search.spec import JobSpec
from coterie.service.storage.repositories import JobRepository
from coterie.service.storage.tables import FrontHistoryRow, MeasurementRow, TrialRow, TrialValueRow

SPEC = JobSpec.model_validate({"dataset": {"source": "digits"}, "budget": {"trials": 4}})
DIRECTIONS = {"delta_m": "maximize", "macs": "minimize", "params": "minimize", "latency_ms": "minimize"}
NOW = datetime(2026, 1, 2, tzinfo=UTC)


def add_job(session: Session, spec: JobSpec = SPEC) -> str:
    row, _ = JobRepository(session).create(spec, DIRECTIONS, NOW)
    session.flush()
    return row.id


def add_trials(
    session: Session,
    job_id: str,
    values: Mapping[int, Mapping[str, float]],
    *,
    state: str = "completed",
    family: str = "shared",
    on_front: Iterable[int] = (),
) -> None:
    """Ended trials by number, each with a measurement and a step of the front's history."""
    on_front = set(on_front)
    common: dict[str, Any] = {
        "job_id": job_id,
        "state": state,
        "family": family,
        "backbone": "mlp",
        "parameters": {"lr": 0.005},
        "choices": {},
        "seed": 1,
        "grouping": [["left", "right"]],
        "test": {},
        "tasks": {},
        "epochs": 1,
        "device_seconds": 1.0,
        "crashes": 0,
        "files": {},
        "started_at": NOW,
        "ended_at": NOW,
    }
    ids = {number: f"trial_{job_id}_{number}" for number in values}
    rows = [
        {**common, "id": ids[number], "number": number, "values": found, "on_front": number in on_front}
        for number, found in values.items()
    ]
    measured = {"epoch": 1, "values": {}, "tasks": {}, "device_seconds": 1.0, "worker": "host:2", "at": NOW}
    step = {"job_id": job_id, "hypervolume": None, "size": 1, "at": NOW}
    session.execute(insert(TrialRow), rows)
    session.execute(
        insert(TrialValueRow),
        [
            {"job_id": job_id, "number": number, "metric": metric, "value": value}
            for number, found in values.items()
            for metric, value in found.items()
        ],
    )
    session.execute(insert(MeasurementRow), [{**measured, "trial_id": trial_id} for trial_id in ids.values()])
    session.execute(
        insert(FrontHistoryRow),
        [{**step, "trial_id": trial_id, "sequence": number + 1} for number, trial_id in ids.items()],
    )
