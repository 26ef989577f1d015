"""/v1/jobs: submit, list, show, cancel, pause, resume, delete, log, what it measures against."""

from http import HTTPStatus
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Header, Query
from fastapi.responses import PlainTextResponse
from pydantic import Field

from coterie.search.spec import ONE_LINE, JobChange
from coterie.search.store import JobState
from coterie.service import jobs, measured, schemas
from coterie.service.errors import problem_responses
from coterie.service.routes.answers import Answer, answer
from coterie.service.routes.parameters import (
    NO_QUERY,
    ContextOf,
    JobId,
    PageParameters,
    PageQuery,
    Parameters,
    SubmitterContext,
)
from coterie.service.routes.reading import json_body, json_body_of, read_body

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

_STATE_ERRORS = problem_responses(HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT)
_SPEC_BODY = json_body_of("JobSpec")

_CHANGE_BODY = json_body(JobChange.model_json_schema())


class JobsParameters(PageParameters):
    """Which jobs, in which order."""

    state: JobState | None = Field(default=None, description="Only jobs in this state.")
    name: str | None = Field(
        default=None,
        max_length=200,
        pattern=ONE_LINE,
        description="Only jobs with exactly this name.",
    )
    sort: Literal["created_at", "-created_at"] = Field(
        default="-created_at", description="By when they were submitted: oldest first, or newest first."
    )


class LogParameters(Parameters):
    """How much of a log."""

    tail: int = Field(
        default=200, ge=1, le=100_000, description="Greatest number of lines, counted from the end."
    )


@router.post(
    "",
    status_code=HTTPStatus.CREATED,
    response_model=schemas.Job,
    openapi_extra=_SPEC_BODY,
    dependencies=[NO_QUERY],
    responses={
        200: {"model": schemas.Job, "description": "The job that the same key and body made before"},
        **problem_responses(
            HTTPStatus.BAD_REQUEST,
            HTTPStatus.FORBIDDEN,
            HTTPStatus.CONFLICT,
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            HTTPStatus.UNPROCESSABLE_ENTITY,
        ),
    },
)
def create_job(
    context: SubmitterContext,
    body: Annotated[bytes, Depends(read_body)],
    idempotency_key: Annotated[
        str | None,
        Header(
            pattern=r"^[\x21-\x7e]{1,255}$", description="The same key and body again make no second job."
        ),
    ] = None,
) -> Answer:
    """Submit a search job."""
    job, new = jobs.submit_job(context, body, idempotency_key)
    status = HTTPStatus.CREATED if new else HTTPStatus.OK
    return Answer(job, status, headers={"Location": job["links"]["self"]})


@router.get("", response_model=schemas.Page[schemas.Job], responses=problem_responses(HTTPStatus.BAD_REQUEST))
async def list_jobs(context: ContextOf, query: Annotated[JobsParameters, Query()]) -> Answer:
    """List jobs."""
    return await answer(jobs.list_jobs, context, **dict(query))


@router.get(
    "/{job_id}",
    response_model=schemas.Job,
    dependencies=[NO_QUERY],
    responses=problem_responses(HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND),
)
async def show_job(context: ContextOf, job_id: JobId) -> Answer:
    """Show a job and how far it is."""
    return await answer(jobs.show_job, context, job_id)


@router.post("/{job_id}/cancel", response_model=schemas.Job, dependencies=[NO_QUERY], responses=_STATE_ERRORS)
def cancel_job(context: SubmitterContext, job_id: JobId) -> Answer:
    """Cancel a job that has not ended, with all its unfinished trials."""
    return Answer(jobs.cancel_job(context, job_id))


@router.post("/{job_id}/pause", response_model=schemas.Job, dependencies=[NO_QUERY], responses=_STATE_ERRORS)
def pause_job(context: SubmitterContext, job_id: JobId) -> Answer:
    """Pause a queued or running job: its devices are free soon, its trials keep their checkpoints."""
    return Answer(jobs.pause_job(context, job_id))


@router.post("/{job_id}/resume", response_model=schemas.Job, dependencies=[NO_QUERY], responses=_STATE_ERRORS)
def resume_job(context: SubmitterContext, job_id: JobId) -> Answer:
    """Resume a paused job: it is queued, and goes on where it was. The time between is not charged."""
    return Answer(jobs.resume_job(context, job_id))


@router.patch(
    "/{job_id}",
    response_model=schemas.Job,
    openapi_extra=_CHANGE_BODY,
    dependencies=[NO_QUERY],
    responses={
        **_STATE_ERRORS,
        **problem_responses(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            HTTPStatus.UNPROCESSABLE_ENTITY,
        ),
    },
)
def change_job(
    context: SubmitterContext, job_id: JobId, body: Annotated[bytes, Depends(read_body)]
) -> Answer:
    """Change the priority of a job that has not ended. One that runs goes on; it counts once it is queued."""
    return Answer(jobs.change_job(context, job_id, body))


@router.delete(
    "/{job_id}", status_code=HTTPStatus.NO_CONTENT, dependencies=[NO_QUERY], responses=_STATE_ERRORS
)
def delete_job(context: SubmitterContext, job_id: JobId) -> None:
    """Delete a job that has ended, with its trials and their networks. What it used stays charged."""
    jobs.delete_job(context, job_id)


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
