"""A job's spec made concrete: what the schema cannot know is checked here, before anything is stored."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pydantic import BaseModel, ValidationError

from coterie.models.backbones import BACKBONES
from coterie.models.cost import count_cost
from coterie.models.families import build_network
from coterie.models.tasks import Direction, TaskSet
from coterie.search.data.base import Source, fingerprint
from coterie.search.data.registry import sources
from coterie.search.objective import METRICS, PLANNED, metric_directions
from coterie.search.space import Space, SpaceError, make_space, whole_values
from coterie.search.spec import DatasetSpec, JobSpec, TaskChoice


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
        """macs and params of the largest single-task set in the space: no candidate costs more."""
        greatest = {"macs": 0.0, "params": 0.0}
        for (_, backbone), table in self.space.table.items():
            shape = {name: max(whole_values(table[name].domain)) for name in ("width", "depth")}
            network = build_network(
                "single",
                backbone=BACKBONES[backbone](input_shape=self.input_shape, **shape),
                tasks=self.tasks,
                parameters={},
            )
            cost = count_cost(network.prune(), self.input_shape)
            greatest = {
                "macs": max(greatest["macs"], cost.macs),
                "params": max(greatest["params"], cost.params),
            }
        return greatest


def make_plan(spec: JobSpec) -> Plan:
    """Resolve names against what is installed.

    Raises:
        SpecError: With every fault found.
    """
    source, options = _resolve_data(spec.dataset)
    tasks = _resolve_tasks(spec, source)
    faults = [*_metric_faults(spec, tasks)]
    backbones: list[str] = [*spec.search.backbones] or [source.backbone]
    try:
        space = make_space(spec.search.families, backbones, tasks, spec.search.space)
    except SpaceError as error:
        place = "/search/space" + "".join(f"/{escape(part)}" for part in error.path)
        faults.append(Fault(place if error.path else "/search/families", str(error)))
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
            own = ", ".join(name for name in directions if name not in METRICS)
            yield Fault(
                f"{place}/metric", f"'{metric}' is no metric; there are {', '.join(METRICS)}, and {own}"
            )
    for index, objective in enumerate(spec.objectives):
        own_direction = directions.get(objective.metric)
        if objective.direction is not None and own_direction not in (None, objective.direction):
            yield Fault(
                f"/objectives/{index}/direction",
                f"the direction of '{objective.metric}' must be {own_direction}",
            )
