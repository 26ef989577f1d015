"""What the schema cannot know of a job: each fault is found, named and pointed to."""

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.models.cost import count_cost, measure_peak_memory_mb
from coterie.models.tasks import Direction
from coterie.search.data.digits import Digits
from coterie.search.faults import SpecError, escape
from coterie.search.objective import METRICS
from coterie.search.plan import Plan, make_plan
from coterie.search.space import GROUPING_FAMILIES, Choices, Dimension, Value, build_candidate
from coterie.search.spec import EVERY_FAMILY, JobSpec

MakeJob = Callable[..., JobSpec]
TASKS = Digits.tasks().names
GROUPING = [[list(TASKS[:2]), list(TASKS[2:4]), list(TASKS[4:])]]


def faults(spec: JobSpec) -> dict[str, str]:
    with pytest.raises(SpecError) as found:
        make_plan(spec)
    assert all(f"{fault.pointer}: {fault.detail}" in str(found.value) for fault in found.value.faults)
    return {fault.pointer: fault.detail for fault in found.value.faults}


def test_a_plan_fills_in_what_the_job_leaves_open(make_job: MakeJob) -> None:
    plan = make_plan(make_job())
    assert plan.tasks.names == TASKS
    assert plan.input_shape == (12, 12)
    assert plan.objectives == (("delta_m", Direction.MAXIMIZE), ("macs", Direction.MINIMIZE))
    assert plan.space.families == EVERY_FAMILY
    assert plan.space.backbones == ("mlp",)


def test_one_task_is_searched_with_the_families_that_form_no_groups(make_job: MakeJob) -> None:
    plan = make_plan(make_job(tasks=["left_loop"]))
    assert plan.space.families == tuple(f for f in EVERY_FAMILY if f not in GROUPING_FAMILIES)


def test_tasks_keep_the_jobs_order_and_weights(make_job: MakeJob) -> None:
    plan = make_plan(make_job(tasks=["right_loop", {"name": "left_parity", "weight": 2.5}]))
    assert [(task.name, task.weight) for task in plan.tasks] == [("right_loop", 1.0), ("left_parity", 2.5)]


def test_an_objective_takes_its_metrics_own_direction(make_job: MakeJob) -> None:
    names = ["total_error", "task.left_loop.error", "normalized_gain", "latency_ms"]
    plan = make_plan(make_job(objectives=[{"metric": name} for name in names]))
    expected = [Direction.MINIMIZE, Direction.MINIMIZE, Direction.MAXIMIZE, Direction.MINIMIZE]
    assert plan.objectives == tuple(zip(names, expected, strict=True))


@pytest.mark.parametrize("metric", [*METRICS, "task.right_parity.error", "task.left_loop.auc"])
def test_every_metric_can_be_objective_and_constraint(metric: str, make_job: MakeJob) -> None:
    make_plan(make_job(objectives=[{"metric": metric}], constraints=[{"metric": metric, "max": 1e6}]))


