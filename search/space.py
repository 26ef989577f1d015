"""The conditional search space: which dimensions a family has on a backbone, and how a job narrows them.

One declaration serves the sampler, the checks of a job's `space` and the JSON Schemas of `/v1/families`.
A candidate is drawn by *walking* the space: each open dimension is put to a `choose` function, in a fixed
order, and what it answers decides which dimensions follow. So the choices alone rebuild a candidate, and a
candidate tells its choices.
"""

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from coterie.models.affinity import AFFINITY_LR
from coterie.models.backbones import BACKBONES
from coterie.models.backbones.base import ImageBackbone
from coterie.models.balancing import BALANCINGS
from coterie.models.families import MultiTaskNetwork, build_network
from coterie.models.families.etr_nlp import check_routing
from coterie.models.heads import plan_head
from coterie.models.tasks import Grouping, TaskSet
from coterie.search.recipe import RECIPE_DEFAULTS, recipe_of
from coterie.search.spec import Domain, Interval
from coterie.search.store import Candidate

Value = bool | int | float | str

GREATEST_GROUPS = 8  # more networks than that on one input are no grouping any more; a job may ask for fewer
EXAMPLE_INPUT = (3, 32, 32)  # every backbone takes it, and none has another number of units on another input

# Families whose tasks fall into groups: one task has nothing to group.
# Families that a job may give their partition, and what there is to choose of each only without one.
GIVEN_GROUPING = {"grouped": {"groups"}, "dmtg+interrogate": {"groups", "tau", "logits_lr", "group_share"}}
GROUPING_FAMILIES = frozenset({"grouped", "dmtg", "affinity", "dmtg+interrogate"})


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

    @property
    def finite(self) -> bool:
        """Whether it can be counted through."""
        return self.integer or self.low == self.high

    def share(self, value: float) -> float:
        """Say how far a number is from `low`, 0, to `high`, 1, on the scale on which it is drawn."""
        low, high, at = (math.log(n) if self.log else n for n in (self.low, self.high, value))
        return (at - low) / (high - low)

    def at(self, share: float) -> float:
        """Give the number that is so far; the nearest one inside."""
        low, high = (math.log(n) if self.log else n for n in (self.low, self.high))
        found = low + share * (high - low)
        found = min(max(math.exp(found) if self.log else found, self.low), self.high)
        return round(found) if self.integer else found


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One hyper-parameter of a family.

    Attributes:
        name: Name in a candidate's parameters and in a job's `space`.
        domain: What it may be.
        default: Its value in the family's default candidate.
        description: What it does, for the catalogue.
        searched: What a job tries that does not name it; None for the whole domain.
        stands_for: What a value that is a name stands for in the family's arguments.
    """

    name: str
    domain: Choices | Range
    default: Value
    description: str
    searched: Choices | None = None
    stands_for: Mapping[Any, Any] = field(default_factory=dict)

    @property
    def unnamed(self) -> "Dimension":
        """The dimension in a job that does not name it."""
        return self if self.searched is None else replace(self, domain=self.searched, searched=None)


Choose = Callable[[str, Dimension], Value]
Recall = Callable[[str, Dimension], Value | None]


class SpaceError(ValueError):
    """A job's `search` asks for what is not there or does not go together.

    Attributes:
        path: Where in `search`: keys and indices.
    """

    def __init__(self, path: Sequence[str | int], detail: str) -> None:
        super().__init__(detail)
        self.path = tuple(path)


def _option(
    name: str, domain: Choices | Range, default: Value, description: str, **stands_for: Any
) -> Dimension:
    """A dimension that stays at its default unless a job names it."""
    return Dimension(
        name=name,
        domain=domain,
        default=default,
        description=description,
        searched=Choices((default,)),
        stands_for=stands_for,
    )


RECIPE = (
    Dimension(
        name="lr",
        domain=Range(1e-4, 3e-2, log=True),
        default=RECIPE_DEFAULTS["lr"],
        description="Learning rate of Adam.",
    ),
    Dimension(
        name="weight_decay",
        domain=Range(1e-7, 1e-2, log=True),
        default=RECIPE_DEFAULTS["weight_decay"],
        description="Decay of the weights, added to their gradient.",
    ),
    Dimension(
        name="batch_size",
        domain=Choices((32, 64, 128, 256)),
        default=RECIPE_DEFAULTS["batch_size"],
        description="Samples a step.",
    ),
    Dimension(
        name="balancing",
        domain=Choices(tuple(BALANCINGS)),
        default=RECIPE_DEFAULTS["balancing"],
        # The others take a backward pass for each task.
        searched=Choices(("fixed", "uncertainty", "dwa", "random")),
        description="How the tasks' losses or gradients are combined.",
    ),
)

_TAU = Dimension(
    name="tau",
    domain=Range(0.5, 8.0, log=True),
    default=2.5,
    description="Temperature of the relaxed grouping (DMTG's CelebA recipe: 2.5).",
)
_LOGITS_LR = Dimension(
    name="logits_lr",
    domain=Range(1e-4, 1e-1, log=True),
    default=5e-3,
    description="Learning rate of the grouping logits (the paper uses the weights').",
)
_PROBE = _option(
    "probe",
    Range(0.05, 0.5),
    0.25,
    "Share of the epochs in which the affinity of the tasks is measured.",
)
_GATES = (
    Dimension(
        name="sparsity_weight",
        domain=Range(0.01, 2.0, log=True),
        default=0.1,
        description="Strength of the loss that closes gates, in multiples of the sum of the task weights.",
    ),
    Dimension(
        name="own_share",
        domain=Range(0.0, 1.0),
        default=0.0,
        description="Share of its own channels that a task may keep without that loss.",
    ),
    Dimension(
        name="gate_lr",
        domain=Range(5e-3, 0.2, log=True),
        default=0.05,
        description="Learning rate of the gates.",
    ),
)

_DMTG = (
    _TAU,
    _LOGITS_LR,
    Dimension(
        name="init",
        domain=Choices(("equal", "affinity")),
        default="equal",
        description="Start of the grouping logits: all equal, as published, or by measured affinity.",
    ),
    Dimension(
        name="fine_tune",
        domain=Range(0.0, 0.4),
        default=0.0,
        searched=Choices((0.0, 0.2)),
        description="Share of the epochs, at the end, that train each group on its own tasks.",
    ),
    _PROBE,
    _option(
        "epsilon",
        Range(0.0, 0.5),
        0.0,
        "A head whose expected share of its task stays below this is dropped during training.",
    ),
    _option("patience", Range(1, 20, integer=True), 2, "Epochs that it has to stay below it."),
    _option(
        "tau_end",
        Choices(("none", 0.25, 0.5, 1.0)),
        "none",
        "Temperature at the last epoch, reached geometrically; none keeps it constant.",
        none=None,
    ),
    _option(
        "loss_normalisation",
        Choices(("none", "initial", "running")),
        "none",
        "What each task's loss is divided by, for losses of different scale.",
    ),
    _option(
        "scaling",
        Choices(("auto", "off", "intended", "as_released")),
        "auto",
        "Scaling of the gradients between prefix, branches and heads; auto is the paper's choice, intended "
        "where a task is dense.",
    ),
    _option("entropy_weight", Range(0.0, 10.0), 0.0, "Strength of the entropy term of the released code."),
)

_INTERROGATE = (
    *_GATES,
    _option("gate_start", Range(0.0, 2.0), 0.5, "Logit that every gate starts with."),
    _option(
        "weighting", Choices(("plain", "macs")), "plain", "What a unit counts in the loss that closes gates."
    ),
    _option("frozen", Range(0.0, 0.5), 0.1, "Share of the epochs, at the end, in which no gate moves."),
)

# Banks of primitives by name.
_BANKS: Mapping[str, tuple[str, ...]] = {
    "all": ("random_conv", "max_pool", "avg_pool", "identity"),
    "random": ("random_conv", "identity"),
    "pooling": ("max_pool", "avg_pool", "identity"),
    "with_noise": ("random_conv", "max_pool", "avg_pool", "identity", "noise"),
}

_ETR_NLP = (
    Dimension(
        name="gamma",
        domain=Choices((0.1, 0.25, 0.5, 0.75, 0.9, 1.0)),
        searched=Choices((0.25, 0.5, 0.75, 1.0)),
        default=0.5,
        description="Share of the channels that all tasks share.",
    ),
    _option(
        "own_width",
        Choices(("split", "full")),
        "split",
        "Whether the tasks deal out what is left of the width, or each gets as much.",
    ),
    _option(
        "primitives",
        Choices(tuple(_BANKS)),
        "all",
        "The bank of fixed primitives: "
        + "; ".join(f"{name}: {', '.join(bank)}" for name, bank in _BANKS.items())
        + ".",
        **_BANKS,
    ),
    _option("density", Range(0.05, 1.0), 0.5, "Share of entries other than 0 in the random primitives."),
    _option("dilation", Range(1, 4, integer=True), 1, "Of the random convolutions."),
)

_AFFINITY = (
    Dimension(
        name="method",
        domain=Choices(("affinity", "tag", "random")),
        default="affinity",
        description="How the partition is found.",
    ),
    _PROBE,
    _option(
        "affinity_lr",
        Range(1e-4, 0.1, log=True),
        AFFINITY_LR,
        "Length of the gradient step that is measured.",
    ),
)

_DMTG_INTERROGATE = (
    _TAU,
    _LOGITS_LR,
    *_GATES,
    _option(
        "group_share", Range(0.2, 0.8), 0.5, "Share of the epochs that learn the groups, before the gates."
    ),
)


def backbone_dimensions(backbone: str) -> tuple[Dimension, ...]:
    """The sizes of a backbone that may be varied."""
    kind = BACKBONES[backbone]
    words = {
        "width": "Factor of the published network's channels."
        if issubclass(kind, ImageBackbone)
        else "Features of each unit.",
        "depth": "Number of units.",
    }
    return tuple(
        Dimension(
            name=name,
            domain=Choices(tuple(values)),
            default=kind.defaults[name],
            description=words[name],
        )
        for name, values in kind.choices.items()
    )


def recipe_dimensions(family: str, tasks: int) -> tuple[Dimension, ...]:
    """How a family's networks are trained: where tasks share nothing, there is nothing to balance."""
    if family != "single" and tasks > 1:
        return RECIPE
    return tuple(
        replace(dimension, searched=Choices((dimension.default,)))
        if dimension.name == "balancing"
        else dimension
        for dimension in RECIPE
    )


