"""What can be asked for: sources, families, backbones and metrics, with JSON Schemas of their settings."""

from typing import Any

from coterie.models.backbones import BACKBONES
from coterie.models.families import FAMILIES
from coterie.models.tasks import KIND_METRICS
from coterie.search.data.registry import sources
from coterie.search.objective import METRICS, TASK_UNITS
from coterie.search.space import backbone_dimensions, json_schema, schema_of

# What the catalogue shows of a family's space without a job: with this many tasks.
EXAMPLE_TASKS = 8


def datasets() -> list[dict[str, Any]]:
    """The registered sources with their tasks and the schema of their options."""
    return [
        {
            "name": name,
            "title": source.title,
            "description": source.description,
            "schema": source.options.model_json_schema(),
            "tasks": [
                {
                    "name": task.name,
                    "kind": task.kind.value,
                    "metric": task.metric,
                    "direction": task.direction.value,
                    "metrics": [
                        {
                            "name": metric,
                            "direction": direction.value,
                            "unit": TASK_UNITS.get(metric, "of the target"),
                        }
                        for metric, direction in KIND_METRICS[task.kind].items()
                    ],
                }
                for task in source.tasks()
            ],
        }
        for name, source in sources().items()
    ]


def families() -> list[dict[str, Any]]:
    """The families with the schema of what `search.space` may narrow."""
    return [
        {
            "name": name,
            "title": family.__name__,
            "description": _first_line(family),
            "schema": json_schema(name, list(BACKBONES), EXAMPLE_TASKS),
        }
        for name, family in FAMILIES.items()
    ]


def backbones() -> list[dict[str, Any]]:
    """The backbones with the schema of their own dimensions."""
    return [
        {
            "name": name,
            "title": backbone.__name__,
            "description": _first_line(backbone),
            "schema": schema_of(backbone_dimensions(name)),
        }
        for name, backbone in BACKBONES.items()
    ]


def metrics() -> list[dict[str, Any]]:
    """The metrics; each task has its own besides, as task.<name>.<metric>."""
    return [
        {
            "name": metric.name,
            "title": metric.title,
            "description": metric.description,
            "schema": {"type": "number"},
            "direction": metric.direction.value,
            "unit": metric.unit,
        }
        for metric in METRICS.values()
    ]


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]
