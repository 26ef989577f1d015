"""The contract of `MultiTaskNetwork`: every family on every backbone, through a whole training.

A family that is registered without an entry in `PARAMETERS` fails, and a backbone without one in
`BACKBONE_SIZES`.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coterie.models.backbones import BACKBONES
from coterie.models.cost import count_cost
from coterie.models.families import DMTG, FAMILIES, AffinityGrouped, MultiTaskNetwork, build_network
from coterie.models.families.grouped import cost_of_groups
from coterie.models.layers import KINDS
from coterie.models.losses import task_losses
from coterie.models.static import StaticNetwork
from coterie.models.tasks import DENSE, Task, TaskKind, TaskSet

# What each family is built with: every phase that it has happens within the few epochs here.
PARAMETERS: dict[str, dict[str, Any]] = {
    "single": {},
    "shared": {},
    "grouped": {"grouping": [["a", "c"], ["b"]], "split": 1},
    "dmtg": {
        "groups": 2,
        "split": 1,
        "tau_end": 1.0,
        "logits_lr": 0.2,
        "entropy_weight": 0.1,
        "scaling": "intended",
        "loss_normalisation": "running",
        "init": "affinity",
        "probe": 0.25,
        "epsilon": 0.1,
        "patience": 1,
        "fine_tune": 0.25,
    },
    "interrogate": {"gate_lr": 1.0, "sparsity_weight": 1.0, "frozen": 0.25, "weighting": "macs"},
    "etr_nlp": {"primitives": ("random_conv", "max_pool", "avg_pool", "identity", "noise")},
    "affinity": {"groups": 2, "split": 1, "probe": 0.25},
    "dmtg+interrogate": {"groups": 2, "split": 1, "gate_lr": 1.0, "sparsity_weight": 1.0, "group_share": 0.5},
}

BACKBONE_SIZES: dict[str, dict[str, Any]] = {
    "mlp": {"input_shape": (3, 4), "width": 24, "depth": 3},
    "cnn": {"input_shape": (3, 16, 16), "width": 0.125},
    "resnet20": {"input_shape": (3, 16, 16), "width": 0.5},
    # Twice the others' sides: on CPUs a bfloat16 convolution of stride 2 over a single place reads memory
    # that nobody wrote in its backward pass (PyTorch 2.13), and so gives NaN now and then.
    "resnet18": {"input_shape": (3, 32, 32), "width": 0.125},
    "resnet50_dilated": {"input_shape": (3, 16, 16), "width": 0.125},
    "vit_tiny": {"input_shape": (3, 16, 16), "width": 0.125},
    "vit_small": {"input_shape": (3, 16, 16), "width": 0.0625},
}

_VECTORS = (
    Task(name="a", kind=TaskKind.BINARY),
    Task(name="b", kind=TaskKind.MULTICLASS, outputs=3, weight=2.0),
    Task(name="c", kind=TaskKind.REGRESSION, outputs=2, weight=0.5),
)
_MAPS = (
    Task(name="a", kind=TaskKind.SEGMENTATION, outputs=4),
    Task(name="b", kind=TaskKind.DEPTH, weight=2.0),
    Task(name="c", kind=TaskKind.NORMALS, outputs=3, weight=0.5),
)
# A head is the same on every backbone, so every kind of task meets the cheap ones, and both forms of features
# (vector and map) all others.
TASKS: dict[str, TaskSet] = {
    "vectors": TaskSet(_VECTORS),
    "maps": TaskSet(_MAPS),
    "both": TaskSet((_VECTORS[0], _MAPS[1], _MAPS[2])),
}
KINDS_ON: dict[str, tuple[str, ...]] = {"mlp": ("vectors",), "cnn": ("vectors", "maps")}

BATCH = 4
EPOCHS = 4  # of one step each, all on one batch
LR = 5e-3
# Batch norms that saw four samples magnify rounding: one network answers this differently in another memory
# format. What must be equal is therefore compared in double precision, and less closely in single.
DOUBLE = {"rtol": 1e-6, "atol": 1e-8}
SINGLE = {"rtol": 1e-3, "atol": 1e-3}

Batch = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    family: str
    backbone: str
    kinds: str

    def __str__(self) -> str:
        return f"{self.family}-{self.backbone}-{self.kinds}"

    @property
    def tasks(self) -> TaskSet:
        return TASKS[self.kinds]

    def build(self, seed: int = 0) -> MultiTaskNetwork:
        backbone = BACKBONES[self.backbone](**BACKBONE_SIZES[self.backbone])
        torch.manual_seed(seed)
        return build_network(
            self.family, backbone=backbone, tasks=self.tasks, parameters=PARAMETERS[self.family]
        )

    def batch(self) -> Batch:
        shape = BACKBONE_SIZES[self.backbone]["input_shape"]
        random = torch.Generator().manual_seed(1)
        x = torch.randn(BATCH, *shape, generator=random)
        return x, {task.name: draw_targets(task, shape[-2:], random) for task in self.tasks}


CASES = [
    Case(family, backbone, kinds)
    for family in FAMILIES
    if family in PARAMETERS
    for backbone in BACKBONES
    if backbone in BACKBONE_SIZES
    for kinds in KINDS_ON.get(backbone, ("both",))
]
LEARN_THEIR_COST = {"dmtg", "interrogate", "affinity", "dmtg+interrogate"}
LEARN_IT_TO_THE_END = {"dmtg+interrogate"}  # of those here: its gates are held in no epoch
LAYER_NORMS_SHARE = 0.02  # of a small transformer's parameters, which the expectation counts by the channel
CHEAP_CASES = [case for case in CASES if case.backbone in KINDS_ON]


def draw_targets(task: Task, places: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Targets of a batch, some of them missing: the last sample's, or a corner of each map."""
    shape = (BATCH, *places) if task.kind in DENSE else (BATCH,)
    missing = (..., slice(0, 3), slice(0, 3)) if task.kind in DENSE else (-1,)
    if task.kind in {TaskKind.BINARY, TaskKind.MULTICLASS, TaskKind.SEGMENTATION}:
        classes = torch.randint(max(task.outputs, 2), shape, generator=random)
        classes[missing] = -1
        return classes
    channels = (task.outputs,) if task.outputs > 1 else ()
    values = torch.rand(shape[0], *channels, *shape[1:], generator=random) + 0.5
    if task.kind is TaskKind.NORMALS:
        values = nn.functional.normalize(values - 1.0, dim=1)
    values[missing] = torch.nan
    return values


