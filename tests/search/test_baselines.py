"""The yardstick: what it is the mean of, who shares it, and the worst values that still count."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from coterie.models.tasks import KIND_METRICS, TaskKind, TaskSet
from coterie.search.baselines import (
    YARDSTICK_SEEDS,
    make_reference_point,
    make_yardstick,
    yardstick_candidate,
    yardstick_keys,
)
from coterie.search.data.base import Dataset
from coterie.search.front import Front
from coterie.search.objective import METRICS, Yardstick
from coterie.search.plan import Plan, make_plan
from coterie.search.spec import JobSpec
from coterie.search.store import Reference, ReferenceKey
from coterie.search.trial import Assignment, Bench, Training, make_bench, train_reference

MakeJob = Callable[..., JobSpec]


@pytest.fixture(scope="module")
def plan(make_job: MakeJob) -> Plan:
    return make_plan(make_job())


@pytest.fixture(scope="module")
def bench(digits: Dataset, plan: Plan) -> Bench:
    return make_bench(plan.tasks, digits, cpus=1, gpus=0)


def reference(error: float, seconds: float = 1.0) -> Reference:
    metrics = KIND_METRICS[TaskKind.BINARY]
    return Reference(
        validation=dict.fromkeys(metrics, error),
        test=dict.fromkeys(metrics, 2 * error),
        device_seconds=seconds,
        latency_ms=error,
    )


def timeless(found: Reference) -> Reference:
    return replace(found, device_seconds=0.0, latency_ms=0.0)


def test_the_candidate_is_single_task_networks_of_default_width_and_recipe(make_job: MakeJob) -> None:
    narrowed = make_plan(
        make_job(search={"families": ["shared"], "space": {"shared": {"width": 8, "lr": 1e-3}}})
    )
    candidate = yardstick_candidate(narrowed)
    assert (candidate.family, candidate.backbone) == ("single", "mlp")
    assert candidate.parameters == {
        "width": 24,
        "depth": 2,
        "lr": 5e-3,
        "weight_decay": 1e-6,
        "batch_size": 64,
        "balancing": "fixed",
    }


def test_three_fixed_seeds_of_each_task_are_needed_whatever_the_jobs_seed(make_job: MakeJob) -> None:
    keys = yardstick_keys(make_plan(make_job(seed=99)))
    assert len(set(keys)) == len(keys) == 3 * 6
    assert {key.seed for key in keys} == set(YARDSTICK_SEEDS) == {0, 1, 2}
    assert keys == yardstick_keys(make_plan(make_job(seed=1)))


def test_jobs_share_the_references_of_the_tasks_that_they_share(make_job: MakeJob) -> None:
    def keys(**fields: Any) -> set[ReferenceKey]:
        return set(yardstick_keys(make_plan(make_job(**fields))))

    every = keys()
    left = keys(tasks=["left_loop", {"name": "left_parity", "weight": 9}], search={"families": ["shared"]})
    right = keys(tasks=["left_loop", "right_loop"], seed=5, objectives=[{"metric": "total_error"}])
    assert left < every
    assert right < every
    assert {key.task for key in left & right} == {"left_loop"}


@pytest.mark.parametrize(
    "fields",
    [
        {"dataset": {"source": "digits", "options": {"samples": 301}}},
        {"dataset": {"source": "digits", "options": {"samples": 300, "seed": 1}}},
        {"budget": {"trials": 3, "epochs": 3}},
    ],
)
def test_other_data_or_epochs_need_other_references(fields: dict[str, Any], make_job: MakeJob) -> None:
    assert not set(yardstick_keys(make_plan(make_job(**fields)))) & set(yardstick_keys(make_plan(make_job())))


def test_the_yardstick_is_the_mean_over_the_seeds(plan: Plan) -> None:
    errors = {key: 0.01 * (1 + number) for number, key in enumerate(yardstick_keys(plan))}
    yardstick = make_yardstick(plan, {key: reference(error) for key, error in errors.items()})
    for name in plan.tasks.names:
        of_task = [error for key, error in errors.items() if key.task == name]
        assert len(of_task) == 3
        assert set(yardstick.validation[name]) == set(KIND_METRICS[TaskKind.BINARY])
        for metric, value in yardstick.validation[name].items():
            assert value == pytest.approx(sum(of_task) / 3)
            assert yardstick.test[name][metric] == pytest.approx(2 * sum(of_task) / 3)


def test_its_costs_are_those_of_one_whole_set_of_networks(plan: Plan) -> None:
    yardstick = make_yardstick(plan, {key: reference(0.1, seconds=2.0) for key in yardstick_keys(plan)})
    macs = 6 * (144 * 24 + 24 * 24 + 24)
    params = macs + 6 * (24 + 24 + 1)
    assert yardstick.costs["macs"] == macs
    assert yardstick.costs["params"] == params
    assert yardstick.costs["latency_ms"] == pytest.approx(6 * 0.1)
    assert yardstick.costs["train_device_seconds"] == pytest.approx(6 * 2)


def test_a_reference_does_not_depend_on_which_other_tasks_there_are(
    plan: Plan, bench: Bench, digits: Dataset
) -> None:
    candidate = yardstick_candidate(plan)
    for task in list(plan.tasks)[:2]:
        alone = make_bench(TaskSet([task]), digits, cpus=1, gpus=0)
        found = [timeless(train_reference(task, candidate, 1, 2, where)) for where in (bench, alone)]
        assert found[0] == found[1]


def test_a_reference_does_not_depend_on_the_weight_that_one_job_gives_its_task(
    plan: Plan, bench: Bench
) -> None:
    task, candidate = plan.tasks[0], yardstick_candidate(plan)
    found = [
        timeless(train_reference(replace(task, weight=weight), candidate, 0, 8, bench))
        for weight in (1.0, 1e-6, 1e6)
    ]
    assert found[0] == found[1] == found[2]


def test_a_reference_is_its_seeds(plan: Plan, bench: Bench) -> None:
    candidate = yardstick_candidate(plan)
    one, again, other = (train_reference(plan.tasks[0], candidate, seed, 2, bench) for seed in (0, 0, 1))
    assert timeless(one) == timeless(again) != timeless(other)
    assert one.device_seconds > 0
    assert one.latency_ms > 0


def test_a_reference_is_what_a_trial_of_that_one_task_reaches(
    plan: Plan, bench: Bench, yardstick: Yardstick
) -> None:
    task, candidate = plan.tasks[3], yardstick_candidate(plan)
    found = train_reference(task, candidate, 2, 3, bench)
    training = Training(
        Assignment(trial_id="", candidate=candidate, seed=2, epochs=3),
        replace(bench, tasks=TaskSet([task])),
        yardstick,
    )
    while not training.done:
        measurement = training.run_epoch()
    assert measurement.tasks[task.name] == found.validation


OBJECTIVES = [
    ["delta_m", "macs"],
    ["params", "total_error", "normalized_gain"],
    ["task.left_loop.error", "latency_ms", "train_device_seconds"],
    ["task.left_loop.accuracy", "task.right_loop.auc", "peak_memory_mb"],
]


@pytest.mark.parametrize("metrics", OBJECTIVES)
def test_the_reference_point_is_the_worst_that_counts(
    metrics: list[str], make_job: MakeJob, yardstick: Yardstick
) -> None:
    plan = make_plan(make_job(objectives=[{"metric": metric} for metric in metrics]))
    point = make_reference_point(plan, yardstick)
    largest = plan.largest_cost()
    expected = {
        "delta_m": -300.0,
        "normalized_gain": -300.0,
        "macs": 1.1 * largest["macs"],
        "params": 1.1 * largest["params"],
        "total_error": 600.0,
        "task.left_loop.error": 1.0,
        "task.left_loop.accuracy": 0.0,
        "task.right_loop.auc": 0.0,
        "peak_memory_mb": 1.1 * largest["peak_memory_mb"],
        "latency_ms": 10 * yardstick.costs["latency_ms"],
        "train_device_seconds": 10 * yardstick.costs["train_device_seconds"],
    }
    assert point == {metric: expected[metric] for metric in metrics}
    assert set(METRICS) <= set(expected)


def test_a_candidate_that_gains_nothing_still_adds_to_the_hypervolume(
    plan: Plan, yardstick: Yardstick
) -> None:
    front = Front(plan.objectives, make_reference_point(plan, yardstick))
    volume = front.insert("shared", {"delta_m": -150.0, "macs": 4000.0}).hypervolume
    assert volume is not None
    assert volume > 0