def family_dimensions(family: str, backbone: str, tasks: int) -> tuple[Dimension, ...]:
    """A family's own dimensions for a number of tasks; `grouping` is walked by `Space`."""
    groups = Dimension(
        name="groups",
        domain=Choices(tuple(range(2, min(tasks, GREATEST_GROUPS) + 1))),
        default=2,
        description="Number of groups (where they are learned: the greatest number); at most the number of "
        "tasks.",
    )
    split = Dimension(
        name="split",
        domain=Range(0, _most_units(backbone) - 1, integer=True),
        default=0,
        description="Units at the start that all groups share; always fewer than the backbone has.",
    )
    own: Mapping[str, tuple[Dimension, ...]] = {
        "single": (),
        "shared": (),
        "grouped": (groups, split),
        "dmtg": (groups, split, *_DMTG),
        "interrogate": _INTERROGATE,
        "etr_nlp": _ETR_NLP,
        "affinity": (groups, split, *_AFFINITY),
        "dmtg+interrogate": (groups, split, *_DMTG_INTERROGATE),
    }
    return own[family]


def dimensions(family: str, backbone: str, tasks: int) -> dict[str, Dimension]:
    """All dimensions of a family on a backbone, by name."""
    every = (
        *backbone_dimensions(backbone),
        *recipe_dimensions(family, tasks),
        *family_dimensions(family, backbone, tasks),
    )
    return {dimension.name: dimension for dimension in every}


