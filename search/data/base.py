"""What a data set is to a search: splits of inputs and targets, tasks, and a fingerprint."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from coterie.models.tasks import DENSE, Task, TaskKind, TaskSet

CLASSES = frozenset({TaskKind.MULTICLASS, TaskKind.SEGMENTATION})


class DataError(ValueError):
    """A source's data are not what its tasks say; the message names the split, the task and the rule."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Samples and their labels.

    Attributes:
        inputs: Raw inputs, float32, shape [samples, *input_shape].
        targets: Task name -> labels, whole numbers (int64) for classes and floats (float32) for the rest, by
            kind: binary [samples], 0 or 1; multiclass [samples]; regression [samples], or
            [samples, outputs] of more than one; segmentation and depth [samples, height, width]; normals
            [samples, 3, height, width]; dense_regression as regression with [height, width] behind. A missing
            label is NaN, or a negative number among whole ones.
    """

    inputs: NDArray[np.float32]
    targets: Mapping[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Three splits, of which the last is reported and never used to choose.

    Attributes:
        train: Trained on.
        validation: Candidates are chosen on it.
        test: Reported only.
        tasks: All tasks of the source.
        mean: Of the training inputs, one for all or one for each channel (a sample's first axis): networks
            are fed (input - mean) / std.
        std: Of the training inputs, likewise.

    Raises:
        DataError: If inputs or labels are not as described, or a task has no label in a split.
    """

    train: Split
    validation: Split
    test: Split
    tasks: TaskSet
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test"):
            split: Split = getattr(self, name)
            _check_inputs(split.inputs, self.train.inputs.shape[1:], name)
            for task in self.tasks:
                place = f"{name}.targets.{task.name}"
                if task.name not in split.targets:
                    raise DataError(f"{place}: must be there, found {sorted(split.targets)}")
                _check_labels(split.targets[task.name], task, split.inputs.shape, place)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train.inputs.shape[1:])


class Source(Protocol):
    """A registered kind of data: entry points of the group `coterie.datasets` name classes of this form."""

    name: ClassVar[str]
    title: ClassVar[str]
    description: ClassVar[str]
    options: ClassVar[type[BaseModel]]
    backbone: ClassVar[str]

    @classmethod
    def tasks(cls) -> TaskSet:
        """The tasks, without loading the data."""

    @classmethod
    def shape(cls) -> tuple[int, ...]:
        """The shape of one input, without loading the data.

        An image is (height, width) or (channels, height, width).
        """

    @classmethod
    def load(cls, options: Any) -> Dataset:
        """Build the data set from validated `options`: the same options give the same data."""


def fingerprint(source: type[Source], options: BaseModel) -> str:
    """Name of the data that `source` makes of `options`: references are shared under it."""
    canonical = json.dumps([source.name, options.model_dump(mode="json")], sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _check_inputs(inputs: NDArray[Any], shape: tuple[int, ...], split: str) -> None:
    if inputs.dtype != np.float32 or inputs.ndim < 2 or inputs.shape[1:] != shape or len(inputs) == 0:
        raise DataError(
            f"{split}.inputs: must be float32 [samples, *{list(shape)}] with a sample or more, "
            f"found {inputs.dtype} {list(inputs.shape)}"
        )
    if not np.isfinite(inputs).all():
        raise DataError(f"{split}.inputs: must be finite")


def _check_labels(labels: NDArray[Any], task: Task, inputs_shape: tuple[int, ...], place: str) -> None:
    """Check shape, type and range of a task's labels, and that there is one."""
    shape = _label_shape(task, inputs_shape)
    if labels.shape != shape:
        raise DataError(f"{place}: must have the shape {list(shape)}, found {list(labels.shape)}")
    whole = np.issubdtype(labels.dtype, np.integer)
    if task.kind in CLASSES:
        if not whole:
            raise DataError(f"{place}: must be whole numbers, found {labels.dtype}")
        present = labels[labels >= 0]
        allowed, wrong = f"from 0 to {task.outputs - 1}, or negative", present[present >= task.outputs]
    elif task.kind is TaskKind.BINARY:
        present = labels[labels >= 0] if whole else labels[~np.isnan(labels)]
        allowed, wrong = "0 or 1, or missing", present[(present != 0) & (present != 1)]
    else:
        if labels.dtype != np.float32:
            raise DataError(f"{place}: must be float32, found {labels.dtype}")
        present = labels[~np.isnan(labels)]
        allowed, wrong = "finite, or NaN", present[~np.isfinite(present)]
    if len(wrong):
        raise DataError(f"{place}: must be {allowed}, found {wrong[0]}")
    if not len(present):
        raise DataError(f"{place}: must have a label or more, found none")


def _label_shape(task: Task, inputs_shape: tuple[int, ...]) -> tuple[int, ...]:
    samples, places = inputs_shape[0], inputs_shape[-2:] if task.kind in DENSE else ()
    several = task.outputs > 1 and task.kind not in CLASSES
    return (samples, task.outputs, *places) if several else (samples, *places)
