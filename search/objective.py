"""The metrics that a trial yields, and which way each is better."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from coterie.models.metrics import HALF_TURN, METRIC_SCALES, delta_m, normalized_gain, total_error
from coterie.models.tasks import CLASSIFICATION, KIND_METRICS, Direction, TaskSet

TaskValues = Mapping[str, Mapping[str, float]]  # task -> metric -> value
SplitName = Literal["validation", "test"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that every completed trial has; `classification` ones only where some task classifies.

    `delta_m_own_width` only those have whose size was trained as single-task networks.
    """

    name: str
    title: str
    direction: Direction
    unit: str
    description: str
    classification: bool = False


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
            name="delta_m_own_width",
            title="Gain over single-task learning at the same width",
            direction=Direction.MAXIMIZE,
            unit="%",
            description="As delta_m, over single-task networks of the candidate's own backbone and sizes and "
            "the default recipe; null where no job has trained them, unless this one aims at it.",
        ),
        Metric(
            name="normalized_gain",
            title="Normalized gain",
            direction=Direction.MAXIMIZE,
            unit="%",
            description="As delta_m, on the error rates of classification tasks (DMTG's metric).",
            classification=True,
        ),
        Metric(
            name="total_error",
            title="Total error",
            direction=Direction.MINIMIZE,
            unit="%",
            description="Sum over the classification tasks of the error rate.",
            classification=True,
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
            name="peak_memory_mb",
            title="Peak memory",
            direction=Direction.MINIMIZE,
            unit="MiB",
            description="Most memory that the static network's tensors take at once while it runs on one "
            "input, weights included, on the trial's device.",
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

PLANNED = frozenset({"mean_rank"})
YARDSTICK_SEEDS = (0, 1, 2)

# Units of the tasks' own metrics; what is not here is in the unit of the task's target.
TASK_UNITS: Mapping[str, str] = {
    name: "degree" if scale == HALF_TURN else "1" for name, scale in METRIC_SCALES.items()
}


def metric_directions(tasks: TaskSet) -> dict[str, Direction]:
    """Every metric's name and direction for a job with these tasks, `task.<name>.<metric>` included."""
    classifies = any(task.kind in CLASSIFICATION for task in tasks)
    combined = {
        name: metric.direction for name, metric in METRICS.items() if classifies or not metric.classification
    }
    own = {
        f"task.{task.name}.{metric}": direction
        for task in tasks
        for metric, direction in KIND_METRICS[task.kind].items()
    }
    return combined | own


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """What every candidate of a job is measured against: single-task networks, mean of three seeds.

    Attributes:
        validation: Task -> each of its metrics on the validation split.
        test: The same on the test split.
        costs: Cost metric -> that of one whole set of single-task networks.
        own_width: `sizes_key` of a backbone and its sizes -> split -> what single-task networks of these
            sizes reach, where they are known.
    """

    validation: TaskValues
    test: TaskValues
    costs: Mapping[str, float]
    own_width: Mapping[str, Mapping[SplitName, TaskValues]] = field(default_factory=dict)

    def on(self, split: SplitName) -> TaskValues:
        """Give what gains on one split are measured against."""
        return self.validation if split == "validation" else self.test


def combined_metrics(values: TaskValues, yardstick: TaskValues, tasks: TaskSet) -> dict[str, float]:
    """The metrics over all tasks that follow from each task's own on one split.

    `delta_m` is over each task's judging metric; the others are over the classification tasks, where there
    are any.
    """

    def errors(found: TaskValues) -> dict[str, float]:
        return {task.name: found[task.name]["error"] for task in tasks if task.kind in CLASSIFICATION}

    combined = {"delta_m": _gain(values, yardstick, tasks)}
    if errors(values):
        combined["normalized_gain"] = normalized_gain(errors(values), errors(yardstick), tasks)
        combined["total_error"] = total_error(errors(values), tasks)
    return combined


def own_width_gain(
    values: TaskValues, yardstick: Yardstick, sizes: str, split: SplitName, tasks: TaskSet
) -> float | None:
    """`delta_m_own_width` on one split; None where no single-task networks of these sizes are known."""
    own = yardstick.own_width.get(sizes)
    return None if own is None else _gain(values, own[split], tasks)


def task_metrics(values: TaskValues) -> dict[str, float]:
    """Each task's own metrics under their full names, `task.<name>.<metric>`."""
    return {
        f"task.{task}.{metric}": value
        for task, metrics in values.items()
        for metric, value in metrics.items()
    }


def _gain(values: TaskValues, yardstick: TaskValues, tasks: TaskSet) -> float:
    def judging(found: TaskValues) -> dict[str, float]:
        return {task.name: found[task.name][task.metric] for task in tasks}

    return delta_m(judging(values), judging(yardstick), tasks)
