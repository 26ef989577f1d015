"""A small source of dense tasks with missing labels, drawn."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from coterie.models.tasks import Task, TaskKind, TaskSet
from coterie.search.data.base import Dataset, Split

SIDE = 16
BACKGROUND, SQUARE, DISK = range(3)
FAR = 4.0


class ShapesOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Shapes:
    """A square and a ball before a wall: what is where, how far, facing whither; is the ball on the left?"""

    name: ClassVar[str] = "shapes"
    title: ClassVar[str] = "Shapes"
    description: ClassVar[str] = "A square and a ball before a wall."
    options: ClassVar[type[BaseModel]] = ShapesOptions
    backbone: ClassVar[str] = "cnn"
    # 33: with batches of 32 a single sample is left over
    sizes: ClassVar[Mapping[str, int]] = {"train": 33, "validation": 12, "test": 12}

    @classmethod
    def tasks(cls) -> TaskSet:
        return TaskSet(
            [
                Task(name="segmentation", kind=TaskKind.SEGMENTATION, outputs=3),
                Task(name="depth", kind=TaskKind.DEPTH),
                Task(name="normals", kind=TaskKind.NORMALS, outputs=3),
                Task(name="left", kind=TaskKind.BINARY),
            ]
        )

    @classmethod
    def shape(cls) -> tuple[int, ...]:
        return (3, SIDE, SIDE)

    @classmethod
    def load(cls, options: ShapesOptions) -> Dataset:
        rng = np.random.default_rng(0)
        splits = {name: cls._split(size, rng) for name, size in cls.sizes.items()}
        inputs = splits["train"].inputs
        return Dataset(
            **splits,
            tasks=cls.tasks(),
            mean=tuple(map(float, inputs.mean(axis=(0, 2, 3)))),
            std=tuple(map(float, inputs.std(axis=(0, 2, 3)))),
        )

    @classmethod
    def _split(cls, size: int, rng: np.random.Generator) -> Split:
        scenes = [cls._scene(rng) for _ in range(size)]
        targets = {name: np.stack([scene[1][name] for scene in scenes]) for name in cls.tasks().names}
        targets["segmentation"][:, 0] = -1  # nobody labelled the uppermost row
        targets["depth"][rng.random(targets["depth"].shape) < 0.1] = np.nan  # nor what reflects
        targets["normals"][:: size // 2] = np.nan  # nor some images at all
        return Split(inputs=np.stack([scene[0] for scene in scenes]), targets=targets)

    @classmethod
    def _scene(cls, rng: np.random.Generator) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
        rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float32)
        left = bool(rng.integers(2))
        squares_column, balls_column = (9, 4) if left else (1, 11)
        top, centre = rng.integers(1, SIDE - 7), rng.integers(4, SIDE - 4)
        square = (
            (rows >= top) & (rows < top + 6) & (columns >= squares_column) & (columns < squares_column + 6)
        )
        across, down = (columns - balls_column) / 4, (rows - centre) / 4
        height = np.sqrt(np.clip(1 - across**2 - down**2, 0, None))
        ball = height > 0
        classes = np.select([ball, square], [DISK, SQUARE], BACKGROUND).astype(np.int64)
        depth = np.select([ball, square], [FAR - 1 - height, FAR - 2], FAR).astype(np.float32)
        normals = np.zeros((3, SIDE, SIDE), dtype=np.float32)
        normals[2] = 1
        normals[:, ball] = np.stack([across, down, height])[:, ball]
        image = np.stack([classes == SQUARE, classes == DISK, depth / FAR]).astype(np.float32)
        image += rng.normal(0, 0.1, image.shape).astype(np.float32)
        labels = {
            "segmentation": classes,
            "depth": depth,
            "normals": normals,
            "left": np.float32(left),
        }
        return image, labels
