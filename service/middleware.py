"""What all answers have in common: an id, headers, conditional requests, compression, HEAD.

Plain ASGI, since Starlette's BaseHTTPMiddleware holds up streams. `install_middleware` says in which order.
"""

import hashlib
import logging
import re
from collections.abc import Sequence
from http import HTTPStatus
from urllib.parse import quote

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import DEFAULT_EXCLUDED_CONTENT_TYPES, GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coterie.service.errors import INTERNAL, Kind, problem_response
from coterie.service.request_id import HEADER, current_request_id, make_request_id
from coterie.service.routes.file_response import ONLY_HEAD

LIMIT_URL = 8192  # bytes; what proxies and browsers commonly take
LIMIT_HEADERS = 16_384  # bytes of names and values
LIMIT_HEADER_COUNT = 100
LEAST_COMPRESSED = 1000  # bytes; a smaller answer fits one packet anyway
# On a page of trials level 9 saves another tenth, and takes three times as long.
COMPRESSION_LEVEL = 1
# Weights hardly shrink, and compressed they would have neither a length nor ranges.
NOT_COMPRESSED = (*DEFAULT_EXCLUDED_CONTENT_TYPES, "application/octet-stream")
TAG_BYTES = 16

MALFORMED = Kind(HTTPStatus.BAD_REQUEST, "malformed-request", "This is no HTTP request")
URL_TOO_LONG = Kind(HTTPStatus.REQUEST_URI_TOO_LONG, "url-too-long", "The URL is too long")
HEADERS_TOO_LARGE = Kind(
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "headers-too-large", "The headers are too large"
)
FORBIDDEN_ORIGIN = Kind(
    HTTPStatus.FORBIDDEN, "forbidden-origin", "Pages of this origin may not make this request"
)

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# The page of the API documents starts itself from a script in its text.
_DOCS = "/docs"
_DOCS_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_POLICY = "default-src 'none'; frame-ancestors 'none'"

_SENT_ACROSS_ORIGINS = ("Authorization", "Idempotency-Key", "If-None-Match", "Last-Event-ID", "Range", HEADER)
_SEEN_ACROSS_ORIGINS = ("Content-Disposition", "ETag", "Location", "Retry-After", HEADER)
_METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
_VERSIONS = ("1.0", "1.1")
_TAG = re.compile(r'(?:W/)?("[^"]*")|\*')

logger = logging.getLogger(__name__)


def install_middleware(app: FastAPI, origins: Sequence[str]) -> None:
    """Wrap the app; each of these is outside of those above it.

    Args:
        app: The app.
        origins: Of pages that may call the API from a browser, besides its own; usually none.
    """
    app.add_middleware(ConditionalGet)
    app.add_middleware(
        _GZip,
        minimum_size=LEAST_COMPRESSED,
        compresslevel=COMPRESSION_LEVEL,
        exclude_content_types=NOT_COMPRESSED,
    )
    app.add_middleware(HeadAsGet)
    if origins:
        app.add_middleware(
            _Cors,
            allow_origins=origins,
            allow_methods=_METHODS,
            allow_headers=_SENT_ACROSS_ORIGINS,
            expose_headers=_SEEN_ACROSS_ORIGINS,
        )
    app.add_middleware(Envelope)


def none_match(request: Request, tag: str) -> bool:
    """Whether the client has none of the version with this entity tag, by its If-None-Match."""
    asked = ", ".join(request.headers.getlist("if-none-match"))
    # Weak comparison (RFC 9110, 13.1.2): whether either is marked weak makes no difference.
    return not any(found[0] == "*" or found[1] == tag.removeprefix("W/") for found in _TAG.finditer(asked))


