import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from coterie.models.losses import LOSSES, labelled, task_losses
from coterie.models.tasks import KIND_LOSSES, Task, TaskKind, TaskSet

# Shapes: B batch, N numbers or classes, H and W a map's sides.

OUTPUTS = {TaskKind.MULTICLASS: 4, TaskKind.SEGMENTATION: 4, TaskKind.NORMALS: 3, TaskKind.REGRESSION: 2}
SIDES = (4, 5)
MAPS = {TaskKind.SEGMENTATION, TaskKind.DEPTH, TaskKind.NORMALS, TaskKind.DENSE_REGRESSION}

every_loss = pytest.mark.parametrize(
    ("kind", "loss"), [(kind, loss) for kind, losses in KIND_LOSSES.items() for loss in losses]
)
seeds = st.integers(0, 2**31)


def task_of(kind: TaskKind, loss: str = "", name: str = "a") -> Task:
    return Task(name=name, kind=kind, loss=loss, outputs=OUTPUTS.get(kind, 1))


def draw(
    task: Task, batch: int, seed: int, *, heads: tuple[int, ...] = (), missing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Outputs [*heads, B, ...] and targets of a task, a share of whose labels is missing."""
    random = torch.Generator().manual_seed(seed)
    places = SIDES if task.kind in MAPS else ()
    numbers = (task.outputs,) if task.kind in OUTPUTS else ()
    outputs = torch.randn(*heads, batch, *numbers, *places, generator=random)
    if task.kind in {TaskKind.MULTICLASS, TaskKind.SEGMENTATION}:
        targets = torch.randint(task.outputs, (batch, *places), generator=random)
        return outputs, targets.where(torch.rand(targets.shape, generator=random) >= missing, -1)
    if task.kind is TaskKind.BINARY:
        targets = torch.randint(2, (batch,), generator=random).float()
    else:
        targets = torch.randn(batch, *numbers, *places, generator=random)
    return outputs, targets.where(torch.rand(targets.shape, generator=random) >= missing, torch.nan)


def loss_of(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    return task_losses({task.name: outputs}, {task.name: targets}, TaskSet([task]))[..., 0]


def without_labels(targets: Tensor) -> Tensor:
    return torch.full_like(targets, torch.nan if targets.is_floating_point() else -1)


def tasks_named(names: str) -> TaskSet:
    return TaskSet(Task(name=name, kind=TaskKind.BINARY) for name in names)


def test_every_loss_that_a_task_can_name_is_there() -> None:
    assert set(LOSSES) == {(kind, loss) for kind, losses in KIND_LOSSES.items() for loss in losses}


def test_a_binary_loss_is_the_mean_cross_entropy() -> None:
    outputs = {"a": torch.tensor([0.0, math.log(3)])}
    losses = task_losses(outputs, {"a": torch.tensor([1, 0])}, tasks_named("a"))
    torch.testing.assert_close(losses, torch.tensor([(math.log(2) + math.log(4)) / 2]))


def cosine(outputs: Tensor, targets: Tensor) -> Tensor:
    dots = (outputs * targets).sum(dim=1)
    return (1 - dots / (outputs.norm(dim=1) * targets.norm(dim=1))).mean()


@pytest.mark.parametrize(
    ("kind", "loss", "expected"),
    [
        (TaskKind.BINARY, "cross_entropy", F.binary_cross_entropy_with_logits),
        (TaskKind.MULTICLASS, "cross_entropy", F.cross_entropy),
        (TaskKind.REGRESSION, "mse", F.mse_loss),
        (TaskKind.REGRESSION, "l1", F.l1_loss),
        (TaskKind.SEGMENTATION, "cross_entropy", F.cross_entropy),
        (TaskKind.DEPTH, "l1", F.l1_loss),
        (TaskKind.NORMALS, "cosine", cosine),
        (TaskKind.NORMALS, "l1", F.l1_loss),
        (TaskKind.DENSE_REGRESSION, "l1", F.l1_loss),
        (TaskKind.DENSE_REGRESSION, "mse", F.mse_loss),
    ],
)
def test_without_missing_labels_a_loss_is_its_closed_form(
    kind: TaskKind, loss: str, expected: Callable[[Tensor, Tensor], Tensor]
) -> None:
    task = task_of(kind, loss)
    outputs, targets = draw(task, 6, seed=0)
    torch.testing.assert_close(loss_of(task, outputs, targets), expected(outputs, targets))


@pytest.mark.parametrize("kind", [TaskKind.REGRESSION, TaskKind.DENSE_REGRESSION])
@pytest.mark.parametrize("numbers", [1, 3])
def test_a_regression_of_one_number_has_no_axis_for_it(kind: TaskKind, numbers: int) -> None:
    task = Task(name="a", kind=kind, outputs=numbers, loss="l1")
    shape = (2, *((numbers,) if numbers > 1 else ()), *(SIDES if kind in MAPS else ()))
    torch.testing.assert_close(loss_of(task, torch.zeros(shape), torch.ones(shape)), torch.tensor(1.0))


@every_loss
@given(batch=st.integers(1, 4), seed=seeds)
def test_each_head_of_a_task_gets_its_own_loss(kind: TaskKind, loss: str, batch: int, seed: int) -> None:
    task = task_of(kind, loss)
    outputs, targets = draw(task, batch, seed, heads=(2, 3), missing=0.3)
    losses = loss_of(task, outputs, targets)
    assert losses.shape == (2, 3)
    alone = torch.stack([torch.stack([loss_of(task, o, targets) for o in row]) for row in outputs])
    torch.testing.assert_close(losses, alone)


@given(st.permutations([*KIND_LOSSES, *KIND_LOSSES]), seeds)
def test_the_vectorised_losses_are_each_tasks_own_in_the_tasks_order(
    kinds: list[TaskKind], seed: int
) -> None:
    tasks = TaskSet(
        task_of(kind, KIND_LOSSES[kind][seed % len(KIND_LOSSES[kind])], name=str(i))
        for i, kind in enumerate(kinds)
    )
    drawn = {task.name: draw(task, 3, seed + i, heads=(2,), missing=0.2) for i, task in enumerate(tasks)}
    outputs = {name: o for name, (o, _) in drawn.items()}
    targets = {name: t for name, (_, t) in drawn.items()}
    losses = task_losses(outputs, targets, tasks)
    assert losses.shape == (2, len(tasks))
    for column, task in zip(losses.T, tasks, strict=True):
        torch.testing.assert_close(column, loss_of(task, *drawn[task.name]))


@every_loss
@given(present=st.lists(st.booleans(), min_size=1, max_size=6).filter(any), seed=seeds)
def test_a_sample_without_labels_is_as_if_it_were_not_there(
    kind: TaskKind, loss: str, present: list[bool], seed: int
) -> None:
    task = task_of(kind, loss)
    outputs, targets = draw(task, len(present), seed)
    kept = torch.tensor(present)
    masked = targets.clone()
    masked[~kept] = without_labels(targets)[~kept]
    found, expected = loss_of(task, outputs, masked), loss_of(task, outputs[kept], targets[kept])
    if loss == "shifted_l1":  # divides by all places, as its recipe does
        expected = expected * kept.sum() / len(kept)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", [TaskKind.SEGMENTATION, TaskKind.DEPTH, TaskKind.DENSE_REGRESSION])
@given(seed=seeds)
def test_a_map_may_be_labelled_in_part(kind: TaskKind, seed: int) -> None:
    task = task_of(kind)
    outputs, targets = draw(task, 2, seed, missing=0.5)
    there = targets >= 0 if kind is TaskKind.SEGMENTATION else ~targets.isnan()
    if kind is TaskKind.SEGMENTATION:
        every = F.cross_entropy(outputs, targets.clamp(min=0), reduction="none")
    else:
        every = (outputs - targets).abs()
    expected = every[there].mean() if there.any() else torch.tensor(0.0)
    torch.testing.assert_close(loss_of(task, outputs, targets), expected)


@pytest.mark.parametrize("loss", KIND_LOSSES[TaskKind.NORMALS])
def test_a_normal_is_missing_where_any_of_its_numbers_is(loss: str) -> None:
    task = task_of(TaskKind.NORMALS, loss)
    outputs, targets = draw(task, 2, seed=0)
    targets[0, 1, 2, 3] = torch.nan
    assert not labelled(targets, TaskKind.NORMALS)[0, :, 2, 3].any()
    assert labelled(targets, TaskKind.NORMALS).sum() == targets.numel() - 3
    found = loss_of(task, outputs, targets)
    targets[0, :, 2, 3] = torch.nan
    assert torch.equal(found, loss_of(task, outputs, targets))


@every_loss
@given(batch=st.integers(1, 5), seed=seeds)
def test_neither_the_order_of_a_batch_nor_doubling_it_changes_a_loss(
    kind: TaskKind, loss: str, batch: int, seed: int
) -> None:
    task = task_of(kind, loss)
    outputs, targets = draw(task, batch, seed, missing=0.3)
    expected = loss_of(task, outputs, targets)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(loss_of(task, outputs[order], targets[order]), expected)
    torch.testing.assert_close(
        loss_of(task, outputs.repeat_interleave(2, 0), targets.repeat_interleave(2, 0)), expected
    )


@every_loss
def test_without_any_label_a_loss_is_0_and_so_is_every_gradient(kind: TaskKind, loss: str) -> None:
    task = task_of(kind, loss)
    outputs, targets = draw(task, 3, seed=0, heads=(2,))
    outputs.requires_grad_()
    losses = loss_of(task, outputs, without_labels(targets))
    with torch.autograd.set_detect_anomaly(True):  # refuses NaN anywhere on the way back
        torch.autograd.backward(losses.sum())
    assert torch.equal(losses, torch.zeros(2))
    assert outputs.grad is not None
    assert torch.equal(outputs.grad, torch.zeros_like(outputs))


@every_loss
def test_a_gradient_is_the_losses_slope_and_0_at_missing_labels(kind: TaskKind, loss: str) -> None:
    task = task_of(kind, loss)
    outputs, targets = draw(task, 3, seed=1, missing=0.4)
    outputs = outputs.double().requires_grad_()
    assert torch.autograd.gradcheck(partial(loss_of, task, targets=targets), outputs)
    (gradient,) = torch.autograd.grad(loss_of(task, outputs, targets), outputs)
    there = labelled(targets, kind)
    if kind in {TaskKind.MULTICLASS, TaskKind.SEGMENTATION}:
        there = there.unsqueeze(1).expand_as(gradient)
    if loss != "shifted_l1":  # whose places move
        assert torch.equal(gradient[~there], torch.zeros_like(gradient[~there]))
        assert gradient[there].all()


@pytest.mark.parametrize("kind", [TaskKind.DEPTH, TaskKind.NORMALS])
@pytest.mark.parametrize("shift", [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)])
def test_a_shift_by_one_pixel_costs_a_shifted_loss_nothing(kind: TaskKind, shift: tuple[int, int]) -> None:
    task = task_of(kind, "shifted_l1")
    _, targets = draw(task, 2, seed=0)
    moved = torch.roll(targets, shift, dims=(-2, -1))
    assert loss_of(task, moved, targets) == 0
    assert loss_of(task, torch.roll(targets, (2, 0), dims=(-2, -1)), targets) > 0


def test_a_shifted_loss_by_hand() -> None:
    task = task_of(TaskKind.DEPTH, "shifted_l1")
    targets = torch.zeros(2, 3, 4)
    targets[:, 1, 1:3] = torch.tensor([2.0, torch.nan])  # two pixels inside the border, one without a label
    outputs = torch.stack([torch.full((3, 4), 5.0), torch.full((3, 4), 9.0)])
    outputs[0, 0, 0] = 1.0  # read at shift (-1, -1): |1 - 2|; elsewhere |5 - 2|
    # The first image's least sum is 1, the second one's 7, each over two pixels; then their mean.
    torch.testing.assert_close(loss_of(task, outputs, targets), torch.tensor((1 / 2 + 7 / 2) / 2))


def test_each_image_has_its_own_shift() -> None:
    task = task_of(TaskKind.DEPTH, "shifted_l1")
    _, targets = draw(task, 2, seed=0)
    moved = torch.stack([torch.roll(targets[0], 1, 0), torch.roll(targets[1], -1, 1)])
    assert loss_of(task, moved, targets) == 0


def test_a_map_without_an_inside_is_refused_by_a_shifted_loss() -> None:
    task = task_of(TaskKind.DEPTH, "shifted_l1")
    with pytest.raises(
        ValueError, match=r"targets: of 'shifted_l1' must be maps of at least 3x3, found \(2, 9\)"
    ):
        loss_of(task, torch.zeros(1, 2, 9), torch.zeros(1, 2, 9))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64])
def test_binary_targets_may_be_of_any_type(dtype: torch.dtype) -> None:
    outputs, targets = {"a": torch.tensor([2.0, -1.0])}, torch.tensor([1.0, 0.0])
    expected = task_losses(outputs, {"a": targets}, tasks_named("a"))
    assert torch.equal(task_losses(outputs, {"a": targets.to(dtype)}, tasks_named("a")), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_classes_may_be_of_any_whole_type(dtype: torch.dtype) -> None:
    task = task_of(TaskKind.MULTICLASS)
    outputs, targets = draw(task, 5, seed=0)
    assert torch.equal(loss_of(task, outputs, targets.to(dtype)), loss_of(task, outputs, targets))


def test_binary_targets_may_be_missing_in_floats_and_in_whole_numbers() -> None:
    outputs = {name: torch.tensor([2.0, -1.0]) for name in "ab"}
    targets = {"a": torch.tensor([1.0, torch.nan]), "b": torch.tensor([1, -1])}
    losses = task_losses(outputs, targets, tasks_named("ab"))
    torch.testing.assert_close(losses, F.softplus(torch.tensor([-2.0, -2.0])))


@every_loss
def test_a_loss_of_half_precision_outputs_is_in_single_precision(kind: TaskKind, loss: str) -> None:
    task = task_of(kind, loss)
    outputs, targets = draw(task, 4, seed=0, missing=0.2)
    half = outputs.bfloat16()
    found = loss_of(task, half, targets)
    assert found.dtype == torch.float32
    assert torch.equal(found, loss_of(task, half.float(), targets))


def test_a_huge_wrong_logit_has_a_finite_loss_and_gradient() -> None:
    logits = torch.tensor([1e30], requires_grad=True)
    loss = task_losses({"a": logits}, {"a": torch.tensor([0.0])}, tasks_named("a")).sum()
    torch.autograd.backward(loss)
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_a_missing_target_is_named() -> None:
    with pytest.raises(KeyError, match="b"):
        task_losses({name: torch.zeros(1) for name in "ab"}, {"a": torch.zeros(1)}, tasks_named("ab"))


@pytest.mark.parametrize(
    ("kind", "outputs", "targets"),
    [
        (TaskKind.BINARY, (4,), (4, 1)),
        (TaskKind.BINARY, (3, 4), (3,)),
        (TaskKind.REGRESSION, (4, 2), (4,)),
        (TaskKind.MULTICLASS, (4, 4), (1,)),
        (TaskKind.SEGMENTATION, (4, 4, 6, 6), (4, 3, 3)),
        (TaskKind.DEPTH, (4, 6, 6), (4, 1, 6, 6)),
    ],
)
def test_targets_that_would_be_broadcast_are_refused_by_the_tasks_name(
    kind: TaskKind, outputs: tuple[int, ...], targets: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="targets: of 'a' must have the shape"):
        loss_of(task_of(kind), torch.zeros(outputs), torch.zeros(targets, dtype=torch.int64))
