"""/v1/jobs/{id}/front, its history, and the best trial under limits."""

from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import Field

from coterie.search.spec import Name
from coterie.service import fronts, schemas
from coterie.service.errors import problem_responses
from coterie.service.routes.answers import Answer, answer
from coterie.service.routes.parameters import ContextOf, JobId, LimitParameters, PageQuery

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["front"])
_ERRORS = problem_responses(HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND)


class FrontParameters(LimitParameters):
    """Which front."""

    objectives: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_.+-]{1,100}(,[A-Za-z0-9_.+-]{1,100}){0,4}$",
        description="One to five metrics with commas between, instead of the job's own objectives.",
    )
    feasible: bool = Field(
        default=True, description="Whether the job's constraints hold; false forgets them."
    )


class BestParameters(LimitParameters):
    """The best in what."""

    metric: Name | None = Field(
        default=None, description="What to be best in; by default the first objective."
    )


@router.get("/front", response_model=schemas.Front, responses=_ERRORS)
async def read_front(context: ContextOf, job_id: JobId, query: Annotated[FrontParameters, Query()]) -> Answer:
    """Read the job's front, or another one over the same trials."""
    return await answer(
        fronts.read_front,
        context,
        job_id,
        metrics=query.objectives and list(dict.fromkeys(query.objectives.split(","))),
        limits=query.limits(),
        within_constraints=query.feasible,
    )


@router.get("/front/history", response_model=schemas.Page[schemas.FrontStep], responses=_ERRORS)
async def read_history(context: ContextOf, job_id: JobId, query: PageQuery) -> Answer:
    """List the front's hypervolume after each completed trial."""
    return await answer(fronts.read_history, context, job_id, **dict(query))


@router.get("/best", response_model=schemas.Trial, responses=_ERRORS)
async def find_best(context: ContextOf, job_id: JobId, query: Annotated[BestParameters, Query()]) -> Answer:
    """Find the trial to deploy under these limits. Where none keeps them, the problem names the nearest."""
    return await answer(fronts.find_best, context, job_id, metric=query.metric, limits=query.limits())
