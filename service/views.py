"""Rows as the API shows them."""

from collections.abc import Iterable

from coterie.search.objective import COSTS
from coterie.search.spec import BudgetSpec, JobSpec
from coterie.search.store import JobState, TrialState
from coterie.service import schemas
from coterie.service.storage.repositories import Usage
from coterie.service.storage.tables import JobRow, TrialRow


def job_view(row: JobRow, usage: Usage, dashboard_url: str | None) -> schemas.Job:
    """A job, with how far it is."""
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
        progress=_progress(JobState(row.state), spec.budget, usage),
        hypervolume=row.hypervolume,
        links=schemas.JobLinks(
            self=path,
            front=f"{path}/front",
            trials=f"{path}/trials",
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


def metrics_of(job: JobRow) -> list[str]:
    """The objectives and costs of a job's trials."""
    objectives = [objective["metric"] for objective in job.spec["objectives"]]
    return [*objectives, *(cost for cost in COSTS if cost not in objectives)]


def _progress(state: JobState, budget: BudgetSpec, usage: Usage) -> schemas.Progress:
    def count(trial_state: TrialState) -> int:
        return usage.trials.get(trial_state, 0)

    used = count(TrialState.COMPLETED) + count(TrialState.STOPPED)
    failed = count(TrialState.FAILED)
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
        eta_seconds=_eta(budget, used, usage) if state == JobState.RUNNING and used + failed else None,
    )


def _eta(budget: BudgetSpec, trials: int, usage: Usage) -> float | None:
    """Time left until the limit that is used up first, at the pace so far."""
    shares = [
        used / total
        for used, total in (
            (trials, budget.trials),
            (usage.seconds, budget.seconds),
            (usage.device_seconds, budget.device_seconds),
        )
        if total is not None
    ]
    share = min(1.0, max(shares))
    return usage.seconds * (1 - share) / share if share else None
