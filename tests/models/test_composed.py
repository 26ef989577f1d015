import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coterie.models.backbones import BACKBONES, CNN, MLP, Backbone
from coterie.models.cost import count_cost
from coterie.models.families import DMTGInterroGate, build_network
from coterie.models.families.composed import GatedGroups
from coterie.models.families.interrogate import GatedTrunk
from coterie.models.layers import BatchNorm
from coterie.models.tasks import Grouping, Task, TaskKind, TaskSet
from tests.models.not_numbers import NO_NUMBERS

WEIGHTS = {"a": 1.0, "b": 2.0, "c": 1.0, "d": 0.5}
TASKS = TaskSet(Task(name=name, kind=TaskKind.BINARY, weight=weight) for name, weight in WEIGHTS.items())
GROUPS = [["a", "c", "d"], ["b"]]
EPOCHS = 6
SMALL_CNN = CNN(input_shape=(8, 9), width=1 / 16)
SIZES: dict[str, tuple[dict[str, Any], int]] = {  # and the split
    "mlp": ({"input_shape": (2, 3), "width": 5, "depth": 3}, 1),
    "cnn": ({"input_shape": (2, 8, 8), "width": 1 / 16}, 1),
    "resnet20": ({"input_shape": (8, 8), "width": 1 / 8}, 4),
    "resnet18": ({"input_shape": (3, 16, 16), "width": 1 / 16}, 0),
    "resnet50_dilated": ({"input_shape": (3, 16, 16), "width": 1 / 32}, 14),
    "vit_tiny": ({"input_shape": (1, 4, 4), "width": 1 / 32}, 10),
    "vit_small": ({"input_shape": (1, 4, 4), "width": 1 / 64}, 11),
}


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(backbone: Backbone = SMALL_CNN, seed: int = 0, **parameters: Any) -> DMTGInterroGate:
    torch.manual_seed(seed)
    network = build_network("dmtg+interrogate", backbone=backbone, tasks=TASKS, parameters=parameters)
    assert isinstance(network, DMTGInterroGate)
    return network


def batch(backbone: Backbone, seed: int = 0, size: int = 6) -> tuple[Tensor, dict[str, Tensor]]:
    noise = random(seed)
    x = torch.randn(size, *backbone.input_shape, generator=noise)
    return x, {name: torch.randint(2, (size,), generator=noise) for name in TASKS.names}


def start(seed: int = 0) -> tuple[DMTGInterroGate, torch.optim.Optimizer]:
    """A network on its way to the groups [a, c, d] and [b], and its optimizer."""
    network = build(seed=seed, groups=2, split=1, group_share=0.5)
    decide(network)
    return network, optimizer_of(network)


def decide(network: DMTGInterroGate) -> None:
    assert network.dmtg is not None
    with torch.no_grad():
        network.dmtg.A_TK.copy_(torch.tensor([[0.0, 3.0], [3.0, 0.0], [0.0, 3.0], [0.0, 3.0]]))


def optimizer_of(network: DMTGInterroGate) -> torch.optim.Optimizer:
    return torch.optim.Adam(network.parameter_groups(lr=1e-2, weight_decay=1e-4))


def train(network: DMTGInterroGate, optimizer: torch.optim.Optimizer, epochs: range) -> torch.optim.Optimizer:
    for epoch in epochs:
        if network.begin_epoch(epoch, EPOCHS):
            optimizer = optimizer_of(network)
        for step in range(2):
            optimizer.zero_grad()
            x, targets = batch(network.backbone, 2 * epoch + step)
            torch.autograd.backward(network.training_loss(x, targets, random(epoch)))
            optimizer.step()
    return optimizer


@torch.no_grad()
def scatter(network: nn.Module, seed: int = 0) -> None:
    """Move every weight, statistic, alpha and beta, each channel differently."""
    noise = random(seed)
    for name, parameter in network.named_parameters():
        draw = torch.randn(parameter.shape, generator=noise)
        if "alphas" in name or "betas" in name:
            parameter.copy_(draw)
        else:
            parameter.add_(draw, alpha=0.1)
    for module in network.modules():
        if isinstance(module, BatchNorm):
            module.running_mean = 0.2 * torch.randn(module.num_features, generator=noise)
            module.running_var = 0.5 + torch.rand(module.num_features, generator=noise)


