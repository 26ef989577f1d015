"""The metrics: each task's own, and those over all tasks that rank candidates.

The definitions are torchmetrics', which the tests compare with, but written out: that package takes 2 s and
74 MB to load into every worker, counts C classes in a table of C x C, and sums in single precision.
"""

import logging
import math
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.models.losses import labelled
from coterie.models.tasks import CLASSIFICATION, KIND_METRICS, Direction, Task, TaskKind, TaskSet

# Shapes: B batch, C classes, H height, M labels, O outputs, W width; S stands for all axes of a target behind
# its batch.

logger = logging.getLogger(__name__)

# A yardstick nearer to zero, relative to the metric's scale, makes a relative change meaningless: for an
# error rate, one wrong in a thousand.
YARDSTICK_FLOOR = 1e-3
HALF_TURN = 180.0  # degrees
# The scales of metrics that have one; what is in the unit of a target has none.
METRIC_SCALES: Mapping[str, float] = {
    **dict.fromkeys(("error", "accuracy", "auc", "f1", "miou", "pixel_accuracy", "rel_error"), 1.0),
    **dict.fromkeys(("within_11.25", "within_22.5", "within_30"), 1.0),
    **dict.fromkeys(("angle_mean", "angle_median"), HALF_TURN),
}
ANGLE_BINS = 2**18  # 7e-4 degrees each: finer than what single precision knows of a normal
CHANCE = 0.5