class Envelope:
    """Gives requests an id, answers that and their headers, and faults of ours a problem document."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = make_request_id(Headers(scope=scope).get(HEADER))
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                _add_headers(message, scope["path"], request_id)
            await send(message)

        token = current_request_id.set(request_id)
        try:
            app = _refuse_ambiguous(scope) or _refuse_large(scope) or self._app
            await app(scope, receive, send_with_headers)
        except Exception:
            if started:
                raise  # the server logs it, and closes the connection so that the client sees the break
            logger.exception("unexpected error in %s %s", scope["method"], quote(scope["path"]))
            response = problem_response(
                INTERNAL, "this is a fault of the server, and its log says more", instance=scope["path"]
            )
            await response(scope, receive, send_with_headers)
        finally:
            current_request_id.reset(token)


def _refuse_ambiguous(scope: Scope) -> Response | None:
    """Refuse what a proxy in front may have cut elsewhere, hiding a request in the body (RFC 9112, 6.1)."""
    headers, version = Headers(scope=scope), scope["http_version"]
    if version not in _VERSIONS:
        detail = "the server speaks HTTP/1.1"
    elif "transfer-encoding" in headers and ("content-length" in headers or version == "1.0"):
        detail = (
            "the body's end must be said in one way: by Content-Length, or in HTTP/1.1 by Transfer-Encoding"
        )
    else:
        return None
    response = problem_response(MALFORMED, detail, instance=scope["path"])
    response.headers["Connection"] = "close"
    return response


def _refuse_large(scope: Scope) -> Response | None:
    if len(scope["path"]) + len(scope["query_string"]) > LIMIT_URL:
        return problem_response(
            URL_TOO_LONG, f"path and query must be at most {LIMIT_URL:,} bytes", instance=scope["path"]
        )
    headers = scope["headers"]
    if (
        len(headers) > LIMIT_HEADER_COUNT
        or sum(len(name) + len(value) for name, value in headers) > LIMIT_HEADERS
    ):
        return problem_response(
            HEADERS_TOO_LARGE,
            f"there must be at most {LIMIT_HEADER_COUNT} headers of {LIMIT_HEADERS:,} bytes together",
            instance=scope["path"],
        )
    return None


def _add_headers(message: Message, path: str, request_id: str) -> None:
    headers = MutableHeaders(scope=message)
    headers[HEADER] = request_id
    for name, value in SECURITY_HEADERS.items():
        headers.setdefault(name, value)
    headers.setdefault("Content-Security-Policy", _DOCS_POLICY if path.startswith(_DOCS) else _POLICY)
    headers.setdefault("Cache-Control", "private, no-cache" if "etag" in headers else "no-store")


class HeadAsGet:
    """Answers HEAD as GET, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        answered = False

        async def send_head(message: Message) -> None:
            nonlocal answered
            if answered:
                return
            await send(message)
            if message["type"] == "http.response.start":
                answered = True
                # The answer ends here, so that a stream sees its client gone and ends too.
                await send({"type": "http.response.body", "body": b""})

        await self._app({**scope, "method": "GET", ONLY_HEAD: True}, receive, send_head)


class ConditionalGet:
    """Gives JSON that is sent in one piece an entity tag, and no body to who has it by If-None-Match.

    Streams and files pass: what they need, they have. The tag is weak, as the same answer may be compressed.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http" or scope["method"] != "GET":
            await self._app(scope, receive, send)
            return
        held: Message | None = None  # the answer's beginning, until its body is there

        async def send_tagged(message: Message) -> None:
            nonlocal held
            if message["type"] == "http.response.start" and _can_be_tagged(message):
                held = message
                return
            if held is not None:
                start, held = held, None
                if not message.get("more_body", False):
                    message = _tag(Request(scope), start, message)
                await send(start)
            await send(message)

        await self._app(scope, receive, send_tagged)


def _can_be_tagged(start: Message) -> bool:
    headers = Headers(raw=start["headers"])
    return (
        start["status"] == HTTPStatus.OK
        and headers.get("content-type") == "application/json"
        and "etag" not in headers
    )


def _tag(request: Request, start: Message, body: Message) -> Message:
    """Put the tag of its body into an answer's beginning; gives the body, or none where the client has it."""
    content = body.get("body", b"")
    tag = f'W/"{hashlib.blake2b(content, digest_size=TAG_BYTES).hexdigest()}"'
    headers = MutableHeaders(scope=start)
    headers["ETag"] = tag
    if none_match(request, tag):
        return body
    start["status"] = HTTPStatus.NOT_MODIFIED
    headers.add_vary_header("Accept-Encoding")  # as on the whole answer
    del headers["content-length"], headers["content-type"]
    return {**body, "body": b""}


class _GZip(GZipMiddleware):
    """Starlette's; a compressed answer is another one than its file, of which ranges can be had."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_weakened(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                tag = headers.get("etag", "")
                if "content-encoding" in headers and tag.startswith('"'):
                    headers["ETag"] = f"W/{tag}"
                    del headers["accept-ranges"]
            await send(message)

        await super().__call__(scope, receive, send_weakened)


class _Cors(CORSMiddleware):
    """Starlette's, with its refusal as a problem document."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a browser that asks what a page of another origin may do."""
        response = super().preflight_response(request_headers)
        if response.status_code == HTTPStatus.OK:
            return response
        return problem_response(FORBIDDEN_ORIGIN, bytes(response.body).decode(), instance="")
