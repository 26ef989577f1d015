"""/v1/jobs/{id}/events: what happens to a job, as Server-Sent Events."""

from functools import partial
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import Field
from sse_starlette import EventSourceResponse

from coterie.service import events
from coterie.service.errors import problem_responses
from coterie.service.hub import HEARTBEAT_SECONDS, heartbeat
from coterie.service.routes.authentication import still_allowed
from coterie.service.routes.parameters import ContextOf, JobId, Parameters
from coterie.service.storage.events import EventKind

router = APIRouter(prefix="/v1/jobs", tags=["events"])

MOST_SEQUENCES = 999_999_999  # 9 digits, which SQL holds
MOST_SECONDS = 86_400


class EventsParameters(Parameters):
    """Which events, and for how long."""

    after: int = Field(
        default=0,
        ge=0,
        le=MOST_SEQUENCES,
        description="Only events of a higher id, for clients that can't set Last-Event-ID, which wins.",
    )
    kinds: list[EventKind] = Field(
        default=[], max_length=len(EventKind), description="Only events of these kinds; default all."
    )
    timeout_seconds: float | None = Field(
        default=None,
        ge=0,
        le=MOST_SECONDS,
        description="End the stream after so long, though the job goes on; 0 gives the next events that "
        "there are, 200 at most. By default there is no such end.",
    )


@router.get(
    "/{job_id}/events",
    response_class=Response,
    responses={
        200: {
            "description": "Server-Sent Events: `id` the sequence, `event` the kind, `data` an Event.",
            "content": {"text/event-stream": {"itemSchema": {"type": "object"}}},
        },
        204: {"description": "The job has ended, and no event follows: come back no more"},
        **problem_responses(HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND),
    },
)
def stream_events(
    request: Request,
    context: ContextOf,
    job_id: JobId,
    query: Annotated[EventsParameters, Query()],
    last_event_id: Annotated[
        str | None,
        Header(
            alias="Last-Event-ID",
            pattern="^[0-9]{1,9}$",
            description="Only events of a higher id: the last one that the client has seen.",
        ),
    ] = None,
) -> Response:
    """Follow a job: its events so far, then each as it happens, until the job has ended.

    A job's events are numbered from 1 without a gap, and none is lost or doubled however often a client comes
    back with the last id that it has seen, at this or another server. The kinds: `job` (state or priority),
    `trial` (state), `measurement` (an epoch), `front` (a trial joined it). The stream also ends when the
    server does, or when the token is no good any more.

    Where the operator set COTERIE_EVENT_RETENTION_DAYS, a job that ended longer ago has no more events of
    kinds `trial` and `measurement`: the others keep their numbers, and a client can come back with any.
    """
    frames = events.open_stream(
        context,
        job_id,
        last_event_id=None if last_event_id is None else int(last_event_id),
        after=query.after,
        kinds=query.kinds,
        seconds=query.timeout_seconds,
        allowed=partial(still_allowed, request),
    )
    if frames is None:
        return Response(status_code=HTTPStatus.NO_CONTENT)
    return EventSourceResponse(
        frames,
        ping=HEARTBEAT_SECONDS,
        ping_message_factory=heartbeat,
        sep="\n",
    )
