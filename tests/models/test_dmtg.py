import copy
import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.models.backbones import (
    CNN,
    MLP,
    Backbone,
    ResNet18,
    ResNet20,
    ResNet50Dilated,
    ViTSmall,
    ViTTiny,
)
from coterie.models.cost import count_cost
from coterie.models.families import DMTG, MultiTaskNetwork, Shared, build_network
from coterie.models.families.dmtg import (
    expected_sample,
    group_affinities,
    grouping_entropy,
    gumbel_noise,
    gumbel_softmax,
    probe_epochs,
)
from coterie.models.families.grouped import cost_of_groups
from coterie.models.losses import task_losses
from coterie.models.tasks import Grouping, Task, TaskKind, TaskSet
from tests.models.not_numbers import NO_NUMBERS

BACKBONE = MLP(input_shape=(3, 2), width=5, depth=3)
IMAGE = (3, 16, 16)
BACKBONES: list[Backbone] = [
    MLP(input_shape=IMAGE, width=6, depth=2),
    CNN(input_shape=IMAGE, width=1 / 16),
    ResNet20(input_shape=IMAGE, width=1 / 8),
    ResNet18(input_shape=IMAGE, width=1 / 32),
    ResNet50Dilated(input_shape=IMAGE, width=1 / 32),
    ViTTiny(input_shape=IMAGE, width=1 / 16),
    ViTSmall(input_shape=IMAGE, width=1 / 32),
]
every_backbone = pytest.mark.parametrize("backbone", BACKBONES, ids=lambda backbone: backbone.name)
VECTOR_TASKS = [
    Task(name="binary", kind=TaskKind.BINARY, weight=2),
    Task(name="classes", kind=TaskKind.MULTICLASS, outputs=3),
    Task(name="other classes", kind=TaskKind.MULTICLASS, outputs=3, weight=0.5),
    Task(name="numbers", kind=TaskKind.REGRESSION, outputs=2),
]
MAP_TASKS = [
    Task(name="places", kind=TaskKind.SEGMENTATION, outputs=3),
    Task(name="depth", kind=TaskKind.DEPTH),
]

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


def build_on(backbone: Backbone, *, seed: int = 0, **parameters: Any) -> DMTG:
    torch.manual_seed(seed)
    network = build_network("dmtg", backbone=backbone, tasks=tasks_of(backbone), parameters=parameters)
    assert isinstance(network, DMTG)
    return network.double()  # so that rounding does not grow through batch norms of few samples


def tasks_of(backbone: Backbone) -> TaskSet:
    """Tasks of every kind of output that the backbone can feed."""
    return TaskSet(VECTOR_TASKS if isinstance(backbone, MLP) else [*VECTOR_TASKS, *MAP_TASKS])


