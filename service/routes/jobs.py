"""/v1/jobs: submit, list, show, cancel, pause, resume, log, what it measures against."""

from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Response
from fastapi.responses import PlainTextResponse
from pydantic import Field

from coterie.search.store import JobState
from coterie.service import jobs, measured, schemas
from coterie.service.errors import problem_responses
from coterie.service.routes.parameters import (
    NO_QUERY,
    ContextOf,
    JobId,
    PageParameters,
    PageQuery,
    Parameters,
)
from coterie.service.routes.reading import read_body

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

_STATE_ERRORS = problem_responses(HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT)
_SPEC_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/JobSpec"}}},
    }
}


class JobsParameters(PageParameters):
    """Which jobs."""

    state: JobState | None = Field(default=None, description="Only jobs in this state.")
    name: str | None = Field(
        default=None,
        max_length=200,
        pattern=r"^[^\x00-\x1f\x7f]*$",
        description="Only jobs with exactly this name.",
    )


class LogParameters(Parameters):
    """How much of a log."""

    tail: int = Field(
        default=200, ge=1, le=100_000, description="Greatest number of lines, counted from the end."
    )


@router.post(
    "",
    status_code=HTTPStatus.CREATED,
    openapi_extra=_SPEC_BODY,
    dependencies=[NO_QUERY],
    responses={
        200: {"model": schemas.Job, "description": "The job that the same key and body made before"},
        **problem_responses(
            HTTPStatus.BAD_REQUEST,
            HTTPStatus.CONFLICT,
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            HTTPStatus.UNPROCESSABLE_ENTITY,
        ),
    },
)
def create_job(
    context: ContextOf,
    response: Response,
    body: Annotated[bytes, Depends(read_body)],
    idempotency_key: Annotated[
        str | None,
        Header(
            pattern=r"^[\x21-\x7e]{1,255}$", description="The same key and body again make no second job."
        ),
    ] = None,
) -> schemas.Job:
    """Submit a search job."""
    job, new = jobs.submit_job(context, body, idempotency_key)
    response.headers["Location"] = job.links.self_
    if not new:
        response.status_code = HTTPStatus.OK
    return job


@router.get("", responses=problem_responses(HTTPStatus.BAD_REQUEST))
def list_jobs(context: ContextOf, query: Annotated[JobsParameters, Query()]) -> schemas.Page[schemas.Job]:
    """List jobs, newest first."""
    return jobs.list_jobs(context, state=query.state, name=query.name, limit=query.limit, cursor=query.cursor)


@router.get(
    "/{job_id}",
    dependencies=[NO_QUERY],
    responses=problem_responses(HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND),
)
def show_job(context: ContextOf, job_id: JobId) -> schemas.Job:
    """Show a job and how far it is."""
    return jobs.show_job(context, job_id)


@router.post("/{job_id}/cancel", dependencies=[NO_QUERY], responses=_STATE_ERRORS)
def cancel_job(context: ContextOf, job_id: JobId) -> schemas.Job:
    """Cancel a job that has not ended, with all its unfinished trials."""
    return jobs.cancel_job(context, job_id)


@router.post("/{job_id}/pause", dependencies=[NO_QUERY], responses=_STATE_ERRORS)
def pause_job(context: ContextOf, job_id: JobId) -> schemas.Job:
    """Pause a queued or running job: its devices are free soon, its trials keep their checkpoints."""
    return jobs.pause_job(context, job_id)


@router.post("/{job_id}/resume", dependencies=[NO_QUERY], responses=_STATE_ERRORS)
def resume_job(context: ContextOf, job_id: JobId) -> schemas.Job:
    """Resume a paused job: it is queued, and goes on where it was. The time between is not charged."""
    return jobs.resume_job(context, job_id)


@router.get("/{job_id}/affinity", dependencies=[NO_QUERY], responses=_STATE_ERRORS)
def list_affinities(context: ContextOf, job_id: JobId) -> schemas.Page[schemas.Affinity]:
    """List how much the job's tasks help each other: one item for each method that measured it."""
    return measured.list_affinities(context, job_id)


@router.get("/{job_id}/references", responses=problem_responses(HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND))
def list_references(context: ContextOf, job_id: JobId, query: PageQuery) -> schemas.Page[schemas.Reference]:
    """List the reference networks that the job measures against, its own and other jobs'."""
    return measured.list_references(context, job_id, limit=query.limit, cursor=query.cursor)


@router.get(
    "/{job_id}/logs",
    response_class=PlainTextResponse,
    responses=problem_responses(HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND),
)
def read_log(context: ContextOf, job_id: JobId, query: Annotated[LogParameters, Query()]) -> str:
    """Read the end of the log of a job's driver."""
    return jobs.read_log(context, job_id, query.tail)
