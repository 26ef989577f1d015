"""The families whose grouping is given: single, shared and grouped."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from coterie.models.backbones import BACKBONES, MLP
from coterie.models.families import MultiTaskNetwork, build_network
from coterie.models.tasks import Grouping, TaskSet

BACKBONE = MLP(input_shape=(3, 2), width=5, depth=3)
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("single", {}),
    ("shared", {}),
    ("grouped", {"grouping": [["c", "a"], ["b"]], "split": 1}),
]

MakeTasks = Callable[..., TaskSet]


@pytest.fixture
def tasks(make_tasks: MakeTasks) -> TaskSet:
    return make_tasks(1.0, 2.0, 0.5)


def build(family: str, parameters: dict[str, Any], tasks: TaskSet, seed: int = 0) -> MultiTaskNetwork:
    torch.manual_seed(seed)
    return build_network(family, backbone=BACKBONE, tasks=tasks, parameters=parameters)


def batch(tasks: TaskSet, size: int = 7) -> tuple[Tensor, dict[str, Tensor]]:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(size, *BACKBONE.input_shape, generator=random)
    return x, {name: torch.randint(2, (size,), generator=random) for name in tasks.names}


def assert_equal_outputs(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize(
    ("family", "grouping"),
    [("shared", [["a", "b", "c"]]), ("single", [["a"], ["b"], ["c"]])],
)
def test_shared_and_single_are_grouped_with_one_group_and_with_one_a_task(
    family: str, grouping: list[list[str]], tasks: TaskSet
) -> None:
    special = build(family, {}, tasks, seed=1).eval()
    general = build("grouped", {"grouping": grouping}, tasks, seed=2).eval()
    general.load_state_dict(special.state_dict())
    x, _ = batch(tasks)
    assert_equal_outputs(special(x), general(x))
    assert special.grouping == general.grouping


@pytest.mark.parametrize("name", BACKBONES)
def test_single_networks_with_equal_weights_are_the_shared_one(name: str, make_tasks: MakeTasks) -> None:
    tasks = make_tasks(1.0, 2.0)
    backbone = BACKBONE if name == "mlp" else BACKBONES[name](input_shape=(3, 16, 16), width=0.0625)
    shared, single = (
        build_network(family, backbone=backbone, tasks=tasks, parameters={}).eval()
        for family in ("shared", "single")
    )
    (trunk,) = shared.trunks()
    for copy in single.trunks():
        for unit, source in zip(copy, trunk, strict=True):
            unit.load_state_dict(source.state_dict())
    single.heads.load_state_dict(shared.heads.state_dict())
    x = torch.randn(3, *backbone.input_shape)
    assert_equal_outputs(shared(x), single(x))
    assert_equal_outputs(shared.prune()(x), single.prune()(x))


@given(st.lists(st.integers(0, 3), min_size=3, max_size=3), st.integers(0, BACKBONE.units - 1))
def test_a_task_depends_on_the_prefix_its_groups_branch_and_its_head_alone(
    make_tasks: MakeTasks, labels: list[int], split: int
) -> None:
    tasks = make_tasks(1, 1, 1)
    grouping = Grouping.from_labels(labels)
    network = build("grouped", {"grouping": grouping.names(tasks), "split": split}, tasks)
    outputs = network(batch(tasks)[0])
    for t, name in enumerate(tasks.names):
        network.zero_grad()
        torch.autograd.backward(outputs[name].sum(), retain_graph=True)
        reached = {key for key, parameter in network.named_parameters() if parameter.grad is not None}
        own = ("prefix.", f"branches.{grouping.labels[t]}.", f"heads.{t}.")
        assert reached == {key for key, _ in network.named_parameters() if key.startswith(own)}


def test_the_outputs_are_those_of_the_chained_units(tasks: TaskSet) -> None:
    network = build("grouped", {"grouping": [["a", "c"], ["b"]], "split": 1}, tasks)
    x, _ = batch(tasks)
    expected = {
        name: network.heads[t](network.branches[k](network.prefix(x)))
        for t, (name, k) in enumerate({"a": 0, "b": 1, "c": 0}.items())
    }
    assert_equal_outputs(network(x), expected)
    assert network(x)["a"].shape == (7,)
    assert [len(list(part.children())) for part in (network.prefix, *network.branches)] == [1, 2, 2]


@given(st.lists(st.integers(0, 3), min_size=3, max_size=3), st.integers(0, BACKBONE.units - 1))
def test_every_unit_is_in_the_trunks_once_and_the_first_trunk_is_whole(
    make_tasks: MakeTasks, labels: list[int], split: int
) -> None:
    tasks = make_tasks(1, 1, 1)
    grouping = Grouping.from_labels(labels)
    network = build("grouped", {"grouping": grouping.names(tasks), "split": split}, tasks)
    first, *others = network.trunks()
    assert len(first) == BACKBONE.units
    assert [len(trunk) for trunk in others] == [BACKBONE.units - split] * (len(grouping) - 1)
    held = [parameter for trunk in network.trunks() for unit in trunk for parameter in unit.parameters()]
    heads = {id(parameter) for parameter in network.heads.parameters()}
    assert len(held) == len(set(map(id, held)))
    assert {id(parameter) for parameter in network.parameters()} - heads == set(map(id, held))


@given(st.lists(st.integers(0, 3), min_size=3, max_size=3), st.integers(0, BACKBONE.units - 1))
def test_the_static_network_says_which_task_uses_which_weights(
    make_tasks: MakeTasks, labels: list[int], split: int
) -> None:
    tasks = make_tasks(1, 1, 1)
    grouping = Grouping.from_labels(labels)
    static = build("grouped", {"grouping": grouping.names(tasks), "split": split}, tasks).prune()
    readers = {"prefix": tasks.names}
    readers |= {f"groups.{k}": tuple(group) for k, group in enumerate(grouping.names(tasks))}
    readers |= {f"heads.{t}": (name,) for t, name in enumerate(tasks.names)}
    users = static.graph.users()
    for node in static.graph.nodes:
        if node.kind == "linear":  # layers without weights may serve several groups
            (part,) = (part for part in readers if node.name.startswith(f"{part}."))
            assert users[node.name] == readers[part], node.name


@pytest.mark.parametrize(("family", "parameters"), FAMILIES)
def test_the_loss_is_the_weighted_sum_and_draws_nothing(
    family: str, parameters: dict[str, Any], tasks: TaskSet
) -> None:
    network = build(family, parameters, tasks)
    x, targets = batch(tasks)
    generator = torch.Generator().manual_seed(5)
    before, global_before = generator.get_state(), torch.get_rng_state()
    loss = network.training_loss(x, targets, generator)
    expected = sum(
        task.weight * F.binary_cross_entropy_with_logits(network(x)[task.name], targets[task.name].float())
        for task in tasks
    )
    torch.testing.assert_close(loss, expected)
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), global_before)


@pytest.mark.parametrize(("family", "parameters"), FAMILIES)
def test_one_optimizer_moves_every_parameter_and_the_loss_falls(
    family: str, parameters: dict[str, Any], tasks: TaskSet
) -> None:
    network = build(family, parameters, tasks)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = torch.optim.Adam(network.parameter_groups(lr=1e-2, weight_decay=1e-3))
    x, targets = batch(tasks)
    generator = torch.Generator()
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = network.training_loss(x, targets, generator)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert not any(torch.equal(*pair) for pair in zip(before, network.parameters(), strict=True))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-3}


@pytest.mark.parametrize(("family", "parameters"), FAMILIES)
def test_pruning_copies_in_eval_mode_and_leaves_the_original_alone(
    family: str, parameters: dict[str, Any], tasks: TaskSet
) -> None:
    network = build(family, parameters, tasks).train()
    x, _ = batch(tasks)
    static = network.prune()
    assert network.training
    assert not any(module.training for module in static.modules())
    assert_equal_outputs(network(x), static(x))
    with torch.no_grad():
        for parameter in static.parameters():
            parameter.zero_()
    assert all(logits.any() for logits in network(x).values())


@pytest.mark.parametrize(("family", "parameters"), [*FAMILIES, ("dmtg", {"groups": 2})])
def test_equal_seeds_give_equal_networks(family: str, parameters: dict[str, Any], tasks: TaskSet) -> None:
    def weights(seed: int) -> Tensor:
        network = build(family, parameters, tasks, seed)
        return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


@pytest.mark.parametrize(
    ("family", "parameters", "message"),
    [
        ("nonsense", {}, "family: must be one of"),
        ("shared", {"split": 1}, "parameters: 'shared' must have"),
        ("single", {"groups": 2}, "parameters: 'single' must have"),
        ("grouped", {}, "parameters: 'grouped' must have"),
        ("grouped", {"grouping": [["a", "b"]]}, "grouping: each of"),
        ("grouped", {"grouping": [["a", "b", "c", "d"]]}, "grouping: unknown tasks"),
        ("grouped", {"grouping": [["a", "b", "c"]], "split": -1}, "split: must be"),
        ("grouped", {"grouping": [["a", "b", "c"]], "split": 3}, "split: must be"),
        ("grouped", {"grouping": [["a", "b", "c"]], "split": 1.0}, "split: must be"),
    ],
)
def test_unknown_missing_and_bad_parameters_are_refused(
    family: str, parameters: dict[str, Any], message: str, tasks: TaskSet
) -> None:
    with pytest.raises(ValueError, match=message):
        build(family, parameters, tasks)
