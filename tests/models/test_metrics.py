import logging
import math
from collections.abc import Iterable, Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAUROC,
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
    MulticlassJaccardIndex,
)
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError

from coterie.models.metrics import (
    METRIC_SCALES,
    YARDSTICK_FLOOR,
    Evaluator,
    delta_m,
    mean_rank,
    normalized_gain,
    total_error,
)
from coterie.models.tasks import CLASSIFICATION, KIND_METRICS, Direction, Task, TaskKind, TaskSet

# Shapes: B batch, C classes, H and W a map's sides.

NAMES = ("a", "b", "c")
ERROR_TASKS = TaskSet(Task(name=name, kind=TaskKind.BINARY) for name in NAMES)
MIXED_TASKS = TaskSet(
    [
        Task(name="a", kind=TaskKind.BINARY),
        Task(name="b", kind=TaskKind.BINARY, metric="accuracy"),
        Task(name="c", kind=TaskKind.BINARY),
    ]
)
DEPTH = Task(name="d", kind=TaskKind.DEPTH)
CLASSES = 4
KINDS = {
    TaskKind.BINARY: Task(name="a", kind=TaskKind.BINARY),
    TaskKind.MULTICLASS: Task(name="a", kind=TaskKind.MULTICLASS, outputs=CLASSES),
    TaskKind.REGRESSION: Task(name="a", kind=TaskKind.REGRESSION, outputs=2),
    TaskKind.SEGMENTATION: Task(name="a", kind=TaskKind.SEGMENTATION, outputs=CLASSES),
    TaskKind.DEPTH: Task(name="a", kind=TaskKind.DEPTH),
    TaskKind.NORMALS: Task(name="a", kind=TaskKind.NORMALS, outputs=3),
    TaskKind.DENSE_REGRESSION: Task(name="a", kind=TaskKind.DENSE_REGRESSION),
}
SIDES = (4, 5)

every_kind = pytest.mark.parametrize("kind", KINDS)
seeds = st.integers(0, 2**31)
logits = st.floats(-5, 5, width=32, allow_subnormal=False)
rates = st.fixed_dictionaries({name: st.floats(0, 1) for name in NAMES})
yardsticks = st.fixed_dictionaries({name: st.floats(2 * YARDSTICK_FLOOR, 1) for name in NAMES})


