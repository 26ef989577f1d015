"""JobSpec: what a user asks for. The one schema of the API, the CLI, the client and YAML files.

What can be said of a field without knowing data sets and families is said here, and so in the JSON Schema;
what needs them is checked by `coterie.search.plan`.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    model_validator,
)
from pydantic_core import PydanticCustomError

from coterie.models.tasks import Direction

GREATEST_SEED = 2**53 - 1  # the integers that every JSON reader keeps exact
LEAST_SECONDS = 1.0  # no trial starts, trains and is measured in less


def _unique(key: Callable[[Any], object], what: str) -> AfterValidator:
    def check(items: list[Any]) -> list[Any]:
        seen: set[object] = set()
        for item in items:
            if key(item) in seen:
                raise PydanticCustomError(
                    "duplicate",
                    "{what} must be unique: '{item}' comes twice",
                    {"what": what, "item": str(key(item))},
                )
            seen.add(key(item))
        return items

    return AfterValidator(check)


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.+-]{1,100}$")]
Priority = Annotated[int, Field(ge=-1000, le=1000)]
UNIQUE_ITEMS: dict[str, JsonValue] = {"uniqueItems": True}
ONE_LINE = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$"  # whoever prints it, wherever it ends a line


class _Part(BaseModel):
    """Frozen; as its schema says, refuses unknown fields, and text or booleans in place of numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DatasetSpec(_Part):
    """A registered source and its options."""

    source: Name = Field(
        description="Name of a registered source, as listed by /v1/datasets.", examples=["digits"]
    )
    options: dict[Name, bool | int | float | str] = Field(
        default={},
        description="The source's own options; its catalogue entry holds their JSON Schema.",
    )


class TaskChoice(_Part):
    """A task of the source, with the weight of its loss."""

    name: Name = Field(description="Name of one of the source's tasks.")
    weight: float = Field(
        default=1.0, gt=0, le=1e6, description="Factor of the task's loss in the sum over tasks."
    )


class ObjectiveSpec(_Part):
    """A metric to push in its better direction."""

    metric: Name = Field(description="Name of a metric, as listed by /v1/metrics, or task.<name>.<metric>.")
    direction: Direction | None = Field(
        default=None,
        strict=False,  # a document holds its name
        description="The metric's own direction by default; another one is refused.",
    )