class Evaluator:
    """Collects what a network answers over the batches of a split, and gives every task's metrics.

    A missing label (see `coterie.models.losses`) is left out. Shares are in [0, 1], angles in degrees, other
    differences in the unit of the target. An answer of NaN is wrong: another class, an angle of 180 degrees,
    an infinite difference.

    - binary, multiclass: `error`, `accuracy` = 1 - error; `f1` of the positive class, or its mean over the
      classes that occur among labels or answers; `auc`, exact, or its mean over the classes that occur among
      the labels, each against the rest; 0.5 where the labels are all of one class.
    - regression, dense_regression: `rmse`, `mae`, over all labelled numbers.
    - segmentation: `miou`, mean over the classes that occur among labels or answers; `pixel_accuracy`.
    - depth: `abs_error`, `rmse`; `rel_error`, relative to the label, without labels of 0.
    - normals: `angle_mean`, `angle_median` (to 1e-3 degrees, from a histogram); `within_11.25`,
      `within_22.5`, `within_30`, the shares of places with a smaller angle.

    It lives on the outputs' device and waits for it in `compute` only. Memory does not grow with the split,
    but for `auc`: a number for each sample and class.

    Args:
        tasks: Whose metrics.
    """

    def __init__(self, tasks: TaskSet) -> None:
        self._meters = {task.name: _METERS[task.kind](task) for task in tasks}

    @torch.no_grad()
    def update(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
        """Take in a batch.

        Args:
            outputs: Each task's, as its head gives them.
            targets: Each task's, as `coterie.models.losses` describes them.

        Raises:
            KeyError: If a task is missing in `outputs` or `targets`.
        """
        for name, meter in self._meters.items():
            meter.update(outputs[name].detach(), targets[name])

    def compute(self) -> dict[str, dict[str, float]]:
        """Give the metrics of all batches so far: task -> metric of `KIND_METRICS` -> value.

        Raises:
            ValueError: If a task had no label.
        """
        return {name: meter.compute() for name, meter in self._meters.items()}


class _Meter(ABC):
    """One task's part of an `Evaluator`."""

    def __init__(self, task: Task) -> None:
        self.task = task

    @abstractmethod
    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in a batch."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Give the metrics."""

    def at_least_one(self, labels: float) -> float:
        """Give the number of labels.

        Raises:
            ValueError: If it is 0.
        """
        if not labels:
            raise ValueError(f"targets: of {self.task.name!r} must have a label in every split, found none")
        return labels


class _Classes(_Meter):
    """Counts how often each class is the label, the answer, and both."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.classes = 2 if task.kind is TaskKind.BINARY else task.outputs
        # Labels, answers and right answers by class, behind the missing labels.
        self.counts_3C = torch.zeros(3, 1 + self.classes, dtype=torch.int64)
        self.scores: list[Tensor] = []
        self.labels: list[Tensor] = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        there = labelled(targets, self.task.kind)
        if self.task.kind is TaskKind.BINARY:
            labels, answers = (targets > 0).long(), (outputs > 0).long()
            invalid = outputs.isnan()
        else:
            labels, answers = targets.long(), outputs.argmax(dim=1)
            invalid = outputs.isnan().any(dim=1)
        answers = torch.where(invalid, (labels + 1) % self.classes, answers)
        index_3M = torch.stack([labels, answers, labels.where(answers == labels, -1)]).where(there, -1) + 1
        index_3M = index_3M.flatten(1)
        self.counts_3C = self.counts_3C.to(outputs.device)
        self.counts_3C.scatter_add_(1, index_3M, torch.ones_like(index_3M))
        if self.task.kind in CLASSIFICATION:
            self.labels.append(labels.where(there, -1))
            self.scores.append(outputs if self.task.kind is TaskKind.BINARY else outputs.log_softmax(dim=1))

    def compute(self) -> dict[str, float]:
        labels_C, answers_C, right_C = self.counts_3C[:, 1:].double()
        correct = float(right_C.sum()) / self.at_least_one(float(labels_C.sum()))
        occurs_C = labels_C + answers_C > 0
        if self.task.kind is TaskKind.SEGMENTATION:
            iou_C = right_C / (labels_C + answers_C - right_C)
            return {"miou": float(iou_C[occurs_C].mean()), "pixel_accuracy": correct}
        f1_C = 2 * right_C / (labels_C + answers_C)
        if self.task.kind is TaskKind.BINARY:
            f1 = float(f1_C[1].nan_to_num())
        else:
            f1 = float(f1_C[occurs_C].mean())
        return {"error": 1 - correct, "accuracy": correct, "auc": self._auc(), "f1": f1}

    def _auc(self) -> float:
        labels_M, scores = torch.cat(self.labels), torch.cat(self.scores)
        scores, labels_M = scores[labels_M >= 0], labels_M[labels_M >= 0]
        if self.task.kind is TaskKind.BINARY:
            areas = [_area(scores, labels_M == 1)]
        else:
            areas = [_area(scores_M, labels_M == c) for c, scores_M in enumerate(scores.unbind(1))]
        known = [area for area in areas if area is not None]
        return math.fsum(known) / len(known) if known else CHANCE


class _Differences(_Meter):
    """Sums the differences between outputs and targets."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        # Absolute, squared and relative differences, and the numbers of labels and of labels other than 0.
        self.sums_5 = torch.zeros(5, dtype=torch.float64)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        there = labelled(targets, self.task.kind)
        targets = targets.double()
        far = (outputs.double() - targets).abs().nan_to_num(nan=math.inf, posinf=math.inf).where(there, 0)
        divisible = there & (targets != 0)
        relative = (far / targets.abs()).where(divisible, 0)
        sums = [values.sum() for values in (far, far.square(), relative, there.double(), divisible.double())]
        self.sums_5 = self.sums_5.to(outputs.device) + torch.stack(sums)

    def compute(self) -> dict[str, float]:
        absolute, squared, relative, labels, divisible = self.sums_5.tolist()
        mean = absolute / self.at_least_one(labels)
        values = {
            "mae": mean,
            "abs_error": mean,
            "rmse": math.sqrt(squared / labels),
            "rel_error": relative / max(divisible, 1),
        }
        return {name: values[name] for name in KIND_METRICS[self.task.kind]}


class _Angles(_Meter):
    """Measures the angles between normals."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.limits = {
            name: float(name.removeprefix("within_"))
            for name in KIND_METRICS[task.kind]
            if name.startswith("within_")
        }
        self.counts_bins = torch.zeros(ANGLE_BINS, dtype=torch.float64)
        self.sums = torch.zeros(2 + len(self.limits), dtype=torch.float64)  # of angles, labels, those within

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        there_BHW = labelled(targets, self.task.kind)[:, 0]
        cosine_BHW = F.cosine_similarity(outputs.double(), targets.double(), dim=1).clamp(-1, 1)
        angles_BHW = cosine_BHW.acos().rad2deg().nan_to_num(nan=HALF_TURN)
        within = [((angles_BHW < limit) & there_BHW).sum() for limit in self.limits.values()]
        sums = torch.stack([angles_BHW.where(there_BHW, 0).sum(), there_BHW.sum(), *within])
        self.sums = self.sums.to(outputs.device) + sums
        outside = -1.0  # of the histogram
        counts = torch.histc(angles_BHW.where(there_BHW, outside), ANGLE_BINS, min=0, max=HALF_TURN)
        self.counts_bins = self.counts_bins.to(outputs.device) + counts

    def compute(self) -> dict[str, float]:
        total, labels, *within = self.sums.tolist()
        mean = total / self.at_least_one(labels)
        middle = torch.tensor([(labels - 1) // 2, labels // 2], dtype=torch.float64)  # of an even number, two
        bins = torch.searchsorted(self.counts_bins.cumsum(0).cpu(), middle, right=True)
        median = (float(bins.double().mean()) + 0.5) * HALF_TURN / ANGLE_BINS
        shares = {name: count / labels for name, count in zip(self.limits, within, strict=True)}
        return {"angle_mean": mean, "angle_median": median, **shares}


_METERS: Mapping[TaskKind, type[_Meter]] = {
    TaskKind.BINARY: _Classes,
    TaskKind.MULTICLASS: _Classes,
    TaskKind.REGRESSION: _Differences,
    TaskKind.SEGMENTATION: _Classes,
    TaskKind.DEPTH: _Differences,
    TaskKind.NORMALS: _Angles,
    TaskKind.DENSE_REGRESSION: _Differences,
}


def _area(scores_M: Tensor, positive_M: Tensor) -> float | None:
    """Area under the ROC curve: how often a positive outscores a negative, a tie counting half.

    A score of NaN loses against all; None where there is no pair.
    """
    worst = torch.where(positive_M, -math.inf, math.inf)
    scores_M = torch.where(scores_M.isnan(), worst, scores_M)
    positives, negatives = scores_M[positive_M], scores_M[~positive_M].sort().values
    pairs = len(positives) * len(negatives)
    if not pairs:
        return None
    below = torch.searchsorted(negatives, positives) + torch.searchsorted(negatives, positives, right=True)
    return int(below.sum()) / (2 * pairs)


def delta_m(values: Mapping[str, float], yardstick: Mapping[str, float], tasks: TaskSet) -> float:
    """Mean relative improvement over single-task networks, in percent; more is better.

    `100 * mean_t((-1)^{lower_is_better_t} * (M_t - S_t) / S_t)` (Maninis et al., arXiv 1904.08918;
    Vandenhende et al., arXiv 2004.13379). The divisor is at least `YARDSTICK_FLOOR` of the metric's scale,
    with a warning in the log where that changes it; M stands for the scale of a metric that has none, so that
    a change is worth at most 1 / `YARDSTICK_FLOOR`. A value equal to its yardstick is always worth 0.

    Args:
        values: M, the metric that judges each task.
        yardstick: S, the same metric of the single-task reference.
        tasks: Which ones, and which way each metric is better.
    """
    improvements = [
        _relative_change(task.name, task.metric, values[task.name], yardstick[task.name])
        * (-1 if task.direction is Direction.MINIMIZE else 1)
        for task in tasks
    ]
    return 100 * sum(improvements) / len(improvements)


def normalized_gain(errors: Mapping[str, float], yardstick: Mapping[str, float], tasks: TaskSet) -> float:
    """Mean relative fall of the classification tasks' error rates, in percent; more is better.

    `100 * mean_t((err_S - err_M) / err_S)`, as DMTG reports classification (arXiv 2407.05082). It equals
    `delta_m` where every task is judged by its error rate, and has the same floor.

    Args:
        errors: Each classification task's error rate, in [0, 1].
        yardstick: Those of the single-task reference.
        tasks: Those of other kinds are left out.

    Raises:
        ValueError: If no task is a classification.
    """
    gains = [
        -_relative_change(task.name, "error", errors[task.name], yardstick[task.name])
        for task in _classification(tasks)
    ]
    return 100 * sum(gains) / len(gains)


def total_error(errors: Mapping[str, float], tasks: TaskSet) -> float:
    """`100 * sum_t err_t`, the CelebA figure of DMTG (arXiv 2407.05082); less is better.

    Args:
        errors: Each classification task's error rate, in [0, 1].
        tasks: Those of other kinds are left out.

    Raises:
        ValueError: If no task is a classification.
    """
    return 100 * sum(errors[task.name] for task in _classification(tasks))


def mean_rank(table: Mapping[str, Mapping[str, float]], tasks: TaskSet) -> dict[str, float]:
    """Each candidate's rank among all, mean over tasks: 1 is best, equal ones share their mean rank.

    Args:
        table: Candidate -> task -> the metric that judges it.
        tasks: Which ones, and which way each metric is better.

    Example:
        >>> tasks = TaskSet([Task(name="a", kind=TaskKind.BINARY)])
        >>> mean_rank({"x": {"a": 0.2}, "y": {"a": 0.1}, "z": {"a": 0.2}}, tasks)
        {'x': 2.5, 'y': 1.0, 'z': 2.5}
    """
    ranks = dict.fromkeys(table, 0.0)
    for task in tasks:
        sign = 1 if task.direction is Direction.MINIMIZE else -1
        losses = {candidate: sign * values[task.name] for candidate, values in table.items()}
        ordered = sorted(losses.values())
        for candidate, loss in losses.items():
            ranks[candidate] += (bisect_left(ordered, loss) + 1 + bisect_right(ordered, loss)) / 2
    return {candidate: rank / len(tasks) for candidate, rank in ranks.items()}


def _classification(tasks: TaskSet) -> Sequence[Task]:
    found = [task for task in tasks if task.kind in CLASSIFICATION]
    if not found:
        raise ValueError(f"tasks: must have a classification among them, found {list(tasks.names)}")
    return found


def _relative_change(name: str, metric: str, value: float, reference: float) -> float:
    if value == reference or math.isinf(value):
        return 0.0 if value == reference else value
    floor = YARDSTICK_FLOOR * METRIC_SCALES.get(metric, value)
    if reference < floor:
        logger.warning("yardstick of %r is %g: divided by %g in its place", name, reference, floor)
    return (value - reference) / max(reference, floor)
