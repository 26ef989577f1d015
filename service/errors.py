"""Errors as HTTP sees them: one table, and the problem documents (RFC 9457) made from it."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Mount

from coterie.search.faults import Fault, SpecError, escape
from coterie.search.store import DiskFull, FilesUnavailable
from coterie.service import schemas
from coterie.service.auth import Forbidden
from coterie.service.body import LIMIT_POINTER, MalformedBody
from coterie.service.conversion import ConversionBusy, ConversionFailed, NotConvertible
from coterie.service.cursors import InvalidQuery
from coterie.service.fronts import NoneFits
from coterie.service.gate import TooManyRequests
from coterie.service.hub import TooManyStreams
from coterie.service.planner import PlannerUnavailable
from coterie.service.request_id import current_request_id
from coterie.service.routes.authentication import Unauthenticated, WrongHost
from coterie.service.routes.file_response import OutOfRange
from coterie.service.routes.reading import BodyTooLarge, WrongContentType
from coterie.service.storage.database import DatabaseUnavailable
from coterie.service.storage.queue import QuotaExceeded
from coterie.service.storage.repositories import Conflict, NotFound
from coterie.service.webhooks import LookUpBusy

MEDIA_TYPE = "application/problem+json"
METHODS = ("DELETE", "GET", "PATCH", "POST", "PUT")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """A kind of problem: the status, and `type` and title of its documents."""

    status: HTTPStatus
    name: str
    title: str


BAD_QUERY = Kind(HTTPStatus.BAD_REQUEST, "bad-query", "A query or header parameter can't be used")
NOT_FOUND = Kind(HTTPStatus.NOT_FOUND, "not-found", "There is no such thing")
INTERNAL = Kind(HTTPStatus.INTERNAL_SERVER_ERROR, "internal", "The server made a mistake")
KINDS: Mapping[type[Exception], Kind] = {
    MalformedBody: Kind(HTTPStatus.BAD_REQUEST, "malformed-body", "The body is not a JSON document"),
    ClientDisconnect: Kind(HTTPStatus.BAD_REQUEST, "malformed-body", "The body did not arrive"),
    InvalidQuery: BAD_QUERY,
    Unauthenticated: Kind(HTTPStatus.UNAUTHORIZED, "unauthenticated", "Who asks is not known"),
    Forbidden: Kind(HTTPStatus.FORBIDDEN, "forbidden", "The caller may not do this"),
    WrongHost: Kind(HTTPStatus.MISDIRECTED_REQUEST, "wrong-host", "The server does not go by this name"),
    LookUpBusy: Kind(HTTPStatus.SERVICE_UNAVAILABLE, "look-up-busy", "The server looks other names up"),
    TooManyStreams: Kind(HTTPStatus.TOO_MANY_REQUESTS, "too-many-streams", "The token follows too many jobs"),
    OutOfRange: Kind(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "out-of-range", "The file has no such part"),
    TooManyRequests: Kind(HTTPStatus.TOO_MANY_REQUESTS, "too-many-requests", "The token is used too often"),
    NotFound: NOT_FOUND,
    NoneFits: Kind(HTTPStatus.NOT_FOUND, "none-fits", "No trial keeps the limits"),
    QuotaExceeded: Kind(HTTPStatus.FORBIDDEN, "quota-exceeded", "The tenant has as much as it may have"),
    Conflict: Kind(HTTPStatus.CONFLICT, "conflict", "The state forbids it"),
    BodyTooLarge: Kind(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body-too-large", "The body is too large"),
    WrongContentType: Kind(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "wrong-content-type", "The body is not sent as JSON"
    ),
    SpecError: Kind(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid-spec", "The body breaks a rule"),
    NotConvertible: Kind(HTTPStatus.CONFLICT, "not-convertible", "The network has no such form"),
    ConversionBusy: Kind(
        HTTPStatus.SERVICE_UNAVAILABLE, "conversion-busy", "The server converts other networks"
    ),
    ConversionFailed: Kind(
        HTTPStatus.INTERNAL_SERVER_ERROR, "conversion-failed", "The network can't be converted"
    ),
    PlannerUnavailable: Kind(
        HTTPStatus.SERVICE_UNAVAILABLE, "planner-unavailable", "The server can't plan a job now"
    ),
    DiskFull: Kind(HTTPStatus.INSUFFICIENT_STORAGE, "disk-full", "The server has no space left"),
    FilesUnavailable: Kind(
        HTTPStatus.SERVICE_UNAVAILABLE, "files-unavailable", "The place of the files does not answer"
    ),
    DatabaseUnavailable: Kind(
        HTTPStatus.SERVICE_UNAVAILABLE, "database-unavailable", "The database does not answer"
    ),
}


def install_handlers(app: FastAPI) -> None:
    """Make every error of the app a problem document."""
    for error in KINDS:
        app.add_exception_handler(error, _handle_ours)
    app.add_exception_handler(RequestValidationError, _handle_parameters)
    app.add_exception_handler(HTTPException, _handle_http)


async def _handle_ours(request: Request, error: Exception) -> JSONResponse:
    kind = next(KINDS[kind] for kind in type(error).__mro__ if kind in KINDS)
    if isinstance(error, SpecError | InvalidQuery):
        return _problem(request, kind, _summary(error.faults), faults=error.faults)
    if isinstance(error, NoneFits) and error.nearest is not None:
        trial_id, values = error.nearest
        return _problem(
            request, kind, str(error), nearest=schemas.NearestMiss(trial_id=trial_id, values=values)
        )
    if isinstance(error, DatabaseUnavailable | FilesUnavailable):
        logger.error("%s: %s", kind.title, error, exc_info=error.__cause__)
        return _problem(request, kind, "try again in a moment")
    response = _problem(request, kind, str(error) or kind.title)
    if isinstance(error, BodyTooLarge):
        response.headers["Connection"] = "close"  # or the server would go on to read what the client sends
    elif isinstance(error, OutOfRange):
        response.headers["Content-Range"] = f"bytes */{error.size}"
    elif isinstance(error, Unauthenticated):
        response.headers["WWW-Authenticate"] = error.challenge
    elif isinstance(error, TooManyRequests):
        seconds = math.ceil(error.retry_seconds)
        response.headers["Retry-After"] = str(seconds)
        # As draft-ietf-httpapi-ratelimit-headers-10 has them.
        window = math.ceil(error.window_seconds)
        response.headers["RateLimit-Policy"] = f'"token";q={error.burst};w={window}'
        response.headers["RateLimit"] = f'"token";r=0;t={seconds}'
    return response


async def _handle_parameters(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if any(fault["loc"][0] == "path" for fault in found):
        return _problem(request, NOT_FOUND, "this path holds no id that could exist")
    faults = [
        Fault(("/" + "/".join(map(escape, fault["loc"])))[:LIMIT_POINTER], fault["msg"]) for fault in found
    ]
    return _problem(request, BAD_QUERY, _summary(faults), faults=faults)


async def _handle_http(request: Request, error: Exception) -> Response:
    """What the router raises: an unknown path, or a known one with another method."""
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    if status == HTTPStatus.NOT_FOUND:
        return _problem(request, NOT_FOUND, "there is nothing at this path")
    kind = Kind(status, status.name.lower().replace("_", "-"), status.phrase)
    if status != HTTPStatus.METHOD_NOT_ALLOWED:
        return _problem(request, kind, error.detail)
    allowed = ", ".join(_allowed(request))
    if request.method == "OPTIONS":
        return Response(status_code=HTTPStatus.NO_CONTENT, headers={"Allow": allowed})
    response = _problem(request, kind, f"this path takes {allowed}")
    response.headers["Allow"] = allowed
    return response


def _allowed(request: Request) -> list[str]:
    """The methods of all routes at this path: the router names only those of the first."""
    found = {
        method
        for method in METHODS
        if any(
            route.matches({**request.scope, "method": method})[0] is Match.FULL
            and (method == "GET" or not isinstance(route, Mount))  # below which there are files
            for route in request.app.routes
        )
    }
    return sorted(found | {"OPTIONS"} | ({"HEAD"} if "GET" in found else set()))


def _summary(faults: Sequence[Fault]) -> str:
    first = f"{faults[0].pointer}: {faults[0].detail}" if faults[0].pointer else faults[0].detail
    return first if len(faults) == 1 else f"{first} (and {len(faults) - 1} more)"


def _problem(request: Request, kind: Kind, detail: str, **members: Any) -> JSONResponse:
    return problem_response(kind, detail, instance=request.url.path, **members)


def problem_response(
    kind: Kind,
    detail: str,
    *,
    instance: str,
    faults: Sequence[Fault] | None = None,
    nearest: schemas.NearestMiss | None = None,
) -> JSONResponse:
    """A problem document; `instance` is the path of the request."""
    problem = schemas.Problem(
        type=f"urn:coterie:problem:{kind.name}",
        title=kind.title,
        status=kind.status,
        detail=detail,
        instance=instance[:LIMIT_POINTER],
        request_id=current_request_id.get(),
        errors=None
        if faults is None
        else [schemas.Fault(pointer=f.pointer, detail=f.detail) for f in faults],
        nearest=nearest,
    )
    members = {name: value for name, value in problem.model_dump().items() if value is not None}
    return JSONResponse(members, status_code=kind.status, media_type=MEDIA_TYPE)


def problem_responses(*statuses: HTTPStatus) -> dict[int | str, dict[str, Any]]:
    """What an endpoint declares in OpenAPI: these errors, and that all others look the same."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    named: dict[int | str, dict[str, Any]] = {
        int(status): {"description": status.phrase, "content": content} for status in statuses
    }
    return named | {"default": {"description": "Any other error", "content": content}}
