import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from coterie.models.backbones import BACKBONES, MLP, Backbone
from coterie.models.cost import Cost, count_cost, macs_by_node, sum_costs, unit_costs
from coterie.models.families import InterroGate, MultiTaskNetwork, Single, build_network
from coterie.models.families.interrogate import GATE_LIMIT, GatedTrunk
from coterie.models.heads import head_cost
from coterie.models.layers import BatchNorm
from coterie.models.static import StaticNetwork
from coterie.models.tasks import Task, TaskKind, TaskSet
from tests.models.not_numbers import NO_NUMBERS

SIZES: dict[str, dict[str, Any]] = {
    "mlp": {"input_shape": (2, 3), "width": 6, "depth": 3},
    "cnn": {"input_shape": (2, 13, 14), "width": 1 / 8},
    "resnet20": {"input_shape": (16, 16), "width": 1 / 4},
    "resnet18": {"input_shape": (3, 32, 32), "width": 1 / 16},
    "resnet50_dilated": {"input_shape": (3, 16, 16), "width": 1 / 16},
    "vit_tiny": {"input_shape": (1, 8, 8), "width": 1 / 16},
    "vit_small": {"input_shape": (3, 8, 8), "width": 1 / 32},
}
SMALL_MLP = MLP(**SIZES["mlp"])
VECTOR = (
    Task(name="binary", kind=TaskKind.BINARY, weight=2.0),
    Task(name="classes", kind=TaskKind.MULTICLASS, outputs=3, weight=0.5),
    Task(name="numbers", kind=TaskKind.REGRESSION, outputs=2),
)
DENSE = (
    VECTOR[0],
    Task(name="depth", kind=TaskKind.DEPTH),
    Task(name="normals", kind=TaskKind.NORMALS, outputs=3),
)
BINARY = (Task(name="a", kind=TaskKind.BINARY, weight=2.0), Task(name="b", kind=TaskKind.BINARY, weight=0.5))

MakeTasks = Callable[..., TaskSet]
seeds = st.integers(0, 2**31)
every_backbone = pytest.mark.parametrize("name", list(BACKBONES))
every_network = pytest.mark.parametrize(
    ("name", "tasks"),
    [
        *((name, TaskSet(VECTOR)) for name in BACKBONES),
        *((name, TaskSet(DENSE)) for name in ("cnn", "vit_tiny")),
    ],
    ids=[*BACKBONES, "cnn-dense", "vit_tiny-dense"],
)


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(name: str) -> Backbone:
    return BACKBONES[name](**SIZES[name])


def build(backbone: Backbone, tasks: TaskSet, seed: int = 0, **parameters: Any) -> InterroGate:
    torch.manual_seed(seed)
    network = build_network("interrogate", backbone=backbone, tasks=tasks, parameters=parameters)
    assert isinstance(network, InterroGate)
    return network


def batch(backbone: Backbone, seed: int = 0, size: int = 3) -> Tensor:
    return torch.randn(size, *backbone.input_shape, generator=random(seed))