def draw(kind: TaskKind, batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Outputs and targets [B, ...] of the kind's task, without missing labels."""
    random = torch.Generator().manual_seed(seed)
    match kind:
        case TaskKind.BINARY:
            return torch.randn(batch, generator=random), torch.randint(2, (batch,), generator=random).float()
        case TaskKind.MULTICLASS | TaskKind.SEGMENTATION:
            places = SIDES if kind is TaskKind.SEGMENTATION else ()
            outputs = torch.randn(batch, CLASSES, *places, generator=random)
            return outputs, torch.randint(CLASSES, (batch, *places), generator=random)
        case TaskKind.REGRESSION:
            shape: tuple[int, ...] = (batch, 2)
        case TaskKind.NORMALS:
            shape = (batch, 3, *SIDES)
        case _:
            shape = (batch, *SIDES)
    return torch.randn(shape, generator=random), torch.randn(shape, generator=random)


def without_labels(targets: Tensor) -> Tensor:
    return torch.full_like(targets, torch.nan if targets.is_floating_point() else -1)


def evaluate(task: Task, *batches: tuple[Tensor, Tensor]) -> dict[str, float]:
    evaluator = Evaluator(TaskSet([task]))
    for outputs, targets in batches:
        evaluator.update({task.name: outputs}, {task.name: targets})
    return evaluator.compute()[task.name]


@every_kind
def test_every_metric_of_a_kind_is_a_number(kind: TaskKind) -> None:
    found = evaluate(KINDS[kind], draw(kind, 6, seed=0))
    assert list(found) == list(KIND_METRICS[kind])
    assert all(type(value) is float and math.isfinite(value) for value in found.values())


def test_the_metrics_of_all_tasks_come_in_their_order() -> None:
    tasks = TaskSet([KINDS[TaskKind.DEPTH], Task(name="b", kind=TaskKind.BINARY)])
    evaluator = Evaluator(tasks)
    drawn = {"a": draw(TaskKind.DEPTH, 3, 0), "b": draw(TaskKind.BINARY, 5, 1)}
    evaluator.update({name: o for name, (o, _) in drawn.items()}, {name: t for name, (_, t) in drawn.items()})
    found = evaluator.compute()
    assert list(found) == ["a", "b"]
    assert found["b"] == evaluate(tasks[1], drawn["b"])


def test_an_error_is_the_share_of_wrong_signs() -> None:
    outputs = {
        "a": torch.tensor([1.0, -1.0, 2.0, -2.0]),
        "b": torch.tensor([1.0, 1.0, 1.0, 1.0]),
        "c": torch.tensor([-0.1, 0.1, -0.1, 0.1]),
    }
    evaluator = Evaluator(ERROR_TASKS)
    evaluator.update(outputs, {name: torch.tensor([1, 0, 1, 1]) for name in NAMES})
    assert [values["error"] for values in evaluator.compute().values()] == [0.25, 0.25, 0.75]


@given(st.lists(st.tuples(logits, st.booleans()), min_size=1, max_size=9))
def test_an_error_is_in_0_to_1_and_its_flipped_targets_give_the_rest(
    samples: list[tuple[float, bool]],
) -> None:
    outputs, answers = torch.tensor([s for s, _ in samples]), torch.tensor([a for _, a in samples])
    error = evaluate(ERROR_TASKS[0], (outputs, answers))["error"]
    flipped = evaluate(ERROR_TASKS[0], (outputs, ~answers))["error"]
    wrong = sum((logit > 0) is not answer for logit, answer in samples)
    assert error == 1 - (len(samples) - wrong) / len(samples)
    assert error + flipped == pytest.approx(1)


@given(batch=st.integers(1, 30), seed=seeds)
def test_binary_metrics_are_torchmetrics(batch: int, seed: int) -> None:
    outputs, targets = draw(TaskKind.BINARY, batch, seed)
    outputs = (4 * outputs).round() / 4  # so that some scores tie
    found = evaluate(KINDS[TaskKind.BINARY], (outputs, targets))
    answers, labels = (outputs > 0).long(), targets.long()
    assert found["accuracy"] == pytest.approx(float(BinaryAccuracy()(answers, labels)))
    assert found["f1"] == pytest.approx(float(BinaryF1Score()(answers, labels)))
    if len(labels.unique()) == 2:
        assert found["auc"] == pytest.approx(float(BinaryAUROC()(outputs.sigmoid(), labels)), abs=1e-6)
    else:
        assert found["auc"] == 0.5


@given(batch=st.integers(1, 30), seed=seeds)
def test_multiclass_metrics_are_torchmetrics(batch: int, seed: int) -> None:
    outputs, targets = draw(TaskKind.MULTICLASS, batch, seed)
    found = evaluate(KINDS[TaskKind.MULTICLASS], (outputs, targets))
    accuracy = MulticlassAccuracy(CLASSES, average="micro")
    assert found["accuracy"] == pytest.approx(float(accuracy(outputs, targets)))
    assert found["f1"] == pytest.approx(float(MulticlassF1Score(CLASSES)(outputs, targets)))
    present = targets.unique()
    if len(present) > 1:
        softmax = outputs.softmax(dim=1)
        areas = [float(BinaryAUROC()(softmax[:, c], (targets == c).long())) for c in present]
        assert found["auc"] == pytest.approx(sum(areas) / len(areas), abs=1e-6)
    if len(present) == CLASSES:  # else torchmetrics counts an absent class as 0
        assert found["auc"] == pytest.approx(float(MulticlassAUROC(CLASSES)(outputs, targets)), abs=1e-6)


@given(batch=st.integers(1, 3), most=st.integers(0, CLASSES - 1), seed=seeds)
def test_segmentation_metrics_are_torchmetrics(batch: int, most: int, seed: int) -> None:
    outputs, targets = draw(TaskKind.SEGMENTATION, batch, seed)
    targets = targets.clamp(max=most)  # so that some classes do not occur
    outputs[:, most + 1 :] -= 2
    found = evaluate(KINDS[TaskKind.SEGMENTATION], (outputs, targets))
    assert found["miou"] == pytest.approx(float(MulticlassJaccardIndex(CLASSES)(outputs, targets)))
    accuracy = MulticlassAccuracy(CLASSES, average="micro")
    assert found["pixel_accuracy"] == pytest.approx(float(accuracy(outputs, targets)))


@pytest.mark.parametrize("kind", [TaskKind.REGRESSION, TaskKind.DEPTH, TaskKind.DENSE_REGRESSION])
@given(batch=st.integers(1, 6), seed=seeds)
def test_differences_are_torchmetrics(kind: TaskKind, batch: int, seed: int) -> None:
    outputs, targets = draw(kind, batch, seed)
    found = evaluate(KINDS[kind], (outputs, targets))
    absolute = float(MeanAbsoluteError()(outputs.flatten(), targets.flatten()))
    squared = float(MeanSquaredError(squared=False)(outputs.flatten(), targets.flatten()))
    assert found["rmse"] == pytest.approx(squared)
    assert found["abs_error" if kind is TaskKind.DEPTH else "mae"] == pytest.approx(absolute)
    if kind is TaskKind.DEPTH:
        assert found["rel_error"] == pytest.approx(
            float(((outputs - targets) / targets).abs().mean()), rel=1e-4
        )


def test_a_depth_of_0_has_no_relative_error() -> None:
    outputs, targets = torch.tensor([[[3.0, 2.0]]]), torch.tensor([[[2.0, 0.0]]])
    assert evaluate(DEPTH, (outputs, targets)) == {"abs_error": 1.5, "rel_error": 0.5, "rmse": math.sqrt(2.5)}
    assert evaluate(DEPTH, (outputs, torch.zeros(1, 1, 2)))["rel_error"] == 0


@given(degrees=st.lists(st.floats(0, 180), min_size=1, max_size=12))
def test_angles_are_those_between_the_normals(degrees: list[float]) -> None:
    angles = torch.tensor(degrees, dtype=torch.float64).view(1, 1, -1)
    radians = angles.deg2rad()
    outputs = torch.stack([radians.cos(), radians.sin(), torch.zeros_like(radians)], dim=1)
    targets = 2 * torch.stack([torch.ones_like(angles), *[torch.zeros_like(angles)] * 2], dim=1)
    found = evaluate(KINDS[TaskKind.NORMALS], (outputs, targets))
    assert found["angle_mean"] == pytest.approx(np.mean(degrees), abs=1e-5)
    assert found["angle_median"] == pytest.approx(np.median(degrees), abs=1e-3)
    for limit in (11.25, 22.5, 30):
        if min(abs(angle - limit) for angle in degrees) > 1e-6:
            assert found[f"within_{limit}"] == np.mean(np.array(degrees) < limit)


def test_an_answer_without_a_direction_is_at_a_right_angle() -> None:
    found = evaluate(KINDS[TaskKind.NORMALS], (torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)))
    assert found["angle_mean"] == pytest.approx(90)