def sizes_of(candidate: Candidate) -> dict[str, Any]:
    """The sizes of a candidate's backbone."""
    return {part.name: candidate.parameters[part.name] for part in backbone_dimensions(candidate.backbone)}


def build_candidate(candidate: Candidate, input_shape: tuple[int, ...], tasks: TaskSet) -> MultiTaskNetwork:
    """Build a candidate's network, its weights drawn from torch's global generator: the caller seeds it.

    Raises:
        ValueError: If the candidate is impossible.
    """
    sizes, recipe = sizes_of(candidate), recipe_of(candidate)
    stands_for = {
        dimension.name: dimension.stands_for
        for dimension in family_dimensions(candidate.family, candidate.backbone, len(tasks))
    }
    parameters = {
        name: stands_for[name].get(value, value) if stands_for.get(name) else value
        for name, value in candidate.parameters.items()
        if name not in sizes and name not in recipe
    }
    backbone = BACKBONES[candidate.backbone](input_shape=input_shape, **sizes)
    return build_network(candidate.family, backbone=backbone, tasks=tasks, parameters=parameters)


@dataclass(frozen=True, kw_only=True)
class Space:
    """What a job searches.

    Attributes:
        families: In the order of the job.
        backbones: Names.
        tasks: The job's tasks.
        table: (family, backbone) -> dimension name -> the dimension as narrowed: its domain is what is tried.
        groupings: The partitions that a family may take, by its name, where the job gives them.
        gammas: (backbone, width) -> the values of `etr_nlp`'s gamma that leave every part its channels.
    """

    families: tuple[str, ...]
    backbones: tuple[str, ...]
    tasks: TaskSet
    table: Mapping[tuple[str, str], Mapping[str, Dimension]]
    groupings: Mapping[str, tuple[Grouping, ...]] = field(default_factory=dict)
    gammas: Mapping[tuple[str, Value], tuple[Value, ...]] = field(default_factory=dict)

    def walk(self, choose: Choose) -> Candidate:
        """Draw a candidate: `choose(name, dimension)` answers for each dimension of more than one value.

        A name always stands for the same domain. The families share those of the recipe and of the backbone's
        sizes, but for a family that may take other values.
        """
        family = str(_ask(choose, "family", _among("family", self.families)))
        backbone = str(_ask(choose, "backbone", _among("backbone", self.backbones)))
        parameters: dict[str, Any] = {}
        for dimension in self._dimensions(family, backbone):
            name, fitted = self._fit(dimension, family, backbone, parameters)
            shared = self._shared.get((backbone, dimension.name)) == fitted.domain
            full_name = f"{backbone}.{name}" if shared else f"{family}.{backbone}.{name}"
            parameters[dimension.name] = _ask(choose, full_name, fitted)
        if family == "grouped" or family in self.groupings:
            grouping = self._choose_grouping(choose, family, parameters.pop("groups", None))
            parameters["grouping"] = grouping.names(self.tasks)
        return Candidate(family=family, backbone=backbone, parameters=parameters)

    def recall(self, candidate: Candidate) -> Recall:
        """Give what answers a walk as for `candidate`; None to what its parameters don't say."""
        grouping = candidate.parameters.get("grouping")
        labels: Mapping[str, Value] = {}
        if grouping is not None:
            found = Grouping.from_names(grouping, self.tasks)
            names = [f"{candidate.family}.grouping.{task.name}" for task in self.tasks]
            labels = dict(zip(names, found.labels, strict=True))
            labels[f"{candidate.family}.grouping"] = json.dumps(found.labels)
        told = {"family": candidate.family, "backbone": candidate.backbone, **candidate.parameters}
        if grouping is not None:
            told.setdefault("groups", len(grouping))

        def answer(name: str, dimension: Dimension) -> Value | None:
            return labels[name] if name in labels else told.get(dimension.name)

        return answer

    @property
    def finite(self) -> bool:
        """Whether there is an end to its candidates."""
        return all(
            isinstance(dimension.domain, Choices) or dimension.domain.finite
            for family, backbone in self.table
            for dimension in self._dimensions(family, backbone)
        )

    def candidates(self) -> Iterator[Candidate]:
        """Go through all candidates of a finite space, each once, always in the same order.

        Raises:
            ValueError: If the space is not finite.
        """
        if not self.finite:
            raise ValueError("space: must be finite to be counted through, found ranges of real numbers")
        places: list[int] | None = []
        while places is not None:
            odometer = _Odometer(places)
            yield self.walk(odometer.choose)
            places = odometer.next_places()

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

    @cached_property
    def _shared(self) -> dict[tuple[str, str], Choices | Range]:
        """(backbone, name) -> the domain that most families have there, for what all of them have."""
        found: dict[tuple[str, str], Counter[Choices | Range]] = {}
        for (_, backbone), row in self.table.items():
            for common in (*backbone_dimensions(backbone), *RECIPE):
                domain = row[common.name].domain
                if not _is_single(domain):
                    found.setdefault((backbone, common.name), Counter())[domain] += 1
        return {place: counts.most_common(1)[0][0] for place, counts in found.items()}

    def _dimensions(self, family: str, backbone: str) -> Iterator[Dimension]:
        """Those that are walked: a given partition says the groups."""
        given = GIVEN_GROUPING[family] if family in self.groupings else ()
        return (d for d in self.table[family, backbone].values() if d.name not in given)

    def _fit(
        self, dimension: Dimension, family: str, backbone: str, chosen: Mapping[str, Any]
    ) -> tuple[str, Dimension]:
        """What is left of a dimension after what was chosen, under a name of its own for each such choice.

        At least one unit must follow the split: it bounds the depth, and the chosen depth bounds it.
        """
        split = self.table[family, backbone].get("split")
        if dimension.name == "depth" and split is not None:
            least = min(whole_values(split.domain))
            return "depth", _only(
                dimension, [value for value in whole_values(dimension.domain) if value > least]
            )
        if dimension.name == "split":
            units = chosen.get("depth", _most_units(backbone))
            left = [value for value in whole_values(dimension.domain) if value < units]
            return f"split<{units}", _only(dimension, left)
        if family == "etr_nlp" and dimension.name == "gamma":
            fitting = self.gammas[backbone, chosen["width"]]
            return f"gamma in {', '.join(map(str, fitting))}", _only(dimension, fitting)
        return dimension.name, dimension

    def _choose_grouping(self, choose: Choose, family: str, groups: Any) -> Grouping:
        """One of the job's partitions, or any canonical one of `groups` groups, task by task.

        The labels of the tasks form a restricted growth string, in which each canonical partition is written
        exactly once; so a sampler learns "with the first task or not" for each task by itself.
        """
        name = f"{family}.grouping"
        if family in self.groupings:
            texts = tuple(json.dumps(grouping.labels) for grouping in self.groupings[family])
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
    input_shape: tuple[int, ...],
    wanted: Mapping[str, Mapping[str, Domain]],
) -> Space:
    """Narrow the families' dimensions to what the job wants, and check that it can be built.

    What a dimension may be differs between backbones. Each one keeps those of the values wanted that it has;
    one that has none of them is not narrowed.

    Raises:
        SpaceError: If it names a family or dimension that is not searched, or a value that no backbone of the
            job has, or the input, the tasks, a backbone and a size don't go together.
    """
    for family in wanted:
        if family not in families:
            raise SpaceError(
                ["space", family], f"'{family}' is not among the job's families {list(families)}"
            )
    for family in families:
        if family in GROUPING_FAMILIES and len(tasks) < 2:
            raise SpaceError(["families"], f"family '{family}' needs at least two tasks, found {len(tasks)}")
    table: dict[tuple[str, str], dict[str, Dimension]] = {}
    groupings: dict[str, tuple[Grouping, ...]] = {}
    gammas: dict[tuple[str, Value], tuple[Value, ...]] = {}
    for family in families:
        narrowing = dict(wanted.get(family, {}))
        given = narrowing.pop("grouping", None) if family in GIVEN_GROUPING else None
        if given is not None:
            for name in GIVEN_GROUPING[family] & narrowing.keys():
                raise SpaceError(
                    ["space", family, name], f"'grouping' says the groups: give no '{name}' beside it"
                )
            groupings[family] = _read_groupings(family, given, tasks)
        own = {backbone: dimensions(family, backbone, len(tasks)) for backbone in backbones}
        narrowed = {name: _narrow(family, name, own, domain) for name, domain in narrowing.items()}
        for number, backbone in enumerate(backbones):
            row = {name: dimension.unnamed for name, dimension in own[backbone].items()}
            row |= {name: on[backbone] for name, on in narrowed.items() if backbone in on}
            _check_split(family, backbone, row)
            _check_sizes(family, backbone, number, row, tasks, input_shape)
            table[family, backbone] = row
        if family == "etr_nlp":
            rows = {backbone: table[family, backbone] for backbone in backbones}
            gammas = _fitting_gammas(rows, narrowed, narrowing, tasks, input_shape)
            for backbone, row in rows.items():
                row["width"] = _only(row["width"], [width for name, width in gammas if name == backbone])
    return Space(
        families=tuple(families),
        backbones=tuple(backbones),
        tasks=tasks,
        table=table,
        groupings=groupings,
        gammas=gammas,
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


def json_schema(family: str, backbones: Sequence[str], tasks: int) -> dict[str, Any]:
    """JSON Schema of a family's values in a candidate, with defaults.

    What differs between backbones is shown for each form, with the backbones' names as title.
    """
    by_backbone = {
        backbone: schema_of(dimensions(family, backbone, tasks).values())["properties"]
        for backbone in backbones
    }
    properties: dict[str, Any] = {}
    for name in dict.fromkeys(name for fields in by_backbone.values() for name in fields):
        fields = {backbone: fields[name] for backbone, fields in by_backbone.items() if name in fields}
        forms: list[tuple[list[str], dict[str, Any]]] = []
        for backbone, entry in fields.items():
            alike = next((names for names, form in forms if form == entry), None)
            if alike is None:
                forms.append(([backbone], entry))
            else:
                alike.append(backbone)
        (names, form), *others = forms
        if others or len(names) < len(by_backbone):
            properties[name] = {"anyOf": [{"title": ", ".join(names), **form} for names, form in forms]}
        else:
            properties[name] = form
    if family in GIVEN_GROUPING:
        otherwise = "all are tried" if family == "grouped" else "it is learned"
        properties["grouping"] = {
            "type": "array",
            "items": {"type": "array", "items": {"type": "string"}, "minItems": 1},
            "description": f"The partition of the tasks, as lists of their names; by default {otherwise}.",
        }
    return {"type": "object", "properties": properties, "additionalProperties": False}


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
            "description": dimension.description + _words_for_unnamed(dimension),
        }
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _words_for_unnamed(dimension: Dimension) -> str:
    """What a job tries that does not name the dimension, where that is not the whole domain."""
    searched = dimension.searched
    if searched is None:
        return ""
    if searched.values == (dimension.default,):
        return " Stays at its default unless the job names it."
    return f" Unless the job names it: {', '.join(map(str, searched.values))}."


