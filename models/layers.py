"""The kinds of layer that networks are made of: each has settings that are plain numbers, and a module.

A backbone is described by them, a family trains them, and an exported network lists them, so what a layer is
stands here once. Every layer takes and gives batches; *channels* are a tensor's last axis where it holds
tokens [B, N, C], and its second one in vectors [B, C] and maps [B, C, H, W].
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

# Shapes: B batch, C channels, D features, H height, W width, N tokens.

Setting = bool | int | float
GREATEST_SETTING = 2**28  # far above any useful size
LAYER_NORM_EPS = 1e-6  # as timm's vision transformers have it, so that their weights give their outputs


class Reach(Enum):
    """Which channels of its inputs one output channel of a layer reads: what pruning must know."""

    ALL = "all"
    SAME = "same"
    HEAD = "head"
    SPECIAL = "special"


def channel_axis(x: Tensor) -> int:
    """The axis of the channels, from the front."""
    return 2 if x.dim() == 3 else 1


class BatchNorm(_BatchNorm):
    """Batch norm over vectors [B, C] and maps [B, C, H, W] alike."""

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's name
        """Any rank has its channels on axis 1."""


class ClassToken(nn.Module):
    """Put a learned token before the others and add learned positions: [B, N, C] -> [B, N + 1, C]."""

    def __init__(self, tokens: int, channels: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, channels))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens + 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Give the tokens with their positions."""
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed


class Attention(nn.Module):
    """Scaled dot-product attention of `heads` heads: q, k, v [B, N, C] -> [B, N, C]."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend."""
        split = (
            tensor.unflatten(2, (self.heads, -1)).transpose(1, 2)  # type: ignore[no-untyped-call]
            for tensor in (q, k, v)
        )
        return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


class Tokens(nn.Module):
    """Read a map's places as tokens: [B, C, H, W] -> [B, H * W, C]."""

    def forward(self, x: Tensor) -> Tensor:
        """Give the tokens, row by row."""
        return x.flatten(2).transpose(1, 2)


class FirstToken(nn.Module):
    """Take the class token: [B, N, C] -> [B, C]."""

    def forward(self, x: Tensor) -> Tensor:
        """Give the first token."""
        return x[:, 0]