@dataclass
class Checkpoint:
    state: dict[str, Tensor]
    optimizer: dict[str, Any]
    generator: Tensor


@dataclass
class Training:
    """The protocol that a trainer follows."""

    case: Case
    seed: int = 0
    network: MultiTaskNetwork = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    generator: torch.Generator = field(init=False)
    seen: set[str] = field(default_factory=set)
    reached: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.network = self.case.build(self.seed)
        self.optimizer = self._fresh_optimizer()
        self.generator = torch.Generator().manual_seed(5)

    def _fresh_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.network.parameter_groups(lr=LR, weight_decay=0.0), fused=True)

    def run_epoch(self, epoch: int) -> None:
        if self.network.begin_epoch(epoch, EPOCHS):
            self.optimizer = self._fresh_optimizer()
        self.network.train()
        x, targets = self.case.batch()
        self.optimizer.zero_grad()
        torch.autograd.backward(self.network.training_loss(x, targets, self.generator))
        for name, parameter in self.network.named_parameters():
            self.seen.add(name)
            if name not in self.reached and parameter.grad is not None and parameter.grad.any():
                self.reached.add(name)
        self.optimizer.step()

    def save(self) -> Checkpoint:
        return Checkpoint(
            state=copy_of(self.network),
            optimizer=copy.deepcopy(self.optimizer.state_dict()),
            generator=self.generator.get_state(),
        )

    def load(self, checkpoint: Checkpoint) -> None:
        self.network.restore(checkpoint.state)
        self.optimizer = self._fresh_optimizer()
        self.optimizer.load_state_dict(copy.deepcopy(checkpoint.optimizer))
        self.generator.set_state(checkpoint.generator)

    def settle(self) -> None:
        self.network.settle(iter([self.case.batch()[0]]))


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A training that is over, in eval mode, and what was seen on the way.

    Attributes:
        loss_before: Of the fresh network, as `weighted_loss` has it.
        loss_after: Of the trained one.
        left_out: Parameters that never had a gradient.
        draws_globally: Whether anything came from torch's global generator.
        x: The batch it was trained on.
        answers: To it.
        twin: A copy, in double precision.
        double_answers: The twin's.
        static: The pruned network.
        pruning_left_it_alone: Whether weights and mode were the same behind `prune`.
    """

    network: MultiTaskNetwork
    checkpoints: list[Checkpoint]
    loss_before: float
    loss_after: float
    left_out: set[str]
    draws_globally: bool
    x: Tensor
    answers: dict[str, Tensor]
    twin: MultiTaskNetwork
    double_answers: dict[str, Tensor]
    static: StaticNetwork
    pruning_left_it_alone: bool


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def fresh(case: Case) -> MultiTaskNetwork:
    """An untrained one, for tests that do not mind another's batch before theirs."""
    return case.build()


