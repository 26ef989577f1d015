"""What can be asked of a job's front."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from coterie.models.tasks import Direction
from coterie.search.confirmed import summarise
from coterie.search.faults import Fault
from coterie.search.front import non_dominated
from coterie.search.spec import ConstraintSpec
from coterie.service import schemas
from coterie.service.context import Context
from coterie.service.cursors import InvalidQuery, decode_cursor, encode_cursor
from coterie.service.documents import Document, parse
from coterie.service.storage.shown import ShownRow
from coterie.service.storage.store import confirmation_of
from coterie.service.storage.trials import TrialRepository
from coterie.service.views import metrics_of, point_view, step_view, trial_view

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
) -> Document:
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
        jobs, trials = context.jobs(session), context.trials(session)
        job = jobs.frame(job_id)
        spec, known = parse(job.spec), parse(job.reference_point or "{}")
        objectives = [
            (metric, _direction(job, metric, "objectives")) for metric in metrics or _objectives(spec)
        ]
        names = {metric for metric, _ in objectives}
        reference = {metric: known[metric] for metric in names} if names <= set(known) else None
        if metrics is None and not limits and within_constraints:
            rows, hypervolume = trials.front(job_id), job.hypervolume
        else:
            bounds = [*limits, *(_constraints(spec) if within_constraints else [])]
            numbers, hypervolume = _other_front(
                trials.completed_values(job_id), objectives, reference, bounds
            )
            rows = trials.points(job_id, numbers)
        confirmations = jobs.confirmations(job_id)
    confirmed = summarise([confirmation_of(row) for row in confirmations])
    return {
        "objectives": [{"metric": metric, "direction": direction} for metric, direction in objectives],
        "reference_point": reference,
        "hypervolume": hypervolume,
        "points": [point_view(row, confirmed.get(row.id)) for row in rows],
    }


def read_history(context: Context, job_id: str, *, limit: int, cursor: str | None) -> Document:
    """A page of the front's states, in order.

    Raises:
        NotFound: If the job does not exist.
        InvalidQuery: If the cursor is not of this list.
    """
    after = decode_cursor(_HISTORY, cursor) or 0
    with context.database.read() as session:
        context.jobs(session).frame(job_id)
        rows = context.trials(session).history(job_id, after=after, limit=limit + 1)
    return {
        "items": [step_view(row) for row in rows[:limit]],
        "next_cursor": encode_cursor(_HISTORY, rows[limit - 1].sequence) if len(rows) > limit else None,
    }


def find_best(
    context: Context, job_id: str, *, metric: str | None, limits: Sequence[ConstraintSpec]
) -> Document:
    """The completed trial that is best in a metric within limits and constraints.

    By default the metric is the first objective. Of equal trials the cheaper in macs, then the earlier.

    Raises:
        NotFound: If the job does not exist.
        InvalidQuery: If the metric is none of the job's.
        NoneFits: If no trial keeps the limits.
    """
    with context.database.read() as session:
        job = context.jobs(session).frame(job_id)
        spec = parse(job.spec)
        wanted = metric or _objectives(spec)[0]
        descending = _direction(job, wanted, "metric") is Direction.MAXIMIZE
        bounds = [*limits, *_constraints(spec)]
        trials = context.trials(session)
        best = trials.best(job_id, wanted, descending=descending, bounds=bounds)
        if best is None:
            raise _none_fits(trials, job_id, wanted, bounds)
    return trial_view(best, metrics_of(spec))


def _objectives(spec: Mapping[str, Any]) -> list[str]:
    return [objective["metric"] for objective in spec["objectives"]]


def _constraints(spec: Mapping[str, Any]) -> list[ConstraintSpec]:
    return [ConstraintSpec(**constraint) for constraint in spec["constraints"]]


def _direction(job: ShownRow, metric: str, parameter: str) -> Direction:
    directions = parse(job.directions)
    if metric not in directions:
        raise unknown_metric(parameter, directions)
    return Direction(directions[metric])


def unknown_metric(parameter: str, known: Iterable[str]) -> InvalidQuery:
    """That a query parameter names no metric of the job."""
    return InvalidQuery(
        [Fault(f"/query/{parameter}", f"must name metrics of the job, which are {', '.join(known)}")]
    )


def _other_front(
    trials: Sequence[tuple[int, schemas.Values]],
    objectives: Sequence[tuple[str, Direction]],
    reference_point: Mapping[str, float] | None,
    bounds: Sequence[ConstraintSpec],
) -> tuple[list[int], float | None]:
    """Numbers of the trials on a front, and its hypervolume."""
    metrics = [metric for metric, _ in objectives]
    wanted = [*metrics, *(bound.metric for bound in bounds)]
    rows = [[values.get(metric) for metric in wanted] for _, values in trials]
    values_NM = np.array(rows, dtype=np.float64).reshape(len(trials), len(wanted))  # what is missing is NaN
    fits_N = np.isfinite(values_NM[:, : len(metrics)]).all(axis=1)
    for column_N, bound in zip(values_NM.T[len(metrics) :], bounds, strict=True):
        least, most = (
            (-np.inf if bound.min is None else bound.min),
            (np.inf if bound.max is None else bound.max),
        )
        fits_N &= (least <= column_N) & (column_N <= most)
    fitting = np.flatnonzero(fits_N)
    front, hypervolume = non_dominated(
        values_NM[fitting, : len(metrics)],
        [direction for _, direction in objectives],
        None if reference_point is None else [reference_point[metric] for metric in metrics],
    )
    return [trials[index][0] for index in fitting[front]], hypervolume


def _none_fits(
    trials: TrialRepository, job_id: str, metric: str, bounds: Sequence[ConstraintSpec]
) -> NoneFits:
    measured = [
        (number, values)
        for number, values in trials.completed_values(job_id)
        if values.get(metric) is not None
    ]
    if not measured:
        return NoneFits(f"no completed trial of job {job_id} has a value of {metric} yet", None)
    number, values = min(
        measured, key=lambda trial: max((_excess(trial[1], bound) for bound in bounds), default=0.0)
    )
    [nearest] = trials.points(job_id, [number])
    found = ", ".join(f"{bound.metric} {values.get(bound.metric)}" for bound in bounds)
    return NoneFits(
        f"no completed trial of job {job_id} keeps the limits; the nearest is {nearest.id} with {found}",
        (nearest.id, values),
    )


def _excess(values: schemas.Values, bound: ConstraintSpec) -> float:
    """How far a value is beyond a bound, as a share of the bound."""
    value = values.get(bound.metric)
    if value is None:
        return float("inf")
    above = 0.0 if bound.max is None else (value - bound.max) / (abs(bound.max) or 1.0)
    below = 0.0 if bound.min is None else (bound.min - value) / (abs(bound.min) or 1.0)
    return max(0.0, above, below)
