"""The conditional search space: which dimensions a family has on a backbone, and how a job narrows them.

One declaration serves the sampler, the checks of a job's `space` and the JSON Schemas of `/v1/families`.
A candidate is drawn by *walking* the space: each open dimension is put to a `choose` function, in a fixed
order, and what it answers decides which dimensions follow. So the choices alone rebuild a candidate.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from coterie.models.backbones import BACKBONES
from coterie.models.tasks import Grouping, TaskSet
from coterie.search.spec import Domain, Interval
from coterie.search.store import Candidate

Value = bool | int | float | str

GREATEST_GROUPS = 8  # more networks than that on one input are no grouping any more; a job may ask for fewer


@dataclass(frozen=True)
class Choices:
    """A finite set of values."""

    values: tuple[Value, ...]


@dataclass(frozen=True)
class Range:
    """A closed interval of numbers, drawn on a log scale where `log`, whole where `integer`."""

    low: float
    high: float
    log: bool = False
    integer: bool = False


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One hyper-parameter of a family.

    Attributes:
        name: Name in a candidate's parameters and in a job's `space`.
        domain: What it may be.
        default: Its value in the family's default candidate.
        description: What it does, for the catalogue.
    """

    name: str
    domain: Choices | Range
    default: Value
    description: str


Choose = Callable[[str, Dimension], Value]


class SpaceError(ValueError):
    """A job's `space` asks for what its family does not have.

    Attributes:
        path: Where in `space`: family, dimension, index.
    """

    def __init__(self, path: Sequence[str | int], detail: str) -> None:
        super().__init__(detail)
        self.path = tuple(path)


RECIPE = (
    Dimension(
        name="lr",
        domain=Range(1e-4, 3e-2, log=True),
        default=5e-3,
        description="Learning rate of Adam.",
    ),
    Dimension(
        name="weight_decay",
        domain=Range(1e-7, 1e-2, log=True),
        default=1e-6,
        description="Decay of the weights, added to their gradient.",
    ),
    Dimension(
        name="batch_size",
        domain=Choices((32, 64, 128, 256)),
        default=64,
        description="Samples a step.",
    ),
)


def backbone_dimensions(backbone: str) -> tuple[Dimension, ...]:
    """Width and depth of a backbone."""
    kind = BACKBONES[backbone]
    return (
        Dimension(
            name="width",
            domain=Choices(tuple(kind.widths)),
            default=kind.default_width,
            description="Features of each unit.",
        ),
        Dimension(
            name="depth",
            domain=Choices(tuple(kind.depths)),
            default=kind.default_depth,
            description="Number of units.",
        ),
    )


def family_dimensions(family: str, backbone: str, tasks: int) -> tuple[Dimension, ...]:
    """A family's own dimensions for a number of tasks; `grouping` is walked by `Space`."""
    if family not in ("grouped", "dmtg"):
        return ()
    groups = Dimension(
        name="groups",
        domain=Choices(tuple(range(2, min(tasks, GREATEST_GROUPS) + 1))),
        default=2,
        description="Number of groups (dmtg: the greatest number).",
    )
    split = Dimension(
        name="split",
        domain=Range(0, max(BACKBONES[backbone].depths) - 1, integer=True),
        default=0,
        description="Units at the start that all groups share; always fewer than the backbone has.",
    )
    if family == "grouped":
        return (groups, split)
    return (
        groups,
        split,
        Dimension(
            name="tau",
            domain=Range(0.5, 8.0, log=True),
            default=2.5,
            description="Temperature of the relaxed grouping (DMTG's CelebA recipe: 2.5).",
        ),
        Dimension(
            name="logits_lr",
            domain=Range(1e-4, 1e-1, log=True),
            default=5e-3,
            description="Learning rate of the grouping logits (the paper uses the weights').",
        ),
    )


def dimensions(family: str, backbone: str, tasks: int) -> dict[str, Dimension]:
    """All dimensions of a family on a backbone, by name."""
    every = (*backbone_dimensions(backbone), *RECIPE, *family_dimensions(family, backbone, tasks))
    return {dimension.name: dimension for dimension in every}