@pytest.fixture(scope="module")
def trained(case: Case) -> Trained:
    training = Training(case)
    network, (x, targets) = training.network, case.batch()
    loss_before = weighted_loss(network, x, targets)
    draws = torch.get_rng_state()
    checkpoints = []
    for epoch in range(EPOCHS):
        training.run_epoch(epoch)
        checkpoints.append(training.save())
    training.settle()
    draws_globally = not torch.equal(torch.get_rng_state(), draws)
    loss_after = weighted_loss(network, x, targets)
    before = copy_of(network)
    static = network.train().prune()
    left_alone = network.training and is_equal(before, network.state_dict())
    twin = copy.deepcopy(network.eval()).double()
    return Trained(
        network=network,
        checkpoints=checkpoints,
        loss_before=loss_before,
        loss_after=loss_after,
        left_out=training.seen - training.reached,
        draws_globally=draws_globally,
        x=x,
        answers=outputs(network, x),
        twin=twin,
        double_answers=outputs(twin, x.double()),
        static=static,
        pruning_left_it_alone=left_alone,
    )


def copy_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def is_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].nan_to_num(), other[name].nan_to_num()) for name in one
    )


def assert_equal_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name in one:
        assert torch.equal(one[name].nan_to_num(), other[name].nan_to_num()), name


def assert_close_tensors(
    one: Mapping[str, Tensor], other: Mapping[str, Tensor], tolerance: Mapping[str, float]
) -> None:
    assert list(one) == list(other)
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], **tolerance, msg=lambda found, name=name: f"{name}: {found}"
        )


