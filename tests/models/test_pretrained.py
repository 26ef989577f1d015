"""Weights from files whose names are written here by torchvision's and timm's rules."""

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from coterie.models.backbones import BACKBONES, MLP, Backbone
from coterie.models.families import MultiTaskNetwork, build_network
from coterie.models.pretrained import Mismatch, load_pretrained
from coterie.models.tasks import TaskSet

MakeTasks = Callable[..., TaskSet]
Shapes = dict[str, tuple[int, ...]]

BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


def _batch_norm(name: str, channels: int) -> Shapes:
    shapes: Shapes = {f"{name}.{part}": (channels,) for part in BATCH_NORM}
    return shapes | {f"{name}.num_batches_tracked": ()}


def resnet(blocks: tuple[int, ...], width: float, *, bottleneck: bool) -> Shapes:
    """torchvision's `resnet18` and `resnet50`, `fc` included."""
    inside = [round(channels * width) for channels in (64, 128, 256, 512)]
    shapes: Shapes = {"conv1.weight": (inside[0], 3, 7, 7), **_batch_norm("bn1", inside[0])}
    channels = inside[0]
    for stage, (number, c) in enumerate(zip(blocks, inside, strict=True), start=1):
        out = 4 * c if bottleneck else c
        for b in range(number):
            name = f"layer{stage}.{b}"
            convolutions = (
                [(c, channels, 1), (c, c, 3), (out, c, 1)] if bottleneck else [(c, channels, 3), (c, c, 3)]
            )
            for layer, (outputs, inputs, kernel) in enumerate(convolutions, start=1):
                shapes[f"{name}.conv{layer}.weight"] = (outputs, inputs, kernel, kernel)
                shapes |= _batch_norm(f"{name}.bn{layer}", outputs)
            if b == 0 and (bottleneck or stage > 1):
                shapes[f"{name}.downsample.0.weight"] = (out, channels, 1, 1)
                shapes |= _batch_norm(f"{name}.downsample.1", out)
            channels = out
    return shapes | {"fc.weight": (1000, channels), "fc.bias": (1000,)}


def vit(channels: int, *, patch: int = 16, side: int = 14) -> Shapes:
    """timm's `vit_tiny_patch16_224` and `vit_small_patch16_224`, `head` included."""
    shapes: Shapes = {
        "cls_token": (1, 1, channels),
        "pos_embed": (1, side**2 + 1, channels),
        "patch_embed.proj.weight": (channels, 3, patch, patch),
        "patch_embed.proj.bias": (channels,),
    }

    def layer(name: str, outputs: int, *inputs: int) -> None:
        shapes.update({f"{name}.weight": (outputs, *inputs), f"{name}.bias": (outputs,)})

    for b in range(12):
        layer(f"blocks.{b}.norm1", channels)
        layer(f"blocks.{b}.attn.qkv", 3 * channels, channels)
        layer(f"blocks.{b}.attn.proj", channels, channels)
        layer(f"blocks.{b}.norm2", channels)
        layer(f"blocks.{b}.mlp.fc1", 4 * channels, channels)
        layer(f"blocks.{b}.mlp.fc2", channels, 4 * channels)
    layer("norm", channels)
    layer("head", 1000, channels)
    return shapes


# Thin ones: the names are the published ones, and a file of full width takes long to draw.
WIDTH = 0.0625
PUBLISHED: dict[
    str, tuple[Shapes, int]
] = {  # and how many tensors a trunk has, without counters and classifier
    "resnet18": (resnet((2, 2, 2, 2), WIDTH, bottleneck=False), 20 * 5),
    "resnet50_dilated": (resnet((3, 4, 6, 3), WIDTH, bottleneck=True), 53 * 5),
    "vit_tiny": (vit(12, patch=8, side=4), 4 + 12 * 12 + 2),
    "vit_small": (vit(24, patch=8, side=4), 4 + 12 * 12 + 2),
}


