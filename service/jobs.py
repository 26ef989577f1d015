"""What can be done with jobs."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from coterie.search.faults import Fault, SpecError
from coterie.search.spec import JobChange, JobSpec, ResourcesSpec
from coterie.search.store import JobState
from coterie.service.body import parse_json, validate
from coterie.service.context import Context
from coterie.service.cursors import decode_cursor, encode_cursor
from coterie.service.documents import Document
from coterie.service.files import remove_job_files
from coterie.service.job_log import read_tail
from coterie.service.planner import PLANNER
from coterie.service.storage.audit import audit
from coterie.service.storage.queue import Place, check_quota
from coterie.service.storage.repositories import Idempotency, JobRepository
from coterie.service.storage.shown import ShownRow
from coterie.service.views import job_view


def submit_job(context: Context, body: bytes, key: str | None) -> tuple[Document, bool]:
    """Queue the job that a body describes; says whether it is new.

    Raises:
        MalformedBody: If the body is no JSON.
        SpecError: If it breaks the schema, or names what does not exist.
        Conflict: If the key was used for another body.
        QuotaExceeded: If the tenant may have no more jobs or files; not where it is a job made before.
        PlannerUnavailable: If it can't be checked now.
    """
    document = parse_json(body)
    spec = validate(JobSpec, document)
    directions = PLANNER.plan_job(spec)
    _check_resources(spec.resources, context.dispatcher.node_resources)
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    now = datetime.now(UTC)
    with context.database.write() as session:
        jobs = context.jobs(session)
        row, new = jobs.create(
            spec,
            directions,
            now,
            None if key is None else Idempotency(key, digest),
        )
        if new:
            check_quota(session, row.tenant, context.settings.tenant_limits, now)
            audit(session, context.caller, "job.submit", row.id, name=row.name)
        return _view(context, jobs, row.id), new


def show_job(context: Context, job_id: str) -> Document:
    """One job, or NotFound."""
    with context.database.read() as session:
        jobs = context.jobs(session)
        return _view(context, jobs, job_id)


def list_jobs(
    context: Context,
    *,
    state: JobState | None = None,
    name: str | None = None,
    sort: str = "-created_at",
    limit: int,
    cursor: str | None = None,
) -> Document:
    """A page of jobs, by `created_at` or `-created_at`, newest first.

    Raises:
        InvalidQuery: If the cursor is not of this list in this order.
    """
    order = f"jobs.{sort}"
    after = decode_cursor(order, cursor)
    with context.database.read() as session:
        jobs = context.jobs(session)
        rows = jobs.page(
            state=state, name=name, descending=sort.startswith("-"), after=after, limit=limit + 1
        )
        items = _views(context, jobs, rows[:limit])
    more = len(rows) > limit
    return {"items": items, "next_cursor": encode_cursor(order, rows[limit - 1].position) if more else None}


def cancel_job(context: Context, job_id: str) -> Document:
    """End a job that has not ended.

    Raises:
        NotFound: If it does not exist.
        Conflict: If it has ended.
    """
    with context.database.write() as session:
        jobs = context.jobs(session)
        view = _view(context, jobs, jobs.cancel(job_id, datetime.now(UTC)).id)
        audit(session, context.caller, "job.cancel", job_id)
    context.dispatcher.stop_job(job_id)
    return view


def pause_job(context: Context, job_id: str) -> Document:
    """Take a queued or running job off its resources until it is resumed.

    Raises:
        NotFound: If it does not exist.
        Conflict: If it is paused already, or has ended.
    """
    with context.database.write() as session:
        jobs = context.jobs(session)
        view = _view(context, jobs, jobs.pause(job_id, datetime.now(UTC)).id)
        audit(session, context.caller, "job.pause", job_id)
    context.dispatcher.stop_job(job_id)
    return view


def resume_job(context: Context, job_id: str) -> Document:
    """Queue a paused job again.

    Raises:
        NotFound: If it does not exist.
        Conflict: If it is not paused.
        QuotaExceeded: If the tenant may have no more jobs or files.
    """
    now = datetime.now(UTC)
    with context.database.write() as session:
        jobs = context.jobs(session)
        row = jobs.resume(job_id, now)
        check_quota(session, row.tenant, context.settings.tenant_limits, now)
        audit(session, context.caller, "job.resume", job_id)
        return _view(context, jobs, row.id)


def change_job(context: Context, job_id: str, body: bytes) -> Document:
    """Change a job that has not ended, as a body says; one that runs goes on.

    Raises:
        MalformedBody: If the body is no JSON.
        SpecError: If it breaks the schema.
        NotFound: If the job does not exist.
        Conflict: If it has ended.
    """
    change = validate(JobChange, parse_json(body))
    with context.database.write() as session:
        jobs = context.jobs(session)
        row = jobs.set_priority(job_id, change.priority, datetime.now(UTC))
        audit(session, context.caller, "job.change", job_id, priority=change.priority)
        return _view(context, jobs, row.id)


def delete_job(context: Context, job_id: str) -> None:
    """Delete a job that has ended, and its files.

    Raises:
        NotFound: If it does not exist.
        Conflict: If it has not ended.
    """
    with context.database.write() as session:
        row = context.jobs(session).delete(job_id)
        audit(session, context.caller, "job.delete", job_id, name=row.name, bytes=row.stored_bytes)
    # Behind the commit: what is left where this ends early belongs to no job, and `coterie gc` removes it.
    remove_job_files(context.settings, job_id)


def read_log(context: Context, job_id: str, lines: int) -> str:
    """The last lines of the log of a job's driver; empty before it has one. NotFound without the job."""
    with context.database.read() as session:
        context.jobs(session).get(job_id)
    return read_tail(context.settings.log_of(job_id), lines)


def _view(context: Context, jobs: JobRepository, job_id: str) -> Document:
    [view] = _views(context, jobs, [jobs.shown(job_id)])
    return view


def _views(context: Context, jobs: JobRepository, rows: Sequence[ShownRow]) -> list[Document]:
    """The queue, which is everybody's, is read once, and only where one of the jobs waits in it."""
    now = datetime.now(UTC)
    places: Mapping[str, Place] = {}
    if any(row.state == JobState.QUEUED for row in rows):
        places = jobs.places(context.settings.tenant_limits, now)
    dashboard = context.dispatcher.dashboard_url
    return [job_view(row, places.get(row.id), dashboard, now) for row in rows]


def _check_resources(resources: ResourcesSpec, node: tuple[float, float]) -> None:
    faults = [
        Fault(f"/resources/{name}", f"a trial can have at most {there:g} {name} here, not {asked:g}")
        for name, asked, there in (("cpus", resources.cpus, node[0]), ("gpus", resources.gpus, node[1]))
        if asked > there
    ]
    if faults:
        raise SpecError(faults)
