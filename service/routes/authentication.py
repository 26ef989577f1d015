"""Who makes a request, by its headers. Every route asks, but those that say whether the server lives."""

import base64
import binascii
from dataclasses import replace
from http import HTTPStatus
from ipaddress import ip_address
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from coterie.service.auth import Caller, Forbidden
from coterie.service.gate import Gate
from coterie.service.threads import Threads

BASIC = 'Basic realm="coterie", charset="UTF-8"'
BEARER = 'Bearer realm="coterie"'
ACCESS_ERRORS = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.TOO_MANY_REQUESTS)
_PAGE = "/"
_SAFE = ("GET", "HEAD")
_LOOK_UPS = Threads("tokens", 4)  # however busy the server's other threads are, tokens are looked up
# Where the documents say so; what is sent is read below, also as browsers send it.
_SCHEME = HTTPBearer(
    auto_error=False,
    bearerFormat="coterie_<id>_<secret>",
    description="An access token, as `coterie token create` and POST /v1/tokens make it. A server on "
    "loopback takes requests without one until the first is made.",
)


class Unauthenticated(Exception):
    """The request holds no token that opens anything.

    Attributes:
        challenge: How it can be sent, for WWW-Authenticate.
    """

    def __init__(self, detail: str, challenge: str) -> None:
        super().__init__(detail)
        self.challenge = challenge


class WrongHost(Exception):
    """A request to the open server that does not come from this machine, or not of its own accord."""


async def authenticate(
    request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Depends(_SCHEME)]
) -> Caller:
    """Who makes the request.

    Raises:
        Unauthenticated: If it needs a token and has none, or one that is no good.
        WrongHost: If the server is open, and the request may be another site's or machine's.
        Forbidden: If the server is open, and the request is another site's.
        TooManyRequests: If the token made too many.
    """
    gate: Gate = request.app.state.gate
    token = _token(request)
    caller = gate.recall(token) or await _LOOK_UPS.run(gate.look_up, token)
    if caller is None:
        raise _refusal(request, token)
    if caller.token_id is None:
        _check_local(request)
    gate.count(caller)
    return replace(caller, request_id=getattr(request.state, "request_id", None))


async def still_allowed(request: Request) -> bool:
    """Whether the request's token is still good: for answers that take long, to be asked now and then."""
    gate: Gate = request.app.state.gate
    token = _token(request)
    return (gate.recall(token) or await _LOOK_UPS.run(gate.look_up, token)) is not None


AUTHENTICATED = Depends(authenticate)


def _token(request: Request) -> str | None:
    """The token in the request's headers; what is none, as it is; None where there is nothing."""
    headers = request.headers.getlist("authorization")
    if not headers:
        return None
    scheme, _, value = headers[0].partition(" ")
    if len(headers) == 1 and scheme.lower() == "bearer":
        return value.strip()
    # Browsers add what they were told by themselves, also to what a page of another site makes them send.
    if len(headers) == 1 and scheme.lower() == "basic" and request.method in _SAFE:
        return _password(value.strip())
    return ""


def _password(credentials: str) -> str:
    try:
        return base64.b64decode(credentials, validate=True).decode().partition(":")[2]
    except (binascii.Error, ValueError):
        return ""


def _refusal(request: Request, token: str | None) -> Unauthenticated:
    """One text for all tokens that are no good: why is for the log alone."""
    if request.url.path == _PAGE:  # people see it, and their browser asks them
        return Unauthenticated("give an access token as the password, with any user name", BASIC)
    if token is None:
        return Unauthenticated("an access token is needed, sent as Authorization: Bearer TOKEN", BEARER)
    return Unauthenticated(
        "the access token is not known, has expired or was revoked", f'{BEARER}, error="invalid_token"'
    )


def _check_local(request: Request) -> None:
    """Hold the open server to this machine.

    A name that a site lets point to 127.0.0.1 would make its pages this server's own (DNS rebinding), so only
    loopback's names are answered. And a page may send requests to other sites, though not read the answers:
    those that change something must come from this server's own pages, or from none.
    """
    address, _ = request.scope.get("server") or ("", None)
    host = request.headers.get("host", "")
    if not (_is_loopback(address) and _is_loopback(_name_in(host))):
        raise WrongHost(
            "without access tokens the server answers to 127.0.0.1, [::1] and localhost alone; "
            "`coterie token create` makes one, and then any name is good"
        )
    origin = request.headers.get("origin")
    if request.method in _SAFE or origin is None or origin.partition("://")[2] == host:
        return
    if origin not in request.app.state.context.settings.cors_origins:
        raise Forbidden("pages of other origins may change nothing here")


def _name_in(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
