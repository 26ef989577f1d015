import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from coterie.models.backbones import MLP
from coterie.models.families import DMTG, Shared, build_network
from coterie.models.families.dmtg import grouping_entropy, gumbel_noise, gumbel_softmax
from coterie.models.tasks import TaskSet

BACKBONE = MLP(input_shape=(3, 2), width=5, depth=3)

MakeTasks = Callable[..., TaskSet]
seeds = st.integers(0, 2**31)


@pytest.fixture
def tasks(make_tasks: MakeTasks) -> TaskSet:
    return make_tasks(1.0, 2.0, 0.5, 1.0)


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(tasks: TaskSet, *, seed: int = 0, **parameters: Any) -> DMTG:
    torch.manual_seed(seed)
    network = build_network("dmtg", backbone=BACKBONE, tasks=tasks, parameters=parameters)
    assert isinstance(network, DMTG)
    return network


def scatter(network: DMTG, seed: int = 0) -> DMTG:
    """Move every parameter at random, as training would: branches, heads and rows of A differ."""
    noise = random(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
    return network


def batch(tasks: TaskSet, seed: int = 0, size: int = 7) -> tuple[Tensor, dict[str, Tensor]]:
    noise = random(seed)
    x = torch.randn(size, *BACKBONE.input_shape, generator=noise)
    return x, {name: torch.randint(2, (size,), generator=noise) for name in tasks.names}


def plain_logits(network: DMTG, x: Tensor) -> list[list[Tensor]]:
    """Every head's logits by a loop over groups and tasks, nothing fused."""
    features = [branch(network.prefix(x)) for branch in network.branches]
    return [
        [
            F.linear(features[k], network.head_weight_KTD[k, t : t + 1], network.head_bias_KT[k, t : t + 1])[
                :, 0
            ]
            for t in range(len(network.tasks))
        ]
        for k in range(len(features))
    ]


def plain_losses(network: DMTG, x: Tensor, targets: dict[str, Tensor]) -> Tensor:
    """w_t * loss_t of head (k, t), [T, K]."""
    logits = plain_logits(network, x)
    return torch.stack(
        [
            torch.stack(
                [
                    task.weight * F.binary_cross_entropy_with_logits(group[t], targets[task.name].float())
                    for group in logits
                ]
            )
            for t, task in enumerate(network.tasks)
        ]
    )


@given(st.integers(1, 6), st.integers(1, 5), st.floats(0.05, 50), st.floats(0, 1e4), seeds)
def test_rows_of_a_relaxed_grouping_sum_to_1(
    tasks: int, groups: int, tau: float, scale: float, seed: int
) -> None:
    noise = gumbel_noise(torch.Size([tasks, groups]), random(seed))
    G_TK = gumbel_softmax(scale * torch.randn(tasks, groups, generator=random(seed)), noise, tau)
    assert (G_TK >= 0).all()
    torch.testing.assert_close(G_TK.sum(dim=1), torch.ones(tasks))


def test_the_noise_is_standard_gumbel() -> None:
    noise = gumbel_noise(torch.Size([100_000]), random(0))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.05)


@given(st.integers(1, 4), st.floats(0.5, 5), st.integers(0, 2), seeds)
def test_the_gradient_of_the_logits_is_the_chain_rule_on_fixed_noise(
    make_tasks: MakeTasks, groups: int, tau: float, split: int, seed: int
) -> None:
    tasks = make_tasks(1, 2, 0.5, 1)
    network = scatter(build(tasks, groups=groups, tau=tau, split=split), seed)
    x, targets = batch(tasks, seed)
    noise_TK = gumbel_noise(network.A_TK.shape, random(seed))

    torch.autograd.backward(network.training_loss(x, targets, random(seed)))

    # d loss / d A[t, j] = G[t, j] * (c[t, j] - sum_k G[t, k] * c[t, k]) / tau with c = w_t * loss_{t,k}
    with torch.no_grad():
        c_TK = plain_losses(network, x, targets)
        G_TK = torch.exp((network.A_TK + noise_TK) / tau)
        G_TK /= G_TK.sum(dim=1, keepdim=True)
        expected = G_TK * (c_TK - (G_TK * c_TK).sum(dim=1, keepdim=True)) / tau
    assert network.A_TK.grad is not None
    torch.testing.assert_close(network.A_TK.grad, expected, rtol=1e-4, atol=1e-6)


