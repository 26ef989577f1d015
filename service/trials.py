"""What can be asked of trials."""

import logging
from pathlib import Path

from coterie.search.artifacts import Location, reaching
from coterie.search.store import TRIALS, StoredFile, TrialState, checked_id
from coterie.service.context import Context
from coterie.service.conversion import Form, convert
from coterie.service.cursors import (
    decode_cursor,
    decode_value_cursor,
    encode_cursor,
    encode_value_cursor,
)
from coterie.service.documents import Document, parse
from coterie.service.fronts import unknown_metric
from coterie.service.storage.repositories import NotFound
from coterie.service.views import measurement_view, metrics_of, trial_view

logger = logging.getLogger(__name__)

ARCHITECTURE_FILE = "architecture.json"
WEIGHTS_FILE = "weights.safetensors"
_MEASUREMENTS = "measurements"


def list_trials(
    context: Context,
    job_id: str,
    *,
    state: TrialState | None,
    family: str | None,
    sort: str,
    limit: int,
    cursor: str | None,
) -> Document:
    """A page of a job's trials by `number` or a metric, backwards with a minus before it.

    By a metric, those that have ended with a value of it, equal ones by number.

    Raises:
        NotFound: If the job does not exist.
        InvalidQuery: If the job has no such metric, or the cursor is not of this list in this order.
    """
    key, descending = sort.removeprefix("-"), sort.startswith("-")
    order = f"trials.{sort}"
    with context.database.read() as session:
        job, trials = context.jobs(session).frame(job_id), context.trials(session)
        if key == "number":
            rows = trials.page(
                job_id,
                state=state,
                family=family,
                descending=descending,
                after=decode_cursor(order, cursor),
                limit=limit + 1,
            )
        elif key in (known := parse(job.directions)):
            rows = trials.page_by_value(
                job_id,
                key,
                state=state,
                family=family,
                descending=descending,
                after=decode_value_cursor(order, cursor),
                limit=limit + 1,
            )
        else:
            raise unknown_metric("sort", ["number", *known])
    metrics = metrics_of(parse(job.spec))
    items = [trial_view(row, metrics) for row in rows[:limit]]
    if len(rows) <= limit:
        return {"items": items, "next_cursor": None}
    last = rows[limit - 1]
    after = (
        encode_cursor(order, last.number)
        if key == "number"
        else encode_value_cursor(order, last.sorted_by, last.number)
    )
    return {"items": items, "next_cursor": after}


def show_trial(context: Context, trial_id: str) -> Document:
    """One trial, or NotFound."""
    with context.database.read() as session:
        row = context.trials(session).shown(trial_id)
    return trial_view(row, metrics_of(parse(row.spec)))


def list_measurements(context: Context, trial_id: str, *, limit: int, cursor: str | None) -> Document:
    """A page of a trial's measurements, by epoch.

    Raises:
        NotFound: If the trial does not exist.
        InvalidQuery: If the cursor is not of this list.
    """
    after = decode_cursor(_MEASUREMENTS, cursor) or 0
    with context.database.read() as session:
        trials = context.trials(session)
        trials.shown(trial_id)
        rows = trials.measurements(trial_id, after=after, limit=limit + 1)
    return {
        "items": [measurement_view(row) for row in rows[:limit]],
        "next_cursor": encode_cursor(_MEASUREMENTS, rows[limit - 1].epoch) if len(rows) > limit else None,
    }


def find_file(context: Context, trial_id: str, name: str) -> tuple[Location, StoredFile]:
    """An artifact of a completed trial.

    Raises:
        NotFound: If there is no such trial, it has not completed, or the file is gone or not the trial's.
        FilesUnavailable: If the place of the files can't be reached.
    """
    with context.database.read() as session:
        row = context.trials(session).get(trial_id)
    if row.state != TrialState.COMPLETED or name not in row.files:
        raise NotFound(f"trial {trial_id} is {row.state}: only a completed trial has {name}")
    file = context.settings.artifacts_of(row.job_id) / TRIALS / checked_id(trial_id) / name
    stored = StoredFile(**row.files[name])
    try:
        with reaching(file, FileNotFoundError):
            intact = _in_place(file, context.settings.jobs_dir) and file.stat().st_size == stored.size
    except FileNotFoundError:
        logger.error("%s, which trial %s wrote, is gone", file, trial_id)
        raise NotFound(f"the file {name} of trial {trial_id} is gone from the server's disk") from None
    if not intact:
        logger.error("%s is not the file that trial %s wrote: %s", file, trial_id, stored)
        raise NotFound(
            f"the file {name} of trial {trial_id} on the server's disk is not what the trial wrote"
        )
    return file, stored


def _in_place(file: Location, root: Location) -> bool:
    """Whether a file is where it is said to be: no link leads out of the artifacts."""
    if not isinstance(file, Path) or not isinstance(root, Path):
        return True  # there are no links
    place = file.parent
    if file.is_symlink() or place.resolve() != root.resolve() / place.relative_to(root):
        return False
    return file.is_file() or not file.exists()  # what is gone is told otherwise


def convert_model(context: Context, trial_id: str, form: Form) -> Location:
    """A completed trial's whole network in another form.

    Raises:
        NotFound: If there is no such trial, it has not completed, or its files are gone.
        NotConvertible, ConversionBusy, ConversionFailed: As `convert` says.
    """
    for name in (ARCHITECTURE_FILE, WEIGHTS_FILE):
        file, _ = find_file(context, trial_id, name)
    return convert(file.parent, form)
