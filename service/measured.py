"""What was trained beside a job's trials: its references, and how much its tasks help each other."""

from coterie.search.faults import SpecError
from coterie.service import schemas
from coterie.service.context import Context
from coterie.service.cursors import decode_cursor, encode_cursor
from coterie.service.planner import PLANNER
from coterie.service.storage.repositories import Conflict
from coterie.service.storage.store import affinity_of, subset_of
from coterie.service.views import network_settings, reference_view

_REFERENCES = "references"
_DESCRIPTIONS = {
    "one_step": "Share by which the loss of the column's task falls when the parameters that all tasks share "
    "take a gradient step of {step:g} on the loss of the row's task, mean over the first quarter of "
    "a network's training.",
    "pairwise": "Gain in percent of the metric that judges the column's task when it is trained together "
    "with the row's task, over training alone with the same seed.",
}
_SPLITS = {"one_step": "train", "pairwise": "validation"}


def list_references(
    context: Context, job_id: str, *, limit: int, cursor: str | None
) -> schemas.Page[schemas.Reference]:
    """A page of the reference networks that a job measures against, in the order in which they were stored.

    Raises:
        NotFound: If the job does not exist.
        InvalidQuery: If the cursor is not of this list.
    """
    after = decode_cursor(_REFERENCES, cursor) or 0
    with context.database.read() as session:
        jobs = context.jobs(session)
        jobs.get(job_id)
        rows = [row for row in jobs.references(job_id) if row.position > after]
    shown = rows[:limit]
    return schemas.Page(
        items=[reference_view(row) for row in shown],
        next_cursor=encode_cursor(_REFERENCES, shown[-1].position) if len(rows) > limit else None,
    )


def list_affinities(context: Context, job_id: str) -> schemas.Page[schemas.Affinity]:
    """How much a job's tasks help each other, by each method that has measured some of it.

    Raises:
        NotFound: If the job does not exist.
        Conflict: If its data set is not installed any more, so that nothing is known of its tasks.
        PlannerUnavailable: If nobody can say now.
    """
    with context.database.read() as session:
        jobs = context.jobs(session)
        row = jobs.get(job_id)
        one_step = [affinity_of(affinity) for affinity in jobs.affinities(job_id)]
        subsets = [subset_of(subset, job_id) for subset in jobs.subsets(job_id)]
    setting = row.side_setting
    if setting is None:
        return schemas.Page(items=[], next_cursor=None)
    try:
        found = PLANNER.tabulate_affinities(row.spec, one_step, subsets)
    except SpecError as error:
        raise Conflict(f"job {job_id} can't be read any more: {error}") from error
    return schemas.Page(
        items=[
            schemas.Affinity(
                method=method,
                description=_DESCRIPTIONS[method].format(step=found["step"]),
                tasks=found["tasks"],
                **network_settings(setting["backbone"], setting["recipe"]),
                epochs=setting["epochs"],
                seeds=table["seeds"],
                split=_SPLITS[method],
                matrix=table["mean"],
                standard_error=table["standard_error"],
            )
            for method, table in found["tables"].items()
        ],
        next_cursor=None,
    )
