"""Finding groups without training each: how much tasks help one another, and the partitions that follow.

One-step affinity and TAG (Fifty et al., "Efficiently Identifying Task Groupings for Multi-Task Learning",
NeurIPS 2021, arXiv 2109.04617), HOA (Standley et al., "Which Tasks Should Be Learned Together in Multi-task
Learning?", ICML 2020, arXiv 1905.07553).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from coterie.models.losses import task_losses
from coterie.models.tasks import Grouping, TaskSet

# Shapes: B batch, T tasks, S subsets of tasks.

Group = tuple[int, ...]

# Small enough that the change is first-order: on `digits`, at 0.05 the curvature of the losses hid who helps
# whom on 4 to 6 of 10 seeds, at 0.001 on none.
AFFINITY_LR = 1e-3
STEPS_BETWEEN = 2  # from one measurement to the next, at the least
TASKS_A_STEP = 4  # a measurement costs about T training steps; with more tasks it is taken less often
EXACT_TASKS = 10  # up to here every partition is looked at (at most 42,525), beyond it a local search
EXACT_COVERS = 1_000_000  # up to this many sets of subsets TAG with overlap is exact
MOST_TO_COVER = 16  # tasks: it looks at every subset of them


class AffinityMeter(nn.Module):
    """Measures, while a network trains, how a gradient step on one task changes the others' losses.

    At parameters theta that all tasks share, for tasks i and j on one batch:

        Z[i, j] = 1 - L_j(theta - lr * grad L_i(theta)) / L_j(theta)

    above 0 where a step on task i helps task j (TAG, section 3), averaged over the measurements. Each loss
    stands in a ratio to itself and the tasks' weights play no part. The step is a plain gradient step, as in
    TAG's paper; its notebooks take the optimizer's own, which a network does not know. The parameters and the
    running statistics of the network are left as they are.

    Args:
        tasks: Those of the network.
        lr: Of the gradient step, above 0.

    Attributes:
        sums_TT: Of Z over all measurements.
        counts_TT: Number of measurements: only where both tasks had labels in the batch.
        steps: Training steps seen.
    """

    sums_TT: Tensor
    counts_TT: Tensor
    steps: Tensor

    def __init__(self, tasks: TaskSet, lr: float = AFFINITY_LR) -> None:
        super().__init__()
        self.tasks = tasks
        self.lr = lr
        self.every = max(STEPS_BETWEEN, math.ceil(len(tasks) / TASKS_A_STEP))
        self.register_buffer("sums_TT", torch.zeros(len(tasks), len(tasks)))
        self.register_buffer("counts_TT", torch.zeros(len(tasks), len(tasks)))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def affinity_TT(self) -> Tensor:
        """The mean of Z[i, j], of task i onto task j; 0 where it was never measured."""
        return self.sums_TT / self.counts_TT.clamp(min=1)

    def step(
        self, network: nn.Module, shared: Sequence[str], x: Tensor, targets: Mapping[str, Tensor]
    ) -> None:
        """Measure, every few training steps, on the batch that is trained on next.

        Args:
            network: [B, *input_shape] -> {task name: output}.
            shared: Names of its parameters that all tasks share.
            x: [B, *input_shape].
            targets: Each task's, as `coterie.models.losses` describes them.
        """
        if self.steps % self.every == 0:
            self.measure(network, shared, x, targets)
        self.steps += 1

    def measure(
        self, network: nn.Module, shared: Sequence[str], x: Tensor, targets: Mapping[str, Tensor]
    ) -> None:
        """Measure once; arguments as of `step`.

        In full precision whatever the training's: a step changes a loss by less than bfloat16 can tell.
        """
        with torch.autocast(x.device.type, enabled=False):
            self._measure(network, shared, x, targets)

    def _measure(
        self, network: nn.Module, shared: Sequence[str], x: Tensor, targets: Mapping[str, Tensor]
    ) -> None:
        parameters = {name: network.get_parameter(name) for name in shared}
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}

        def losses(moved: Mapping[str, Tensor]) -> Tensor:
            return task_losses(functional_call(network, {**buffers, **moved}, (x,)), targets, self.tasks)

        before_T = losses(parameters)
        after = []
        for loss in before_T:
            gradients = torch.autograd.grad(
                loss, list(parameters.values()), retain_graph=True, materialize_grads=True
            )
            with torch.no_grad():
                after.append(
                    losses(
                        {
                            name: parameter - self.lr * gradient
                            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
                        }
                    )
                )
        before_T = before_T.detach()
        Z_TT = 1 - torch.stack(after) / before_T
        has_labels_T = before_T > 0  # a task without labels in the batch has no loss
        counted_TT = has_labels_T[:, None] & has_labels_T
        self.sums_TT += torch.where(counted_TT, Z_TT, 0)
        self.counts_TT += counted_TT


def best_partition(affinity_TT: Tensor, groups: int) -> Grouping:
    """Find the partition with the largest sum of affinities inside its groups (the objective is ours).

    The affinities are symmetrised and centred by the mean over all pairs, so that uneven groups don't win by
    their number of pairs. Exact for up to `EXACT_TASKS` tasks, a local search beyond.

    Args:
        affinity_TT: Z[i, j], of task i onto task j; the diagonal is not read.
        groups: How many there are, from 1 to T.

    Raises:
        ValueError: If `groups` is out of range.
    """
    centred = centred_affinity(affinity_TT).tolist()

    def value(group: Group) -> float:
        return math.fsum(centred[i][j] for i, j in itertools.combinations(group, 2))

    return _best(len(affinity_TT), groups, value)


def centred_affinity(affinity_TT: Tensor) -> Tensor:
    """Symmetrise and subtract the mean over all pairs; the diagonal becomes 0. In double precision."""
    pairs_TT = 1 - torch.eye(len(affinity_TT), dtype=torch.float64)
    symmetric_TT = (affinity_TT + affinity_TT.T).detach().to("cpu", torch.float64) / 2 * pairs_TT
    return (symmetric_TT - symmetric_TT.sum() / pairs_TT.sum().clamp(min=1)) * pairs_TT


def tag_partition(affinity_TT: Tensor, groups: int) -> Grouping:
    """Find the partition that is best by TAG's objective: TAG without overlap.

    A task's score is the mean affinity onto it from the others of its group, 0 where it is alone; the sum
    over tasks is maximised. Exact for up to `EXACT_TASKS` tasks, a local search beyond.

    Args:
        affinity_TT: Z[i, j], of task i onto task j; the diagonal is not read.
        groups: How many there are, from 1 to T.

    Raises:
        ValueError: If `groups` is out of range.
    """
    affinity = affinity_TT.tolist()
    return _best(len(affinity), groups, lambda group: math.fsum(_tag_scores(affinity, group)))


class Cover(NamedTuple):
    """Groups that may overlap.

    Attributes:
        groups: Task indices; each group answers at least one task.
        serving: For each task the number of the group that answers it.
    """

    groups: tuple[Group, ...]
    serving: tuple[int, ...]


def tag_cover(affinity_TT: Tensor, groups: int) -> Cover:
    """Find groups by TAG's objective as published: at most `groups`, which may overlap.

    Each task is answered by the group where its score, as in `tag_partition`, is best. Exact where there are
    up to `EXACT_COVERS` sets of subsets; beyond, one group at a time is exchanged until none improves.

    Args:
        affinity_TT: Z[i, j], of task i onto task j; the diagonal is not read.
        groups: The greatest number, from 1 to T.

    Raises:
        ValueError: If `groups` is out of range, or there are more than `MOST_TO_COVER` tasks.
    """
    tasks = len(affinity_TT)
    check_groups(tasks, groups)
    if tasks > MOST_TO_COVER:
        raise ValueError(f"tasks: must be at most {MOST_TO_COVER} for groups that overlap, found {tasks}")
    affinity = affinity_TT.tolist()
    subsets = [s for size in range(1, tasks + 1) for s in itertools.combinations(range(tasks), size)]
    scores_ST = torch.full((len(subsets), tasks), -math.inf, dtype=torch.float64)
    for row_T, group in zip(scores_ST, subsets, strict=True):
        row_T[list(group)] = torch.tensor(_tag_scores(affinity, group), dtype=torch.float64)
    if math.comb(len(subsets), groups) <= EXACT_COVERS:
        choices = torch.combinations(torch.arange(len(subsets)), groups)
        totals = reduce(torch.maximum, (scores_ST[subset] for subset in choices.unbind(1))).sum(dim=1)
        chosen = choices[int(totals.argmax())].tolist()
    else:
        chosen = _exchange(scores_ST, groups)
    serving = scores_ST[chosen].argmax(dim=0).tolist()
    used = sorted(set(serving), key=lambda k: subsets[chosen[k]])
    return Cover(tuple(subsets[chosen[k]] for k in used), tuple(used.index(k) for k in serving))


def hoa_partition(single_T: Tensor, pair_TT: Tensor, groups: int) -> Grouping:
    """Find the partition that is best by HOA: from networks of one and of two tasks.

    Minimises the mean of `hoa_scores` over the tasks. As published, groups may overlap and the budget is in
    standard networks; here they are a partition and the budget is their number. Exact for up to `EXACT_TASKS`
    tasks, a local search beyond.

    Args:
        single_T: Each task's figure in a network of its own: lower is better, comparable between tasks.
        pair_TT: [t, s] is the figure of task t in a network with task s; the diagonal is not read.
        groups: How many there are, from 1 to T.

    Raises:
        ValueError: If `groups` is out of range.
    """
    return _best(len(single_T), groups, lambda group: -math.fsum(hoa_scores(single_T, pair_TT, group)))


def hoa_scores(single_T: Tensor, pair_TT: Tensor, group: Sequence[int]) -> list[float]:
    """What HOA expects of each task of a group: the mean of its pairs, its single figure where it is alone.

    Args:
        single_T: As `hoa_partition` takes it.
        pair_TT: As `hoa_partition` takes it.
        group: Task indices.
    """
    if len(group) == 1:
        return [float(single_T[group[0]])]
    return [math.fsum(float(pair_TT[t, s]) for s in group if s != t) / (len(group) - 1) for t in group]


def partitions(tasks: int, groups: int) -> Iterator[Grouping]:
    """Every partition of 0..tasks-1 into `groups` groups, once each, by rising labels.

    Raises:
        ValueError: If `groups` is out of range.
    """
    check_groups(tasks, groups)

    def labels(start: tuple[int, ...], used: int) -> Iterator[tuple[int, ...]]:
        left = tasks - len(start)
        if left == 0:
            yield start
            return
        for label in range(min(used + 1, groups)):
            then_used = max(used, label + 1)
            if groups - then_used < left:
                yield from labels((*start, label), then_used)

    return map(Grouping.from_labels, labels((), 0))


def random_partition(tasks: int, groups: int, generator: torch.Generator | None = None) -> Grouping:
    """Draw one of the partitions of 0..tasks-1 into `groups` groups, each with the same chance.

    Args:
        tasks: How many.
        groups: From 1 to `tasks`.
        generator: Torch's global one where it is None.

    Raises:
        ValueError: If `groups` is out of range.
    """
    check_groups(tasks, groups)
    choices: list[int] = []
    left = groups
    # Of the partitions of n tasks into k groups, S(n-1, k-1) have the last task alone, and each of the
    # S(n-1, k) partitions of the others takes it into any of its k groups.
    for n in range(tasks, 0, -1):
        alone, which = torch.rand(2, dtype=torch.float64, generator=generator).tolist()
        if alone < _partitions_into(n - 1, left - 1) / _partitions_into(n, left):
            left -= 1
            choices.append(left)
        else:
            choices.append(int(which * left))
    return Grouping.from_labels(choices[::-1])


def check_groups(tasks: int, groups: object) -> None:
    """Check a number of groups.

    Raises:
        ValueError: If it is not a whole number from 1 to `tasks`.
    """
    if type(groups) is not int or not 1 <= groups <= tasks:
        raise ValueError(f"groups: must be a whole number from 1 to {tasks}, found {groups!r}")


@cache
def _partitions_into(n: int, k: int) -> int:
    """Stirling's number of the second kind."""
    if n == 0 or k == 0:
        return int(n == k)
    return _partitions_into(n - 1, k - 1) + k * _partitions_into(n - 1, k)


