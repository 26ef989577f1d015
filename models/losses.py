"""The losses of each kind of task.

Outputs are those of a task's head (`coterie.models.heads.Head`), targets are by kind:

binary [B] of 0 and 1, multiclass int64 [B], regression [B, O] or [B] where O is 1, segmentation int64
[B, H, W], depth [B, H, W], normals [B, 3, H, W], dense_regression [B, O, H, W] or [B, H, W] where O is 1.

A label is missing where a float target is NaN and where a whole number is negative; of normals a place is
missing where any of its three numbers is. A loss is the mean over the labels that are there (`shifted_l1`
divides by all of them), and 0 without a gradient where there is none.
"""

from collections.abc import Callable, Mapping
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.models.tasks import Task, TaskKind, TaskSet

# Shapes: B batch, H height, N tasks of one kind, O outputs or classes, T tasks, W width; S stands for all
# axes of a target behind its batch, and "..." for leading axes of the outputs that the targets lack.

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

CLASSES = frozenset({TaskKind.MULTICLASS, TaskKind.SEGMENTATION})  # outputs have an axis behind the batch
COUNTED = CLASSES | {TaskKind.BINARY}  # targets are classes, not measures
IGNORED = -100  # any negative number would do
SHIFTS = 3  # along each side: one pixel back, none, one ahead


def labelled(targets: Tensor, kind: TaskKind) -> Tensor:
    """Give where a label is there: true or false for each number of targets [..., B, *S]."""
    if kind in COUNTED:
        return targets >= 0  # false for NaN
    if kind is TaskKind.NORMALS:
        return ~targets.isnan().any(dim=-3, keepdim=True).expand_as(targets)
    return ~targets.isnan()


def binary_cross_entropy(logits: Tensor, targets: Tensor, labelled: Tensor) -> Tensor:
    """Cross-entropy of logits [..., N, B] with 0 and 1 [N, B]: [..., N]."""
    targets = targets.to(logits.dtype).where(labelled, 0).expand_as(logits)
    values = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return _mean(values.where(labelled, 0), labelled)


def cross_entropy(logits: Tensor, targets: Tensor, labelled: Tensor) -> Tensor:
    """Cross-entropy of logits [..., N, B, O, *S] with classes [N, B, *S]: [..., N]."""
    leading = logits.shape[: 1 - targets.dim()]  # [..., N, B]
    targets = targets.long().where(labelled, IGNORED).expand(*leading, *targets.shape[2:])
    last = len(leading) - 1
    values = F.cross_entropy(
        logits.flatten(0, last), targets.flatten(0, last), ignore_index=IGNORED, reduction="none"
    )
    return _mean(values.view(targets.shape), labelled)


def l1(outputs: Tensor, targets: Tensor, labelled: Tensor) -> Tensor:
    """Mean absolute difference of [..., N, B, *S] and [N, B, *S]: [..., N]."""
    return _mean(_difference(outputs, targets, labelled).abs(), labelled)


def mse(outputs: Tensor, targets: Tensor, labelled: Tensor) -> Tensor:
    """Mean squared difference of [..., N, B, *S] and [N, B, *S]: [..., N]."""
    return _mean(_difference(outputs, targets, labelled).square(), labelled)


def cosine(outputs: Tensor, targets: Tensor, labelled: Tensor) -> Tensor:
    """1 minus the cosine of the angle between vectors [..., N, B, 3, H, W] and [N, B, 3, H, W]: [..., N]."""
    targets = targets.to(outputs.dtype).where(labelled, 0)
    labelled = labelled.select(-3, 0)
    return _mean((1 - F.cosine_similarity(outputs, targets, dim=-3)).where(labelled, 0), labelled)


def shifted_l1(outputs: Tensor, targets: Tensor, labelled: Tensor) -> Tensor:
    """L1 that forgives a shift by one pixel: [..., N, B, *S, H, W] and [N, B, *S, H, W] -> [..., N].

    The loss of DMTG's Taskonomy recipe (arXiv 2407.05082) for depth and normals, after Standley et al. (arXiv
    1905.07553). The targets lose their border; of each image the outputs are held against them at nine
    shifts, and the smallest mean absolute difference counts. A missing label counts as a difference of 0.

    Raises:
        ValueError: If the maps have nothing inside their border.
    """
    if min(targets.shape[-2:]) < SHIFTS:
        raise ValueError(
            f"targets: of 'shifted_l1' must be maps of at least {SHIFTS}x{SHIFTS}, "
            f"found {tuple(targets.shape[-2:])}"
        )
    targets, labelled = targets[..., 1:-1, 1:-1], labelled[..., 1:-1, 1:-1]
    height, width = targets.shape[-2:]
    axes = tuple(range(2 - targets.dim(), 0))
    shifted = [
        _difference(outputs[..., y : y + height, x : x + width], targets, labelled).abs().mean(dim=axes)
        for y, x in product(range(SHIFTS), repeat=2)
    ]
    return torch.stack(shifted).amin(dim=0).mean(dim=-1)