def batch_for(backbone: Backbone, seed: int = 0, size: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    noise = random(seed)

    def classes(*shape: int) -> Tensor:
        return torch.randint(3, (size, *shape), generator=noise)

    x = torch.randn(size, *backbone.input_shape, generator=noise, dtype=torch.float64)
    targets = {
        "binary": classes() // 2,
        "classes": classes(),
        "other classes": classes(),
        "numbers": torch.randn(size, 2, generator=noise, dtype=torch.float64),
        "places": classes(*IMAGE[1:]),
        "depth": torch.rand(size, *IMAGE[1:], generator=noise, dtype=torch.float64),
    }
    return x, {name: targets[name] for name in tasks_of(backbone).names}


def decided(network: DMTG, labels: list[int], by: float = 30.0) -> DMTG:
    """Let each task's logits favour one group."""
    with torch.no_grad():
        network.A_TK[range(len(labels)), labels] += by
    return network


def gradients(network: nn.Module) -> dict[str, Tensor]:
    """Those of the parameters that have one."""
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def train_step(network: MultiTaskNetwork, optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(network.training_loss(*arguments))
    optimizer.step()


def plain_outputs(network: DMTG, x: Tensor) -> list[list[Tensor]]:
    """Every head's output by a loop over groups and tasks, nothing fused."""
    features = [network.necks(branch(network.prefix(x))) for branch in network.branches]
    return [
        [head(features[k][head.reads]) for head in cast(nn.ModuleList, heads)]
        for k, heads in enumerate(network.heads)
    ]


def plain_losses(network: DMTG, x: Tensor, targets: dict[str, Tensor]) -> Tensor:
    """w_t * loss_t of head (k, t), [T, K], one call each."""
    return torch.stack(
        [
            torch.stack(
                [
                    task.weight
                    * task_losses({task.name: output}, {task.name: targets[task.name]}, TaskSet([task]))[0]
                    for output, task in zip(group, network.tasks, strict=True)
                ]
            )
            for group in plain_outputs(network, x)
        ],
        dim=1,
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


@every_backbone
@pytest.mark.parametrize("split", [0, 1])
def test_on_every_backbone_the_loss_is_the_plain_loops_and_its_gradients_the_chain_rules(
    backbone: Backbone, split: int
) -> None:
    network = scatter(build_on(backbone, groups=3, split=split, scaling="off"))
    x, targets = batch_for(backbone)
    noise_TK = gumbel_noise(network.A_TK.shape, random(1)).to(network.A_TK)
    G_TK = gumbel_softmax(network.A_TK, noise_TK, network.tau)
    c_TK = plain_losses(network, x, targets)

    loss = network.training_loss(x, targets, random(1))
    torch.testing.assert_close(loss, (G_TK * c_TK).sum())

    parameters = list(network.parameters())
    pairs = zip(
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad((G_TK * c_TK).sum(), parameters, retain_graph=True),
        strict=True,
    )
    for (name, _), (one, other) in zip(network.named_parameters(), pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8, msg=name)


@every_backbone
def test_on_every_backbone_one_group_is_the_shared_network_in_outputs_and_in_training(
    backbone: Backbone,
) -> None:
    one_group = build_on(backbone, groups=1, scaling="off")
    torch.manual_seed(0)
    shared = Shared(backbone=backbone, tasks=tasks_of(backbone)).double()
    networks = (one_group, shared)
    x, _ = batch_for(backbone)
    start = one_group.eval()(x)
    assert all(torch.equal(output, start[name]) for name, output in shared.eval()(x).items())
    optimizers = [
        torch.optim.SGD(network.train().parameter_groups(lr=1e-2, weight_decay=1e-2)) for network in networks
    ]
    for seed in range(3):
        for network, optimizer in zip(networks, optimizers, strict=True):
            train_step(network, optimizer, *batch_for(backbone, seed), random(seed))
    expected = shared.prune().state_dict()
    for name, tensor in one_group.prune().state_dict().items():
        torch.testing.assert_close(tensor, expected[name])


@every_backbone
def test_on_every_backbone_the_pruned_networks_outputs_are_those_of_the_chosen_heads(
    backbone: Backbone,
) -> None:
    network = scatter(build_on(backbone, groups=3, split=1)).eval()
    labels = [2, 0, 2, 2, 0, 2][: len(network.tasks)]
    decided(network, labels)
    x, _ = batch_for(backbone)
    outputs = plain_outputs(network, x)
    for t, (name, output) in enumerate(network.prune()(x).items()):
        assert torch.equal(output, outputs[labels[t]][t])
        assert torch.equal(output, network(x)[name])
    assert network.grouping == Grouping.from_labels(labels)


@settings(max_examples=15)
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


@settings(max_examples=15)
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
    first, second = (branch.get_parameter("0.linear2.weight").grad for branch in network.branches[:2])
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


@settings(max_examples=15)
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
    outputs = plain_outputs(network, x)
    for t, (name, output) in enumerate(static(x).items()):
        assert torch.equal(output, outputs[chosen[t]][t])
        assert torch.equal(output, network(x)[name])
    assert network.grouping == Grouping.from_labels(chosen)
    copies = [node.name for node in static.nodes if node.name.endswith("linear3")]  # of the last unit
    assert len(copies) == len(set(chosen))


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
        if name.startswith(("branches.", "heads.")):
            kind, k, rest = name.split(".", 2)
            return values[f"{kind}.{order[int(k)]}.{rest}"]
        return values[name][:, order] if name.endswith("_TK") else values[name]

    state = network.state_dict()
    other.load_state_dict({name: permute(name, state) for name in state})
    for moment in ("exp_avg", "exp_avg_sq"):
        values = {name: optimizer.state[value][moment] for name, value in network.named_parameters()}
        for name, parameter in other.named_parameters():
            other_optimizer.state[parameter][moment] = permute(name, values).clone()
    return other, other_optimizer


def check_that_groups_have_no_order(network: DMTG, steps: int) -> None:
    optimizer = torch.optim.Adam(network.parameter_groups(lr=1e-2, weight_decay=1e-3))
    order = [2, 0, 1]

    def step(network: DMTG, optimizer: torch.optim.Adam, seed: int, columns: list[int]) -> None:
        x, targets = batch_for(network.backbone, seed)
        noise_TK = gumbel_noise(network.A_TK.shape, random(seed)).to(network.A_TK)[:, columns]
        optimizer.zero_grad()
        losses = network.losses_at(gumbel_softmax(network.A_TK, noise_TK, network.tau), x, targets)
        torch.autograd.backward(losses.tasks_T @ network.task_weights_T + losses.penalty)
        optimizer.step()

    for seed in range(steps):
        step(network, optimizer, seed, [0, 1, 2])
    other, other_optimizer = permuted(network, optimizer, order)
    for seed in range(steps, 2 * steps):
        step(network, optimizer, seed, [0, 1, 2])
        step(other, other_optimizer, seed, order)
    torch.testing.assert_close(other.A_TK, network.A_TK[:, order])
    assert other.grouping == network.grouping
    x, _ = batch_for(network.backbone, 99)
    for name, output in network(x).items():
        torch.testing.assert_close(other(x)[name], output)


@pytest.mark.parametrize("scaling", ["off", "intended", "as_released"])
@pytest.mark.parametrize("loss_normalisation", ["none", "initial", "running"])
def test_groups_have_no_order(scaling: str, loss_normalisation: str) -> None:
    options = {"scaling": scaling, "loss_normalisation": loss_normalisation, "entropy_weight": 0.3}
    network = scatter(build_on(BACKBONES[0], groups=3, split=1, **options))
    check_that_groups_have_no_order(network, steps=5)


@every_backbone
def test_on_every_backbone_groups_have_no_order(backbone: Backbone) -> None:
    check_that_groups_have_no_order(scatter(build_on(backbone, groups=3)), steps=1)


def test_by_default_gradients_are_scaled_where_a_task_is_dense(tasks: TaskSet) -> None:
    backbone = CNN(input_shape=(3, 16, 16), width=0.0625)
    dense = TaskSet([*tasks, Task(name="far", kind=TaskKind.DEPTH)])
    for its, scales in ((tasks, (1.0, 1.0)), (dense, (2**-0.5, 5**-0.5))):
        network = DMTG(backbone=backbone, tasks=its, groups=2)
        assert (network.branch_scale, network.head_scale) == scales


@pytest.mark.parametrize(("fine_tune", "epochs"), [(0.8, 2), (0.9, 4), (0.6, 1), (0.99, 3)])
@pytest.mark.parametrize("init", ["equal", "affinity"])
def test_fine_tuning_leaves_an_epoch_to_learn_the_groups(
    tasks: TaskSet, fine_tune: float, epochs: int, init: str
) -> None:
    fine_tune = min(fine_tune, 0.74) if init == "affinity" else fine_tune  # a quarter is for measuring
    network = build(tasks, groups=2, fine_tune=fine_tune, init=init)
    x, targets = batch(tasks)
    learned = []
    for epoch in range(epochs):
        network.begin_epoch(epoch, epochs)
        torch.autograd.backward(network.training_loss(x, targets, random(epoch)))
        learned.append(network.A_TK.grad is not None)
        network.zero_grad()
    assert any(learned) or (init == "affinity" and epochs == 1)  # then all is probing


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
        for name, parameter in network.named_parameters():
            if name.startswith("heads.") and name.endswith("bias"):
                parameter.fill_(1e4)
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
        ("loss_normalisation", "final"),
        ("init", "random"),
        ("tau", 1e-4),
        ("tau", 1e4),
        ("tau_end", 0.0),
        ("tau_end", 1e4),
        ("logits_lr", 1e39),
        ("patience", 10**400),
        ("patience", True),
        *(
            (name, value)
            for name in ("tau", "tau_end", "logits_lr", "entropy_weight", "probe", "epsilon", "fine_tune")
            for value in NO_NUMBERS
            if value is not None or name not in {"tau_end", "logits_lr"}
        ),
        ("probe", 0.0),
        ("probe", 1.0),
        ("epsilon", -0.1),
        ("epsilon", 1.0),
        ("patience", 0),
        ("fine_tune", 1.0),
        ("fine_tune", math.nan),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_its_name(name: str, value: object, tasks: TaskSet) -> None:
    parameters: dict[str, Any] = {"groups": 2, name: value}
    with pytest.raises(ValueError, match=f"{name}: must be"):
        build(tasks, **parameters)


def test_the_number_of_groups_has_no_default(tasks: TaskSet) -> None:
    with pytest.raises(ValueError, match="'dmtg' must have \\['groups'\\]"):
        build(tasks)


@settings(max_examples=15)
@given(st.floats(0.1, 10), st.floats(0.1, 10), st.integers(1, 9), st.data())
def test_the_temperature_goes_to_its_end_geometrically(
    make_tasks: MakeTasks, tau: float, tau_end: float, epochs: int, data: st.DataObject
) -> None:
    network = scatter(build(make_tasks(1, 2), groups=2, tau=tau, tau_end=tau_end))
    epoch = data.draw(st.integers(0, epochs - 1))
    x, targets = batch(network.tasks)
    assert not network.begin_epoch(epoch, epochs)
    expected_tau = math.exp(
        math.log(tau) + (math.log(tau_end) - math.log(tau)) * (epoch / (epochs - 1) if epoch else 0)
    )
    G_TK = gumbel_softmax(network.A_TK, gumbel_noise(network.A_TK.shape, random(0)), expected_tau)
    torch.testing.assert_close(
        network.training_loss(x, targets, random(0)), (G_TK * plain_losses(network, x, targets)).sum()
    )


def test_running_normalisation_divides_by_a_slow_mean_of_the_tasks_losses(tasks: TaskSet) -> None:
    network = scatter(build(tasks, groups=3, loss_normalisation="running"))
    scales_T = None
    for seed in range(4):
        x, targets = batch(tasks, seed)
        with torch.no_grad():
            c_TK = plain_losses(network, x, targets)
            usual_T = c_TK.mean(dim=1) / network.task_weights_T
            scales_T = usual_T if scales_T is None else 0.99 * scales_T + 0.01 * usual_T
            G_TK = gumbel_softmax(network.A_TK, gumbel_noise(network.A_TK.shape, random(seed)), network.tau)
        expected = (G_TK * c_TK / scales_T[:, None]).sum()
        torch.testing.assert_close(network.training_loss(x, targets, random(seed)), expected)


@pytest.mark.parametrize("loss_normalisation", ["initial", "running"])
def test_a_batch_without_labels_does_not_count_as_a_loss_of_zero(
    loss_normalisation: str, tasks: TaskSet
) -> None:
    x, targets = batch(tasks)
    networks = [scatter(build(tasks, groups=2, loss_normalisation=loss_normalisation)) for _ in range(2)]
    unlabelled = {**targets, "b": torch.full((7,), math.nan)}
    networks[0].training_loss(x, unlabelled, random(0))
    losses = [network.losses(x, targets, random(1)).tasks_T[1] for network in networks]
    assert losses[0] == losses[1] > 0


@given(st.floats(-8, 8), st.floats(0.2, 5))
def test_the_expected_sample_of_two_groups_is_the_logistic_integral(difference: float, tau: float) -> None:
    # The difference of two Gumbel variables is logistic.
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    expected = torch.sigmoid((difference + torch.logit(u)) / tau).mean()
    E_TK = expected_sample(torch.tensor([[difference, 0.0]]), tau)
    assert E_TK.sum().item() == pytest.approx(1, abs=1e-6)
    assert E_TK[0, 0].item() == pytest.approx(expected.item(), abs=1e-3)


def test_the_expected_sample_is_the_mean_of_samples_and_draws_nothing_from_outside() -> None:
    A_TK = torch.tensor([[1.0, 0.0, -2.0, 3.0], [1.0, 1.0, 1.0, -math.inf]])
    before = torch.get_rng_state()
    E_TK = expected_sample(A_TK, 2.5)
    assert torch.equal(torch.get_rng_state(), before)
    noise = gumbel_noise(torch.Size([400_000, 2, 4]), random(0))
    torch.testing.assert_close(
        E_TK, torch.softmax((A_TK + noise) / 2.5, dim=2).mean(dim=0), rtol=0, atol=2e-3
    )
    assert E_TK[1, 3] == 0


def test_a_faint_head_leaves_once_it_was_faint_for_long_enough(tasks: TaskSet) -> None:
    network = decided(scatter(build(tasks, groups=3, epsilon=0.05, patience=3)), [0, 1, 1, 0])
    with torch.no_grad():
        network.A_TK[3, 2] += 30  # the last task is torn between the first group and the third
    x, targets = batch(tasks)
    torch.autograd.backward(network.training_loss(x, targets, random(0)))
    everything = set(gradients(network))
    for epoch in (0, 1, 1):  # going on from a checkpoint begins an epoch again
        network.begin_epoch(epoch, 10)
    assert not network.dropped_TK.any()
    with torch.no_grad():
        network.A_TK[0, 1] += 30  # not faint any more: it counts from the start again
    network.begin_epoch(2, 10)
    with torch.no_grad():
        network.A_TK[0, 1] -= 30
    network.begin_epoch(3, 10)
    left = [[True, True, False], [False, True, False], [False, True, False], [True, False, True]]
    assert network.dropped_TK.tolist() == [[not kept for kept in row] for row in left]

    network.zero_grad()
    losses = network.losses(x, targets, random(0))
    torch.autograd.backward(losses.tasks_T.sum())
    gone = everything - set(gradients(network))
    assert gone == {
        name
        for name in everything
        if name.startswith(tuple(f"heads.{k}.{t}." for t in range(4) for k in range(3) if not left[t][k]))
    }
    # the noise of the heads that are left is what it would have been
    A_TK = network.A_TK.masked_fill(~torch.tensor(left), -math.inf)
    G_TK = gumbel_softmax(A_TK, gumbel_noise(A_TK.shape, random(0)), network.tau)
    expected_T = (G_TK * plain_losses(network, x, targets)).sum(dim=1) / network.task_weights_T
    torch.testing.assert_close(losses.tasks_T, expected_T)


@settings(max_examples=15)
@given(st.lists(st.integers(0, 2), min_size=4, max_size=4), seeds)
def test_a_task_keeps_its_best_head_and_a_branch_without_heads_leaves(
    make_tasks: MakeTasks, labels: list[int], seed: int
) -> None:
    network = scatter(build(make_tasks(1, 2, 1, 0.5), groups=3, split=1, epsilon=0.99, patience=1), seed)
    decided(network, labels, by=2.0)
    grouping = network.grouping
    network.begin_epoch(0, 5)
    assert (~network.dropped_TK).nonzero().tolist() == [[t, k] for t, k in enumerate(labels)]
    assert network.grouping == grouping
    x, targets = batch(network.tasks, seed)
    loss = network.training_loss(x, targets, random(seed))
    torch.testing.assert_close(loss, plain_losses(network, x, targets)[range(4), labels].sum())
    torch.autograd.backward(loss)
    trained = {name.split(".")[1] for name in gradients(network) if name.startswith("branches.")}
    assert trained == {str(k) for k in labels}


def train(
    network: MultiTaskNetwork, epochs: int, *, stop: int | None = None
) -> list[tuple[dict[str, Tensor], dict[str, Any], Tensor]]:
    """Train, one batch an epoch; give network, optimizer and random state before each epoch."""
    generator = random(7)
    optimizer = torch.optim.Adam(network.parameter_groups(1e-2, 1e-3))
    return go_on(network, optimizer, generator, range(epochs if stop is None else stop), epochs)


def go_on(
    network: MultiTaskNetwork,
    optimizer: torch.optim.Adam,
    generator: torch.Generator,
    which: range,
    epochs: int,
) -> list[tuple[dict[str, Tensor], dict[str, Any], Tensor]]:
    checkpoints = []
    for epoch in which:
        checkpoints.append(
            copy.deepcopy((network.state_dict(), optimizer.state_dict(), generator.get_state()))
        )
        if network.begin_epoch(epoch, epochs):
            optimizer = torch.optim.Adam(network.parameter_groups(1e-2, 1e-3))
        for part in range(3):
            train_step(network, optimizer, *batch(network.tasks, 10 * epoch + part), generator)
    return checkpoints


@pytest.mark.parametrize("draws", [0.0, 0.99])
def test_pruning_never_touches_the_random_stream(draws: float, tasks: TaskSet) -> None:
    networks = [scatter(build(tasks, groups=3, **options)) for options in ({}, {"epsilon": draws})]
    states = [train(network, 6)[-1] for network in networks]
    assert torch.equal(states[0][2], states[1][2])
    if draws == 0:  # the plain form bit for bit
        assert all(torch.equal(value, states[1][0][name]) for name, value in states[0][0].items())
    else:
        assert states[1][0]["dropped_TK"].sum() == 8


def with_batch_norm() -> DMTG:
    network = scatter(build_on(BACKBONES[1], groups=3, split=1, fine_tune=0.5, entropy_weight=0.3))
    return decided(network, [2, 0, 2, 2, 0, 0], by=3.0)


@pytest.mark.parametrize("mode_first", [True, False])
def test_fine_tuning_trains_each_group_on_its_tasks_behind_a_fixed_prefix(mode_first: bool) -> None:
    network = with_batch_norm()
    x, targets = batch_for(network.backbone)
    if mode_first:
        network.train()
    assert not network.begin_epoch(1, 2)
    if not mode_first:
        network.train()
    before = copy.deepcopy(network.prefix.state_dict())
    generator = random(0)
    losses = network.losses(x, targets, generator)
    torch.autograd.backward(losses.tasks_T.sum())
    assert losses.penalty == 0
    assert torch.equal(generator.get_state(), random(0).get_state())
    assert all(torch.equal(value, before[name]) for name, value in network.prefix.state_dict().items())
    kept = ("branches.2.", "branches.0.", "heads.2.0.", "heads.0.1.", "heads.2.2.", "heads.2.3.")
    kept += ("heads.0.4.", "heads.0.5.")
    assert set(gradients(network)) == {
        name for name, _ in network.named_parameters() if name.startswith(kept)
    }

    static = network.prune().train()
    for name, module in static.named_modules():
        if name.startswith("prefix"):
            module.eval()
    torch.testing.assert_close(losses.tasks_T, task_losses(static(x), targets, network.tasks))


def test_before_fine_tuning_everything_learns() -> None:
    network = with_batch_norm().train()
    network.begin_epoch(0, 2)
    assert network.prefix.training
    torch.autograd.backward(network.training_loss(*batch_for(network.backbone), random(0)))
    assert set(gradients(network)) == {name for name, _ in network.named_parameters()}
    network.begin_epoch(1, 2)
    network.eval()
    assert not any(module.training for module in network.modules())


EVERYTHING = {
    "groups": 3,
    "split": 1,
    "tau_end": 0.5,
    "logits_lr": 0.3,
    "loss_normalisation": "running",
    "init": "affinity",
    "epsilon": 0.15,
    "patience": 2,
    "fine_tune": 0.2,
}


@pytest.mark.parametrize("epoch", range(10))
def test_a_training_goes_on_from_any_epoch_as_if_it_had_not_stopped(epoch: int, tasks: TaskSet) -> None:
    network = build(tasks, **EVERYTHING)
    state, optimizer_state, random_state = train(network, 10)[epoch]
    assert network.dropped_TK.any()

    other = build(tasks, seed=3, **EVERYTHING)
    other.restore(state)
    optimizer = torch.optim.Adam(other.parameter_groups(1e-2, 1e-3))
    optimizer.load_state_dict(optimizer_state)
    generator = random(0)
    generator.set_state(random_state)
    go_on(other, optimizer, generator, range(epoch, 10), 10)
    expected = network.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())


@given(st.floats(0.01, 0.99), st.integers(1, 200))
def test_a_probe_has_an_epoch_and_leaves_one(share: float, epochs: int) -> None:
    probed = probe_epochs(share, epochs)
    if epochs == 1:
        assert probed == 1
    else:
        assert 1 <= probed < epochs
        assert abs(probed - share * epochs) <= 1


def test_the_probe_trains_one_shared_network_and_then_fresh_branches_start(tasks: TaskSet) -> None:
    network = build(tasks, groups=3, init="affinity", probe=0.5)
    torch.manual_seed(0)
    shared = Shared(backbone=BACKBONE, tasks=tasks)
    fresh = copy.deepcopy(network.branches.state_dict() | network.heads.state_dict())
    for one in (network, shared):
        train(one, 8, stop=4)
    assert network.grouping == Grouping.together(4)
    assert torch.equal(network.A_TK, torch.ones(4, 3))
    for name, tensor in network.prune().state_dict().items():
        torch.testing.assert_close(tensor, shared.prune().state_dict()[name], rtol=1e-3, atol=1e-4)

    assert network.begin_epoch(4, 8)
    started = copy.deepcopy(network.state_dict())
    for name, tensor in (network.branches.state_dict() | network.heads.state_dict()).items():
        assert torch.equal(tensor, fresh[name])
    assert network.A_TK.square().mean().sqrt().item() == pytest.approx(1.5 * network.tau)
    assert not network.begin_epoch(4, 8)
    assert all(torch.equal(value, started[name]) for name, value in network.state_dict().items())


def test_the_affinity_start_needs_two_groups(tasks: TaskSet) -> None:
    network = build(tasks, groups=1, init="affinity")
    assert not any(network.begin_epoch(epoch, 4) for epoch in range(4))
    assert network.training_loss(*batch(tasks), random(0)).requires_grad


def test_the_logits_start_at_the_mean_centred_affinity_to_each_group() -> None:
    # pairs (0, 1) help by 3, all others by 0: the mean is 1/2
    affinity_TT = torch.zeros(4, 4)
    affinity_TT[0, 1] = affinity_TT[1, 0] = 3
    A_TK = group_affinities(affinity_TT + 5 * torch.eye(4), Grouping(((0, 1), (2, 3))))
    expected = torch.tensor([[2.5, -0.5], [2.5, -0.5], [-0.5, -0.5], [-0.5, -0.5]], dtype=torch.float64)
    torch.testing.assert_close(A_TK, expected / expected.square().mean().sqrt())
    assert torch.equal(group_affinities(torch.ones(3, 3), Grouping.together(3)), torch.zeros(3, 1).double())


@settings(max_examples=25)
@given(st.lists(st.integers(0, 3), min_size=4, max_size=4), st.integers(0, 2))
def test_the_expected_cost_of_decided_groups_is_that_of_the_pruned_network(
    make_tasks: MakeTasks, labels: list[int], split: int
) -> None:
    network = decided(build(make_tasks(1, 2, 1, 0.5), groups=4, split=split), labels, by=1000)
    assert network.expected_cost() == count_cost(network.prune(), BACKBONE.input_shape)


@settings(max_examples=10)
@given(seeds, st.integers(1, 4))
def test_the_expected_branches_are_those_that_samples_of_the_grouping_use(
    make_tasks: MakeTasks, seed: int, groups: int
) -> None:
    network = scatter(build(make_tasks(1, 2, 1, 0.5), groups=groups, split=1), seed)
    draws = 4000
    noise = gumbel_noise(torch.Size([draws, 4, groups]), random(seed))
    chosen = F.one_hot((network.A_TK.detach() + noise).argmax(dim=2), groups).amax(dim=1)
    used = float(chosen.sum()) / draws
    expected, found = cost_of_groups(BACKBONE, network.tasks, 1, used), network.expected_cost()
    assert found.macs == pytest.approx(expected.macs, rel=0.02)
    assert found.params == pytest.approx(expected.params, rel=0.02)


def test_heads_that_were_dropped_keep_no_branch(tasks: TaskSet) -> None:
    network = decided(build(tasks, groups=3, epsilon=0.2, patience=1, tau=1.0), [0, 0, 0, 0], by=4)
    before = network.expected_cost()
    network.begin_epoch(0, 5)
    assert network.dropped_TK.sum() == 8
    assert before.macs > network.expected_cost().macs
    assert network.expected_cost() == count_cost(network.prune(), BACKBONE.input_shape)


def test_groups_that_are_fine_tuned_cost_what_the_pruned_network_does(tasks: TaskSet) -> None:
    network = scatter(build(tasks, groups=3, fine_tune=0.5))
    exact = count_cost(network.prune(), BACKBONE.input_shape)
    network.begin_epoch(1, 4)
    assert network.expected_cost() != exact
    network.begin_epoch(2, 4)
    assert network.expected_cost() == exact


def test_while_affinity_is_measured_any_grouping_may_come(tasks: TaskSet) -> None:
    network = build(tasks, groups=2, init="affinity")
    network.begin_epoch(0, 4)
    used = 2 * (1 - 0.5**4)  # a branch is used unless all four tasks end in the other one
    assert network.expected_cost() == cost_of_groups(BACKBONE, tasks, 0, used)
