"""Groupings from measured subsets of the tasks, and how far a grouping is from the best.

Without units that all groups share, a group is a network of its own: what it reaches holds in every partition
that contains it. So networks for subsets of the tasks are trained once, as one stacked batch, and partitions
are judged by what their groups reached.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, permutations
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coterie.models.affinity import hoa_partition, partitions
from coterie.models.backbones import MLP
from coterie.models.losses import labelled
from coterie.models.metrics import YARDSTICK_FLOOR
from coterie.models.stacked import StackedMLP, Subset
from coterie.models.tasks import Grouping, TaskKind
from coterie.search.trial import Bench, Samples

# Shapes: B batch, I samples, N subsets, O outputs, R replicates, T tasks.

EVALUATED_AT_ONCE = 1024  # samples: bounds the memory for the features of hundreds of networks


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a network is trained: by Adam, with a job's defaults.

    Attributes:
        epochs: Passes over the training split.
        lr: Learning rate.
        weight_decay: Times the weights, added to the gradient.
        batch_size: Samples a step.
    """

    epochs: int = 40
    lr: float = 5e-3
    weight_decay: float = 1e-6
    batch_size: int = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class SubsetTable:
    """What networks for subsets of the tasks reached on one split.

    Attributes:
        subsets: Task indices, rising.
        errors_RNT: For each seed, subset and task: the error rate, or the root mean square error of a
            regression; NaN where the subset has not the task.
    """

    subsets: tuple[Subset, ...]
    errors_RNT: NDArray[np.float64]

    @property
    def tasks(self) -> int:
        """How many tasks there are."""
        return int(self.errors_RNT.shape[2])

    def relative(self, subset: Subset) -> NDArray[np.float64]:
        """The subset's errors [T], over those of single-task networks, each the mean over seeds.

        Raises:
            ValueError: If it or a single task was not measured.
        """
        if subset not in self._relative:
            raise ValueError(f"subset: must be a measured one, found {subset}")
        return self._relative[subset]

    @cached_property
    def _relative(self) -> Mapping[Subset, NDArray[np.float64]]:
        errors = dict(zip(self.subsets, self.errors_RNT.mean(axis=0), strict=True))
        missing = [t for t in range(self.tasks) if (t,) not in errors]
        if missing:
            raise ValueError(f"subsets: must hold each task alone, found none for {missing}")
        single_T = np.array([errors[t,][t] for t in range(self.tasks)])
        return {
            subset: errors_T / np.maximum(single_T, YARDSTICK_FLOOR) for subset, errors_T in errors.items()
        }


def all_subsets(tasks: int) -> list[Subset]:
    """Every subset of 0..tasks-1 but the empty one, smaller ones first."""
    return [subset for size in range(1, tasks + 1) for subset in combinations(range(tasks), size)]


def singles_and_pairs(tasks: int) -> list[Subset]:
    """The subsets that HOA measures."""
    return [subset for subset in all_subsets(tasks) if len(subset) <= 2]


def measure_subsets(
    bench: Bench, backbone: MLP, subsets: Sequence[Subset], seeds: Sequence[int], recipe: Recipe
) -> tuple[SubsetTable, SubsetTable]:
    """Train a network for each subset and seed, and measure them on validation and test.

    The networks of one seed are one stack; each seed has a stack of its own, since the order of the batches
    is drawn for a stack.

    Args:
        bench: The data, and where to train.
        backbone: The shape of each network.
        subsets: Task indices.
        seeds: Of initial weights and batches, one or more.
        recipe: How each is trained.

    Raises:
        ValueError: If there is no seed, or as `StackedMLP` does.
    """
    if not seeds:
        raise ValueError("seeds: must be one or more, found none")
    validation, test = [], []
    for seed in seeds:
        stack = _train(bench, backbone, subsets, seed, recipe)
        validation.append(_errors(stack, bench.validation))
        test.append(_errors(stack, bench.test))
    measured = stack.subsets
    return (
        SubsetTable(subsets=measured, errors_RNT=np.concatenate(validation)),
        SubsetTable(subsets=measured, errors_RNT=np.concatenate(test)),
    )


