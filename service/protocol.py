"""HTTP on a socket: uvicorn's protocol, with bounds on clients that are slow, too many or speak no HTTP."""

import socket
import sys
from asyncio import BaseTransport, TimerHandle
from http import HTTPStatus

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from coterie.service.errors import Kind, problem_response
from coterie.service.middleware import MALFORMED, SECURITY_HEADERS, Envelope
from coterie.service.request_id import HEADER, current_request_id, make_request_id

TOO_SLOW = Kind(HTTPStatus.REQUEST_TIMEOUT, "too-slow", "The request did not arrive in time")
OVERLOADED = Kind(HTTPStatus.SERVICE_UNAVAILABLE, "overloaded", "The server has too many connections")
RETRY_SECONDS = 5


class Protocol(H11Protocol):
    """A connection that is closed when its client keeps the server waiting.

    Attributes:
        head_seconds: From a request's first byte, or the connection's begin, until its headers are complete.
        body_seconds: From there until its body is; a megabyte takes 17 kB/s.
        stall_seconds: So long a client may take nothing of an answer that waits for it.
    """

    head_seconds = 15.0
    body_seconds = 60.0
    stall_seconds = 60.0

    def connection_made(self, transport: BaseTransport) -> None:
        """Begin to wait for the first request."""
        super().connection_made(transport)  # type: ignore[arg-type] # a socket's
        # Head and body are written one after the other, and Nagle's algorithm would hold the body for 40 ms.
        # asyncio sees to it only where the listening socket was made with IPPROTO_TCP.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._awaited: object = None  # h11's state while a part of a request arrives
        self._deadline: TimerHandle | None = None
        self._stall: TimerHandle | None = None
        # uvicorn would answer in plain text.
        most, self.limit_concurrency = self.limit_concurrency, None
        if most is not None and len(self.connections) > most:
            self.app = Envelope(_refuse)
        self._watch_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadlines."""
        super().connection_lost(exc)
        for timer in (self._deadline, self._stall):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Go on with a request."""
        super().data_received(data)
        self._watch_request()

    def on_response_complete(self) -> None:
        """Wait for the next request, and for the client to take what it was sent."""
        super().on_response_complete()
        self._watch_request()
        if self.transport.get_write_buffer_size() > 0:
            self._watch_answer()

    def pause_writing(self) -> None:
        """Wait for the client to take some of its answer."""
        super().pause_writing()
        self._watch_answer()

    def resume_writing(self) -> None:
        """Go on: it took some."""
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()

    def send_400_response(self, msg: str) -> None:
        """Refuse what h11 could not read."""
        error = sys.exception()
        hint = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else MALFORMED.status
        status = HTTPStatus(hint)
        self._refuse(
            MALFORMED
            if status == MALFORMED.status
            else Kind(status, status.name.lower().replace("_", "-"), status.phrase),
            str(error or msg),
        )

    def _watch_request(self) -> None:
        """Set a deadline when a part of a request begins to arrive, and drop it when that is complete."""
        part = self.conn.their_state
        begins = part is h11.IDLE and (self._is_new() or bool(self.conn.trailing_data[0]))
        awaited = part if begins or part is h11.SEND_BODY else None
        if awaited is self._awaited:
            return
        self._awaited = awaited
        if self._deadline is not None:
            self._deadline.cancel()
        if awaited is not None:
            seconds = self.head_seconds if awaited is h11.IDLE else self.body_seconds
            self._deadline = self.loop.call_later(seconds, self._end_slow_request, seconds)

    def _end_slow_request(self, seconds: float) -> None:
        part = "body" if self._awaited is h11.SEND_BODY else "headers"
        self._refuse(TOO_SLOW, f"its {part} must be complete within {seconds:g} s")

    def _watch_answer(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
        self._stall = self.loop.call_later(self.stall_seconds, self._end_stalled_answer)

    def _end_stalled_answer(self) -> None:
        answered = self._is_new() or self.cycle.response_complete
        if self.flow.write_paused or (answered and self.transport.get_write_buffer_size() > 0):
            self.transport.abort()

    def _is_new(self) -> bool:
        """Whether no request was read yet."""
        return self.cycle is None  # uvicorn has it so at first

    def _refuse(self, kind: Kind, detail: str) -> None:
        """Answer in place of the app, if nothing is answered yet, and close."""
        if not self._is_new():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            request_id = make_request_id()
            token = current_request_id.set(request_id)
            response = problem_response(kind, detail, instance="")
            current_request_id.reset(token)
            own = {HEADER: request_id, "Cache-Control": "no-store", "Connection": "close"}
            headers = [*response.headers.items(), *SECURITY_HEADERS.items(), *own.items()]
            for event in (
                h11.Response(status_code=kind.status, headers=headers, reason=kind.status.phrase),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    response = problem_response(OVERLOADED, "try again in a moment", instance=scope["path"])
    response.headers["Retry-After"] = str(RETRY_SECONDS)
    response.headers["Connection"] = "close"
    await response(scope, receive, send)