class Grid(nn.Module):
    """Lay the tokens behind the class token out as a map: [B, 1 + H * W, C] -> [B, C, H, W]."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.size = (height, width)

    def forward(self, x: Tensor) -> Tensor:
        """Give the map."""
        places = x[:, 1:].transpose(1, 2)
        return cast(Tensor, places.unflatten(2, self.size))  # type: ignore[no-untyped-call]


class Image(nn.Module):
    """Read a matrix as a map of one channel: [B, H, W] -> [B, 1, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        """Give the map."""
        return x.unsqueeze(1)


class SpaceMean(nn.Module):
    """Average over all places: [B, C, H, W] -> [B, C]."""

    def forward(self, x: Tensor) -> Tensor:
        """Give the means."""
        return x.mean(dim=(2, 3))


class Add(nn.Module):
    """Add two tensors of one shape."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Give the sum."""
        return x + y


class Concat(nn.Module):
    """Put the channels of the inputs one behind another."""

    def forward(self, *parts: Tensor) -> Tensor:
        """Give all channels."""
        return torch.cat(parts, dim=channel_axis(parts[0]))


class Slice(nn.Module):
    """Take `length` channels from `start` on."""

    def __init__(self, start: int, length: int) -> None:
        super().__init__()
        self.start = start
        self.length = length

    def forward(self, x: Tensor) -> Tensor:
        """Give them."""
        return x.narrow(channel_axis(x), self.start, self.length)


class Select(nn.Module):
    """Take `count` channels by their numbers, in any order."""

    index: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("index", torch.zeros(count, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Give them."""
        return x.index_select(channel_axis(x), self.index)


class Mix(nn.Module):
    """Add up to `channels` channels: those of input i, times `weight_i`, go to the places `index_i`.

    Args:
        channels: Of the output; a place that no input reaches is 0.
        parts: Total number of channels of all inputs.
    """

    weight: Tensor
    index: Tensor

    def __init__(self, channels: int, parts: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("weight", torch.zeros(parts))
        self.register_buffer("index", torch.zeros(parts, dtype=torch.int64))

    def forward(self, *parts: Tensor) -> Tensor:
        """Give the sum."""
        axis = channel_axis(parts[0])
        x = torch.cat(parts, dim=axis) if len(parts) > 1 else parts[0]
        x = x * self.weight.view(-1, *(1,) * (x.dim() - 1 - axis))  # of the wider type under autocast
        shape = (*x.shape[:axis], self.channels, *x.shape[axis + 1 :])
        return x.new_zeros(shape).index_add(axis, self.index, x)


class Upsample(nn.Module):
    """Resize a map bilinearly: [B, C, h, w] -> [B, C, height, width]."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.size = (height, width)

    def forward(self, x: Tensor) -> Tensor:
        """Give the larger map."""
        return F.interpolate(x, size=self.size, mode="bilinear", align_corners=False)


class Normalize(nn.Module):
    """Scale the vector of channels at each place to length 1."""

    def forward(self, x: Tensor) -> Tensor:
        """Give unit vectors."""
        return F.normalize(x, dim=channel_axis(x))


class Squeeze(nn.Module):
    """Drop the one channel: [B, 1] -> [B], [B, 1, H, W] -> [B, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        """Give the tensor without that axis."""
        return x.squeeze(1)


class RandomConv(nn.Module):
    """A fixed depthwise convolution of a sparse pattern of -1, 0 and +1, scaled by 1/sqrt(its fan-in).

    The weight is a buffer: it does not learn, and is saved with the network.
    """

    weight: Tensor

    def __init__(
        self, channels: int, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.register_buffer("weight", torch.zeros(channels, 1, kernel, kernel))

    def forward(self, x: Tensor) -> Tensor:
        """Give the convolved map."""
        return F.conv2d(
            x,
            self.weight,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.weight.shape[0],
        )


class RandomProjection(nn.Module):
    """A fixed linear layer of a sparse pattern of -1, 0 and +1, scaled by 1/sqrt(its fan-in)."""

    weight: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """Give the projected vectors."""
        return F.linear(x, self.weight)


class Subsample(nn.Module):
    """Take every `stride`-th place: [B, C, H, W] -> [B, C, ceil(H / stride), ceil(W / stride)]."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Give the smaller map."""
        return x[:, :, :: self.stride, :: self.stride]


class FixedNoise(nn.Module):
    """Add noise that was drawn once, one number for each channel of `channels`."""

    noise: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("noise", torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Give the sum."""
        return x + self.noise.view(-1, *(1,) * (x.dim() - 1 - channel_axis(x)))


class Standardize(nn.Module):
    """Turn raw inputs into what a network was trained on: `(x - mean) / std`.

    Args:
        values: One for all inputs, or one for each index of a sample's first axis.
        axes: Of a sample.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, values: int, axes: int) -> None:
        super().__init__()
        shape = (values,) + (1,) * (axes - 1)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Give `(x - mean) / std`."""
        return (x - self.mean) / self.std


def _conv(
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    bias: bool = False,
) -> nn.Module:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=bias)


def _linear(inputs: int, outputs: int, bias: bool = True) -> nn.Module:
    return nn.Linear(inputs, outputs, bias=bias)


def _batch_norm(channels: int) -> nn.Module:
    return BatchNorm(channels)


def _layer_norm(channels: int) -> nn.Module:
    return nn.LayerNorm(channels, eps=LAYER_NORM_EPS)


def _max_pool(kernel: int, stride: int, padding: int = 0) -> nn.Module:
    return nn.MaxPool2d(kernel, stride, padding)


def _avg_pool(kernel: int, stride: int, padding: int = 0) -> nn.Module:
    return nn.AvgPool2d(kernel, stride, padding, count_include_pad=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """One kind of layer.

    Attributes:
        build: Makes the module; its parameters are the kind's settings, by their annotations.
        reach: Which input channels an output channel reads.
        inputs: How many it takes; None for one or more.
    """

    build: Callable[..., nn.Module]
    reach: Reach
    inputs: int | None = 1


KINDS: Mapping[str, Kind] = {
    "conv": Kind(build=_conv, reach=Reach.ALL),
    "linear": Kind(build=_linear, reach=Reach.ALL),
    "batch_norm": Kind(build=_batch_norm, reach=Reach.SAME),
    "layer_norm": Kind(build=_layer_norm, reach=Reach.ALL),
    "relu": Kind(build=lambda: nn.ReLU(), reach=Reach.SAME),
    "gelu": Kind(build=lambda: nn.GELU(), reach=Reach.SAME),
    "max_pool": Kind(build=_max_pool, reach=Reach.SAME),
    "avg_pool": Kind(build=_avg_pool, reach=Reach.SAME),
    "space_mean": Kind(build=SpaceMean, reach=Reach.SAME),
    "flatten": Kind(build=lambda: nn.Flatten(), reach=Reach.SPECIAL),
    "image": Kind(build=Image, reach=Reach.SPECIAL),
    "tokens": Kind(build=Tokens, reach=Reach.SAME),
    "class_token": Kind(build=ClassToken, reach=Reach.SAME),
    "first_token": Kind(build=FirstToken, reach=Reach.SAME),
    "grid": Kind(build=Grid, reach=Reach.SAME),
    "attention": Kind(build=Attention, reach=Reach.HEAD, inputs=3),
    "add": Kind(build=Add, reach=Reach.SAME, inputs=2),
    "concat": Kind(build=Concat, reach=Reach.SPECIAL, inputs=None),
    "slice": Kind(build=Slice, reach=Reach.SPECIAL),
    "select": Kind(build=Select, reach=Reach.SPECIAL),
    "mix": Kind(build=Mix, reach=Reach.SPECIAL, inputs=None),
    "upsample": Kind(build=Upsample, reach=Reach.SAME),
    "normalize": Kind(build=Normalize, reach=Reach.ALL),
    "squeeze": Kind(build=Squeeze, reach=Reach.SAME),
    "random_conv": Kind(build=RandomConv, reach=Reach.SAME),
    "random_projection": Kind(build=RandomProjection, reach=Reach.ALL),
    "subsample": Kind(build=Subsample, reach=Reach.SAME),
    "fixed_noise": Kind(build=FixedNoise, reach=Reach.SAME),
    "standardize": Kind(build=Standardize, reach=Reach.SPECIAL),
}

_LEAST = {"padding": 0, "start": 0}  # every other whole number counts something, so it is at least 1


def build_layer(kind: str, settings: Mapping[str, Setting]) -> nn.Module:
    """Build a layer with fresh weights, drawn from torch's global generator.

    Raises:
        ValueError: If the kind is unknown, or a setting is missing, unknown, of another type or out of range.
    """
    check_layer(kind, settings)
    return KINDS[kind].build(**settings)


def check_layer(kind: str, settings: Mapping[str, Any]) -> None:
    """Check a layer before anything is allocated.

    Raises:
        ValueError: As `build_layer` does.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: must be one of {sorted(KINDS)}, found {kind!r}")
    known = _settings(kind)
    required = {name for name, parameter in known.items() if parameter.default is parameter.empty}
    if not required <= settings.keys() <= known.keys():
        raise ValueError(
            f"settings: {kind!r} must have {sorted(required)} and may have "
            f"{sorted(known.keys() - required)}, found {sorted(settings)}"
        )
    for name, value in settings.items():
        least = _LEAST.get(name, 1)
        if known[name].annotation is bool:
            if type(value) is not bool:
                raise ValueError(f"{name}: of {kind!r} must be true or false, found {value!r}")
        elif type(value) is not int or not least <= value <= GREATEST_SETTING:
            raise ValueError(
                f"{name}: of {kind!r} must be a whole number from {least} to {GREATEST_SETTING}, "
                f"found {value!r}"
            )


def _settings(kind: str) -> dict[str, inspect.Parameter]:
    build = KINDS[kind].build
    if isinstance(build, type) and build.__init__ is nn.Module.__init__:  # type: ignore[misc]
        return {}
    return dict(inspect.signature(build).parameters)


def settings_of(kind: str) -> dict[str, type]:
    """The settings of a kind and their types, bool or int."""
    return {name: parameter.annotation for name, parameter in _settings(kind).items()}


def channels_per_block(shape: tuple[int, ...]) -> int:
    """How many numbers `flatten` makes of one channel of a sample of this shape."""
    return math.prod(shape[1:])
