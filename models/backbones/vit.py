"""Vision transformers (Dosovitskiy et al., arXiv 2010.11929; sizes of Touvron et al., arXiv 2012.12877)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from coterie.models.backbones.base import Feature, ImageBackbone, Site, Unit
from coterie.models.graph import INPUT, Node, node
from coterie.models.layers import ClassToken

DEPTH = 12
HEAD_CHANNELS = 64
FEED_FORWARD = 4  # channels of the hidden layer, in multiples of the stream's
PATCHES = (16, 8, 4, 2, 1)  # the published one first
FEWEST_PATCHES = 16
MOST_PATCHES = 4096
START_STD = 0.02  # of the published truncated normal


@dataclass(frozen=True, kw_only=True)
class ViT(ImageBackbone):
    """Patches, a class token, `DEPTH` blocks with the norm in front, a last norm; layers named as in timm.

    Query, key and value are layers of their own, so that heads can be gated and routed. The last unit holds
    the last norm. Heads keep their number; the width is that of each.

    Attributes:
        patch: Side of a patch; None takes the published 16, or the largest of 8, 4, 2 and 1 that divides the
            input and leaves at least 16 patches.
        attention_heads: Their number.
    """

    choices: ClassVar[Mapping[str, tuple[int | float, ...]]] = {"width": (0.125, 0.25, 0.5, 1.0)}
    defaults: ClassVar[Mapping[str, int | float]] = {"width": 0.25}
    least_side: ClassVar[int] = 4
    attention_heads: ClassVar[int]

    patch: int | None = None

    def check(self) -> None:
        """Check width, input and patch."""
        super().check()
        side = self.patch_side
        height, width = self.input_shape[-2:]
        if type(side) is not int or side < 1 or height % side or width % side:
            raise ValueError(f"patch: must divide {height} and {width}, found {side!r}")
        patches = (height // side) * (width // side)
        if patches > MOST_PATCHES:
            raise ValueError(
                f"patch: must give at most {MOST_PATCHES} patches of {height}x{width} places, "
                f"found {patches} with a side of {side}"
            )

    @property
    def patch_side(self) -> int:
        """Side of a patch."""
        if self.patch is not None:
            return self.patch
        height, width = self.input_shape[-2:]
        fitting = (
            side
            for side in PATCHES
            if not (height % side or width % side) and (height // side) * (width // side) >= FEWEST_PATCHES
        )
        return next(fitting, 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.input_shape[-2] // self.patch_side, self.input_shape[-1] // self.patch_side

    @property
    def stream(self) -> int:
        """Channels of a token."""
        return self.attention_heads * self.channels(HEAD_CHANNELS)

    def plan(self) -> Sequence[Unit]:
        """The patch embedding, then a unit a block."""
        start, source, channels_in = self._as_image()
        side, stream = self.patch_side, self.stream
        tokens = self.grid[0] * self.grid[1]
        embedding = (
            *start,
            node(
                "patch_embed.proj",
                "conv",
                source,
                inputs=channels_in,
                outputs=stream,
                kernel=side,
                stride=side,
                bias=True,
            ),
            node("tokens", "tokens", "patch_embed.proj"),
            node("embed", "class_token", "tokens", tokens=tokens, channels=stream),
        )
        units = [Unit(embedding, (Site("embed", stream),))]
        units.extend(self._block(f"blocks.{number}", last=number == DEPTH - 1) for number in range(DEPTH))
        return units

    def neck(self, feature: Feature) -> Sequence[Node]:
        """A linear head reads the class token, a decoder the others."""
        if feature == "vector":
            return (node("token", "first_token", INPUT),)
        height, width = self.grid
        return (node("grid", "grid", INPUT, height=height, width=width),)

    def initialise(self, units: nn.ModuleList) -> None:
        """Truncated normal weights, no biases."""
        for module in units.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=START_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, ClassToken):
                nn.init.trunc_normal_(module.cls_token, std=START_STD)
                nn.init.trunc_normal_(module.pos_embed, std=START_STD)

    def _block(self, name: str, *, last: bool) -> Unit:
        stream, hidden = self.stream, FEED_FORWARD * self.stream
        nodes = [
            node(f"{name}.norm1", "layer_norm", INPUT, channels=stream),
            *(
                node(f"{name}.attn.{part}", "linear", f"{name}.norm1", inputs=stream, outputs=stream)
                for part in ("q", "k", "v")
            ),
            node(
                f"{name}.attn.mix",
                "attention",
                *(f"{name}.attn.{part}" for part in ("q", "k", "v")),
                heads=self.attention_heads,
            ),
            node(f"{name}.attn.proj", "linear", f"{name}.attn.mix", inputs=stream, outputs=stream),
            node(f"{name}.add1", "add", f"{name}.attn.proj", INPUT),
            node(f"{name}.norm2", "layer_norm", f"{name}.add1", channels=stream),
            node(f"{name}.mlp.fc1", "linear", f"{name}.norm2", inputs=stream, outputs=hidden),
            node(f"{name}.mlp.act", "gelu", f"{name}.mlp.fc1"),
            node(f"{name}.mlp.fc2", "linear", f"{name}.mlp.act", inputs=hidden, outputs=stream),
            node(f"{name}.add2", "add", f"{name}.mlp.fc2", f"{name}.add1"),
        ]
        sites = [
            Site(f"{name}.attn.mix", self.attention_heads, stream // self.attention_heads),
            Site(f"{name}.attn.proj", stream),
            Site(f"{name}.mlp.act", hidden),
            Site(f"{name}.mlp.fc2", stream),
        ]
        if last:
            nodes.append(node("norm", "layer_norm", f"{name}.add2", channels=stream))
            sites.append(Site("norm", stream))
        return Unit(tuple(nodes), tuple(sites))


@dataclass(frozen=True, kw_only=True)
class ViTTiny(ViT):
    """Twelve blocks of three heads, 192 channels."""

    name: ClassVar[str] = "vit_tiny"
    attention_heads: ClassVar[int] = 3


@dataclass(frozen=True, kw_only=True)
class ViTSmall(ViT):
    """Twelve blocks of six heads, 384 channels."""

    name: ClassVar[str] = "vit_small"
    attention_heads: ClassVar[int] = 6
