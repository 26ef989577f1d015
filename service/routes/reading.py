"""Reading the body of a request, however much is sent."""

from typing import Any

from fastapi import Request

LIMIT_BYTES = 1_000_000
DRAIN_BYTES = 10_000_000  # so much more is read and dropped, so that the client gets to read the answer


class BodyTooLarge(Exception):
    """The body is over `LIMIT_BYTES`."""


class WrongContentType(Exception):
    """The body does not say that it is JSON, or is compressed."""


def json_body(schema: dict[str, Any]) -> dict[str, Any]:
    """What the OpenAPI document says of an endpoint that reads its body by `read_body`."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def json_body_of(model: str) -> dict[str, Any]:
    """The same, for a model among the document's components."""
    return json_body({"$ref": f"#/components/schemas/{model}"})


async def read_body(request: Request) -> bytes:
    """Read a body that says it is JSON.

    Raises:
        BodyTooLarge: If it is over the limit.
        WrongContentType: If it says that it is something else, or nothing. Browsers send such bodies across
            origins without asking.
    """
    body = bytearray()
    read = 0
    async for chunk in request.stream():
        read += len(chunk)
        if read <= LIMIT_BYTES:
            body += chunk
        if read > DRAIN_BYTES:
            break
    if read > LIMIT_BYTES:
        raise BodyTooLarge(f"the body must be at most {LIMIT_BYTES:,} bytes")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":  # what is small may be without end when it is unpacked
        raise WrongContentType("the body must be sent as it is, without Content-Encoding")
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise WrongContentType("the body must be JSON, sent with Content-Type: application/json")
    return bytes(body)