@every_kind
@given(cuts=st.lists(st.integers(0, 8), max_size=3), seed=seeds)
def test_how_a_split_is_cut_into_batches_changes_nothing(kind: TaskKind, cuts: list[int], seed: int) -> None:
    outputs, targets = draw(kind, 8, seed)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    whole = evaluate(KINDS[kind], (outputs, targets))
    parts = [index for index in torch.tensor_split(order, sorted(cuts)) if len(index)]
    found = evaluate(KINDS[kind], *((outputs[index], targets[index]) for index in parts))
    assert found == pytest.approx(whole)


@every_kind
@given(present=st.lists(st.booleans(), min_size=1, max_size=8).filter(any), seed=seeds)
def test_a_sample_without_labels_is_as_if_it_were_not_there(
    kind: TaskKind, present: list[bool], seed: int
) -> None:
    outputs, targets = draw(kind, len(present), seed)
    kept = torch.tensor(present)
    masked = targets.clone()
    masked[~kept] = without_labels(targets)[~kept]
    outputs[~kept] = torch.nan  # even so
    found = evaluate(KINDS[kind], (outputs, masked))
    assert found == pytest.approx(evaluate(KINDS[kind], (outputs[kept], targets[kept])))


@every_kind
def test_a_perfect_answer_is_the_best(kind: TaskKind) -> None:
    _, targets = draw(kind, 8, seed=3)
    if kind is TaskKind.BINARY:
        outputs = targets - 0.5
    elif kind in {TaskKind.MULTICLASS, TaskKind.SEGMENTATION}:
        outputs = torch.nn.functional.one_hot(targets, CLASSES).movedim(-1, 1).float()
    else:
        outputs = targets
    for metric, value in evaluate(KINDS[kind], (outputs, targets)).items():
        best = 1 if KIND_METRICS[kind][metric] is Direction.MAXIMIZE else 0
        assert value == pytest.approx(best, abs=1e-3)


