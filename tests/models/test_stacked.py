from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.models import stacked
from coterie.models.backbones import CNN, MLP
from coterie.models.families import Shared
from coterie.models.stacked import StackedMLP, largest_stack, start_seed
from coterie.models.tasks import Grouping, Task, TaskKind, TaskSet

BACKBONE = MLP(input_shape=(3, 4), width=5, depth=2)
TASKS = TaskSet(
    [
        Task(name="odd", kind=TaskKind.BINARY),
        Task(name="class", kind=TaskKind.MULTICLASS, outputs=3, weight=0.5),
        Task(name="length", kind=TaskKind.REGRESSION),
        Task(name="place", kind=TaskKind.REGRESSION, outputs=2, weight=2.0),
    ]
)
SUBSETS = ((0,), (2,), (1, 2), (0, 1, 3), (0, 1, 2, 3))
SEEDS = (3, 8)
BATCH = 7
STEPS = 6
LR = 0.02
DECAY = 0.1  # large, so that it shows

Batch = tuple[Tensor, dict[str, Tensor]]


def draw_batch() -> Batch:
    """One whose first sample has no label."""
    targets = {
        "odd": torch.randint(2, (BATCH,)).double(),
        "class": torch.randint(3, (BATCH,)),
        "length": torch.randn(BATCH).double(),
        "place": torch.randn(BATCH, 2).double(),
    }
    for name, target in targets.items():
        target[0] = -1 if name == "class" else torch.nan
    return torch.randn(BATCH, *BACKBONE.input_shape).double(), targets


def make_stack(subsets: tuple[tuple[int, ...], ...] = SUBSETS, seeds: tuple[int, ...] = SEEDS) -> StackedMLP:
    return StackedMLP(backbone=BACKBONE, tasks=TASKS, subsets=subsets, seeds=seeds).double()


def train_stack(stack: StackedMLP, batches: list[Batch]) -> None:
    optimizer = torch.optim.Adam(stack.parameters(), lr=LR, weight_decay=DECAY, fused=True)
    for x, targets in batches:
        optimizer.zero_grad()
        stack.training_loss(x, targets).backward()
        optimizer.step()


def train_alone(subset: tuple[int, ...], seed: int, batches: list[Batch]) -> Shared:
    torch.manual_seed(start_seed(subset, seed))
    network = Shared(backbone=BACKBONE, tasks=TaskSet(TASKS[t] for t in subset)).double()
    optimizer = torch.optim.Adam(network.parameter_groups(LR, DECAY), fused=True)
    for x, targets in batches:
        optimizer.zero_grad()
        network.training_loss(x, targets, torch.Generator()).backward()
        optimizer.step()
    return network


def assert_same(network: torch.nn.Module, other: torch.nn.Module, rtol: float = 1e-9) -> None:
    theirs: Mapping[str, Tensor] = other.state_dict()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=rtol, atol=1e-9)


def test_each_network_starts_as_shared_does_with_a_seed_of_its_own() -> None:
    stack = StackedMLP(backbone=BACKBONE, tasks=TASKS, subsets=SUBSETS, seeds=SEEDS)
    for replicate, seed in enumerate(SEEDS):
        for subset in SUBSETS:
            torch.manual_seed(start_seed(subset, seed))
            alone = Shared(backbone=BACKBONE, tasks=TaskSet(TASKS[t] for t in subset))
            assert_same(stack.unstack(subset, replicate), alone, rtol=0)


def test_training_the_stack_trains_each_network_as_it_would_alone() -> None:
    torch.manual_seed(0)
    batches = [draw_batch() for _ in range(STEPS)]
    stack = make_stack()
    train_stack(stack, batches)
    for replicate, seed in enumerate(SEEDS):
        for subset in SUBSETS:
            assert_same(stack.unstack(subset, replicate), train_alone(subset, seed, batches))


@settings(max_examples=10)
@given(st.integers(0, 10**6))
def test_losses_are_those_of_the_unstacked_networks(seed: int) -> None:
    torch.manual_seed(seed)
    stack = make_stack()
    x, targets = draw_batch()
    losses_RNT = stack.losses(x, targets)
    for replicate in range(len(SEEDS)):
        for n, subset in enumerate(SUBSETS):
            alone = stack.unstack(subset, replicate)
            alone_T = alone.losses(x, targets, torch.Generator()).tasks_T
            torch.testing.assert_close(losses_RNT[replicate, n, list(subset)], alone_T)


def test_heads_outside_a_subset_stay_zero_in_training() -> None:
    torch.manual_seed(0)
    stack = make_stack(subsets=((1,),), seeds=(0,))
    train_stack(stack, [draw_batch() for _ in range(STEPS)])
    outside = [0, 4, 5, 6]  # outputs 1 to 3 are those of "class"
    assert not stack.weights[-1][0, outside].any()
    assert not stack.biases[-1][0, outside].any()
    assert stack.biases[-1][0, 1:4].all()


