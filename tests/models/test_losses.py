import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.models.losses import task_losses
from coterie.models.tasks import Task, TaskKind, TaskSet


def tasks_named(names: str) -> TaskSet:
    return TaskSet(Task(name=name, kind=TaskKind.BINARY) for name in names)


def test_a_binary_loss_is_the_mean_cross_entropy() -> None:
    outputs = {"a": torch.tensor([0.0, math.log(3)])}
    losses = task_losses(outputs, {"a": torch.tensor([1, 0])}, tasks_named("a"))
    torch.testing.assert_close(losses, torch.tensor([(math.log(2) + math.log(4)) / 2]))


@given(st.permutations("abcd"), st.integers(1, 5), st.integers(0, 2**31))
def test_the_vectorised_losses_are_each_tasks_own(order: list[str], batch: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    outputs = {name: torch.randn(3, batch, generator=random) for name in "abcd"}
    targets = {name: torch.randint(2, (batch,), generator=random) for name in "abcd"}
    losses = task_losses(outputs, targets, tasks_named("".join(order)))
    assert losses.shape == (3, 4)
    for column, name in zip(losses.T, order, strict=True):
        for value, logits in zip(column, outputs[name], strict=True):
            p = torch.sigmoid(logits.double())
            expected = -torch.where(targets[name].bool(), p, 1 - p).log().mean()
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64])
def test_targets_may_be_of_any_type(dtype: torch.dtype) -> None:
    outputs, targets = {"a": torch.tensor([2.0, -1.0])}, torch.tensor([1.0, 0.0])
    expected = task_losses(outputs, {"a": targets}, tasks_named("a"))
    assert torch.equal(task_losses(outputs, {"a": targets.to(dtype)}, tasks_named("a")), expected)


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
