"""The metrics: each task's own, and those over all tasks that rank candidates."""

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from coterie.models.tasks import Direction, TaskKind, TaskSet

logger = logging.getLogger(__name__)

# A yardstick nearer to zero makes a relative change meaningless: for an error rate, one wrong in a thousand.
YARDSTICK_FLOOR = 1e-3


def binary_error(logits: Tensor, targets: Tensor) -> float:
    """Share of wrong answers, in [0, 1], where a logit above 0 means yes; a NaN logit is wrong.

    Args:
        logits: [B].
        targets: [B], 0 or 1, of any type.
    """
    correct = torch.where(targets.bool(), logits > 0, logits <= 0)
    return 1 - int(correct.sum()) / len(correct)


ERRORS: dict[TaskKind, Callable[[Tensor, Tensor], float]] = {TaskKind.BINARY: binary_error}


def task_errors(
    outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], tasks: TaskSet
) -> dict[str, float]:
    """Each task's error rate, in [0, 1].

    Args:
        outputs: Each task's logits over the whole split, [B].
        targets: Each task's targets, [B].
        tasks: Which ones.

    Raises:
        KeyError: If a task is missing in `outputs` or `targets`, or its kind has no error rate.
    """
    return {task.name: ERRORS[task.kind](outputs[task.name], targets[task.name]) for task in tasks}


def delta_m(values: Mapping[str, float], yardstick: Mapping[str, float], tasks: TaskSet) -> float:
    """Mean relative improvement over single-task networks, in percent; more is better.

    `100 * mean_t((-1)^{lower_is_better_t} * (M_t - S_t) / S_t)` (Maninis et al., arXiv 1904.08918;
    Vandenhende et al., arXiv 2004.13379). The divisor is at least `YARDSTICK_FLOOR`, with a warning in the
    log where that changes it; a value equal to its yardstick is always worth 0.

    Args:
        values: M, each task's metric.
        yardstick: S, the same metric of the single-task reference.
        tasks: Which ones, and which way each metric is better.
    """
    improvements = [
        _relative_change(task.name, values[task.name], yardstick[task.name])
        * (-1 if task.direction is Direction.MINIMIZE else 1)
        for task in tasks
    ]
    return 100 * sum(improvements) / len(improvements)


def normalized_gain(errors: Mapping[str, float], yardstick: Mapping[str, float], tasks: TaskSet) -> float:
    """Mean relative fall of the error rate, in percent; more is better.

    `100 * mean_t((err_S - err_M) / err_S)`, as DMTG reports classification (arXiv 2407.05082). It equals
    `delta_m` where every task's metric is its error rate, and has the same floor.
    """
    gains = [-_relative_change(task.name, errors[task.name], yardstick[task.name]) for task in tasks]
    return 100 * sum(gains) / len(gains)


def total_error(errors: Mapping[str, float], tasks: TaskSet) -> float:
    """`100 * sum_t err_t`, the CelebA figure of DMTG (arXiv 2407.05082); less is better."""
    return 100 * sum(errors[task.name] for task in tasks)


def _relative_change(name: str, value: float, reference: float) -> float:
    if reference < YARDSTICK_FLOOR:
        logger.warning("yardstick of %r is %g: divided by %g in its place", name, reference, YARDSTICK_FLOOR)
    return (value - reference) / max(reference, YARDSTICK_FLOOR)
