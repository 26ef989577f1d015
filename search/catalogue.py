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

# Title and description of each family, for those who choose one without reading its code.
FAMILY_WORDS = {
    "single": ("One network per task", "Every task has a network of its own; nothing is shared."),
    "shared": ("One shared network", "All tasks share one network, each with a head of its own."),
    "grouped": (
        "Groups, given or searched",
        "The tasks of a group share one network; which tasks go together is given by the job or searched.",
    ),
    "dmtg": (
        "Groups learned in training (DMTG)",
        "One training learns which tasks go together, and a network for each group of them.",
    ),
    "interrogate": (
        "Gates between shared and own channels (InterroGate)",
        "For each channel of each layer, a task learns whether it reads the shared one or one of its own.",
    ),
    "etr_nlp": (
        "Fixed filters and reserved channels (ETR-NLP)",
        "Filters are fixed rather than learned, and a set share of the channels is every task's, the rest "
        "one task's each.",
    ),
    "affinity": (
        "Groups by measured affinity",
        "It measures how much the tasks help each other, groups them by that, and trains a network for each "
        "group.",
    ),
    "dmtg+interrogate": (
        "Learned groups, then gates (DMTG and InterroGate)",
        "It first learns which tasks go together, then which channels each shares within its group.",
    ),
}


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
            "title": FAMILY_WORDS[name][0],
            "description": FAMILY_WORDS[name][1],
            "schema": json_schema(name, list(BACKBONES), EXAMPLE_TASKS),
        }
        for name in FAMILIES
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