@torch.no_grad()
def outputs(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    result: dict[str, Tensor] = network(x)
    return result


def weighted_loss(network: MultiTaskNetwork, x: Tensor, targets: Mapping[str, Tensor]) -> float:
    """Of the network's own answers as it trains, whatever its training adds; leaves it as it is."""
    state = copy_of(network)
    answers = outputs(network.train(), x)
    network.load_state_dict(state)
    return float(task_losses(answers, targets, network.tasks) @ network.task_weights_T)


def may_rest(network: MultiTaskNetwork, name: str) -> bool:
    """Whether a parameter may have no gradient in so short a training.

    The heads in a group that their task has left; logits that are set and not learned; how tasks mix into the
    shared branch, where all gates of a site agree.
    """
    match name.split("."):
        case ["heads", k, t, *_] if isinstance(network, DMTG):
            return int(network.A_TK[int(t)].argmax()) != int(k)
        case ["A_TK"]:
            return isinstance(network, AffinityGrouped)
        case [*_, "betas", _]:
            return True
    return False


def output_shape(task: Task, places: tuple[int, ...]) -> tuple[int, ...]:
    channels = () if task.outputs == 1 or task.kind is TaskKind.BINARY else (task.outputs,)
    return (BATCH, *channels, *(places if task.kind in DENSE else ()))


def memory(module: nn.Module) -> set[int]:
    return {tensor.data_ptr() for tensor in module.state_dict().values() if tensor.numel()}


def test_every_family_and_every_backbone_is_held_to_the_contract() -> None:
    assert FAMILIES.keys() <= PARAMETERS.keys()
    assert BACKBONES.keys() == BACKBONE_SIZES.keys()


def test_every_task_is_answered_in_order_in_the_shape_of_its_kind(trained: Trained, case: Case) -> None:
    assert tuple(trained.answers) == case.tasks.names
    for task in case.tasks:
        assert trained.answers[task.name].shape == output_shape(task, tuple(trained.x.shape[-2:]))
        assert trained.answers[task.name].isfinite().all()


def test_losses_are_finite_and_one_a_task_and_each_parameter_is_in_one_group_once(
    fresh: MultiTaskNetwork, case: Case
) -> None:
    x, targets = case.batch()
    losses = fresh.losses(x, targets, torch.Generator())
    assert losses.tasks_T.shape == (len(case.tasks),)
    assert losses.penalty.shape == ()
    assert torch.isfinite(losses.tasks_T).all()
    assert torch.isfinite(losses.penalty)
    groups = fresh.parameter_groups(lr=LR, weight_decay=0.1)
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(parameter) for parameter in fresh.parameters()}


def test_a_training_draws_nothing_from_the_global_generator(trained: Trained) -> None:
    assert not trained.draws_globally


def test_every_parameter_gets_a_gradient(trained: Trained) -> None:
    assert not {name for name in trained.left_out if not may_rest(trained.network, name)}


def test_a_few_steps_lower_the_loss(trained: Trained) -> None:
    share_left = trained.loss_after / trained.loss_before
    assert share_left < 0.98


@pytest.mark.parametrize("epoch", range(EPOCHS))
def test_a_training_from_a_seed_or_a_checkpoint_is_the_same_to_the_last_bit(
    trained: Trained, case: Case, epoch: int
) -> None:
    """A fresh network of the same seed, or one of another seed that takes back the epoch before."""
    again = Training(case, seed=0 if epoch == 0 else 1)
    if epoch:
        again.load(trained.checkpoints[epoch - 1])
        assert_equal_tensors(again.network.state_dict(), trained.checkpoints[epoch - 1].state)
    again.run_epoch(epoch)
    expected, found = trained.checkpoints[epoch], again.save()
    assert_equal_tensors(found.state, expected.state)
    assert torch.equal(found.generator, expected.generator)
    if epoch + 1 == EPOCHS:
        again.settle()
        assert_equal_tensors(again.network.state_dict(), trained.network.state_dict())
        assert_equal_tensors(outputs(again.network.eval(), trained.x), trained.answers)


def test_the_pruned_network_answers_as_the_trained_one(trained: Trained) -> None:
    assert_close_tensors(outputs(trained.static, trained.x), trained.answers, SINGLE)
    static = trained.twin.prune()
    assert_close_tensors(outputs(static, trained.x.double()), trained.double_answers, DOUBLE)


def test_the_expected_cost_is_that_of_the_pruned_network_once_nothing_learns_it(
    fresh: MultiTaskNetwork, trained: Trained, case: Case
) -> None:
    shape = fresh.backbone.input_shape
    if case.family not in LEARN_THEIR_COST:
        assert fresh.expected_cost() == count_cost(fresh.prune(), shape)
    found, exact = trained.network.expected_cost(), count_cost(trained.static, shape)
    if case.family not in LEARN_IT_TO_THE_END:
        assert found.macs == exact.macs
        is_gated_vit = case.family == "interrogate" and case.backbone.startswith("vit")
        assert found.params == pytest.approx(exact.params, rel=LAYER_NORMS_SHARE if is_gated_vit else 0)