@pytest.mark.parametrize(
    ("fields", "pointer", "detail"),
    [
        (
            {"dataset": {"source": "mnist"}},
            "/dataset/source",
            "'mnist' is no data source; there are ['digits'",
        ),
        (
            {"dataset": {"source": "digits", "options": {"samples": 10}}},
            "/dataset/options/samples",
            "greater than",
        ),
        (
            {"dataset": {"source": "digits", "options": {"samples": 10**30}}},
            "/dataset/options/samples",
            "less than",
        ),
        (
            {"dataset": {"source": "digits", "options": {"samples": "400"}}},
            "/dataset/options/samples",
            "integer",
        ),
        (
            {"dataset": {"source": "digits", "options": {"path": "/etc"}}},
            "/dataset/options/path",
            "not permitted",
        ),
        ({"tasks": ["left_loop", "middle_loop"]}, "/tasks/1", "'middle_loop' is no task of 'digits'"),
        ({"tasks": [{"name": "loop", "weight": 2}]}, "/tasks/0", "there are ['left_parity'"),
        (
            {"objectives": [{"metric": "macs"}, {"metric": "speed"}]},
            "/objectives/1/metric",
            "'speed' is no metric",
        ),
        (
            {"objectives": [{"metric": "mean_rank"}]},
            "/objectives/0/metric",
            "'mean_rank' is not implemented yet",
        ),
        ({"constraints": [{"metric": "flops", "max": 1}]}, "/constraints/0/metric", "'flops' is no metric"),
        (
            {"search": {"scheduler": {"name": "asha", "metric": "speed"}}},
            "/search/scheduler/metric",
            "'speed' is no metric",
        ),
        (
            {"tasks": ["left_loop", "right_loop"], "objectives": [{"metric": "task.left_parity.error"}]},
            "/objectives/0/metric",
            "task.left_loop.error",
        ),
        (
            {"objectives": [{"metric": "macs"}, {"metric": "delta_m", "direction": "minimize"}]},
            "/objectives/1/direction",
            "the direction of 'delta_m' must be maximize",
        ),
        (
            {"tasks": ["left_loop"], "search": {"families": ["shared", "dmtg"]}},
            "/search/families",
            "needs at least two tasks, found 1",
        ),
        (
            {"search": {"families": ["shared"], "backbones": ["mlp", "resnet18"]}},
            "/search/backbones/1",
            "sides of at least 16",
        ),
        (
            {"search": {"families": ["etr_nlp"], "space": {"etr_nlp": {"width": 8, "gamma": 0.5}}}},
            "/search/space/etr_nlp/width",
            "at least",
        ),
        (
            {"search": {"families": ["shared"], "space": {"dmtg": {"tau": 2}}}},
            "/search/space/dmtg",
            "'dmtg' is not among the job's families",
        ),
        ({"search": {"space": {"nonsense": {}}}}, "/search/space/nonsense", "'nonsense' is not among"),
        ({"search": {"space": {"shared": {"tau": 2}}}}, "/search/space/shared/tau", "'shared' has no 'tau'"),
        ({"search": {"space": {"shared": {"lr": 5}}}}, "/search/space/shared/lr", "from 0.0001 to 0.03"),
        (
            {"search": {"space": {"shared": {"width": [24, 25]}}}},
            "/search/space/shared/width/1",
            "must be among",
        ),
        (
            {"search": {"space": {"dmtg": {"depth": 1, "split": 1}}}},
            "/search/space/dmtg/split",
            "less than depth",
        ),
        (
            {"search": {"families": ["grouped"], "space": {"grouped": {"groups": 7}}}},
            "/search/space/grouped/groups",
            "must be among [2, 3, 4, 5, 6]",
        ),
        (
            {"search": {"space": {"grouped": {"grouping": [[["left_loop"]]]}}}},
            "/search/space/grouped/grouping/0",
            "must be in exactly one group",
        ),
    ],
)
def test_each_fault_is_found_where_it_is(
    fields: dict[str, Any], pointer: str, detail: str, make_job: MakeJob
) -> None:
    found = faults(make_job(**fields))
    assert list(found) == [pointer]
    assert detail in found[pointer]


