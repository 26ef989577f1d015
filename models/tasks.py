"""Tasks, task sets and groupings: the words that every other module speaks in."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self, overload


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One supervised target on the shared input.

    Attributes:
        name: Unique in its task set.
        kind: Decides head, loss and metric.
        outputs: Numbers that its head gives a sample (1 logit for a binary task).
        metric: Name of the metric that judges it; `error` is the share of wrong answers, in [0, 1].
        direction: Which way the metric is better.
        weight: Factor of its loss in the sum over tasks, above 0.

    Raises:
        ValueError: If a value breaks its rule.
    """

    name: str
    kind: TaskKind
    outputs: int = 1
    metric: str = "error"
    direction: Direction = Direction.MINIMIZE
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name: must not be empty")
        if self.outputs < 1 or (self.kind is TaskKind.BINARY and self.outputs != 1):
            raise ValueError(f"outputs: must be at least 1, and 1 for a binary task, found {self.outputs}")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight: must be a finite number above 0, found {self.weight}")


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
    def from_names(cls, groups: Iterable[Iterable[str]], tasks: TaskSet) -> Self:
        """Read groups of task names.

        Raises:
            ValueError: If a name is unknown, or the groups are not a partition of `tasks`.
        """
        index = {name: i for i, name in enumerate(tasks.names)}
        named = [list(group) for group in groups]
        unknown = [name for group in named for name in group if name not in index]
        if unknown:
            raise ValueError(f"grouping: unknown tasks {unknown}; the job's tasks are {list(tasks.names)}")
        if sorted(name for group in named for name in group) != sorted(tasks.names):
            raise ValueError(
                f"grouping: each of {list(tasks.names)} must be in exactly one group, found {named}"
            )
        return cls(tuple(tuple(index[name] for name in group) for group in named))

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