def _tag_scores(affinity: Sequence[Sequence[float]], group: Group) -> list[float]:
    others = max(len(group) - 1, 1)
    return [math.fsum(affinity[i][j] for i in group if i != j) / others for j in group]


def _best(tasks: int, groups: int, value: Callable[[Group], float]) -> Grouping:
    """The partition with the largest sum of its groups' values; the first of equal ones."""
    check_groups(tasks, groups)
    value = cache(value)

    def total(partition: Grouping) -> float:
        return math.fsum(value(group) for group in partition.groups)

    if tasks <= EXACT_TASKS:
        return max(partitions(tasks, groups), key=total)
    found = Grouping.apart(tasks)
    while len(found) > groups:
        found = max(_merged(found), key=total)
    while total(better := max(_neighbours(found), key=total, default=found)) > total(found):
        found = better
    return found


def _merged(partition: Grouping) -> Iterator[Grouping]:
    """Every partition with two of the groups made one."""
    labels = partition.labels
    for one, other in itertools.combinations(range(len(partition)), 2):
        yield Grouping.from_labels([one if label == other else label for label in labels])


def _neighbours(partition: Grouping) -> Iterator[Grouping]:
    """Every partition with one task in another group, or two tasks of different groups exchanged."""
    labels = list(partition.labels)
    for t, label in enumerate(labels):
        if labels.count(label) > 1:
            for other in range(len(partition)):
                if other != label:
                    yield Grouping.from_labels([*labels[:t], other, *labels[t + 1 :]])
    for t, s in itertools.combinations(range(len(labels)), 2):
        if labels[t] != labels[s]:
            swapped = labels.copy()
            swapped[t], swapped[s] = labels[s], labels[t]
            yield Grouping.from_labels(swapped)


def _exchange(scores_ST: Tensor, groups: int) -> list[int]:
    """Start with all tasks in every group; exchange the group that gains most for as long as one gains."""
    none_T = torch.full_like(scores_ST[0], -math.inf)
    chosen = [len(scores_ST) - 1] * groups
    total = float(scores_ST[-1].sum())
    while True:
        options = []
        for place in range(groups):
            kept_T = torch.stack(
                [none_T, *(scores_ST[s] for s in chosen[:place] + chosen[place + 1 :])]
            ).amax(dim=0)
            totals_S = torch.maximum(scores_ST, kept_T).sum(dim=1)
            options.append((float(totals_S.max()), place, int(totals_S.argmax())))
        best, place, replacement = max(options)
        if best <= total:
            return chosen
        total, chosen[place] = best, replacement