@every_kind
def test_an_answer_of_nan_is_wrong(kind: TaskKind) -> None:
    outputs, targets = draw(kind, 8, seed=3)
    for metric, value in evaluate(KINDS[kind], (torch.full_like(outputs, torch.nan), targets)).items():
        if KIND_METRICS[kind][metric] is Direction.MAXIMIZE:
            assert value == 0
        elif kind is TaskKind.NORMALS:
            assert value == pytest.approx(180, abs=1e-3)
        else:
            assert value == (1 if kind in CLASSIFICATION else math.inf)


def test_one_nan_among_the_scores_of_a_sample_makes_its_answer_wrong() -> None:
    outputs = torch.tensor([[torch.nan, 1.0, 0.0, 0.0], [3.0, 1.0, 0.0, 0.0]])
    found = evaluate(KINDS[TaskKind.MULTICLASS], (outputs, torch.tensor([0, 0])))
    assert found["error"] == 0.5


@every_kind
def test_a_task_without_any_label_is_refused_by_name(kind: TaskKind) -> None:
    outputs, targets = draw(kind, 3, seed=0)
    with pytest.raises(ValueError, match="targets: of 'a' must have a label in every split, found none"):
        evaluate(KINDS[kind], (outputs, without_labels(targets)))


def test_scores_far_apart_are_told_apart() -> None:
    outputs = torch.tensor([20.0, 30.0, 40.0, 50.0])  # whose sigmoids are all 1
    assert evaluate(ERROR_TASKS[0], (outputs, torch.tensor([0, 0, 1, 1])))["auc"] == 1


def test_every_metric_that_is_in_no_targets_unit_has_a_scale() -> None:
    in_the_targets_unit = {"rmse", "mae", "abs_error"}
    names = {metric for metrics in KIND_METRICS.values() for metric in metrics}
    assert names - METRIC_SCALES.keys() == in_the_targets_unit


def test_delta_m_by_hand() -> None:
    values = {"a": 0.05, "b": 0.99, "c": 0.20}
    yardstick = {"a": 0.10, "b": 0.90, "c": 0.10}
    # a halves its error: +50 %; b's accuracy rises by a tenth: +10 %; c doubles its error: -100 %
    assert delta_m(values, yardstick, MIXED_TASKS) == pytest.approx((50 + 10 - 100) / 3)


def test_normalized_gain_by_hand_and_total_error() -> None:
    errors, yardstick = {"a": 0.05, "b": 0.12, "c": 0.2}, {"a": 0.1, "b": 0.1, "c": 0.1}
    assert normalized_gain(errors, yardstick, ERROR_TASKS) == pytest.approx((50 - 20 - 100) / 3)
    assert total_error(errors, ERROR_TASKS) == pytest.approx(37)


def test_gain_and_total_error_are_over_classification_tasks_however_those_are_judged() -> None:
    tasks = TaskSet([*MIXED_TASKS, DEPTH])
    errors, yardstick = {"a": 0.05, "b": 0.12, "c": 0.2}, {"a": 0.1, "b": 0.1, "c": 0.1}
    assert normalized_gain(errors, yardstick, tasks) == pytest.approx((50 - 20 - 100) / 3)
    assert total_error(errors, tasks) == pytest.approx(37)


