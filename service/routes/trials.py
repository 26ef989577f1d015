"""/v1/jobs/{id}/trials and /v1/trials: list, show, measurements."""

from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import Field

from coterie.search.spec import Name
from coterie.search.store import TrialState
from coterie.service import schemas, trials
from coterie.service.errors import problem_responses
from coterie.service.routes.answers import Answer, answer
from coterie.service.routes.parameters import NO_QUERY, ContextOf, JobId, PageParameters, PageQuery, TrialId

router = APIRouter(prefix="/v1", tags=["trials"])
_ERRORS = problem_responses(HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND)


class TrialsParameters(PageParameters):
    """Which trials, in which order."""

    state: TrialState | None = Field(default=None, description="Only trials in this state.")
    family: Name | None = Field(default=None, description="Only trials of this family.")
    sort: str = Field(
        default="number",
        pattern=r"^-?[A-Za-z0-9_.+-]{1,100}$",
        description="number, or a metric of the job: then trials that have ended with a value of it, by that "
        "and number. Backwards with a minus before it, as in -delta_m.",
        examples=["number", "-delta_m"],
    )


@router.get("/jobs/{job_id}/trials", response_model=schemas.Page[schemas.Trial], responses=_ERRORS)
async def list_trials(
    context: ContextOf, job_id: JobId, query: Annotated[TrialsParameters, Query()]
) -> Answer:
    """List a job's candidates."""
    return await answer(trials.list_trials, context, job_id, **dict(query))


@router.get("/trials/{trial_id}", response_model=schemas.Trial, dependencies=[NO_QUERY], responses=_ERRORS)
async def show_trial(context: ContextOf, trial_id: TrialId) -> Answer:
    """Show a trial."""
    return await answer(trials.show_trial, context, trial_id)


@router.get(
    "/trials/{trial_id}/measurements",
    response_model=schemas.Page[schemas.Measurement],
    responses=_ERRORS,
)
async def list_measurements(context: ContextOf, trial_id: TrialId, query: PageQuery) -> Answer:
    """List what each epoch of a trial gave."""
    return await answer(trials.list_measurements, context, trial_id, **dict(query))
