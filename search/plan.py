"""A job's spec made concrete: what the schema cannot know is checked here, before anything is stored."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from coterie.models.backbones import BACKBONES
from coterie.models.cost import count_cost, measure_peak_memory_mb
from coterie.models.metrics import METRIC_SCALES
from coterie.models.tasks import CLASSIFICATION, KIND_METRICS, Direction, Grouping, TaskSet
from coterie.search.data.base import Source, fingerprint
from coterie.search.data.registry import sources
from coterie.search.faults import Fault, SpecError, escape
from coterie.search.objective import METRICS, PLANNED, YARDSTICK_SEEDS, metric_directions
from coterie.search.scheduler import NOT_JUDGED, make_scheduler
from coterie.search.space import (
    GROUPING_FAMILIES,
    Choices,
    Dimension,
    Space,
    SpaceError,
    build_candidate,
    make_space,
    whole_values,
)
from coterie.search.spec import EVERY_FAMILY, DatasetSpec, JobSpec, TaskChoice
from coterie.search.store import Candidate

# Families whose networks hold what the tasks own and what they share side by side.
GATED_FAMILIES = frozenset({"interrogate", "dmtg+interrogate"})
GAINS = frozenset({"delta_m", "delta_m_own_width", "normalized_gain"})  # all other metrics are never below 0
# Shares and angles are bounded; an error relative to its label is none.
GREATEST_VALUES = {name: scale for name, scale in METRIC_SCALES.items() if name != "rel_error"}
COUNTED = ("macs", "params")
SIZES = (*COUNTED, "peak_memory_mb")  # what is known of a network before it is trained
# A few seconds each for small networks: more than that take longer than the search that they serve.
MOST_REFERENCES = 500
META = torch.device("meta")  # shapes without memory


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

    @property
    def devices(self) -> float:
        """How many devices a trial reserves, for the charge: its GPUs, or its CPUs where it has none."""
        wish = self.spec.resources
        return wish.gpus if wish.gpus > 0 else wish.cpus

    def judges(self, metric: str) -> bool:
        """Whether something in the job is decided by this metric, so that every candidate needs its value."""
        return metric in {named for _, named in _named_metrics(self.spec)}

    def sizes(self) -> list[tuple[str, dict[str, Any]]]:
        """Every backbone with each of its sizes that some family may take."""
        found = {
            json.dumps([backbone, sizes]): (backbone, sizes)
            for (_, backbone), row in self.space.table.items()
            for sizes in _sizes(backbone, row)
        }
        return list(found.values())

    @property
    def own_width_references(self) -> int:
        """How many single-task networks `delta_m_own_width` of every size in the space needs."""
        return len(self.sizes()) * len(self.tasks) * len(YARDSTICK_SEEDS)

    def smallest_sizes(self) -> Iterator[dict[str, float]]:
        """macs, params and peak memory of networks among which the one with the fewest macs or params is.

        Gates may all close, and learned groups come to one, so these families come down to `shared`. What is
        quick to count comes first; nothing is allocated.
        """
        counted: set[str] = set()
        for family, backbone in sorted(self.space.table, key=lambda place: place[0] == "etr_nlp"):
            for candidate in _smallest(self.space, family, backbone, self.input_shape):
                if repr(candidate) not in counted:
                    counted.add(repr(candidate))
                    yield measure_size(candidate, self.input_shape, self.tasks)

    def largest_cost(self) -> dict[str, float]:
        """macs, params and peak memory that no candidate exceeds; nothing is allocated.

        Tasks that share by groups cost at most a whole set of single-task networks, and hold the features of
        their prefix beside those of one of them. A gated network has besides what its tasks own at most one
        shared network for each group, so twice that set, and all their features at once. A routed network is
        counted at the ends of its range of `gamma`, since its macs are convex in it.
        """
        greatest = dict.fromkeys(SIZES, 0.0)
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


def _smallest(space: Space, family: str, backbone: str, input_shape: tuple[int, ...]) -> Iterator[Candidate]:
    """The candidates among which the smallest network that a family can come to is."""
    row = space.table[family, backbone]
    least = {name: min(_numbers(row[name])) for name in BACKBONES[backbone].choices}
    grouping = _fewest_groups(space, family, row)
    if family == "etr_nlp":
        widths: dict[Any, Any] = {}  # gamma -> the narrowest width that leaves every part its channels
        for width in sorted(_values(row["width"])):
            for gamma in space.gammas[backbone, width]:
                widths.setdefault(gamma, width)
        for (gamma, width), own_width, primitives in itertools.product(
            widths.items(), _values(row["own_width"]), _values(row["primitives"])
        ):
            own = {"width": width, "gamma": gamma, "own_width": own_width, "primitives": primitives}
            yield Candidate(family=family, backbone=backbone, parameters=least | own)
    elif grouping is not None:
        # The deepest may be the smallest, where it lets the groups share more units.
        for sizes in _sizes(backbone, row):
            units = BACKBONES[backbone](input_shape=input_shape, **sizes).units
            splits = [split for split in whole_values(row["split"].domain) if split < units]
            if sizes["width"] == least["width"] and splits:
                own = {"grouping": grouping.names(space.tasks), "split": max(splits)}
                yield Candidate(family="grouped", backbone=backbone, parameters=sizes | own)
    else:
        counted = "single" if family == "single" else "shared"
        yield Candidate(family=counted, backbone=backbone, parameters=least)


def _fewest_groups(space: Space, family: str, row: Mapping[str, Dimension]) -> Grouping | None:
    """A partition of as few groups as a family has at its end; None where that may be one, or it has none."""
    if family in space.groupings:
        return min(space.groupings[family], key=lambda grouping: len(grouping.groups))
    if family not in ("grouped", "affinity"):
        return None
    groups = min(whole_values(row["groups"].domain))
    return Grouping.from_labels([min(index, groups - 1) for index in range(len(space.tasks))])


def _sizes(backbone: str, row: Mapping[str, Dimension]) -> Iterator[dict[str, Any]]:
    names = list(BACKBONES[backbone].choices)
    for values in itertools.product(*(_values(row[name]) for name in names)):
        yield dict(zip(names, values, strict=True))


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
    faults = [*_metric_faults(spec, tasks), *_bound_faults(spec, tasks), *_budget_faults(spec)]
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
    plan = Plan(
        spec=spec,
        source=source,
        options=options,
        tasks=tasks,
        input_shape=source.shape(),
        objectives=tuple((objective.metric, directions[objective.metric]) for objective in spec.objectives),
        space=space,
    )
    faults = [*_rung_faults(plan), *_size_faults(plan), *_reference_faults(plan)]
    if faults:
        raise SpecError(faults)
    return plan


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
    for pointer, metric in _named_metrics(spec):
        if metric in PLANNED:
            yield Fault(pointer, f"'{metric}' is not implemented yet")
        elif metric not in directions:
            why = (
                "needs a task that classifies (binary or multiclass), and the job has none"
                if metric in METRICS
                else "is no metric"
            )
            yield Fault(pointer, f"'{metric}' {why}; there are {', '.join(directions)}")
    for index, objective in enumerate(spec.objectives):
        own_direction = directions.get(objective.metric)
        if objective.direction is not None and own_direction not in (None, objective.direction):
            yield Fault(
                f"/objectives/{index}/direction",
                f"the direction of '{objective.metric}' must be {own_direction}",
            )


def _named_metrics(spec: JobSpec) -> Iterator[tuple[str, str]]:
    """Every metric that a job decides by, with the JSON pointer to its name."""
    for index, objective in enumerate(spec.objectives):
        yield f"/objectives/{index}/metric", objective.metric
    for index, constraint in enumerate(spec.constraints):
        yield f"/constraints/{index}/metric", constraint.metric
    if spec.search.scheduler.metric is not None:
        yield "/search/scheduler/metric", spec.search.scheduler.metric


def _bound_faults(spec: JobSpec, tasks: TaskSet) -> Iterator[Fault]:
    """Bounds that leave nothing of the values that a metric can have, alone or together."""
    natural = _natural_ranges(tasks)
    ranges = dict(natural)

    def cause(end: float, natural_end: float) -> str:
        return "by its nature" if end == natural_end else "by a constraint before this one"

    for index, constraint in enumerate(spec.constraints):
        metric = constraint.metric
        nature = natural.get(metric, (-math.inf, math.inf))
        low, high = ranges.get(metric, nature)
        least = -math.inf if constraint.min is None else constraint.min
        greatest = math.inf if constraint.max is None else constraint.max
        if greatest < low:
            yield Fault(
                f"/constraints/{index}/max",
                f"'{metric}' is never below {low:.12g}, {cause(low, nature[0])}: max must be at least that, "
                f"found {greatest:.12g}",
            )
        if least > high:
            yield Fault(
                f"/constraints/{index}/min",
                f"'{metric}' is never above {high:.12g}, {cause(high, nature[1])}: min must be at most that, "
                f"found {least:.12g}",
            )
        ranges[metric] = max(low, least), min(high, greatest)


def _natural_ranges(tasks: TaskSet) -> dict[str, tuple[float, float]]:
    """Between what values each metric can be."""
    ranges = dict.fromkeys(METRICS.keys() - GAINS, (0.0, math.inf))
    ranges["total_error"] = (0.0, 100.0 * sum(task.kind in CLASSIFICATION for task in tasks))
    for task in tasks:
        for metric in KIND_METRICS[task.kind]:
            ranges[f"task.{task.name}.{metric}"] = (0.0, GREATEST_VALUES.get(metric, math.inf))
    return ranges


def _budget_faults(spec: JobSpec) -> Iterator[Fault]:
    rule, trials = spec.budget.stop_when, spec.budget.trials
    if rule is not None and trials is not None and rule.over_trials >= trials:
        yield Fault(
            "/budget/stop_when/over_trials",
            f"the job ends after {trials} trials, so over_trials must be less, found {rule.over_trials}",
        )


def _rung_faults(plan: Plan) -> Iterator[Fault]:
    """A scheduler that would never stop anything."""
    scheduler, epochs = plan.spec.search.scheduler, plan.spec.budget.epochs
    if scheduler.name == "none" or make_scheduler(scheduler, plan.objectives, epochs).rungs:
        return
    if scheduler.grace_epochs >= epochs:
        yield Fault(
            "/search/scheduler/grace_epochs",
            f"must be less than budget.epochs, {epochs}, for there to be a rung before a trial's end, found "
            f"{scheduler.grace_epochs}; scheduler none trains every trial to its end",
        )
    else:
        yield Fault(
            f"/search/scheduler/{'name' if scheduler.metric is None else 'metric'}",
            f"trials are not judged by {' and '.join(sorted(NOT_JUDGED))} alone: let asha judge by another "
            "metric, or take scheduler none",
        )


def _size_faults(plan: Plan) -> Iterator[Fault]:
    """Bounds on what a network takes that no candidate of the space keeps."""
    constraints = list(enumerate(plan.spec.constraints))
    for metric in COUNTED:
        highest = [(c.max, index) for index, c in constraints if c.metric == metric and c.max is not None]
        if highest:
            bound, index = min(highest)
            smallest = math.inf
            for size in plan.smallest_sizes():
                smallest = min(smallest, size[metric])
                if smallest <= bound:
                    break
            else:
                yield Fault(
                    f"/constraints/{index}/max",
                    f"the smallest network of the space has {smallest:.0f} {metric}, so max must be at least "
                    f"that, found {bound:.12g}",
                )
    lowest = [(c.min, index, c.metric) for index, c in constraints if c.min is not None and c.metric in SIZES]
    largest = plan.largest_cost() if lowest else {}
    for bound, index, metric in lowest:
        if bound > largest[metric]:
            yield Fault(
                f"/constraints/{index}/min",
                f"no network of the space exceeds {largest[metric]:.12g} in {metric}, so min must be at most "
                f"that, found {bound:.12g}",
            )


def _reference_faults(plan: Plan) -> Iterator[Fault]:
    """Gains over each candidate's own width need networks of every width."""
    networks = plan.own_width_references
    if networks <= MOST_REFERENCES:
        return
    for pointer, metric in _named_metrics(plan.spec):
        if metric == "delta_m_own_width":
            yield Fault(
                pointer,
                f"'{metric}' needs single-task networks of every size in the space: {len(plan.sizes())} "
                f"sizes x {len(plan.tasks)} tasks x {len(YARDSTICK_SEEDS)} seeds are {networks} trainings, "
                f"more than {MOST_REFERENCES}; name fewer sizes for each family in search.space, or aim at "
                "delta_m",
            )
