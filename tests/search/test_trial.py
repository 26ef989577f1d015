"""One trial: reproducible, resumable to the bit, blind to the test split until its end."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from torch import Tensor

from coterie.models.cost import Cost, count_cost
from coterie.models.export import load_architecture
from coterie.models.metrics import Evaluator
from coterie.models.tasks import TaskSet
from coterie.search.data.base import Dataset, Split
from coterie.search.data.digits import Digits
from coterie.search.objective import METRICS, Yardstick, combined_metrics, metric_directions, task_metrics
from coterie.search.store import Candidate, Ending, FolderArtifacts, Measurement, TrialState
from coterie.search.trial import (
    CHECKPOINT,
    MEASUREMENTS_KEPT,
    Assignment,
    Bench,
    Diverged,
    Training,
    make_bench,
    worker_name,
)

RECIPE = {"lr": 5e-3, "weight_decay": 1e-6, "batch_size": 32, "width": 12, "depth": 2}
SIDES = [["left_parity", "left_large", "left_loop"], ["right_parity", "right_large", "right_loop"]]
FAMILIES: dict[str, dict[str, Any]] = {
    "single": {},
    "shared": {},
    "grouped": {"grouping": SIDES, "split": 1},
    "dmtg": {"groups": 3, "split": 1, "tau": 2.5, "logits_lr": 0.05},
    "interrogate": {"sparsity_weight": 0.5, "frozen": 0.25},
    "etr_nlp": {"gamma": 0.5},
    "affinity": {"groups": 2, "split": 1},
    "dmtg+interrogate": {"groups": 2, "split": 1, "sparsity_weight": 0.5},
}
# What happens in the middle of a training, and must happen again after an interruption.
PHASES: dict[str, tuple[str, dict[str, Any]]] = {
    "affinity start, dropped heads, fine-tuning": (
        "dmtg",
        {"init": "affinity", "epsilon": 0.4, "patience": 1, "fine_tune": 0.25, "logits_lr": 0.2, "groups": 2},
    ),
    "running losses, annealing": ("dmtg", {"loss_normalisation": "running", "tau_end": 0.5}),
    "random grouping": ("affinity", {"method": "random"}),
    "tag": ("affinity", {"method": "tag"}),
    "uncertainty": ("shared", {"balancing": "uncertainty"}),
    "dwa": ("dmtg", {"balancing": "dwa"}),
    "random weights": ("interrogate", {"balancing": "random"}),
    "pcgrad": ("shared", {"balancing": "pcgrad"}),
}
EPOCHS = 4
PHASED = [*((family, {}) for family in sorted(FAMILIES)), *PHASES.values()]
PHASED_IDS = [*sorted(FAMILIES), *PHASES]
TIMES = ("latency_ms", "train_device_seconds")  # the only metrics that differ from run to run

every_family = pytest.mark.parametrize("family", sorted(FAMILIES))

Start = Callable[..., Training]


@pytest.fixture(scope="module")
def bench(digits: Dataset) -> Bench:
    return make_bench(Digits.tasks(), digits, cpus=1, gpus=0)


@pytest.fixture
def start(bench: Bench, yardstick: Yardstick) -> Start:
    def start(family: str = "shared", *, seed: int = 0, bench: Bench = bench, **changes: Any) -> Training:
        parameters = RECIPE | FAMILIES[family] | changes
        candidate = Candidate(family=family, backbone="mlp", parameters=parameters)
        assignment = Assignment(trial_id="trial_1", candidate=candidate, seed=seed, epochs=EPOCHS)
        return Training(assignment, bench, yardstick)

    return start


def run(training: Training) -> list[Measurement]:
    measured = []
    while not training.done:
        measured.append(training.run_epoch())
    return measured


def run_one_by_one(training: Training) -> Iterator[Measurement]:
    while not training.done:
        yield training.run_epoch()


def timeless(measurement: Measurement) -> Measurement:
    return replace(measurement, device_seconds=0.0, worker="")


def what_was_learned(training: Training) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in training.network.state_dict().items()}


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Bit by bit, where NaN equals NaN."""
    return one.keys() == other.keys() and all(
        torch.equal(tensor.flatten().view(torch.uint8), other[name].flatten().view(torch.uint8))
        for name, tensor in one.items()
    )


# One run after the other


