"""Groupings from measured subsets of the tasks, and how far a grouping is from the best.

Without units that all groups share, a group is a network of its own: what it reaches holds in every partition
that contains it. So networks for subsets of the tasks are trained once, as one stacked batch, and partitions
are judged by what their groups reached.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, permutations
from statistics import fmean, stdev

import numpy as np
import torch
from numpy.typing import NDArray

from coterie.models.affinity import hoa_partition, partitions
from coterie.models.backbones import MLP
from coterie.models.metrics import YARDSTICK_FLOOR, delta_m
from coterie.models.stacked import StackedMLP, Subset
from coterie.models.tasks import CLASSIFICATION, Grouping, Task, TaskSet
from coterie.search.store import AffinityResult, SubsetResult
from coterie.search.subsets import Recipe, measure_stack, train_stack
from coterie.search.trial import Bench, Samples

# Shapes: N subsets, R replicates, T tasks.

_Cells = dict[tuple[int, int], dict[int, float | None]]  # place in a table -> seed -> value


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


@dataclass(frozen=True, kw_only=True)
class AffinityTable:
    """How much tasks help each other, over seeds.

    Attributes:
        seeds: How many it was measured over; a cell may have fewer.
        mean: [i][j], of task i onto task j, above 0 where i helps j; None where it was not measured.
        standard_error: Of the mean; None below two seeds.
    """

    seeds: int
    mean: list[list[float | None]]
    standard_error: list[list[float | None]]


def one_step_affinity(results: Sequence[AffinityResult], tasks: TaskSet) -> AffinityTable | None:
    """Average measured matrices over their seeds; None where nothing was measured.

    Args:
        results: One a seed, each of all these tasks in any order.
        tasks: The order of the table.
    """
    cells: _Cells = {(i, j): {} for i in range(len(tasks)) for j in range(len(tasks))}
    for result in results:
        places = [result.tasks.index(name) for name in tasks.names]
        for (i, j), values in cells.items():
            values[result.seed] = result.matrix[places[i]][places[j]]
    return _over_seeds(cells, len(tasks))


def pairwise_affinity(results: Sequence[SubsetResult], tasks: TaskSet) -> AffinityTable | None:
    """What networks for one and for two tasks tell; None where no seed has both.

    Of task i onto task j: the gain in percent of the metric that judges j, on the validation split, in the
    network for both over the one for j alone with the same seed.

    Args:
        results: Networks for subsets of the tasks; of those with other weights or more tasks nothing is read.
        tasks: The order of the table, and the weights.
    """
    weights = {task.name: task.weight for task in tasks}
    reached = {
        (frozenset(result.tasks), result.seed): result.validation
        for result in results
        if all(weights.get(name) == weight for name, weight in zip(result.tasks, result.weights, strict=True))
    }
    seeds = sorted({seed for _, seed in reached})
    cells: _Cells = {pair: {} for pair in permutations(range(len(tasks)), 2)}
    for (i, j), values in cells.items():
        task = tasks[j]
        for seed in seeds:
            alone = reached.get((frozenset({task.name}), seed))
            together = reached.get((frozenset({tasks[i].name, task.name}), seed))
            if alone is not None and together is not None:
                values[seed] = _gain(task, together[task.name][task.metric], alone[task.name][task.metric])
    return _over_seeds(cells, len(tasks))


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
        stack = train_stack(bench, backbone, subsets, seed, recipe)
        validation.append(_errors(stack, bench.validation))
        test.append(_errors(stack, bench.test))
    measured = stack.subsets
    return (
        SubsetTable(subsets=measured, errors_RNT=np.stack(validation)),
        SubsetTable(subsets=measured, errors_RNT=np.stack(test)),
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


def _gain(task: Task, value: float | None, alone: float | None) -> float | None:
    """Relative improvement in percent; None where a value is no number, as of a network that diverged."""
    if value is None or alone is None or not math.isfinite(value) or not math.isfinite(alone):
        return None
    return delta_m({task.name: value}, {task.name: alone}, TaskSet([task]))


def _over_seeds(cells: _Cells, tasks: int) -> AffinityTable | None:
    mean: list[list[float | None]] = [[None] * tasks for _ in range(tasks)]
    standard_error: list[list[float | None]] = [[None] * tasks for _ in range(tasks)]
    seeds: set[int] = set()
    for (i, j), values in cells.items():
        known = {seed: value for seed, value in values.items() if value is not None}
        seeds |= known.keys()
        if known:
            mean[i][j] = fmean(known.values())
        if len(known) > 1:
            standard_error[i][j] = stdev(known.values()) / math.sqrt(len(known))
    return AffinityTable(seeds=len(seeds), mean=mean, standard_error=standard_error) if seeds else None


def _errors(stack: StackedMLP, samples: Samples) -> NDArray[np.float64]:
    """Every network's error in each of its tasks, [N, T]."""
    errors_NT = np.full((len(stack.subsets), len(stack.tasks)), np.nan)
    for n, (subset, found) in enumerate(zip(stack.subsets, measure_stack(stack, samples), strict=True)):
        for t in subset:
            task = stack.tasks[t]
            errors_NT[n, t] = found[task.name]["error" if task.kind in CLASSIFICATION else "rmse"]
    return errors_NT