class ConstraintSpec(_Part):
    """Bounds on a metric: a trial outside them is never on the front."""

    metric: Name = Field(description="Name of a metric, as for an objective.")
    min: float | None = Field(default=None, description="The least value allowed.")
    max: float | None = Field(default=None, description="The greatest value allowed.")

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.min is None and self.max is None:
            raise PydanticCustomError("no_bound", "a constraint needs min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise PydanticCustomError("no_room", "min must be at most max")
        return self


class Interval(_Part):
    """A closed range of numbers."""

    low: float = Field(description="The least value.")
    high: float = Field(description="The greatest value.")

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.low > self.high:
            raise PydanticCustomError("empty_range", "low must be at most high")
        return self


Family = Literal[
    "single", "shared", "grouped", "dmtg", "interrogate", "etr_nlp", "affinity", "dmtg+interrogate"
]
EVERY_FAMILY: tuple[Family, ...] = get_args(Family)
BackboneName = Literal["mlp", "cnn", "resnet20", "resnet18", "resnet50_dilated", "vit_tiny", "vit_small"]

Scalar = bool | int | float | str
Domain = (
    Scalar
    | Interval
    | Annotated[list[Scalar | list[Name] | list[list[Name]]], Field(min_length=1, max_length=1000)]
)


class SamplerSpec(_Part):
    """What proposes candidates."""

    name: Literal["coterie", "tpe", "nsga2", "gp", "random"] = Field(
        default="coterie",
        description="coterie: baselines, then groupings that follow from measured subsets of the tasks, "
        "and what a model of the trials promises. tpe, nsga2, gp and random are Optuna's.",
    )


class SchedulerSpec(_Part):
    """What stops candidates early, at rungs of grace_epochs · eta^i epochs."""

    name: Literal["none", "asha", "pareto_asha"] = Field(
        default="none",
        description="none trains every candidate to its end; asha judges by one metric; pareto_asha by all "
        "objectives: by non-dominated rank, then by distance from those already taken.",
    )
    eta: int = Field(default=3, ge=2, le=10, description="A rung lets the best 1/eta go on.")
    grace_epochs: int = Field(default=1, ge=1, le=10_000, description="Epochs before the first rung.")
    metric: Name | None = Field(
        default=None, description="What asha judges by; the first objective by default. Others take none."
    )

    @model_validator(mode="after")
    def _metric_of_asha(self) -> Self:
        if self.metric is not None and self.name != "asha":
            raise PydanticCustomError(
                "no_metric", "'{name}' takes no metric: only asha judges by one", {"name": self.name}
            )
        return self


class SearchSpec(_Part):
    """What is tried, and how it is chosen."""

    families: Annotated[list[Family], _unique(str, "families")] = Field(
        default=list(EVERY_FAMILY),
        min_length=1,
        description="Ways to share between tasks; one that is not listed is excluded. Where all are listed "
        "and the job has one task, those that form groups are left out.",
        json_schema_extra=UNIQUE_ITEMS,
    )
    backbones: Annotated[list[BackboneName], _unique(str, "backbones")] = Field(
        default=[],
        description="Backbones to build on; empty means the source's own.",
        json_schema_extra=UNIQUE_ITEMS,
    )
    space: dict[Name, dict[Name, Domain]] = Field(
        default={},
        description="By family and dimension: one value, a list of values or {low, high}. Narrows the "
        "family's space, never widens it. The families' dimensions are in /v1/families.",
    )
    sampler: SamplerSpec = Field(default=SamplerSpec(), description="What proposes candidates.")
    scheduler: SchedulerSpec = Field(default=SchedulerSpec(), description="What stops candidates early.")
    repeats: bool = Field(
        default=False,
        description="Whether a candidate may come again, with another seed. Otherwise a job whose space is "
        "used up ends.",
    )


class StopWhenSpec(_Part):
    """Ends a job whose front has stopped moving."""

    hypervolume_gain_below: float = Field(
        gt=0, lt=1, description="Share of the hypervolume that the last trials must have added at least."
    )
    over_trials: int = Field(ge=1, le=100_000, description="How many completed trials the last ones are.")


class BudgetSpec(_Part):
    """What a job may use. At least one of trials, seconds and device_seconds is needed."""

    trials: int | None = Field(default=None, ge=1, le=100_000, description="Candidates that complete.")
    epochs: int = Field(default=20, ge=1, le=10_000, description="Length of each trial, in epochs.")
    seconds: float | None = Field(
        default=None,
        ge=LEAST_SECONDS,
        le=1e8,
        description="Time that the job runs. Trials that still train then are stopped.",
    )
    device_seconds: float | None = Field(
        default=None,
        ge=LEAST_SECONDS,
        le=1e10,
        description="Sum of devices reserved × time, in s, over trials, references, subset networks and "
        "confirming runs.",
    )
    failures: int = Field(default=5, ge=0, le=10_000, description="Failed candidates that the job bears.")
    concurrent: int | None = Field(
        default=None, ge=1, le=1024, description="Trials at a time; default what fits."
    )
    stop_when: StopWhenSpec | None = Field(
        default=None, description="Ends the job before its limits once the front has stopped moving."
    )

    @model_validator(mode="after")
    def _some_limit(self) -> Self:
        if self.trials is None and self.seconds is None and self.device_seconds is None:
            raise PydanticCustomError(
                "no_limit", "a budget needs at least one of trials, seconds and device_seconds"
            )
        return self


def _whole_above_one(gpus: float) -> float:
    """Ray shares a GPU, or reserves whole ones."""
    if gpus > 1 and not gpus.is_integer():
        raise PydanticCustomError("no_whole_number", "above 1, gpus must be a whole number")
    return gpus


class ResourcesSpec(_Part):
    """What one trial reserves."""

    cpus: float = Field(default=1, gt=0, le=1024, description="CPU cores a trial.")
    gpus: Annotated[float, AfterValidator(_whole_above_one)] = Field(
        default=0, ge=0, le=64, description="GPUs a trial; a fraction shares one, above 1 only whole ones."
    )


class ConfirmSpec(_Part):
    """Retraining of the front's best with fresh seeds, beside `shared` networks of the same macs."""

    top: int = Field(default=0, ge=0, le=100, description="Points of the front to retrain; 0 for none.")
    seeds: int = Field(
        default=3, ge=2, le=100, description="Seeds for each of them; the spread needs at least 2."
    )


class JobSpec(_Part):
    """A search job."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=ONE_LINE)] = Field(
        default="search", description="Any text that helps to find the job again."
    )
    dataset: DatasetSpec = Field(description="The data.")
    tasks: Annotated[
        list[Name | TaskChoice],
        _unique(lambda task: task if isinstance(task, str) else task.name, "tasks"),
    ] = Field(
        default=[],
        max_length=1000,
        description="Names of the source's tasks, each alone or with a weight; empty means all.",
        json_schema_extra=UNIQUE_ITEMS,
    )
    objectives: Annotated[list[ObjectiveSpec], _unique(lambda objective: objective.metric, "objectives")] = (
        Field(
            default=[
                ObjectiveSpec(metric="delta_m", direction=Direction.MAXIMIZE),
                ObjectiveSpec(metric="macs", direction=Direction.MINIMIZE),
            ],
            min_length=1,
            max_length=5,
            description="What the front is made of, on the validation split.",
            json_schema_extra=UNIQUE_ITEMS,
        )
    )
    constraints: list[ConstraintSpec] = Field(
        default=[], max_length=20, description="Limits that every point of the front keeps."
    )
    search: SearchSpec = Field(default=SearchSpec(), description="What is tried, and how it is chosen.")
    budget: BudgetSpec = Field(description="What the job may use.")
    resources: ResourcesSpec = Field(default=ResourcesSpec(), description="What one trial reserves.")
    confirm: ConfirmSpec = Field(default=ConfirmSpec(), description="Retraining of the front's best.")
    seed: int = Field(default=0, ge=0, le=GREATEST_SEED, description="Seed of the search and of its trials.")
    priority: Priority = Field(default=0, description="Jobs of higher priority start first.")


class JobChange(_Part):
    """What can be changed of a job after it was submitted."""

    priority: Priority = Field(description="Jobs of higher priority start first.")