def whole_values(domain: Choices | Range) -> list[int]:
    """The values of a domain of whole numbers."""
    if isinstance(domain, Choices):
        return [int(value) for value in domain.values]
    return list(range(int(domain.low), int(domain.high) + 1))


def _most_units(backbone: str) -> int:
    """The most units that a backbone of this kind has."""
    kind = BACKBONES[backbone]
    sizes = {name: max(values) for name, values in kind.choices.items()}
    return kind(input_shape=EXAMPLE_INPUT, **sizes).units


def _among(name: str, values: Sequence[str]) -> Dimension:
    return Dimension(name=name, domain=Choices(tuple(values)), default=values[0], description="")


def _only(dimension: Dimension, values: Sequence[Value]) -> Dimension:
    return replace(dimension, domain=Choices(tuple(values)))


def _is_single(domain: Choices | Range) -> bool:
    return len(domain.values) == 1 if isinstance(domain, Choices) else domain.low == domain.high


def _ask(choose: Choose, name: str, dimension: Dimension) -> Value:
    domain = dimension.domain
    if not _is_single(domain):
        return choose(name, dimension)
    if isinstance(domain, Choices):
        return domain.values[0]
    return int(domain.low) if domain.integer else domain.low


class _Odometer:
    """Answers a walk by the place of each value in its domain, and counts on: the last answer turns first."""

    def __init__(self, places: Sequence[int]) -> None:
        self._given = iter(places)
        self._taken: list[tuple[int, int]] = []  # place and number of values

    def choose(self, name: str, dimension: Dimension) -> Value:
        domain = dimension.domain
        values = domain.values if isinstance(domain, Choices) else whole_values(domain)
        place = next(self._given, 0)
        self._taken.append((place, len(values)))
        return values[place]

    def next_places(self) -> list[int] | None:
        """Those of the next walk; None after the last one."""
        places = [place for place, _ in self._taken]
        for index in reversed(range(len(places))):
            if places[index] + 1 < self._taken[index][1]:
                return [*places[:index], places[index] + 1]
        return None


