"""The network that a trial ended with: its description and its weights."""

from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from coterie.search.artifacts import Location
from coterie.service import trials
from coterie.service.errors import problem_responses
from coterie.service.middleware import none_match
from coterie.service.routes.file_response import FileAnswer, digest_of
from coterie.service.routes.parameters import NO_QUERY, ContextOf, Parameters, TrialId
from coterie.service.storage.repositories import NotFound

router = APIRouter(prefix="/v1/trials/{trial_id}", tags=["architectures"])
_ERRORS: dict[int | str, dict[str, Any]] = {
    206: {"description": "Parts of the file, by Range"},
    304: {"description": "The client has this version, by If-None-Match"},
    **problem_responses(
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.NOT_FOUND,
        HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
        HTTPStatus.SERVICE_UNAVAILABLE,
    ),
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
    responses=_ERRORS,
)
def read_architecture(context: ContextOf, trial_id: TrialId, request: Request) -> Response:
    """Read the static network: its layers, which task uses which of them, macs by task."""
    file, stored = trials.find_file(context, trial_id, trials.ARCHITECTURE_FILE)
    return _send(request, file, "application/json", f"{trial_id}.{file.name}", stored.sha256)


@router.get(
    "/model",
    response_class=Response,
    responses={
        200: {"content": {_MODEL_TYPE: {"schema": {"type": "string", "format": "binary"}}}},
        **_ERRORS,
        **problem_responses(HTTPStatus.CONFLICT),
    },
)
def read_model(
    context: ContextOf, trial_id: TrialId, query: Annotated[ModelParameters, Query()], request: Request
) -> Response:
    """Download the network, or its weights alone."""
    if query.format == "safetensors":
        file, stored = trials.find_file(context, trial_id, trials.WEIGHTS_FILE)
        return _send(request, file, _MODEL_TYPE, f"{trial_id}.{file.name}", stored.sha256)
    file = trials.convert_model(context, trial_id, query.format)
    return _send(request, file, _MODEL_TYPE, f"{trial_id}.{query.format}")


def _send(
    request: Request, file: Location, media_type: str, name: str, sha256: str | None = None
) -> Response:
    try:
        headers = {"ETag": f'"{sha256 or digest_of(file)}"'}
        if not none_match(request, headers["ETag"]):
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
        return FileAnswer(file, media_type=media_type, filename=name, headers=headers)
    except FileNotFoundError:  # it was there a moment ago
        raise NotFound(f"{name} was deleted just now") from None
