"""The network that a trial ended with: its description and its weights."""

from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from coterie.search.artifacts import Location
from coterie.service import trials
from coterie.service.errors import problem_responses
from coterie.service.middleware import none_match
from coterie.service.routes.file_response import digest_of, file_response
from coterie.service.routes.parameters import NO_QUERY, ContextOf, Parameters, TrialId

router = APIRouter(prefix="/v1/trials/{trial_id}", tags=["architectures"])
_ERRORS = problem_responses(HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND, HTTPStatus.SERVICE_UNAVAILABLE)
_MODEL_ERRORS = problem_responses(
    HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT, HTTPStatus.SERVICE_UNAVAILABLE
)
_NOT_MODIFIED: dict[int | str, dict[str, Any]] = {
    304: {"description": "The client has this version, by If-None-Match"}
}
_MODEL_TYPE = "application/octet-stream"


class ModelParameters(Parameters):
    """In which form."""

    format: Literal["safetensors", "onnx", "pt2"] = Field(
        default="safetensors",
        description="safetensors: the weights alone, which go with /architecture. onnx and pt2 (a program of "
        "torch.export): the whole network on raw inputs, the batch's size open; made at the first request, "
        "which may take a minute.",
    )


@router.get(
    "/architecture",
    dependencies=[NO_QUERY],
    response_model=dict[str, Any],
    responses={**_NOT_MODIFIED, **_ERRORS},
)
def read_architecture(context: ContextOf, trial_id: TrialId, request: Request) -> Response:
    """Read the static network: its layers, which task uses which of them, macs by task."""
    file, stored = trials.find_file(context, trial_id, trials.ARCHITECTURE_FILE)
    return _send(request, file, stored.sha256, "application/json", f"{trial_id}.{file.name}")


@router.get(
    "/model",
    response_class=Response,
    responses={
        200: {"content": {_MODEL_TYPE: {"schema": {"type": "string", "format": "binary"}}}},
        **_NOT_MODIFIED,
        **_MODEL_ERRORS,
    },
)
def read_model(
    context: ContextOf, trial_id: TrialId, query: Annotated[ModelParameters, Query()], request: Request
) -> Response:
    """Download the network, or its weights alone."""
    if query.format == "safetensors":
        file, stored = trials.find_file(context, trial_id, trials.WEIGHTS_FILE)
        return _send(request, file, stored.sha256, _MODEL_TYPE, f"{trial_id}.{file.name}")
    file = trials.convert_model(context, trial_id, query.format)
    return _send(request, file, digest_of(file), _MODEL_TYPE, f"{trial_id}.{query.format}")


def _send(request: Request, file: Location, sha256: str, media_type: str, name: str) -> Response:
    headers = {"ETag": f'"{sha256}"'}
    if not none_match(request, headers["ETag"]):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    return file_response(file, media_type=media_type, filename=name, headers=headers)