def scatter(network: nn.Module, seed: int = 0) -> None:
    """Move every weight, statistic, alpha and beta away from where it starts, each channel differently."""
    noise = random(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            draw = torch.randn(parameter.shape, generator=noise)
            if "alphas" in name or "betas" in name:
                parameter.copy_(draw)
            else:
                parameter.add_(draw, alpha=0.02 if parameter.dim() > 1 else 0.2)
        for module in network.modules():
            if isinstance(module, BatchNorm):
                channels = module.num_features
                module.running_mean = 0.2 * torch.randn(channels, generator=noise)
                module.running_var = 0.5 + 2 * torch.rand(channels, generator=noise)


def set_gates(network: InterroGate, open_share: float, seed: int = 0) -> None:
    """Open this share of all gates, at random."""
    with torch.no_grad():
        for number, alpha in enumerate(network.trunk.alphas):
            draw = torch.rand(alpha.shape, generator=random(seed + number))
            alpha.copy_(torch.where(draw < open_share, 1.0, -1.0))


def without_gates(network: InterroGate, family: str) -> MultiTaskNetwork:
    """A plain network with the weights of the shared branch (`shared`) or of the tasks' own (`single`)."""
    plain = build_network(family, backbone=network.backbone, tasks=network.tasks, parameters={})
    sources = network.trunks()[1:] if family == "single" else network.trunks()[:1]
    for units, source in zip(plain.trunks(), sources, strict=True):
        for unit, other in zip(units, source, strict=True):
            unit.load_state_dict(other.state_dict())
    heads = plain.heads
    assert isinstance(heads, nn.Module)
    heads.load_state_dict(network.heads.state_dict())
    return plain.eval()


def macs(network: StaticNetwork) -> float:
    return count_cost(network, network.graph.input_shape).macs


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert value.std() > 1e-4, f"{name} shows nothing"
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@every_network
@pytest.mark.parametrize(("open_share", "family"), [(0.0, "shared"), (1.0, "single")])
@torch.no_grad()
def test_all_gates_closed_is_shared_and_all_open_is_single(
    name: str, tasks: TaskSet, open_share: float, family: str
) -> None:
    network = build(small(name), tasks).eval()
    scatter(network)  # beta too: it must not matter
    set_gates(network, open_share)
    plain, x = without_gates(network, family), batch(network.backbone)
    expected = plain(x)
    assert_close(network(x), expected)
    exported, expected_export = network.prune(), plain.prune()
    assert_close(exported(x), expected)
    assert count_cost(exported, x.shape[1:]) == count_cost(expected_export, x.shape[1:])


@every_network
@torch.no_grad()
def test_the_exported_network_is_the_gated_one_for_any_pattern(name: str, tasks: TaskSet) -> None:
    network = build(small(name), tasks).eval()
    for seed, open_share in enumerate((0.5, 0.05)):
        scatter(network, seed)
        set_gates(network, open_share, seed)
        x = batch(network.backbone, seed)
        assert_close(network.prune()(x), network(x))


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.lists(st.sampled_from((0.0, 0.2, 0.8, 1.0)), min_size=9, max_size=9),
    seeds,
)
@torch.no_grad()
def test_the_exported_network_is_the_gated_one_where_whole_layers_are_open_or_closed(
    make_tasks: MakeTasks, depth: int, width: int, shares: list[float], seed: int
) -> None:
    tasks = make_tasks(1, 1, 1)
    network = build(MLP(input_shape=(4,), width=width, depth=depth), tasks).eval()
    scatter(network, seed)
    for alpha, *share_T in zip(network.trunk.alphas, shares[::3], shares[1::3], shares[2::3], strict=False):
        draw = torch.rand(alpha.shape, generator=random(seed))
        alpha.copy_(torch.where(draw < torch.tensor(share_T)[:, None], 1.0, -1.0))
    x = batch(network.backbone, seed, size=5)
    for found, expected in zip(network.prune()(x).values(), network(x).values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cnn", "resnet20", "vit_tiny"])
@torch.no_grad()
def test_a_task_whose_later_gates_are_closed_rides_on_the_shared_branch(name: str) -> None:
    tasks = TaskSet(VECTOR[:2])
    network = build(small(name), tasks).eval()
    scatter(network)
    middle = len(network.trunk.alphas) // 2
    for number, alpha in enumerate(network.trunk.alphas):
        alpha.fill_(1)
        alpha[0] = -1.0 if number >= middle else 1.0
    kept = {node.name for node in network.prune().nodes}
    last = network.trunk.sites[-1].node
    behind = [node.name for node in network.trunk.nodes if node.name.startswith(last.split(".")[0])]
    assert any(name.startswith("tasks.0.") for name in kept)  # it feeds the mixture
    assert not {f"tasks.0.{name}" for name in behind} & kept
    assert f"tasks.1.{last}" in kept


def test_a_shared_branch_that_nobody_reads_disappears() -> None:
    network = build(SMALL_MLP, TaskSet(VECTOR))
    network.trunk.alphas[0].data[:, 1] = -1
    kept = {node.name for node in network.prune().nodes}
    assert {name for name in kept if name.startswith("shared.")} == {"shared.linear1", "shared.relu1"}
    mixes = [node for node in network.prune().nodes if node.kind == "mix"]
    assert mixes == []


@given(st.data())
@torch.no_grad()
def test_closing_a_gate_never_adds_macs_where_every_unit_is_one_layer(
    make_tasks: MakeTasks, data: st.DataObject
) -> None:
    tasks = make_tasks(*[1.0] * data.draw(st.integers(1, 3)))
    backbone = MLP(input_shape=(3,), width=data.draw(st.integers(1, 4)), depth=data.draw(st.integers(1, 3)))
    network = build(backbone, tasks)
    set_gates(network, data.draw(st.sampled_from((0.2, 0.5, 0.8, 1.0))), data.draw(seeds))
    layer = data.draw(st.integers(0, backbone.depth - 1))
    alpha = network.trunk.alphas[layer]
    opened = alpha.nonzero()[(alpha >= 0).flatten()].tolist()
    assume(opened)
    task, channel = data.draw(st.sampled_from(opened))
    before = network.prune()
    alpha[task, channel] = -1
    after = network.prune()
    own, shared = f"tasks.{task}.linear{layer + 1}", f"shared.linear{layer + 1}"
    own_used = any(node.name == own for node in before.nodes)
    shared_used = (
        own_used
        and (alpha[:, channel] < 0).sum() > 1
        and _shared_channels(before, shared) == (_shared_channels(after, shared))
    )
    if shared_used:
        assert macs(after) < macs(before)
    else:
        assert macs(after) <= macs(before)


def _shared_channels(network: StaticNetwork, name: str) -> int:
    return sum(int(node.settings["outputs"]) for node in network.nodes if node.name == name)


@every_backbone
def test_the_shared_branch_learns_from_the_mixture_and_each_own_branch_from_its_task(name: str) -> None:
    network = build(small(name), TaskSet(VECTOR)).train()
    scatter(network)
    set_gates(network, 0.5)
    x = batch(network.backbone, size=4)
    torch.autograd.backward(network(x)["binary"].sum())
    reached = {key for key, parameter in network.named_parameters() if parameter.grad is not None}
    alphas = {key for key, _ in network.named_parameters() if "alphas" in key}
    betas = {key for key, _ in network.named_parameters() if "betas" in key}
    assert alphas | betas <= reached
    shared = {key for key in reached if key.startswith("trunk.shared.")}
    own = {key for key in reached if key.startswith("trunk.own.0.")}
    assert {key.removeprefix("trunk.own.0.") for key in own} == {
        key.removeprefix("trunk.shared.") for key in shared
    }


@pytest.mark.parametrize(
    ("name", "number", "shape"), [("mlp", 0, (4, 6)), ("cnn", 1, (4, 8, 3, 2)), ("vit_tiny", 1, (4, 5, 12))]
)
def test_a_gate_passes_one_side_exactly_and_gets_the_gradient_of_the_sigmoid(
    name: str, number: int, shape: tuple[int, ...]
) -> None:
    network = build(small(name), TaskSet(BINARY)).double()
    scatter(network)
    alpha, beta, site = network.trunk.alphas[number], network.trunk.betas[number], network.trunk.sites[number]
    noise = random(0)
    sides = [torch.randn(shape, generator=noise, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    upstream = [torch.randn(shape, generator=noise, dtype=torch.float64) for _ in range(3)]
    psi, *phis = sides

    share = beta.exp() / beta.exp().sum(dim=0)
    expected = [torch.zeros_like(psi)]
    for t, phi in enumerate(phis):
        a, b = (along_channels(values[t], psi, site.block) for values in (alpha, share))
        straight_through = (a.sigmoid() - a.sigmoid().detach()) * (phi - psi).detach()
        expected.append(torch.where(a >= 0, phi, psi) + straight_through)
        expected[0] = expected[0] + b * expected[-1]
    found = network.trunk._gate(number, psi, *phis)

    for value, reference in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(value, reference)
    torch.testing.assert_close(found[0], expected[0])
    leaves = [*sides, alpha, beta]
    gradients = torch.autograd.grad(found, leaves, upstream)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, leaves, upstream), strict=True):
        assert reference.any()
        torch.testing.assert_close(gradient, reference)


def along_channels(values: Tensor, x: Tensor, block: int) -> Tensor:
    values = values.repeat_interleave(block)
    return values if x.dim() == 3 else values.view(-1, *(1,) * (x.dim() - 2))


@given(st.sampled_from((0.0, 0.3, 0.9)), st.floats(0.01, 10), seeds)
def test_the_price_of_open_gates_is_the_papers(own_share: float, sparsity_weight: float, seed: int) -> None:
    network = build(
        MLP(input_shape=(3,), width=4, depth=2),
        TaskSet(BINARY),
        own_share=own_share,
        sparsity_weight=sparsity_weight,
    )
    noise = random(seed)
    with torch.no_grad():
        for alpha in network.trunk.alphas:
            alpha.uniform_(-GATE_LIMIT, GATE_LIMIT, generator=noise)
    excess = 0.0
    for t in range(2):
        layers = [sum(torch.sigmoid(alpha[t]).tolist()) / 4 for alpha in network.trunk.alphas]
        excess += max(0.0, sum(layers) / 2 - own_share)
    found = network.losses(*labelled(network), random(0)).penalty
    assert found.item() == pytest.approx(sparsity_weight * (2.0 + 0.5) * excess / 2, rel=1e-5)


def test_layers_of_more_macs_weigh_more_if_asked() -> None:
    network = build(MLP(input_shape=(12,), width=4, depth=2), TaskSet(BINARY), weighting="macs")
    with torch.no_grad():
        network.trunk.alphas[0].fill_(2.0)
        network.trunk.alphas[1].fill_(-1.0)
    first, second = torch.tensor([2.0, -1.0]).sigmoid().tolist()
    expected = (12 * 4 * first + 4 * 4 * second) / (12 * 4 + 4 * 4)
    torch.testing.assert_close(network.trunk.own_shares(), torch.full((2,), expected))


@every_backbone
def test_the_weights_by_macs_are_those_of_the_layers_behind_each_gate(name: str) -> None:
    network = build(small(name), TaskSet(BINARY[:1]), weighting="macs")
    by_node = macs_by_node(without_gates(network, "shared").prune())
    backbone_macs = {key.split(".", 2)[2]: value for key, value in by_node.items() if key[:6] == "groups"}
    total, sites = sum(backbone_macs.values()), network.trunk.sites
    weights_L = [
        part.sum().item() for part in network.trunk.gate_weights.split([site.gates for site in sites])
    ]
    assert sum(weights_L) == pytest.approx(1, rel=1e-5)
    first = list(backbone_macs)[: list(backbone_macs).index(sites[0].node) + 1]
    assert weights_L[0] == pytest.approx(sum(backbone_macs[key] for key in first) / total, rel=1e-5)
    if name == "vit_tiny":
        heads = weights_L[[site.node for site in sites].index("blocks.3.attn.mix")]
        parts = [backbone_macs[f"blocks.3.attn.{part}"] for part in ("q", "k", "v", "mix")]
        assert parts[3] > 0
        assert heads == pytest.approx(sum(parts) / total, rel=1e-5)
        assert weights_L[-1] == 0  # a norm has no macs


@pytest.mark.parametrize("sparsity_weight", [0.0, 0.5])
def test_a_weight_of_0_leaves_the_price_out_of_the_gradient(sparsity_weight: float) -> None:
    network = build(SMALL_MLP, TaskSet(BINARY), sparsity_weight=sparsity_weight)
    losses = network.losses(*labelled(network), random(0))
    assert losses.penalty.requires_grad == bool(sparsity_weight)
    with_penalty = gradients(network, losses.tasks_T @ network.task_weights_T + losses.penalty)
    losses = network.losses(*labelled(network), random(0))
    without = gradients(network, losses.tasks_T @ network.task_weights_T)
    equal = [torch.equal(*pair) for pair in zip(with_penalty, without, strict=True)]
    assert all(equal) == (not sparsity_weight)


def gradients(network: nn.Module, loss: Tensor) -> Sequence[Tensor]:
    return torch.autograd.grad(loss, list(network.parameters()), allow_unused=True, materialize_grads=True)


def labelled(network: MultiTaskNetwork, seed: int = 0, size: int = 8) -> tuple[Tensor, dict[str, Tensor]]:
    noise, x = random(seed), batch(network.backbone, seed, size)
    return x, {name: torch.randint(2, (size,), generator=noise) for name in network.tasks.names}


@pytest.mark.parametrize(("sparsity_weight", "least", "most"), [(0.0, 0.8, 1.0), (3.0, 0.0, 0.2)])
def test_the_loss_falls_and_strength_closes_gates(sparsity_weight: float, least: float, most: float) -> None:
    network = build(SMALL_MLP, TaskSet(BINARY), sparsity_weight=sparsity_weight)
    optimizer = torch.optim.Adam(network.parameter_groups(lr=3e-3, weight_decay=1e-3))
    x, targets = labelled(network, size=32)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = network.losses(x, targets, random(0))
        losses.append(loss.tasks_T.sum().item())
        torch.autograd.backward(loss.tasks_T @ network.task_weights_T + loss.penalty)
        optimizer.step()
    assert losses[-1] < losses[0]
    network(x)
    assert max(alpha.abs().max().item() for alpha in network.trunk.alphas) <= GATE_LIMIT
    gates = torch.cat([gates.flatten() for gates in network.trunk.gates.values()])
    assert least <= gates.float().mean().item() <= most


def test_the_parameter_groups_hold_everything_once_and_decay_only_weights() -> None:
    network = build(SMALL_MLP, TaskSet(BINARY), gate_lr=0.07)
    weights, betas, alphas = network.parameter_groups(lr=0.01, weight_decay=0.1)
    found = [id(parameter) for group in (weights, betas, alphas) for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in network.parameters())
    assert [id(p) for p in alphas["params"]] == [id(p) for p in network.trunk.alphas]
    assert [id(p) for p in betas["params"]] == [id(p) for p in network.trunk.betas]
    assert [group["lr"] for group in (weights, betas, alphas)] == [0.01, 0.01, 0.07]
    assert [group["weight_decay"] for group in (weights, betas, alphas)] == [0.1, 0.0, 0.0]


def test_gates_stand_still_in_the_last_tenth_of_the_epochs() -> None:
    network = build(SMALL_MLP, TaskSet(BINARY))
    scatter(network)
    set_gates(network, 0.5)
    optimizer = torch.optim.Adam(network.parameter_groups(lr=1e-3, weight_decay=0.0))
    x, targets = labelled(network)
    moved = []
    for epoch in range(20):
        assert not network.begin_epoch(epoch, 20)
        before = [parameter.detach().clone() for parameter in network.parameters()]
        optimizer.zero_grad(set_to_none=False)
        torch.autograd.backward(network.training_loss(x, targets, random(0)))
        optimizer.step()
        names = [name for name, _ in network.named_parameters()]
        still = {
            name
            for name, one, other in zip(names, before, network.parameters(), strict=True)
            if torch.equal(one, other)
        }
        moved.append(not still)
        if still:
            assert still == {name for name in names if "alphas" in name}
    assert moved == [True] * 18 + [False] * 2


def test_a_restored_training_goes_on_as_if_it_had_not_stopped() -> None:
    def train(network: InterroGate, optimizer: torch.optim.Optimizer, epochs: range) -> None:
        for epoch in epochs:
            network.begin_epoch(epoch, 10)
            optimizer.zero_grad()
            torch.autograd.backward(network.training_loss(*labelled(network, epoch), random(epoch)))
            optimizer.step()

    def start(seed: int) -> tuple[InterroGate, torch.optim.Optimizer]:
        network = build(small("cnn"), TaskSet(BINARY), seed)
        return network, torch.optim.Adam(network.parameter_groups(lr=1e-3, weight_decay=0.0))

    network, optimizer = start(0)
    train(network, optimizer, range(9))
    again, its_optimizer = start(1)
    again.restore(network.state_dict())
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(network, optimizer, range(9, 10))
    train(again, its_optimizer, range(9, 10))
    for one, other in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_settling_takes_the_statistics_of_the_batches_anew() -> None:
    network = build(small("cnn"), TaskSet(BINARY)).eval()
    scatter(network)
    set_gates(network, 0.5)
    batches = [batch(network.backbone, seed, size=16) for seed in range(3)]
    network.settle(iter(batches))
    assert not network.training
    unit = network.trunk.shared[0]
    assert isinstance(unit, nn.Module)
    conv, norm = unit.get_submodule("conv1"), unit.get_submodule("bn1")
    expected = torch.stack([conv(x).mean(dim=(0, 2, 3)) for x in batches]).mean(dim=0)
    torch.testing.assert_close(norm.running_mean, expected, rtol=1e-4, atol=1e-5)


@every_backbone
@torch.no_grad()
def test_it_starts_from_single_task_networks(name: str) -> None:
    backbone = small(name)
    torch.manual_seed(1)
    single = Single(backbone=backbone, tasks=TaskSet(BINARY)).eval()
    network = build(backbone, single.tasks).eval()
    network.start_from(list(backbone.build()), single.trunks())
    network.heads.load_state_dict(single.heads.state_dict())
    x = batch(backbone)
    for found, expected in zip(network(x).values(), single(x).values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    network.start_from(single.trunks()[1])
    for branch in network.trunks():
        for unit, source in zip(branch, single.trunks()[1], strict=True):
            for key, tensor in unit.state_dict().items():
                assert torch.equal(tensor, source.state_dict()[key])


def test_its_branches_start_equal_and_apart() -> None:
    shared, *own = build(SMALL_MLP, TaskSet(BINARY)).trunks()
    for branch in own:
        for one, other in zip(parameters_of(shared), parameters_of(branch), strict=True):
            assert torch.equal(one, other)
            assert one.data_ptr() != other.data_ptr()


def parameters_of(units: Sequence[nn.Module]) -> Iterator[Tensor]:
    return (parameter for unit in units for parameter in unit.parameters())


@pytest.mark.parametrize("name", ["mlp", "cnn", "vit_tiny"])
def test_gradients_of_all_tasks_can_be_taken_at_once(name: str) -> None:
    network = build(small(name), TaskSet(BINARY))
    scatter(network)
    losses_T = network.losses(*labelled(network), random(0)).tasks_T
    parameters = list(network.trunk.parameters())
    together = torch.autograd.grad(
        losses_T,
        parameters,
        torch.eye(2),
        is_grads_batched=True,
        retain_graph=True,
        materialize_grads=True,
        allow_unused=True,
    )
    for t, loss in enumerate(losses_T):
        apart = torch.autograd.grad(
            loss, parameters, retain_graph=True, materialize_grads=True, allow_unused=True
        )
        for one, other in zip(together, apart, strict=True):
            torch.testing.assert_close(one[t], other, rtol=1e-4, atol=1e-6)


def test_a_trunk_may_stand_behind_other_units() -> None:
    backbone = small("cnn")
    _, behind = backbone.plan()
    torch.manual_seed(0)
    branches = [[backbone.build()[1]] for _ in range(3)]
    shape = backbone.output_shapes[0]
    trunk = GatedTrunk([behind], branches, shape=shape, gate_start=0.5, weighting="macs")
    x = torch.randn(2, *shape)
    for found, branch in zip(trunk(x), branches[1:], strict=True):
        torch.testing.assert_close(found, branch[0](x))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"sparsity_weight": -0.1}, "sparsity_weight: must be a finite number from 0, found -0.1"),
        ({"sparsity_weight": float("nan")}, "sparsity_weight: must be"),
        ({"own_share": 1.5}, "own_share: must be a number from 0 to 1, found 1.5"),
        ({"frozen": -0.5}, "frozen: must be a number from 0 to 1, found -0.5"),
        ({"gate_lr": 0.0}, "gate_lr: must be a finite number above 0, found 0.0"),
        ({"gate_start": 4.0}, "gate_start: must be a number from -3 to 3, found 4.0"),
        ({"weighting": "params"}, r"weighting: must be one of \('plain', 'macs'\), found 'params'"),
        *(
            ({name: value}, f"{name}: must be a .*number")
            for name in ("sparsity_weight", "own_share", "gate_lr", "gate_start", "frozen")
            for value in NO_NUMBERS
        ),
    ],
)
def test_a_bad_parameter_is_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(SMALL_MLP, TaskSet(BINARY), **parameters)


