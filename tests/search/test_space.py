"""The conditional space: whatever is drawn can be built, and a job can narrow every dimension."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from coterie.models.backbones import BACKBONES
from coterie.models.families import FAMILIES
from coterie.models.tasks import Task, TaskKind, TaskSet
from coterie.search.space import (
    GROUPING_FAMILIES,
    RECIPE,
    Choices,
    Choose,
    Dimension,
    Range,
    Space,
    SpaceError,
    Value,
    backbone_dimensions,
    build_candidate,
    default_of,
    dimensions,
    family_dimensions,
    json_schema,
    make_space,
    schema_of,
)
from coterie.search.spec import EVERY_FAMILY, Domain, Interval
from coterie.search.store import Candidate

EVERY = list(EVERY_FAMILY)
GROUPED = sorted(GROUPING_FAMILIES)
INPUT_SHAPE = (3, 4)
BOUND = {"groups", "split", "depth", "gamma"}  # what they may be depends on other dimensions
FIXED_RECIPE: dict[str, Domain] = {
    "lr": 1e-3,
    "weight_decay": 1e-6,
    "batch_size": 32,
    "balancing": "fixed",
}
STIRLING = {  # numbers of partitions of T tasks into K groups (OEIS A008277)
    2: {2: 1},
    3: {2: 3, 3: 1},
    4: {2: 7, 3: 6, 4: 1},
    5: {2: 15, 3: 25, 4: 10, 5: 1},
    6: {2: 31, 3: 90, 4: 65, 5: 15, 6: 1},
}

MakeTasks = Callable[[int], TaskSet]
Wanted = Mapping[str, Mapping[str, Domain]]


def tasks_of(number: int) -> TaskSet:
    return TaskSet(Task(name=name, kind=TaskKind.BINARY) for name in "abcdefghijkl"[:number])


def space(families: list[str], wanted: Wanted | None = None, tasks: int = 4) -> Space:
    return make_space(families, ["mlp"], tasks_of(tasks), INPUT_SHAPE, wanted or {})


def drawn(data: st.DataObject) -> Choose:
    """Answers that Hypothesis chooses."""

    def choose(name: str, dimension: Dimension) -> Value:
        return data.draw(values_in(dimension.domain), label=name)

    return choose


def recall(choices: Mapping[str, Value]) -> Choose:
    """The answers given before."""
    return lambda name, dimension: choices[name]


def values_in(domain: Choices | Range) -> st.SearchStrategy[Value]:
    if isinstance(domain, Choices):
        return st.sampled_from(domain.values)
    if domain.integer:
        return st.integers(int(domain.low), int(domain.high))
    return st.floats(domain.low, domain.high)


@given(
    data=st.data(),
    tasks=st.integers(2, 10),
    families=st.lists(st.sampled_from(EVERY), min_size=1, unique=True),
)
def test_whatever_is_drawn_can_be_built(data: st.DataObject, tasks: int, families: list[str]) -> None:
    candidate = space(families, tasks=tasks).walk(drawn(data))
    assert candidate.family in families
    outputs = build_candidate(candidate, INPUT_SHAPE, tasks_of(tasks))(torch.zeros(2, *INPUT_SHAPE))
    assert set(outputs) == set(tasks_of(tasks).names)


@given(data=st.data(), tasks=st.integers(2, 6))
def test_the_choices_alone_rebuild_a_candidate_even_after_json(data: st.DataObject, tasks: int) -> None:
    whole = space(EVERY, tasks=tasks)
    choices: dict[str, Value] = {}
    choose = drawn(data)

    def note(name: str, dimension: Dimension) -> Value:
        assert name not in choices  # each is asked once
        choices[name] = choose(name, dimension)
        return choices[name]

    candidate = whole.walk(note)
    recalled = json.loads(json.dumps(choices))
    assert whole.walk(recall(recalled)) == candidate


@given(data=st.data(), tasks=st.integers(2, 6), given_groups=st.booleans())
def test_a_candidate_tells_its_choices(data: st.DataObject, tasks: int, given_groups: bool) -> None:
    """As a sampler needs them that is rebuilt from stored candidates."""
    names = list("abcdef"[:tasks])
    wanted: Wanted = {"grouped": {"grouping": [[names], [[name] for name in names]]}} if given_groups else {}
    whole = space(EVERY, wanted, tasks)
    choices: dict[str, Value] = {}
    choose = drawn(data)

    def note(name: str, dimension: Dimension) -> Value:
        return choices.setdefault(name, choose(name, dimension))

    candidate = whole.walk(note)
    stored = replace(candidate, parameters=json.loads(json.dumps(dict(candidate.parameters))))
    answer = whole.recall(stored)
    told: dict[str, Value | None] = {}

    def tell(name: str, dimension: Dimension) -> Value:
        told[name] = answer(name, dimension)
        return choices[name]

    whole.walk(tell)
    assert told == choices


def test_what_a_candidate_does_not_say_is_left_open() -> None:
    answer = space(["shared"]).recall(Candidate(family="shared", backbone="mlp", parameters={"width": 24}))
    known = dimensions("shared", "mlp", 4)
    assert answer("mlp.width", known["width"]) == 24
    assert answer("mlp.lr", known["lr"]) is None


# What families share


def asked_names(space: Space, family: str) -> dict[str, Choices | Range]:
    found: dict[str, Choices | Range] = {}

    def note(name: str, dimension: Dimension) -> Value:
        found[name] = dimension.domain
        return family if name == "family" else default_of(dimension)

    space.walk(note)
    return found


def test_families_share_the_names_of_recipe_and_sizes() -> None:
    whole = space(["shared", "dmtg", "interrogate"])
    common = {f"mlp.{name}" for name in ("width", "depth", *(part.name for part in RECIPE))}
    for family in whole.families:
        assert common <= set(asked_names(whole, family))


def test_a_family_that_takes_other_values_has_a_name_of_its_own() -> None:
    whole = space(["shared", "dmtg", "interrogate"], {"dmtg": {"lr": [1e-3, 1e-2], "split": [1]}})
    names = set(asked_names(whole, "dmtg"))
    assert {"dmtg.mlp.lr", "dmtg.mlp.depth", "mlp.width"} <= names
    assert not names & {"mlp.lr", "mlp.depth"}
    assert {"mlp.lr", "mlp.depth"} <= set(asked_names(whole, "shared"))


def test_families_narrowed_alike_share_what_is_left() -> None:
    lr: dict[str, Domain] = {"lr": Interval(low=1e-3, high=1e-2)}
    whole = space(["shared", "dmtg", "interrogate"], {"shared": lr, "dmtg": lr})
    assert asked_names(whole, "shared")["mlp.lr"] == asked_names(whole, "dmtg")["mlp.lr"]
    assert "interrogate.mlp.lr" in asked_names(whole, "interrogate")


@given(data=st.data(), tasks=st.integers(2, 8))
def test_a_name_always_stands_for_the_same_domain(data: st.DataObject, tasks: int) -> None:
    wanted: Wanted = {"shared": {"width": [8, 24]}, "dmtg": {"width": [8, 24], "depth": [2, 3]}}
    whole = make_space(EVERY, ["mlp"], tasks_of(tasks), INPUT_SHAPE, wanted)
    domains: dict[str, Choices | Range] = {}
    choose = drawn(data)

    def check(name: str, dimension: Dimension) -> Value:
        if ".grouping" not in name:  # whose ranges Optuna lets vary
            assert domains.setdefault(name, dimension.domain) == dimension.domain
        return choose(name, dimension)

    for _ in range(3):
        whole.walk(check)


# Counting


def test_a_finite_space_is_counted_through_once_in_a_fixed_order() -> None:
    wanted: dict[str, Domain] = {**FIXED_RECIPE, "width": [8, 24], "depth": [1, 2]}
    small = space(["shared", "grouped"], {"shared": wanted, "grouped": {**wanted, "groups": 2}}, tasks=3)
    found = list(small.candidates())
    # 4 of shared; 3 partitions into two of grouped, for each width with depth 1, and depth 2 with two splits
    assert len(found) == 4 + 3 * 2 * (1 + 2)
    assert len({repr(candidate) for candidate in found}) == len(found)
    assert found == list(small.candidates())


def test_a_space_with_ranges_of_real_numbers_has_no_end() -> None:
    assert not space(["shared"]).finite
    with pytest.raises(ValueError, match="must be finite"):
        next(space(["shared"]).candidates())
    assert space(["shared"], {"shared": {"lr": 1e-3, "weight_decay": 1e-6}}).finite


@given(data=st.data(), share=st.floats(0, 1))
def test_places_on_a_scale_are_found_again(data: st.DataObject, share: float) -> None:
    log = data.draw(st.booleans())
    scale = Range(1e-4, 3e-2, log=True) if log else Range(-2.0, 5.0)
    assert scale.share(scale.at(share)) == pytest.approx(share, abs=1e-9)
    assert scale.at(-1) == pytest.approx(scale.low)
    assert scale.at(2) == pytest.approx(scale.high)
    assert type(Range(0, 4, integer=True).at(share)) is int


@given(data=st.data(), tasks=st.integers(2, 6), groups=st.integers(2, 6))
def test_a_candidate_is_made_of_what_the_catalogue_shows(
    data: st.DataObject, tasks: int, groups: int
) -> None:
    candidate = space(EVERY, tasks=tasks).walk(drawn(data))
    schema = json_schema(candidate.family, [candidate.backbone], tasks)
    shown = set(schema["properties"])
    if candidate.family == "grouped":
        shown.remove("groups")  # it decides the grouping, and is told by it
    if candidate.family == "dmtg+interrogate":
        shown.remove("grouping")  # only a job that gives one has it
    assert set(candidate.parameters) == shown
    for name, value in candidate.parameters.items():
        if name != "grouping":
            assert allowed(schema["properties"][name], value), name


def allowed(field: Mapping[str, Any], value: object) -> bool:
    if "enum" in field:
        return value in field["enum"]
    kind = int if field["type"] == "integer" else int | float
    return isinstance(value, kind) and field["minimum"] <= value <= field["maximum"]


@pytest.mark.parametrize("tasks", sorted(STIRLING))
def test_the_walk_meets_every_partition_exactly_once(tasks: int) -> None:
    fixed = {**FIXED_RECIPE, "width": 8, "depth": 1}
    for groups, number in STIRLING[tasks].items():
        only_groupings = space(["grouped"], {"grouped": {**fixed, "groups": groups}}, tasks)
        walks = list(only_groupings.candidates())
        partitions = Counter(json.dumps(candidate.parameters["grouping"]) for candidate in walks)
        assert len(partitions) == number
        assert set(partitions.values()) == {1}
        assert all(len(candidate.parameters["grouping"]) == groups for candidate in walks)


def test_the_groups_of_a_partition_are_open_where_the_job_leaves_them_open() -> None:
    fixed = {**FIXED_RECIPE, "width": 8, "depth": 1}
    walks = space(["grouped"], {"grouped": {**fixed, "groups": [2, 4]}}, tasks=4).candidates()
    assert Counter(len(candidate.parameters["grouping"]) for candidate in walks) == {2: 7, 4: 1}


def test_all_but_the_default_groups_are_at_most_eight() -> None:
    groups = dimensions("dmtg", "mlp", 30)["groups"].domain
    assert groups == Choices(tuple(range(2, 9)))


# Narrowing


@given(data=st.data(), family=st.sampled_from(EVERY))
def test_a_single_value_fixes_a_dimension(data: st.DataObject, family: str) -> None:
    known = dimensions(family, "mlp", 4)
    name = data.draw(st.sampled_from(sorted(set(known) - BOUND)))
    value = data.draw(values_in(known[name].domain))
    fixed = space([family], {family: {name: value}})
    assert fixed.walk(drawn(data)).parameters[name] == value


@given(data=st.data(), family=st.sampled_from(EVERY))
def test_a_list_leaves_its_values(data: st.DataObject, family: str) -> None:
    known = dimensions(family, "mlp", 4)
    name = data.draw(st.sampled_from(sorted(set(known) - BOUND)))
    values = data.draw(st.lists(values_in(known[name].domain), min_size=1, max_size=4))
    narrowed = space([family], {family: {name: list(values)}})
    assert narrowed.walk(drawn(data)).parameters[name] in values


@given(data=st.data(), family=st.sampled_from(EVERY))
def test_a_range_bounds_a_number_and_keeps_its_scale(data: st.DataObject, family: str) -> None:
    known = dimensions(family, "mlp", 4)
    name = data.draw(
        st.sampled_from([n for n, d in known.items() if isinstance(d.domain, Range) and not d.domain.integer])
    )
    domain = known[name].domain
    assert isinstance(domain, Range)
    low, high = sorted(data.draw(st.tuples(*2 * [st.floats(domain.low, domain.high)])))
    narrowed = space([family], {family: {name: Interval(low=low, high=high)}})
    assert low <= narrowed.walk(drawn(data)).parameters[name] <= high
    assert narrowed.table[family, "mlp"][name].domain == Range(low, high, log=domain.log)


@given(data=st.data(), family=st.sampled_from(EVERY))
def test_the_default_candidate_stays_inside_what_the_job_allows(data: st.DataObject, family: str) -> None:
    known = dimensions(family, "mlp", 5)
    wanted: dict[str, Any] = {}
    for name in data.draw(st.lists(st.sampled_from(sorted(known)), unique=True)):
        domain = known[name].domain
        if isinstance(domain, Range) and data.draw(st.booleans()):
            low, high = sorted(float(data.draw(values_in(domain))) for _ in range(2))
            wanted[name] = Interval(low=low, high=high)
        else:
            wanted[name] = data.draw(st.lists(values_in(domain), min_size=1, max_size=3))
    depths, splits = wanted.get("depth", (1, 2, 3)), wanted.get("split", (0,))
    least = int(splits.low) if isinstance(splits, Interval) else min(splits)
    assume(family not in GROUPING_FAMILIES or least < max(depths))
    assume(family != "etr_nlp" or min(wanted.get("width", (48,))) >= 48)  # each task has its channel
    narrowed = space([family], {family: wanted}, tasks=5)
    for default in narrowed.defaults():
        candidate = narrowed.walk(recall(default))
        assert candidate.family == family
        for name, values in wanted.items():
            value = candidate.parameters[name]
            inside = values.low <= value <= values.high if isinstance(values, Interval) else value in values
            assert inside, name
        build_candidate(candidate, INPUT_SHAPE, tasks_of(5))


def test_defaults_are_the_declared_ones_where_nothing_is_narrowed() -> None:
    whole = space(EVERY)
    found = [whole.walk(recall(choices)) for choices in whole.defaults()]
    assert [candidate.family for candidate in found] == [family for family in EVERY if family != "grouped"]
    for candidate in found:
        known = dimensions(candidate.family, "mlp", 4)
        assert candidate.parameters == {name: dimension.default for name, dimension in known.items()}


def test_a_default_outside_is_replaced_by_the_middle() -> None:
    def default(domain: Choices | Range) -> Value:
        return default_of(Dimension(name="x", domain=domain, default=100, description=""))

    assert default(Range(1e-4, 1e-2, log=True)) == pytest.approx(1e-3)
    assert default(Range(2, 4)) == 3
    assert default(Range(0, 5, integer=True)) in (2, 3)
    assert default(Choices((1, 2, 3))) == 2
    assert default(Range(50, 200)) == 100


@given(data=st.data(), family=st.sampled_from(GROUPED), tasks=st.integers(2, 5))
@settings(max_examples=100)
def test_at_least_one_unit_always_follows_the_split(data: st.DataObject, family: str, tasks: int) -> None:
    wanted: dict[str, Any] = {}
    if data.draw(st.booleans()):
        wanted["depth"] = data.draw(st.lists(st.sampled_from((1, 2, 3)), min_size=1))
    if data.draw(st.booleans()):
        wanted["split"] = data.draw(st.lists(st.sampled_from((0, 1, 2)), min_size=1))
    possible = min(wanted.get("split", [0])) < max(wanted.get("depth", [3]))
    if not possible:
        with pytest.raises(SpaceError, match="split must be less than depth, so at most") as found:
            space([family], {family: wanted}, tasks)
        assert found.value.path == ("space", family, "split")
        return
    candidate = space([family], {family: wanted}, tasks).walk(drawn(data))
    assert candidate.parameters["split"] < candidate.parameters["depth"]
    assert candidate.parameters["split"] in wanted.get("split", (0, 1, 2))
    assert candidate.parameters["depth"] in wanted.get("depth", (1, 2, 3))


def test_a_deep_split_leaves_only_depths_beyond_it() -> None:
    wanted = {**FIXED_RECIPE, "width": 8, "groups": 2, "split": 1}
    walks = space(["grouped"], {"grouped": wanted}, tasks=2).candidates()
    depths = {candidate.parameters["depth"] for candidate in walks}
    assert depths == {2, 3}


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [("width", 24.0, int), ("batch_size", [32.0, 64], int), ("groups", 3.0, int), ("split", 1.0, int)],
)
@given(data=st.data())
@settings(max_examples=10)
def test_a_whole_number_may_be_written_with_a_point(
    data: st.DataObject, name: str, value: Any, kind: type
) -> None:
    candidate = space(["dmtg"], {"dmtg": {name: value, "depth": [2, 3]}}).walk(drawn(data))
    assert type(candidate.parameters[name]) is kind
    build_candidate(candidate, INPUT_SHAPE, tasks_of(4))


@pytest.mark.parametrize(
    ("family", "wanted", "path"),
    [
        ("shared", {"lr": 1.0}, ("shared", "lr")),
        ("shared", {"lr": 0}, ("shared", "lr")),
        ("shared", {"lr": 10**400}, ("shared", "lr")),
        ("shared", {"lr": "fast"}, ("shared", "lr")),
        ("shared", {"lr": True}, ("shared", "lr")),
        ("shared", {"lr": [1e-3, 1e-3, 5.0]}, ("shared", "lr", 2)),
        ("shared", {"lr": Interval(low=1e-5, high=1e-3)}, ("shared", "lr")),
        ("shared", {"lr": Interval(low=1e-3, high=1)}, ("shared", "lr")),
        ("shared", {"width": 25}, ("shared", "width")),
        ("shared", {"width": True}, ("shared", "width")),
        ("shared", {"width": "24"}, ("shared", "width")),
        ("shared", {"width": [24, 1000]}, ("shared", "width", 1)),
        ("shared", {"width": [[["a"]]]}, ("shared", "width", 0)),
        ("shared", {"width": Interval(low=8, high=24)}, ("shared", "width")),
        ("shared", {"depth": 1.5}, ("shared", "depth")),
        ("shared", {"tau": 1.0}, ("shared", "tau")),
        ("shared", {"groups": 2}, ("shared", "groups")),
        ("shared", {"grouping": [[["a", "b", "c", "d"]]]}, ("shared", "grouping")),
        ("dmtg", {"split": 0.5}, ("dmtg", "split")),
        ("dmtg", {"split": Interval(low=0, high=0.5)}, ("dmtg", "split")),
        ("dmtg", {"split": 3}, ("dmtg", "split")),
        ("dmtg", {"groups": 5}, ("dmtg", "groups")),
        ("dmtg", {"groups": 1}, ("dmtg", "groups")),
        ("dmtg", {"depth": 1, "split": 1}, ("dmtg", "split")),
        ("dmtg+interrogate", {"grouping": [["a"], ["b", "c", "d"]], "tau": 2.0}, ("dmtg+interrogate", "tau")),
        ("grouped", {"grouping": "a|bcd"}, ("grouped", "grouping")),
        ("grouped", {"grouping": [["a", "b"], ["c"]]}, ("grouped", "grouping")),
        ("grouped", {"grouping": [["a", "b"], ["c", "d"]], "groups": 2}, ("grouped", "groups")),
        ("grouped", {"grouping": [["a", "b", "c", "d"], [["a", "b"], ["c", "d"]]]}, ("grouped", "grouping")),
        ("grouped", {"grouping": [1, 2]}, ("grouped", "grouping")),
        ("grouped", {"grouping": [[["a", "b"], ["c", "d"]], [["a"], ["b"]]]}, ("grouped", "grouping", 1)),
        ("grouped", {"grouping": [[["a", "b"], ["b", "c", "d"]]]}, ("grouped", "grouping", 0)),
        ("grouped", {"grouping": [[["a", "b"], ["c", "x"]]]}, ("grouped", "grouping", 0)),
        ("grouped", {"grouping": [[["a", "b", "c", "d"], []]]}, ("grouped", "grouping", 0)),
    ],
)
def test_what_a_family_does_not_have_is_refused_at_its_place(
    family: str, wanted: Any, path: tuple[str | int, ...]
) -> None:
    with pytest.raises(SpaceError) as found:
        space([family], {family: wanted})
    assert found.value.path == ("space", *path)


def test_the_message_names_rule_and_values() -> None:
    for wanted, message in (
        ({"lr": 1}, "'lr' must be a number from 0.0001 to 0.03"),
        ({"width": 7}, r"'width' must be among \[8, 12, 16, 24, 32, 48, 64, 96\]"),
        ({"width": Interval(low=1, high=2)}, "'width' takes one or several of .*, not a range"),
        ({"foo": 1}, "'shared' has no 'foo'; it has .*'width'"),
    ):
        with pytest.raises(SpaceError, match=message):
            space(["shared"], {"shared": wanted})


# Several backbones

TWO = ("mlp", "cnn")
IMAGE = (3, 8, 8)


def domains(
    wanted: dict[str, Domain], name: str, family: str = "shared", backbones: tuple[str, ...] = TWO
) -> list[Choices | Range | None]:
    """What a dimension may be on each backbone."""
    both = make_space([family], list(backbones), tasks_of(2), IMAGE, {family: wanted})
    rows = [both.table[family, backbone] for backbone in backbones]
    return [row[name].domain if name in row else None for row in rows]


def test_each_backbone_keeps_the_values_that_it_has() -> None:
    mlp, cnn = domains({}, "width")
    assert domains({"width": 24}, "width") == [Choices((24,)), cnn]
    assert domains({"width": [1, 0.25]}, "width") == [mlp, Choices((1.0, 0.25))]
    assert domains({"width": [0.5, 96, 8]}, "width") == [Choices((96, 8)), Choices((0.5,))]
    assert domains({"depth": 2}, "depth") == [Choices((2,)), None]
    assert domains({"split": [1, 2]}, "split", "dmtg") == [Choices((1, 2)), Choices((1,))]
    assert domains({"lr": 0.01}, "lr") == 2 * [Choices((0.01,))]


def test_each_backbone_keeps_its_part_of_a_range() -> None:
    split: dict[str, Domain] = {"split": Interval(low=1, high=2)}
    assert domains(split, "split", "dmtg") == [Range(1, 2, integer=True), Range(1, 1, integer=True)]
    split = {"split": Interval(low=2, high=2)}
    assert domains(split, "split", "dmtg") == [Range(2, 2, integer=True), Range(0, 1, integer=True)]


@given(
    data=st.data(),
    family=st.sampled_from(EVERY),
    widths=st.lists(st.sampled_from((0.125, 0.25, 24, 48)), min_size=1),
)
@settings(max_examples=30)
def test_whatever_is_drawn_on_several_backbones_can_be_built(
    data: st.DataObject, family: str, widths: list[Value]
) -> None:
    both = make_space([family], list(TWO), tasks_of(2), IMAGE, {family: {"width": list(widths), "depth": 2}})
    candidate = both.walk(drawn(data))
    known = dimensions(family, candidate.backbone, 2)["width"].domain
    assert isinstance(known, Choices)
    assert candidate.parameters["width"] in (set(widths) & set(known.values) or known.values)
    build_candidate(candidate, IMAGE, tasks_of(2))


@pytest.mark.parametrize(
    ("wanted", "path", "message"),
    [
        (
            {"width": 7},
            ("width",),
            r"among \[8, .*\] on \['mlp'\]; .* among \[0.125, .*\] on \['cnn', 'resnet20'\]",
        ),
        ({"width": [24, 0.25, 7]}, ("width", 2), "'width' must be among"),
        ({"depth": 9}, ("depth",), r"'depth' must be among \[1, 2, 3\]$"),
        ({"lr": 1}, ("lr",), "'lr' must be a number from 0.0001 to 0.03$"),
        ({"split": Interval(low=1, high=99)}, ("split",), r"from 0 to 2 on \['mlp'\]"),
        ({"split": Interval(low=0.5, high=1)}, ("split",), "'split' must be a whole number"),
        ({"foo": 1}, ("foo",), "'dmtg' has no 'foo'; it has .*'depth'"),
    ],
)
def test_a_value_that_no_backbone_has_is_refused(
    wanted: dict[str, Domain], path: tuple[str | int, ...], message: str
) -> None:
    with pytest.raises(SpaceError, match=message) as found:
        domains(wanted, "lr", "dmtg", (*TWO, "resnet20"))
    assert found.value.path == ("space", "dmtg", *path)


def test_narrowing_a_family_that_the_job_leaves_out_is_refused() -> None:
    with pytest.raises(SpaceError, match="'dmtg' is not among the job's families") as found:
        space(["shared"], {"dmtg": {"tau": 2}})
    assert found.value.path == ("space", "dmtg")


@pytest.mark.parametrize("family", GROUPED)
def test_one_task_has_nothing_to_group(family: str) -> None:
    with pytest.raises(SpaceError, match=re.escape(f"'{family}' needs at least two tasks, found 1")):
        space([family], tasks=1)


@pytest.mark.parametrize("family", sorted(set(EVERY) - GROUPING_FAMILIES))
@given(data=st.data())
@settings(max_examples=5)
def test_the_other_families_take_one_task(family: str, data: st.DataObject) -> None:
    candidate = space([family], tasks=1).walk(drawn(data))
    assert candidate.parameters["balancing"] == "fixed"
    build_candidate(candidate, INPUT_SHAPE, tasks_of(1))


# Given groupings

GIVEN = [[["a", "b"], ["c", "d"]], [["d"], ["a", "c", "b"]], [["c", "d"], ["b", "a"]]]


@pytest.mark.parametrize("family", ["grouped", "dmtg+interrogate"])
@given(data=st.data())
def test_given_groupings_are_the_only_ones_and_equal_ones_count_once(
    family: str, data: st.DataObject
) -> None:
    narrowed = space([family], {family: {"grouping": GIVEN}})  # type: ignore[dict-item]
    assert len(narrowed.groupings[family]) == 2
    candidate = narrowed.walk(drawn(data))
    assert candidate.parameters["grouping"] in ([["a", "b"], ["c", "d"]], [["a", "b", "c"], ["d"]])
    build_candidate(candidate, INPUT_SHAPE, tasks_of(4))


@pytest.mark.parametrize("grouping", [GIVEN[0], GIVEN[:1]], ids=["alone", "in a list"])
@given(data=st.data())
def test_a_single_given_grouping_is_no_choice(data: st.DataObject, grouping: Any) -> None:
    asked: list[str] = []
    choose = drawn(data)

    def note(name: str, dimension: Dimension) -> Value:
        asked.append(name)
        return choose(name, dimension)

    candidate = space(["grouped"], {"grouped": {"grouping": grouping}}).walk(note)
    assert candidate.parameters["grouping"] == [["a", "b"], ["c", "d"]]
    assert not any("group" in name.removeprefix("grouped") for name in asked)


# The catalogue's schema


@pytest.mark.parametrize("family", EVERY)
def test_the_schema_allows_what_can_be_asked_for_and_no_more(family: str) -> None:
    schema = json_schema(family, ["mlp"], 4)
    for name, field in schema["properties"].items():
        if name == "grouping":
            continue
        candidates = field.get("enum") or [field["minimum"], field["maximum"], field["default"]]
        numbers = [value for value in candidates if not isinstance(value, str)]
        outside = [min(numbers) - 0.5, max(numbers) + 1] if numbers else []
        for value in [*candidates, *outside, -1, math.pi, 10**30, "x"]:
            try:
                space([family], {family: {name: value, **({"depth": 3} if name == "split" else {})}})
            except SpaceError:
                assert not allowed(field, value), (name, value)
            else:
                assert allowed(field, value), (name, value)


@pytest.mark.parametrize("family", EVERY)
def test_every_family_and_backbone_is_in_the_space_with_words_for_its_dimensions(family: str) -> None:
    assert set(EVERY) == set(FAMILIES)
    for backbone, kind in BACKBONES.items():
        known = dimensions(family, backbone, 4)
        assert set(known) == {
            dimension.name
            for dimension in (
                *RECIPE,
                *backbone_dimensions(backbone),
                *family_dimensions(family, backbone, 4),
            )
        }
        assert {name: known[name].default for name in kind.choices} == dict(kind.defaults)
        for dimension in known.values():
            assert dimension.description.endswith(".")
            assert default_of(dimension) == default_of(dimension.unnamed) == dimension.default


def test_a_schema_for_several_backbones_shows_what_differs_for_each() -> None:
    shown = json_schema("grouped", ["mlp", "cnn", "vit_tiny", "vit_small"], 4)["properties"]
    assert shown["lr"] == json_schema("grouped", ["mlp"], 4)["properties"]["lr"]
    forms = {form["title"]: form for form in shown["split"]["anyOf"]}
    assert {title: form["maximum"] for title, form in forms.items()} == {
        "mlp": 2,
        "cnn": 1,
        "vit_tiny, vit_small": 12,
    }
    assert [form["title"] for form in shown["depth"]["anyOf"]] == ["mlp"]


def test_the_schema_says_what_a_job_tries_that_does_not_name_the_dimension() -> None:
    def words(family: str, name: str) -> str:
        return str(json_schema(family, ["mlp"], 4)["properties"][name]["description"])

    assert words("etr_nlp", "gamma").endswith(" Unless the job names it: 0.25, 0.5, 0.75, 1.0.")
    assert words("dmtg", "fine_tune").endswith(" Unless the job names it: 0.0, 0.2.")
    assert words("dmtg", "balancing").endswith(" Unless the job names it: fixed, uncertainty, dwa, random.")
    assert words("single", "balancing").endswith(" Stays at its default unless the job names it.")
    assert words("dmtg", "epsilon").endswith(" Stays at its default unless the job names it.")


@pytest.mark.parametrize("family", EVERY)
def test_only_what_is_tried_in_part_says_so(family: str) -> None:
    known = dimensions(family, "mlp", 4)
    shown = schema_of(known.values())["properties"]
    for name, dimension in known.items():
        assert ("unless the job names it" in shown[name]["description"].lower()) == (
            dimension.unnamed.domain != dimension.domain
        )


# What goes together


def dense_task() -> TaskSet:
    return TaskSet([Task(name="seen", kind=TaskKind.BINARY), Task(name="far", kind=TaskKind.DEPTH)])


@pytest.mark.parametrize("family", EVERY)
@given(data=st.data())
@settings(max_examples=4)
def test_whatever_is_drawn_for_images_can_be_built(family: str, data: st.DataObject) -> None:
    shape = (3, 8, 8)
    images = make_space([family], ["cnn"], dense_task(), shape, {family: {"width": [0.125, 0.25]}})
    network = build_candidate(images.walk(drawn(data)), shape, dense_task()).eval()
    with torch.no_grad():
        outputs = network(torch.zeros(2, *shape))
    assert {name: tuple(output.shape) for name, output in outputs.items()} == {"seen": (2,), "far": (2, 8, 8)}


@pytest.mark.parametrize(
    ("backbones", "tasks", "shape", "path", "message"),
    [
        (["mlp"], dense_task(), (3, 8, 8), ("backbones", 0), "'mlp' gives a vector"),
        (["mlp", "cnn"], tasks_of(2), (12,), ("backbones", 1), "input_shape: of 'cnn' must be"),
        (["cnn", "resnet18"], tasks_of(2), (3, 8, 8), ("backbones", 1), "sides of at least 16"),
    ],
)
def test_a_backbone_that_does_not_suit_input_or_tasks_is_refused(
    backbones: list[str], tasks: TaskSet, shape: tuple[int, ...], path: tuple[str | int, ...], message: str
) -> None:
    with pytest.raises(SpaceError, match=message) as found:
        make_space(["shared"], backbones, tasks, shape, {})
    assert found.value.path == path


def test_a_split_past_the_last_unit_of_an_image_backbone_is_refused() -> None:
    with pytest.raises(SpaceError, match="from 0 to 1") as found:
        make_space(["dmtg"], ["cnn"], tasks_of(2), (3, 8, 8), {"dmtg": {"split": 2}})
    assert found.value.path == ("space", "dmtg", "split")


def routed_widths(**wanted: Domain) -> dict[Value, set[Value]]:
    """Which values of gamma are met at each width, with 10 tasks."""
    found: dict[Value, set[Value]] = {}
    wanted = {**FIXED_RECIPE, "depth": 1, **wanted}
    for candidate in space(["etr_nlp"], {"etr_nlp": wanted}, tasks=10).candidates():
        found.setdefault(candidate.parameters["width"], set()).add(candidate.parameters["gamma"])
    return found


def test_a_width_is_tried_only_at_shares_that_leave_each_task_a_channel() -> None:
    for width, gammas in routed_widths().items():
        assert gammas == {
            gamma for gamma in (0.25, 0.5, 0.75, 1.0) if gamma == 1 or width - round(gamma * width) >= 10
        }
    assert routed_widths(gamma=0.5).keys() == {24, 32, 48, 64, 96}


def test_a_width_that_leaves_a_task_no_channel_is_refused_where_the_job_names_it() -> None:
    with pytest.raises(SpaceError, match="width: must give each layer at least") as found:
        routed_widths(width=[12, 48], gamma=0.5)
    assert found.value.path == ("space", "etr_nlp", "width")
    with pytest.raises(SpaceError, match="'gamma' must be among") as found:
        routed_widths(gamma=0)
    assert found.value.path == ("space", "etr_nlp", "gamma")


def test_a_share_that_fits_no_width_is_refused_where_the_job_names_it() -> None:
    message = "gamma 0.9 fits no width that is tried; width: must give each layer at least 96 channels"
    with pytest.raises(SpaceError, match=message) as found:
        routed_widths(gamma=[0.5, 0.9], width=[24, 48])
    assert found.value.path == ("space", "etr_nlp", "gamma", 1)
    assert routed_widths(gamma=[0.5, 0.9], width=[24, 96]) == {24: {0.5}, 96: {0.5, 0.9}}
    with pytest.raises(SpaceError, match="at least 96 channels") as found:
        routed_widths(gamma=0.9, width=48)
    assert found.value.path == ("space", "etr_nlp", "width")


def test_a_share_may_fit_one_backbone_only() -> None:
    wanted: dict[str, Domain] = {"width": [12, 24, 1], "gamma": [0.5, 0.9]}
    both = make_space(["etr_nlp"], list(TWO), tasks_of(5), IMAGE, {"etr_nlp": wanted})
    assert both.gammas == {("mlp", 12): (0.5,), ("mlp", 24): (0.5,), ("cnn", 1.0): (0.5, 0.9)}
    assert both.table["etr_nlp", "cnn"]["width"].domain == Choices((1.0,))
    unnamed = make_space(["etr_nlp"], list(TWO), tasks_of(5), IMAGE, {"etr_nlp": {"width": 1}})
    assert {width for backbone, width in unnamed.gammas if backbone == "mlp"} >= {24, 96}  # its own are kept


def test_names_stand_for_what_the_families_take() -> None:
    narrowed = space(["etr_nlp", "dmtg"], {"etr_nlp": {"primitives": "random"}})
    for choices in narrowed.defaults():
        build_candidate(narrowed.walk(recall(choices)), INPUT_SHAPE, tasks_of(4))


def test_what_a_user_rarely_varies_stays_at_its_default_until_a_job_names_it() -> None:
    assert space(["dmtg"]).table["dmtg", "mlp"]["epsilon"].domain == Choices((0.0,))
    named = space(["dmtg"], {"dmtg": {"epsilon": Interval(low=0, high=0.1)}})
    assert named.table["dmtg", "mlp"]["epsilon"].domain == Range(0, 0.1)
