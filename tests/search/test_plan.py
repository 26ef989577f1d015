"""What the schema cannot know of a job: each fault is found, named and pointed to."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.models.cost import count_cost, measure_peak_memory_mb
from coterie.models.tasks import Direction
from coterie.search.data.digits import Digits
from coterie.search.objective import METRICS
from coterie.search.plan import Plan, SpecError, escape, make_plan
from coterie.search.space import GROUPING_FAMILIES, Choices, Dimension, Value, build_candidate
from coterie.search.spec import EVERY_FAMILY, JobSpec

MakeJob = Callable[..., JobSpec]
TASKS = Digits.tasks().names


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
    make_plan(make_job(objectives=[{"metric": metric}], constraints=[{"metric": metric, "max": 1}]))


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
            {"constraints": [{"metric": "delta_m_own_width", "max": 1}]},
            "/constraints/0/metric",
            "'delta_m_own_width' is not implemented yet",
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
def test_no_candidate_costs_more_than_the_largest(
    search: dict[str, Any], data: st.DataObject, make_job: MakeJob
) -> None:
    plan = make_plan(make_job(search=search))

    def choose(name: str, dimension: Dimension) -> Value:
        domain = dimension.domain
        if isinstance(domain, Choices):
            return data.draw(st.sampled_from(domain.values), label=name)
        low, high = int(domain.low), int(domain.high)
        return data.draw(st.integers(low, high) if domain.integer else st.just(dimension.default), label=name)

    found, largest = sizes(plan, choose), plan.largest_cost()
    assert found.keys() == largest.keys()
    assert all(found[name] <= largest[name] for name in found)


def test_the_largest_cost_is_reached_by_the_largest_single_task_networks(make_job: MakeJob) -> None:
    plan = make_plan(make_job(search={"families": ["single", "shared", "dmtg"]}))
    largest: dict[str, Value] = {"family": "single", "single.mlp.width": 96, "single.mlp.depth": 3}
    found = sizes(plan, lambda name, dimension: largest.get(name, dimension.default))
    assert {name: plan.largest_cost()[name] for name in ("macs", "params")} == {
        name: found[name] for name in ("macs", "params")
    }


def test_a_plan_is_made_of_the_stored_job_as_it_was(make_job: MakeJob) -> None:
    spec = make_job(search={"space": {"dmtg": {"tau": {"low": 1, "high": 2}}, "grouped": {"groups": [2, 3]}}})
    stored = JobSpec.model_validate(json.loads(spec.model_dump_json()))
    assert make_plan(stored) == make_plan(spec)