@every_family
def test_the_same_seed_gives_the_same_values_and_weights(family: str, start: Start) -> None:
    one, other = start(family, seed=7), start(family, seed=7)
    torch.rand(3)  # what the process draws besides does not matter
    assert [timeless(m) for m in run(one)] == [timeless(m) for m in run(other)]
    assert equal(what_was_learned(one), what_was_learned(other))


@every_family
def test_another_seed_gives_other_weights_and_values(family: str, start: Start) -> None:
    one, other = start(family, seed=7), start(family, seed=8)
    assert not equal(what_was_learned(one), what_was_learned(other))
    assert [timeless(m) for m in run(one)] != [timeless(m) for m in run(other)]


def test_the_seed_decides_the_order_of_the_samples_too(start: Start) -> None:
    one, other = start(seed=7), start(seed=8)
    other.network.load_state_dict(one.network.state_dict())
    run(one)
    run(other)
    assert not equal(what_was_learned(one), what_was_learned(other))


def test_a_trial_leaves_the_processes_random_numbers_as_they_were(start: Start, tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    training = start("dmtg")
    run(training)
    training.finish(tmp_path)
    assert torch.equal(torch.rand(4), expected)


@every_family
def test_training_learns(family: str, start: Start) -> None:
    training = start(family, width=24)
    training.assignment = replace(training.assignment, epochs=25)
    measured = run(training)
    first, last = (measurement.values["total_error"] for measurement in (measured[0], measured[-1]))
    assert first is not None
    assert last is not None
    assert last < 0.7 * first


def test_each_epoch_is_measured_once_and_says_who_measured_it(start: Start) -> None:
    measured = run(start())
    assert [measurement.epoch for measurement in measured] == [1, 2, 3, 4]
    assert {measurement.worker for measurement in measured} == {worker_name()}
    for measurement in measured:
        assert set(measurement.tasks) == set(Digits.tasks().names)
        assert measurement.values.keys() >= {
            "delta_m",
            "normalized_gain",
            "total_error",
            "task.left_loop.error",
            "task.left_loop.auc",
        }


@every_family
def test_each_epochs_measurement_has_the_cost_that_is_expected_of_the_network(
    family: str, start: Start
) -> None:
    training = start(family)
    for measurement in run_one_by_one(training):
        cost = training.network.expected_cost()
        assert measurement.values["macs"] == cost.macs > 0
        assert measurement.values["params"] == cost.params > 0


def test_the_expected_cost_follows_the_gates_and_comes_to_the_exact_one(start: Start, tmp_path: Path) -> None:
    training = start("interrogate", sparsity_weight=5.0, gate_lr=0.5)
    macs = [measurement.values["macs"] for measurement in run(training)]
    assert macs[0] > macs[-1]  # type: ignore[operator]
    assert training.finish(tmp_path).values["macs"] == macs[-1]  # its gates are held in the last epoch


def test_a_cost_that_is_no_number_is_left_open(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    training = start()
    monkeypatch.setattr(training.network, "expected_cost", lambda: Cost(macs=float("nan"), params=7))
    measurement = training.run_epoch()
    assert measurement.values["macs"] is None
    assert measurement.values["params"] == 7


def test_gains_are_measured_against_the_yardstick(start: Start, yardstick: Yardstick) -> None:
    measurement = start().run_epoch()
    errors = {name: values["error"] for name, values in measurement.tasks.items()}
    gains = [(0.2 - error) / 0.2 for error in errors.values()]
    assert {metrics["error"] for metrics in yardstick.validation.values()} == {0.2}
    assert measurement.values["delta_m"] == pytest.approx(100 * sum(gains) / 6)
    assert measurement.values["total_error"] == pytest.approx(100 * sum(errors.values()))


def test_a_tasks_weight_matters(start: Start, bench: Bench) -> None:
    heavy = TaskSet(replace(task, weight=100.0 if task.name == "left_loop" else 1e-3) for task in bench.tasks)
    plain, weighted = start(), start(bench=replace(bench, tasks=heavy))
    run(plain)
    run(weighted)
    assert not equal(what_was_learned(plain), what_was_learned(weighted))


# Interruptions


@pytest.mark.parametrize(("family", "changes"), PHASED, ids=PHASED_IDS)
def test_a_restored_trial_goes_on_bit_by_bit_as_if_never_interrupted(
    family: str, changes: dict[str, Any], start: Start, tmp_path: Path
) -> None:
    whole = start(family, seed=5, **changes)
    expected = []
    while not whole.done:
        expected.append(whole.run_epoch())
        whole.save(tmp_path / str(whole.epoch))
    for after in range(1, EPOCHS + 1):
        restored = start(family, seed=5, **changes)
        repeated = restored.restore(tmp_path / str(after))
        assert [timeless(m) for m in repeated] == [timeless(m) for m in expected[:after]]
        assert [timeless(m) for m in run(restored)] == [timeless(m) for m in expected[after:]]
        assert equal(what_was_learned(restored), what_was_learned(whole))


@every_family
def test_a_trial_may_be_interrupted_after_every_epoch(family: str, start: Start, tmp_path: Path) -> None:
    whole = start(family)
    run(whole)
    for _ in range(EPOCHS):
        training = start(family)
        training.restore(tmp_path)
        training.run_epoch()
        training.save(tmp_path)
    assert training.done
    assert equal(what_was_learned(training), what_was_learned(whole))


@pytest.mark.parametrize(("family", "changes"), PHASED, ids=PHASED_IDS)
def test_a_trial_ends_the_same_whether_interrupted_or_not(
    family: str, changes: dict[str, Any], start: Start, tmp_path: Path
) -> None:
    endings = []
    for interrupted in (False, True):
        training = start(family, **changes)
        if interrupted:
            training.run_epoch()
            training.save(tmp_path)
            training = start(family, **changes)
            training.restore(tmp_path)
        run(training)
        folder = tmp_path / str(interrupted)
        folder.mkdir()
        endings.append(training.finish(folder))
    one, other = (
        (
            {name: value for name, value in ending.values.items() if name not in TIMES},
            {name: value for name, value in ending.test.items() if name not in TIMES},
            ending.tasks,
            ending.grouping,
            ending.epochs,
            ending.files["weights.safetensors"],
        )
        for ending in endings
    )
    assert one == other


def test_there_is_nothing_to_restore_without_a_checkpoint(start: Start, tmp_path: Path) -> None:
    training = start()
    assert training.restore(tmp_path / "nowhere") == []
    assert training.epoch == 0


def test_a_checkpoint_of_another_versions_format_is_left_alone(start: Start, tmp_path: Path) -> None:
    training = start()
    training.run_epoch()
    training.save(tmp_path)
    path = tmp_path / CHECKPOINT
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata={"training": "{}"})
    again = start()
    assert again.restore(tmp_path) == []
    assert again.epoch == 0


def test_a_checkpoint_holds_no_more_than_the_latest_measurements(start: Start, tmp_path: Path) -> None:
    training = start()
    for _ in range(MEASUREMENTS_KEPT + 3):
        training.run_epoch()
    training.save(tmp_path)
    found = start().restore(tmp_path)
    assert [measurement.epoch for measurement in found] == list(range(4, MEASUREMENTS_KEPT + 4))


def test_a_network_whose_last_step_broke_it_is_no_result(start: Start, tmp_path: Path) -> None:
    training = start()
    run(training)
    with torch.no_grad():
        next(training.network.parameters()).fill_(float("inf"))
    with pytest.raises(Diverged, match="not finite"):
        training.finish(tmp_path)
    assert not any(tmp_path.iterdir())


def test_half_a_checkpoint_is_never_read(start: Start, tmp_path: Path) -> None:
    half = tmp_path / f"{CHECKPOINT}.4711.part"
    half.write_bytes(b"\x00\x01 half of one")
    assert start().restore(tmp_path) == []
    training = start()
    training.run_epoch()
    training.save(tmp_path)
    half.write_bytes(b"\x00\x01 half of the next one")
    [restored] = start().restore(tmp_path)
    assert restored.epoch == 1


def test_a_save_that_is_cut_short_leaves_the_old_checkpoint(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = start()
    training.run_epoch()
    training.save(tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()
    monkeypatch.setattr(Path, "replace", _power_cut)
    training.run_epoch()
    with pytest.raises(KeyboardInterrupt):
        training.save(tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [CHECKPOINT]


def _power_cut(self: Path, target: Path) -> Path:
    raise KeyboardInterrupt


def test_only_the_last_checkpoint_is_kept_and_it_can_be_dropped(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "trial_1"
    training = start()
    for _ in range(3):
        training.run_epoch()
        training.save(folder)
    assert [path.name for path in folder.iterdir()] == [CHECKPOINT]
    FolderArtifacts(tmp_path).drop_checkpoint("trial_1")
    FolderArtifacts(tmp_path).drop_checkpoint("trial_1")  # as often as one likes
    assert not folder.exists()


def test_a_checkpoint_holds_no_pickle(start: Start, tmp_path: Path) -> None:
    training = start("dmtg")
    training.run_epoch()
    training.save(tmp_path)
    assert load_file(tmp_path / CHECKPOINT)  # nothing but tensors and text


def test_device_seconds_go_on_over_an_interruption_and_leave_it_out(start: Start, tmp_path: Path) -> None:
    training = start()
    first = training.run_epoch()
    second = training.run_epoch()
    assert 0 < first.device_seconds < second.device_seconds
    training.save(tmp_path)
    time.sleep(0.3)
    restored = start()
    assert restored.restore(tmp_path) == [first, second]
    assert restored.device_seconds == second.device_seconds
    third = restored.run_epoch()
    assert second.device_seconds < third.device_seconds < second.device_seconds + 0.3


def test_a_trial_is_charged_for_all_devices_it_reserves(digits: Dataset, start: Start) -> None:
    benches = [make_bench(Digits.tasks(), digits, cpus=cpus, gpus=0) for cpus in (1, 1000.0)]
    torch.set_num_threads(1)
    assert [bench.devices for bench in benches] == [1, 1000]
    one, thousand = (run(start(bench=bench))[-1].device_seconds for bench in benches)
    assert thousand > 100 * one


# Failures


@every_family
def test_a_training_that_explodes_says_so(family: str, start: Start) -> None:
    training = start(family, lr=1e15)
    with pytest.raises(Diverged, match=r"the training loss is (nan|inf) in epoch 1"):
        run(training)


def test_each_batch_is_shown_before_it_is_trained_on(start: Start, bench: Bench) -> None:
    training, shown = start(), []
    weight = next(training.network.parameters())
    before = weight.detach().clone()

    def look(x: Tensor, targets: Mapping[str, Tensor]) -> None:
        if not shown:
            assert torch.equal(weight, before)
        assert set(targets) == set(bench.tasks.names)
        shown.append(len(x))

    training.run_epoch(before_step=look)
    assert sum(shown) == len(bench.train.inputs)


def test_inputs_that_are_no_numbers_say_so(bench: Bench, start: Start) -> None:
    inputs = bench.train.inputs.clone()
    inputs[17, 3, 3] = torch.nan
    training = start(bench=replace(bench, train=replace(bench.train, inputs=inputs)))
    with pytest.raises(Diverged, match="nan in epoch 1"):
        training.run_epoch()
    assert training.epoch == 0  # it was not trained to its end, and not measured


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("shared", {"width": 0}),
        ("dmtg", {"tau": -1.0}),
        ("dmtg", {"split": 2}),
        ("grouped", {"grouping": [["left_loop"]]}),
    ],
)
def test_an_impossible_candidate_is_refused_at_the_start(
    family: str, changes: dict[str, Any], start: Start
) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        start(family, **changes)


# Endings


@pytest.fixture
def ended(start: Start, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Training, Ending, Path]:
    training = start(request.param)
    run(training)
    return training, training.finish(tmp_path), tmp_path


ended_of_every_family = pytest.mark.parametrize("ended", sorted(FAMILIES), indirect=True)


@ended_of_every_family
def test_the_figures_are_those_of_the_exported_network_on_raw_inputs(
    ended: tuple[Training, Ending, Path], digits: Dataset, yardstick: Yardstick
) -> None:
    _, ending, folder = ended
    tasks = Digits.tasks()
    network = load_architecture(folder)
    for split, reference, values in (
        (digits.validation, yardstick.validation, ending.values),
        (digits.test, yardstick.test, ending.test),
    ):
        targets = {name: torch.tensor(labels) for name, labels in split.targets.items()}
        evaluator = Evaluator(tasks)
        with torch.no_grad():
            evaluator.update(network(torch.tensor(split.inputs)), targets)
        found = evaluator.compute()
        expected = combined_metrics(found, reference, tasks) | task_metrics(found)
        assert {metric: values[metric] for metric in expected} == pytest.approx(expected, rel=1e-5)
        assert values["macs"] == count_cost(network, digits.input_shape).macs
        assert values["params"] == count_cost(network, digits.input_shape).params
        name = "validation" if split is digits.validation else "test"
        assert {
            f"task.{task}.{metric}": value
            for task, figures in ending.tasks.items()
            for metric, value in figures[name].items()
        } == {metric: values[metric] for metric in task_metrics(found)}


@ended_of_every_family
def test_an_ending_has_every_metric_of_the_catalogue(ended: tuple[Training, Ending, Path]) -> None:
    training, ending, _ = ended
    assert ending.state is TrialState.COMPLETED
    assert set(ending.values) == set(ending.test) == set(metric_directions(Digits.tasks()))
    assert set(METRICS) <= set(ending.values)
    for values in (ending.values, ending.test):
        # The yardstick knows no single-task networks of other sizes.
        assert {metric for metric, value in values.items() if value is None} == {"delta_m_own_width"}
        assert all(np.isfinite(value) for value in values.values() if value is not None)
    assert ending.epochs == EPOCHS
    assert ending.device_seconds == ending.values["train_device_seconds"] == training.device_seconds


@ended_of_every_family
def test_the_grouping_is_that_of_the_exported_network(ended: tuple[Training, Ending, Path]) -> None:
    training, ending, folder = ended
    family = training.assignment.candidate.family
    document = json.loads((folder / "architecture.json").read_text())
    assert ending.grouping == document["grouping"]
    names = list(Digits.tasks().names)
    expected = {"single": [[name] for name in names], "shared": [names], "grouped": SIDES}
    if family in expected:
        assert ending.grouping == expected[family]


@ended_of_every_family
def test_the_files_are_described_as_they_are(ended: tuple[Training, Ending, Path]) -> None:
    training, ending, folder = ended
    assert (
        set(ending.files)
        == {"architecture.json", "weights.safetensors"}
        == {path.name for path in folder.iterdir()}
    )
    for name, file in ending.files.items():
        content = (folder / name).read_bytes()
        assert (file.size, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    document = json.loads((folder / "architecture.json").read_text())
    assert document["trial"] == "trial_1"
    assert document["seed"] == training.assignment.seed
    assert document["candidate"] == training.assignment.candidate.parameters
    assert document["metrics"] == {"validation": ending.values, "test": ending.test}


@every_family
def test_finishing_twice_gives_the_same_as_a_kill_before_the_report_does(
    family: str, start: Start, tmp_path: Path
) -> None:
    training = start(family)
    run(training)
    one, other = training.finish(tmp_path), training.finish(tmp_path)
    assert one.files["weights.safetensors"] == other.files["weights.safetensors"]
    assert one.tasks == other.tasks


def test_the_test_split_changes_nothing_but_the_report(digits: Dataset, start: Start, tmp_path: Path) -> None:
    poison = Split(
        inputs=digits.test.inputs[::-1].copy(),
        targets={name: 1 - labels for name, labels in digits.test.targets.items()},
    )
    seen = []
    for test in (digits.test, poison):
        bench = make_bench(Digits.tasks(), replace(digits, test=test), cpus=1, gpus=0)
        training = start("dmtg", bench=bench)
        measured = [timeless(measurement) for measurement in run(training)]
        ending = training.finish(tmp_path)
        values = {name: value for name, value in ending.values.items() if name not in TIMES}
        weights = ending.files["weights.safetensors"]
        seen.append((measured, values, weights, ending.grouping, ending.test["total_error"]))
    assert seen[0][:4] == seen[1][:4]
    assert seen[0][4] != seen[1][4]


def test_inputs_are_standardised_with_the_training_splits_statistics(bench: Bench, digits: Dataset) -> None:
    assert float(bench.train.inputs.mean()) == pytest.approx(0, abs=1e-5)
    assert float(bench.train.inputs.std(correction=0)) == pytest.approx(1, abs=1e-5)
    expected = (digits.test.inputs - digits.mean) / digits.std
    assert torch.allclose(bench.test.inputs, torch.tensor(expected), atol=1e-5)


def test_a_bench_has_the_jobs_tasks_and_no_other(digits: Dataset) -> None:
    two = TaskSet(task for task in Digits.tasks() if task.name.endswith("loop"))
    bench = make_bench(two, digits, cpus=1, gpus=0)
    for samples in (bench.train, bench.validation, bench.test):
        assert set(samples.targets) == {"left_loop", "right_loop"}
