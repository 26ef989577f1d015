"""What a data set is to a search: splits of inputs and targets, tasks, and a fingerprint."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from coterie.models.tasks import TaskSet


@dataclass(frozen=True, kw_only=True)
class Split:
    """Samples and their labels.

    Attributes:
        inputs: Raw inputs, float32, shape [samples, *input_shape].
        targets: Task name -> labels, shape [samples]; 0 or 1 as float32 for a binary task.
    """

    inputs: NDArray[np.float32]
    targets: Mapping[str, NDArray[np.float32]]

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
        mean: Of the training inputs: what networks are fed is (input - mean) / std.
        std: Of the training inputs.
    """

    train: Split
    validation: Split
    test: Split
    tasks: TaskSet
    mean: float
    std: float

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
        """The shape of one input, without loading the data."""

    @classmethod
    def load(cls, options: Any) -> Dataset:
        """Build the data set from validated `options`: the same options give the same data."""


def fingerprint(source: type[Source], options: BaseModel) -> str:
    """Name of the data that `source` makes of `options`: references are shared under it."""
    canonical = json.dumps([source.name, options.model_dump(mode="json")], sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