def test_it_groups_first_and_gates_then() -> None:
    network, optimizer = start()
    started = []
    for epoch in range(EPOCHS):
        started.append(network.begin_epoch(epoch, EPOCHS))
        assert (network.dmtg is None) == (epoch >= 3)
        if started[-1]:
            optimizer = optimizer_of(network)
        losses = network.losses(*batch(network.backbone), random(0))
        assert (losses.penalty > 0) == (epoch >= 3)
        optimizer.zero_grad()
        torch.autograd.backward(losses.tasks_T @ network.task_weights_T + losses.penalty)
        optimizer.step()
    assert started == [False, False, False, True, False, False]
    assert network.grouping.names(TASKS) == GROUPS


def test_the_second_phase_goes_on_with_the_weights_of_the_first() -> None:
    network, optimizer = start()
    train(network, optimizer, range(3))
    network.eval()
    x, _ = batch(network.backbone)
    before = {name: value.detach() for name, value in network(x).items()}
    assert network.begin_epoch(3, EPOCHS)
    assert not any(module.training for module in network.modules())
    for name, value in network(x).items():
        torch.testing.assert_close(value, before[name])
    assert network.gated is not None
    gated, alone = network.gated.branches
    assert isinstance(gated, GatedTrunk)
    assert not isinstance(alone, GatedTrunk)
    for own in gated.own:
        for one, other in zip(own.parameters(), gated.shared.parameters(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_a_training_restored_in_either_phase_goes_on_as_if_it_had_not_stopped(stop: int) -> None:
    network, optimizer = start()
    optimizer = train(network, optimizer, range(stop))
    again = build(seed=7, groups=2, split=1, group_share=0.5)
    again.restore(copy.deepcopy(network.state_dict()))
    its_optimizer = optimizer_of(again)
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again.grouping == network.grouping
    train(network, optimizer, range(stop, EPOCHS))
    train(again, its_optimizer, range(stop, EPOCHS))
    state = again.state_dict()
    assert list(state) == list(network.state_dict())
    for key, value in network.state_dict().items():
        assert torch.equal(state[key], value), key


@pytest.mark.parametrize("name", list(BACKBONES))
@torch.no_grad()
def test_the_exported_network_is_the_trained_one(name: str) -> None:
    sizes, split = SIZES[name]
    network = build(BACKBONES[name](**sizes), grouping=GROUPS, split=split).eval()
    x, _ = batch(network.backbone)
    for seed in range(2):
        scatter(network, seed)
        exported = network.prune()
        assert list(exported(x)) == list(network(x))
        for found, expected in zip(exported(x).values(), network(x).values(), strict=True):
            assert expected.std() > 1e-5
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "cnn", "vit_tiny"])
@pytest.mark.parametrize(("alpha", "grouping"), [(-1.0, GROUPS), (1.0, [["a"], ["b"], ["c"], ["d"]])])
@torch.no_grad()
def test_closed_gates_cost_what_the_groups_do_and_open_ones_what_single_branches_do(
    name: str, alpha: float, grouping: list[list[str]]
) -> None:
    sizes, split = SIZES[name]
    network = build(BACKBONES[name](**sizes), grouping=GROUPS, split=split)
    assert network.gated is not None
    for trunk in network.gated.gated_trunks():
        for alphas in trunk.alphas:
            alphas.fill_(alpha)
    plain = build_network(
        "grouped",
        backbone=network.backbone,
        tasks=TASKS,
        parameters={"grouping": grouping, "split": split},
    )
    shape = network.backbone.input_shape
    assert count_cost(network.prune(), shape) == count_cost(plain.prune(), shape)


def test_a_network_that_only_grouped_is_exported_as_dmtg_is() -> None:
    network, optimizer = start()
    train(network, optimizer, range(2))
    assert network.dmtg is not None
    x, _ = batch(network.backbone)
    network.eval()
    for found, expected in zip(network.prune()(x).values(), network.dmtg(x).values(), strict=True):
        assert torch.equal(found, expected)


