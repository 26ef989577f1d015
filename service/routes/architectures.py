"""The network that a trial ended with: its description and its weights."""

from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from coterie.service import trials
from coterie.service.context import Context
from coterie.service.errors import problem_responses
from coterie.service.routes.parameters import NO_QUERY, ContextOf, Parameters, TrialId

router = APIRouter(prefix="/v1/trials/{trial_id}", tags=["architectures"])
_ERRORS = problem_responses(HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND)
_NOT_MODIFIED: dict[int | str, dict[str, Any]] = {
    304: {"description": "The client has this version, by If-None-Match"}
}
_MODEL_TYPE = "application/octet-stream"


def _refuse_planned(value: object) -> object:
    if value in ("onnx", "pt2"):
        raise PydanticCustomError("not_implemented", "'{value}' is not implemented yet", {"value": value})
    return value


class ModelParameters(Parameters):
    """In which form."""

    format: Annotated[Literal["safetensors"], BeforeValidator(_refuse_planned)] = Field(
        default="safetensors", description="Form of the file; onnx and pt2 are not implemented yet."
    )


@router.get(
    "/architecture",
    dependencies=[NO_QUERY],
    response_model=dict[str, Any],
    responses={**_NOT_MODIFIED, **_ERRORS},
)
def read_architecture(context: ContextOf, trial_id: TrialId, request: Request) -> Response:
    """Read the static network: groups, sharing, macs."""
    return _send(context, request, trial_id, "architecture.json", "application/json")


@router.get(
    "/model",
    response_class=Response,
    responses={
        200: {"content": {_MODEL_TYPE: {"schema": {"type": "string", "format": "binary"}}}},
        **_NOT_MODIFIED,
        **_ERRORS,
    },
)
def read_model(
    context: ContextOf, trial_id: TrialId, query: Annotated[ModelParameters, Query()], request: Request
) -> Response:
    """Download the network's weights."""
    return _send(context, request, trial_id, f"weights.{query.format}", _MODEL_TYPE)


def _send(context: Context, request: Request, trial_id: str, name: str, media_type: str) -> Response:
    file, stored = trials.find_file(context, trial_id, name)
    headers = {"ETag": f'"{stored.sha256}"'}
    if headers["ETag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    return FileResponse(file, media_type=media_type, filename=f"{trial_id}.{name}", headers=headers)
