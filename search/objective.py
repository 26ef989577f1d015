"""The metrics that a trial yields, and which way each is better."""

from collections.abc import Mapping
from dataclasses import dataclass

from coterie.models.metrics import delta_m, normalized_gain, total_error
from coterie.models.tasks import Direction, TaskSet


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that every completed trial has."""

    name: str
    title: str
    direction: Direction
    unit: str
    description: str


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            name="delta_m",
            title="Gain over single-task learning",
            direction=Direction.MAXIMIZE,
            unit="%",
            description="Mean over the tasks of the relative gain of the task's metric over the job's "
            "yardstick: single-task networks of the backbone's default width and recipe, over three seeds.",
        ),
        Metric(
            name="normalized_gain",
            title="Normalized gain",
            direction=Direction.MAXIMIZE,
            unit="%",
            description="As delta_m, on the error rates of classification tasks (DMTG's metric).",
        ),
        Metric(
            name="total_error",
            title="Total error",
            direction=Direction.MINIMIZE,
            unit="%",
            description="Sum over the classification tasks of the error rate.",
        ),
        Metric(
            name="macs",
            title="Multiply-accumulates",
            direction=Direction.MINIMIZE,
            unit="1",
            description="Of the static network: one input, all tasks.",
        ),
        Metric(
            name="params",
            title="Parameters",
            direction=Direction.MINIMIZE,
            unit="1",
            description="Of the static network.",
        ),
        Metric(
            name="latency_ms",
            title="Latency",
            direction=Direction.MINIMIZE,
            unit="ms",
            description="Median time of one input through the static network on the trial's device.",
        ),
        Metric(
            name="train_device_seconds",
            title="Training cost",
            direction=Direction.MINIMIZE,
            unit="s",
            description="Devices reserved times time of the training.",
        ),
    )
}

PLANNED = frozenset({"delta_m_own_width", "mean_rank", "peak_memory_mb"})
COSTS = ("macs", "params", "latency_ms", "train_device_seconds")


def metric_directions(tasks: TaskSet) -> dict[str, Direction]:
    """Every metric's name and direction for a job with these tasks, `task.<name>.<metric>` included."""
    own = {f"task.{task.name}.{task.metric}": task.direction for task in tasks}
    return {name: metric.direction for name, metric in METRICS.items()} | own


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """What every candidate of a job is measured against: single-task networks, mean of three seeds.

    Attributes:
        validation: Task name -> its metric on the validation split.
        test: Task name -> its metric on the test split.
        costs: Cost metric -> that of one whole set of single-task networks.
    """

    validation: Mapping[str, float]
    test: Mapping[str, float]
    costs: Mapping[str, float]


def combined_metrics(
    errors: Mapping[str, float], yardstick: Mapping[str, float], tasks: TaskSet
) -> dict[str, float]:
    """The metrics over all tasks that follow from each task's own on one split."""
    return {
        "delta_m": delta_m(errors, yardstick, tasks),
        "normalized_gain": normalized_gain(errors, yardstick, tasks),
        "total_error": total_error(errors, tasks),
    }


def task_metrics(errors: Mapping[str, float], tasks: TaskSet) -> dict[str, float]:
    """Each task's own metric under its full name, `task.<name>.<metric>`."""
    return {f"task.{task.name}.{task.metric}": errors[task.name] for task in tasks}