def test_the_expected_cost_lies_between_those_of_all_together_and_all_apart(
    fresh: MultiTaskNetwork, trained: Trained, case: Case
) -> None:
    together, apart = (
        cost_of_groups(fresh.backbone, case.tasks, 0, groups) for groups in (1, len(case.tasks))
    )
    for network in (fresh, trained.network):
        cost = network.expected_cost()
        assert math.isfinite(cost.macs)
        assert math.isfinite(cost.params)
        if case.family == "etr_nlp":  # its layers are others
            assert cost.macs > 0
            assert cost.params > 0
        else:
            assert together.macs <= cost.macs <= apart.macs
            assert together.params <= cost.params <= apart.params


def test_pruning_copies_and_leaves_the_network_as_it_is(trained: Trained) -> None:
    assert trained.pruning_left_it_alone
    assert not any(module.training for module in trained.static.modules())
    assert memory(trained.static).isdisjoint(memory(trained.network))


def test_the_pruned_network_is_plain_layers_that_are_all_read(trained: Trained, case: Case) -> None:
    graph = trained.static.graph
    assert type(trained.static) is StaticNetwork
    assert {node.kind for node in graph.nodes} <= KINDS.keys()
    layers = {node.name for node in graph.nodes}
    assert {key.rpartition(".")[0] for key in trained.static.state_dict()} <= layers
    assert all(graph.users().values())
    assert tuple(graph.outputs) == case.tasks.names


def test_a_copy_is_equal_and_apart_in_double_precision_too(trained: Trained) -> None:
    assert memory(trained.twin).isdisjoint(memory(trained.network))
    assert_equal_tensors(copy.deepcopy(trained.twin).float().state_dict(), trained.network.state_dict())
    assert {answer.dtype for answer in trained.double_answers.values()} == {torch.float64}
    answers = {name: answer.float() for name, answer in trained.double_answers.items()}
    assert_close_tensors(answers, trained.answers, SINGLE)


def test_it_runs_and_trains_with_the_channels_last_in_double_precision(trained: Trained, case: Case) -> None:
    x, targets = case.batch()
    x = x.double()
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    network = copy.deepcopy(trained.twin).to(memory_format=torch.channels_last)
    assert_close_tensors(outputs(network, x), trained.double_answers, DOUBLE)
    loss = network.train().training_loss(x, targets, torch.Generator().manual_seed(2))
    torch.autograd.backward(loss)
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_it_trains_and_its_pruned_network_answers_in_bfloat16_autocast(
    fresh: MultiTaskNetwork, trained: Trained, case: Case
) -> None:
    x, targets = case.batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(answer.isfinite().all() for answer in outputs(trained.static, x).values())
        loss = fresh.training_loss(x, targets, torch.Generator().manual_seed(2))
    torch.autograd.backward(loss)
    assert all(p.grad is None or p.grad.isfinite().all() for p in fresh.parameters())
    assert any(p.grad is not None and p.grad.any() for p in fresh.parameters())


@pytest.mark.parametrize("cheap", CHEAP_CASES, ids=str)
def test_a_task_without_any_label_costs_nothing_and_its_head_learns_nothing(cheap: Case) -> None:
    network, (x, targets) = cheap.build(), cheap.batch()
    for name in ("a", "c"):
        targets[name] = torch.full_like(targets[name], torch.nan if targets[name].is_floating_point() else -1)
    losses = network.losses(x, targets, torch.Generator().manual_seed(2))
    assert losses.tasks_T[[0, 2]].tolist() == [0, 0]
    torch.autograd.backward(losses.tasks_T[[0, 2]].sum())
    assert not any(
        p.grad is not None and (p.grad.isnan() | (p.grad != 0)).any() for p in network.parameters()
    )
