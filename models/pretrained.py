"""Pretrained weights: a safetensors file with torchvision's or timm's names, into a network's backbones."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.models.backbones import Backbone
from coterie.models.backbones.vit import ViT
from coterie.models.families.base import MultiTaskNetwork

# Shapes: N tokens with the class token, C channels, H height, W width.

PREFIXES = ("module.", "backbone.", "model.")  # of wrappers; stripped where every name in the file has it
DTYPES = frozenset({"F64", "F32", "F16", "BF16"})  # safetensors' names of the types that weights may have
RGB = 3
NAMES_SHOWN = 3  # of each kind in a report or an error
NAME_SHOWN = 80  # characters of a name in a file: published ones have half of that

_COUNTER = "num_batches_tracked"  # nothing here reads it, and older files lack it


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatch:
    """A tensor that is in the file, of another shape than the backbone's.

    Attributes:
        name: As published.
        found: Shape in the file.
        expected: The backbone's.
    """

    name: str
    found: tuple[int, ...]
    expected: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What became of the tensors of a file, by their published names; batch norms' counters do not count.

    Attributes:
        matched: Copied as they are.
        resized: Copied after a change, and which one.
        mismatched: Not copied, since their shapes differ.
        missing: The backbone has them, the file has not.
        unused: The file has them, the backbone has not, such as a classifier.
    """

    matched: tuple[str, ...]
    resized: Mapping[str, str]
    mismatched: tuple[Mismatch, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        entries = {
            "matched": list(self.matched),
            "resized": [f"{name} ({change})" for name, change in self.resized.items()],
            "mismatched": [
                f"{m.name} (file {list(m.found)}, ours {list(m.expected)})" for m in self.mismatched
            ],
            "missing in the file": list(self.missing),
            "unused": [f"{name[:NAME_SHOWN]!r}" for name in self.unused],
        }
        return "\n".join(f"{title}: {len(some)}: {_some(some)}" for title, some in entries.items() if some)


def load_pretrained(network: MultiTaskNetwork, path: Path) -> Report:
    """Copy a file's weights into every copy of the backbone in `network`, in place.

    Names are torchvision's for residual networks and timm's for vision transformers, whose fused
    `attn.qkv` is split and whose positions are resized, bicubically, to another grid (published grids are
    square). Backbones without published weights (`mlp`, `cnn`, `resnet20`) take their own names. A prefix of
    `PREFIXES` goes where all names have it. An input of one channel takes the sum of the first convolution's
    weights over the three: what it gives then is what the published network gives for a grey image.

    Published weights mean what they did at width 1 only, whatever other width has the same shapes.

    Args:
        network: Any family's with the backbone in it, before its training.
        path: Of a safetensors file; nothing is unpickled.

    Raises:
        ValueError: If the file is damaged, holds something else than finite floating-point numbers under one
            of the backbone's names, nothing in it matches, or the family has no copy of the backbone. The
            network is as it was then.
        OSError: If the file can't be read.
    """
    trunks = network.trunks()
    if not trunks:
        raise ValueError(
            f"network: must be of a family that trains {network.backbone.name!r} as it is, found none"
        )
    published = _published(network.backbone, trunks[0])
    try:
        weights, report = _read(path, network.backbone, published)
    except (ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: {error}") from error
    with torch.no_grad():
        for trunk in trunks:
            for unit in trunk:
                for name, tensor in unit.state_dict().items():
                    if name in weights:
                        tensor.copy_(weights[name])
    return report


@dataclass(frozen=True, slots=True)
class _Entry:
    """A published tensor: which of ours it is, one behind another along its first axis, and its shape."""

    ours: tuple[str, ...]
    shape: tuple[int, ...]


def _published(backbone: Backbone, trunk: Sequence[nn.Module]) -> dict[str, _Entry]:
    """Give the tensors of a whole trunk by their published names."""
    shapes = {
        name: tuple(tensor.shape)
        for unit in trunk
        for name, tensor in unit.state_dict().items()
        if not name.endswith(_COUNTER)
    }
    if not isinstance(backbone, ViT):
        return {name: _Entry((name,), shape) for name, shape in shapes.items()}
    entries = {}
    for name, (first, *others) in shapes.items():
        if ".attn.q." in name:
            parts = tuple(name.replace(".attn.q.", f".attn.{part}.") for part in ("q", "k", "v"))
            entries[name.replace(".attn.q.", ".attn.qkv.")] = _Entry(parts, (3 * first, *others))
        elif ".attn.k." not in name and ".attn.v." not in name:
            entries[name.removeprefix("embed.")] = _Entry((name,), (first, *others))
    return entries


def _read(
    path: Path, backbone: Backbone, published: Mapping[str, _Entry]
) -> tuple[dict[str, Tensor], Report]:
    """Give the weights by our names, and the report."""
    weights: dict[str, Tensor] = {}
    matched, resized, mismatched = [], {}, []
    with safetensors.safe_open(path, framework="pt") as file:
        names = _strip_prefixes(name for name in file.keys() if not name.endswith(_COUNTER))  # noqa: SIM118
        for name, entry in published.items():
            if name not in names:
                continue
            dtype = file.get_slice(names[name]).get_dtype()
            if dtype not in DTYPES:
                raise ValueError(f"{name}: must be of a type in {sorted(DTYPES)}, found {dtype!r}")
            tensor = file.get_tensor(names[name]).float()
            adapted = _adapt(tensor, name, entry.shape, backbone)
            if adapted is None:
                mismatch = Mismatch(name=name, found=tuple(tensor.shape), expected=entry.shape)
                mismatched.append(mismatch)
                continue
            tensor, change = adapted
            if not tensor.isfinite().all():
                raise ValueError(f"{name}: must be finite in float32, found NaN or infinity")
            if change:
                resized[name] = change
            else:
                matched.append(name)
            weights.update(zip(entry.ours, tensor.chunk(len(entry.ours)), strict=True))
        if not weights:
            known = [name for name in names if name in published] or list(names)
            found = [_describe(name, file.get_slice(names[name]).get_shape()) for name in known[:NAMES_SHOWN]]
            expected = [_describe(name, entry.shape) for name, entry in published.items()]
            raise ValueError(
                f"must hold weights of {backbone.name!r} in the shapes of this network, {_some(expected)}, "
                f"found {_some(found, len(known))}"
            )
    return weights, Report(
        matched=tuple(matched),
        resized=resized,
        mismatched=tuple(mismatched),
        missing=tuple(name for name in published if name not in names),
        unused=tuple(name for name in names if name not in published),
    )


def _strip_prefixes(names: Iterable[str]) -> dict[str, str]:
    """Give the names in a file by what is left of them without wrappers' prefixes."""
    stripped = {name: name for name in names}
    for _ in PREFIXES:  # in any order, each once or so
        prefix = next((prefix for prefix in PREFIXES if all(n.startswith(prefix) for n in stripped)), "")
        stripped = {short.removeprefix(prefix): name for short, name in stripped.items()}
    return stripped


def _adapt(
    tensor: Tensor, name: str, shape: tuple[int, ...], backbone: Backbone
) -> tuple[Tensor, str] | None:
    """Give a tensor in `shape` and how it was changed, if at all; None where it can't be."""
    if isinstance(backbone, ViT) and name == "pos_embed":
        return _resize_positions(tensor, shape, backbone.grid)
    if tensor.shape == shape:
        return tensor, ""
    convolutions = (node.name for node in backbone.plan()[0].nodes if node.kind == "conv")
    of_colours = (shape[0], RGB, *shape[2:])
    if name == f"{next(convolutions, None)}.weight" and shape[1] == 1 and tensor.shape == of_colours:
        return tensor.sum(dim=1, keepdim=True), f"summed over its {RGB} input channels"
    return None


def _resize_positions(
    pos_1NC: Tensor, shape: tuple[int, ...], grid: tuple[int, int]
) -> tuple[Tensor, str] | None:
    """Resize the positions behind the class token's from a square grid to `grid`, as timm does."""
    if pos_1NC.dim() != 3 or pos_1NC.shape[1] < 2 or pos_1NC.shape[::2] != shape[::2]:
        return None
    side = math.isqrt(pos_1NC.shape[1] - 1)
    if (side, side) == grid or side**2 != pos_1NC.shape[1] - 1:
        return (pos_1NC, "") if pos_1NC.shape == shape else None
    map_1CHW = pos_1NC[:, 1:].transpose(1, 2).reshape(1, -1, side, side)
    map_1CHW = F.interpolate(map_1CHW, size=grid, mode="bicubic", antialias=True, align_corners=False)
    resized = torch.cat([pos_1NC[:, :1], map_1CHW.flatten(2).transpose(1, 2)], dim=1)
    return resized, f"from {side}x{side} to {grid[0]}x{grid[1]} places"


def _describe(name: str, shape: Iterable[int]) -> str:
    """Write a tensor's name, which may come from a file, in one short line."""
    return f"{name[:NAME_SHOWN]!r} {list(shape)}"


def _some(entries: Sequence[str], total: int | None = None) -> str:
    """Write the first few of `total` entries, by default as many as there are."""
    more = (len(entries) if total is None else total) - NAMES_SHOWN
    return ", ".join(entries[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "") or "nothing"
