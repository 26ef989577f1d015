import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.models.metrics import YARDSTICK_FLOOR, delta_m, normalized_gain, task_errors, total_error
from coterie.models.tasks import Direction, Task, TaskKind, TaskSet

NAMES = ("a", "b", "c")
ERROR_TASKS = TaskSet(Task(name=name, kind=TaskKind.BINARY) for name in NAMES)
MIXED_TASKS = TaskSet(
    Task(name=name, kind=TaskKind.BINARY, metric=metric, direction=direction)
    for name, metric, direction in zip(
        NAMES,
        ("error", "accuracy", "error"),
        (Direction.MINIMIZE, Direction.MAXIMIZE, Direction.MINIMIZE),
        strict=True,
    )
)
rates = st.fixed_dictionaries({name: st.floats(0, 1) for name in NAMES})
yardsticks = st.fixed_dictionaries({name: st.floats(2 * YARDSTICK_FLOOR, 1) for name in NAMES})


def test_an_error_is_the_share_of_wrong_signs() -> None:
    outputs = {
        "a": torch.tensor([1.0, -1.0, 2.0, -2.0]),
        "b": torch.tensor([1.0, 1.0, 1.0, 1.0]),
        "c": torch.tensor([-0.1, 0.1, -0.1, 0.1]),
    }
    targets = {name: torch.tensor([1, 0, 1, 1]) for name in NAMES}
    assert task_errors(outputs, targets, ERROR_TASKS) == {"a": 0.25, "b": 0.25, "c": 0.75}


def test_a_network_that_answers_nan_is_always_wrong() -> None:
    outputs = {name: torch.full((4,), torch.nan) for name in NAMES}
    targets = {name: torch.tensor([True, False, True, False]) for name in NAMES}
    assert task_errors(outputs, targets, ERROR_TASKS) == dict.fromkeys(NAMES, 1.0)


@given(st.lists(st.tuples(st.floats(-5, 5), st.booleans()), min_size=1, max_size=9))
def test_an_error_is_in_0_to_1_and_its_flipped_targets_give_the_rest(
    samples: list[tuple[float, bool]],
) -> None:
    tasks = TaskSet([ERROR_TASKS[0]])
    logits, answers = torch.tensor([s for s, _ in samples]), torch.tensor([a for _, a in samples])
    error = task_errors({"a": logits}, {"a": answers}, tasks)["a"]
    flipped = task_errors({"a": logits}, {"a": ~answers}, tasks)["a"]
    assert 0 <= error <= 1
    assert error + flipped == pytest.approx(1)


def test_delta_m_by_hand() -> None:
    values = {"a": 0.05, "b": 0.99, "c": 0.20}
    yardstick = {"a": 0.10, "b": 0.90, "c": 0.10}
    # a halves its error: +50 %; b's accuracy rises by a tenth: +10 %; c doubles its error: -100 %
    assert delta_m(values, yardstick, MIXED_TASKS) == pytest.approx((50 + 10 - 100) / 3)


def test_normalized_gain_by_hand_and_total_error() -> None:
    errors, yardstick = {"a": 0.05, "b": 0.12, "c": 0.2}, {"a": 0.1, "b": 0.1, "c": 0.1}
    assert normalized_gain(errors, yardstick, ERROR_TASKS) == pytest.approx((50 - 20 - 100) / 3)
    assert total_error(errors, ERROR_TASKS) == pytest.approx(37)


@given(rates)
def test_equal_to_the_yardstick_is_worth_nothing(values: dict[str, float]) -> None:
    assert delta_m(values, values, MIXED_TASKS) == 0
    assert normalized_gain(values, values, ERROR_TASKS) == 0


@given(rates, yardsticks)
def test_delta_m_of_errors_is_the_normalized_gain(
    values: dict[str, float], yardstick: dict[str, float]
) -> None:
    gain = normalized_gain(values, yardstick, ERROR_TASKS)
    assert delta_m(values, yardstick, ERROR_TASKS) == pytest.approx(gain)


@given(rates, yardsticks, st.sampled_from(NAMES), st.floats(0.01, 1))
def test_delta_m_moves_the_way_that_is_better_for_a_task(
    values: dict[str, float], yardstick: dict[str, float], name: str, rise: float
) -> None:
    risen = values | {name: values[name] + rise}
    improved = delta_m(risen, yardstick, MIXED_TASKS) > delta_m(values, yardstick, MIXED_TASKS)
    assert improved == (name == "b")


@given(rates, yardsticks, st.floats(2, 100))
def test_delta_m_does_not_depend_on_a_metrics_unit(
    values: dict[str, float], yardstick: dict[str, float], factor: float
) -> None:
    scaled = delta_m(
        values | {"a": factor * values["a"]}, yardstick | {"a": factor * yardstick["a"]}, MIXED_TASKS
    )
    assert scaled == pytest.approx(delta_m(values, yardstick, MIXED_TASKS), abs=1e-6)


def test_a_yardstick_near_zero_counts_as_the_floor_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    tasks = TaskSet([ERROR_TASKS[0]])
    with caplog.at_level(logging.WARNING):
        assert delta_m({"a": YARDSTICK_FLOOR}, {"a": 0.0}, tasks) == pytest.approx(-100)
    assert "'a'" in caplog.text
    caplog.clear()
    assert delta_m({"a": 0.0}, {"a": YARDSTICK_FLOOR}, tasks) == pytest.approx(100)
    assert not caplog.records
