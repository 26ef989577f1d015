"""A negative control: tasks that neither help nor hurt each other, drawn.

Every label is the throw of a coin. So whatever a network has learned, from whichever tasks and at whatever
width, its expected error is the same half, while what it reaches on a split differs from seed to seed: what a
search finds here is noise, and all of it.
"""

from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from coterie.models.tasks import Task, TaskKind, TaskSet
from coterie.search.data.base import Dataset, Split

TASKS = ("first", "second", "third", "fourth")
INPUTS = 12
SIZES = (500, 2000, 500)  # training, validation, test; a seed moves delta_m by about 0.7 percent points


class ControlOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    seed: int = Field(default=0, ge=0)


class Control:
    """Tasks that don't care about each other."""

    name: ClassVar[str] = "control"
    title: ClassVar[str] = "Negative control"
    description: ClassVar[str] = "Tasks that neither help nor hurt each other."
    options: ClassVar[type[BaseModel]] = ControlOptions
    backbone: ClassVar[str] = "mlp"

    @classmethod
    def tasks(cls) -> TaskSet:
        return TaskSet(Task(name=name, kind=TaskKind.BINARY) for name in TASKS)

    @classmethod
    def shape(cls) -> tuple[int, ...]:
        return (INPUTS,)

    @classmethod
    def load(cls, options: ControlOptions) -> Dataset:
        rng = np.random.default_rng(options.seed)
        train, validation, test = (_split(size, rng) for size in SIZES)
        return Dataset(train=train, validation=validation, test=test, tasks=cls.tasks(), mean=0.0, std=1.0)


def _split(size: int, rng: np.random.Generator) -> Split:
    targets: dict[str, Any] = {name: rng.integers(2, size=size).astype(np.float32) for name in TASKS}
    return Split(inputs=rng.normal(size=(size, INPUTS)).astype(np.float32), targets=targets)
