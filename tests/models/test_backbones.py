import copy
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from coterie.models.backbones import (
    BACKBONES,
    CNN,
    MLP,
    Backbone,
    ResNet18,
    ResNet20,
    ResNet50Dilated,
    ViTSmall,
    ViTTiny,
)
from coterie.models.backbones.base import ImageBackbone
from coterie.models.backbones.vit import DEPTH, ViT
from coterie.models.families import build_network
from coterie.models.graph import INPUT, Layers
from coterie.models.heads import Head, Necks
from coterie.models.layers import channel_axis
from coterie.models.tasks import DENSE, Task, TaskKind, TaskSet

IMAGE_BACKBONES = {
    name: backbone for name, backbone in BACKBONES.items() if issubclass(backbone, ImageBackbone)
}
SMALL_IMAGE: dict[str, Any] = {"input_shape": (3, 16, 16), "width": 0.0625}
OUTPUTS = {TaskKind.MULTICLASS: 3, TaskKind.SEGMENTATION: 4, TaskKind.NORMALS: 3}
# Of the task weights that a network holds before it checks the family's own arguments, with room to spare.
A_FEW_BYTES = 256

mlps = st.builds(
    MLP,
    input_shape=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    width=st.integers(1, 9),
    depth=st.integers(1, 4),
)


@st.composite
def images(draw: st.DrawFn) -> Backbone:
    """Image backbones of any kind on inputs of any allowed size, thin ones so that they are fast."""
    kind = draw(st.sampled_from(list(IMAGE_BACKBONES.values())))
    side = st.integers(kind.least_side, kind.least_side + 20)
    shape = (draw(side), draw(side))
    width = draw(st.sampled_from((0.04, 0.05, 0.0625)))
    if draw(st.booleans()):
        return kind(input_shape=shape, width=width)
    return kind(input_shape=(draw(st.integers(1, 4)), *shape), width=width)


anything = st.one_of(mlps, images())


def small(name: str) -> Backbone:
    if name == "mlp":
        return MLP(input_shape=(3, 2), width=5, depth=3)
    return BACKBONES[name](**SMALL_IMAGE)


def run(backbone: Backbone, batch: int = 2) -> list[Tensor]:
    """Each unit's output."""
    torch.manual_seed(0)
    values, x = [], torch.randn(batch, *backbone.input_shape)
    for unit in backbone.build():
        x = unit(x)
        values.append(x)
    return values


class _Allocations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.device.type != "meta":
            self.bytes += result.nbytes
        return result


@contextmanager
def nothing_is_allocated() -> Iterator[None]:
    with _Allocations() as allocations:
        yield
    assert allocations.bytes <= A_FEW_BYTES


def test_the_guard_against_allocations_sees_them() -> None:
    with pytest.raises(AssertionError), nothing_is_allocated():
        small("cnn").build()


@settings(max_examples=30)
@given(anything, st.integers(2, 3))
def test_the_units_chain_from_the_input_to_the_features_with_the_shapes_that_were_told(
    backbone: Backbone, batch: int
) -> None:
    values = run(backbone, batch)
    assert len(values) == backbone.units
    assert tuple(tuple(value.shape) for value in values) == tuple(
        (batch, *shape) for shape in backbone.output_shapes
    )
    for task in (Task(name="a", kind=TaskKind.BINARY), Task(name="b", kind=TaskKind.DEPTH)):
        if isinstance(backbone, MLP) and task.kind in DENSE:
            continue
        head = Head(task, backbone)
        features = Necks(backbone, [task])(values[-1])[head.reads]
        assert features.shape == (batch, *backbone.feature_shape(head.reads))
        places = backbone.input_shape[-2:] if task.kind in DENSE else ()
        assert head(features).shape == (batch, *places)


@settings(max_examples=30)
@given(anything)
def test_the_plan_is_a_chain_of_units_with_weights(backbone: Backbone) -> None:
    plan = backbone.plan()
    names = [node.name for unit in plan for node in unit.nodes]
    assert len(set(names)) == len(names)
    for unit, built in zip(plan, backbone.build(), strict=True):
        inside = {node.name for node in unit.nodes}
        assert unit.nodes[0].inputs == (INPUT,)
        for number, node in enumerate(unit.nodes):
            earlier = {INPUT, *(before.name for before in unit.nodes[:number])}
            assert set(node.inputs) <= earlier
        read = {name for node in unit.nodes for name in node.inputs}
        assert inside - read == {unit.nodes[-1].name}
        assert any(True for _ in built.parameters())
    assert backbone.sites == tuple(site for unit in plan for site in unit.sites)


