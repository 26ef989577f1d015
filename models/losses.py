"""The loss of each kind of task."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.models.tasks import TaskKind, TaskSet

# Shapes: B batch, N tasks of one kind, T tasks.


def binary_cross_entropy(logits_BN: Tensor, targets_BN: Tensor) -> Tensor:
    """Cross-entropy of logits with 0/1 targets, the mean over the batch.

    Args:
        logits_BN: [..., B, N].
        targets_BN: [B, N], of any type.

    Returns:
        [..., N]
    """
    targets_BN = targets_BN.to(logits_BN.dtype).expand_as(logits_BN)
    return F.binary_cross_entropy_with_logits(logits_BN, targets_BN, reduction="none").mean(dim=-2)


# A loss takes N tasks of one kind, stacked along a last axis, and gives their N losses.
LOSSES: dict[TaskKind, Callable[[Tensor, Tensor], Tensor]] = {TaskKind.BINARY: binary_cross_entropy}


def task_losses(outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], tasks: TaskSet) -> Tensor:
    """Give every task's loss, unweighted, those of one kind in one vectorised call.

    Args:
        outputs: Each task's logits, [..., B]: leading axes (several heads for one task) are kept.
        targets: Each task's targets, [B].
        tasks: Which ones, and in which order.

    Returns:
        [..., T], in the tasks' order.

    Raises:
        KeyError: If a task is missing in `outputs` or `targets`, or its kind has no loss.
    """
    losses: dict[str, Tensor] = {}
    for kind in dict.fromkeys(task.kind for task in tasks):
        names = [task.name for task in tasks if task.kind is kind]
        logits_BN = torch.stack([outputs[name] for name in names], dim=-1)
        targets_BN = torch.stack([targets[name] for name in names], dim=-1)
        losses.update(zip(names, LOSSES[kind](logits_BN, targets_BN).unbind(-1), strict=True))
    return torch.stack([losses[name] for name in tasks.names], dim=-1)
