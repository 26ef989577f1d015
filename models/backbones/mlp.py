"""The multilayer perceptron, for tabular and other small inputs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from coterie.models.backbones.base import Backbone, Feature, Site, Unit
from coterie.models.graph import INPUT, Node, node

MAX_WIDTH = 65_536
MAX_DEPTH = 1_024


@dataclass(frozen=True, kw_only=True)
class MLP(Backbone):
    """`depth` units of Linear and ReLU, each `width` neurons wide; the first one flattens its input.

    Example:
        >>> MLP(input_shape=(2, 8, 8), width=24, depth=2).feature_shape("vector")
        (24,)
    """

    name: ClassVar[str] = "mlp"
    choices: ClassVar[Mapping[str, tuple[int | float, ...]]] = {
        "width": (8, 12, 16, 24, 32, 48, 64, 96),
        "depth": (1, 2, 3),
    }
    defaults: ClassVar[Mapping[str, int | float]] = {"width": 24, "depth": 2}

    width: int
    depth: int

    def check(self) -> None:
        """Check width and depth."""
        for parameter, value, limit in (("width", self.width, MAX_WIDTH), ("depth", self.depth, MAX_DEPTH)):
            if type(value) is not int or not 1 <= value <= limit:
                raise ValueError(f"{parameter}: must be a whole number from 1 to {limit}, found {value!r}")

    def plan(self) -> Sequence[Unit]:
        """One unit a hidden layer."""
        units = []
        for layer in range(self.depth):
            inputs = math.prod(self.input_shape) if layer == 0 else self.width
            start = (node("flatten", "flatten", INPUT),) if layer == 0 else ()
            source = "flatten" if layer == 0 else INPUT
            linear = node(f"linear{layer + 1}", "linear", source, inputs=inputs, outputs=self.width)
            relu = node(f"relu{layer + 1}", "relu", linear.name)
            units.append(Unit((*start, linear, relu), (Site(relu.name, self.width),)))
        return units

    def neck(self, feature: Feature) -> Sequence[Node]:
        """A head reads the last hidden layer."""
        if feature == "map":
            raise ValueError("backbone: 'mlp' gives a vector, so it can't feed a dense task's decoder")
        return ()
