"""What is stopped early, against a slow and obvious selection from the whole rung."""

import math
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.models.tasks import Direction
from coterie.search.scheduler import Scheduler, make_scheduler
from coterie.search.spec import SchedulerSpec

UP, DOWN = Direction.MAXIMIZE, Direction.MINIMIZE
GAIN_AND_MACS = (("delta_m", UP), ("macs", DOWN))
Objectives = Sequence[tuple[str, Direction]]
Point = tuple[float, ...]
Rung = tuple[Objectives, dict[int, Point]]
RUNG, EPOCHS = 1, 2

# Few values, so that ties and duplicates abound.
TIED = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0])
NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf])


def scheduler(objectives: Objectives = GAIN_AND_MACS, epochs: int = EPOCHS, **fields: Any) -> Scheduler:
    return make_scheduler(SchedulerSpec(**({"name": "pareto_asha"} | fields)), objectives, epochs)


def named(objectives: Objectives, point: Point) -> dict[str, float | None]:
    return {metric: value for (metric, _), value in zip(objectives, point, strict=True)}


def kept(stops: Scheduler, objectives: Objectives, points: Mapping[int, Point]) -> set[int]:
    """The trials that go on where all are at the rung before the first is judged."""
    for number, point in points.items():
        stops.recall(number, RUNG, named(objectives, point))
    return {
        number
        for number, point in points.items()
        if stops.report(number, RUNG, named(objectives, point)) is None
    }


def places(trials: int, eta: int) -> int:
    return trials if trials < eta else math.ceil(trials / eta)


def naive_selection(points: Mapping[int, Point], objectives: Objectives, eta: int) -> set[int]:
    """Peel fronts off; fill up from the last one by always taking the trial farthest from those taken."""
    signs = [-1.0 if direction is UP else 1.0 for _, direction in objectives]
    losses = {
        number: tuple(sign * value for sign, value in zip(signs, point, strict=True))
        for number, point in points.items()
        if all(map(math.isfinite, point))
    }
    extents = [max(column) - min(column) or 1.0 for column in zip(*losses.values(), strict=True)]

    def distance(one: int, other: int) -> float:
        pairs = zip(losses[one], losses[other], extents, strict=True)
        return sum((a / extent - b / extent) ** 2 for a, b, extent in pairs)

    size = places(len(points), eta)
    selected: list[int] = []
    left = sorted(losses, key=lambda number: (losses[number], number))
    while left and len(selected) < size:
        front = [
            number
            for number in left
            if not any(
                losses[other] != losses[number]
                and all(a <= b for a, b in zip(losses[other], losses[number], strict=True))
                for other in left
            )
        ]
        left = [number for number in left if number not in front]
        taken: list[int] = []
        while front and len(selected) + len(taken) < size:
            taken.append(
                max(front, key=lambda number: min((distance(number, other) for other in taken), default=0.0))
            )
            front.remove(taken[-1])
        selected += taken
    broken = sorted(points.keys() - losses.keys())
    return {*selected, *broken[: size - len(selected)]}


@st.composite
def rungs(draw: st.DrawFn, coordinates: st.SearchStrategy[float] = TIED) -> Rung:
    """Objectives, and trials by number in any order, from 1 to 25 of them."""
    directions = draw(st.lists(st.sampled_from([UP, DOWN]), min_size=1, max_size=5))
    objectives = [(f"metric_{index}", direction) for index, direction in enumerate(directions)]
    point = st.tuples(*[coordinates] * len(directions))
    points = draw(st.lists(point, min_size=draw(st.sampled_from([1, 15])), max_size=25))
    numbers = draw(st.permutations(range(len(points))))
    return objectives, dict(zip(numbers, points, strict=True))


etas = st.integers(2, 10)


@given(rungs(TIED | NOT_FINITE), etas)
def test_the_naive_selection_goes_on(rung: Rung, eta: int) -> None:
    objectives, points = rung
    assert kept(scheduler(objectives, eta=eta), objectives, points) == naive_selection(
        points, objectives, eta
    )


@given(rungs(st.floats(-1e6, 1e6) | TIED | NOT_FINITE), etas)
def test_as_many_go_on_as_there_are_places(rung: Rung, eta: int) -> None:
    objectives, points = rung
    assert len(kept(scheduler(objectives, eta=eta), objectives, points)) == places(len(points), eta)


@given(rungs(st.floats(-1e6, 1e6) | TIED | NOT_FINITE), etas, st.randoms())
def test_the_order_in_which_trials_came_does_not_matter(rung: Rung, eta: int, random: Random) -> None:
    objectives, points = rung
    order = list(points)
    random.shuffle(order)
    shuffled = {number: points[number] for number in order}
    one, other = (scheduler(objectives, eta=eta) for _ in range(2))
    assert kept(one, objectives, points) == kept(other, objectives, shuffled)


@given(rungs(st.floats(-1e6, 1e6)), etas)
def test_a_trial_that_dominates_all_others_is_never_stopped(rung: Rung, eta: int) -> None:
    objectives, points = rung
    best = tuple(1e7 if direction is UP else -1e7 for _, direction in objectives)
    stops = scheduler(objectives, eta=eta)
    for number, point in points.items():
        stops.report(number, RUNG, named(objectives, point))
        assert stops.report(1000, RUNG, named(objectives, best)) is None


