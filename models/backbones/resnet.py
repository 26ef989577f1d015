"""Residual networks (He et al., arXiv 1512.03385), layers named as in torchvision."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from coterie.models.backbones.base import Feature, ImageBackbone, Site, Unit
from coterie.models.graph import INPUT, Node, node

BOTTLENECK = 4  # a bottleneck's output has four times the channels of its middle


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Blocks of one width.

    Attributes:
        blocks: Their number.
        channels: Of each convolution, at width 1; a bottleneck's last one has `BOTTLENECK` times as many.
        stride: Of the first block.
        dilation: Of its first block's and of its other blocks' 3x3 convolutions.
    """

    blocks: int
    channels: int
    stride: int = 1
    dilation: tuple[int, int] = (1, 1)


@dataclass(frozen=True, kw_only=True)
class ResNet(ImageBackbone):
    """A stem and stages of residual blocks, one unit each."""

    choices: ClassVar[Mapping[str, tuple[int | float, ...]]] = {"width": (0.125, 0.25, 0.5, 1.0)}
    stages: ClassVar[tuple[Stage, ...]]
    bottleneck: ClassVar[bool] = False

    @abstractmethod
    def stem(self, source: str, channels_in: int, channels: int) -> Sequence[Node]:
        """Describe the layers before the stages."""

    def plan(self) -> Sequence[Unit]:
        """The stem, then a unit a block."""
        start, source, channels_in = self._as_image()
        channels = self.channels(self.stages[0].channels)
        stem = (*start, *self.stem(source, channels_in, channels))
        units = [Unit(stem, (Site(stem[-1].name, channels),))]
        for number, stage in enumerate(self.stages, start=1):
            inner = self.channels(stage.channels)
            for block in range(stage.blocks):
                stride = stage.stride if block == 0 else 1
                dilation = stage.dilation[min(block, 1)]
                describe = self._bottleneck if self.bottleneck else self._basic
                units.append(describe(f"layer{number}.{block}", channels, inner, stride, dilation))
                channels = inner * (BOTTLENECK if self.bottleneck else 1)
        return units

    def neck(self, feature: Feature) -> Sequence[Node]:
        """A linear head reads the mean over all places."""
        return (node("mean", "space_mean", INPUT),) if feature == "vector" else ()

    def initialise(self, units: nn.ModuleList) -> None:
        """He's start for convolutions (arXiv 1502.01852)."""
        for module in units.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _basic(name: str, channels_in: int, channels: int, stride: int, dilation: int) -> Unit:
        nodes = (
            *_conv_bn(name, 1, INPUT, channels_in, channels, 3, stride, dilation),
            node(f"{name}.relu1", "relu", f"{name}.bn1"),
            *_conv_bn(name, 2, f"{name}.relu1", channels, channels, 3, 1, dilation),
            *_skip(name, f"{name}.bn2", channels_in, channels, stride),
        )
        return Unit(nodes, (Site(f"{name}.relu1", channels), Site(nodes[-1].name, channels)))

    @staticmethod
    def _bottleneck(name: str, channels_in: int, inner: int, stride: int, dilation: int) -> Unit:
        outer = inner * BOTTLENECK
        nodes = (
            *_conv_bn(name, 1, INPUT, channels_in, inner, 1, 1, 1),
            node(f"{name}.relu1", "relu", f"{name}.bn1"),
            *_conv_bn(name, 2, f"{name}.relu1", inner, inner, 3, stride, dilation),
            node(f"{name}.relu2", "relu", f"{name}.bn2"),
            *_conv_bn(name, 3, f"{name}.relu2", inner, outer, 1, 1, 1),
            *_skip(name, f"{name}.bn3", channels_in, outer, stride),
        )
        sites = (Site(f"{name}.relu1", inner), Site(f"{name}.relu2", inner), Site(nodes[-1].name, outer))
        return Unit(nodes, sites)


