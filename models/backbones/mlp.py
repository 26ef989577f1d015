"""The multilayer perceptron, for tabular and other small inputs."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from coterie.models.backbones.base import Backbone


@dataclass(frozen=True, kw_only=True)
class MLP(Backbone):
    """`depth` units of Linear and ReLU, each `width` neurons wide; the first one flattens its input.

    Example:
        >>> MLP(input_shape=(2, 8, 8), width=24, depth=2).features
        24
    """

    name: ClassVar[str] = "mlp"
    default_width: ClassVar[int] = 24
    default_depth: ClassVar[int] = 2
    widths: ClassVar[tuple[int, ...]] = (8, 12, 16, 24, 32, 48, 64, 96)
    depths: ClassVar[tuple[int, ...]] = (1, 2, 3)

    @property
    def units(self) -> int:
        """One a hidden layer."""
        return self.depth

    @property
    def features(self) -> int:
        """The last hidden layer's width."""
        return self.width

    def build(self) -> nn.ModuleList:
        """Build fresh units: [B, *input_shape] -> [B, width] -> ... -> [B, width]."""
        stem = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(self.input_shape), self.width), nn.ReLU())
        hidden = (nn.Sequential(nn.Linear(self.width, self.width), nn.ReLU()) for _ in range(self.depth - 1))
        return nn.ModuleList([stem, *hidden])
