"""What every backbone offers: an ordered list of units that a family can split, copy or gate."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar, Literal, Self

from torch import nn

from coterie.models.graph import INPUT, Chain, Node, infer_shapes, node

# Far above any useful network: they keep a damaged file from asking for an endless one.
MAX_INPUT_VALUES = 2**28
MAX_WIDTH_FACTOR = 64

# What a head reads: one vector a sample, or a map of places.
Feature = Literal["vector", "map"]


@dataclass(frozen=True, slots=True)
class Site:
    """Where a unit can be gated between a shared branch and a task's own (InterroGate).

    Attributes:
        node: The node whose value is gated.
        gates: Number of gates.
        block: Channels that one gate switches together, 1 but for attention, whose heads are switched whole.
    """

    node: str
    gates: int
    block: int = 1


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of a backbone: the smallest that families share, copy or split at. It has learned weights.

    Attributes:
        nodes: Its layers; the first reads `INPUT`, the last one is the unit's output. Names are unique in the
            whole backbone, and those of the published network where there is one.
        sites: Where it can be gated, in order.
    """

    nodes: tuple[Node, ...]
    sites: tuple[Site, ...]


@dataclass(frozen=True, kw_only=True)
class Backbone(ABC):
    """The configuration of a feature extractor: a chain of units, each reading the one before.

    Attributes:
        input_shape: One sample's shape, without the batch.
        name: Its key in `BACKBONES`.
        choices: For each size that a search may vary, by its name: sensible values.
        defaults: The size of the yardstick that candidates are measured against.

    Raises:
        ValueError: If a size is out of its bounds or does not go with the input; nothing is allocated.
    """

    name: ClassVar[str]
    choices: ClassVar[Mapping[str, tuple[int | float, ...]]]
    defaults: ClassVar[Mapping[str, int | float]]

    input_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not _is_shape(self.input_shape) or math.prod(self.input_shape) > MAX_INPUT_VALUES:
            raise ValueError(
                "input_shape: must be a tuple of whole numbers from 1 with a product of at most "
                f"{MAX_INPUT_VALUES}, found {self.input_shape!r}"
            )
        self.check()
        _plan(self)  # a width that leaves no channel is seen now, not by whoever builds

    @abstractmethod
    def check(self) -> None:
        """Raise ValueError where a size is out of its bounds or the input does not go with it."""

    @abstractmethod
    def plan(self) -> Sequence[Unit]:
        """Describe the units, in order."""

    @abstractmethod
    def neck(self, feature: Feature) -> Sequence[Node]:
        """Give the layers, without weights, that turn the last unit's output into what a head reads.

        Raises:
            ValueError: If the backbone does not offer it.
        """

    def initialise(self, units: nn.ModuleList) -> None:  # noqa: B027 - torch's own start is a start
        """Draw fresh weights where torch's own start is not the published one."""

    @property
    def units(self) -> int:
        """How many units there are."""
        return len(_plan(self))

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every place that can be gated, in order."""
        return tuple(site for unit in _plan(self) for site in unit.sites)

    def feature_shape(self, feature: Feature) -> tuple[int, ...]:
        """Shape of what a head reads: (D,) of a vector, (C, H, W) of a map.

        Raises:
            ValueError: If the backbone does not offer it.
        """
        return _feature_shape(self, feature)

    @property
    def output_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each unit's output, without the batch."""
        return _output_shapes(self)

    def build(self) -> nn.ModuleList:
        """Build fresh units, in order, each a `Chain`: [B, *input_shape] -> ... -> the last unit's output.

        The weights are drawn from torch's global generator; the caller seeds it.
        """
        units = nn.ModuleList(Chain(unit.nodes) for unit in _plan(self))
        self.initialise(units)
        return units

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


@dataclass(frozen=True, kw_only=True)
class ImageBackbone(Backbone):
    """A backbone for images [channels, height, width], or [height, width] for one channel.

    Attributes:
        width: Factor of the published network's channels; the product is rounded.
        least_side: The smallest height and width of an input.
    """

    least_side: ClassVar[int]

    width: float = 1.0

    def check(self) -> None:
        """Check width and input."""
        if type(self.width) not in {int, float} or not 0 < self.width <= MAX_WIDTH_FACTOR:
            raise ValueError(
                f"width: must be a number above 0 and at most {MAX_WIDTH_FACTOR}, found {self.width!r}"
            )
        if len(self.input_shape) not in {2, 3} or min(self.input_shape[-2:]) < self.least_side:
            raise ValueError(
                f"input_shape: of {self.name!r} must be (height, width) or (channels, height, width) "
                f"with sides of at least {self.least_side}, found {self.input_shape!r}"
            )

    def channels(self, published: int) -> int:
        """Channels of a layer that has `published` of them at width 1.

        Raises:
            ValueError: If none is left.
        """
        channels = round(published * self.width)
        if channels < 1:
            raise ValueError(
                f"width: must leave a channel of {published}, so be more than {0.5 / published:g}, "
                f"found {self.width!r}"
            )
        return channels

    def _as_image(self) -> tuple[tuple[Node, ...], str, int]:
        """The nodes that give an image its channel axis, the name of their output, and its channels."""
        if len(self.input_shape) == 2:
            return (node("image", "image", INPUT),), "image", 1
        return (), INPUT, self.input_shape[0]


@lru_cache(maxsize=256)
def _plan(backbone: Backbone) -> tuple[Unit, ...]:
    return tuple(backbone.plan())


@lru_cache(maxsize=256)
def _output_shapes(backbone: Backbone) -> tuple[tuple[int, ...], ...]:
    shapes: list[tuple[int, ...]] = []
    shape = backbone.input_shape
    for unit in _plan(backbone):
        shape = infer_shapes(unit.nodes, shape)[unit.nodes[-1].name]
        shapes.append(shape)
    return tuple(shapes)


@lru_cache(maxsize=256)
def _feature_shape(backbone: Backbone, feature: Feature) -> tuple[int, ...]:
    neck = backbone.neck(feature)
    shape = _output_shapes(backbone)[-1]
    return infer_shapes(neck, shape)[neck[-1].name] if neck else shape


def _is_shape(value: object) -> bool:
    return isinstance(value, tuple) and bool(value) and all(type(size) is int and size >= 1 for size in value)
