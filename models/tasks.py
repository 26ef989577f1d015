"""Tasks, task sets and groupings: the words that every other module speaks in."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self, overload

from coterie.models.checks import check_number


class TaskKind(StrEnum):
    """What a task predicts, which decides its head, loss and metric."""

    BINARY = "binary"
    MULTICLASS = "multiclass"
    REGRESSION = "regression"
    SEGMENTATION = "segmentation"
    DEPTH = "depth"
    NORMALS = "normals"
    DENSE_REGRESSION = "dense_regression"


class Direction(StrEnum):
    """Whether more or less of a metric is better."""

    MAXIMIZE = "maximize"
    MINIMIZE = "minimize"


_UP, _DOWN = Direction.MAXIMIZE, Direction.MINIMIZE

# The metrics of each kind, and which way they are better; the first judges a task unless it names another.
KIND_METRICS: Mapping[TaskKind, Mapping[str, Direction]] = {
    TaskKind.BINARY: {"error": _DOWN, "accuracy": _UP, "auc": _UP, "f1": _UP},
    TaskKind.MULTICLASS: {"error": _DOWN, "accuracy": _UP, "auc": _UP, "f1": _UP},
    TaskKind.REGRESSION: {"rmse": _DOWN, "mae": _DOWN},
    TaskKind.SEGMENTATION: {"miou": _UP, "pixel_accuracy": _UP},
    TaskKind.DEPTH: {"abs_error": _DOWN, "rel_error": _DOWN, "rmse": _DOWN},
    TaskKind.NORMALS: {
        "angle_mean": _DOWN,
        "angle_median": _DOWN,
        "within_11.25": _UP,
        "within_22.5": _UP,
        "within_30": _UP,
    },
    TaskKind.DENSE_REGRESSION: {"rmse": _DOWN, "mae": _DOWN},
}

# The losses of each kind; the first one is its default.
KIND_LOSSES: Mapping[TaskKind, tuple[str, ...]] = {
    TaskKind.BINARY: ("cross_entropy",),
    TaskKind.MULTICLASS: ("cross_entropy",),
    TaskKind.REGRESSION: ("mse", "l1"),
    TaskKind.SEGMENTATION: ("cross_entropy",),
    TaskKind.DEPTH: ("l1", "shifted_l1"),
    TaskKind.NORMALS: ("cosine", "l1", "shifted_l1"),
    TaskKind.DENSE_REGRESSION: ("l1", "mse"),
}

CLASSIFICATION = frozenset({TaskKind.BINARY, TaskKind.MULTICLASS})
DENSE = frozenset({TaskKind.SEGMENTATION, TaskKind.DEPTH, TaskKind.NORMALS, TaskKind.DENSE_REGRESSION})

# Least and greatest number of outputs of each kind.
_MOST_OUTPUTS = 65_536
_OUTPUTS: Mapping[TaskKind, tuple[int, int]] = {
    TaskKind.BINARY: (1, 1),
    TaskKind.MULTICLASS: (2, _MOST_OUTPUTS),
    TaskKind.REGRESSION: (1, _MOST_OUTPUTS),
    TaskKind.SEGMENTATION: (2, _MOST_OUTPUTS),
    TaskKind.DEPTH: (1, 1),
    TaskKind.NORMALS: (3, 3),
    TaskKind.DENSE_REGRESSION: (1, _MOST_OUTPUTS),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One supervised target on the shared input.

    Attributes:
        name: Unique in its task set.
        kind: Decides head, loss and metric.
        outputs: Numbers that its head gives a sample, or a place of a dense task's map: 1 for binary and
            depth, 3 for normals, the number of classes for multiclass and segmentation.
        metric: Name of the metric that judges it, one of `KIND_METRICS`; the kind's first by default.
        loss: Name of its loss, one of `KIND_LOSSES`; the kind's first by default.
        weight: Factor of its loss in the sum over tasks, above 0.

    Raises:
        ValueError: If a value breaks its rule.
    """

    name: str
    kind: TaskKind
    outputs: int = 1
    metric: str = ""
    loss: str = ""
    weight: float = 1.0

    def __post_init__(self) -> None:
        for field, text in (("name", self.name), ("metric", self.metric), ("loss", self.loss)):
            if not isinstance(text, str):
                raise ValueError(f"{field}: must be a string, found {text!r}")
        if not self.name:
            raise ValueError("name: must not be empty")
        if not isinstance(self.kind, TaskKind):
            raise ValueError(f"kind: must be a TaskKind, found {self.kind!r}")
        least, most = _OUTPUTS[self.kind]
        if type(self.outputs) is not int or not least <= self.outputs <= most:
            rule = f"{least}" if least == most else f"from {least} to {most}"
            raise ValueError(f"outputs: of a {self.kind.value} task must be {rule}, found {self.outputs!r}")
        metrics, losses = KIND_METRICS[self.kind], KIND_LOSSES[self.kind]
        object.__setattr__(self, "metric", self.metric or next(iter(metrics)))
        object.__setattr__(self, "loss", self.loss or losses[0])
        if self.metric not in metrics:
            raise ValueError(
                f"metric: of a {self.kind.value} task must be one of {list(metrics)}, found {self.metric!r}"
            )
        if self.loss not in losses:
            raise ValueError(
                f"loss: of a {self.kind.value} task must be one of {list(losses)}, found {self.loss!r}"
            )
        check_number("weight", self.weight, 0, above=True)

    @property
    def direction(self) -> Direction:
        """Which way its metric is better."""
        return KIND_METRICS[self.kind][self.metric]


