"""Rows as the API shows them: documents where there may be many of them or many ask, else models."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

from coterie.search.confirmed import PointSummary, Spread
from coterie.search.store import COSTS, JobState, TrialState
from coterie.service import schemas
from coterie.service.documents import Document, parse, verbatim
from coterie.service.storage.events import EventKind
from coterie.service.storage.queue import Place
from coterie.service.storage.shown import ShownRow, named
from coterie.service.storage.tables import EventRow, ReferenceRow


def job_view(row: ShownRow, place: Place | None, dashboard_url: str | None, now: datetime) -> Document:
    """A `schemas.Job` of a row of `shown.JOB`: how far it is `now`, and its place while it is queued."""
    shown = named(row)
    path = f"/v1/jobs/{shown['id']}"
    ray_job = shown["submission_id"] if dashboard_url else None
    return {
        "id": shown["id"],
        "name": shown["name"],
        "state": shown["state"],
        "reason": shown["reason"],
        "spec": verbatim(shown["spec"]),
        "tenant": shown["tenant"],
        "priority": shown["priority"],
        "created_at": shown["created_at"],
        "started_at": shown["started_at"],
        "ended_at": shown["ended_at"],
        "queue": None
        if place is None
        else {"position": place.position, "expected_start_at": place.starts_at, "waits_for": place.hold},
        "progress": _progress(shown, now),
        "hypervolume": shown["hypervolume"],
        "verdict": verbatim(shown["verdict"]),
        "links": {
            "self": path,
            "front": f"{path}/front",
            "trials": f"{path}/trials",
            "events": f"{path}/events",
            "affinity": f"{path}/affinity",
            "references": f"{path}/references",
            "logs": f"{path}/logs",
            "ray_dashboard": f"{dashboard_url}/#/jobs/{ray_job}" if ray_job else None,
        },
    }


def trial_view(row: ShownRow, metrics: Iterable[str]) -> Document:
    """A `schemas.Trial` of a row of `shown.TRIAL`; `metrics` are those that it has once it is measured."""
    shown, unmeasured = named(row), dict.fromkeys(metrics)
    path = f"/v1/trials/{shown['id']}"
    completed = shown["state"] == TrialState.COMPLETED
    return {
        "id": shown["id"],
        "job_id": shown["job_id"],
        "number": shown["number"],
        "state": shown["state"],
        "reason": shown["reason"],
        "family": shown["family"],
        "backbone": shown["backbone"],
        "candidate": verbatim(shown["parameters"]),
        "origin": shown["origin"],
        "seed": shown["seed"],
        "grouping": verbatim(shown["grouping"]),
        "values": unmeasured | parse(shown["values"]),
        "tasks": verbatim(shown["tasks"]),
        "test": unmeasured | parse(shown["test"]),
        "epochs": shown["epochs"],
        "device_seconds": shown["device_seconds"],
        "worker": shown["worker"],
        "on_front": shown["on_front"],
        "started_at": shown["started_at"],
        "ended_at": shown["ended_at"],
        "links": {
            "self": path,
            "job": f"/v1/jobs/{shown['job_id']}",
            "measurements": f"{path}/measurements",
            "architecture": f"{path}/architecture" if completed else None,
            "model": f"{path}/model" if completed else None,
        },
    }


def measurement_view(row: ShownRow) -> Document:
    """A `schemas.Measurement` of a row of `shown.MEASUREMENT`."""
    shown = named(row)
    return shown | {"values": verbatim(shown["values"]), "tasks": verbatim(shown["tasks"])}


def point_view(row: ShownRow, confirmed: PointSummary | None) -> Document:
    """A `schemas.FrontPoint` of a row of `shown.FRONT_POINT`, with what fresh seeds gave."""
    shown = named(row)
    return {
        "trial_id": shown["id"],
        "values": verbatim(shown["values"]),
        "family": shown["family"],
        "grouping": verbatim(shown["grouping"]),
        "test": verbatim(shown["test"]),
        "confirmed": None if confirmed is None else _confirmed(confirmed).model_dump(),
    }


def step_view(row: ShownRow) -> Document:
    """A `schemas.FrontStep` of a row of `shown.FRONT_STEP`."""
    shown = named(row)
    del shown["sequence"]
    return shown


def reference_view(row: ReferenceRow) -> schemas.Reference:
    """A reference network."""
    return schemas.Reference(
        task=row.task,
        **network_settings(row.backbone, row.recipe),
        epochs=row.epochs,
        seed=row.seed,
        validation=row.validation,
        test=row.test,
        device_seconds=row.device_seconds,
    )


def network_settings(backbone: str, recipe: str) -> dict[str, Any]:
    """The canonical JSON of a backbone and its recipe, taken apart."""
    name, sizes = json.loads(backbone)
    return {"backbone": name, "sizes": sizes, "recipe": json.loads(recipe)}


def metrics_of(spec: Mapping[str, Any]) -> list[str]:
    """The objectives and costs of the trials of a job with this spec."""
    objectives = [objective["metric"] for objective in spec["objectives"]]
    return [*objectives, *(cost for cost in COSTS if cost not in objectives)]


def _confirmed(summary: PointSummary) -> schemas.Confirmed:
    over_shared = summary.over_shared
    return schemas.Confirmed(
        seeds=summary.seeds,
        failed=summary.failed,
        validation=_spreads(summary.validation),
        test=_spreads(summary.test),
        over_shared=None if over_shared is None else schemas.SharedComparison(**asdict(over_shared)),
    )


def _spreads(spreads: Mapping[str, Spread]) -> dict[str, schemas.Spread]:
    return {name: schemas.Spread(mean=spread.mean, std=spread.std) for name, spread in spreads.items()}


def _progress(shown: Document, now: datetime) -> Document:
    budget = parse(shown["spec"])["budget"]
    used, failed = shown["trials_completed"] + shown["trials_stopped"], shown["trials_failed"]
    return {
        "trials": {
            "pending": shown["trials_pending"],
            "running": shown["trials_running"],
            "completed": shown["trials_completed"],
            "stopped": shown["trials_stopped"],
            "failed": failed,
        },
        "budget": {
            "trials": {"used": used, "total": budget["trials"]},
            "seconds": {"used": shown["seconds"], "total": budget["seconds"]},
            "device_seconds": {"used": shown["device_seconds"], "total": budget["device_seconds"]},
            "failures": {"used": failed, "total": budget["failures"]},
        },
        "eta_seconds": _eta(shown, now),
    }


def _eta(shown: Document, now: datetime) -> float | None:
    """What is left of the time that the job's driver expected last."""
    if shown["state"] != JobState.RUNNING or shown["eta_seconds"] is None or shown["eta_at"] is None:
        return None
    passed: float = (now - shown["eta_at"]).total_seconds()
    return max(0.0, float(shown["eta_seconds"]) - passed)


def event_view(row: EventRow) -> schemas.Event:
    """An event, as streams and webhooks tell it."""
    return schemas.Event(
        job_id=row.job_id, sequence=row.sequence, kind=EventKind(row.kind), at=row.at, data=row.data
    )