def test_a_network_that_diverges_leaves_the_others_as_they_would_be() -> None:
    torch.manual_seed(0)
    batches = [draw_batch() for _ in range(STEPS)]
    stack, calm = make_stack(seeds=(0,)), make_stack(seeds=(0,))
    with torch.no_grad():
        stack.weights[0][0].fill_(torch.inf)
    train_stack(stack, batches)
    train_stack(calm, batches)
    assert stack.weights[0][0].isnan().any()
    for subset in SUBSETS[1:]:
        assert_same(stack.unstack(subset), calm.unstack(subset), rtol=0)


def test_a_task_whose_loss_is_infinite_leaves_the_networks_without_it_as_they_would_be() -> None:
    torch.manual_seed(0)
    batches = [draw_batch() for _ in range(STEPS)]
    far = [(x, targets | {"length": torch.full_like(targets["length"], 1e200)}) for x, targets in batches]
    stack, calm = make_stack(seeds=(0,)), make_stack(seeds=(0,))
    assert stack.losses(*far[0])[..., 2].isinf().all()
    train_stack(stack, far)
    train_stack(calm, batches)
    for subset in ((0,), (0, 1, 3)):
        assert_same(stack.unstack(subset), calm.unstack(subset), rtol=0)


def test_a_partition_is_the_union_of_its_subsets_networks() -> None:
    torch.manual_seed(0)
    stack = make_stack(subsets=((0, 3), (1,), (2,), (1, 2)))
    train_stack(stack, [draw_batch() for _ in range(STEPS)])
    x, _ = draw_batch()
    for grouping in (Grouping(((0, 3), (1, 2))), Grouping(((0, 3), (1,), (2,)))):
        for replicate in range(len(SEEDS)):
            outputs = stack.assemble(grouping, replicate).prune()(x)
            assert list(outputs) == list(TASKS.names)
            for group in grouping.groups:
                for name, output in stack.unstack(group, replicate).prune()(x).items():
                    assert torch.equal(outputs[name], output)


def test_the_global_generator_is_left_as_it_is() -> None:
    before = torch.get_rng_state()
    stack = make_stack()
    stack.unstack((2,))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"subsets": []}, "subsets: must be one or more"),
        ({"subsets": [(0, 1), (1, 0)]}, "subsets: must be one or more, none twice"),
        ({"subsets": [()]}, "subsets: must hold indices from 0 to 3"),
        ({"subsets": [(0, 4)]}, r"subsets: must hold indices from 0 to 3, none twice, found \(0, 4\)"),
        ({"subsets": [(1, 1)]}, "subsets: must hold indices from 0 to 3, none twice"),
        ({"seeds": ()}, "seeds: must be one or more"),
        ({"backbone": CNN(input_shape=(3, 16, 16))}, "backbone: of a stack must be 'mlp', found 'cnn'"),
        (
            {"tasks": TaskSet([Task(name="far", kind=TaskKind.DEPTH)])},
            r"tasks: of a stack must not be dense, found \['far'\]",
        ),
    ],
)
def test_what_cannot_be_stacked_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StackedMLP(**{"backbone": BACKBONE, "tasks": TASKS, "subsets": SUBSETS, **arguments})  # type: ignore[arg-type]


def test_a_stack_has_room_for_so_many_networks_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    # By hand: 12 -> 5 -> 5 and 7 outputs, and 17 features, all twice for 1024 samples.
    a_network = 4 * ((12 * 5 + 5) + (5 * 5 + 5) + (5 * 7 + 7)) + 1024 * 2 * (5 + 5 + 7)
    monkeypatch.setattr(stacked, "STACKED_NUMBERS", 11 * a_network - 1)
    assert largest_stack(BACKBONE, TASKS) == 10
    make_stack(seeds=(3, 8))
    with pytest.raises(ValueError, match=r"subsets: must be at most 10 networks .* found 5 for each of 3"):
        make_stack(seeds=(3, 8, 9))


def test_networks_that_are_too_large_for_any_stack_are_refused_before_they_are_allocated() -> None:
    huge = MLP(input_shape=(3, 4), width=2**16, depth=2)
    assert largest_stack(huge, TASKS) == 0
    with pytest.raises(ValueError, match="subsets: must be at most 0 networks"):
        StackedMLP(backbone=huge, tasks=TASKS, subsets=SUBSETS)


def test_all_subsets_of_eight_tasks_fit_at_the_largest_size_that_is_searched() -> None:
    tasks = TaskSet(Task(name=name, kind=TaskKind.BINARY) for name in "abcdefgh")
    largest = MLP(input_shape=(12, 12), **{name: max(values) for name, values in MLP.choices.items()})
    assert largest_stack(largest, tasks) >= 2**8 - 1


def test_a_subset_that_is_not_in_the_stack_is_refused() -> None:
    stack = make_stack()
    with pytest.raises(ValueError, match=r"subset: must be one of the stack's, found \(0, 3\)"):
        stack.unstack((3, 0))
    with pytest.raises(ValueError, match=r"subset: must be one of the stack's, found \(0, 3\)"):
        stack.assemble(Grouping(((0, 3), (1, 2))))


def test_targets_of_another_shape_are_refused() -> None:
    stack = make_stack()
    x, targets = draw_batch()
    column = targets | {"length": targets["length"].unsqueeze(1)}
    with pytest.raises(ValueError, match=r"targets: must have the shape \(7,\), found \(7, 1\)"):
        stack.training_loss(x, column)