def test_a_given_grouping_is_gated_from_the_start() -> None:
    network = build(grouping=GROUPS, split=1)
    assert network.dmtg is None
    optimizer = optimizer_of(network)
    for epoch in range(EPOCHS):
        assert not network.begin_epoch(epoch, EPOCHS)
    train(network, optimizer, range(2))
    assert network.grouping == Grouping.from_names(GROUPS, TASKS)


def test_a_task_alone_in_its_group_has_no_gates_and_costs_nothing() -> None:
    network = build(MLP(input_shape=(3,), width=4, depth=1), grouping=GROUPS, sparsity_weight=2.0)
    penalty = network.losses(*batch(network.backbone), random(0)).penalty
    share = torch.tensor(0.5).sigmoid()  # of every gate at its start, for three of four tasks
    torch.testing.assert_close(penalty, 2.0 * (1 + 2 + 1 + 0.5) * 3 * share / 4)


@pytest.mark.parametrize("grouping", [GROUPS, [["a"], ["b"], ["c"], ["d"]]])
def test_the_parameter_groups_and_the_trunks_hold_everything_once(grouping: list[list[str]]) -> None:
    network = build(grouping=grouping, split=1)
    groups = network.parameter_groups(lr=0.01, weight_decay=0.1)
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in network.parameters())
    units = [unit for trunk in network.trunks() for unit in trunk]
    assert len({id(unit) for unit in units}) == len(units) == 1 + (5 if grouping == GROUPS else 4)
    torch.autograd.backward(network.training_loss(*batch(network.backbone), random(0)))


def test_settling_takes_the_statistics_anew_in_the_second_phase() -> None:
    network = build(grouping=GROUPS, split=1)
    batches = [batch(network.backbone, seed)[0] for seed in range(2)]
    network.settle(iter(batches))
    assert isinstance(network.current, GatedGroups)
    unit = network.current.prefix[0]
    expected = torch.stack([unit.get_submodule("conv1")(x[:, None]).mean(dim=(0, 2, 3)) for x in batches])
    torch.testing.assert_close(
        unit.get_submodule("bn1").running_mean, expected.mean(dim=0), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "groups: must be given where `grouping` is not, found None"),
        ({"groups": 5}, "groups: must be a whole number from 1 to 4, found 5"),
        ({"groups": 1, "grouping": GROUPS}, "grouping: must have at most 1 groups, found 2"),
        ({"grouping": [["a", "b"]]}, "grouping: each of"),
        ({"groups": 2, "split": 2}, "split: must be a whole number from 0 to 1"),
        ({"groups": 2, "group_share": 1.0}, "group_share: must be a number above 0 and below 1, found 1"),
        ({"groups": 2, "tau": 0.0}, "tau: must be a number from 0.001 to 1000, found 0.0"),
        ({"grouping": GROUPS, "tau": 0.0}, "tau: must be a number"),
        ({"grouping": GROUPS, "logits_lr": 0.0}, "logits_lr: must be a finite number above 0, found 0.0"),
        ({"grouping": "abcd"}, "grouping: must be a list of lists of task names"),
        *(
            ({"grouping": GROUPS, name: value}, f"{name}: must be a .*number")
            for name in ("tau", "logits_lr", "sparsity_weight", "own_share", "gate_lr", "group_share")
            for value in NO_NUMBERS
            if value is not None or name != "logits_lr"
        ),
        ({"groups": 2, "own_share": -1.0}, "own_share: must be a number from 0 to 1, found -1.0"),
    ],
)
def test_a_bad_parameter_is_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**parameters)


def test_the_expected_cost_is_the_phases_and_exact_where_its_gates_are_decided() -> None:
    network, optimizer = start()
    assert network.dmtg is not None
    assert network.expected_cost() == network.dmtg.expected_cost()
    train(network, optimizer, range(4))
    assert network.gated is not None
    [trunk] = network.gated.gated_trunks()
    noise = random(0)
    with torch.no_grad():
        for alpha in trunk.alphas:
            alpha.copy_(torch.randn(alpha.shape, generator=noise) * 1e6)
    assert network.expected_cost() == count_cost(network.prune(), network.backbone.input_shape)