@given(rungs(TIED | NOT_FINITE), etas, st.lists(st.integers(-20, 20), min_size=5, max_size=5))
def test_the_units_of_the_objectives_do_not_matter(rung: Rung, eta: int, powers: list[int]) -> None:
    objectives, points = rung
    scaled = {
        number: tuple(math.ldexp(value, power) for value, power in zip(point, powers, strict=False))
        for number, point in points.items()
    }
    one, other = (scheduler(objectives, eta=eta) for _ in range(2))
    assert kept(one, objectives, points) == kept(other, objectives, scaled)


@given(st.lists(TIED | NOT_FINITE, min_size=1, max_size=25), st.sampled_from([UP, DOWN]), etas)
def test_with_one_objective_both_methods_decide_the_same(
    values: list[float], direction: Direction, eta: int
) -> None:
    objectives = [("delta_m", direction)]
    on_one, on_all = (scheduler(objectives, eta=eta, name=name) for name in ("asha", "pareto_asha"))
    for number, value in enumerate(values):
        assert on_one.report(number, RUNG, {"delta_m": value}) == on_all.report(
            number, RUNG, {"delta_m": value}
        )


@given(rungs(TIED | NOT_FINITE), etas, st.integers(0, 24))
def test_one_rebuilt_from_what_was_recorded_decides_the_same(rung: Rung, eta: int, killed_after: int) -> None:
    objectives, points = rung
    first = scheduler(objectives, eta=eta)
    decided = [first.report(number, RUNG, named(objectives, point)) for number, point in points.items()]
    second = scheduler(objectives, eta=eta)
    for index, (number, point) in enumerate(points.items()):
        if index < killed_after:
            second.recall(number, RUNG, named(objectives, point))
        else:
            assert second.report(number, RUNG, named(objectives, point)) == decided[index]


def test_fewer_trials_than_eta_all_go_on() -> None:
    stops = scheduler(eta=4)
    gains = [5.0, 4.0, 3.0]
    assert kept(stops, GAIN_AND_MACS, {n: (gain, 10 - gain) for n, gain in enumerate(gains)}) == {0, 1, 2}
    assert stops.report(3, RUNG, {"delta_m": 2.0, "macs": 9.0}) is not None


def test_equal_trials_are_told_apart_by_their_number_alone() -> None:
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        points = dict.fromkeys(order, (1.0, 5.0))
        assert kept(scheduler(), GAIN_AND_MACS, points) == {0}


def test_within_a_front_the_ends_go_on_before_the_middle() -> None:
    front = {0: (5.0, 50.0), 1: (4.0, 40.0), 2: (3.0, 30.0), 3: (2.0, 20.0), 4: (1.0, 10.0)}
    assert kept(scheduler(eta=5), GAIN_AND_MACS, front) == {0}  # the best by the first objective
    assert kept(scheduler(eta=3), GAIN_AND_MACS, front) == {0, 4}
    assert kept(scheduler(eta=2), GAIN_AND_MACS, front) == {0, 2, 4}


def test_distances_are_shares_of_the_rungs_range() -> None:
    front = {0: (5.0, 90.0), 1: (4.9, 65.0), 2: (2.0, 20.0), 3: (1.0, 10.0), 4: (0.9, 0.0)}
    assert kept(scheduler(eta=2), GAIN_AND_MACS, front) == {0, 2, 4}
    # Beside a trial that lost far more, the front's differ by their macs alone.
    assert kept(scheduler(eta=2), GAIN_AND_MACS, {**front, 5: (-400.0, 90.0)}) == {0, 1, 4}


@pytest.mark.parametrize(
    ("fields", "epochs", "expected"),
    [
        ({}, 20, (1, 3, 9)),
        ({"eta": 2, "grace_epochs": 2}, 20, (2, 4, 8, 16)),
        ({}, 9, (1, 3)),  # the last epoch is the end, and no rung
        ({"grace_epochs": 20}, 20, ()),
        ({}, 1, ()),
        ({"name": "none"}, 20, ()),
    ],
)
def test_rungs_lie_before_the_end(fields: dict[str, Any], epochs: int, expected: tuple[int, ...]) -> None:
    assert scheduler(epochs=epochs, **fields).rungs == expected


@given(st.sampled_from(["none", "asha", "pareto_asha"]), rungs())
def test_between_rungs_nothing_stops_and_nothing_is_recorded(name: str, rung: Rung) -> None:
    objectives, points = rung
    stops = scheduler(objectives, epochs=5, name=name)
    for number, point in points.items():
        assert stops.report(number, 2, named(objectives, point)) is None
    assert stops.report(1000, RUNG, dict.fromkeys(dict(objectives), math.nan)) is None  # alone at its rung


