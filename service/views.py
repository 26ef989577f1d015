"""Rows as the API shows them."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

from coterie.search.confirm import PointSummary, Spread
from coterie.search.objective import COSTS
from coterie.search.spec import JobSpec
from coterie.search.store import JobState, TrialState
from coterie.service import schemas
from coterie.service.storage.repositories import Usage
from coterie.service.storage.tables import JobRow, ReferenceRow, TrialRow


def job_view(row: JobRow, usage: Usage, dashboard_url: str | None, now: datetime) -> schemas.Job:
    """A job, with how far it is `now`."""
    spec = JobSpec.model_validate(row.spec)
    path = f"/v1/jobs/{row.id}"
    return schemas.Job(
        id=row.id,
        name=row.name,
        state=JobState(row.state),
        reason=row.reason,
        spec=spec,
        tenant=row.tenant,
        priority=row.priority,
        created_at=row.created_at,
        started_at=row.started_at,
        ended_at=row.ended_at,
        progress=_progress(row, spec, usage, now),
        hypervolume=row.hypervolume,
        verdict=None if row.verdict is None else schemas.Verdict(**row.verdict),
        links=schemas.JobLinks(
            self=path,
            front=f"{path}/front",
            trials=f"{path}/trials",
            affinity=f"{path}/affinity",
            references=f"{path}/references",
            logs=f"{path}/logs",
            ray_dashboard=f"{dashboard_url}/#/jobs/{row.submission_id}"
            if dashboard_url and row.submission_id
            else None,
        ),
    )


def trial_view(row: TrialRow, metrics: Iterable[str]) -> schemas.Trial:
    """A trial; `metrics` are those that it has once it is measured."""
    unmeasured = dict.fromkeys(metrics)
    path = f"/v1/trials/{row.id}"
    completed = row.state == TrialState.COMPLETED
    return schemas.Trial(
        id=row.id,
        job_id=row.job_id,
        number=row.number,
        state=TrialState(row.state),
        reason=row.reason,
        family=row.family,
        backbone=row.backbone,
        candidate=row.parameters,
        origin=row.origin,
        seed=row.seed,
        grouping=row.grouping,
        values=unmeasured | row.values,
        tasks=row.tasks,
        test=unmeasured | row.test,
        epochs=row.epochs,
        device_seconds=row.device_seconds,
        worker=row.worker,
        on_front=row.on_front,
        started_at=row.started_at,
        ended_at=row.ended_at,
        links=schemas.TrialLinks(
            self=path,
            job=f"/v1/jobs/{row.job_id}",
            measurements=f"{path}/measurements",
            architecture=f"{path}/architecture" if completed else None,
            model=f"{path}/model" if completed else None,
        ),
    )


def point_view(row: TrialRow, confirmed: PointSummary | None) -> schemas.FrontPoint:
    """A point of a front, with what fresh seeds gave."""
    return schemas.FrontPoint(
        trial_id=row.id,
        values=row.values,
        family=row.family,
        grouping=row.grouping,
        test=row.test,
        confirmed=None if confirmed is None else _confirmed(confirmed),
    )


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


def metrics_of(job: JobRow) -> list[str]:
    """The objectives and costs of a job's trials."""
    objectives = [objective["metric"] for objective in job.spec["objectives"]]
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


def _progress(row: JobRow, spec: JobSpec, usage: Usage, now: datetime) -> schemas.Progress:
    def count(trial_state: TrialState) -> int:
        return usage.trials.get(trial_state, 0)

    used = count(TrialState.COMPLETED) + count(TrialState.STOPPED)
    failed = count(TrialState.FAILED)
    budget = spec.budget
    return schemas.Progress(
        trials=schemas.TrialCounts(
            pending=count(TrialState.PENDING),
            running=count(TrialState.RUNNING),
            completed=count(TrialState.COMPLETED),
            stopped=count(TrialState.STOPPED),
            failed=failed,
        ),
        budget=schemas.BudgetUse(
            trials=schemas.CountBudget(used=used, total=budget.trials),
            seconds=schemas.SecondsBudget(used=usage.seconds, total=budget.seconds),
            device_seconds=schemas.SecondsBudget(used=usage.device_seconds, total=budget.device_seconds),
            failures=schemas.CountBudget(used=failed, total=budget.failures),
        ),
        eta_seconds=_eta(row, now),
    )


def _eta(row: JobRow, now: datetime) -> float | None:
    """What is left of the time that the job's driver expected last."""
    if row.state != JobState.RUNNING or row.eta_seconds is None or row.eta_at is None:
        return None
    return max(0.0, row.eta_seconds - (now - row.eta_at).total_seconds())