@pytest.mark.parametrize(
    ("fields", "pointer", "detail"),
    [
        (
            {"constraints": [{"metric": "macs", "max": 5000}, {"metric": "macs", "min": 5001}]},
            "/constraints/1/min",
            "'macs' is never above 5000, by a constraint before this one: min must be at most that, "
            "found 5001",
        ),
        (
            {"constraints": [{"metric": "delta_m", "min": 5}, {"metric": "delta_m", "max": -5}]},
            "/constraints/1/max",
            "'delta_m' is never below 5, by a constraint before this one: max must be at least that, "
            "found -5",
        ),
        ({"constraints": [{"metric": "latency_ms", "max": -1}]}, "/constraints/0/max", "never below 0"),
        (
            {"constraints": [{"metric": "task.left_loop.accuracy", "min": 95}]},
            "/constraints/0/min",
            "'task.left_loop.accuracy' is never above 1, by its nature: min must be at most that, found 95",
        ),
        ({"constraints": [{"metric": "total_error", "min": 601}]}, "/constraints/0/min", "never above 600"),
        (
            {"search": {"families": ["shared"]}, "constraints": [{"metric": "macs", "max": 1199}]},
            "/constraints/0/max",
            "the smallest network of the space has 1200 macs, so max must be at least that, found 1199",
        ),
        (
            {"search": {"families": ["single"]}, "constraints": [{"metric": "params", "max": 7000}]},
            "/constraints/0/max",
            "the smallest network of the space has 7014 params",
        ),
        (  # two networks of 24, or of two units of which the first is shared
            {
                "search": {"families": ["grouped"], "space": {"grouped": {"width": 24}}},
                "constraints": [{"metric": "macs", "max": 4751}],
            },
            "/constraints/0/max",
            "the smallest network of the space has 4752 macs",
        ),
        (
            {
                "search": {
                    "families": ["grouped"],
                    "space": {"grouped": {"width": 24, "grouping": GROUPING}},
                },
                "constraints": [{"metric": "macs", "max": 5327}],
            },
            "/constraints/0/max",
            "the smallest network of the space has 5328 macs",
        ),
        (
            {"search": {"families": ["etr_nlp"]}, "constraints": [{"metric": "macs", "max": 1200}]},
            "/constraints/0/max",
            "the smallest network of the space has ",
        ),
        (
            {"search": {"families": ["shared"]}, "constraints": [{"metric": "macs", "min": 1e6}]},
            "/constraints/0/min",
            "no network of the space exceeds ",
        ),
        (
            {"constraints": [{"metric": "peak_memory_mb", "min": 1e6}]},
            "/constraints/0/min",
            "in peak_memory_mb, so min must be at most that, found 1000000",
        ),
        (
            {"search": {"scheduler": {"name": "pareto_asha", "grace_epochs": 2}}},
            "/search/scheduler/grace_epochs",
            "must be less than budget.epochs, 2",
        ),
        (
            {"search": {"scheduler": {"name": "asha", "metric": "train_device_seconds"}}},
            "/search/scheduler/metric",
            "trials are not judged by train_device_seconds alone",
        ),
        (
            {
                "objectives": [{"metric": "train_device_seconds"}],
                "search": {"scheduler": {"name": "pareto_asha"}},
            },
            "/search/scheduler/name",
            "take scheduler none",
        ),
        (
            {
                "budget": {
                    "trials": 8,
                    "epochs": 2,
                    "stop_when": {"hypervolume_gain_below": 0.1, "over_trials": 8},
                }
            },
            "/budget/stop_when/over_trials",
            "the job ends after 8 trials, so over_trials must be less, found 8",
        ),
        (
            {
                "objectives": [{"metric": "delta_m_own_width"}],
                "search": {"backbones": ["mlp", "vit_tiny"], "families": ["shared"]},
            },
            "/objectives/0/metric",
            "28 sizes x 6 tasks x 3 seeds are 504 trainings, more than 500",
        ),
    ],
)
def test_what_can_not_be_is_refused_with_what_would_be_right(
    fields: dict[str, Any], pointer: str, detail: str, make_job: MakeJob
) -> None:
    found = faults(make_job(**fields))
    assert list(found) == [pointer]
    assert detail in found[pointer]


@pytest.mark.parametrize(
    "fields",
    [
        {"constraints": [{"metric": "macs", "min": 5000}, {"metric": "macs", "max": 5000}]},
        {"search": {"families": ["shared"]}, "constraints": [{"metric": "macs", "max": 1200}]},
        {"search": {"families": ["single"]}, "constraints": [{"metric": "params", "max": 7014}]},
        {
            "search": {"families": ["grouped"], "space": {"grouped": {"width": 24}}},
            "constraints": [{"metric": "macs", "max": 4752}],
        },
        {"search": {"scheduler": {"name": "asha", "metric": "latency_ms"}}},
        {
            "objectives": [{"metric": "latency_ms"}, {"metric": "macs"}],
            "search": {"scheduler": {"name": "pareto_asha"}},
        },
        {
            "budget": {
                "trials": 8,
                "epochs": 2,
                "stop_when": {"hypervolume_gain_below": 0.1, "over_trials": 7},
            }
        },
        {
            "budget": {
                "seconds": 60,
                "epochs": 2,
                "stop_when": {"hypervolume_gain_below": 0.1, "over_trials": 9000},
            }
        },
        {"search": {"families": ["shared"], "backbones": ["mlp", "vit_tiny"]}},
        {"tasks": ["left_loop"], "confirm": {"top": 2, "seeds": 2}},
        {"budget": {"trials": 1}, "confirm": {"top": 3}},
    ],
)
def test_what_just_fits_is_taken(fields: dict[str, Any], make_job: MakeJob) -> None:
    make_plan(make_job(**fields))


def test_faults_in_metrics_and_in_the_space_are_told_together(make_job: MakeJob) -> None:
    found = faults(
        make_job(
            objectives=[{"metric": "speed"}, {"metric": "macs", "direction": "maximize"}],
            constraints=[{"metric": "price", "max": 1}],
            search={"space": {"shared": {"lr": 7}}},
        )
    )
    assert set(found) == {
        "/objectives/0/metric",
        "/objectives/1/direction",
        "/constraints/0/metric",
        "/search/space/shared/lr",
    }


