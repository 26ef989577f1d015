"""Dense tasks with missing labels: a small job on images, from its plan to its front."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coterie.models.export import load_architecture
from coterie.models.metrics import Evaluator
from coterie.models.tasks import KIND_METRICS, TaskKind
from coterie.search import plan as plan_module
from coterie.search.baselines import (
    make_reference_point,
    make_yardstick,
    yardstick_candidate,
    yardstick_keys,
)
from coterie.search.data.base import Dataset
from coterie.search.data.digits import Digits
from coterie.search.faults import SpecError
from coterie.search.front import Front
from coterie.search.objective import Yardstick, task_metrics
from coterie.search.plan import Plan, make_plan
from coterie.search.sampler import OptunaSampler
from coterie.search.spec import JobSpec
from coterie.search.store import Candidate, Ending, Measurement, TrialState
from coterie.search.trial import Assignment, Bench, Training, make_bench, train_reference
from tests.search.shapes import Shapes, ShapesOptions

DENSE = ["segmentation", "depth", "normals"]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "sources", lambda: {"digits": Digits, "shapes": Shapes})


@pytest.fixture(scope="module")
def data() -> Dataset:
    return Shapes.load(ShapesOptions())


@pytest.fixture(scope="module")
def bench(data: Dataset) -> Bench:
    return make_bench(Shapes.tasks(), data, cpus=1, gpus=0)


@pytest.fixture(scope="module")
def yardstick() -> Yardstick:
    values = {task.name: dict.fromkeys(KIND_METRICS[task.kind], 0.5) for task in Shapes.tasks()}
    return Yardstick(validation=values, test=values, costs={})


Start = Callable[..., Training]


@pytest.fixture
def start(bench: Bench, yardstick: Yardstick) -> Start:
    def start(family: str, epochs: int = 3, bench: Bench = bench, **changes: Any) -> Training:
        parameters = {"lr": 1e-2, "weight_decay": 1e-6, "batch_size": 32, "width": 0.125} | changes
        candidate = Candidate(family=family, backbone="cnn", parameters=parameters)
        assignment = Assignment(trial_id="trial_1", candidate=candidate, seed=3, epochs=epochs)
        return Training(assignment, bench, yardstick)

    return start


def plan_of(**fields: Any) -> Plan:
    document = {
        "dataset": {"source": "shapes"},
        "tasks": DENSE,
        "search": {
            "families": ["shared", "dmtg"],
            "space": {family: {"width": 0.125} for family in ("shared", "dmtg")},
        },
        "budget": {"trials": 2, "epochs": 2},
    }
    return make_plan(JobSpec.model_validate(document | fields))


def run(training: Training) -> list[Measurement]:
    measured = []
    while not training.done:
        measured.append(training.run_epoch())
    return measured


def timeless(measurement: Measurement) -> Measurement:
    return replace(measurement, device_seconds=0.0, worker="")


@pytest.mark.usefixtures("registered")
def test_a_job_of_dense_tasks_runs_to_its_front(bench: Bench, tmp_path: Path) -> None:
    objectives = ["delta_m", "task.depth.rel_error", "peak_memory_mb"]
    plan = plan_of(objectives=[{"metric": metric} for metric in objectives])
    bench = replace(bench, tasks=plan.tasks)
    candidate = yardstick_candidate(plan)
    tasks = {task.name: task for task in plan.tasks}
    references = {
        key: train_reference(tasks[key.task], candidate, key.seed, key.epochs, bench)
        for key in yardstick_keys(plan)
    }
    yardstick = make_yardstick(plan, references)
    front = Front(plan.objectives, make_reference_point(plan, yardstick))
    sampler = OptunaSampler("tpe", plan.space, plan.objectives, [], seed=0)
    for number in range(2):
        proposal = sampler.ask(number)
        assert proposal is not None
        candidate = proposal.candidate
        training = Training(
            Assignment(trial_id=f"trial_{number}", candidate=candidate, seed=number, epochs=2),
            bench,
            yardstick,
        )
        run(training)
        ending = training.finish(tmp_path)
        assert candidate.family == ("shared", "dmtg")[number]
        assert ending.state is TrialState.COMPLETED
        assert "total_error" not in ending.values
        assert set(ending.tasks["normals"]["test"]) == set(KIND_METRICS[TaskKind.NORMALS])
        measured = {name: value for name, value in ending.values.items() if name != "delta_m_own_width"}
        assert all(value is not None and np.isfinite(value) for value in measured.values())
        volume = front.insert(f"trial_{number}", ending.values).hypervolume
        assert volume is not None
        assert volume > 0
    assert front.points


@pytest.mark.usefixtures("registered")
def test_error_rates_are_refused_where_no_task_classifies() -> None:
    for metric in ("total_error", "normalized_gain"):
        with pytest.raises(SpecError, match=f"'{metric}' needs a task that classifies .*; there are delta_m"):
            plan_of(objectives=[{"metric": metric}])
        plan_of(objectives=[{"metric": metric}], tasks=[*DENSE, "left"])


@pytest.mark.usefixtures("registered")
def test_a_network_of_vectors_is_refused_for_a_dense_task() -> None:
    with pytest.raises(SpecError) as found:
        plan_of(search={"families": ["shared"], "backbones": ["cnn", "mlp"]})
    [fault] = found.value.faults
    assert fault.pointer == "/search/backbones/1"
    assert "'segmentation' is a segmentation task: backbone: 'mlp' gives a vector" in fault.detail


@pytest.fixture(params=["shared", "dmtg", "interrogate", "etr_nlp"])
def trained(request: pytest.FixtureRequest, start: Start, tmp_path: Path) -> tuple[Training, Ending, Path]:
    family: dict[str, Any] = {"dmtg": {"groups": 2, "fine_tune": 0.4}}.get(request.param, {})
    training = start(request.param, **family)
    run(training)
    return training, training.finish(tmp_path), tmp_path


def test_the_figures_are_those_of_the_exported_network_on_raw_inputs(
    trained: tuple[Training, Ending, Path], data: Dataset
) -> None:
    _, ending, folder = trained
    network, tasks = load_architecture(folder), Shapes.tasks()
    for split, values in ((data.validation, ending.values), (data.test, ending.test)):
        evaluator = Evaluator(tasks)
        with torch.no_grad():
            outputs = network(torch.tensor(split.inputs))
        evaluator.update(outputs, {name: torch.tensor(labels) for name, labels in split.targets.items()})
        expected = task_metrics(evaluator.compute())
        assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("shared", {"balancing": "pcgrad"}),
        ("dmtg", {"groups": 2, "fine_tune": 0.4, "init": "affinity"}),
        ("interrogate", {}),
        ("dmtg+interrogate", {"groups": 2}),
        ("etr_nlp", {}),
    ],
)
def test_a_restored_trial_on_images_goes_on_bit_by_bit(
    family: str, changes: dict[str, Any], start: Start, tmp_path: Path
) -> None:
    whole = start(family, **changes)
    expected = []
    while not whole.done:
        expected.append(whole.run_epoch())
        whole.save(tmp_path / str(whole.epoch))
    for after in range(1, len(expected)):
        restored = start(family, **changes)
        restored.restore(tmp_path / str(after))
        assert [timeless(found) for found in run(restored)] == [timeless(found) for found in expected[after:]]


def test_the_layout_in_memory_changes_what_is_learned_by_rounding_only(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused Adam goes through memory: a gradient or a moment of other strides would train other weights."""
    fast = start("shared", epochs=2, balancing="pcgrad")
    plain = start("shared", epochs=2, balancing="pcgrad")
    monkeypatch.setattr(plain, "_format", torch.contiguous_format)
    plain.network.to(memory_format=torch.contiguous_format)
    one, other = run(fast)[-1], run(plain)[-1]
    assert task_metrics(one.tasks) == pytest.approx(task_metrics(other.tasks), rel=0.02, abs=0.02)
    assert fast.network.backbone.input_shape == Shapes.shape()


