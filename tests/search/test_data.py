"""What a source gives is checked when it is loaded: each fault says where it is and what would be right."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from coterie.models.tasks import Task, TaskKind, TaskSet
from coterie.search.data.base import DataError, Dataset, Split
from coterie.search.trial import make_bench

SAMPLES, SIDE, CLASSES = 4, 5, 3
PLACES = (SAMPLES, SIDE, SIDE)
TASKS = TaskSet(
    [
        Task(name="binary", kind=TaskKind.BINARY),
        Task(name="multiclass", kind=TaskKind.MULTICLASS, outputs=CLASSES),
        Task(name="regression", kind=TaskKind.REGRESSION),
        Task(name="vector", kind=TaskKind.REGRESSION, outputs=2),
        Task(name="segmentation", kind=TaskKind.SEGMENTATION, outputs=CLASSES),
        Task(name="depth", kind=TaskKind.DEPTH),
        Task(name="normals", kind=TaskKind.NORMALS, outputs=3),
        Task(name="dense", kind=TaskKind.DENSE_REGRESSION),
        Task(name="dense_vector", kind=TaskKind.DENSE_REGRESSION, outputs=2),
    ]
)
LABELS: dict[str, NDArray[Any]] = {
    "binary": np.ones(SAMPLES, np.float32),
    "multiclass": np.ones(SAMPLES, np.int64),
    "regression": np.ones(SAMPLES, np.float32),
    "vector": np.ones((SAMPLES, 2), np.float32),
    "segmentation": np.ones(PLACES, np.int64),
    "depth": np.ones(PLACES, np.float32),
    "normals": np.ones((SAMPLES, 3, SIDE, SIDE), np.float32),
    "dense": np.ones(PLACES, np.float32),
    "dense_vector": np.ones((SAMPLES, 2, SIDE, SIDE), np.float32),
}
INPUTS = np.zeros((SAMPLES, 3, SIDE, SIDE), np.float32)


def split(**changes: NDArray[Any]) -> Split:
    return Split(inputs=changes.pop("inputs", INPUTS), targets=LABELS | changes)


def dataset(**splits: Split) -> Dataset:
    every = dict.fromkeys(("train", "validation", "test"), split()) | splits
    return Dataset(**every, tasks=TASKS, mean=0.0, std=1.0)


def changed(name: str, index: Any, value: float) -> dict[str, NDArray[Any]]:
    labels = LABELS[name].copy()
    labels[index] = value
    return {name: labels}


def test_labels_of_every_kind_are_taken_as_they_are_described() -> None:
    bench = make_bench(TASKS, dataset(), cpus=1, gpus=0)
    for name, labels in LABELS.items():
        assert bench.train.targets[name].shape == labels.shape
        assert bench.train.targets[name].dtype.is_floating_point == (labels.dtype == np.float32)


def test_one_output_has_no_axis_of_its_own_as_its_head_gives_none() -> None:
    for name in ("regression", "dense"):
        with pytest.raises(DataError, match=rf"^train\.targets\.{name}: must have the shape"):
            dataset(train=split(**{name: LABELS[name][:, None]}))


@given(name=st.sampled_from(TASKS.names), where=st.sampled_from(["train", "validation", "test"]))
def test_some_labels_may_be_missing_but_not_all(name: str, where: str) -> None:
    missing = -1 if LABELS[name].dtype == np.int64 else np.nan
    dataset(**{where: split(**changed(name, 0, missing))})
    with pytest.raises(DataError, match=rf"^{where}\.targets\.{name}: must have a label or more, found none"):
        dataset(**{where: split(**changed(name, ..., missing))})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (changed("binary", 2, 2.0), "binary: must be 0 or 1, or missing, found 2.0"),
        ({"binary": np.full(SAMPLES, 3)}, "binary: must be 0 or 1, or missing, found 3"),
        (changed("multiclass", 1, CLASSES), "multiclass: must be from 0 to 2, or negative, found 3"),
        ({"multiclass": np.ones(SAMPLES, np.float32)}, "multiclass: must be whole numbers, found float32"),
        (
            changed("segmentation", (0, 1, 1), 255),
            "segmentation: must be from 0 to 2, or negative, found 255",
        ),
        (changed("regression", 1, np.inf), "regression: must be finite, or NaN, found inf"),
        (changed("depth", (0, 0, 0), -np.inf), "depth: must be finite, or NaN, found -inf"),
        ({"depth": np.ones(PLACES)}, "depth: must be float32, found float64"),
        (
            {"depth": np.ones((SAMPLES, 4, 5), np.float32)},
            r"must have the shape \[4, 5, 5\], found \[4, 4, 5\]",
        ),
        ({"normals": np.ones(PLACES, np.float32)}, r"must have the shape \[4, 3, 5, 5\], found \[4, 5, 5\]"),
        ({"dense": np.ones(SAMPLES, np.float32)}, r"shape \[4, 5, 5\], found \[4\]"),
        ({"vector": np.ones(SAMPLES, np.float32)}, r"must have the shape \[4, 2\], found \[4\]"),
        ({"binary": np.ones(SAMPLES + 1, np.float32)}, r"must have the shape \[4\], found \[5\]"),
        ({"inputs": INPUTS.astype(np.float64)}, r"inputs: must be float32 \[samples, \*\[3, 5, 5\]\]"),
        ({"inputs": INPUTS[:, :2]}, "inputs: must be float32"),
        ({"inputs": np.full_like(INPUTS, np.nan)}, "inputs: must be finite"),
    ],
)
def test_each_fault_is_named(changes: dict[str, NDArray[Any]], message: str) -> None:
    with pytest.raises(DataError, match=message) as found:
        dataset(validation=split(**changes))
    assert str(found.value).startswith("validation.")


def test_a_task_without_targets_is_named() -> None:
    targets = {name: labels for name, labels in LABELS.items() if name != "depth"}
    with pytest.raises(DataError, match=r"^test\.targets\.depth: must be there"):
        dataset(test=Split(inputs=INPUTS, targets=targets))


def test_an_empty_split_is_refused() -> None:
    empty = Split(inputs=INPUTS[:0], targets={name: labels[:0] for name, labels in LABELS.items()})
    with pytest.raises(DataError, match="a sample or more"):
        dataset(test=empty)


def test_each_channel_may_have_its_own_mean_and_deviation() -> None:
    data = replace(dataset(), mean=(0.0, 1.0, 2.0), std=(1.0, 2.0, 4.0))
    bench = make_bench(TASKS, data, cpus=1, gpus=0)
    assert bench.train.inputs[0, :, 0, 0].tolist() == [0.0, -0.5, -0.5]
    assert bench.preprocessing.mean == (0.0, 1.0, 2.0)
