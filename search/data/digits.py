"""Overlaid digits: six binary questions about two handwritten digits in one image.

Real images (the digits of scikit-learn, which come with it), so nothing is downloaded. Three tasks ask about
the left digit and three about the right one, so which tasks belong together is known.
"""

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from sklearn.datasets import load_digits

from coterie.models.tasks import Task, TaskKind, TaskSet
from coterie.search.data.base import Dataset, Split

SIDE = 12
DIGIT_SIDE = 8
SHARES = (0.6, 0.2, 0.2)  # training, validation, test: of the samples and of the source images alike
WITH_LOOP = (0, 6, 8, 9)
GREATEST_PIXEL = 16.0  # of scikit-learn's digits


class DigitsOptions(BaseModel):
    """Options of the source `digits`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    samples: int = Field(default=4000, ge=50, le=100_000, description="Images over all three splits.")
    seed: int = Field(default=0, ge=0, le=2**53 - 1, description="Fixes the splits and the pairs of digits.")


class Digits:
    """Two digits on 12×12 pixels, one at the top left and one at the bottom right, pixelwise maximum."""

    name: ClassVar[str] = "digits"
    title: ClassVar[str] = "Overlaid digits"
    description: ClassVar[str] = (
        "Two of scikit-learn's handwritten digits overlaid on 12×12 pixels; for each of them: is it odd, "
        "is it 5 or more, has it a closed loop? No image stands in two splits."
    )
    options: ClassVar[type[BaseModel]] = DigitsOptions
    backbone: ClassVar[str] = "mlp"

    @classmethod
    def tasks(cls) -> TaskSet:
        """Six binary tasks, left digit first."""
        return TaskSet(
            Task(name=f"{side}_{question}", kind=TaskKind.BINARY)
            for side in ("left", "right")
            for question in ("parity", "large", "loop")
        )

    @classmethod
    def shape(cls) -> tuple[int, ...]:
        """12×12 pixels."""
        return (SIDE, SIDE)

    @classmethod
    def load(cls, options: DigitsOptions) -> Dataset:
        """Draw the pairs: each split from source images of its own, pixels in [0, 1]."""
        digits = load_digits()
        images = (digits.images / GREATEST_PIXEL).astype(np.float32)
        rng = np.random.default_rng(options.seed)
        sources = _cut(rng.permutation(len(images)))
        sizes = [len(part) for part in _cut(np.arange(options.samples))]
        train, validation, test = (
            _overlay(images, digits.target, source, size, rng)
            for source, size in zip(sources, sizes, strict=True)
        )
        return Dataset(
            train=train,
            validation=validation,
            test=test,
            tasks=cls.tasks(),
            mean=float(train.inputs.mean()),
            std=float(train.inputs.std()),
        )


def _cut(items: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    ends = np.round(np.cumsum(SHARES[:-1]) * len(items)).astype(int)
    return np.split(items, ends)


def _overlay(
    images: NDArray[np.float32],
    digits: NDArray[np.int64],
    source: NDArray[np.int64],
    size: int,
    rng: np.random.Generator,
) -> Split:
    left, right = rng.choice(source, size=(2, size))
    inputs = np.zeros((size, SIDE, SIDE), dtype=np.float32)
    inputs[:, :DIGIT_SIDE, :DIGIT_SIDE] = images[left]
    corner = inputs[:, -DIGIT_SIDE:, -DIGIT_SIDE:]
    np.maximum(corner, images[right], out=corner)
    targets = {}
    for side, chosen in (("left", digits[left]), ("right", digits[right])):
        targets[f"{side}_parity"] = (chosen % 2).astype(np.float32)
        targets[f"{side}_large"] = (chosen >= 5).astype(np.float32)
        targets[f"{side}_loop"] = np.isin(chosen, WITH_LOOP).astype(np.float32)
    return Split(inputs=inputs, targets=targets)
