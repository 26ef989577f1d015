"""ETR-NLP: fixed primitives, and channels that belong to tasks."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from coterie.models.backbones import BACKBONES, MLP, Backbone, ResNet18, ResNet20
from coterie.models.families import ETRNLP, Shared, build_network
from coterie.models.families.etr_nlp import draw_pattern, fitting_heads, label
from coterie.models.layers import FixedNoise, RandomConv, RandomProjection
from coterie.models.tasks import Task, TaskKind, TaskSet
from tests.models.not_numbers import NO_NUMBERS

BATCH = 2

# Each at the smallest width that leaves three tasks a part in `split` at gamma 0.5 or nearly so.
SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"input_shape": (6,), "width": 12, "depth": 2},
    "cnn": {"input_shape": (3, 8, 8), "width": 0.125},
    "resnet20": {"input_shape": (3, 8, 8), "width": 0.5},
    "resnet18": {"input_shape": (3, 16, 16), "width": 0.125},
    "resnet50_dilated": {"input_shape": (3, 16, 16), "width": 0.125},
    "vit_tiny": {"input_shape": (3, 8, 8), "width": 0.125},
    "vit_small": {"input_shape": (3, 8, 8), "width": 0.0625},
}
CONVOLUTIONAL = ("cnn", "resnet20", "resnet18", "resnet50_dilated")
PRIMITIVES = ("random_conv", "max_pool", "avg_pool", "identity", "noise")
DENSE_TASKS = TaskSet(
    [
        Task(name="a", kind=TaskKind.BINARY),
        Task(name="b", kind=TaskKind.SEGMENTATION, outputs=3),
        Task(name="c", kind=TaskKind.NORMALS, outputs=3),
    ]
)

MakeTasks = Callable[..., TaskSet]


def small(name: str) -> Backbone:
    return BACKBONES[name](**SMALL[name])


def build(backbone: Backbone, tasks: TaskSet, **parameters: Any) -> ETRNLP:
    torch.manual_seed(0)
    network = build_network("etr_nlp", backbone=backbone, tasks=tasks, parameters=parameters)
    assert isinstance(network, ETRNLP)
    return network


def batch(backbone: Backbone, tasks: TaskSet) -> tuple[Tensor, dict[str, Tensor]]:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, *backbone.input_shape, generator=random)
    return x, {name: torch.randint(2, (BATCH,), generator=random) for name in tasks.names}


def train(network: ETRNLP, steps: int) -> list[float]:
    x, targets = batch(network.backbone, network.tasks)
    optimizer = torch.optim.Adam(network.parameter_groups(lr=1e-2, weight_decay=1e-2))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = network.training_loss(x, targets, torch.Generator())
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def primitives(network: nn.Module) -> Iterator[Tensor]:
    for module in network.modules():
        if isinstance(module, RandomConv | RandomProjection):
            yield module.weight
        elif isinstance(module, FixedNoise):
            yield module.noise


def owned(network: ETRNLP, task: int) -> dict[str, nn.Parameter]:
    return {
        name: parameter
        for name, parameter in network.named_parameters()
        if f".tasks.{task}." in name or f".heads.{task}." in name
    }


def assert_isolated(network: ETRNLP, outputs: dict[str, Tensor]) -> None:
    """Each weight moves the answers of its owners, and of nobody else."""
    names = network.tasks.names
    own = [owned(network, t) for t in range(len(names))]
    for s, name in enumerate(names):
        network.zero_grad()
        torch.autograd.backward(outputs[name].square().sum(), retain_graph=True)
        for t, parameters in enumerate(own):
            reached = [p.grad is not None and bool(p.grad.any()) for p in parameters.values()]
            assert any(reached) if s == t else not any(reached)
        mine = own[s].values()
        assert all(parameter.grad is not None for parameter in mine)
        others = {id(p) for parameters in own for p in parameters.values()}
        assert all(p.grad is not None for p in network.parameters() if id(p) not in others)


@pytest.mark.parametrize(
    ("name", "own_width"), [*((name, "split") for name in BACKBONES), ("mlp", "full"), ("resnet20", "full")]
)
def test_no_loss_moves_another_tasks_weights(name: str, own_width: str, make_tasks: MakeTasks) -> None:
    network = build(small(name), make_tasks(1.0, 1.0, 1.0), own_width=own_width, primitives=PRIMITIVES)
    assert_isolated(network, network(batch(network.backbone, network.tasks)[0]))


@pytest.mark.parametrize("name", ["resnet20", "resnet50_dilated", "vit_tiny"])
def test_dense_tasks_are_answered_on_maps_and_isolated(name: str) -> None:
    network = build(small(name), DENSE_TASKS)
    x, _ = batch(network.backbone, DENSE_TASKS)
    outputs = network(x)
    height, width = network.backbone.input_shape[-2:]
    assert outputs["a"].shape == (BATCH,)
    assert outputs["b"].shape == outputs["c"].shape == (BATCH, 3, height, width)
    assert_isolated(network, outputs)


@pytest.mark.parametrize(
    ("name", "own_width"), [("cnn", "full"), ("resnet20", "split"), ("resnet50_dilated", "full")]
)
def test_fused_parts_compute_and_learn_what_the_parts_do(
    name: str, own_width: str, make_tasks: MakeTasks
) -> None:
    """In float64, so that only a mistake shows; the statistics of batch norms are in the state."""
    network = build(
        small(name), make_tasks(1.0, 1.0, 1.0), own_width=own_width, primitives=PRIMITIVES
    ).double()
    apart = copy.deepcopy(network).network
    again = copy.deepcopy(network)
    x = batch(network.backbone, network.tasks)[0].double()
    for fused in (network, again):
        apart.zero_grad()
        apart.load_state_dict(fused.network.state_dict())
        outputs, expected = fused(x), apart(x)
        torch.testing.assert_close(outputs, expected)
        for values in (outputs, expected):
            torch.autograd.backward(
                sum((factor * y).sin().sum() for factor, y in enumerate(values.values(), 1))
            )
        for parameter, other in zip(fused.network.parameters(), apart.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad)
        torch.testing.assert_close(fused.network.state_dict(), apart.state_dict())


@pytest.mark.parametrize("name", BACKBONES)
def test_pruning_gives_the_same_outputs_from_a_copy(name: str, make_tasks: MakeTasks) -> None:
    network = build(small(name), make_tasks(1.0, 2.0, 1.0), primitives=PRIMITIVES)
    train(network, steps=1)
    x, _ = batch(network.backbone, network.tasks)
    static = network.prune()
    assert network.training
    assert not static.training
    expected, found = network.eval()(x), static(x)
    assert list(found) == list(expected)
    for task in expected:
        torch.testing.assert_close(found[task], expected[task])
    with torch.no_grad():
        for tensor in [*static.parameters(), *static.buffers()]:
            tensor.zero_()
    again = network(x)
    assert all(torch.equal(again[task], expected[task]) for task in expected)


@pytest.mark.parametrize("name", BACKBONES)
def test_primitives_stay_in_training_and_come_back_with_the_weights(name: str, make_tasks: MakeTasks) -> None:
    network = build(small(name), make_tasks(1.0, 1.0, 1.0), primitives=PRIMITIVES, primitive_seed=3)
    before = [tensor.clone() for tensor in primitives(network)]
    weights = [parameter.detach().clone() for parameter in network.parameters()]
    assert before
    assert not {id(tensor) for tensor in primitives(network)} & {id(p) for p in network.parameters()}
    train(network, steps=2)
    assert all(map(torch.equal, before, primitives(network)))
    assert not any(map(torch.equal, weights, network.parameters()))

    other = build(small(name), make_tasks(1.0, 1.0, 1.0), primitives=PRIMITIVES, primitive_seed=4)
    assert not all(map(torch.equal, before, primitives(other)))
    other.restore(network.state_dict())
    assert all(map(torch.equal, before, primitives(other)))
    x, _ = batch(network.backbone, network.tasks)
    expected, found = network.eval()(x), other.eval()(x)
    assert all(torch.equal(found[task], expected[task]) for task in expected)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_it_has_fewer_weights_than_the_shared_network_of_the_same_width(
    name: str, gamma: float, make_tasks: MakeTasks
) -> None:
    tasks = make_tasks(1.0, 1.0, 1.0)
    network, shared = build(small(name), tasks, gamma=gamma), Shared(backbone=small(name), tasks=tasks)

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(network) < count(shared)


@pytest.mark.parametrize("name", BACKBONES)
def test_all_learned_filters_behind_the_stem_see_one_place(name: str, make_tasks: MakeTasks) -> None:
    network = build(small(name), make_tasks(1.0, 1.0))
    wide = {
        key
        for key, module in network.network.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
    }
    stem = {"mlp": None, "vit_tiny": "patch_embed.proj", "vit_small": "patch_embed.proj"}.get(name, "conv1")
    assert wide <= {f"{stem}.{label(part)}" for part in range(3)}


@pytest.mark.parametrize("name", BACKBONES)
def test_one_pass_answers_all_tasks(name: str, make_tasks: MakeTasks) -> None:
    """Each module runs once, however many tasks read what it gives."""
    network = build(small(name), make_tasks(1.0, 1.0, 1.0), primitives=PRIMITIVES).prune()
    calls: Counter[str] = Counter()
    leaves = {key: module for key, module in network.named_modules() if not list(module.children())}
    for key, module in leaves.items():
        module.register_forward_hook(lambda *_, key=key: calls.update([key]))
    network(batch(small(name), make_tasks(1.0))[0])
    assert calls == Counter(dict.fromkeys(leaves, 1))


@pytest.mark.parametrize("name", BACKBONES)
def test_one_task_shares_everything_whatever_gamma_is(name: str, make_tasks: MakeTasks) -> None:
    tasks = make_tasks(1.0)
    half, whole = build(small(name), tasks, gamma=0.5), build(small(name), tasks, gamma=1)
    assert half.network.graph == whole.network.graph
    assert not any("tasks" in node.name for node in half.network.nodes)


def test_all_tasks_share_everything_but_heads_at_gamma_one(make_tasks: MakeTasks) -> None:
    network = build(small("cnn"), make_tasks(1.0, 1.0), gamma=1.0)
    assert not any("tasks" in node.name for node in network.network.nodes)
    train(network, steps=1)
    assert network.grouping is None
    assert list(network.trunks()) == []


def channels(network: ETRNLP, layer: str) -> list[int]:
    settings = {node.name: node.settings for node in network.network.nodes}
    return [settings[f"{layer}.{label(part)}"]["outputs"] for part in range(1 + len(network.tasks))]  # type: ignore[misc]


@given(
    width=st.integers(8, 40),
    tasks=st.integers(2, 4),
    gamma=st.floats(0.01, 0.99),
)
def test_a_layers_channels_are_dealt_out_or_the_least_that_fit_are_named(
    width: int, tasks: int, gamma: float
) -> None:
    task_set = TaskSet(Task(name=str(t), kind=TaskKind.BINARY) for t in range(tasks))
    backbone = MLP(input_shape=(3,), width=width, depth=2)
    try:
        network = build(backbone, task_set, gamma=gamma)
    except ValueError as error:
        least = int(str(error).split("at least ")[1].split()[0])
        assert least > width
        if least < 200:
            build(replace(backbone, width=least), task_set, gamma=gamma)
            with pytest.raises(ValueError, match="width: must give each layer"):
                build(replace(backbone, width=least - 1), task_set, gamma=gamma)
    else:
        shared, *own = channels(network, "linear2")
        assert shared == round(gamma * width) >= 1
        assert sum(own) == width - shared
        assert max(own) - min(own) <= 1 <= min(own)


def test_full_width_gives_each_task_the_rest_of_the_width(make_tasks: MakeTasks) -> None:
    backbone = MLP(input_shape=(3,), width=10, depth=2)
    assert channels(build(backbone, make_tasks(1.0, 1.0, 1.0), gamma=0.3, own_width="full"), "linear1") == [
        3,
        7,
        7,
        7,
    ]


def test_a_head_of_attention_is_about_as_wide_as_the_backbones(make_tasks: MakeTasks) -> None:
    network = build(small("vit_small"), make_tasks(1.0, 1.0))  # six heads of 4: parts of 12, 6 and 6
    heads = {node.name: node.settings["heads"] for node in network.network.nodes if node.kind == "attention"}
    assert heads["blocks.3.attn.mix.shared"] == 3
    assert heads["blocks.3.attn.mix.tasks.1"] == 2


@given(st.integers(1, 400), st.integers(1, 64))
def test_heads_divide_the_channels_and_none_fits_better(channels: int, width: int) -> None:
    heads = fitting_heads(channels, width)
    assert channels % heads == 0

    def misfit(number: int) -> float:
        return max(channels / number / width, width * number / channels)

    assert misfit(heads) == min(misfit(number) for number in range(1, channels + 1) if channels % number == 0)


@pytest.mark.parametrize("only", PRIMITIVES)
@pytest.mark.parametrize("name", ["cnn", "mlp", "vit_tiny"])
def test_each_primitive_works_alone_where_there_is_room_for_it(
    name: str, only: str, make_tasks: MakeTasks
) -> None:
    tasks = make_tasks(1.0, 1.0)
    if only in {"max_pool", "avg_pool"} and name in {"mlp", "vit_tiny"}:
        with pytest.raises(ValueError, match=f"primitives: of '{name}' must include one of"):
            build(small(name), tasks, primitives=[only])
        return
    network = build(small(name), tasks, primitives=(only,))
    banks = {node.kind for node in network.network.nodes if ".bank." in node.name}
    kinds = {"random_conv": {"random_conv", "random_projection"}, "noise": {"fixed_noise"}}.get(only, {only})
    assert banks <= kinds | {"relu", "subsample"}
    train(network, steps=1)
    outputs = network(batch(small(name), tasks)[0])
    assert all(output.isfinite().all() for output in outputs.values())


def test_a_strided_bank_pools_and_takes_every_second_place(make_tasks: MakeTasks) -> None:
    network = build(small("resnet20"), make_tasks(1.0, 1.0), primitives=PRIMITIVES, dilation=2)
    settings = {node.name: dict(node.settings) for node in network.network.nodes}
    bank = "layer2.0.conv1.bank.shared"
    pool = {"kernel": 3, "stride": 2, "padding": 1}
    assert settings[f"{bank}.identity.subsample"] == {"stride": 2}
    assert settings[f"{bank}.max_pool.max_pool"] == settings[f"{bank}.avg_pool.avg_pool"] == pool
    random = settings[f"{bank}.random_conv.random_conv"]
    assert random == {"channels": 4, "kernel": 3, "stride": 2, "padding": 2, "dilation": 2}


@given(st.integers(1, 20), st.integers(1, 60), st.floats(1e-6, 1), st.integers(0, 2**63 - 1))
def test_patterns_are_sparse_signs_in_rows_of_length_one_and_their_seed_fixes_them(
    rows: int, columns: int, density: float, seed: int
) -> None:
    def draw() -> Tensor:
        return draw_pattern(rows, columns, density, torch.Generator().manual_seed(seed))

    pattern, before = draw(), torch.get_rng_state()
    entries = max(1, round(density * columns))
    assert (pattern != 0).sum(dim=1).tolist() == [entries] * rows
    torch.testing.assert_close(pattern.abs().amax(dim=1), torch.full((rows,), entries**-0.5))
    torch.testing.assert_close(pattern.norm(dim=1), torch.ones(rows))
    assert torch.equal(draw(), pattern)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet20", "vit_tiny"])
def test_the_loss_falls(name: str, make_tasks: MakeTasks) -> None:
    losses = train(build(small(name), make_tasks(1.0, 1.0)), steps=10)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"gamma": 0}, "gamma: must be a number above 0 and at most 1, found 0"),
        ({"gamma": -0.5}, "gamma: must be"),
        ({"gamma": 1.01}, "gamma: must be"),
        ({"gamma": float("nan")}, "gamma: must be .* found nan"),
        ({"gamma": True}, "gamma: must be .* found True"),
        ({"density": 0.0}, "density: must be a number above 0 and at most 1, found 0.0"),
        ({"density": 1.5}, "density: must be"),
        ({"density": float("nan")}, "density: must be"),
        ({"own_width": "half"}, "own_width: must be one of .* found 'half'"),
        ({"primitives": []}, "primitives: must be a list of one or more of"),
        ({"primitives": 1}, "primitives: must be a list"),
        ({"primitives": None}, "primitives: must be a list"),
        ({"primitives": {"identity"}}, "primitives: must be a list"),
        ({"primitives": "identity"}, "primitives: must be a list"),
        ({"primitives": [1]}, "primitives: must be a list"),
        ({"primitives": [["identity"]]}, "primitives: must be a list"),
        ({"primitives": ["identity", "median"]}, "primitives: must be a list of one or more of"),
        ({"primitives": ["identity", "identity"]}, "primitives: must be .* each at most once"),
        ({"dilation": 0}, "dilation: must be a whole number from 1 to 16, found 0"),
        ({"dilation": 17}, "dilation: must be"),
        ({"primitive_seed": -1}, "primitive_seed: must be a whole number from 0"),
        ({"primitive_seed": 1.0}, "primitive_seed: must be"),
        ({"gamma": 0.9}, "width: must give each layer at least 25 channels with 3 tasks, .* found 16 in"),
        ({"gamma": 0.01, "own_width": "full"}, "width: must give each layer at least 51 channels"),
        ({"gamma": 1 - 1e-12}, "gamma: must leave the shared part and each of 3 tasks' a channel"),
        ({"gamma": 1e-9}, "gamma: must leave .* found 1e-09"),
        *(
            ({name: value}, f"{name}: must be a number above 0 and at most 1")
            for name in ("gamma", "density")
            for value in NO_NUMBERS
        ),
        *(
            ({name: value}, f"{name}: must be a whole number")
            for name in ("dilation", "primitive_seed")
            for value in NO_NUMBERS
        ),
    ],
)
def test_impossible_settings_are_refused_by_name_before_anything_is_allocated(
    parameters: dict[str, Any], message: str, make_tasks: MakeTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(*_: object, **__: object) -> None:
        raise AssertionError("a network was built")

    monkeypatch.setattr("coterie.models.families.etr_nlp.StaticNetwork", allocate)
    with pytest.raises(ValueError, match=message):
        build(ResNet20(input_shape=(3, 8, 8), width=1.0), make_tasks(1.0, 1.0, 1.0), **parameters)


def test_a_part_of_one_channel_is_refused_where_a_layer_norm_reads_it(make_tasks: MakeTasks) -> None:
    backbone = replace(small("vit_tiny"), width=1 / 64)
    with pytest.raises(ValueError, match=r"width: must give each layer at least 8 channels with 3 tasks"):
        build(backbone, make_tasks(1.0, 1.0, 1.0), gamma=0.3)


def test_a_backbone_without_maps_is_refused_for_dense_tasks() -> None:
    with pytest.raises(ValueError, match="kind: 'b' is a segmentation task"):
        build(small("mlp"), DENSE_TASKS)


def test_it_runs_on_images_without_a_channel_axis(make_tasks: MakeTasks) -> None:
    backbone = ResNet18(input_shape=(16, 16), width=0.125)
    network = build(backbone, make_tasks(1.0, 1.0))
    assert network(batch(backbone, network.tasks)[0])["a"].shape == (BATCH,)
