"""What can be asked for, as it is shown: each entry holds, and nothing that can be asked for is missing."""

from collections.abc import Callable
from typing import Any

import pytest

from coterie.models.backbones import BACKBONES
from coterie.models.families import FAMILIES
from coterie.models.tasks import KIND_METRICS, TaskKind
from coterie.search import catalogue
from coterie.search.data.digits import Digits
from coterie.search.data.registry import sources
from coterie.search.objective import METRICS, PLANNED, metric_directions
from coterie.search.plan import make_plan
from coterie.search.spec import JobSpec

LISTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "datasets": catalogue.datasets,
    "families": catalogue.families,
    "backbones": catalogue.backbones,
    "metrics": catalogue.metrics,
}


@pytest.mark.parametrize("name", sorted(LISTS))
def test_every_entry_has_a_name_of_its_own_and_words(name: str) -> None:
    entries = LISTS[name]()
    assert len({entry["name"] for entry in entries}) == len(entries) > 0
    for entry in entries:
        assert entry["title"]
        assert entry["description"].endswith(".")
        assert entry["schema"]["type"] in ("object", "number")


def test_all_that_is_registered_is_shown() -> None:
    names = {name: {entry["name"] for entry in entries()} for name, entries in LISTS.items()}
    assert names["datasets"] == set(sources())
    assert names["families"] == set(FAMILIES)
    assert names["backbones"] == set(BACKBONES)
    assert names["metrics"] == set(METRICS)


def test_every_family_has_a_title_and_a_sentence_that_need_no_code_to_be_read() -> None:
    assert set(catalogue.FAMILY_WORDS) == set(FAMILIES)
    titles = [title for title, _ in catalogue.FAMILY_WORDS.values()]
    assert len(set(titles)) == len(titles)
    for name, words in catalogue.FAMILY_WORDS.items():
        for text in words:
            assert "`" not in text
            assert FAMILIES[name].__name__ not in text.split()
    for entry in catalogue.families():
        assert (entry["title"], entry["description"]) == catalogue.FAMILY_WORDS[entry["name"]]


def test_the_greatest_number_of_groups_is_said_to_depend_on_the_tasks() -> None:
    groups = [entry["schema"]["properties"].get("groups") for entry in catalogue.families()]
    assert sum(group is not None for group in groups) == 4
    assert all("at most the number of tasks" in group["description"] for group in groups if group)


def test_a_source_shows_its_tasks_with_metric_and_direction() -> None:
    [digits] = [entry for entry in catalogue.datasets() if entry["name"] == "digits"]
    assert [task["name"] for task in digits["tasks"]] == list(Digits.tasks().names)
    assert digits["tasks"][0] == {
        "name": "left_parity",
        "kind": "binary",
        "metric": "error",
        "direction": "minimize",
        "metrics": [
            {"name": "error", "direction": "minimize", "unit": "1"},
            {"name": "accuracy", "direction": "maximize", "unit": "1"},
            {"name": "auc", "direction": "maximize", "unit": "1"},
            {"name": "f1", "direction": "maximize", "unit": "1"},
        ],
    }
    assert digits["schema"]["properties"]["samples"]["minimum"] == 50


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_a_family_shows_can_be_asked_for(family: str, make_job: Callable[..., JobSpec]) -> None:
    [entry] = [entry for entry in catalogue.families() if entry["name"] == family]
    space = {}
    for name, field in entry["schema"]["properties"].items():
        [shown] = [form for form in field.get("anyOf", [field]) if "mlp" in form.get("title", "mlp")]
        if name != "grouping":
            space[name] = shown["default"]
    make_plan(make_job(search={"families": [family], "space": {family: space}}))


@pytest.mark.parametrize("family", ["grouped", "dmtg+interrogate"])
def test_a_grouping_can_be_asked_for_in_the_form_that_is_shown(
    family: str, make_job: Callable[..., JobSpec]
) -> None:
    [entry] = [entry for entry in catalogue.families() if entry["name"] == family]
    assert entry["schema"]["properties"]["grouping"]["items"]["items"] == {"type": "string"}
    sides = [[name for name in Digits.tasks().names if name.startswith(side)] for side in ("left", "right")]
    plan = make_plan(make_job(search={"families": [family], "space": {family: {"grouping": sides}}}))
    assert [grouping.names(plan.tasks) for grouping in plan.space.groupings[family]] == [sides]


def test_planned_metrics_are_not_shown_and_every_task_has_its_own() -> None:
    assert not PLANNED & set(METRICS)
    own = set(metric_directions(Digits.tasks())) - set(METRICS)
    metrics = KIND_METRICS[TaskKind.BINARY]
    assert own == {f"task.{name}.{metric}" for name in Digits.tasks().names for metric in metrics}
