"""Whether the server lives, and whether it can run jobs."""

import logging
from http import HTTPStatus

from fastapi import APIRouter, Response

from coterie.service import VERSION, schemas
from coterie.service.errors import problem_responses
from coterie.service.routes.parameters import OpenContext
from coterie.service.storage.database import DatabaseUnavailable

logger = logging.getLogger(__name__)
router = APIRouter(tags=["health"], responses=problem_responses())


@router.get("/healthz")
async def read_health() -> schemas.Health:
    """Say that the server lives."""  # in no thread: they may all wait, and still it lives
    return schemas.Health(status="ok", version=VERSION)


@router.get("/readyz", responses={503: {"model": schemas.Readiness, "description": "It can't run jobs now"}})
def read_readiness(context: OpenContext, response: Response) -> schemas.Readiness:
    """Say whether database and Ray are there."""
    try:
        context.database.check_reachable()
        database = schemas.Check(ok=True, detail="reachable")
    except DatabaseUnavailable as error:  # whose words name hosts and users, and anybody may ask here
        logger.warning("the database does not answer: %s", error)
        database = schemas.Check(ok=False, detail="it does not answer; the server's log says more")
    ray_ready, found = context.dispatcher.ready()
    ready = database.ok and ray_ready
    if not ready:
        response.status_code = HTTPStatus.SERVICE_UNAVAILABLE
    return schemas.Readiness(
        status="ready" if ready else "not ready",
        checks={"database": database, "ray": schemas.Check(ok=ray_ready, detail=found)},
    )
