"""The yardstick: what it is the mean of, who shares it, and the worst values that still count."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from coterie.models.tasks import KIND_METRICS, TaskKind, TaskSet
from coterie.search.baselines import (
    default_candidate,
    make_reference_point,
    make_yardstick,
    needed_references,
    own_width_keys,
    reference_candidate,
    side_setting,
    sizes_key,
    yardstick_candidate,
    yardstick_keys,
)
from coterie.search.data.base import Dataset
from coterie.search.front import Front
from coterie.search.objective import (
    METRICS,
    YARDSTICK_SEEDS,
    SplitName,
    TaskValues,
    Yardstick,
    own_width_gain,
)
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


def test_what_is_trained_beside_the_trials_is_a_shared_network_in_the_references_setting(plan: Plan) -> None:
    setting, key = side_setting(plan), yardstick_keys(plan)[0]
    assert (setting.data, setting.backbone, setting.recipe, setting.epochs) == (
        key.data,
        key.backbone,
        key.recipe,
        key.epochs,
    )
    shared, single = default_candidate(plan, "shared"), default_candidate(plan, "single")
    assert replace(shared, family="single") == single == yardstick_candidate(plan)


def test_networks_that_a_gpu_trains_are_others(make_job: MakeJob) -> None:
    keys = [set(yardstick_keys(make_plan(make_job(resources={"gpus": gpus})))) for gpus in (0, 0.5, 1)]
    assert not keys[0] & keys[1]
    assert keys[1] == keys[2]


def test_a_key_says_what_its_network_is(plan: Plan) -> None:
    assert all(reference_candidate(key) == yardstick_candidate(plan) for key in yardstick_keys(plan))
    for sizes, keys in own_width_keys(plan).items():
        assert {sizes_key(reference_candidate(key)) for key in keys} == {sizes}


def own_width_job(**fields: Any) -> dict[str, Any]:
    return {
        "tasks": ["left_loop", "right_loop"],
        "search": {
            "families": ["shared", "etr_nlp"],
            "space": {"shared": {"width": [24, 48], "depth": 2}, "etr_nlp": {"width": 32, "depth": [1, 2]}},
        },
    } | fields


def test_every_size_of_the_space_has_references_of_its_own(make_job: MakeJob) -> None:
    plan = make_plan(make_job(**own_width_job()))
    keys = own_width_keys(plan)
    sizes = [(24, 2), (48, 2), (32, 1), (32, 2)]
    assert list(keys) == [f'["mlp", {{"depth": {depth}, "width": {width}}}]' for width, depth in sizes]
    assert all(len(of_size) == 2 * 3 for of_size in keys.values())
    assert keys[sizes_key(yardstick_candidate(plan))] == yardstick_keys(plan)


def test_of_more_sizes_than_anybody_would_train_only_the_default_one_is_looked_for(make_job: MakeJob) -> None:
    plan = make_plan(make_job(search={"backbones": ["mlp", "vit_tiny"], "families": ["shared"]}))
    assert own_width_keys(plan) == {sizes_key(yardstick_candidate(plan)): yardstick_keys(plan)}


@pytest.mark.parametrize(
    "fields",
    [
        {"objectives": [{"metric": "delta_m"}, {"metric": "delta_m_own_width"}]},
        {"constraints": [{"metric": "delta_m_own_width", "min": 0}]},
        {"search": {"scheduler": {"name": "asha", "metric": "delta_m_own_width"}}},
    ],
)
def test_they_are_trained_before_the_search_only_where_it_is_decided_by_them(
    fields: dict[str, Any], make_job: MakeJob
) -> None:
    plain = make_plan(make_job(**own_width_job()))
    assert needed_references(plain) == yardstick_keys(plain)
    search = own_width_job()["search"] | fields.get("search", {})
    plan = make_plan(make_job(**own_width_job(**fields | {"search": search})))
    needed = needed_references(plan)
    assert len(set(needed)) == len(needed) == 4 * 2 * 3
    assert set(needed) == {key for keys in own_width_keys(plan).values() for key in keys}


def test_a_gain_over_ones_own_width_is_known_where_all_references_of_the_size_are(make_job: MakeJob) -> None:
    plan = make_plan(make_job(**own_width_job()))
    keys = own_width_keys(plan)
    default, wide, *others = keys
    known = {key: reference(0.2) for key in keys[default]} | {key: reference(0.1) for key in keys[wide]}
    known |= {key: reference(0.1) for key in keys[others[0]][:-1]}  # one is missing
    yardstick = make_yardstick(plan, known)
    assert set(yardstick.own_width) == {default, wide}
    reached = {name: dict.fromkeys(KIND_METRICS[TaskKind.BINARY], 0.1) for name in plan.tasks.names}
    gains = {
        sizes: own_width_gain(reached, yardstick, sizes, "validation", plan.tasks)
        for sizes in (default, wide)
    }
    assert gains == {default: pytest.approx(50.0), wide: pytest.approx(0.0)}
    assert own_width_gain(reached, yardstick, wide, "test", plan.tasks) == pytest.approx(50.0)
    assert own_width_gain(reached, yardstick, others[0], "validation", plan.tasks) is None
    assert yardstick.validation["left_loop"]["error"] == pytest.approx(0.2)  # the others don't move it


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


def test_a_trial_says_its_gain_over_its_own_width_where_that_is_known(
    plan: Plan, bench: Bench, yardstick: Yardstick
) -> None:
    task, candidate = plan.tasks[0], yardstick_candidate(plan)
    own: dict[SplitName, TaskValues] = {"validation": yardstick.test, "test": yardstick.test}
    known = replace(yardstick, own_width={sizes_key(candidate): own})
    alone = replace(bench, tasks=TaskSet([task]))
    gains = [
        Training(Assignment(trial_id="", candidate=what, seed=0, epochs=1), alone, known).run_epoch().values
        for what in (candidate, replace(candidate, parameters={**candidate.parameters, "width": 32}))
    ]
    error = 0.25 * (1 - (gains[0]["delta_m_own_width"] or 0) / 100)
    assert 0.2 * (1 - (gains[0]["delta_m"] or 0) / 100) == pytest.approx(error)
    assert gains[1]["delta_m_own_width"] is None


OBJECTIVES = [
    ["delta_m", "macs"],
    ["params", "total_error", "normalized_gain"],
    ["task.left_loop.error", "latency_ms", "train_device_seconds"],
    ["task.left_loop.accuracy", "task.right_loop.auc", "peak_memory_mb", "delta_m_own_width"],
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
        "delta_m_own_width": -300.0,
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