@dataclass(frozen=True, kw_only=True)
class Space:
    """What a job searches.

    Attributes:
        families: In the order of the job.
        backbones: Names.
        tasks: The job's tasks.
        table: (family, backbone) -> dimension name -> the dimension as narrowed.
        groupings: The partitions that `grouped` may take, where the job gives them; empty for all.
    """

    families: tuple[str, ...]
    backbones: tuple[str, ...]
    tasks: TaskSet
    table: Mapping[tuple[str, str], Mapping[str, Dimension]]
    groupings: tuple[Grouping, ...] = ()

    def walk(self, choose: Choose) -> Candidate:
        """Draw a candidate: `choose(name, dimension)` answers for each dimension of more than one value."""
        family = str(_ask(choose, "family", _among("family", self.families)))
        backbone = str(_ask(choose, f"{family}.backbone", _among("backbone", self.backbones)))
        prefix = f"{family}.{backbone}"
        parameters: dict[str, Any] = {}
        table = self.table[family, backbone]
        for dimension in table.values():
            if dimension.name == "groups" and family == "grouped" and self.groupings:
                continue
            # What a split may be depends on the depth, so each depth has a choice of its own name.
            name = f"split<{parameters['depth']}" if dimension.name == "split" else dimension.name
            fitted = _fit(dimension, table.get("split"), parameters)
            parameters[dimension.name] = _ask(choose, f"{prefix}.{name}", fitted)
        if family == "grouped":
            grouping = self._choose_grouping(choose, f"{family}.grouping", parameters.pop("groups", None))
            parameters["grouping"] = grouping.names(self.tasks)
        return Candidate(family=family, backbone=backbone, parameters=parameters)

    def defaults(self) -> list[Mapping[str, Value]]:
        """The choices of each family's default candidate; `grouped` has no default partition, so none."""
        found: list[Mapping[str, Value]] = []
        for family in self.families:
            if family != "grouped":
                choices: dict[str, Value] = {}
                self.walk(
                    lambda name, dimension, family=family, choices=choices: choices.setdefault(  # type: ignore[misc]
                        name, family if name == "family" else default_of(dimension)
                    )
                )
                found.append(choices)
        return found

    def _choose_grouping(self, choose: Choose, name: str, groups: Any) -> Grouping:
        """One of the job's partitions, or any canonical one of `groups` groups, task by task.

        The labels of the tasks form a restricted growth string, in which each canonical partition is written
        exactly once; so a sampler learns "with the first task or not" for each task by itself.
        """
        if self.groupings:
            texts = tuple(json.dumps(grouping.labels) for grouping in self.groupings)
            return Grouping.from_labels(json.loads(str(_ask(choose, name, _among("grouping", texts)))))
        labels: list[int] = []
        opened = 0
        for index, task in enumerate(self.tasks):
            left = len(self.tasks) - index
            lowest = opened if groups - opened == left else 0
            highest = min(opened, groups - 1)
            dimension = Dimension(
                name=task.name, domain=Range(lowest, highest, integer=True), default=lowest, description=""
            )
            labels.append(int(_ask(choose, f"{name}.{task.name}", dimension)))
            opened = max(opened, labels[-1] + 1)
        return Grouping.from_labels(labels)


def make_space(
    families: Sequence[str],
    backbones: Sequence[str],
    tasks: TaskSet,
    wanted: Mapping[str, Mapping[str, Domain]],
) -> Space:
    """Narrow the families' dimensions to what the job wants.

    Raises:
        SpaceError: If it names a family or dimension that is not searched, or a value outside its domain.
    """
    for family in wanted:
        if family not in families:
            raise SpaceError([family], f"'{family}' is not among the job's families {list(families)}")
    for family in families:
        if family in ("grouped", "dmtg") and len(tasks) < 2:
            raise SpaceError([], f"family '{family}' needs at least two tasks, found {len(tasks)}")
    table = {}
    groupings: tuple[Grouping, ...] = ()
    for family in families:
        narrowing = dict(wanted.get(family, {}))
        given = narrowing.pop("grouping", None) if family == "grouped" else None
        if given is not None:
            if "groups" in narrowing:
                raise SpaceError([family, "groups"], "'grouping' says the groups: give one of the two")
            groupings = _read_groupings(given, tasks)
        for backbone in backbones:
            known = dimensions(family, backbone, len(tasks))
            for name in narrowing:
                if name not in known:
                    raise SpaceError([family, name], f"'{family}' has no '{name}'; it has {sorted(known)}")
            table[family, backbone] = {
                name: _narrow(dimension, narrowing[name], [family, name]) if name in narrowing else dimension
                for name, dimension in known.items()
            }
            deepest = max(whole_values(table[family, backbone]["depth"].domain))
            split = table[family, backbone].get("split")
            if split is not None and min(whole_values(split.domain)) >= deepest:
                raise SpaceError(
                    [family, "split"], f"split must be less than depth, so at most {deepest - 1}"
                )
    return Space(
        families=tuple(families), backbones=tuple(backbones), tasks=tasks, table=table, groupings=groupings
    )


