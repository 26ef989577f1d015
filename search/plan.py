"""A job's spec made concrete: what the schema cannot know is checked here, before anything is stored."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from coterie.models.backbones import BACKBONES
from coterie.models.cost import count_cost, measure_peak_memory_mb
from coterie.models.tasks import Direction, TaskSet
from coterie.search.data.base import Source, fingerprint
from coterie.search.data.registry import sources
from coterie.search.objective import METRICS, PLANNED, metric_directions
from coterie.search.space import (
    GROUPING_FAMILIES,
    Choices,
    Dimension,
    Space,
    SpaceError,
    build_candidate,
    make_space,
)
from coterie.search.spec import EVERY_FAMILY, DatasetSpec, JobSpec, TaskChoice
from coterie.search.store import Candidate

# Families whose networks hold what the tasks own and what they share side by side.
GATED_FAMILIES = frozenset({"interrogate", "dmtg+interrogate"})
META = torch.device("meta")  # shapes without memory


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a spec.

    Attributes:
        pointer: JSON pointer (RFC 6901) to it.
        detail: What is wrong, and what would be right.
    """

    pointer: str
    detail: str


class SpecError(ValueError):
    """A spec that asks for what does not exist or cannot be.

    Attributes:
        faults: All that was found, at least one.
    """

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("; ".join(f"{fault.pointer}: {fault.detail}" for fault in faults))
        self.faults = tuple(faults)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a search runs.

    Attributes:
        spec: As submitted.
        source: The data's source.
        options: Its options, validated.
        tasks: The job's tasks with their weights.
        input_shape: Of one sample.
        objectives: Metric and direction, in order.
        space: What may be tried.
    """

    spec: JobSpec
    source: type[Source]
    options: BaseModel
    tasks: TaskSet
    input_shape: tuple[int, ...]
    objectives: tuple[tuple[str, Direction], ...]
    space: Space

    @property
    def data_fingerprint(self) -> str:
        """Names the data: same name, same samples and splits."""
        return fingerprint(self.source, self.options)

    def largest_cost(self) -> dict[str, float]:
        """macs, params and peak memory that no candidate exceeds; nothing is allocated.

        Tasks that share by groups cost at most a whole set of single-task networks, and hold the features of
        their prefix beside those of one of them. A gated network has besides what its tasks own at most one
        shared network for each group, so twice that set, and all their features at once. A routed network is
        counted at the ends of its range of `gamma`, since its macs are convex in it.
        """
        greatest = dict.fromkeys(("macs", "params", "peak_memory_mb"), 0.0)
        measured: dict[str, dict[str, float]] = {}
        for (family, backbone), table in self.space.table.items():
            sizes = {name: max(_numbers(table[name])) for name in BACKBONES[backbone].choices}
            for parameters in _costliest(family, table):
                counted = family if family == "etr_nlp" else "single"
                candidate = Candidate(family=counted, backbone=backbone, parameters={**sizes, **parameters})
                if repr(candidate) not in measured:
                    measured[repr(candidate)] = measure_size(candidate, self.input_shape, self.tasks)
                size = measured[repr(candidate)]
                gated = family in GATED_FAMILIES
                times = {
                    "macs": 2 if gated else 1,
                    "params": 2 if gated else 1,
                    "peak_memory_mb": len(self.tasks) + 1 if gated else 2,
                }
                greatest = {name: max(greatest[name], times[name] * size[name]) for name in greatest}
        return greatest


def measure_size(candidate: Candidate, input_shape: tuple[int, ...], tasks: TaskSet) -> dict[str, float]:
    """macs, params and peak memory of a network that is the same whatever it learns; nothing is allocated."""
    with META:
        network = build_candidate(candidate, input_shape, tasks).prune()
    cost = count_cost(network, input_shape)
    return {
        "macs": cost.macs,
        "params": cost.params,
        "peak_memory_mb": measure_peak_memory_mb(network, input_shape, META),
    }


def _costliest(family: str, table: Mapping[str, Dimension]) -> Iterator[dict[str, Any]]:
    """The parameters among which the costliest network of a family is."""
    if family != "etr_nlp":
        yield {}
        return
    gammas = _numbers(table["gamma"])
    for gamma, own_width, primitives in itertools.product(
        sorted({min(gammas), max(gammas)}), _values(table["own_width"]), _values(table["primitives"])
    ):
        yield {"gamma": gamma, "own_width": own_width, "primitives": primitives}


def _values(dimension: Dimension) -> Sequence[Any]:
    assert isinstance(dimension.domain, Choices)
    return dimension.domain.values


def _numbers(dimension: Dimension) -> list[float]:
    return list(_values(dimension))


def make_plan(spec: JobSpec) -> Plan:
    """Resolve names against what is installed.

    Raises:
        SpecError: With every fault found.
    """
    source, options = _resolve_data(spec.dataset)
    tasks = _resolve_tasks(spec, source)
    faults = [*_metric_faults(spec, tasks)]
    backbones: list[str] = [*spec.search.backbones] or [source.backbone]
    families: list[str] = [*spec.search.families]
    if len(tasks) == 1 and set(families) == set(EVERY_FAMILY):
        families = [family for family in families if family not in GROUPING_FAMILIES]
    try:
        space = make_space(families, backbones, tasks, source.shape(), spec.search.space)
    except SpaceError as error:
        place = "".join(f"/{escape(part)}" for part in ("search", *error.path))
        faults.append(Fault(place, str(error)))
    if faults:
        raise SpecError(faults)
    directions = metric_directions(tasks)
    return Plan(
        spec=spec,
        source=source,
        options=options,
        tasks=tasks,
        input_shape=source.shape(),
        objectives=tuple((objective.metric, directions[objective.metric]) for objective in spec.objectives),
        space=space,
    )


def escape(part: str | int) -> str:
    """One reference token of a JSON pointer (RFC 6901)."""
    return str(part).replace("~", "~0").replace("/", "~1")


def _resolve_data(dataset: DatasetSpec) -> tuple[type[Source], BaseModel]:
    known = sources()
    if dataset.source not in known:
        raise SpecError(
            [Fault("/dataset/source", f"'{dataset.source}' is no data source; there are {list(known)}")]
        )
    source = known[dataset.source]
    try:
        return source, source.options.model_validate(dict(dataset.options))
    except ValidationError as error:
        raise SpecError(
            [
                Fault("/dataset/options" + "".join(f"/{escape(part)}" for part in fault["loc"]), fault["msg"])
                for fault in error.errors(include_url=False, include_input=False)
            ]
        ) from error


def _resolve_tasks(spec: JobSpec, source: type[Source]) -> TaskSet:
    known = {task.name: task for task in source.tasks()}
    if not spec.tasks:
        return source.tasks()
    choices = [TaskChoice(name=task) if isinstance(task, str) else task for task in spec.tasks]
    faults = [
        Fault(f"/tasks/{index}", f"'{choice.name}' is no task of '{source.name}'; there are {list(known)}")
        for index, choice in enumerate(choices)
        if choice.name not in known
    ]
    if faults:
        raise SpecError(faults)
    return TaskSet(replace(known[choice.name], weight=choice.weight) for choice in choices)


def _metric_faults(spec: JobSpec, tasks: TaskSet) -> Iterator[Fault]:
    directions = metric_directions(tasks)
    named = [
        *((f"/objectives/{index}", objective.metric) for index, objective in enumerate(spec.objectives)),
        *((f"/constraints/{index}", constraint.metric) for index, constraint in enumerate(spec.constraints)),
    ]
    for place, metric in named:
        if metric in PLANNED:
            yield Fault(f"{place}/metric", f"'{metric}' is not implemented yet")
        elif metric not in directions:
            why = (
                "needs a task that classifies (binary or multiclass), and the job has none"
                if metric in METRICS
                else "is no metric"
            )
            yield Fault(f"{place}/metric", f"'{metric}' {why}; there are {', '.join(directions)}")
    for index, objective in enumerate(spec.objectives):
        own_direction = directions.get(objective.metric)
        if objective.direction is not None and own_direction not in (None, objective.direction):
            yield Fault(
                f"/objectives/{index}/direction",
                f"the direction of '{objective.metric}' must be {own_direction}",
            )
