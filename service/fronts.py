"""What can be asked of a job's front."""

from collections.abc import Mapping, Sequence

from coterie.models.tasks import Direction
from coterie.search.confirm import summarise
from coterie.search.front import Front, feasible
from coterie.search.plan import Fault
from coterie.search.spec import ConstraintSpec, JobSpec
from coterie.service import schemas
from coterie.service.context import Context
from coterie.service.cursors import InvalidQuery, decode_cursor, encode_cursor
from coterie.service.storage.repositories import JobRepository, TrialRepository
from coterie.service.storage.store import confirmation_of
from coterie.service.storage.tables import JobRow, TrialRow
from coterie.service.views import metrics_of, point_view, trial_view

_HISTORY = "history"


class NoneFits(Exception):
    """No trial keeps the limits.

    Attributes:
        nearest: Id and values of the trial that misses them least; None where none has completed.
    """

    def __init__(self, detail: str, nearest: tuple[str, schemas.Values] | None) -> None:
        super().__init__(detail)
        self.nearest = nearest


def read_front(
    context: Context,
    job_id: str,
    *,
    metrics: Sequence[str] | None,
    limits: Sequence[ConstraintSpec],
    within_constraints: bool,
) -> schemas.Front:
    """The front as the job keeps it, or another one over the same trials.

    Args:
        context: The server's.
        job_id: Of the job.
        metrics: Objectives instead of the job's own.
        limits: Bounds that every point must keep.
        within_constraints: Whether every point must keep the job's constraints, too.

    Raises:
        NotFound: If the job does not exist.
        InvalidQuery: If one of `metrics` is none of the job's.
    """
    with context.database.read() as session:
        jobs, trials = JobRepository(session), TrialRepository(session)
        job = jobs.get(job_id)
        confirmed = summarise([confirmation_of(row) for row in jobs.confirmations(job_id)])
        as_kept = metrics is None and not limits and within_constraints
        rows = trials.front(job_id) if as_kept else trials.completed(job_id)
    objectives = [(metric, _direction(job, metric, "objectives")) for metric in metrics or _objectives(job)]
    reference = _reference_point(job, [metric for metric, _ in objectives])
    hypervolume = job.hypervolume
    if not as_kept:
        constraints = [*limits, *(_spec(job).constraints if within_constraints else [])]
        rows, hypervolume = _other_front(rows, objectives, reference, constraints)
    return schemas.Front(
        objectives=[
            schemas.Objective(metric=metric, direction=direction) for metric, direction in objectives
        ],
        reference_point=reference,
        hypervolume=hypervolume,
        points=[point_view(row, confirmed.get(row.id)) for row in rows],
    )


def read_history(
    context: Context, job_id: str, *, limit: int, cursor: str | None
) -> schemas.Page[schemas.FrontStep]:
    """A page of the front's states, in order.

    Raises:
        NotFound: If the job does not exist.
        InvalidQuery: If the cursor is not of this list.
    """
    after = decode_cursor(_HISTORY, cursor) or 0
    with context.database.read() as session:
        JobRepository(session).get(job_id)
        rows = TrialRepository(session).history(job_id, after=after, limit=limit + 1)
    shown = rows[:limit]
    return schemas.Page(
        items=[
            schemas.FrontStep(
                trial_id=row.trial_id, number=number, hypervolume=row.hypervolume, size=row.size, at=row.at
            )
            for row, number in shown
        ],
        next_cursor=encode_cursor(_HISTORY, shown[-1][0].sequence) if len(rows) > limit else None,
    )


def find_best(
    context: Context, job_id: str, *, metric: str | None, limits: Sequence[ConstraintSpec]
) -> schemas.Trial:
    """The completed trial that is best in a metric within limits and constraints.

    By default the metric is the first objective. Of equal trials the cheaper in macs, then the earlier.

    Raises:
        NotFound: If the job does not exist.
        InvalidQuery: If the metric is none of the job's.
        NoneFits: If no trial keeps the limits.
    """
    with context.database.read() as session:
        job = JobRepository(session).get(job_id)
        rows = TrialRepository(session).completed(job_id)
    wanted = metric or _objectives(job)[0]
    direction = _direction(job, wanted, "metric")
    constraints = [*limits, *_spec(job).constraints]
    measured = [row for row in rows if row.values.get(wanted) is not None]
    fitting = [row for row in measured if feasible(row.values, constraints)]
    if not fitting:
        raise _none_fits(job_id, measured, constraints)
    sign = -1 if direction is Direction.MAXIMIZE else 1
    best = min(fitting, key=lambda row: (sign * row.values[wanted], row.values["macs"], row.number))
    return trial_view(best, metrics_of(job))


def _spec(job: JobRow) -> JobSpec:
    return JobSpec.model_validate(job.spec)


def _objectives(job: JobRow) -> list[str]:
    return [objective.metric for objective in _spec(job).objectives]


def _direction(job: JobRow, metric: str, parameter: str) -> Direction:
    if metric not in job.directions:
        known = ", ".join(job.directions)
        raise InvalidQuery([Fault(f"/query/{parameter}", f"must name metrics of the job, which are {known}")])
    return Direction(job.directions[metric])


def _reference_point(job: JobRow, metrics: Sequence[str]) -> dict[str, float] | None:
    """The job's, where it has a value for each of these objectives."""
    known = job.reference_point or {}
    return {metric: known[metric] for metric in metrics} if set(metrics) <= set(known) else None


def _other_front(
    rows: Sequence[TrialRow],
    objectives: Sequence[tuple[str, Direction]],
    reference_point: Mapping[str, float] | None,
    constraints: Sequence[ConstraintSpec],
) -> tuple[list[TrialRow], float | None]:
    front = Front(objectives, reference_point)
    for row in rows:
        measured = all(row.values.get(metric) is not None for metric, _ in objectives)
        if measured and feasible(row.values, constraints):
            front.insert(row.id, row.values)
    on_front = front.points
    return [row for row in rows if row.id in on_front], front.hypervolume


def _none_fits(job_id: str, rows: Sequence[TrialRow], constraints: Sequence[ConstraintSpec]) -> NoneFits:
    if not rows:
        return NoneFits(f"no trial of job {job_id} has completed yet", None)
    nearest = min(
        rows, key=lambda row: (max(_excess(row.values, bound) for bound in constraints), row.number)
    )
    found = ", ".join(f"{bound.metric} {nearest.values.get(bound.metric)}" for bound in constraints)
    return NoneFits(
        f"no completed trial of job {job_id} keeps the limits; the nearest is {nearest.id} with {found}",
        (nearest.id, nearest.values),
    )


def _excess(values: schemas.Values, bound: ConstraintSpec) -> float:
    """How far a value is beyond a bound, as a share of the bound."""
    value = values.get(bound.metric)
    if value is None:
        return float("inf")
    above = 0.0 if bound.max is None else (value - bound.max) / (abs(bound.max) or 1.0)
    below = 0.0 if bound.min is None else (bound.min - value) / (abs(bound.min) or 1.0)
    return max(0.0, above, below)