@settings(max_examples=30)
@given(anything)
def test_each_site_names_a_node_of_its_unit_whose_channels_its_gates_cover(backbone: Backbone) -> None:
    x = torch.randn(2, *backbone.input_shape)
    for unit, built in zip(backbone.plan(), backbone.build(), strict=True):
        order = {node.name: number for number, node in enumerate(unit.nodes)}
        places = [order[site.node] for site in unit.sites]
        assert places == sorted(set(places))
        values = Layers(unit.nodes, order).run(x)
        for site in unit.sites:
            value = values[site.node]
            assert value.shape[channel_axis(value)] == site.gates * site.block
        x = built(x)


_VIT_SITES = [
    "embed",
    *(f"blocks.{b}.{part}" for b in range(DEPTH) for part in ("attn.mix", "attn.proj", "mlp.act", "mlp.fc2")),
    "norm",
]


@pytest.mark.parametrize(
    ("name", "sites"),
    [
        ("mlp", ["relu1", "relu2", "relu3"]),
        ("cnn", ["pool1", "block.relu1", "pool2"]),
        (
            "resnet20",
            ["relu", *(f"layer{s}.{b}.{r}" for s in (1, 2, 3) for b in range(3) for r in ("relu1", "relu"))],
        ),
        (
            "resnet18",
            [
                "maxpool",
                *(f"layer{s}.{b}.{r}" for s in (1, 2, 3, 4) for b in (0, 1) for r in ("relu1", "relu")),
            ],
        ),
        (
            "resnet50_dilated",
            [
                "maxpool",
                *(
                    f"layer{stage}.{block}.{relu}"
                    for stage, blocks in enumerate((3, 4, 6, 3), start=1)
                    for block in range(blocks)
                    for relu in ("relu1", "relu2", "relu")
                ),
            ],
        ),
        ("vit_tiny", _VIT_SITES),
        ("vit_small", _VIT_SITES),
    ],
)
def test_the_sites_are_those_that_interrogate_gates(name: str, sites: list[str]) -> None:
    """Every convolution of a residual block, every linear layer, attention by whole heads."""
    backbone = small(name)
    assert [site.node for site in backbone.sites] == sites
    for site in backbone.sites:
        attends = site.node.endswith("attn.mix")
        assert site.block == (round(64 * SMALL_IMAGE["width"]) if attends else 1)