def test_without_a_classification_task_there_is_no_gain_and_no_total_error() -> None:
    with pytest.raises(ValueError, match="tasks: must have a classification among them, found \\['d'\\]"):
        normalized_gain({}, {}, TaskSet([DEPTH]))
    with pytest.raises(ValueError, match="tasks: must have a classification"):
        total_error({}, TaskSet([DEPTH]))


@given(rates)
def test_equal_to_the_yardstick_is_worth_nothing(values: dict[str, float]) -> None:
    assert delta_m(values, values, MIXED_TASKS) == 0
    assert normalized_gain(values, values, ERROR_TASKS) == 0
    assert delta_m({"d": values["a"]}, {"d": values["a"]}, TaskSet([DEPTH])) == 0


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


@given(st.floats(0, 1e3), st.floats(0, 1e3), st.floats(0.01, 100))
def test_delta_m_does_not_depend_on_a_targets_unit(value: float, yardstick: float, factor: float) -> None:
    tasks = TaskSet([DEPTH])
    scaled = delta_m({"d": factor * value}, {"d": factor * yardstick}, tasks)
    assert scaled == pytest.approx(delta_m({"d": value}, {"d": yardstick}, tasks), abs=1e-6)


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1e6))
def test_without_a_scale_of_its_own_a_change_is_bounded_and_still_in_order(
    yardstick: float, one: float, other: float
) -> None:
    better, worse = (
        delta_m({"d": value}, {"d": yardstick}, TaskSet([DEPTH])) for value in sorted([one, other])
    )
    rounding = 1e-6
    assert -100 / YARDSTICK_FLOOR - rounding <= worse <= better + rounding
    assert better <= 100


def test_an_infinite_error_is_infinitely_bad() -> None:
    assert delta_m({"d": math.inf}, {"d": 0.1}, TaskSet([DEPTH])) == -math.inf


def test_a_yardstick_near_zero_counts_as_the_floor_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    tasks = TaskSet([ERROR_TASKS[0]])
    with caplog.at_level(logging.WARNING):
        assert delta_m({"a": YARDSTICK_FLOOR}, {"a": 0.0}, tasks) == pytest.approx(-100)
    assert "'a'" in caplog.text
    caplog.clear()
    assert delta_m({"a": 0.0}, {"a": YARDSTICK_FLOOR}, tasks) == pytest.approx(100)
    assert not caplog.records


def test_the_floor_of_an_angle_is_in_degrees() -> None:
    tasks = TaskSet([Task(name="n", kind=TaskKind.NORMALS, outputs=3)])
    assert delta_m({"n": 0.36}, {"n": 0.0}, tasks) == pytest.approx(-200)


def test_mean_rank_by_hand() -> None:
    table = {"x": {"a": 0.1, "b": 0.9}, "y": {"a": 0.3, "b": 0.9}, "z": {"a": 0.2, "b": 0.95}}
    tasks = TaskSet(list(MIXED_TASKS)[:2])
    # a, an error: x, z, y; b, an accuracy: z, then x and y share the second and third place
    assert mean_rank(table, tasks) == {"x": (1 + 2.5) / 2, "y": (3 + 2.5) / 2, "z": (2 + 1) / 2}


def ranks_by_definition(table: Mapping[str, Mapping[str, float]], tasks: Iterable[Task]) -> dict[str, float]:
    """One plus the number of better candidates, plus half the number of equal ones."""

    def rank(candidate: str, task: Task) -> float:
        own = table[candidate][task.name]
        others = [values[task.name] for name, values in table.items() if name != candidate]
        lower = task.direction is Direction.MINIMIZE
        better = sum(value < own if lower else value > own for value in others)
        return 1 + better + sum(value == own for value in others) / 2

    return {name: float(np.mean([rank(name, task) for task in tasks])) for name in table}


@given(st.dictionaries(st.text("xyz", min_size=1), rates, min_size=1, max_size=6))
def test_mean_rank_is_its_definition_and_the_ranks_of_all_have_one_mean(
    table: dict[str, dict[str, float]],
) -> None:
    found = mean_rank(table, MIXED_TASKS)
    assert found == pytest.approx(ranks_by_definition(table, MIXED_TASKS))
    assert np.mean(list(found.values())) == pytest.approx((len(table) + 1) / 2)