def default_of(dimension: Dimension) -> Value:
    """The default where the domain holds it, else the value of the domain in its middle."""
    domain = dimension.domain
    if isinstance(domain, Choices):
        return (
            dimension.default
            if dimension.default in domain.values
            else domain.values[len(domain.values) // 2]
        )
    if not isinstance(dimension.default, str) and domain.low <= dimension.default <= domain.high:
        return dimension.default
    middle = math.sqrt(domain.low * domain.high) if domain.log else (domain.low + domain.high) / 2
    return round(middle) if domain.integer else middle


def json_schema(family: str, backbone: str, tasks: int) -> dict[str, Any]:
    """JSON Schema of a family's values in a candidate, with defaults."""
    schema = schema_of(dimensions(family, backbone, tasks).values())
    if family == "grouped":
        schema["properties"]["grouping"] = {
            "type": "array",
            "items": {"type": "array", "items": {"type": "string"}, "minItems": 1},
            "description": "The partition of the tasks, as lists of their names; by default all are tried.",
        }
    return schema


def schema_of(dimensions: Iterable[Dimension]) -> dict[str, Any]:
    """JSON Schema of an object with one value for each dimension."""
    properties: dict[str, Any] = {}
    for dimension in dimensions:
        domain = dimension.domain
        if isinstance(domain, Choices):
            about: dict[str, Any] = {"enum": list(domain.values)}
        else:
            about = {
                "type": "integer" if domain.integer else "number",
                "minimum": domain.low,
                "maximum": domain.high,
            }
        properties[dimension.name] = about | {
            "default": dimension.default,
            "description": dimension.description,
        }
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _among(name: str, values: Sequence[str]) -> Dimension:
    return Dimension(name=name, domain=Choices(tuple(values)), default=values[0], description="")


def _ask(choose: Choose, name: str, dimension: Dimension) -> Value:
    domain = dimension.domain
    if isinstance(domain, Choices):
        return domain.values[0] if len(domain.values) == 1 else choose(name, dimension)
    if domain.low == domain.high:
        return int(domain.low) if domain.integer else domain.low
    return choose(name, dimension)


def _fit(dimension: Dimension, split: Dimension | None, chosen: Mapping[str, Any]) -> Dimension:
    """At least one unit must follow the split: it bounds the depth, and the chosen depth bounds it."""
    if split is None or dimension.name not in ("depth", "split"):
        return dimension
    if dimension.name == "depth":
        allowed = [
            value for value in whole_values(dimension.domain) if value > min(whole_values(split.domain))
        ]
    else:
        allowed = [value for value in whole_values(dimension.domain) if value < chosen["depth"]]
    return replace(dimension, domain=Choices(tuple(allowed)))


def whole_values(domain: Choices | Range) -> list[int]:
    """The values of a domain of whole numbers."""
    if isinstance(domain, Choices):
        return [int(value) for value in domain.values]
    return list(range(int(domain.low), int(domain.high) + 1))


def _narrow(dimension: Dimension, wanted: Domain, path: list[str | int]) -> Dimension:
    domain = dimension.domain
    if isinstance(wanted, Interval):
        if isinstance(domain, Choices):
            raise SpaceError(
                path, f"'{dimension.name}' takes one or several of {list(domain.values)}, not a range"
            )
        low, high = (float(_check(dimension, bound, path)) for bound in (wanted.low, wanted.high))
        narrowed: Choices | Range = Range(low, high, log=domain.log, integer=domain.integer)
    elif isinstance(wanted, list):
        values = [_check(dimension, value, [*path, index]) for index, value in enumerate(wanted)]
        narrowed = Choices(tuple(dict.fromkeys(values)))
    else:
        narrowed = Choices((_check(dimension, wanted, path),))
    return replace(dimension, domain=narrowed)


def _check(dimension: Dimension, value: object, path: list[str | int]) -> Value:
    """Give the value as the domain has it: 24.0 is 24 where only whole numbers are meant."""
    domain = dimension.domain
    if isinstance(domain, Choices):
        if isinstance(value, bool | list) or value not in domain.values:
            raise SpaceError(path, f"'{dimension.name}' must be among {list(domain.values)}")
        return domain.values[domain.values.index(value)]
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not domain.low <= number <= domain.high or (domain.integer and number != int(number)):
        kind = "a whole number" if domain.integer else "a number"
        raise SpaceError(path, f"'{dimension.name}' must be {kind} from {domain.low:g} to {domain.high:g}")
    return int(number) if domain.integer else float(number)


def _read_groupings(given: Domain, tasks: TaskSet) -> tuple[Grouping, ...]:
    path: list[str | int] = ["grouped", "grouping"]
    if isinstance(given, list) and all(_is_list_of(str, entry) for entry in given):
        return (_read_grouping(given, tasks, path),)
    if isinstance(given, list) and all(_is_list_of(list, entry) for entry in given):
        return tuple(dict.fromkeys(_read_grouping(entry, tasks, [*path, i]) for i, entry in enumerate(given)))
    raise SpaceError(path, "grouping must be a partition, a list of lists of task names, or a list of such")


def _read_grouping(partition: Any, tasks: TaskSet, path: list[str | int]) -> Grouping:
    try:
        return Grouping.from_names(partition, tasks)
    except ValueError as error:
        raise SpaceError(path, str(error)) from error


def _is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)