def _check_split(family: str, backbone: str, table: Mapping[str, Dimension]) -> None:
    split, depth = table.get("split"), table.get("depth")
    units = _most_units(backbone) if depth is None else max(whole_values(depth.domain))
    if split is not None and min(whole_values(split.domain)) >= units:
        words = "so at most" if depth is None else "less than depth, so at most"
        raise SpaceError(["space", family, "split"], f"split must be {words} {units - 1} on '{backbone}'")


def _check_sizes(
    family: str,
    backbone: str,
    number: int,
    table: Mapping[str, Dimension],
    tasks: TaskSet,
    input_shape: tuple[int, ...],
) -> None:
    """Check each size of a backbone on the job's input, and that its features suit the tasks' heads."""
    for sizes in size_choices(backbone, table):
        try:
            built = BACKBONES[backbone](input_shape=input_shape, **sizes)
            for task in tasks:
                plan_head(task, built)
        except ValueError as error:
            name = str(error).partition(":")[0]
            raise SpaceError(
                ["space", family, name] if name in sizes else ["backbones", number], str(error)
            ) from error


def size_choices(backbone: str, table: Mapping[str, Dimension]) -> Iterator[dict[str, Any]]:
    """Go through the sizes of a backbone that are tried."""
    names = list(BACKBONES[backbone].choices)
    domains = [table[name].domain for name in names]
    assert all(isinstance(domain, Choices) for domain in domains)
    for values in itertools.product(*(domain.values for domain in domains if isinstance(domain, Choices))):
        yield dict(zip(names, values, strict=True))