def draw(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(shape, generator=random) if shape else torch.tensor(7)
        for name, shape in shapes.items()
    }


def published(name: str) -> dict[str, Tensor]:
    return draw(PUBLISHED[name][0])


def write(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    path = folder / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def backbone_of(name: str, **sizes: Any) -> Backbone:
    return BACKBONES[name](**({"input_shape": (3, 32, 32), "width": WIDTH} | sizes))


@pytest.fixture
def make(make_tasks: MakeTasks) -> Callable[..., MultiTaskNetwork]:
    def build(backbone: Backbone, family: str = "shared", **parameters: Any) -> MultiTaskNetwork:
        torch.manual_seed(0)
        return build_network(family, backbone=backbone, tasks=make_tasks(1, 1, 1), parameters=parameters)

    return build


Make = Callable[..., MultiTaskNetwork]


def trunk_state(network: MultiTaskNetwork, number: int = 0) -> dict[str, Tensor]:
    return {name: tensor for unit in network.trunks()[number] for name, tensor in unit.state_dict().items()}


def snapshot(network: MultiTaskNetwork) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def assert_unchanged(network: MultiTaskNetwork, before: Mapping[str, Tensor]) -> None:
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def ours(state: Mapping[str, Tensor], name: str) -> Tensor:
    """The published tensor of that name, put together from our state."""
    if ".qkv." in name:
        return torch.cat([state[name.replace(".qkv.", f".{part}.")] for part in ("q", "k", "v")])
    return state[f"embed.{name}" if name in {"cls_token", "pos_embed"} else name]


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone.", "backbone.model."])
def test_every_published_tensor_goes_where_it_belongs(
    name: str, prefix: str, tmp_path: Path, make: Make
) -> None:
    tensors, network = published(name), make(backbone_of(name))
    report = load_pretrained(network, write(tmp_path, {f"{prefix}{key}": t for key, t in tensors.items()}))
    classifier = ("head" if name.startswith("vit") else "fc") + "."
    kept = [key for key in tensors if not key.startswith(classifier) and not key.endswith("tracked")]
    assert sorted(report.matched) == sorted(kept)
    assert len(kept) == PUBLISHED[name][1]
    assert report.unused == (f"{classifier}bias", f"{classifier}weight")
    assert not report.resized
    assert not report.mismatched
    assert not report.missing
    state = trunk_state(network)
    for key in kept:
        assert torch.equal(ours(state, key), tensors[key]), key


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny"])
@pytest.mark.parametrize(
    ("family", "parameters", "lengths"),
    [
        ("single", {}, (0, 0, 0)),
        ("grouped", {"grouping": [["a", "b"], ["c"]], "split": 2}, (0, 2)),
        ("dmtg", {"groups": 2, "split": 1}, (0, 1)),
        ("interrogate", {}, (0, 0, 0, 0)),
    ],
)
def test_every_copy_of_the_backbone_gets_them_and_the_heads_do_not(
    name: str, family: str, parameters: dict[str, Any], lengths: tuple[int, ...], tmp_path: Path, make: Make
) -> None:
    tensors, network = published(name), make(backbone_of(name), family, **parameters)
    before = snapshot(network)
    report = load_pretrained(network, write(tmp_path, tensors))
    units = network.backbone.units
    assert [units - len(trunk) for trunk in network.trunks()] == list(lengths)
    held = set()
    for number, trunk in enumerate(network.trunks()):
        state = trunk_state(network, number)
        whole = {node.name for unit in network.backbone.plan()[units - len(trunk) :] for node in unit.nodes}
        for key in report.matched:
            place = key.replace(".qkv.", ".q.").rpartition(".")[0] or "embed"
            if place in whole:
                assert torch.equal(ours(state, key), tensors[key]), key
        held |= {tensor.data_ptr() for tensor in state.values()}
    for key, tensor in network.state_dict().items():
        assert tensor.data_ptr() in held or torch.equal(tensor, before[key]), key


def test_a_block_gives_what_the_fused_attention_gives_with_the_published_weights(
    tmp_path: Path, make: Make
) -> None:
    tensors, network = published("vit_tiny"), make(backbone_of("vit_tiny"))
    tensors = {key: tensor - 0.5 for key, tensor in tensors.items()}
    load_pretrained(network, write(tmp_path, tensors))
    block = network.trunks()[0][1]
    x = torch.randn(2, 17, 12)

    def linear(name: str, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(
            x, tensors[f"blocks.0.{name}.weight"], tensors[f"blocks.0.{name}.bias"]
        )

    def norm(name: str, x: Tensor) -> Tensor:
        weight, bias = (tensors[f"blocks.0.{name}.{part}"] for part in ("weight", "bias"))
        return torch.nn.functional.layer_norm(x, (12,), weight, bias, eps=1e-6)

    qkv = linear("attn.qkv", norm("norm1", x)).reshape(2, 17, 3, 3, 4).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    mixed = (q @ k.transpose(-2, -1) / math.sqrt(4)).softmax(-1) @ v
    middle = x + linear("attn.proj", mixed.transpose(1, 2).reshape(2, 17, 12))
    expected = middle + linear("mlp.fc2", torch.nn.functional.gelu(linear("mlp.fc1", norm("norm2", middle))))
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize(
    ("shape", "grid"), [((3, 64, 64), (8, 8)), ((3, 16, 24), (2, 3)), ((3, 16, 64), (2, 8))]
)
def test_positions_are_resized_to_another_grid_even_one_of_as_many_places(
    shape: tuple[int, ...], grid: tuple[int, int], tmp_path: Path, make: Make
) -> None:
    tensors = published("vit_tiny")
    rows = torch.linspace(0, 1, 4).view(4, 1).expand(4, 4).reshape(1, 16, 1)  # a ramp from top to bottom
    tensors["pos_embed"] = torch.cat([torch.full((1, 1, 12), 5.0), rows.expand(1, 16, 12)], dim=1)
    network = make(backbone_of("vit_tiny", input_shape=shape, patch=8))
    report = load_pretrained(network, write(tmp_path, tensors))
    assert report.resized == {"pos_embed": f"from 4x4 to {grid[0]}x{grid[1]} places"}
    position = trunk_state(network)["embed.pos_embed"]
    assert torch.equal(position[:, 0], torch.full((1, 12), 5.0))
    resized = position[0, 1:, 0].view(grid)
    torch.testing.assert_close(resized, resized[:, :1].expand(grid))
    assert (resized[1:] > resized[:-1]).all()
    torch.testing.assert_close(resized.mean(), torch.tensor(0.5))


def test_positions_of_a_grid_that_is_no_square_stay_where_it_is_ours(tmp_path: Path, make: Make) -> None:
    network = make(backbone_of("vit_tiny", input_shape=(3, 16, 24), patch=8))
    tensors = published("vit_tiny") | {"pos_embed": torch.rand(1, 7, 12)}
    report = load_pretrained(network, write(tmp_path, tensors))
    assert "pos_embed" in report.matched
    other = make(backbone_of("vit_tiny", input_shape=(3, 24, 24), patch=8))
    report = load_pretrained(other, write(tmp_path, tensors))
    assert report.mismatched == (Mismatch(name="pos_embed", found=(1, 7, 12), expected=(1, 10, 12)),)


@pytest.mark.parametrize("shape", [(32, 32), (1, 32, 32)])
@pytest.mark.parametrize(("name", "first"), [("resnet18", "conv1"), ("vit_tiny", "patch_embed.proj")])
def test_one_channel_gives_what_the_published_network_gives_for_a_grey_image(
    name: str, first: str, shape: tuple[int, ...], tmp_path: Path, make: Make
) -> None:
    path = write(tmp_path, published(name))
    colour, grey = make(backbone_of(name)).eval(), make(backbone_of(name, input_shape=shape)).eval()
    assert not load_pretrained(colour, path).resized
    report = load_pretrained(grey, path)
    assert report.resized == {f"{first}.weight": "summed over its 3 input channels"}
    x = torch.rand(2, 1, 32, 32)
    stem, plain = grey.trunks()[0][0], colour.trunks()[0][0]
    torch.testing.assert_close(stem(x.view(2, *shape)), plain(x.expand(2, 3, 32, 32)))


@pytest.mark.parametrize("channels", [2, 4])
def test_any_other_number_of_channels_is_reported_and_the_rest_is_copied(
    channels: int, tmp_path: Path, make: Make
) -> None:
    network = make(backbone_of("resnet18", input_shape=(channels, 32, 32)))
    before = trunk_state(network)["conv1.weight"].clone()
    report = load_pretrained(network, write(tmp_path, published("resnet18")))
    expected = Mismatch(name="conv1.weight", found=(4, 3, 7, 7), expected=(4, channels, 7, 7))
    assert report.mismatched == (expected,)
    assert len(report.matched) == 99
    assert torch.equal(trunk_state(network)["conv1.weight"], before)


def test_what_is_missing_and_what_is_left_over_is_said(tmp_path: Path, make: Make) -> None:
    tensors = published("resnet18") | {"extra\x1b[31m.weight": torch.zeros(2)}
    del tensors["layer4.1.bn2.running_var"]
    network = make(backbone_of("resnet18"))
    report = load_pretrained(network, write(tmp_path, tensors))
    assert report.missing == ("layer4.1.bn2.running_var",)
    assert report.unused == ("extra\x1b[31m.weight", "fc.bias", "fc.weight")
    text = str(report)
    assert "matched: 99: conv1.weight" in text
    assert "missing in the file: 1: layer4.1.bn2.running_var" in text
    assert "unused: 3: 'extra\\x1b[31m.weight', 'fc.bias', 'fc.weight'" in text
    assert "\x1b" not in text


def test_a_report_is_short_however_much_there_is_to_say(tmp_path: Path, make: Make) -> None:
    tensors = draw({name: (*shape, 1) if shape else () for name, shape in PUBLISHED["resnet18"][0].items()})
    tensors |= {"conv1.weight": published("resnet18")["conv1.weight"]}
    tensors |= {f"{number:03d}{'x' * 1000}": torch.zeros(1) for number in range(500)}
    report = load_pretrained(make(backbone_of("resnet18")), write(tmp_path, tensors))
    lines = str(report).splitlines()
    assert len(lines) <= 20
    assert max(map(len, lines)) <= 400
    assert "mismatched: 99: bn1.weight (file [4, 1], ours [4]), " in str(report)
    assert "and 96 more" in str(report)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_types_of_numbers_become_ours(dtype: torch.dtype, tmp_path: Path, make: Make) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in published("resnet18").items()}
    network = make(backbone_of("resnet18"))
    load_pretrained(network, write(tmp_path, tensors))
    state = trunk_state(network)
    assert torch.equal(state["conv1.weight"], tensors["conv1.weight"].float())
    assert {tensor.dtype for tensor in state.values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet20"])
def test_backbones_without_published_weights_take_their_own_names(
    name: str, tmp_path: Path, make: Make
) -> None:
    backbone = MLP(input_shape=(6,), width=5, depth=1) if name == "mlp" else backbone_of(name)
    torch.manual_seed(1)
    state = {key: tensor for unit in backbone.build() for key, tensor in unit.state_dict().items()}
    network = make(backbone)
    report = load_pretrained(network, write(tmp_path, state))
    assert not report.missing
    assert not report.unused
    for key, tensor in trunk_state(network).items():
        assert torch.equal(tensor, state[key]), key


def test_the_family_with_other_weights_than_the_backbones_is_refused(tmp_path: Path, make: Make) -> None:
    network = make(backbone_of("resnet18", width=0.125), "etr_nlp")
    with pytest.raises(ValueError, match="network: must be of a family that trains 'resnet18' as it is"):
        load_pretrained(network, write(tmp_path, published("resnet18")))


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({}, "found nothing"),
        ({"a": torch.zeros(2), "b": torch.zeros(())}, r"found 'a' \[2\], 'b' \[\]"),
        ({"bn1.num_batches_tracked": torch.tensor(1)}, "found nothing"),
        ({"conv1.weight": torch.zeros(64, 3, 7, 7)}, r"found 'conv1.weight' \[64, 3, 7, 7\]"),
        ({"conv1.weight": torch.zeros(()), "fc.bias": torch.zeros(1)}, r"found 'conv1.weight' \[\]$"),
        (published("vit_tiny"), r"found 'blocks.0.attn.proj.bias' \[12\], .* and 149 more"),
    ],
)
def test_a_file_in_which_nothing_matches_is_refused_with_what_was_found_and_expected(
    tensors: dict[str, Tensor], found: str, tmp_path: Path, make: Make
) -> None:
    network = make(backbone_of("resnet18"))
    before = snapshot(network)
    path = write(tmp_path, tensors)
    expected = r"must hold weights of 'resnet18' .*, 'conv1.weight' \[4, 3, 7, 7\], .* and 97 more, "
    with pytest.raises(ValueError, match=expected + found) as refusal:
        load_pretrained(network, path)
    assert str(path) in str(refusal.value)
    assert_unchanged(network, before)


