"""JobSpec: what a user asks for. The one schema of the API, the CLI, the client and YAML files.

What can be said of a field without knowing data sets and families is said here, and so in the JSON Schema;
what needs them is checked by `coterie.search.plan`. Values that are designed but not implemented yet are
refused with those words, never ignored.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    model_validator,
)
from pydantic_core import PydanticCustomError

from coterie.models.tasks import Direction

GREATEST_SEED = 2**53 - 1  # the integers that every JSON reader keeps exact


def _planned(*values: str) -> BeforeValidator:
    """Refuse `values`, which the design names but no code serves yet, in these words."""

    def check(value: object) -> object:
        if value in values:
            raise PydanticCustomError("not_implemented", "'{value}' is not implemented yet", {"value": value})
        return value

    return BeforeValidator(check)


def _only(default: int) -> BeforeValidator:
    """Refuse every other number in these words: the code serves this one alone yet."""

    def check(value: object) -> object:
        if type(value) is int and value != default:
            raise PydanticCustomError(
                "not_implemented", "only {default} is implemented yet", {"default": default}
            )
        return value

    return BeforeValidator(check)


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
UNIQUE_ITEMS: dict[str, JsonValue] = {"uniqueItems": True}


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

    name: Annotated[Literal["tpe", "nsga2", "gp", "random"], _planned("coterie")] = Field(
        default="tpe", description="tpe, nsga2, gp and random are Optuna's."
    )


class SchedulerSpec(_Part):
    """What stops candidates early. Not implemented yet: every candidate trains to its end."""

    name: Annotated[Literal["none"], _planned("pareto_asha", "asha")] = Field(
        default="none", description="Not implemented yet: only none."
    )
    eta: Annotated[Literal[3], _only(3)] = Field(
        default=3, description="A rung keeps the best 1/eta. Not implemented yet: only 3."
    )
    grace_epochs: Annotated[Literal[1], _only(1)] = Field(
        default=1, description="Epochs before the first rung. Not implemented yet: only 1."
    )


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


class BudgetSpec(_Part):
    """What a job may use. At least one of trials, seconds and device_seconds is needed."""

    trials: int | None = Field(default=None, ge=1, le=100_000, description="Candidates that complete.")
    epochs: int = Field(default=20, ge=1, le=10_000, description="Length of each trial, in epochs.")
    seconds: float | None = Field(
        default=None,
        gt=0,
        le=1e8,
        description="Time that the job runs. Trials that still train then are stopped.",
    )
    device_seconds: float | None = Field(
        default=None,
        gt=0,
        le=1e10,
        description="Sum over trials and references of devices reserved × time, in s.",
    )
    failures: int = Field(default=5, ge=0, le=10_000, description="Failed candidates that the job bears.")
    concurrent: int | None = Field(
        default=None, ge=1, le=1024, description="Trials at a time; default what fits."
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
    """Retraining of the front's best with fresh seeds."""

    top: Annotated[Literal[0], _only(0)] = Field(
        default=0, description="Candidates to retrain. Not implemented yet: only 0."
    )
    seeds: Annotated[Literal[3], _only(3)] = Field(
        default=3, description="Seeds for each of them. Not implemented yet: only 3."
    )


class JobSpec(_Part):
    """A search job."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")] = (
        Field(default="search", description="Any text that helps to find the job again.")
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
    priority: int = Field(default=0, ge=-1000, le=1000, description="Jobs of higher priority start first.")
