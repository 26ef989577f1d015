"""The front against the slow and obvious filter, its hypervolume against a sum over the cells of a grid."""

import math
from collections.abc import Sequence

import moocore
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.models.tasks import Direction
from coterie.search.front import Front, feasible, non_dominated
from coterie.search.spec import ConstraintSpec

UP, DOWN = Direction.MAXIMIZE, Direction.MINIMIZE
Objectives = list[tuple[str, Direction]]
Point = tuple[float, ...]

# Few values, so that ties and duplicates abound.
COORDINATES = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0])


@st.composite
def problems(
    draw: st.DrawFn, coordinates: st.SearchStrategy[float] = COORDINATES, most: int = 25
) -> tuple[Objectives, list[Point], Point]:
    """Objectives, points in the order of their insertion, and a reference point."""
    directions = draw(st.lists(st.sampled_from([UP, DOWN]), min_size=1, max_size=5))
    objectives = [(f"metric_{index}", direction) for index, direction in enumerate(directions)]
    point = st.tuples(*[coordinates] * len(directions))
    return objectives, draw(st.lists(point, max_size=most)), draw(point)


def named(objectives: Objectives, point: Point) -> dict[str, float]:
    return {metric: value for (metric, _), value in zip(objectives, point, strict=True)}


def at_least_as_good(one: Point, other: Point, objectives: Objectives) -> bool:
    return all(
        mine >= theirs if direction is UP else mine <= theirs
        for mine, theirs, (_, direction) in zip(one, other, objectives, strict=True)
    )


def naive_front(points: Sequence[Point], objectives: Objectives) -> set[int]:
    """Indices of the points that no other one dominates; equal points don't dominate each other."""
    return {
        index
        for index, point in enumerate(points)
        if not any(at_least_as_good(other, point, objectives) and other != point for other in points)
    }


@given(problems())
def test_insertion_keeps_what_the_naive_filter_keeps(problem: tuple[Objectives, list[Point], Point]) -> None:
    objectives, points, _ = problem
    front = Front(objectives)
    on_front: set[str] = set()
    for index, point in enumerate(points):
        expected = {str(i) for i in naive_front(points[: index + 1], objectives)}
        update = front.insert(str(index), named(objectives, point))
        assert update.on_front == (str(index) in expected)
        assert set(update.displaced) == on_front - expected
        assert update.size == len(expected)
        assert update.hypervolume is None
        on_front = expected
        assert front.points == {i: named(objectives, points[int(i)]) for i in expected}


def naive_hypervolume(points: Sequence[Point], objectives: Objectives, reference: Point) -> float:
    """The volume of the cells between all coordinates of which some point dominates the far corner."""
    signs = [-1.0 if direction is UP else 1.0 for _, direction in objectives]
    losses_ND = np.array(points).reshape(-1, len(signs)) * signs
    edges = [
        np.unique([worst * sign, *column[column < worst * sign]])
        for column, sign, worst in zip(losses_ND.T, signs, reference, strict=True)
    ]
    near_CD = np.stack(np.meshgrid(*[edge[:-1] for edge in edges], indexing="ij"), -1).reshape(-1, len(signs))
    sides_CD = np.stack(np.meshgrid(*map(np.diff, edges), indexing="ij"), -1).reshape(-1, len(signs))
    dominated_C = np.zeros(len(near_CD), dtype=bool)
    for losses_D in losses_ND:
        dominated_C |= (losses_D <= near_CD).all(axis=1)
    return math.fsum(sides_CD[dominated_C].prod(axis=1))


@given(problems() | problems(st.floats(-100, 100), most=7))
def test_the_hypervolume_is_the_naive_one_after_each_insertion_and_never_falls(
    problem: tuple[Objectives, list[Point], Point],
) -> None:
    objectives, points, reference = problem
    front = Front(objectives, named(objectives, reference))
    assert front.hypervolume == 0
    before = 0.0
    for index, point in enumerate(points):
        update = front.insert(str(index), named(objectives, point))
        expected = naive_hypervolume(points[: index + 1], objectives, reference)
        assert update.hypervolume == front.hypervolume == pytest.approx(expected, rel=1e-9, abs=0)
        assert update.hypervolume >= before
        before = update.hypervolume


@given(problems() | problems(st.floats(-100, 100), most=7))
def test_the_front_of_all_at_once_is_the_one_that_insertion_makes(
    problem: tuple[Objectives, list[Point], Point],
) -> None:
    objectives, points, reference = problem
    front = Front(objectives, named(objectives, reference))
    for index, point in enumerate(points):
        front.insert(str(index), named(objectives, point))
    values_ND = np.array(points, dtype=np.float64).reshape(-1, len(objectives))
    directions = [direction for _, direction in objectives]
    found, volume = non_dominated(values_ND, directions, reference)
    assert {str(index) for index in found} == set(front.points)
    assert volume == pytest.approx(front.hypervolume, rel=1e-9, abs=0)
    assert non_dominated(values_ND, directions)[1] is None


@pytest.mark.parametrize("objectives", [2, 3, 4])
@pytest.mark.parametrize("step", [0.0, 0.01])
def test_a_long_search_leaves_no_rounding_errors_in_the_hypervolume(objectives: int, step: float) -> None:
    """Points ever closer to a sphere, some of them beyond the reference point; `step` makes ties."""
    random = np.random.default_rng(0)
    names = [f"metric_{index}" for index in range(objectives)]
    front = Front([(name, DOWN) for name in names], dict.fromkeys(names, 0.95))
    directions_ND = np.abs(random.normal(size=(2000, objectives)))
    directions_ND /= np.linalg.norm(directions_ND, axis=1, keepdims=True)
    points_ND = 1 - np.linspace(0.8, 1.0, 2000)[:, None] * directions_ND
    if step:
        points_ND = np.round(points_ND / step) * step
    for index, point in enumerate(points_ND):
        update = front.insert(str(index), dict(zip(names, map(float, point), strict=True)))
    expected = moocore.hypervolume(points_ND, ref=[0.95] * objectives)
    assert update.hypervolume == pytest.approx(expected, rel=1e-12)