# A loss takes N tasks of one kind: outputs [..., N, B, *S], targets and `labelled` [N, B, *S], where targets
# hold anything at the labels that are missing. It gives their N losses, [..., N].
LOSSES: Mapping[tuple[TaskKind, str], Loss] = {
    (TaskKind.BINARY, "cross_entropy"): binary_cross_entropy,
    (TaskKind.MULTICLASS, "cross_entropy"): cross_entropy,
    (TaskKind.REGRESSION, "mse"): mse,
    (TaskKind.REGRESSION, "l1"): l1,
    (TaskKind.SEGMENTATION, "cross_entropy"): cross_entropy,
    (TaskKind.DEPTH, "l1"): l1,
    (TaskKind.DEPTH, "shifted_l1"): shifted_l1,
    (TaskKind.NORMALS, "cosine"): cosine,
    (TaskKind.NORMALS, "l1"): l1,
    (TaskKind.NORMALS, "shifted_l1"): shifted_l1,
    (TaskKind.DENSE_REGRESSION, "l1"): l1,
    (TaskKind.DENSE_REGRESSION, "mse"): mse,
}


def task_losses(outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], tasks: TaskSet) -> Tensor:
    """Give every task's loss, unweighted, those of one kind, loss and shape in one vectorised call.

    Args:
        outputs: Each task's, in half precision taken up to single: leading axes (several heads for one task)
            are kept, the same ones for all tasks.
        targets: Each task's, without those axes, of any type that holds them.
        tasks: Which ones, and in which order.

    Returns:
        [..., T], in the tasks' order.

    Raises:
        KeyError: If a task is missing in `outputs` or `targets`.
        ValueError: If a task's targets do not have its outputs' shape.
    """
    alike: dict[tuple[TaskKind, str, torch.Size], list[str]] = {}
    for task in tasks:
        alike.setdefault((task.kind, task.loss, outputs[task.name].shape), []).append(task.name)
        _check_shapes(task, outputs[task.name], targets[task.name])
    losses: dict[str, Tensor] = {}
    for (kind, loss, shape), names in alike.items():
        batch = len(shape) - targets[names[0]].dim() - (kind in CLASSES)  # the outputs' batch axis
        stacked = _stack([outputs[name] for name in names], batch)
        stacked = stacked.to(torch.promote_types(stacked.dtype, torch.float32))
        expected = _stack([targets[name] for name in names], 0)
        losses_N = LOSSES[kind, loss](stacked, expected, labelled(expected, kind))
        if len(alike) == 1:
            return losses_N
        losses.update(zip(names, losses_N.unbind(-1), strict=True))
    return torch.stack([losses[name] for name in tasks.names], dim=-1)


def _check_shapes(task: Task, outputs: Tensor, targets: Tensor) -> None:
    """Check that outputs end in the targets' shape: else they would be broadcast into a wrong loss."""
    rank = targets.dim() + (task.kind in CLASSES)
    shape = list(outputs.shape[-rank:])
    if task.kind in CLASSES:
        del shape[1:2]
    if shape != list(targets.shape):
        raise ValueError(
            f"targets: of {task.name!r} must have the shape {tuple(shape)} of its outputs, "
            f"found {tuple(targets.shape)}"
        )


def _stack(tensors: list[Tensor], axis: int) -> Tensor:
    """As `torch.stack`, but a single tensor, such as a large map, is not copied."""
    return torch.stack(tensors, dim=axis) if len(tensors) > 1 else tensors[0].unsqueeze(axis)


def _difference(outputs: Tensor, targets: Tensor, labelled: Tensor) -> Tensor:
    """Outputs minus targets, and 0 where the label is missing: chosen here, no NaN is in a gradient's way."""
    return (outputs - targets.to(outputs.dtype)).where(labelled, 0)


def _mean(values: Tensor, labelled: Tensor) -> Tensor:
    """Mean over the labels: values [..., N, B, *S], which are 0 where one is missing, -> [..., N]."""
    axes = tuple(range(1 - labelled.dim(), 0))
    return values.sum(dim=axes) / labelled.sum(dim=axes).clamp(min=1)