def _conv_bn(
    block: str, number: int, source: str, inputs: int, outputs: int, kernel: int, stride: int, dilation: int
) -> tuple[Node, Node]:
    conv = node(
        f"{block}.conv{number}",
        "conv",
        source,
        inputs=inputs,
        outputs=outputs,
        kernel=kernel,
        stride=stride,
        padding=dilation * (kernel // 2),
        dilation=dilation,
    )
    return conv, node(f"{block}.bn{number}", "batch_norm", conv.name, channels=outputs)


def _skip(block: str, source: str, inputs: int, outputs: int, stride: int) -> tuple[Node, ...]:
    """The sum with the block's input, by a 1x1 convolution where its shape differs, and the ReLU."""
    add, relu = f"{block}.add", node(f"{block}.relu", "relu", f"{block}.add")
    if stride == 1 and inputs == outputs:
        return node(add, "add", source, INPUT), relu
    conv, norm = f"{block}.downsample.0", f"{block}.downsample.1"
    return (
        node(conv, "conv", INPUT, inputs=inputs, outputs=outputs, kernel=1, stride=stride),
        node(norm, "batch_norm", conv, channels=outputs),
        node(add, "add", source, norm),
        relu,
    )


@dataclass(frozen=True, kw_only=True)
class ResNet20(ResNet):
    """The form for small images (section 4.2 of the paper): 16, 32 and 64 channels, three blocks each."""

    name: ClassVar[str] = "resnet20"
    defaults: ClassVar[Mapping[str, int | float]] = {"width": 0.5}
    least_side: ClassVar[int] = 4  # the stages halve it twice
    stages: ClassVar[tuple[Stage, ...]] = (
        Stage(blocks=3, channels=16),
        Stage(blocks=3, channels=32, stride=2),
        Stage(blocks=3, channels=64, stride=2),
    )

    def stem(self, source: str, channels_in: int, channels: int) -> Sequence[Node]:
        """A 3x3 convolution."""
        return (
            node("conv1", "conv", source, inputs=channels_in, outputs=channels, kernel=3, padding=1),
            node("bn1", "batch_norm", "conv1", channels=channels),
            node("relu", "relu", "bn1"),
        )


@dataclass(frozen=True, kw_only=True)
class _ImageNetForm(ResNet):
    """A 7x7 convolution and max pooling in front, which quarter the sides."""

    least_side: ClassVar[int] = 16

    def stem(self, source: str, channels_in: int, channels: int) -> Sequence[Node]:
        """The 7x7 convolution and the pooling."""
        return (
            node(
                "conv1", "conv", source, inputs=channels_in, outputs=channels, kernel=7, stride=2, padding=3
            ),
            node("bn1", "batch_norm", "conv1", channels=channels),
            node("relu", "relu", "bn1"),
            node("maxpool", "max_pool", "relu", kernel=3, stride=2, padding=1),
        )


@dataclass(frozen=True, kw_only=True)
class ResNet18(_ImageNetForm):
    """Eighteen layers of basic blocks, the form for ImageNet."""

    name: ClassVar[str] = "resnet18"
    defaults: ClassVar[Mapping[str, int | float]] = {"width": 0.5}
    stages: ClassVar[tuple[Stage, ...]] = (
        Stage(blocks=2, channels=64),
        Stage(blocks=2, channels=128, stride=2),
        Stage(blocks=2, channels=256, stride=2),
        Stage(blocks=2, channels=512, stride=2),
    )


@dataclass(frozen=True, kw_only=True)
class ResNet50Dilated(_ImageNetForm):
    """Fifty layers of bottlenecks for dense tasks: two stages dilated, an eighth of the input's side.

    The dilation replaces the stride as in Yu et al., arXiv 1705.09914, and torchvision's
    `replace_stride_with_dilation`, so that pretrained weights keep their meaning.
    """

    name: ClassVar[str] = "resnet50_dilated"
    defaults: ClassVar[Mapping[str, int | float]] = {"width": 0.5}
    bottleneck: ClassVar[bool] = True
    stages: ClassVar[tuple[Stage, ...]] = (
        Stage(blocks=3, channels=64),
        Stage(blocks=4, channels=128, stride=2),
        Stage(blocks=6, channels=256, dilation=(1, 2)),
        Stage(blocks=3, channels=512, dilation=(2, 4)),
    )