@pytest.mark.parametrize(
    ("tensor", "rule"),
    [
        (torch.full((4,), math.nan), "layer1.1.bn2.bias: must be finite"),
        (torch.full((4,), math.inf), "layer1.1.bn2.bias: must be finite"),
        (torch.full((4,), 1e300, dtype=torch.float64), "layer1.1.bn2.bias: must be finite in float32"),
        (torch.zeros(4, dtype=torch.int8), "layer1.1.bn2.bias: must be of a type in .*, found 'I8'"),
        (torch.zeros(4, dtype=torch.complex64), "layer1.1.bn2.bias: must be of a type in .*, found 'C64'"),
    ],
)
def test_weights_that_are_no_finite_numbers_are_refused_and_nothing_is_copied(
    tensor: Tensor, rule: str, tmp_path: Path, make: Make
) -> None:
    network = make(backbone_of("resnet18"))
    before = snapshot(network)
    with pytest.raises(ValueError, match=rule):
        load_pretrained(network, write(tmp_path, published("resnet18") | {"layer1.1.bn2.bias": tensor}))
    assert_unchanged(network, before)


def _file(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04\x95pickled, once",
        _file(b"not json"),
        _file([]),
        _file({}, length=2**60),
        _file({"conv1.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}, b"1234"),
        _file({"conv1.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12"),
        _file({"conv1.weight": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
        _file({"conv1.weight": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"1234"),
        _file({"conv1.weight": {"dtype": "O", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    ],
)
def test_a_damaged_or_hostile_file_is_refused_by_its_path(content: bytes, tmp_path: Path, make: Make) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    network = make(backbone_of("resnet18"))
    before = snapshot(network)
    with pytest.raises(ValueError, match=r"weights\.safetensors: ") as refusal:
        load_pretrained(network, path)
    assert str(path) in str(refusal.value)
    assert_unchanged(network, before)


def test_a_truncated_file_is_refused_by_its_path(tmp_path: Path, make: Make) -> None:
    path = write(tmp_path, published("vit_tiny"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"weights\.safetensors: "):
        load_pretrained(make(backbone_of("vit_tiny")), path)


def test_a_file_that_is_not_there_is_an_error_of_the_system(tmp_path: Path, make: Make) -> None:
    with pytest.raises(FileNotFoundError):
        load_pretrained(make(backbone_of("resnet18")), tmp_path / "none.safetensors")
