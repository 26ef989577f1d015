"""/v1/jobs/{id}/trials and /v1/trials: list, show, measurements."""

from http import HTTPStatus
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import Field

from coterie.search.spec import Name
from coterie.search.store import TrialState
from coterie.service import schemas, trials
from coterie.service.errors import problem_responses
from coterie.service.routes.parameters import NO_QUERY, ContextOf, JobId, PageParameters, PageQuery, TrialId

router = APIRouter(prefix="/v1", tags=["trials"])
_ERRORS = problem_responses(HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND)


class TrialsParameters(PageParameters):
    """Which trials, in which order."""

    state: TrialState | None = Field(default=None, description="Only trials in this state.")
    family: Name | None = Field(default=None, description="Only trials of this family.")
    sort: Literal["number", "-number"] = Field(
        default="number", description="By number, or by number backwards."
    )


@router.get("/jobs/{job_id}/trials", responses=_ERRORS)
def list_trials(
    context: ContextOf, job_id: JobId, query: Annotated[TrialsParameters, Query()]
) -> schemas.Page[schemas.Trial]:
    """List a job's candidates."""
    return trials.list_trials(
        context,
        job_id,
        state=query.state,
        family=query.family,
        sort=query.sort,
        limit=query.limit,
        cursor=query.cursor,
    )


@router.get("/trials/{trial_id}", dependencies=[NO_QUERY], responses=_ERRORS)
def show_trial(context: ContextOf, trial_id: TrialId) -> schemas.Trial:
    """Show a trial."""
    return trials.show_trial(context, trial_id)


@router.get("/trials/{trial_id}/measurements", responses=_ERRORS)
def list_measurements(
    context: ContextOf, trial_id: TrialId, query: PageQuery
) -> schemas.Page[schemas.Measurement]:
    """List what each epoch of a trial gave."""
    return trials.list_measurements(context, trial_id, limit=query.limit, cursor=query.cursor)
