"""What a spec can name: data sets, families, backbones, metrics."""

from http import HTTPStatus
from typing import Literal, TypeVar

from fastapi import APIRouter

from coterie.service import schemas
from coterie.service.errors import problem_responses
from coterie.service.routes.parameters import NO_QUERY

router = APIRouter(
    prefix="/v1",
    tags=["catalogue"],
    dependencies=[NO_QUERY],
    responses=problem_responses(HTTPStatus.BAD_REQUEST),
)
Item = TypeVar("Item", bound=schemas.CatalogueItem)
Kind = Literal["datasets", "families", "backbones", "metrics"]


@router.get("/datasets")
def list_datasets() -> schemas.Page[schemas.DatasetItem]:
    """List the sources of data, with their tasks and options."""
    return _page(schemas.DatasetItem, "datasets")


@router.get("/families")
def list_families() -> schemas.Page[schemas.CatalogueItem]:
    """List the ways to share between tasks, with their dimensions."""
    return _page(schemas.CatalogueItem, "families")


@router.get("/backbones")
def list_backbones() -> schemas.Page[schemas.CatalogueItem]:
    """List the backbones, with their dimensions."""
    return _page(schemas.CatalogueItem, "backbones")


@router.get("/metrics")
def list_metrics() -> schemas.Page[schemas.MetricItem]:
    """List the metrics that can be objectives or have bounds."""
    return _page(schemas.MetricItem, "metrics")


def _page(model: type[Item], kind: Kind) -> schemas.Page[Item]:
    from coterie.search import catalogue  # with torch: the server starts without it

    listed = {
        "datasets": catalogue.datasets,
        "families": catalogue.families,
        "backbones": catalogue.backbones,
        "metrics": catalogue.metrics,
    }
    return schemas.Page(items=[model.model_validate(item) for item in listed[kind]()], next_cursor=None)