def _fitting_gammas(
    table: Mapping[str, Mapping[str, Dimension]],
    narrowed: Mapping[str, Mapping[str, Dimension]],
    wanted: Mapping[str, Domain],
    tasks: TaskSet,
    input_shape: tuple[int, ...],
) -> dict[tuple[str, Value], tuple[Value, ...]]:
    """For each backbone and width that leave every part its channels at some gamma, the gammas that do so.

    Args:
        table: backbone -> dimension name -> the dimension as narrowed.
        narrowed: Name of a dimension -> the backbones on which the job narrows it.
        wanted: What the job names.
        tasks: The job's tasks.
        input_shape: Of one sample.

    Raises:
        SpaceError: If a backbone has no such width, or a width that the job names has no such gamma, or a
            gamma that it names no such width on any backbone.
    """
    path = ["space", "etr_nlp"]
    fitting: dict[tuple[str, Value], tuple[Value, ...]] = {}
    refused: dict[Value, str] = {}
    for backbone, row in table.items():
        gamma, own_width = row["gamma"].domain, row["own_width"].domain
        assert isinstance(gamma, Choices)
        assert isinstance(own_width, Choices)
        fits = False
        for sizes in size_choices(backbone, row):
            built = BACKBONES[backbone](input_shape=input_shape, **sizes)
            found = []
            for value in gamma.values:
                try:
                    for own in own_width.values:
                        check_routing(built, tasks, gamma=float(value), own_width=str(own))  # type: ignore[arg-type]
                except ValueError as error:
                    refused[value] = reason = str(error)
                else:
                    found.append(value)
            if found:
                fits = True
                fitting[backbone, sizes["width"]] = tuple(found)
            elif backbone in narrowed.get("width", {}):
                raise SpaceError([*path, "width"], reason)
        if not fits:
            raise SpaceError([*path, "gamma" if "gamma" in wanted else "width"], reason)
    for value, place in _places(wanted.get("gamma", []), [*path, "gamma"]):
        if not any(value in gammas for gammas in fitting.values()):
            raise SpaceError(place, f"gamma {value} fits no width that is tried; {refused[value]}")
    return fitting


