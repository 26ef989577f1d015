"""What can be asked of trials."""

from pathlib import Path

from coterie.search.store import FolderArtifacts, StoredFile, TrialState
from coterie.service import schemas
from coterie.service.context import Context
from coterie.service.conversion import Form, convert
from coterie.service.cursors import decode_cursor, encode_cursor
from coterie.service.storage.repositories import JobRepository, NotFound, TrialRepository
from coterie.service.views import metrics_of, trial_view

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
) -> schemas.Page[schemas.Trial]:
    """A page of a job's trials, sorted by `number` or `-number`.

    Raises:
        NotFound: If the job does not exist.
        InvalidQuery: If the cursor is not of this list in this order.
    """
    order = f"trials{sort.removesuffix('number')}"
    after = decode_cursor(order, cursor)
    with context.database.read() as session:
        metrics = metrics_of(JobRepository(session).get(job_id))
        rows = TrialRepository(session).page(
            job_id, state=state, family=family, descending=sort.startswith("-"), after=after, limit=limit + 1
        )
    shown = rows[:limit]
    return schemas.Page(
        items=[trial_view(row, metrics) for row in shown],
        next_cursor=encode_cursor(order, shown[-1].number) if len(rows) > limit else None,
    )


def show_trial(context: Context, trial_id: str) -> schemas.Trial:
    """One trial, or NotFound."""
    with context.database.read() as session:
        row = TrialRepository(session).get(trial_id)
        return trial_view(row, metrics_of(JobRepository(session).get(row.job_id)))


def list_measurements(
    context: Context, trial_id: str, *, limit: int, cursor: str | None
) -> schemas.Page[schemas.Measurement]:
    """A page of a trial's measurements, by epoch.

    Raises:
        NotFound: If the trial does not exist.
        InvalidQuery: If the cursor is not of this list.
    """
    after = decode_cursor(_MEASUREMENTS, cursor) or 0
    with context.database.read() as session:
        trials = TrialRepository(session)
        trials.get(trial_id)
        rows = trials.measurements(trial_id, after=after, limit=limit + 1)
    shown = rows[:limit]
    return schemas.Page(
        items=[
            schemas.Measurement(
                epoch=row.epoch,
                values=row.values,
                tasks=row.tasks,
                device_seconds=row.device_seconds,
                at=row.at,
            )
            for row in shown
        ],
        next_cursor=encode_cursor(_MEASUREMENTS, shown[-1].epoch) if len(rows) > limit else None,
    )


def find_file(context: Context, trial_id: str, name: str) -> tuple[Path, StoredFile]:
    """An artifact of a completed trial.

    Raises:
        NotFound: If there is no such trial, it has not completed, or the file is gone.
    """
    with context.database.read() as session:
        row = TrialRepository(session).get(trial_id)
    if row.state != TrialState.COMPLETED or name not in row.files:
        raise NotFound(f"trial {trial_id} is {row.state}: only a completed trial has {name}")
    file = FolderArtifacts(context.settings.artifacts_of(row.job_id)).trial_folder(trial_id) / name
    if not file.exists():
        raise NotFound(f"the file {name} of trial {trial_id} is gone from the server's disk")
    return file, StoredFile(**row.files[name])


def convert_model(context: Context, trial_id: str, form: Form) -> Path:
    """A completed trial's whole network in another form.

    Raises:
        NotFound: If there is no such trial, it has not completed, or its files are gone.
        NotConvertible, ConversionBusy, ConversionFailed: As `convert` says.
    """
    for name in (ARCHITECTURE_FILE, WEIGHTS_FILE):
        file, _ = find_file(context, trial_id, name)
    return convert(file.parent, form)