def hoa(table: SubsetTable, groups: int) -> Grouping:
    """Find the partition that is best by HOA, from `singles_and_pairs`.

    Raises:
        ValueError: If one of them was not measured, or `groups` is out of range.
    """
    single_T = torch.tensor([table.relative((t,))[t] for t in range(table.tasks)])
    pair_TT = torch.zeros(table.tasks, table.tasks, dtype=torch.float64)
    for t, s in permutations(range(table.tasks), 2):
        pair_TT[t, s] = table.relative((min(t, s), max(t, s)))[t]
    return hoa_partition(single_T, pair_TT, groups)


def exhaustive(table: SubsetTable, groups: int) -> Grouping:
    """Find the partition whose groups reached the least `grouping_error`, from `all_subsets`.

    Raises:
        ValueError: If a subset was not measured, or `groups` is out of range.
    """
    return min(partitions(table.tasks, groups), key=lambda grouping: grouping_error(grouping, table))


def grouping_error(grouping: Grouping, table: SubsetTable) -> float:
    """Mean over tasks of the error in the task's group, relative to that of its single-task network.

    Raises:
        ValueError: If a group was not measured.
    """
    return fmean(float(table.relative(group)[t]) for group in grouping.groups for t in group)


def regret(grouping: Grouping, table: SubsetTable, groups: int) -> float:
    """How far a grouping is from the best: 0 is as good, 1 no better than random.

    `(found - best) / (mean - best)` in `grouping_error`, where best and mean are over all partitions into
    `groups` groups; 0 where these are all equally good.

    Args:
        grouping: Found without looking at `table`; it may have fewer groups.
        table: Of `all_subsets`, measured with fresh seeds on the test split.
        groups: How many were asked for.

    Raises:
        ValueError: If a subset was not measured, or `groups` leaves no choice.
    """
    if not 1 < groups < table.tasks:
        raise ValueError(f"groups: must be a whole number from 2 to {table.tasks - 1}, found {groups!r}")
    errors = [grouping_error(partition, table) for partition in partitions(table.tasks, groups)]
    spread = fmean(errors) - min(errors)
    return (grouping_error(grouping, table) - min(errors)) / spread if spread > 0 else 0.0


def _train(bench: Bench, backbone: MLP, subsets: Sequence[Subset], seed: int, recipe: Recipe) -> StackedMLP:
    stack = StackedMLP(backbone=backbone, tasks=bench.tasks, subsets=subsets, seeds=(seed,)).to(bench.device)
    optimizer = torch.optim.Adam(
        stack.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
    )
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = bench.train.inputs, bench.train.targets
    for _ in range(recipe.epochs):
        order = torch.randperm(len(inputs), generator=generator).to(bench.device)
        for index in torch.split(order, recipe.batch_size):
            batch = {name: targets[name][index] for name in bench.tasks.names}
            loss = stack.training_loss(inputs[index], batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return stack


@torch.no_grad()
def _errors(stack: StackedMLP, samples: Samples) -> NDArray[np.float64]:
    """Every network's error in each of its tasks, [R, N, T]."""
    faults_RNT = torch.zeros(len(stack.seeds), *stack.task_weights_NT.shape, device=samples.inputs.device)
    labels_T = torch.zeros_like(faults_RNT[0, 0])
    for index in torch.split(torch.arange(len(samples.inputs)), EVALUATED_AT_ONCE):
        outputs = stack(samples.inputs[index])
        for t, task in enumerate(stack.tasks):
            target = samples.targets[task.name][index]
            known = labelled(target, task.kind)
            faults = _faults(task.kind, outputs[task.name], target).where(known, 0)
            faults_RNT[..., t] += faults.flatten(2).sum(dim=2)
            labels_T[t] += known.sum()
    errors_RNT = faults_RNT / labels_T
    regressions_T = torch.tensor([task.kind is TaskKind.REGRESSION for task in stack.tasks])
    errors_RNT = torch.where(regressions_T.to(errors_RNT.device), errors_RNT.sqrt(), errors_RNT)
    errors_RNT = errors_RNT.where(stack.task_weights_NT > 0, torch.nan)
    return np.asarray(errors_RNT.cpu(), dtype=np.float64)


def _faults(kind: TaskKind, output: Tensor, target: Tensor) -> Tensor:
    """What counts against each answer, [R, N, I] or [R, N, I, O]: a regression's squared difference, or 1.

    A class that is not a number is wrong.
    """
    if kind is TaskKind.REGRESSION:
        return (output - target).square()
    if kind is TaskKind.BINARY:
        return ~torch.where(target > 0, output > 0, output <= 0)
    return (output.argmax(dim=-1) != target) | output.isnan().any(dim=-1)