def _narrow(
    family: str, name: str, own: Mapping[str, Mapping[str, Dimension]], wanted: Domain
) -> dict[str, Dimension]:
    """Narrow a dimension on each backbone that has some of the values wanted, to these.

    Args:
        family: Its family.
        name: Its name.
        own: backbone -> dimension name -> the dimension, for every backbone of the job.
        wanted: What the job wants.

    Raises:
        SpaceError: If no backbone has the dimension, or one of the values.
    """
    path = ["space", family, name]
    on = {backbone: known[name] for backbone, known in own.items() if name in known}
    if not on:
        raise SpaceError(path, f"'{family}' has no '{name}'; it has {sorted(set().union(*own.values()))}")
    if isinstance(wanted, Interval):
        return _narrow_range(on, wanted, path)
    found: dict[str, list[Value]] = {}
    for value, place in _places(wanted, path):
        for backbone, held in _held(on, value, place).items():
            found.setdefault(backbone, []).append(held)
    return {
        backbone: replace(on[backbone], domain=Choices(tuple(dict.fromkeys(values))), searched=None)
        for backbone, values in found.items()
    }


def _narrow_range(
    on: Mapping[str, Dimension], wanted: Interval, path: Sequence[str | int]
) -> dict[str, Dimension]:
    """Narrow a dimension to a range, on each backbone that has a part of it."""
    found: dict[str, Dimension] = {}
    for backbone, dimension in on.items():
        domain = dimension.domain
        if isinstance(domain, Choices):
            raise SpaceError(
                path, f"'{dimension.name}' takes one or several of {list(domain.values)}, not a range"
            )
        low, high = max(wanted.low, domain.low), min(wanted.high, domain.high)
        if low <= high:
            found[backbone] = replace(dimension, domain=replace(domain, low=low, high=high), searched=None)
    for bound in (wanted.low, wanted.high):
        _held(on, bound, path)
    return found