@pytest.mark.parametrize(("part", "token"), [("a/b", "a~1b"), ("a~b", "a~0b"), ("~1", "~01"), (3, "3")])
def test_pointers_are_escaped_as_rfc_6901_says(part: str | int, token: str) -> None:
    assert escape(part) == token


def test_the_data_has_one_name_however_the_job_looks(make_job: MakeJob) -> None:
    def name(**fields: Any) -> str:
        return make_plan(make_job(**fields)).data_fingerprint

    def options(**options: Any) -> dict[str, Any]:
        return {"source": "digits", "options": options}

    plain = name(dataset=options())
    assert name(dataset=options(samples=4000, seed=0), seed=9, tasks=["left_loop", "right_loop"]) == plain
    assert len({plain, name(dataset=options(seed=1)), name(dataset=options(samples=4001))}) == 3


def sizes(plan: Plan, choose: Callable[[str, Dimension], Value]) -> dict[str, float]:
    """macs, params and peak memory of a candidate, with gates and groups as they start."""
    network = build_candidate(plan.space.walk(choose), plan.input_shape, plan.tasks).prune()
    cost = count_cost(network, plan.input_shape)
    memory = measure_peak_memory_mb(network, plan.input_shape, torch.device("cpu"))
    return {"macs": cost.macs, "params": cost.params, "peak_memory_mb": memory}


@cache
def bounds(search: str) -> tuple[Plan, dict[str, float], dict[str, float]]:
    """A plan with the smallest and the largest sizes of its networks."""
    document = {"dataset": {"source": "digits"}, "budget": {"trials": 3}, "search": json.loads(search)}
    plan = make_plan(JobSpec.model_validate(document))
    every = list(plan.smallest_sizes())
    smallest = {name: min(size[name] for size in every) for name in ("macs", "params")}
    return plan, smallest, plan.largest_cost()


@pytest.mark.parametrize(
    "search",
    [
        {},
        {
            "families": ["shared", "dmtg"],
            "space": {"shared": {"width": [8, 12]}, "dmtg": {"width": 16, "depth": 2}},
        },
        {"families": ["shared"], "space": {"shared": {"depth": 1}}},
        {"families": ["interrogate"], "space": {"interrogate": {"width": [8, 96], "gate_start": [0, 0.5]}}},
        {"families": ["etr_nlp"], "space": {"etr_nlp": {"own_width": ["split", "full"]}}},
        {"families": ["dmtg+interrogate"]},
    ],
    ids=["whole", "narrowed", "shared", *("gated", "routed", "both")],
)
@given(data=st.data())
@settings(max_examples=12)
def test_no_candidate_costs_more_than_the_largest_or_less_than_the_smallest(
    search: dict[str, Any], data: st.DataObject
) -> None:
    plan, smallest, largest = bounds(json.dumps(search))

    def choose(name: str, dimension: Dimension) -> Value:
        domain = dimension.domain
        if isinstance(domain, Choices):
            return data.draw(st.sampled_from(domain.values), label=name)
        low, high = int(domain.low), int(domain.high)
        return data.draw(st.integers(low, high) if domain.integer else st.just(dimension.default), label=name)

    found = sizes(plan, choose)
    assert found.keys() == largest.keys()
    assert all(found[name] <= largest[name] for name in found)
    assert all(found[name] >= smallest[name] for name in smallest)


def test_the_largest_cost_is_reached_by_the_largest_single_task_networks(make_job: MakeJob) -> None:
    plan = make_plan(make_job(search={"families": ["single", "shared", "dmtg"]}))
    largest: dict[str, Value] = {"family": "single", "mlp.width": 96, "mlp.depth": 3}
    found = sizes(plan, lambda name, dimension: largest.get(name, dimension.default))
    assert {name: plan.largest_cost()[name] for name in ("macs", "params")} == {
        name: found[name] for name in ("macs", "params")
    }


def test_a_plan_is_made_of_the_stored_job_as_it_was(make_job: MakeJob) -> None:
    spec = make_job(search={"space": {"dmtg": {"tau": {"low": 1, "high": 2}}, "grouped": {"groups": [2, 3]}}})
    stored = JobSpec.model_validate(json.loads(spec.model_dump_json()))
    assert make_plan(stored) == make_plan(spec)