def test_what_is_no_number_on_the_test_split_is_left_out_of_the_report(
    bench: Bench, start: Start, tmp_path: Path
) -> None:
    glare = replace(bench.test, inputs=torch.full_like(bench.test.inputs, 3e38))
    seen = []
    for test in (bench.test, glare):
        training = start("shared", bench=replace(bench, test=test))
        run(training)
        seen.append(training.finish(tmp_path))
    plain, dazzled = seen
    assert dazzled.test["task.depth.rmse"] is None
    assert dazzled.tasks["depth"]["test"]["rmse"] is None
    assert dazzled.tasks["depth"]["validation"] == plain.tasks["depth"]["validation"]
    assert dazzled.state is TrialState.COMPLETED


def test_a_task_learns_from_the_labels_that_are_there(start: Start) -> None:
    first, *_, last = run(start("shared", epochs=15))
    for task, metric in (("segmentation", "miou"), ("normals", "within_30")):
        assert last.tasks[task][metric] > first.tasks[task][metric]
    assert last.tasks["depth"]["rel_error"] < first.tasks["depth"]["rel_error"]


def test_what_labels_are_missing_in_the_test_split_changes_no_training(data: Dataset, start: Start) -> None:
    hidden = {name: labels.copy() for name, labels in data.test.targets.items()}
    hidden["depth"][1:] = np.nan
    other = replace(data, test=replace(data.test, targets=hidden))
    benches = [make_bench(Shapes.tasks(), one, cpus=1, gpus=0) for one in (data, other)]
    found = [[timeless(m) for m in run(start("shared", bench=one))] for one in benches]
    assert found[0] == found[1]
