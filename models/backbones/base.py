"""What every backbone offers: an ordered list of units that a family can split, copy or gate."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

from torch import nn

# Far above any useful network: they keep a damaged architecture file from asking for an endless one.
MAX_WIDTH = 65_536
MAX_DEPTH = 1_024
MAX_INPUT_VALUES = 2**28


@dataclass(frozen=True, kw_only=True)
class Backbone(ABC):
    """The configuration of a feature extractor: a chain of units, each reading the one before.

    A unit (stem, block, layer) is the smallest piece that families share, copy or gate, and has at least one
    parameter. The last unit gives `features` numbers a sample, which the heads read.

    Attributes:
        input_shape: One sample's shape, without the batch.
        width: Size of a unit, in neurons or channels.
        depth: How many of them; what is counted is the backbone's own.
        name: Its key in `BACKBONES`.
        default_width: Width of the yardstick that candidates are measured against.
        default_depth: Depth of the yardstick.
        widths: Sensible widths to search.
        depths: Sensible depths to search.

    Raises:
        ValueError: If a size is not a whole number in its bounds.
    """

    name: ClassVar[str]
    default_width: ClassVar[int]
    default_depth: ClassVar[int]
    widths: ClassVar[tuple[int, ...]]
    depths: ClassVar[tuple[int, ...]]

    input_shape: tuple[int, ...]
    width: int
    depth: int

    def __post_init__(self) -> None:
        if not _is_shape(self.input_shape) or math.prod(self.input_shape) > MAX_INPUT_VALUES:
            raise ValueError(
                "input_shape: must be a tuple of whole numbers from 1 with a product of at most "
                f"{MAX_INPUT_VALUES}, found {self.input_shape!r}"
            )
        for parameter, value, limit in (("width", self.width, MAX_WIDTH), ("depth", self.depth, MAX_DEPTH)):
            if type(value) is not int or not 1 <= value <= limit:
                raise ValueError(f"{parameter}: must be a whole number from 1 to {limit}, found {value!r}")

    @property
    @abstractmethod
    def units(self) -> int:
        """How many units `build` gives."""

    @property
    @abstractmethod
    def features(self) -> int:
        """Numbers a sample that the last unit gives and a head reads."""

    @abstractmethod
    def build(self) -> nn.ModuleList:
        """Build fresh units, in order: [B, *input_shape] -> ... -> [B, features].

        The weights are drawn from torch's global generator; the caller seeds it.
        """

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values, `from_dict`'s inverse."""
        return {"name": self.name, **asdict(self), "input_shape": list(self.input_shape)}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """Read what `to_dict` gave.

        Raises:
            ValueError: If it is another backbone's, a key is missing or unknown, or a size is out of bounds.
        """
        expected = {"name", *(field.name for field in fields(cls))}
        if set(document) != expected or document["name"] != cls.name:
            raise ValueError(
                f"backbone: must be {cls.name!r} with the keys {sorted(expected)}, found {document!r}"
            )
        values = {key: value for key, value in document.items() if key != "name"}
        if isinstance(values["input_shape"], list):
            values["input_shape"] = tuple(values["input_shape"])
        return cls(**values)


def _is_shape(value: object) -> bool:
    return isinstance(value, tuple) and bool(value) and all(type(size) is int and size >= 1 for size in value)