def _places(wanted: Domain, path: Sequence[str | int]) -> Iterator[tuple[Any, Sequence[str | int]]]:
    """The values that a job names, each with its path."""
    if not isinstance(wanted, list):
        yield wanted, path
        return
    for index, value in enumerate(wanted):
        yield value, [*path, index]


def _held(on: Mapping[str, Dimension], value: object, path: Sequence[str | int]) -> dict[str, Value]:
    """Give the value as the dimension has it on each backbone that has it; SpaceError where none has."""
    held: dict[str, Value] = {}
    refused: dict[str, list[str]] = {}
    for backbone, dimension in on.items():
        try:
            held[backbone] = _check(dimension, value)
        except ValueError as error:
            refused.setdefault(str(error), []).append(backbone)
    if not held:
        one_rule = len(refused) == 1
        raise SpaceError(
            path, "; ".join(rule if one_rule else f"{rule} on {names}" for rule, names in refused.items())
        )
    return held


def _check(dimension: Dimension, value: object) -> Value:
    """Give the value as the domain has it: 24.0 is 24 where only whole numbers are meant."""
    domain = dimension.domain
    if isinstance(domain, Choices):
        if isinstance(value, bool | list) or value not in domain.values:
            raise ValueError(f"'{dimension.name}' must be among {list(domain.values)}")
        return domain.values[domain.values.index(value)]
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not domain.low <= number <= domain.high or (domain.integer and number != int(number)):
        kind = "a whole number" if domain.integer else "a number"
        raise ValueError(f"'{dimension.name}' must be {kind} from {domain.low:g} to {domain.high:g}")
    return int(number) if domain.integer else float(number)


def _read_groupings(family: str, given: Domain, tasks: TaskSet) -> tuple[Grouping, ...]:
    path: list[str | int] = ["space", family, "grouping"]
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
