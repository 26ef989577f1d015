"""The schema of a job: what may be left out, what is refused, and where."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from coterie.models.backbones import BACKBONES
from coterie.models.families import FAMILIES
from coterie.models.tasks import Direction
from coterie.search.spec import JobSpec

LEAST: dict[str, Any] = {"dataset": {"source": "digits"}, "budget": {"trials": 3}}

# The example of architecture.md.
FULL: dict[str, Any] = {
    "name": "fashion attributes",
    "dataset": {"source": "digits", "options": {"samples": 500, "seed": 3}},
    "tasks": ["left_parity", {"name": "left_loop", "weight": 2.5}, "right_parity"],
    "objectives": [
        {"metric": "delta_m", "direction": "maximize"},
        {"metric": "task.left_parity.error"},
        {"metric": "macs", "direction": "minimize"},
    ],
    "constraints": [{"metric": "params", "max": 500000}, {"metric": "latency_ms", "min": 0, "max": 2.5}],
    "search": {
        "families": ["single", "dmtg"],
        "backbones": ["mlp"],
        "space": {
            "dmtg": {"groups": [2, 3], "tau": {"low": 1, "high": 4}, "width": 24},
            "grouped": {"grouping": [[["left_parity", "left_loop"], ["right_parity"]]]},
        },
        "sampler": {"name": "nsga2"},
        "scheduler": {"name": "asha", "eta": 4, "grace_epochs": 2, "metric": "macs"},
        "repeats": True,
    },
    "budget": {
        "trials": 40,
        "epochs": 30,
        "seconds": 3600,
        "device_seconds": 7200.5,
        "failures": 3,
        "concurrent": 2,
        "stop_when": {"hypervolume_gain_below": 0.01, "over_trials": 10},
    },
    "resources": {"cpus": 0.5, "gpus": 0.25},
    "confirm": {"top": 3, "seeds": 5},
    "seed": 2**53 - 1,
    "priority": -3,
}


def job(place: str, value: object) -> dict[str, Any]:
    """The least job, with `value` at a dotted place."""
    document = {name: dict(part) for name, part in LEAST.items()}
    *parts, last = place.split(".")
    here: dict[str, Any] = document
    for part in parts:
        here = here.setdefault(part, {})
    here[last] = value
    return document


def faults(document: object) -> dict[str, str]:
    """Place -> what is wrong there; places of a value that could be of several types come once for each."""
    with pytest.raises(ValidationError) as found:
        JobSpec.model_validate(document)
    return {
        ".".join(map(str, fault["loc"])): fault["msg"]
        for fault in found.value.errors(include_url=False, include_input=False)
    }


def test_a_job_needs_no_more_than_a_source_and_a_limit() -> None:
    spec = JobSpec.model_validate(LEAST)
    assert spec.tasks == []
    assert spec.search.families == list(FAMILIES)
    assert spec.search.backbones == []
    assert [(objective.metric, objective.direction) for objective in spec.objectives] == [
        ("delta_m", Direction.MAXIMIZE),
        ("macs", Direction.MINIMIZE),
    ]
    assert spec.constraints == []
    assert spec.search.space == {}
    assert spec.search.sampler.name == "coterie"
    assert spec.search.scheduler.name == "none"
    assert not spec.search.repeats
    assert (spec.confirm.top, spec.confirm.seeds) == (0, 3)
    assert spec.budget.stop_when is None
    assert spec.budget.epochs == 20
    assert spec.budget.concurrent is None
    assert (spec.resources.cpus, spec.resources.gpus) == (1, 0)
    assert (spec.seed, spec.priority) == (0, 0)


@pytest.mark.parametrize("document", [LEAST, FULL], ids=["least", "full"])
def test_a_job_that_was_stored_comes_back_the_same(document: dict[str, Any]) -> None:
    spec = JobSpec.model_validate(document)
    assert JobSpec.model_validate(spec.model_dump(mode="json")) == spec
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec


def test_what_was_asked_for_is_kept_as_it_was() -> None:
    dumped = JobSpec.model_validate(FULL).model_dump(mode="json", exclude_unset=True)
    assert dumped == FULL


@pytest.mark.parametrize(
    "place",
    [
        "familes",
        "dataset.path",
        "search.sampeler",
        "search.sampler.seed",
        "search.scheduler.rungs",
        "budget.hours",
        "budget.stop_when.seconds",
        "resources.memory",
        "confirm.all",
    ],
)
def test_an_unknown_field_is_refused_where_it_stands(place: str) -> None:
    assert faults(job(place, 1))[place] == "Extra inputs are not permitted"


def test_unknown_fields_in_lists_are_refused_with_their_index() -> None:
    document = job("objectives", [{"metric": "macs"}, {"metric": "delta_m", "weight": 2}])
    document |= {
        "tasks": [{"name": "a", "wieght": 1}],
        "constraints": [{"metric": "macs", "most": 3, "max": 1}],
    }
    found = faults(document)
    assert {"objectives.1.weight", "constraints.0.most", "tasks.0.TaskChoice.wieght"} <= set(found)


@pytest.mark.parametrize("name", ["none", "pareto_asha"])
def test_only_asha_judges_by_one_metric(name: str) -> None:
    judged = {"name": "asha", "metric": "task.left_loop.error"}
    assert JobSpec.model_validate(job("search.scheduler", judged)).search.scheduler.metric == judged["metric"]
    assert faults(job("search.scheduler", judged | {"name": name})) == {
        "search.scheduler": f"'{name}' takes no metric: only asha judges by one"
    }


def test_a_rule_to_stop_needs_both_its_parts() -> None:
    assert set(faults(job("budget", {"trials": 3, "stop_when": {}}))) == {
        "budget.stop_when.hypervolume_gain_below",
        "budget.stop_when.over_trials",
    }
    for rule in (
        {"hypervolume_gain_below": 0, "over_trials": 0},
        {"hypervolume_gain_below": 1, "over_trials": -1},
    ):
        assert len(faults(job("budget", {"trials": 3, "stop_when": rule}))) == 2


@pytest.mark.parametrize(
    ("place", "least", "greatest", "step"),
    [
        ("budget.trials", 1, 100_000, 1),
        ("budget.epochs", 1, 10_000, 1),
        ("budget.seconds", 1.0, 1e8, 0.001),
        ("budget.device_seconds", 1.0, 1e10, 0.001),
        ("budget.failures", 0, 10_000, 1),
        ("budget.concurrent", 1, 1024, 1),
        ("search.scheduler.eta", 2, 10, 1),
        ("search.scheduler.grace_epochs", 1, 10_000, 1),
        ("confirm.top", 0, 100, 1),
        ("confirm.seeds", 2, 100, 1),
        ("resources.cpus", 0.001, 1024, 0.001),
        ("resources.gpus", 0, 64, 0.001),
        ("seed", 0, 2**53 - 1, 1),
        ("priority", -1000, 1000, 1),
    ],
)
def test_numbers_keep_their_bounds(place: str, least: float, greatest: float, step: float) -> None:
    for value in (least, greatest):
        JobSpec.model_validate(job(place, value))
    for value in (least - step, greatest + max(step, 1), -(10**30), 10**30):
        assert place in faults(job(place, value)), value


def test_a_gpu_is_shared_or_whole() -> None:
    for value in (0, 0.25, 1, 2.0):
        JobSpec.model_validate(job("resources.gpus", value))
    assert "resources.gpus" in faults(job("resources.gpus", 1.5))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("place", "wrap"),
    [
        ("budget.seconds", "{}"),
        ("budget.trials", "{}"),
        ("resources.cpus", "{}"),
        ("seed", "{}"),
        ("dataset.options", "samples"),
        ("tasks", "weight"),
        ("constraints", "max"),
        ("constraints", "min"),
        ("search.space", "value"),
        ("search.space", "list"),
        ("search.space", "low"),
        ("search.space", "high"),
    ],
)
def test_a_number_that_is_none_is_refused_everywhere(place: str, wrap: str, value: float) -> None:
    wrapped: object = {
        "{}": value,
        "samples": {"samples": value},
        "weight": [{"name": "left_loop", "weight": value}],
        "max": [{"metric": "macs", "max": value}],
        "min": [{"metric": "macs", "min": value}],
        "value": {"shared": {"lr": value}},
        "list": {"shared": {"lr": [1e-3, value]}},
        "low": {"shared": {"lr": {"low": value, "high": 1}}},
        "high": {"shared": {"lr": {"low": 0, "high": value}}},
    }[wrap]
    assert all(found.startswith(place) for found in faults(job(place, wrapped)))


@pytest.mark.parametrize("value", ["3", True, "true", [3], None])
@pytest.mark.parametrize("place", ["budget.epochs", "budget.failures", "resources.cpus", "seed", "priority"])
def test_only_numbers_are_numbers(place: str, value: object) -> None:
    assert place in faults(job(place, value))


def test_a_task_weighs_more_than_nothing() -> None:
    assert "tasks.0.TaskChoice.weight" in faults(job("tasks", [{"name": "left_loop", "weight": 0}]))


@pytest.mark.parametrize(
    ("place", "value", "twice"),
    [
        ("tasks", ["left_loop", "left_parity", "left_loop"], "left_loop"),
        ("tasks", ["left_loop", {"name": "left_loop", "weight": 2}], "left_loop"),
        ("search.families", ["shared", "shared"], "shared"),
        ("search.backbones", ["mlp", "mlp"], "mlp"),
        ("objectives", [{"metric": "macs"}, {"metric": "macs", "direction": "minimize"}], "macs"),
    ],
)
def test_what_comes_twice_is_refused_by_name(place: str, value: object, twice: str) -> None:
    what = place.split(".")[-1]
    assert faults(job(place, value)) == {place: f"{what} must be unique: '{twice}' comes twice"}


@pytest.mark.parametrize("budget", [{}, {"epochs": 3}, {"failures": 3, "concurrent": 1}, {"trials": None}])
def test_a_budget_without_a_limit_is_refused(budget: dict[str, Any]) -> None:
    found = faults(LEAST | {"budget": budget})
    assert found == {"budget": "a budget needs at least one of trials, seconds and device_seconds"}


@pytest.mark.parametrize("limit", ["trials", "seconds", "device_seconds"])
def test_one_limit_is_enough(limit: str) -> None:
    JobSpec.model_validate(LEAST | {"budget": {limit: 10}})


def test_a_constraint_has_a_bound_and_room() -> None:
    constraints = [
        {"metric": "macs"},
        {"metric": "macs", "min": 3, "max": 2},
        {"metric": "macs", "min": 2, "max": 2},
    ]
    assert faults(job("constraints", constraints)) == {
        "constraints.0": "a constraint needs min, max or both",
        "constraints.1": "min must be at most max",
    }


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("name", "half a \ud800 character"),
        ("name", "two\nlines"),
        ("name", "bell\a"),
        ("name", ""),
        ("name", "x" * 201),
        ("dataset.source", "../etc/passwd"),
        ("dataset.source", "digits\n"),
        ("dataset.source", ""),
        ("dataset.source", "x" * 101),
        ("tasks", ["left loop"]),
        ("objectives", [{"metric": "../x"}]),
        ("objectives", []),
        ("objectives", [{"metric": f"task.{number}.error"} for number in range(6)]),
        ("objectives", [{"metric": "macs", "direction": "down"}]),
        ("search.families", []),
        ("search.families", ["none"]),
        ("search.sampler", {"name": "best"}),
        ("search.space", {"shared": {"lr": []}}),
        ("search.space", {"shared": {"lr": {"low": 2, "high": 1}}}),
        ("search.space", {"shared": {"lr": {"low": 1}}}),
        ("search.space", {"shared": {"lr": None}}),
        ("search.space", {"shared": 3}),
        ("dataset.options", {"samples": None}),
        ("dataset.options", {"a/b": 1}),
    ],
)
def test_what_breaks_the_schema_is_refused_at_its_place(place: str, value: object) -> None:
    assert all(found.startswith(place) for found in faults(job(place, value)))


def test_a_name_may_be_any_text_in_one_line() -> None:
    assert JobSpec.model_validate(job("name", "Größe 実験 #3 😀")).name == "Größe 実験 #3 😀"


def test_a_job_never_changes() -> None:
    spec = JobSpec.model_validate(LEAST)
    with pytest.raises(ValidationError, match="frozen"):
        spec.seed = 3


def test_the_json_schema_says_bounds_enums_patterns_and_uniqueness() -> None:
    schema = JobSpec.model_json_schema()
    parts = schema["$defs"]
    assert parts["BudgetSpec"]["properties"]["trials"]["anyOf"][0] == {
        "type": "integer",
        "minimum": 1,
        "maximum": 100_000,
    }
    assert parts["SearchSpec"]["properties"]["families"]["items"]["enum"] == list(FAMILIES)
    assert parts["SearchSpec"]["properties"]["backbones"]["items"]["enum"] == list(BACKBONES)
    assert parts["SearchSpec"]["properties"]["families"]["uniqueItems"] is True
    assert parts["SamplerSpec"]["properties"]["name"]["enum"] == ["coterie", "tpe", "nsga2", "gp", "random"]
    assert parts["SchedulerSpec"]["properties"]["name"]["enum"] == ["none", "asha", "pareto_asha"]
    assert parts["Direction"]["enum"] == ["maximize", "minimize"]
    assert parts["DatasetSpec"]["properties"]["source"]["pattern"].startswith("^")
    assert schema["properties"]["seed"]["maximum"] == 2**53 - 1
    for name in ("tasks", "objectives"):
        assert schema["properties"][name]["uniqueItems"] is True
    assert schema["properties"]["objectives"]["maxItems"] == 5
    assert set(schema["required"]) == {"dataset", "budget"}


def test_every_part_of_the_json_schema_is_closed_and_every_field_described() -> None:
    schema = JobSpec.model_json_schema()
    for part in (schema, *schema["$defs"].values()):
        if part["type"] == "object":
            assert part["additionalProperties"] is False
            for name, field in part["properties"].items():
                assert "description" in field or "$ref" in field, name  # which is described itself
            assert part["description"]


def test_defaults_in_the_json_schema_are_those_of_the_code() -> None:
    spec = JobSpec.model_validate(LEAST).model_dump(mode="json")
    for path, field in _fields(JobSpec.model_json_schema()):
        if "default" in field:
            here: Any = spec
            for part in path:
                here = here[part]
            if here is not None and path != ("budget", "trials"):
                assert here == field["default"], path


def _fields(schema: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    parts = schema["$defs"]
    places = {
        (): schema,
        ("budget",): parts["BudgetSpec"],
        ("search",): parts["SearchSpec"],
        ("resources",): parts["ResourcesSpec"],
        ("confirm",): parts["ConfirmSpec"],
        ("search", "sampler"): parts["SamplerSpec"],
        ("search", "scheduler"): parts["SchedulerSpec"],
        ("dataset",): parts["DatasetSpec"],
    }
    for place, part in places.items():
        for name, field in part["properties"].items():
            yield (*place, name), field
