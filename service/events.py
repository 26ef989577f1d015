"""What happens to a job, as a stream."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from coterie.search.faults import Fault
from coterie.search.store import JOB_ENDED
from coterie.service.context import Context
from coterie.service.cursors import InvalidQuery
from coterie.service.storage.events import EventKind


def open_stream(
    context: Context,
    job_id: str,
    *,
    last_event_id: int | None = None,
    after: int = 0,
    kinds: Sequence[EventKind] = (),
    seconds: float | None = None,
    allowed: Callable[[], Awaitable[bool]],
) -> AsyncIterator[bytes] | None:
    """The events that follow `last_event_id`, or else `after`, as they come, while the caller is allowed to.

    Returns:
        Server-Sent Events; None where the job has ended and none follow.

    Raises:
        NotFound: If there is no such job.
        InvalidQuery: If the job has no event of this id yet: it is another job's, or of a database that was
            put back.
        TooManyStreams: If the caller's token has too many open already.
    """
    position = after if last_event_id is None else last_event_id
    with context.database.read() as session:
        job = context.jobs(session).get(job_id)
    if position > job.last_event:
        pointer = "/query/after" if last_event_id is None else "/header/Last-Event-ID"
        raise InvalidQuery([Fault(pointer, f"must be at most {job.last_event}, this job's newest event")])
    if job.state in JOB_ENDED and position == job.last_event:
        return None
    context.hub.check_room(context.caller.token_id)
    return context.hub.stream(
        job_id,
        after=position,
        newest=job.last_event,
        kinds=frozenset(kinds or EventKind),
        seconds=seconds,
        token_id=context.caller.token_id,
        allowed=allowed,
    )
