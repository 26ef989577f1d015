"""The small convolutional network of DMTG's CelebA recipe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from coterie.models.backbones.base import Feature, ImageBackbone, Site, Unit
from coterie.models.graph import INPUT, Node, node

CHANNELS = 64


@dataclass(frozen=True, kw_only=True)
class CNN(ImageBackbone):
    """conv3x3-64, max pooling 3/2, one residual block, average pooling 2 (DMTG, arXiv 2407.05082, CelebA).

    Two units. On 64x64 images a head reads 14,400 numbers. Xavier start as in the recipe; the heads, which
    are not the backbone's, start as torch's linear layers do.

    Example:
        >>> CNN(input_shape=(3, 64, 64)).feature_shape("vector")
        (14400,)
    """

    name: ClassVar[str] = "cnn"
    choices: ClassVar[Mapping[str, tuple[int | float, ...]]] = {"width": (0.125, 0.25, 0.5, 1.0)}
    defaults: ClassVar[Mapping[str, int | float]] = {"width": 0.25}
    least_side: ClassVar[int] = 5  # so that the average pooling has two places to pool

    def plan(self) -> Sequence[Unit]:
        """The stem, and the block."""
        start, source, channels_in = self._as_image()
        channels = self.channels(CHANNELS)
        stem = (
            *start,
            node("conv1", "conv", source, inputs=channels_in, outputs=channels, kernel=3, padding=1),
            node("bn1", "batch_norm", "conv1", channels=channels),
            node("relu1", "relu", "bn1"),
            node("pool1", "max_pool", "relu1", kernel=3, stride=2),
        )
        block = (
            node("block.conv1", "conv", INPUT, inputs=channels, outputs=channels, kernel=3, padding=1),
            node("block.bn1", "batch_norm", "block.conv1", channels=channels),
            node("block.relu1", "relu", "block.bn1"),
            node(
                "block.conv2", "conv", "block.relu1", inputs=channels, outputs=channels, kernel=3, padding=1
            ),
            node("block.bn2", "batch_norm", "block.conv2", channels=channels),
            node("block.add", "add", "block.bn2", INPUT),
            node("block.relu2", "relu", "block.add"),
            node("pool2", "avg_pool", "block.relu2", kernel=2, stride=2),
        )
        return (
            Unit(stem, (Site("pool1", channels),)),
            Unit(block, (Site("block.relu1", channels), Site("pool2", channels))),
        )

    def neck(self, feature: Feature) -> Sequence[Node]:
        """A linear head reads the flattened map."""
        return (node("flatten", "flatten", INPUT),) if feature == "vector" else ()

    def initialise(self, units: nn.ModuleList) -> None:
        """Xavier, as in the recipe."""
        for module in units.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