def scale_gates(network: InterroGate, factor: float) -> None:
    with torch.no_grad():
        for alpha in network.trunk.alphas:
            alpha.mul_(factor)


@every_backbone
@pytest.mark.parametrize("open_share", [0.03, 0.5, 1.0])
def test_the_expected_cost_of_decided_gates_is_that_of_the_pruned_network(
    name: str, open_share: float
) -> None:
    network = build(small(name), TaskSet(VECTOR))
    set_gates(network, open_share)
    scale_gates(network, 1000)
    found, exact = network.expected_cost(), count_cost(network.prune(), network.backbone.input_shape)
    assert found.macs == exact.macs
    # A branch's layer norm is there whole or not at all, whatever share of its readers is.
    norms = [node for node in network.trunk.nodes if node.kind == "layer_norm"]
    most = sum(2 * int(node.settings["channels"]) for node in norms) * len(VECTOR)
    assert abs(found.params - exact.params) <= most
    if not norms:
        assert found.params == exact.params


def test_gates_at_their_limits_count_as_decided() -> None:
    network = build(SMALL_MLP, TaskSet(VECTOR))
    set_gates(network, 0.3)
    scale_gates(network, GATE_LIMIT)
    exact = count_cost(network.prune(), SMALL_MLP.input_shape)
    assert network.expected_cost().macs == pytest.approx(exact.macs, rel=1e-9)