class TaskSet(Sequence[Task]):
    """The tasks of one job, in order, with unique names.

    Raises:
        ValueError: If there is no task, or two of them share a name.
    """

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._tasks = tuple(tasks)
        if not self._tasks:
            raise ValueError("tasks: at least one is needed, found none")
        names = [task.name for task in self._tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"tasks: names must be unique, found {names}")

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Task]: ...
    def __getitem__(self, index: int | slice) -> Task | Sequence[Task]:
        return self._tasks[index]

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TaskSet) and self._tasks == other._tasks

    def __hash__(self) -> int:
        return hash(self._tasks)

    def __repr__(self) -> str:
        return f"TaskSet({', '.join(self.names)})"

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks' names, in order."""
        return tuple(task.name for task in self._tasks)


@dataclass(frozen=True, slots=True)
class Grouping:
    """A partition of task indices, in canonical form.

    Canonical: indices rise within a group, and groups are sorted by their smallest index, so that equal
    partitions are equal objects.

    Raises:
        ValueError: If the groups are not a partition of 0..T-1.

    Example:
        >>> Grouping(((2, 1), (0,))).groups
        ((0,), (1, 2))
    """

    groups: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        members = sorted(index for group in self.groups for index in group)
        if not members or members != list(range(len(members))) or not all(self.groups):
            raise ValueError(
                f"grouping: must be a partition of 0..T-1 without empty groups, found {self.groups}"
            )
        object.__setattr__(self, "groups", tuple(sorted(tuple(sorted(group)) for group in self.groups)))

    @classmethod
    def from_labels(cls, labels: Sequence[int]) -> Self:
        """Group the tasks that carry the same label; `labels` holds one a task."""
        by_label: dict[int, list[int]] = {}
        for index, label in enumerate(labels):
            by_label.setdefault(label, []).append(index)
        return cls(tuple(tuple(group) for group in by_label.values()))

    @classmethod
    def from_names(cls, groups: Sequence[Sequence[str]], tasks: TaskSet) -> Self:
        """Read groups of task names, a list (or tuple) of such.

        Raises:
            ValueError: If they are something else, a name is unknown, or the groups are not a partition of
                `tasks`.
        """
        if not isinstance(groups, list | tuple) or not all(
            isinstance(group, list | tuple) and group and all(isinstance(name, str) for name in group)
            for group in groups
        ):
            raise ValueError(
                f"grouping: must be a list of lists of task names, none of them empty, found {groups!r}"
            )
        index = {name: i for i, name in enumerate(tasks.names)}
        unknown = [name for group in groups for name in group if name not in index]
        if unknown:
            raise ValueError(f"grouping: unknown tasks {unknown}; the job's tasks are {list(tasks.names)}")
        if sorted(name for group in groups for name in group) != sorted(tasks.names):
            raise ValueError(
                f"grouping: each of {list(tasks.names)} must be in exactly one group, found {groups}"
            )
        return cls(tuple(tuple(index[name] for name in group) for group in groups))

    @classmethod
    def together(cls, tasks: int) -> Self:
        """All tasks in one group."""
        return cls((tuple(range(tasks)),))

    @classmethod
    def apart(cls, tasks: int) -> Self:
        """Each task in a group of its own."""
        return cls(tuple((index,) for index in range(tasks)))

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def labels(self) -> tuple[int, ...]:
        """The group of each task: a restricted growth string, the canonical name of the partition."""
        label = {index: number for number, group in enumerate(self.groups) for index in group}
        return tuple(label[index] for index in range(len(label)))

    def names(self, tasks: TaskSet) -> list[list[str]]:
        """The groups as lists of task names."""
        return [[tasks[index].name for index in group] for group in self.groups]
