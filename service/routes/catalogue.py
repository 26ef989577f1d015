"""What a spec can name: data sets, families, backbones, metrics."""

from functools import cache
from http import HTTPStatus
from typing import TypeVar

from fastapi import APIRouter

from coterie.service import schemas
from coterie.service.errors import problem_responses
from coterie.service.planner import PLANNER, Kind
from coterie.service.routes.parameters import NO_QUERY

router = APIRouter(
    prefix="/v1",
    tags=["catalogue"],
    dependencies=[NO_QUERY],
    responses=problem_responses(HTTPStatus.BAD_REQUEST),
)
Item = TypeVar("Item", bound=schemas.CatalogueItem)


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


@cache
def _page(model: type[Item], kind: Kind) -> schemas.Page[Item]:
    """Asked for once: what is installed stays the same while a server runs."""
    items = [model.model_validate(item) for item in PLANNER.catalogue(kind)]
    return schemas.Page(items=items, next_cursor=None)
