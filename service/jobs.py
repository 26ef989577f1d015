"""What can be done with jobs."""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path

from coterie.search.objective import metric_directions
from coterie.search.plan import Fault, SpecError, make_plan
from coterie.search.spec import JobSpec, ResourcesSpec
from coterie.search.store import JobState
from coterie.service import schemas
from coterie.service.body import parse_json, validate
from coterie.service.context import Context
from coterie.service.cursors import decode_cursor, encode_cursor
from coterie.service.storage.repositories import Idempotency, JobRepository
from coterie.service.storage.tables import JobRow
from coterie.service.views import job_view

LOG_TAIL_BYTES = 1_000_000
_ORDER = "jobs"


def submit_job(context: Context, body: bytes, key: str | None) -> tuple[schemas.Job, bool]:
    """Queue the job that a body describes; says whether it is new.

    Raises:
        MalformedBody: If the body is no JSON.
        SpecError: If it breaks the schema, or names what does not exist.
        Conflict: If the key was used for another body.
    """
    document = parse_json(body)
    spec = validate(JobSpec, document)
    plan = make_plan(spec)
    _check_resources(spec.resources, context.dispatcher.node_resources)
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    with context.database.write() as session:
        jobs = JobRepository(session)
        row, new = jobs.create(
            spec,
            metric_directions(plan.tasks),
            datetime.now(UTC),
            None if key is None else Idempotency(key, digest),
        )
        return _view(context, jobs, row), new


def show_job(context: Context, job_id: str) -> schemas.Job:
    """One job, or NotFound."""
    with context.database.read() as session:
        jobs = JobRepository(session)
        return _view(context, jobs, jobs.get(job_id))


def list_jobs(
    context: Context,
    *,
    state: JobState | None = None,
    name: str | None = None,
    limit: int,
    cursor: str | None = None,
) -> schemas.Page[schemas.Job]:
    """A page of jobs, newest first.

    Raises:
        InvalidQuery: If the cursor is not of this list.
    """
    before = decode_cursor(_ORDER, cursor)
    with context.database.read() as session:
        jobs = JobRepository(session)
        rows = jobs.page(state=state, name=name, before=before, limit=limit + 1)
        shown = rows[:limit]
        usage = jobs.usage([row.id for row in shown])
    now = datetime.now(UTC)
    return schemas.Page(
        items=[job_view(row, usage[row.id], context.dispatcher.dashboard_url, now) for row in shown],
        next_cursor=encode_cursor(_ORDER, shown[-1].position) if len(rows) > limit else None,
    )


def cancel_job(context: Context, job_id: str) -> schemas.Job:
    """End a job that has not ended.

    Raises:
        NotFound: If it does not exist.
        Conflict: If it has ended.
    """
    with context.database.write() as session:
        jobs = JobRepository(session)
        view = _view(context, jobs, jobs.cancel(job_id, datetime.now(UTC)))
    context.dispatcher.stop_job(job_id)
    return view


def pause_job(context: Context, job_id: str) -> schemas.Job:
    """Take a queued or running job off its resources until it is resumed.

    Raises:
        NotFound: If it does not exist.
        Conflict: If it is paused already, or has ended.
    """
    with context.database.write() as session:
        jobs = JobRepository(session)
        view = _view(context, jobs, jobs.pause(job_id, datetime.now(UTC)))
    context.dispatcher.stop_job(job_id)
    return view


def resume_job(context: Context, job_id: str) -> schemas.Job:
    """Queue a paused job again.

    Raises:
        NotFound: If it does not exist.
        Conflict: If it is not paused.
    """
    with context.database.write() as session:
        jobs = JobRepository(session)
        return _view(context, jobs, jobs.resume(job_id))


def read_log(context: Context, job_id: str, lines: int) -> str:
    """The last lines of the log of a job's driver; empty before it has one. NotFound without the job."""
    with context.database.read() as session:
        JobRepository(session).get(job_id)
    file = context.settings.log_of(job_id)
    return _tail(file, lines) if file.exists() else ""


def _view(context: Context, jobs: JobRepository, row: JobRow) -> schemas.Job:
    usage = jobs.usage([row.id])[row.id]
    return job_view(row, usage, context.dispatcher.dashboard_url, datetime.now(UTC))


def _check_resources(resources: ResourcesSpec, node: tuple[float, float]) -> None:
    faults = [
        Fault(f"/resources/{name}", f"a trial can have at most {there:g} {name} here, not {asked:g}")
        for name, asked, there in (("cpus", resources.cpus, node[0]), ("gpus", resources.gpus, node[1]))
        if asked > there
    ]
    if faults:
        raise SpecError(faults)


def _tail(file: Path, lines: int) -> str:
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - LOG_TAIL_BYTES))
        text = stream.read().decode("utf-8", errors="replace")
    return "".join(text.splitlines(keepends=True)[-lines:])