@pytest.mark.parametrize(
    ("backbone", "published"),
    [
        (ResNet18(input_shape=(3, 224, 224)), 11_176_512),
        (ResNet50Dilated(input_shape=(3, 224, 224)), 23_508_032),
        (ViTTiny(input_shape=(3, 224, 224)), 5_524_416),
        (ViTSmall(input_shape=(3, 224, 224)), 21_665_664),
        # The paper's identity shortcuts pad with zeros and have no weights (269,072 without the classifier);
        # ours project, as later work does: 16 * 32 + 2 * 32 and 32 * 64 + 2 * 64 more.
        (ResNet20(input_shape=(3, 32, 32)), 269_072 + 576 + 2_176),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_trunks_have_the_published_number_of_parameters(backbone: Backbone, published: int) -> None:
    with torch.device("meta"):
        units = backbone.build()
    assert sum(parameter.numel() for parameter in units.parameters()) == published


@pytest.mark.parametrize(
    ("backbone", "shapes"),
    [
        (CNN(input_shape=(3, 64, 64)), ((64, 31, 31), (64, 15, 15))),
        (
            ResNet18(input_shape=(3, 224, 224)),
            (
                (64, 56, 56),
                *[(64, 56, 56)] * 2,
                *[(128, 28, 28)] * 2,
                *[(256, 14, 14)] * 2,
                *[(512, 7, 7)] * 2,
            ),
        ),
        (
            ResNet20(input_shape=(3, 32, 32), width=0.5),
            ((8, 32, 32), *[(8, 32, 32)] * 3, *[(16, 16, 16)] * 3, *[(32, 8, 8)] * 3),
        ),
        (
            ResNet50Dilated(input_shape=(3, 224, 224)),
            (
                (64, 56, 56),
                *[(256, 56, 56)] * 3,
                *[(512, 28, 28)] * 4,
                *[(1024, 28, 28)] * 6,
                *[(2048, 28, 28)] * 3,
            ),
        ),
        (ViTTiny(input_shape=(3, 224, 224)), ((197, 192),) * 13),
        (ViTSmall(input_shape=(3, 96, 128)), ((6 * 8 + 1, 384),) * 13),
        (MLP(input_shape=(2, 4), width=7, depth=2), ((7,), (7,))),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_published_networks_have_their_known_shapes(
    backbone: Backbone, shapes: tuple[tuple[int, ...], ...]
) -> None:
    assert backbone.output_shapes == shapes


def test_a_head_on_the_celeba_network_reads_14400_numbers() -> None:
    assert CNN(input_shape=(3, 64, 64)).feature_shape("vector") == (14_400,)


def test_the_dilated_network_sees_as_far_as_the_strided_one() -> None:
    dilations = {
        node.name: node.settings["dilation"]
        for unit in ResNet50Dilated(input_shape=(3, 64, 64)).plan()
        for node in unit.nodes
        if node.name.endswith("conv2")
    }
    assert [dilations[f"layer3.{block}.conv2"] for block in range(6)] == [1, 2, 2, 2, 2, 2]
    assert [dilations[f"layer4.{block}.conv2"] for block in range(3)] == [2, 4, 4]
    assert {dilations[f"layer{stage}.0.conv2"] for stage in (1, 2)} == {1}


def _resnet_names(blocks: tuple[int, ...], convolutions: int, projected: int) -> set[str]:
    names = {"conv1", "bn1"}
    for stage, number in enumerate(blocks, start=1):
        for block in range(number):
            for layer in range(1, convolutions + 1):
                names |= {f"layer{stage}.{block}.conv{layer}", f"layer{stage}.{block}.bn{layer}"}
        if stage >= projected:
            names |= {f"layer{stage}.0.downsample.{part}" for part in (0, 1)}
    return names


def _vit_names() -> set[str]:
    parts = ("norm1", "attn.q", "attn.k", "attn.v", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    return {"patch_embed.proj", "embed", "norm"} | {
        f"blocks.{b}.{part}" for b in range(DEPTH) for part in parts
    }


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("resnet18", _resnet_names((2, 2, 2, 2), 2, projected=2)),
        ("resnet50_dilated", _resnet_names((3, 4, 6, 3), 3, projected=1)),
        ("vit_tiny", _vit_names()),
        ("vit_small", _vit_names()),
    ],
)
def test_layers_with_weights_are_named_as_in_torchvision_and_timm(name: str, published: set[str]) -> None:
    state = small(name).build().state_dict()
    assert {key.split(".", 1)[1].rpartition(".")[0] for key in state} == published


@pytest.mark.parametrize("name", IMAGE_BACKBONES)
@pytest.mark.parametrize("shape", [(33, 47), (1, 33, 47), (5, 48, 32)])
def test_odd_sizes_and_channels_are_as_good_as_any(name: str, shape: tuple[int, ...]) -> None:
    backbone = IMAGE_BACKBONES[name](input_shape=shape, width=0.0625)
    for value, told in zip(run(backbone), backbone.output_shapes, strict=True):
        assert value.isfinite().all()
        assert tuple(value.shape[1:]) == told


@pytest.mark.parametrize("name", IMAGE_BACKBONES)
def test_an_image_without_a_channel_axis_is_one_of_a_single_channel(name: str) -> None:
    flat, deep = (IMAGE_BACKBONES[name](input_shape=shape, width=0.0625) for shape in ((16, 18), (1, 16, 18)))
    torch.manual_seed(0)
    one = nn.Sequential(*flat.build()).eval()
    torch.manual_seed(0)
    other = nn.Sequential(*deep.build()).eval()
    x = torch.randn(2, 16, 18)
    assert torch.equal(one(x), other(x.unsqueeze(1)))


@pytest.mark.parametrize(
    ("shape", "side"),
    [((3, 224, 224), 16), ((3, 64, 64), 16), ((3, 32, 32), 8), ((30, 30), 2), ((12, 20), 2), ((7, 9), 1)],
)
def test_a_vit_takes_the_largest_patch_that_leaves_enough_of_them(shape: tuple[int, ...], side: int) -> None:
    backbone = ViTTiny(input_shape=shape, width=0.0625)
    assert backbone.patch_side == side
    assert backbone.grid == (shape[-2] // side, shape[-1] // side)
    assert backbone.output_shapes[-1] == (backbone.grid[0] * backbone.grid[1] + 1, backbone.stream)


def test_a_vits_map_has_its_patches_where_they_are_in_the_image() -> None:
    backbone = ViTTiny(input_shape=(3, 8, 12), width=0.0625, patch=4)
    tokens = torch.arange(7.0).view(1, 7, 1).expand(1, 7, backbone.stream)
    task = Task(name="a", kind=TaskKind.DEPTH)
    grid = Necks(backbone, [task])(tokens)["map"]
    assert grid[0, 0].tolist() == [[1, 2, 3], [4, 5, 6]]
    token = Necks(backbone, [Task(name="b", kind=TaskKind.BINARY)])(tokens)["vector"]
    assert token.unique().tolist() == [0]


def test_a_vits_block_attends_and_feeds_forward_on_a_residual_stream() -> None:
    """Against the textbook's formulas, written out."""
    backbone = ViTTiny(input_shape=(1, 4, 4), width=0.0625)
    torch.manual_seed(0)
    block = backbone.build()[1]
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    state = {name.removeprefix("blocks.0."): value for name, value in block.state_dict().items()}
    x = torch.randn(2, 17, backbone.stream)

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return centred / scale * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    normed = norm("norm1", x)
    q, k, v = (linear(f"attn.{part}", normed).unflatten(-1, (3, -1)) for part in "qkv")
    weights = torch.einsum("bnhc,bmhc->bhnm", q, k).div(math.sqrt(q.shape[-1])).softmax(-1)
    mixed = torch.einsum("bhnm,bmhc->bnhc", weights, v).flatten(2)
    middle = x + linear("attn.proj", mixed)
    hidden = linear("mlp.fc1", norm("norm2", middle))
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(block(x), middle + linear("mlp.fc2", hidden), rtol=1e-4, atol=1e-4)


def test_an_mlp_is_relu_after_linear_on_the_flat_input() -> None:
    torch.manual_seed(0)
    stem, hidden = MLP(input_shape=(2, 3), width=4, depth=2).build()
    (w1, b1), (w2, b2) = stem.parameters(), hidden.parameters()
    x = torch.randn(5, 2, 3)
    expected = (((x.reshape(5, 6) @ w1.T + b1).clamp(min=0)) @ w2.T + b2).clamp(min=0)
    torch.testing.assert_close(hidden(stem(x)), expected)


@given(anything)
def test_a_backbone_round_trips_through_json(backbone: Backbone) -> None:
    document = json.loads(json.dumps(backbone.to_dict()))
    assert BACKBONES[document["name"]].from_dict(document) == backbone


@pytest.mark.parametrize("name", BACKBONES)
def test_every_build_is_fresh_and_drawn_from_torchs_generator(name: str) -> None:
    def weights(units: nn.ModuleList) -> Tensor:
        return torch.cat([parameter.flatten() for parameter in units.parameters()]).detach()

    backbone = small(name)
    torch.manual_seed(0)
    first, second = weights(backbone.build()), weights(backbone.build())
    torch.manual_seed(0)
    assert torch.equal(weights(backbone.build()), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", BACKBONES)
def test_looking_at_shapes_draws_nothing_and_allocates_nothing(name: str) -> None:
    sizes = {"width": 9, "depth": 2} if name == "mlp" else {"width": 0.09}
    before = torch.get_rng_state()
    with nothing_is_allocated():
        backbone = BACKBONES[name](input_shape=(2, 20, 24), **sizes)
        assert backbone.output_shapes
        assert backbone.feature_shape("vector")
        assert backbone.sites
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", BACKBONES)
def test_units_can_be_copied(name: str) -> None:
    backbone = small(name)
    units = nn.Sequential(*backbone.build()).eval()
    twin = copy.deepcopy(units)
    x = torch.randn(2, *backbone.input_shape)
    assert torch.equal(units(x), twin(x))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert not torch.equal(units(x), twin(x))


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
def test_the_default_is_among_the_choices_to_search(backbone: type[Backbone]) -> None:
    assert backbone.defaults.keys() == backbone.choices.keys()
    for size, values in backbone.choices.items():
        assert backbone.defaults[size] in values
        for value in values:
            backbone(input_shape=(3, 32, 32), **{**backbone.defaults, size: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input_shape", ()),
        ("input_shape", (3, 0)),
        ("input_shape", (2**20, 2**20)),
        ("input_shape", [3]),
        ("input_shape", (3.0,)),
        ("width", 0),
        ("width", 10**9),
        ("width", 2.0),
        ("width", True),
        ("depth", 0),
        ("depth", 10**9),
        ("depth", math.nan),
    ],
)
def test_a_bad_size_of_an_mlp_is_refused_by_its_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}: must be"):
        MLP(**{"input_shape": (3,), "width": 2, "depth": 1, field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("backbone", IMAGE_BACKBONES.values(), ids=IMAGE_BACKBONES)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input_shape", (3, 16, 3)),
        ("input_shape", (3, 3, 16)),
        ("input_shape", (16,)),
        ("input_shape", (1, 3, 16, 16)),
        ("input_shape", (3, 16, -16)),
        ("input_shape", (3, 2**14, 2**14)),
        ("width", 0),
        ("width", -1.0),
        ("width", 0.001),
        ("width", 65),
        ("width", math.nan),
        ("width", math.inf),
        ("width", True),
        ("width", "1"),
        ("width", [1]),
        ("width", None),
    ],
)
def test_a_bad_size_of_an_image_backbone_is_refused_by_its_name_and_value(
    backbone: type[Backbone], field: str, value: object
) -> None:
    with nothing_is_allocated(), pytest.raises(ValueError, match=f"{field}: .*must .*found ") as refusal:
        backbone(**{**SMALL_IMAGE, field: value})
    assert repr(value) in str(refusal.value)


@pytest.mark.parametrize("backbone", IMAGE_BACKBONES.values(), ids=IMAGE_BACKBONES)
def test_the_smallest_allowed_image_and_width_work_and_smaller_ones_are_refused(
    backbone: type[ImageBackbone],
) -> None:
    side = backbone.least_side
    assert run(backbone(input_shape=(1, side, side), width=0.0625))[-1].isfinite().all()
    with pytest.raises(ValueError, match=f"sides of at least {side}, found"):
        backbone(input_shape=(1, side, side - 1))


@pytest.mark.parametrize("value", [0, -4, 5, 32, 4.0, True, "4", [4]])
@pytest.mark.parametrize("backbone", [ViTTiny, ViTSmall])
def test_a_patch_that_does_not_divide_is_refused(backbone: type[ViT], value: Any) -> None:
    with pytest.raises(ValueError, match="patch: must divide 16 and 24, found"):
        backbone(input_shape=(3, 16, 24), patch=value)


def test_an_image_of_too_many_patches_is_refused() -> None:
    with pytest.raises(
        ValueError, match="patch: must give at most 4096 patches of 224x227 places, found 50848"
    ):
        ViTTiny(input_shape=(3, 224, 227))


@pytest.mark.parametrize(
    "change",
    [{"name": "cnn"}, {"width": None}, {"colour": "red"}, {"input_shape": 3}, {"input_shape": ["3"]}],
)
def test_a_document_of_another_backbone_or_with_other_keys_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        MLP.from_dict(MLP(input_shape=(3,), width=2, depth=1).to_dict() | change)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_document_with_a_missing_key_is_refused(name: str) -> None:
    document = small(name).to_dict()
    del document["width"]
    with pytest.raises(ValueError, match="with the keys"):
        BACKBONES[name].from_dict(document)


@pytest.mark.parametrize("family", ["single", "shared"])
@pytest.mark.parametrize("kind", sorted(DENSE))
def test_a_dense_task_on_a_vector_is_refused_before_anything_is_allocated(
    family: str, kind: TaskKind
) -> None:
    tasks = TaskSet(
        [
            Task(name="fine", kind=TaskKind.BINARY),
            Task(name="dense", kind=kind, outputs=OUTPUTS.get(kind, 1)),
        ]
    )
    with nothing_is_allocated(), pytest.raises(ValueError, match=r"kind: 'dense' is a .* task: .*'mlp'"):
        build_network(family, backbone=small("mlp"), tasks=tasks, parameters={})


@pytest.mark.parametrize("name", BACKBONES)
def test_a_split_past_the_last_unit_is_refused_before_anything_is_allocated(name: str) -> None:
    backbone = small(name)
    tasks = TaskSet([Task(name="a", kind=TaskKind.BINARY)])
    rule = f"split: must be a whole number from 0 to {backbone.units - 1}.*found {backbone.units}"
    with nothing_is_allocated(), pytest.raises(ValueError, match=rule):
        build_network(
            "grouped",
            backbone=backbone,
            tasks=tasks,
            parameters={"grouping": [["a"]], "split": backbone.units},
        )


@pytest.mark.parametrize("kind", sorted(TaskKind))
@pytest.mark.parametrize("name", IMAGE_BACKBONES)
def test_every_kind_of_head_gives_the_shape_of_its_kind(name: str, kind: TaskKind) -> None:
    backbone = small(name)
    outputs = OUTPUTS.get(kind, 1)
    task = Task(name="a", kind=kind, outputs=outputs)
    head = Head(task, backbone)
    y = head(torch.randn(2, *backbone.feature_shape(head.reads)))
    channels = (outputs,) if outputs > 1 else ()
    assert y.shape == (2, *channels, *((16, 16) if kind in DENSE else ()))
    if kind is TaskKind.NORMALS:
        torch.testing.assert_close(y.norm(dim=1), torch.ones(2, 16, 16))