@given(problems(), st.randoms())
def test_the_order_of_insertion_does_not_matter(
    problem: tuple[Objectives, list[Point], Point], random: object
) -> None:
    objectives, points, reference = problem
    order = list(range(len(points)))
    random.shuffle(order)  # type: ignore[attr-defined]
    fronts = [Front(objectives, named(objectives, reference)) for _ in range(2)]
    for front, indices in zip(fronts, (range(len(points)), order), strict=True):
        for index in indices:
            front.insert(str(index), named(objectives, points[index]))
    assert fronts[0].points == fronts[1].points
    assert fronts[0].hypervolume == pytest.approx(fronts[1].hypervolume)


def test_the_area_of_a_small_front_is_what_one_counts_by_hand() -> None:
    front = Front([("gain", UP), ("macs", DOWN)], {"gain": 0.0, "macs": 10.0})
    assert front.insert("a", {"gain": 4.0, "macs": 8.0}).hypervolume == 8  # 4 × 2
    assert front.insert("b", {"gain": 1.0, "macs": 2.0}).hypervolume == 14  # and 1 × 6 below it
    update = front.insert("c", {"gain": 4.0, "macs": 1.0})  # better than both
    assert (update.hypervolume, update.displaced, update.size) == (36, ("a", "b"), 1)


def test_equal_points_stand_side_by_side_and_fall_together() -> None:
    front = Front([("gain", UP), ("macs", DOWN)])
    for name in ("a", "b"):
        assert front.insert(name, {"gain": 1.0, "macs": 2.0}).on_front
    assert front.insert("c", {"gain": 1.0, "macs": 1.0}).displaced == ("a", "b")


def test_points_beyond_the_reference_are_on_the_front_and_add_no_volume() -> None:
    front = Front([("gain", UP), ("macs", DOWN)], {"gain": 0.0, "macs": 10.0})
    beyond = front.insert("a", {"gain": -1.0, "macs": 1.0})
    assert (beyond.on_front, beyond.hypervolume) == (True, 0)
    far_beyond = front.insert("b", {"gain": 50.0, "macs": 11.0})
    assert (far_beyond.on_front, far_beyond.hypervolume, far_beyond.size) == (True, 0, 2)
    assert front.insert("c", {"gain": 2.0, "macs": 5.0}).hypervolume == 10


def test_metrics_that_are_no_objectives_do_not_matter() -> None:
    front = Front([("gain", UP), ("macs", DOWN)])
    front.insert("a", {"gain": 1.0, "macs": 2.0, "params": None, "latency_ms": math.nan})
    assert front.points == {"a": {"gain": 1.0, "macs": 2.0}}


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("metric", ["gain", "macs"])
def test_an_objective_without_a_finite_value_is_refused_and_changes_nothing(
    metric: str, value: float | None
) -> None:
    front = Front([("gain", UP), ("macs", DOWN)], {"gain": 0.0, "macs": 10.0})
    front.insert("a", {"gain": 1.0, "macs": 2.0})
    with pytest.raises(ValueError, match=metric):
        front.insert("b", {"gain": 5.0, "macs": 1.0} | {metric: value})
    with pytest.raises(ValueError, match=metric):
        front.insert("b", {name: 1.0 for name in ("gain", "macs") if name != metric})
    assert front.points == {"a": {"gain": 1.0, "macs": 2.0}}
    assert front.hypervolume == 8


def test_leaving_a_trial_out_moves_nothing() -> None:
    front = Front([("gain", UP), ("macs", DOWN)], {"gain": 0.0, "macs": 10.0})
    assert front.leave_out().hypervolume == 0
    front.insert("a", {"gain": 1.0, "macs": 2.0})
    update = front.leave_out()
    assert (update.on_front, update.displaced, update.hypervolume, update.size) == (False, (), 8, 1)


@pytest.mark.parametrize(
    ("bounds", "value", "kept"),
    [
        ({"max": 5}, 5.0, True),
        ({"max": 5}, 5.1, False),
        ({"min": 5}, 5.0, True),
        ({"min": 5}, 4.9, False),
        ({"min": 1, "max": 5}, 3.0, True),
        ({"min": 1, "max": 5}, 0.0, False),
        ({"max": 5}, None, False),
        ({"min": 0}, None, False),
    ],
)
def test_a_candidate_is_feasible_within_its_bounds(
    bounds: dict[str, float], value: float | None, kept: bool
) -> None:
    constraint = ConstraintSpec(metric="macs", **bounds)
    assert feasible({"macs": value, "params": 1.0}, [constraint]) is kept


def test_every_constraint_counts_and_a_missing_metric_keeps_none() -> None:
    constraints = [ConstraintSpec(metric="macs", max=5), ConstraintSpec(metric="params", max=5)]
    assert feasible({"macs": 1.0, "params": 1.0}, constraints)
    assert not feasible({"macs": 1.0, "params": 9.0}, constraints)
    assert not feasible({"macs": 1.0}, constraints)
    assert feasible({}, [])


def test_a_value_that_is_no_number_keeps_no_bound() -> None:
    assert not feasible({"macs": math.nan}, [ConstraintSpec(metric="macs", max=5)])