def test_rungs_know_nothing_of_each_other() -> None:
    stops = scheduler(epochs=4)
    for number in range(5):
        stops.recall(number, 1, {"delta_m": 9.0, "macs": 1.0})
    assert stops.report(6, 1, {"delta_m": 8.0, "macs": 2.0}) is not None
    assert stops.report(6, 3, {"delta_m": 8.0, "macs": 2.0}) is None


def test_a_report_that_comes_again_replaces_the_first() -> None:
    stops = scheduler([("delta_m", UP)], eta=2)
    stops.recall(0, RUNG, {"delta_m": 5.0})
    assert stops.report(1, RUNG, {"delta_m": 4.0}) is not None
    assert stops.report(1, RUNG, {"delta_m": 6.0}) is None
    reason = stops.report(0, RUNG, {"delta_m": 5.0})
    assert reason is not None
    assert "of 2 trials" in reason


@pytest.mark.parametrize(
    ("objectives", "fields", "words"),
    [
        (GAIN_AND_MACS, {}, "best third of 9 trials by delta_m and macs"),
        (GAIN_AND_MACS, {"eta": 2}, "best half of 9 trials by delta_m and macs"),
        (
            (*GAIN_AND_MACS, ("params", DOWN)),
            {"eta": 8},
            "best eighth of 9 trials by delta_m, macs and params",
        ),
        (GAIN_AND_MACS, {"name": "asha"}, "best third of 9 trials by delta_m"),
        (GAIN_AND_MACS, {"name": "asha", "metric": "macs"}, "best third of 9 trials by macs"),
        ((("delta_m", UP), ("latency_ms", DOWN)), {}, "by delta_m and macs (for latency_ms)"),
    ],
)
def test_the_reason_says_where_among_how_many_and_by_what(
    objectives: Objectives, fields: dict[str, Any], words: str
) -> None:
    stops = scheduler(objectives, epochs=20, grace_epochs=3, **fields)
    for number in range(8):
        stops.recall(number, 3, {"delta_m": 5.0, "macs": 5.0, "params": 5.0})
    reason = stops.report(8, 3, {"delta_m": 4.0, "macs": 6.0, "params": 6.0})
    assert reason is not None
    assert reason.startswith("stopped at epoch 3: not among the ")
    assert reason.endswith(words)


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, -math.inf])
def test_a_trial_without_a_finite_value_comes_after_all_others(missing: float | None) -> None:
    stops = scheduler(eta=2)
    stops.recall(0, RUNG, {"delta_m": -90.0, "macs": 9.0})
    assert stops.report(1, RUNG, {"delta_m": missing, "macs": 1.0}) is not None
    assert stops.report(2, RUNG, {"macs": 1.0}) is not None
    assert stops.report(0, RUNG, {"delta_m": -90.0, "macs": 9.0}) is None


def test_what_only_a_finished_network_has_is_judged_by_macs_and_training_time_is_not() -> None:
    costs = [("latency_ms", DOWN), ("peak_memory_mb", DOWN), ("train_device_seconds", DOWN)]
    stops = scheduler([("delta_m", UP), *costs], eta=2)
    assert stops.report(0, RUNG, {"delta_m": 1.0, "macs": 2.0, "train_device_seconds": 9.0}) is None
    worse = {"delta_m": 1.0, "macs": 3.0, "train_device_seconds": 0.0, "latency_ms": 0.0}
    assert stops.report(1, RUNG, worse) is not None
    better = {"delta_m": 1.0, "macs": 1.0, "train_device_seconds": 99.0, "latency_ms": 9.0}
    assert stops.report(2, RUNG, better) is None
    assert scheduler([("train_device_seconds", DOWN)]).rungs == ()


def test_a_cost_that_macs_stands_in_for_does_not_count_twice() -> None:
    three = [*GAIN_AND_MACS, ("latency_ms", DOWN)]
    points = {0: (5.0, 50.0), 1: (4.0, 41.0), 2: (3.0, 30.0), 3: (2.0, 22.0), 4: (1.0, 10.0)}
    with_latency = scheduler(three, eta=2)
    for number, (gain, macs) in points.items():
        with_latency.recall(number, RUNG, {"delta_m": gain, "macs": macs})
    go_on = {
        number
        for number, (gain, macs) in points.items()
        if with_latency.report(number, RUNG, {"delta_m": gain, "macs": macs}) is None
    }
    assert go_on == kept(scheduler(eta=2), GAIN_AND_MACS, points)


@pytest.mark.parametrize(
    ("metric", "better", "worse"),
    [
        ("total_error", 1.0, 2.0),
        ("normalized_gain", 2.0, 1.0),
        ("task.left.error", 1.0, 2.0),
        ("task.left.accuracy", 2.0, 1.0),
        ("task.normals.within_11.25", 2.0, 1.0),
        ("task.depth.v2.abs_error", 1.0, 2.0),
    ],
)
def test_asha_may_judge_by_a_metric_that_is_no_objective(metric: str, better: float, worse: float) -> None:
    stops = scheduler(name="asha", metric=metric, eta=2)
    stops.recall(0, RUNG, {metric: better})
    assert stops.report(1, RUNG, {metric: worse}) is not None
    assert stops.report(0, RUNG, {metric: better}) is None