def test_the_expected_cost_by_hand() -> None:
    network = build(MLP(input_shape=(5,), width=2, depth=1), TaskSet(BINARY))
    with torch.no_grad():
        network.trunk.alphas[0].copy_(torch.tensor([[0.0, 99.0], [0.0, -99.0]]))
    # Channel 1: two own ones with chance 1/2, and the shared one unless both are open; channel 2: both.
    copies = (0.5 + 0.5 + 0.75) + (1 + 0 + 1)
    heads = Cost(macs=2 * 2, params=2 * 3)
    assert network.expected_cost() == Cost(macs=5 * copies, params=6 * copies) + heads


@given(seeds, st.data())
def test_the_expected_cost_falls_with_each_gate_that_closes_further(seed: int, data: st.DataObject) -> None:
    network = build(SMALL_MLP, TaskSet(VECTOR))
    scatter(network, seed)
    alphas = list(network.trunk.alphas)
    site = data.draw(st.integers(0, len(alphas) - 1))
    place = tuple(data.draw(st.integers(0, size - 1)) for size in alphas[site].shape)
    by = data.draw(st.floats(0.01, 2))
    before = network.expected_cost()
    with torch.no_grad():
        alphas[site][place] -= by
    after = network.expected_cost()
    if abs(float(alphas[site][place].detach())) < GATE_LIMIT:
        assert after.macs < before.macs
        assert after.params < before.params


def test_held_gates_count_as_they_stand() -> None:
    network = build(SMALL_MLP, TaskSet(VECTOR), frozen=0.5)
    scatter(network)
    exact = count_cost(network.prune(), SMALL_MLP.input_shape)
    network.begin_epoch(1, 4)
    assert network.expected_cost() != exact
    network.begin_epoch(2, 4)
    assert network.expected_cost() == exact


@every_backbone
def test_the_costs_of_sites_add_up_to_those_of_units(name: str) -> None:
    network = build(small(name), TaskSet(VECTOR))
    set_gates(network, 0.0)
    scale_gates(network, 1000)
    heads = sum_costs(head_cost(task, network.backbone) for task in network.tasks)
    assert network.expected_cost() == sum_costs(unit_costs(network.backbone)) + heads
