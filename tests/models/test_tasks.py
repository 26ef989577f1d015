from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.models.tasks import KIND_LOSSES, KIND_METRICS, Grouping, Task, TaskKind, TaskSet
from tests.models.not_numbers import NO_NUMBERS

labels = st.lists(st.integers(-3, 3), min_size=1, max_size=8)


@given(labels)
def test_tasks_share_a_group_exactly_where_they_share_a_label(labels: list[int]) -> None:
    found = Grouping.from_labels(labels).labels
    for i, one in enumerate(labels):
        for j, other in enumerate(labels):
            assert (found[i] == found[j]) == (one == other)


@given(labels)
def test_labels_are_the_canonical_name_of_a_grouping(labels: list[int]) -> None:
    grouping = Grouping.from_labels(labels)
    assert Grouping.from_labels(grouping.labels) == grouping
    first_seen = list(dict.fromkeys(grouping.labels))
    assert first_seen == list(range(len(grouping)))


@given(labels, st.randoms())
def test_equal_partitions_are_equal_objects(labels: list[int], random: Random) -> None:
    grouping = Grouping.from_labels(labels)
    groups = [random.sample(group, len(group)) for group in grouping.groups]
    random.shuffle(groups)
    again = Grouping(tuple(tuple(group) for group in groups))
    assert again == grouping
    assert hash(again) == hash(grouping)
    assert list(again.groups) == sorted(tuple(sorted(group)) for group in groups)


@given(labels)
def test_names_round_trip(labels: list[int]) -> None:
    tasks = TaskSet(Task(name=f"task {i}", kind=TaskKind.BINARY) for i in range(len(labels)))
    grouping = Grouping.from_labels(labels)
    assert Grouping.from_names(grouping.names(tasks), tasks) == grouping


def test_together_is_one_group_and_apart_is_one_a_task() -> None:
    assert Grouping.together(3).groups == ((0, 1, 2),)
    assert Grouping.apart(3).groups == ((0,), (1,), (2,))


@pytest.mark.parametrize("groups", [(), ((),), ((0,), ()), ((1,),), ((0, 0),), ((0, 1), (1,)), ((0, 2),)])
def test_what_is_not_a_partition_is_refused(groups: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="grouping: must be a partition"):
        Grouping(groups)


@pytest.mark.parametrize(
    "groups", [1, None, "ab", [], ["ab"], [1], [["a", "b"], []], [[["a"], "b"]], [["a"], None], {"a": "b"}]
)
def test_what_is_no_list_of_lists_of_names_is_refused(groups: Any) -> None:
    tasks = TaskSet(Task(name=name, kind=TaskKind.BINARY) for name in "ab")
    with pytest.raises(ValueError, match=r"grouping: (must be a list of lists of task names|each of)"):
        Grouping.from_names(groups, tasks)


@pytest.mark.parametrize("groups", [[["a"]], [["a", "b"], ["b"]], [["a", "b", "c"]], [["a", "a", "b"]]])
def test_names_that_are_not_a_partition_are_refused(groups: list[list[str]]) -> None:
    tasks = TaskSet(Task(name=name, kind=TaskKind.BINARY) for name in "ab")
    with pytest.raises(ValueError, match="grouping: "):
        Grouping.from_names(groups, tasks)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("outputs", 0),
        ("outputs", 2),
        ("outputs", True),
        ("weight", 0.0),
        ("weight", -1.0),
        ("weight", float("nan")),
        ("weight", 1e39),
        *((name, value) for name in ("outputs", "weight") for value in NO_NUMBERS),
        *((name, value) for name in ("name", "kind", "metric", "loss") for value in (None, 1, ["a"])),
    ],
)
def test_a_task_that_breaks_a_rule_is_refused_by_its_fields_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}: .*must"):
        Task(**{"name": "a", "kind": TaskKind.BINARY, field: value})  # type: ignore[arg-type]


OUTPUTS = {TaskKind.MULTICLASS: 2, TaskKind.SEGMENTATION: 2, TaskKind.NORMALS: 3}
every_kind = pytest.mark.parametrize("kind", TaskKind)


@every_kind
def test_a_task_has_its_kinds_first_metric_and_loss_unless_it_names_another(kind: TaskKind) -> None:
    task = Task(name="a", kind=kind, outputs=OUTPUTS.get(kind, 1))
    assert task.metric == next(iter(KIND_METRICS[kind]))
    assert task.loss == KIND_LOSSES[kind][0]
    for metric, direction in KIND_METRICS[kind].items():
        assert replace(task, metric=metric).direction is direction
    for loss in KIND_LOSSES[kind]:
        assert replace(task, loss=loss).loss == loss


@every_kind
def test_a_task_that_names_another_kinds_metric_or_loss_is_refused_with_its_own(kind: TaskKind) -> None:
    with pytest.raises(ValueError, match=f"metric: of a {kind.value} task must be one of .*, found 'speed'"):
        Task(name="a", kind=kind, outputs=OUTPUTS.get(kind, 1), metric="speed")
    with pytest.raises(ValueError, match=f"loss: of a {kind.value} task must be one of .*, found 'hinge'"):
        Task(name="a", kind=kind, outputs=OUTPUTS.get(kind, 1), loss="hinge")


@pytest.mark.parametrize(
    ("kind", "outputs"),
    [
        (TaskKind.BINARY, 2),
        (TaskKind.MULTICLASS, 1),
        (TaskKind.SEGMENTATION, 1),
        (TaskKind.DEPTH, 2),
        (TaskKind.NORMALS, 1),
        (TaskKind.REGRESSION, 65_537),
        (TaskKind.DENSE_REGRESSION, 0),
    ],
)
def test_a_number_of_outputs_that_does_not_go_with_the_kind_is_refused(kind: TaskKind, outputs: int) -> None:
    with pytest.raises(ValueError, match=f"outputs: of a {kind.value} task must be .*, found {outputs}"):
        Task(name="a", kind=kind, outputs=outputs)


def test_a_task_set_has_tasks_with_unique_names_and_keeps_their_order() -> None:
    with pytest.raises(ValueError, match="at least one"):
        TaskSet([])
    with pytest.raises(ValueError, match="unique"):
        TaskSet(Task(name="a", kind=TaskKind.BINARY) for _ in range(2))
    tasks = TaskSet(Task(name=name, kind=TaskKind.BINARY) for name in "bca")
    assert tasks.names == ("b", "c", "a")
    assert tasks == TaskSet(list(tasks))
    assert hash(tasks) == hash(TaskSet(list(tasks)))
    assert tasks != TaskSet(tasks[::-1])