@given(st.integers(1, 4), st.integers(0, 2), seeds)
def test_the_fused_loss_and_its_gradients_are_the_plain_loops(
    make_tasks: MakeTasks, groups: int, split: int, seed: int
) -> None:
    tasks = make_tasks(1, 2, 0.5, 1)
    network = scatter(build(tasks, groups=groups, split=split), seed)
    x, targets = batch(tasks, seed)
    G_TK = gumbel_softmax(network.A_TK, gumbel_noise(network.A_TK.shape, random(seed)), network.tau)
    fused = network.training_loss(x, targets, random(seed))
    plain = (G_TK * plain_losses(network, x, targets)).sum()
    torch.testing.assert_close(fused, plain)
    parameters = list(network.parameters())
    for one, other in zip(
        torch.autograd.grad(fused, parameters), torch.autograd.grad(plain, parameters), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_noise_comes_from_the_given_generator_alone(tasks: TaskSet) -> None:
    network = scatter(build(tasks, groups=3))
    x, targets = batch(tasks)
    before = torch.get_rng_state()
    losses = [network.training_loss(x, targets, random(seed)).item() for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_branches_and_heads_start_as_copies_so_that_the_logits_have_no_gradient(tasks: TaskSet) -> None:
    network = build(tasks, groups=3, split=1)
    x, targets = batch(tasks)
    losses_TK = plain_losses(network, x, targets)
    assert torch.equal(losses_TK, losses_TK[:, :1].expand(-1, 3))
    assert torch.equal(network.A_TK, torch.ones(4, 3))
    torch.autograd.backward(network.training_loss(x, targets, random(0)))
    assert network.A_TK.grad is not None
    assert network.A_TK.grad.abs().max() < 1e-6
    # yet the noise weighs the branches differently, and so moves them apart
    first, second = (branch.get_parameter("0.0.weight").grad for branch in network.branches[:2])
    assert first is not None
    assert second is not None
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("fused", [False, True])
def test_one_group_is_the_shared_network_in_outputs_and_in_training(fused: bool, tasks: TaskSet) -> None:
    one_group = build(tasks, groups=1)
    torch.manual_seed(0)
    shared = Shared(backbone=BACKBONE, tasks=tasks)
    for step in range(30):
        x, targets = batch(tasks, seed=step)
        if step == 0:
            assert all(torch.equal(one_group(x)[name], shared(x)[name]) for name in tasks.names)
            optimizers = [
                torch.optim.Adam(network.parameter_groups(lr=1e-2, weight_decay=1e-2), fused=fused)
                for network in (one_group, shared)
            ]
        for network, optimizer in zip((one_group, shared), optimizers, strict=True):
            optimizer.zero_grad()
            torch.autograd.backward(network.training_loss(x, targets, random(step)))
            optimizer.step()
    for name, tensor in one_group.prune().state_dict().items():
        torch.testing.assert_close(tensor, shared.prune().state_dict()[name], rtol=1e-3, atol=1e-5)


@given(st.lists(st.integers(0, 3), min_size=4, max_size=4), st.integers(0, 2), seeds)
def test_pruning_keeps_the_chosen_heads_and_drops_empty_groups(
    make_tasks: MakeTasks, chosen: list[int], split: int, seed: int
) -> None:
    tasks = make_tasks(1, 1, 1, 1)
    network = scatter(build(tasks, groups=4, split=split), seed)
    with torch.no_grad():
        network.A_TK[range(4), chosen] += 10
    x, _ = batch(tasks, seed)
    static = network.prune()
    logits = plain_logits(network, x)
    for t, (name, output) in enumerate(static(x).items()):
        assert torch.equal(output, logits[chosen[t]][t])
        assert torch.equal(output, network(x)[name])
    assert len(static.branches) == len(set(chosen))
    assert static.grouping == network.grouping
    for i in range(4):
        for j in range(4):
            assert (static.grouping.labels[i] == static.grouping.labels[j]) == (chosen[i] == chosen[j])


def test_a_pruned_network_is_a_copy_in_eval_mode(tasks: TaskSet) -> None:
    network = scatter(build(tasks, groups=2, split=1)).train()
    x, _ = batch(tasks)
    before = network(x)
    static = network.prune()
    assert network.training
    assert not any(module.training for module in static.modules())
    with torch.no_grad():
        for parameter in static.parameters():
            parameter.zero_()
    assert all(torch.equal(network(x)[name], before[name]) for name in tasks.names)


def permuted(network: DMTG, optimizer: torch.optim.Adam, order: list[int]) -> tuple[DMTG, torch.optim.Adam]:
    """The same network and optimizer with group `order[k]` in place k."""
    other = copy.deepcopy(network)
    other_optimizer = torch.optim.Adam(other.parameter_groups(lr=1e-2, weight_decay=1e-3))
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    def permute(name: str, values: dict[str, Tensor]) -> Tensor:
        if name.startswith("branches."):
            _, k, rest = name.split(".", 2)
            return values[f"branches.{order[int(k)]}.{rest}"]
        if name.startswith("head_"):
            return values[name][order]
        return values[name][:, order] if name == "A_TK" else values[name]

    weights = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(permute(name, weights))
            for moment in ("exp_avg", "exp_avg_sq"):
                values = {key: optimizer.state[value][moment] for key, value in network.named_parameters()}
                other_optimizer.state[parameter][moment] = permute(name, values).clone()
    return other, other_optimizer


@pytest.mark.parametrize("scaling", ["off", "intended", "as_released"])
@pytest.mark.parametrize("loss_normalisation", ["none", "initial"])
def test_groups_have_no_order(scaling: str, loss_normalisation: str, tasks: TaskSet) -> None:
    network = scatter(
        build(
            tasks,
            groups=3,
            split=1,
            scaling=scaling,
            loss_normalisation=loss_normalisation,
            entropy_weight=0.3,
        )
    )
    optimizer = torch.optim.Adam(network.parameter_groups(lr=1e-2, weight_decay=1e-3))
    order = [2, 0, 1]

    def step(network: DMTG, optimizer: torch.optim.Adam, seed: int, columns: list[int]) -> None:
        x, targets = batch(tasks, seed)
        noise_TK = gumbel_noise(network.A_TK.shape, random(seed))[:, columns]
        optimizer.zero_grad()
        torch.autograd.backward(
            network.loss_at(gumbel_softmax(network.A_TK, noise_TK, network.tau), x, targets)
        )
        optimizer.step()

    for seed in range(5):
        step(network, optimizer, seed, [0, 1, 2])
    other, other_optimizer = permuted(network, optimizer, order)
    for seed in range(5, 15):
        step(network, optimizer, seed, [0, 1, 2])
        step(other, other_optimizer, seed, order)
    torch.testing.assert_close(other.A_TK, network.A_TK[:, order], rtol=1e-3, atol=1e-5)
    assert other.grouping == network.grouping
    x, _ = batch(tasks, 99)
    for name, logits in network(x).items():
        torch.testing.assert_close(other(x)[name], logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("scaling", "at_branch", "at_head"),
    [("off", 1, 1), ("intended", 3**-0.5, 4**-0.5), ("as_released", 3**-0.5, 3**-0.5)],
)
def test_gradients_are_scaled_between_prefix_branches_and_heads(
    scaling: str, at_branch: float, at_head: float, tasks: TaskSet
) -> None:
    x, targets = batch(tasks)
    scaled, plain = (scatter(build(tasks, groups=3, split=1, scaling=value)) for value in (scaling, "off"))
    losses = [network.training_loss(x, targets, random(0)) for network in (scaled, plain)]
    assert torch.equal(losses[0], losses[1])
    for loss in losses:
        torch.autograd.backward(loss)
    for (name, one), other in zip(scaled.named_parameters(), plain.parameters(), strict=True):
        factor = {"prefix": at_branch * at_head, "branches": at_head}.get(name.split(".")[0], 1)
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad, factor * other.grad, msg=name)


def test_the_entropy_of_even_chances_by_hand() -> None:
    # two groups at 1/2 have ln 2 each; three at 1/3 have ln 3 - 2/3 ln 2 each
    assert grouping_entropy(torch.zeros(4, 2)).item() == pytest.approx(2 * math.log(2))
    assert grouping_entropy(torch.zeros(4, 3)).item() == pytest.approx(3 * math.log(3) - 2 * math.log(2))
    assert grouping_entropy(torch.tensor([[100.0, 0.0], [0.0, 0.0]])).item() == pytest.approx(
        math.log(2), abs=1e-4
    )


@pytest.mark.parametrize("A_TK", [torch.ones(2, 1), torch.tensor([[1e4, 0.0, -1e4]]), torch.ones(2, 3)])
def test_the_entropy_has_a_finite_gradient_where_all_is_decided(A_TK: Tensor) -> None:
    A_TK = A_TK.clone().requires_grad_()
    torch.autograd.backward(grouping_entropy(A_TK))
    assert A_TK.grad is not None
    assert torch.isfinite(A_TK.grad).all()


def test_the_entropy_weighs_in_the_loss_and_pushes_towards_a_decision(tasks: TaskSet) -> None:
    x, targets = batch(tasks)
    plain, weighted = (scatter(build(tasks, groups=3, entropy_weight=weight)) for weight in (0.0, 0.7))
    extra = weighted.training_loss(x, targets, random(0)) - plain.training_loss(x, targets, random(0))
    torch.testing.assert_close(extra, 0.7 * grouping_entropy(plain.A_TK))
    (gradient,) = torch.autograd.grad(extra, weighted.A_TK)
    sharper = weighted.A_TK.detach() - 0.1 * gradient
    assert grouping_entropy(sharper) < grouping_entropy(weighted.A_TK)


def test_normalised_losses_count_from_1_at_the_first_batch(tasks: TaskSet) -> None:
    network = build(tasks, groups=3, loss_normalisation="initial")
    x, targets = batch(tasks)
    first_T = plain_losses(network, x, targets)[:, 0].detach() / network.task_weights_T
    first = network.training_loss(x, targets, random(0))
    assert first.item() == pytest.approx(sum(task.weight for task in tasks), rel=1e-5)

    scatter(network)
    restored = build(tasks, seed=9, groups=3, loss_normalisation="initial")
    restored.load_state_dict(network.state_dict())
    x, targets = batch(tasks, seed=1)
    G_TK = gumbel_softmax(network.A_TK, gumbel_noise(network.A_TK.shape, random(1)), network.tau)
    expected = (G_TK * plain_losses(network, x, targets) / first_T[:, None]).sum()
    for later in (network, restored):
        torch.testing.assert_close(later.training_loss(x, targets, random(1)), expected)


def test_a_task_without_an_initial_loss_leaves_the_later_ones_finite(tasks: TaskSet) -> None:
    network = build(tasks, groups=2, loss_normalisation="initial")
    with torch.no_grad():
        network.head_bias_KT.fill_(1e4)
    x, targets = batch(tasks)
    assert network.training_loss(x, {name: torch.ones(7) for name in tasks.names}, random(0)) == 0
    assert torch.isfinite(network.training_loss(x, targets, random(0)))


def test_logits_learn_at_their_own_rate_and_never_decay(tasks: TaskSet) -> None:
    for logits_lr, expected in ((None, 0.1), (0.5, 0.5)):
        network = build(tasks, groups=2, split=1, logits_lr=logits_lr)
        weights, logits = network.parameter_groups(lr=0.1, weight_decay=0.01)
        assert (weights["lr"], weights["weight_decay"]) == (0.1, 0.01)
        assert (logits["lr"], logits["weight_decay"]) == (expected, 0)
        assert [id(parameter) for parameter in logits["params"]] == [id(network.A_TK)]
        listed = sorted(id(parameter) for parameter in weights["params"] + logits["params"])
        assert listed == sorted(id(parameter) for parameter in network.parameters())


def test_before_training_the_grouping_is_one_group(tasks: TaskSet) -> None:
    assert build(tasks, groups=3).grouping.groups == ((0, 1, 2, 3),)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("groups", 0),
        ("groups", 5),
        ("groups", 2.0),
        ("split", 3),
        ("split", -1),
        ("tau", 0.0),
        ("tau", math.inf),
        ("tau", math.nan),
        ("logits_lr", 0.0),
        ("logits_lr", math.nan),
        ("entropy_weight", -0.1),
        ("entropy_weight", math.nan),
        ("scaling", "on"),
        ("loss_normalisation", "running"),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_its_name(name: str, value: object, tasks: TaskSet) -> None:
    parameters: dict[str, Any] = {"groups": 2, name: value}
    with pytest.raises(ValueError, match=f"{name}: must be"):
        build(tasks, **parameters)


def test_the_number_of_groups_has_no_default(tasks: TaskSet) -> None:
    with pytest.raises(ValueError, match="'dmtg' must have \\['groups'\\]"):
        build(tasks)
