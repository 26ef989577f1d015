"""The source `digits`, against scikit-learn's own images."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from sklearn.datasets import load_digits

from coterie.models.tasks import TaskKind
from coterie.search.data.base import Dataset, Split, fingerprint
from coterie.search.data.digits import Digits, DigitsOptions
from coterie.search.data.registry import sources

SPLITS = ("train", "validation", "test")

# Two images overlap in 4×4 pixels; outside them each digit is seen as it is.
SEEN_LEFT = np.ones((8, 8), dtype=bool)
SEEN_LEFT[4:, 4:] = False
SEEN_RIGHT = np.ones((8, 8), dtype=bool)
SEEN_RIGHT[:4, :4] = False


@pytest.fixture(scope="module")
def full() -> Dataset:
    return Digits.load(DigitsOptions())


def source_images() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    digits = load_digits()
    return (digits.images / 16).astype(np.float32), digits.target


def find_sources(split: Split) -> tuple[list[int], list[int]]:
    """Which of scikit-learn's images are on the left of the samples, and which on the right, by pixels."""
    images, _ = source_images()
    found = []
    for seen, corner in ((SEEN_LEFT, slice(None, 8)), (SEEN_RIGHT, slice(-8, None))):
        known = {image[seen].tobytes(): index for index, image in enumerate(images)}
        assert len(known) == len(images)  # no two of them look the same there
        found.append([known[sample[corner, corner][seen].tobytes()] for sample in split.inputs])
    return found[0], found[1]


def equal(one: Dataset, other: Dataset) -> bool:
    return all(
        np.array_equal(getattr(one, name).inputs, getattr(other, name).inputs)
        and all(
            np.array_equal(labels, getattr(other, name).targets[task])
            for task, labels in getattr(one, name).targets.items()
        )
        for name in SPLITS
    )


def test_it_is_registered() -> None:
    assert sources()["digits"] is Digits


def test_the_default_is_4000_samples_in_60_20_20(full: Dataset) -> None:
    assert [len(getattr(full, name)) for name in SPLITS] == [2400, 800, 800]


@given(samples=st.integers(50, 5000))
@settings(max_examples=15)
def test_every_sample_is_in_one_split_and_shares_are_kept(samples: int) -> None:
    data = Digits.load(DigitsOptions(samples=samples))
    sizes = [len(getattr(data, name)) for name in SPLITS]
    assert sum(sizes) == samples
    assert all(abs(size - share * samples) <= 1 for size, share in zip(sizes, (0.6, 0.2, 0.2), strict=True))
    assert all(
        len(labels) == size
        for name, size in zip(SPLITS, sizes, strict=True)
        for labels in getattr(data, name).targets.values()
    )


@pytest.mark.parametrize("seed", [0, 1, 2**53 - 1])
def test_no_source_image_is_in_two_splits(seed: int) -> None:
    data = Digits.load(DigitsOptions(seed=seed))
    used = [set().union(*find_sources(getattr(data, name))) for name in SPLITS]
    assert all(len(part) > 300 for part in used)  # of 1,078, 359 and 360
    assert not used[0] & used[1]
    assert not used[0] & used[2]
    assert not used[1] & used[2]


def test_each_sample_is_two_source_images_and_its_labels_are_their_digits(full: Dataset) -> None:
    images, digit = source_images()
    for name in SPLITS:
        split = getattr(full, name)
        left, right = find_sources(split)
        expected = np.zeros((len(split), 12, 12), dtype=np.float32)
        expected[:, :8, :8] = images[left]
        expected[:, 4:, 4:] = np.maximum(expected[:, 4:, 4:], images[right])
        assert np.array_equal(split.inputs, expected)
        for side, chosen in (("left", digit[left]), ("right", digit[right])):
            assert np.array_equal(split.targets[f"{side}_parity"], chosen % 2 == 1)
            assert np.array_equal(split.targets[f"{side}_large"], chosen >= 5)
            assert np.array_equal(split.targets[f"{side}_loop"], np.isin(chosen, [0, 6, 8, 9]))


def test_left_and_right_are_drawn_apart(full: Dataset) -> None:
    targets = full.train.targets
    for question in ("parity", "large", "loop"):
        correlation = np.corrcoef(targets[f"left_{question}"], targets[f"right_{question}"])[0, 1]
        assert abs(correlation) < 0.06  # three standard deviations of nothing at 2,400 samples
    assert find_sources(full.train)[0] != find_sources(full.train)[1]


def test_answers_are_balanced_as_the_digits_are(full: Dataset) -> None:
    for name in SPLITS:
        for task, labels in getattr(full, name).targets.items():
            expected = 0.4 if task.endswith("loop") else 0.5
            assert abs(labels.mean() - expected) < 0.1, (name, task)


def test_mean_and_std_are_those_of_the_training_pixels_alone(full: Dataset) -> None:
    assert full.mean == pytest.approx(full.train.inputs.astype(np.float64).mean(), rel=1e-4)
    assert full.std == pytest.approx(full.train.inputs.astype(np.float64).std(), rel=1e-4)
    assert full.mean != pytest.approx(np.concatenate([full.train.inputs, full.test.inputs]).mean(), rel=1e-4)


def test_types_and_shapes_are_as_declared_without_loading(full: Dataset) -> None:
    assert full.input_shape == Digits.shape() == (12, 12)
    assert full.tasks == Digits.tasks()
    assert full.tasks.names == (
        "left_parity",
        "left_large",
        "left_loop",
        "right_parity",
        "right_large",
        "right_loop",
    )
    assert {task.kind for task in full.tasks} == {TaskKind.BINARY}
    for name in SPLITS:
        split = getattr(full, name)
        assert split.inputs.dtype == np.float32
        assert split.inputs.min() >= 0
        assert split.inputs.max() <= 1
        assert set(split.targets) == set(full.tasks.names)
        assert all(labels.dtype == np.float32 for labels in split.targets.values())


def test_the_same_options_give_the_same_data_and_another_seed_other_data() -> None:
    one, again, other = (Digits.load(DigitsOptions(samples=200, seed=seed)) for seed in (3, 3, 4))
    assert equal(one, again)
    assert not equal(one, other)
    for name in SPLITS:
        assert set(find_sources(getattr(one, name))[0]) != set(find_sources(getattr(other, name))[0])


def test_which_images_a_split_is_made_of_is_drawn_too() -> None:
    one, other = (Digits.load(DigitsOptions(seed=seed)) for seed in (0, 1))
    used = [set().union(*find_sources(data.train)) for data in (one, other)]
    assert len(used[0] & used[1]) < 0.8 * len(used[0])  # 0.6 is expected


@pytest.mark.parametrize(
    "options",
    [
        {"samples": 49},
        {"samples": 100_001},
        {"samples": "400"},
        {"samples": True},
        {"seed": -1},
        {"seed": 2**53},
        {"sample": 100},
    ],
)
def test_options_out_of_bounds_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DigitsOptions.model_validate(options)


def test_the_fingerprint_names_the_data_and_not_how_it_was_asked_for() -> None:
    spelled_out = fingerprint(Digits, DigitsOptions(samples=4000, seed=0))
    assert fingerprint(Digits, DigitsOptions()) == spelled_out
    assert spelled_out not in {
        fingerprint(Digits, DigitsOptions(seed=1)),
        fingerprint(Digits, DigitsOptions(samples=4001)),
    }
