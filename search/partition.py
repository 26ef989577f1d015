"""The best groups out of known ones: exact, by branch and bound.

Without units that all groups share, what a group reaches holds in every partition that contains it. So the
best partition is a set partitioning problem over the groups whose value is known. The best groups that may
overlap (Standley et al., "Which Tasks Should Be Learned Together in Multi-task Learning?", ICML 2020, arXiv
1905.07553) are a problem of the p-median kind.

Both are bounded by prices of the tasks (Lagrange multipliers): the prices' sum, less what each chosen group's
value falls short of its tasks' prices. `scipy.optimize.milp` solves the first problem too, but more slowly
(`tests/benchmarks/partition.py`), within a tolerance of 1e-6, and of equally good partitions it gives any.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, inf
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from coterie.search.work import Subset

# Shapes: S known groups, T tasks, L limits.

TIE = 1e-9  # values that differ by less than this share of the largest one are equal
ROUNDING = 1e-12  # of the bounds, on the same scale: far below a tie
INFEASIBLE = 2  # `linprog`'s status where nothing keeps the limits
STEP = 0.1  # of the prices at first, of the greatest gain's size
PRICE_STEPS = 200  # of the subgradient method
PATIENCE = 10  # steps without a lower bound before they are made half as long


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """Groups that are best together.

    Attributes:
        groups: Sorted; each answers at least one task.
        serving: For each task the number of the group that answers it.
        value: The sum of what the tasks gain.
        cost: The sum over the groups; 0 where costs play no part.
    """

    groups: tuple[Subset, ...]
    serving: tuple[int, ...]
    value: float
    cost: float


def best_partition(
    values: Mapping[Subset, float],
    tasks: int,
    *,
    most_groups: int,
    least_groups: int = 1,
    costs: Mapping[Subset, float] | None = None,
    most_cost: float = inf,
) -> Solution | None:
    """Find the partition of the tasks into known groups that has the largest sum of values.

    Of equally good ones (to 1e-9 of the largest value) that with the fewest groups, of these the smallest in
    the order of tuples.

    Args:
        values: Group -> the sum over its tasks of what they gain in it; higher is better.
        tasks: How many there are, 0..tasks-1.
        most_groups: The greatest number of groups.
        least_groups: The smallest.
        costs: Group -> cost, 0 or more; None where groups cost nothing.
        most_cost: The greatest sum of costs (to 1e-9 of it).

    Returns:
        None where no partition keeps the limits.

    Raises:
        ValueError: If a parameter breaks its rule.
    """
    known = _Known.check(values, tasks, most_groups, costs, most_cost)
    if not 1 <= least_groups <= most_groups:
        raise ValueError(f"least_groups: must be from 1 to {most_groups}, found {least_groups}")
    values_S = _scaled([values[subset] for subset in known.subsets])
    prices = _partition_prices(known, values_S, least_groups) if known.has_TS.any(axis=1).all() else None
    if prices is None:
        return None
    found = _Partitions(known, values_S, *prices).best(range(least_groups, most_groups + 1))
    if found is None:
        return None
    serving = [next(k for k, group in enumerate(found) if t in group) for t in range(tasks)]
    return known.solution(found, serving, fsum(values[group] for group in found))


def best_cover(
    gains: Mapping[Subset, Sequence[float]],
    tasks: int,
    *,
    most_groups: int,
    costs: Mapping[Subset, float] | None = None,
    most_cost: float = inf,
) -> Solution | None:
    """Find the known groups, overlapping or not, in which the tasks gain most, each in its best group.

    Ties are broken as in `best_partition`; of groups that serve a task equally well the first answers it.

    Args:
        gains: Group -> what each of its tasks gains in it, in the same order; higher is better.
        tasks: How many there are, 0..tasks-1; each is in one of the groups at least.
        most_groups: The greatest number of groups.
        costs: Group -> cost, 0 or more; None where groups cost nothing.
        most_cost: The greatest sum of costs (to 1e-9 of it).

    Returns:
        None where no groups keep the limits.

    Raises:
        ValueError: If a parameter breaks its rule.
    """
    known = _Known.check(gains, tasks, most_groups, costs, most_cost)
    for subset in known.subsets:
        if len(gains[subset]) != len(subset):
            raise ValueError(f"gains: must hold one for each task of {subset}, found {len(gains[subset])}")
    gains_ST = np.full((len(known.subsets), tasks), -inf)
    gains_ST[known.has_TS.T > 0] = _scaled([gain for subset in known.subsets for gain in gains[subset]])
    if not known.has_TS.any(axis=1).all():
        return None
    found = _Covers(known, gains_ST, *_cover_prices(known, gains_ST)).best(range(1, most_groups + 1))
    if found is None:
        return None
    gained = [dict(zip(group, gains[group], strict=True)) for group in found]
    serving = [
        max((k for k, group in enumerate(found) if t in group), key=lambda k: gained[k][t])
        for t in range(tasks)
    ]
    return known.solution(found, serving, fsum(gained[k][t] for t, k in enumerate(serving)))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Known:
    """What both problems have in common: the groups, sorted, with 1 where each has a task, and the limits."""

    subsets: list[Subset]
    has_TS: NDArray[np.float64]
    most_groups: int
    costs_S: NDArray[np.float64]
    most_cost: float

    @classmethod
    def check(
        cls,
        groups: Iterable[Subset],
        tasks: int,
        most_groups: int,
        costs: Mapping[Subset, float] | None,
        most_cost: float,
    ) -> Self:
        if tasks < 1:
            raise ValueError(f"tasks: must be 1 or more, found {tasks}")
        if most_groups < 1:
            raise ValueError(f"most_groups: must be 1 or more, found {most_groups}")
        if not most_cost >= 0:
            raise ValueError(f"most_cost: must be 0 or more, found {most_cost}")
        subsets = sorted(groups)
        has_TS = np.zeros((tasks, len(subsets)))
        for s, subset in enumerate(subsets):
            rising = subset == tuple(sorted(set(subset)))
            if not subset or not rising or subset[0] < 0 or subset[-1] >= tasks:
                raise ValueError(f"groups: must hold rising indices from 0 to {tasks - 1}, found {subset}")
            has_TS[list(subset), s] = 1
        costs_S = np.array([0.0 if costs is None else costs.get(subset, inf) for subset in subsets])
        if not all(0 <= cost < inf for cost in costs_S):
            raise ValueError("costs: must be 0 or more for every group, found one that is not")
        return cls(
            subsets=subsets,
            has_TS=has_TS,
            most_groups=most_groups,
            costs_S=costs_S,
            most_cost=most_cost * (1 + TIE),
        )

    def solution(self, groups: tuple[Subset, ...], serving: Sequence[int], value: float) -> Solution:
        cost = fsum(self.costs_S[self.subsets.index(group)] for group in groups)
        return Solution(groups=groups, serving=tuple(serving), value=value, cost=cost)


def _scaled(values: Sequence[float]) -> NDArray[np.float64]:
    """Divide by the greatest size, so that ties and tolerances are on one scale."""
    scaled = np.array(values, dtype=np.float64)
    if not np.isfinite(scaled).all():
        raise ValueError("values: must be finite, found one that is not")
    return scaled / (np.abs(scaled).max(initial=0) or 1)


def _partition_prices(
    known: _Known, values_S: NDArray[np.float64], least_groups: int
) -> tuple[float, NDArray[np.float64]] | None:
    """Bound the value of every partition, and say how far each group falls short of its prices, 0 or more.

    The prices are those of the linear program, where fractions of groups may be chosen: the lowest bound that
    prices give. None where not even fractions of groups keep the limits.
    """
    ones_S = np.ones_like(values_S)
    limited_LS, limits_L = [ones_S, -ones_S], [float(known.most_groups), -float(least_groups)]
    if known.most_cost < inf:
        scale = max(known.most_cost, known.costs_S.max(initial=0)) or 1.0
        limited_LS.append(known.costs_S / scale)
        limits_L.append(known.most_cost / scale)
    program = linprog(
        -values_S,
        A_ub=np.stack(limited_LS),
        b_ub=limits_L,
        A_eq=known.has_TS,
        b_eq=np.ones(len(known.has_TS)),
        method="highs",
    )
    if program.status == INFEASIBLE:
        return None
    assert program.status == 0, program.message
    prices_T, prices_L = -program.eqlin.marginals, np.maximum(-program.ineqlin.marginals, 0)
    losses_S = prices_T @ known.has_TS + prices_L @ limited_LS - values_S
    # HiGHS' prices may miss some group by its tolerance; a higher price of every group makes them right.
    missing = max(0.0, -losses_S.min())
    return float(prices_T.sum() + prices_L @ limits_L + missing * known.most_groups), losses_S + missing


class _Partitions:
    """Searches partitions depth first, each once: the first task without a group takes one."""

    def __init__(
        self, known: _Known, values_S: NDArray[np.float64], bound: float, losses_S: NDArray[np.float64]
    ) -> None:
        self.known = known
        self.values: list[float] = values_S.tolist()
        self.bound = bound
        self.losses: list[float] = losses_S.tolist()
        self.costs: list[float] = known.costs_S.tolist()

    def best(self, numbers: range) -> tuple[Subset, ...] | None:
        """The best with such a number of groups."""
        # Groups that are in few others' way come first: tasks that few groups have, then by their loss.
        tasks = np.argsort(self.known.has_TS.sum(axis=1), kind="stable").tolist()
        ranked = np.argsort(self.losses, kind="stable").tolist()
        value, found = self._run(tasks, ranked, numbers, -inf, first=False)
        if found is None:
            return None
        for number in numbers:
            in_order = range(len(tasks)), range(len(ranked)), range(number, number + 1)
            _, first = self._run(*in_order, value - TIE, first=True)
            if first is not None:
                return tuple(self.known.subsets[s] for s in sorted(first))
        raise AssertionError("a partition as good as the best one is among those searched")

    def _run(
        self, tasks: Sequence[int], ranked: Sequence[int], numbers: range, best: float, *, first: bool
    ) -> tuple[float, list[int] | None]:
        """The best value above `best` and its groups: the first such partition, or the best one.

        Args:
            tasks: In the order in which they take a group.
            ranked: Groups in the order in which they are tried.
            numbers: Of groups.
            best: What is to be exceeded.
            first: Whether to stop at the first one.
        """
        bit_T = [1 << tasks.index(t) for t in range(len(tasks))]
        options_T: list[list[tuple[int, int]]] = [[] for _ in tasks]
        known: dict[int, tuple[int, int]] = {}
        for s in ranked:
            if self.bound - self.losses[s] > best:
                mask = sum(bit_T[t] for t in self.known.subsets[s])
                known[mask] = (mask, s)
                options_T[_lowest(mask)].append((mask, s))
        largest = max((mask.bit_count() for mask in known), default=0)
        losses, costs, most_cost = self.losses, self.costs, self.known.most_cost
        chosen: list[int] = []
        found: list[int] | None = None

        def extend(free: int, left: int, bound: float, cost: float) -> None:
            """Give groups to the tasks that are free, `left` ones at most."""
            nonlocal best, found
            last = [known[free]] if free in known else []
            for mask, s in last if left == 1 else options_T[_lowest(free)]:
                if bound - losses[s] <= best + ROUNDING or mask & ~free or cost + costs[s] > most_cost:
                    continue
                rest = free ^ mask
                chosen.append(s)
                if not rest:
                    value = fsum(self.values[s] for s in chosen)
                    if len(chosen) >= numbers.start and value > best:
                        best, found = value, chosen.copy()
                elif numbers.start - len(chosen) <= rest.bit_count() <= (left - 1) * largest:
                    extend(rest, left - 1, bound - losses[s], cost + costs[s])
                chosen.pop()
                if first and found is not None:
                    return

        extend((1 << len(tasks)) - 1, numbers.stop - 1, self.bound, 0.0)
        return best, found


def _lowest(mask: int) -> int:
    return (mask & -mask).bit_length() - 1


def _cover_prices(known: _Known, gains_ST: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """Bound the value of every cover but for its groups, and say what each group adds to that at the most.

    With prices u_T, and p for a unit of cost, a cover is worth no more than the sum of the prices, of p times
    the greatest cost, and for each of its groups of what its tasks gain above their prices, less p times its
    cost. The prices are found by the subgradient method, where any are bounds.
    """
    scale = max(known.most_cost, known.costs_S.max()) if known.most_cost < inf else inf
    costs_S, most_cost = (known.costs_S / scale, known.most_cost / scale) if 0 < scale < inf else (0, 0)
    costs_S = np.zeros(len(gains_ST)) + costs_S
    prices_T, price = gains_ST.max(axis=0), 0.0
    step = STEP
    lowest, stale = inf, 0
    for _ in range(PRICE_STEPS):
        above_ST = gains_ST - prices_T
        added_S = above_ST.clip(min=0).sum(axis=1) - price * costs_S
        top = np.argsort(-added_S, kind="stable")[: known.most_groups]
        top = top[added_S[top] > 0]
        fixed = prices_T.sum() + price * most_cost
        stale += 1
        if fixed + added_S[top].sum() < lowest:
            lowest, stale, best = fixed + added_S[top].sum(), 0, (float(fixed), added_S)
        if stale == PATIENCE:
            step, stale = step / 2, 0
        prices_T = prices_T - step * (1 - (above_ST[top] > 0).sum(axis=0))
        price = max(0.0, price - step * float(most_cost - costs_S[top].sum()))
    return best


class _Covers:
    """Searches sets of groups depth first."""

    def __init__(
        self, known: _Known, gains_ST: NDArray[np.float64], fixed: float, added_S: NDArray[np.float64]
    ) -> None:
        self.known = known
        self.gains_ST = gains_ST
        self.fixed = fixed
        self.added_S = added_S

    def best(self, numbers: range) -> tuple[Subset, ...] | None:
        """The best with such a number of groups."""
        ranked = np.argsort(-self.added_S, kind="stable")
        value, found = self._run(ranked, numbers.stop - 1, -inf, first=False)
        if found is None:
            return None
        for number in numbers:
            _, first = self._run(np.arange(len(ranked)), number, value - TIE, first=True)
            if first is not None:
                return tuple(self.known.subsets[s] for s in sorted(first))
        raise AssertionError("a cover as good as the best one is among those searched")

    def _run(
        self, ranked: NDArray[np.int64], most: int, best: float, *, first: bool
    ) -> tuple[float, list[int] | None]:
        """The best value above `best` and its groups, at most `most`: the first such, or the best ones."""
        added_S = self.added_S[ranked]
        positive = sorted(added_S.clip(min=0).tolist(), reverse=True)
        worth = self.fixed + added_S + sum(positive[: most - 1]) > best
        ranked, added_S = ranked[worth], added_S[worth]
        gains_ST, costs = self.gains_ST[ranked], self.known.costs_S[ranked].tolist()
        best_after_ST = np.maximum.accumulate(gains_ST[::-1])[::-1]
        added = added_S.tolist()
        # after[n][i]: what n groups from the i-th on add to the bound at the most
        after = [[0.0] * (len(added) + 1) for _ in range(most + 1)]
        for i in reversed(range(len(added))):
            for n in range(1, most + 1):
                after[n][i] = max(after[n][i + 1], added[i] + after[n - 1][i + 1])
        chosen: list[int] = []
        found: list[int] | None = None

        def extend(start: int, left: int, gained_T: NDArray[np.float64], bound: float, cost: float) -> None:
            nonlocal best, found
            for i in range(start, len(added)):
                if bound + after[left][i] <= best + ROUNDING:
                    return
                if (
                    bound + added[i] + after[left - 1][i + 1] <= best + ROUNDING
                    or cost + costs[i] > self.known.most_cost
                ):
                    continue
                now_T = np.maximum(gained_T, gains_ST[i])
                chosen.append(i)
                value = float(now_T.sum())
                if value > best:
                    best, found = value, [int(ranked[j]) for j in chosen]
                after_T = best_after_ST[i + 1] if i + 1 < len(added) else now_T
                if left > 1 and np.maximum(now_T, after_T).sum() > best + ROUNDING:
                    extend(i + 1, left - 1, now_T, bound + added[i], cost + costs[i])
                chosen.pop()
                if first and found is not None:
                    return

        extend(0, most, np.full(gains_ST.shape[1], -inf), self.fixed, 0.0)
        return best, found
