from itertools import combinations
from math import fsum, inf
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.models.affinity import partitions
from coterie.search.affinity import all_subsets
from coterie.search.partition import TIE, Solution, best_cover, best_partition
from coterie.search.work import Subset

Problem = tuple[dict[Subset, list[float]], int, int, int, dict[Subset, float] | None, float]


@st.composite
def problems(draw: st.DrawFn, most_tasks: int) -> Problem:
    """Each task's gains in some subsets, tasks, least and most groups, costs and the greatest cost."""
    tasks = draw(st.integers(1, most_tasks))
    rng = Random(draw(st.integers(0, 2**32)))
    share = draw(st.sampled_from([0.3, 0.7, 1.0]))
    subsets = [subset for subset in all_subsets(tasks) if rng.random() < share]
    ties = draw(st.booleans())
    gains = {s: [float(rng.randint(-2, 2)) if ties else rng.gauss(0, 1) for _ in s] for s in subsets}
    most = draw(st.integers(1, tasks))
    costs = {s: float(rng.randint(0, 3)) for s in subsets} if draw(st.booleans()) else None
    return gains, tasks, draw(st.integers(1, most)), most, costs, rng.randint(0, 8) if costs else inf


def summed(gains: dict[Subset, list[float]]) -> dict[Subset, float]:
    return {subset: fsum(found) for subset, found in gains.items()}


def best_of(
    worth: dict[tuple[Subset, ...], float], costs: dict[Subset, float] | None, most_cost: float, size: float
) -> tuple[Subset, ...] | None:
    """By looking at all: of the equally good ones the one with the fewest groups, then the smallest."""
    kept = {
        groups: value
        for groups, value in worth.items()
        if costs is None or fsum(costs[group] for group in groups) <= most_cost
    }
    if not kept:
        return None
    good = max(kept.values()) - TIE * size
    return min((groups for groups in kept if kept[groups] >= good), key=lambda groups: (len(groups), groups))


def largest(numbers: list[float]) -> float:
    return max((abs(number) for number in numbers), default=0.0)


def check(found: Solution | None, expected: tuple[Subset, ...] | None, value: float | None) -> None:
    assert (found and found.groups) == expected
    if found is not None:
        assert found.value == pytest.approx(value)
        assert all(t in found.groups[k] for t, k in enumerate(found.serving))
        assert set(found.serving) == set(range(len(found.groups)))


@settings(max_examples=300)
@given(problems(most_tasks=8))
def test_the_best_partition_is_that_of_enumeration(problem: Problem) -> None:
    gains, tasks, least, most, costs, most_cost = problem
    values = summed(gains)
    worth = {
        grouping.groups: fsum(values[group] for group in grouping.groups)
        for groups in range(least, most + 1)
        for grouping in partitions(tasks, groups)
        if all(group in values for group in grouping.groups)
    }
    expected = best_of(worth, costs, most_cost, largest(list(values.values())))
    found = best_partition(
        values, tasks, most_groups=most, least_groups=least, costs=costs, most_cost=most_cost
    )
    check(found, expected, None if expected is None else worth[expected])


@settings(max_examples=300)
@given(problems(most_tasks=4))
def test_the_best_cover_is_that_of_enumeration(problem: Problem) -> None:
    gains, tasks, _, most, costs, most_cost = problem
    worth = {
        groups: fsum(max(gains[g][g.index(t)] for g in groups if t in g) for t in range(tasks))
        for number in range(1, most + 1)
        for groups in combinations(sorted(gains), number)
        if len({t for group in groups for t in group}) == tasks
    }
    expected = best_of(worth, costs, most_cost, largest([gain for found in gains.values() for gain in found]))
    found = best_cover(gains, tasks, most_groups=most, costs=costs, most_cost=most_cost)
    check(found, expected, None if expected is None else worth[expected])


def test_groups_may_overlap_where_that_is_better() -> None:
    gains = {(0, 1): [1.0, -1.0], (1, 2): [0.5, 0.0], (0, 1, 2): [-1.0, -1.0, 1.0], (0,): [0.0], (2,): [0.0]}
    cover = best_cover(gains, 3, most_groups=3)
    assert cover is not None
    assert cover.groups == ((0, 1), (0, 1, 2), (1, 2))
    assert cover.serving == (0, 2, 1)
    assert cover.value == 2.5


def test_fewer_groups_are_preferred_among_equals() -> None:
    solution = best_partition(dict.fromkeys(all_subsets(4), 0.0), 4, most_groups=4)
    assert solution is not None
    assert solution.groups == ((0, 1, 2, 3),)


def test_the_order_and_the_scale_of_the_table_play_no_part() -> None:
    values = {subset: float((7 * n) % 11) for n, subset in enumerate(all_subsets(5))}
    expected = best_partition(values, 5, most_groups=3)
    assert expected is not None
    for scale in (1e-9, 1e9):
        scaled = {subset: scale * values[subset] for subset in reversed(values)}
        found = best_partition(scaled, 5, most_groups=3)
        assert found is not None
        assert found.groups == expected.groups


def test_a_sum_of_costs_at_the_limit_is_kept() -> None:
    values = {(0,): 1.0, (1,): 1.0, (0, 1): 0.0}
    costs = {(0,): 0.1, (1,): 0.2, (0, 1): 0.0}
    solution = best_partition(values, 2, most_groups=2, costs=costs, most_cost=0.3)
    assert solution is not None
    assert solution.groups == ((0,), (1,))
    assert solution.cost == pytest.approx(0.3)


def test_a_task_that_no_group_has_leaves_no_solution() -> None:
    assert best_partition({(0,): 1.0}, 2, most_groups=2) is None
    assert best_cover({(0,): [1.0]}, 2, most_groups=2) is None
    assert best_partition({}, 2, most_groups=2) is None


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"values": {(1, 0): 0.0}}, "groups"),
        ({"values": {(0, 2): 0.0}}, "groups"),
        ({"values": {(): 0.0}}, "groups"),
        ({"values": {(0, 1): inf}}, "values"),
        ({"tasks": 0}, "tasks"),
        ({"most_groups": 0}, "most_groups"),
        ({"least_groups": 3}, "least_groups"),
        ({"costs": {(0, 1): -1.0}}, "costs"),
        ({"costs": {}}, "costs"),
        ({"most_cost": -1.0}, "most_cost"),
    ],
)
def test_wrong_use_is_refused(changed: dict[str, object], fault: str) -> None:
    right: dict[str, object] = {"values": {(0, 1): 0.0}, "tasks": 2, "most_groups": 2}
    with pytest.raises(ValueError, match=fault):
        best_partition(**(right | changed))  # type: ignore[arg-type]


def test_gains_are_one_for_each_task() -> None:
    with pytest.raises(ValueError, match="gains"):
        best_cover({(0, 1): [1.0]}, 2, most_groups=1)
