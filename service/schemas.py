"""What the API answers. The contract is `architecture.md`; what goes in is `coterie.search.spec.JobSpec`."""

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, field_validator

from coterie.models.tasks import Direction, TaskKind
from coterie.search.spec import ONE_LINE, JobSpec
from coterie.search.store import JobState, TrialState, VerdictKind
from coterie.service.auth import Role
from coterie.service.public_network import LIMIT_URL
from coterie.service.storage.events import EventKind
from coterie.service.storage.outbox import DeliveryState
from coterie.service.storage.queue import Hold

Item = TypeVar("Item")
Values = dict[str, float | None]
Grouping = list[list[str]]
GroupingField = Annotated[
    Grouping | None, Field(description="Groups of task names; null where the family has none.")
]
At = Annotated[datetime, Field(description="When, in UTC.")]


class Schema(BaseModel):
    """Frozen; a field whose name Python or pydantic keeps to itself goes by its alias."""

    model_config = ConfigDict(frozen=True, validate_by_name=True, validate_by_alias=True)


class Page(Schema, Generic[Item]):
    """A part of a list."""

    items: list[Item] = Field(description="The items, in the order asked for.")
    next_cursor: str | None = Field(description="Give it as `cursor` to get what follows; null at the end.")


class Fault(Schema):
    """One thing that is wrong with a request."""

    pointer: str = Field(
        description="JSON pointer into the body, or /query/<name>, /header/<name> for a parameter."
    )
    detail: str = Field(description="What is wrong with it.")


class NearestMiss(Schema):
    """The trial that comes closest to keeping the limits."""

    trial_id: str = Field(description="Its id.")
    values: Values = Field(description="Its validation value of each metric.")


class Problem(Schema):
    """An error, as RFC 9457 (`application/problem+json`) has it."""

    type: str = Field(description="Names the kind of problem.")
    title: str = Field(description="The kind of problem, in words.")
    status: int = Field(description="The HTTP status.", ge=400, le=599)
    detail: str = Field(description="What is wrong with this request.")
    instance: str = Field(description="Path of the request.")
    request_id: str | None = Field(
        default=None, description="Names the request in the server's log; in the header X-Request-ID too."
    )
    errors: list[Fault] | None = Field(default=None, description="Each fault, where there may be several.")
    nearest: NearestMiss | None = Field(
        default=None, description="Where no trial keeps the limits given: the one that comes closest."
    )


class TrialCounts(Schema):
    """Candidates by state."""

    pending: int = Field(description="Waiting to run, or to go on after an interruption.")
    running: int = Field(description="Training now.")
    completed: int = Field(description="Trained to the end.")
    stopped: int = Field(
        description="Ended early: by the scheduler, or since time or device-seconds were spent."
    )
    failed: int = Field(description="Ended by an error of their own.")


class CountBudget(Schema):
    """A budget counted in whole things."""

    used: int = Field(description="Used so far.")
    total: int | None = Field(description="All there is; null where the job sets no limit.")


class SecondsBudget(Schema):
    """A budget of time."""

    used: float = Field(description="Used so far, in seconds.")
    total: float | None = Field(description="All there is, in seconds; null where the job sets no limit.")


class BudgetUse(Schema):
    """What a job has used of its budget."""

    trials: CountBudget = Field(description="Candidates that completed or were stopped early.")
    seconds: SecondsBudget = Field(description="Time that the job ran.")
    device_seconds: SecondsBudget = Field(
        description="Devices reserved × time, over the trials and what was trained beside them."
    )
    failures: CountBudget = Field(description="Candidates that failed.")


class Progress(Schema):
    """How far a job is."""

    trials: TrialCounts = Field(description="Candidates by state.")
    budget: BudgetUse = Field(description="Used and total, by kind.")
    eta_seconds: float | None = Field(
        description="Time that the job is expected to run from now on; null while nothing is known, and "
        "unless it runs."
    )


class QueuePlace(Schema):
    """When a queued job's turn comes."""

    position: int = Field(
        ge=1,
        description="Its place among the queued jobs of all tenants, from 1, as things stand. Higher "
        "priority starts first; of equal priority, the tenant of which fewest jobs run, then the one that "
        "has waited longest for its turn; then the older job. What its tenant's limits hold back comes last.",
    )
    expected_start_at: datetime | None = Field(
        description="When it is expected to start, in UTC, from how long jobs ran so far and what jobs ahead "
        "may use; null while nothing is known, and where it waits for more than a place."
    )
    waits_for: Hold = Field(
        description="place: for jobs ahead, or for one that runs to end. running_limit: its tenant runs as "
        "many jobs as it may. device_seconds: its tenant has used those of this month."
    )


class JobLinks(Schema):
    """Where else to look."""

    self_: str = Field(alias="self", description="This job.")
    front: str = Field(description="Its front.")
    trials: str = Field(description="Its trials.")
    events: str = Field(description="What happens to it, as a stream.")
    affinity: str = Field(description="How much its tasks help each other.")
    references: str = Field(description="The reference networks that it measures against.")
    logs: str = Field(description="The end of its driver's log.")
    ray_dashboard: str | None = Field(
        description="Its page in the Ray dashboard; null until it was submitted there."
    )


class Verdict(Schema):
    """What a job found about its tasks, on the validation split of networks trained with fresh seeds."""

    kind: VerdictKind = Field(
        description="Learn the tasks together, apart, in groups, or partly together; no_difference beyond "
        "noise; unknown where the runs don't tell."
    )
    words: str = Field(description="The same in a sentence or two.")
    trial_id: str | None = Field(description="The trial that it speaks of; null where it speaks of none.")
    grouping: Grouping | None = Field(description="The groups, where the answer is groups; else null.")


class Job(Schema):
    """A search job."""

    id: str = Field(description="Opaque, starts with job_.")
    name: str = Field(description="As its spec has it.")
    state: JobState = Field(
        description="queued or running, paused between them, then succeeded, failed or cancelled for good."
    )
    reason: str | None = Field(description="Why it is in this state, where that is not plain.")
    spec: JobSpec = Field(description="What was asked for, defaults filled in.")
    tenant: str = Field(description="Whose it is.")
    priority: int = Field(
        description="Jobs of higher priority start first. As changed last; the spec keeps what was asked for."
    )
    created_at: datetime = Field(description="When it was submitted, in UTC.")
    started_at: datetime | None = Field(description="When it first ran, in UTC.")
    ended_at: datetime | None = Field(description="When it ended, in UTC.")
    queue: QueuePlace | None = Field(description="When its turn comes; null unless it is queued.")
    progress: Progress = Field(description="How far it is.")
    hypervolume: float | None = Field(description="Of its front; null until the reference point is known.")
    verdict: Verdict | None = Field(
        description="What it found about its tasks; null until then, and where it confirms nothing."
    )
    links: JobLinks = Field(description="Where else to look.")


class TrialLinks(Schema):
    """Where else to look."""

    self_: str = Field(alias="self", description="This trial.")
    job: str = Field(description="Its job.")
    measurements: str = Field(description="Its values by epoch.")
    architecture: str | None = Field(description="The network that it ended with; null unless it completed.")
    model: str | None = Field(description="The network's weights; null unless it completed.")


class Trial(Schema):
    """One training of one candidate with one seed."""

    id: str = Field(description="Opaque, starts with trial_.")
    job_id: str = Field(description="Its job.")
    number: int = Field(description="Its place among the job's trials, from 0.")
    state: TrialState = Field(
        description="pending, running, then completed, stopped, failed or cancelled for good."
    )
    reason: str | None = Field(description="Why it ended, where it did not complete.")
    family: str = Field(description="The way to share between tasks.")
    backbone: str = Field(description="The network that is shared.")
    candidate: dict[str, Any] = Field(description="Its parameters: recipe, backbone's and family's.")
    origin: str = Field(
        description="What proposed it: baseline, grouping, or the name of the sampler; empty where it is not "
        "known, as of jobs of older versions."
    )
    seed: int = Field(description="Seeds initialisation, shuffling and noise.")
    grouping: GroupingField
    values: Values = Field(
        description="Every objective's and cost metric's validation value, null until measured. A stopped "
        "trial's are those that it had reached, costs as they were expected then."
    )
    tasks: dict[str, Any] = Field(
        description="By task: its metrics on the validation and on the test split; empty unless it completed."
    )
    test: Values = Field(description="As values, on the test split: reported, never used to choose.")
    epochs: int = Field(description="Epochs trained so far.")
    device_seconds: float = Field(description="Charged so far.")
    worker: str | None = Field(description="Host and process that trained it last.")
    on_front: bool = Field(description="Whether it completed and no other one dominates it.")
    started_at: datetime | None = Field(description="When it first ran, in UTC.")
    ended_at: datetime | None = Field(description="When it ended, in UTC.")
    links: TrialLinks = Field(description="Where else to look.")


class Measurement(Schema):
    """What one epoch of a trial gave, on the validation split."""

    epoch: int = Field(description="Epochs trained, from 1.")
    values: Values = Field(description="Value by metric.")
    tasks: dict[str, dict[str, float | None]] = Field(description="Value by task and metric.")
    device_seconds: float = Field(description="Charged to the trial until then.")
    at: At


class Objective(Schema):
    """A metric and the direction in which it is better."""

    metric: str = Field(description="Name of the metric.")
    direction: Direction = Field(description="Which way it is better.")


class Spread(Schema):
    """A metric over fresh seeds."""

    mean: float = Field(description="Over the seeds.")
    std: float | None = Field(description="Standard deviation over the seeds; null where there is only one.")


class SharedComparison(Schema):
    """A point beside a shared network of about the same macs, both trained with the same fresh seeds."""

    metric: str = Field(description="What is compared, on the validation split.")
    gain: float = Field(description="Mean of the point less that of the shared network.")
    low: float = Field(
        description="Lower end of the gain's confidence interval, of 95 % for all confirmed points together."
    )
    high: float = Field(description="Its upper end.")
    within_noise: bool = Field(description="Whether the interval holds 0: neither is known to be better.")
    shared_macs: float = Field(description="Of the shared network.")


class Confirmed(Schema):
    """What a point of the front gave when it was trained again with fresh seeds."""

    seeds: int = Field(description="Trainings that completed.")
    failed: int = Field(description="Trainings that did not; they count nowhere else.")
    validation: dict[str, Spread] = Field(description="By metric, on the validation split.")
    test: dict[str, Spread] = Field(description="By metric, on the test split.")
    over_shared: SharedComparison | None = Field(
        description="Its gain over one network that all tasks share; null where too little of it was trained."
    )


class FrontPoint(Schema):
    """A trial on the front."""

    trial_id: str = Field(description="Its id.")
    values: Values = Field(description="Its validation value of each metric.")
    family: str = Field(description="The way to share between tasks.")
    grouping: GroupingField
    test: Values = Field(description="As values, on the test split.")
    confirmed: Confirmed | None = Field(
        description="What fresh seeds gave; null where it was not trained again."
    )


class Front(Schema):
    """The trials that no other trial dominates."""

    objectives: list[Objective] = Field(description="What the front is made of.")
    reference_point: dict[str, float] | None = Field(
        description="Worst value that counts, by objective; null where none is known for these objectives."
    )
    hypervolume: float | None = Field(
        description="Volume between front and reference point; null without one."
    )
    points: list[FrontPoint] = Field(description="The trials, by number.")


class FrontStep(Schema):
    """The front after a trial completed."""

    trial_id: str = Field(description="The trial.")
    number: int = Field(description="Its number.")
    hypervolume: float | None = Field(description="Of the front after it.")
    size: int = Field(description="Trials on the front after it.")
    at: At


class Affinity(Schema):
    """How much the tasks of a job help each other, by one method."""

    method: str = Field(description="one_step or pairwise.")
    description: str = Field(description="What its numbers are.")
    tasks: list[str] = Field(description="Names, in the order of the matrix.")
    backbone: str = Field(description="The network that was trained.")
    sizes: dict[str, Any] = Field(description="The backbone's sizes.")
    recipe: dict[str, Any] = Field(description="How it was trained.")
    epochs: int = Field(description="How long it was trained.")
    seeds: int = Field(description="Seeds that it was measured over; a cell may have fewer.")
    split: str = Field(description="Where it was measured: train or validation.")
    matrix: list[list[float | None]] = Field(
        description="[i][j]: of task i onto task j, mean over the seeds; above 0 where i helps j, null where "
        "it was not measured."
    )
    standard_error: list[list[float | None]] = Field(
        description="Of the matrix, over the seeds; null below two seeds."
    )


class Reference(Schema):
    """A single-task network that jobs on the same data measure against."""

    task: str = Field(description="What it learned.")
    backbone: str = Field(description="The network.")
    sizes: dict[str, Any] = Field(description="The backbone's sizes.")
    recipe: dict[str, Any] = Field(description="How it was trained.")
    epochs: int = Field(description="How long it was trained.")
    seed: int = Field(description="Of its training.")
    validation: Values = Field(description="By metric of the task, on the validation split.")
    test: Values = Field(description="By metric of the task, on the test split.")
    device_seconds: float = Field(description="What it cost the job that trained it; others use it for free.")


class CatalogueItem(Schema):
    """Something that a spec can name."""

    name: str = Field(description="How a spec names it.")
    title: str = Field(description="Its name in words.")
    description: str = Field(description="What it is.")
    schema_: dict[str, Any] = Field(alias="schema", description="JSON Schema of what can be set.")


class TaskMetric(Schema):
    """A metric of a task, an objective as `task.<task>.<name>`."""

    name: str = Field(description="The metric.")
    direction: Direction = Field(description="Which way it is better.")
    unit: str = Field(description="Of its values; 1 where it has none.")


class DatasetTask(Schema):
    """A task of a source."""

    name: str = Field(description="How a spec names it.")
    kind: TaskKind = Field(description="What it predicts.")
    metric: str = Field(description="What judges it.")
    direction: Direction = Field(description="Which way that metric is better.")
    metrics: list[TaskMetric] = Field(description="Every metric that is measured of it.")


class DatasetItem(CatalogueItem):
    """A source of data."""

    tasks: list[DatasetTask] = Field(description="Its tasks.")


class MetricItem(CatalogueItem):
    """A metric that can be an objective or have bounds."""

    direction: Direction = Field(description="Which way it is better.")
    unit: str = Field(description="Its unit; 1 for a count.")


class Health(Schema):
    """The server lives."""

    status: str = Field(description="Always ok.")
    version: str = Field(description="Of Coterie.")


class Check(Schema):
    """One thing that the server needs."""

    ok: bool = Field(description="Whether it is there.")
    detail: str = Field(description="What was found.")


class Readiness(Schema):
    """Whether the server can run jobs."""

    status: str = Field(description="ready or not ready.")
    checks: dict[str, Check] = Field(description="By what is needed: database, ray.")


class TokenRequest(BaseModel):
    """What a new access token should be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Role = Field(description="What it allows: a submitter may do what a reader may, an admin all.")
    name: str = Field(
        default="",
        max_length=200,
        pattern=ONE_LINE,
        description="What its maker calls it, to tell it from others.",
    )
    expires_at: AwareDatetime | None = Field(
        default=None, description="Until when it is good; null for ever, unless it is revoked."
    )


class Token(Schema):
    """An access token, without what makes it one."""

    id: str = Field(description="Its id, which the token names too.")
    tenant: str = Field(description="Whose jobs it opens.")
    role: Role = Field(description="What it allows there.")
    name: str = Field(description="What its maker calls it.")
    created_at: At
    expires_at: datetime | None = Field(description="Until when it is good; null for ever.")
    revoked_at: datetime | None = Field(description="When it was revoked; null if it was not.")


class NewToken(Token):
    """An access token that was just made."""

    token: str = Field(description="The token itself. It is shown this once, and only its digest is kept.")


class TenantLimits(Schema):
    """What a tenant may use; null is without limit."""

    max_queued_jobs: int | None = Field(default=None, ge=0, le=2**31 - 1, description="Jobs that wait.")
    max_running_jobs: int | None = Field(
        default=None, ge=0, le=2**31 - 1, description="Jobs that run at a time."
    )
    max_device_seconds: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="Devices reserved × time, in a calendar month (UTC).",
    )
    max_stored_bytes: int | None = Field(
        default=None, ge=0, le=2**63 - 1, description="Weights and architectures."
    )


class TenantUsage(Schema):
    """What a tenant uses."""

    month: str = Field(description="The calendar month that device-seconds are of, as 2026-11, in UTC.")
    queued_jobs: int = Field(description="Jobs that wait now.")
    running_jobs: int = Field(description="Jobs that run now.")
    device_seconds: float = Field(description="Devices reserved × time in this month, deleted jobs included.")
    stored_bytes: int = Field(
        description="Weights and architectures of its trials now; other forms, logs and checkpoints are not "
        "counted."
    )


class Tenant(Schema):
    """Those who share jobs, and see nobody else's."""

    name: str = Field(description="Its name.")
    limits: TenantLimits = Field(description="What it may use.")
    usage: TenantUsage = Field(description="What it uses.")


class Change(Schema):
    """Something that was changed, and by whom."""

    at: At
    action: str = Field(description="What was done: the kind of thing and a verb, as job.cancel.")
    target: str = Field(description="Id of what was changed.")
    token_id: str | None = Field(
        description="Whose doing: a token's id; null on a server without tokens, and for the operator."
    )
    request_id: str | None = Field(description="Of the request; null for the operator at a terminal.")
    detail: dict[str, Any] = Field(description="What else is known of it.")


class Event(Schema):
    """Something that happened to a job."""

    job_id: str = Field(description="The job.")
    sequence: int = Field(description="Its place among the job's events, from 1 without a gap.")
    kind: EventKind = Field(description="What it is about.")
    at: At
    data: dict[str, Any] = Field(description="What happened, by kind.")


class WebhookSpec(BaseModel):
    """Who wants to be told of what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = Field(
        min_length=1,
        max_length=LIMIT_URL,
        pattern=r"^https?://[^\s\x00-\x1f\x7f]+$",
        description="Where events are sent to by POST; a public address, unless the server's operator allows "
        "others.",
    )
    kinds: list[Literal["job", "trial", "front"]] = Field(
        default=["job", "trial", "front"],
        min_length=1,
        max_length=3,
        json_schema_extra={"uniqueItems": True},
        description="Of the events to send. Measurements come too often: see the stream.",
    )

    @field_validator("kinds")
    @classmethod
    def _once_each(cls, kinds: list[str]) -> list[str]:
        if len(set(kinds)) < len(kinds):
            raise ValueError("each kind must be named once")
        return kinds


class Webhook(Schema):
    """An address that is told of events of all the tenant's jobs."""

    id: str = Field(description="Opaque, starts with webhook_.")
    url: str = Field(description="Where events are sent to.")
    kinds: list[str] = Field(description="Kinds of the events that are sent.")
    created_at: At
    disabled_at: datetime | None = Field(
        description="Since when nothing is sent, as the receiver answered 410 Gone; null while it is told."
    )


class NewWebhook(Webhook):
    """A webhook that was just made."""

    secret: str = Field(
        description="What is sent is signed with it, as Standard Webhooks has it: keep it, it is not shown "
        "again."
    )


class Delivery(Schema):
    """An event on its way to a webhook."""

    id: str = Field(description="Opaque, starts with delivery_; sent as `webhook-id`, the same each time.")
    job_id: str = Field(description="The event's job.")
    sequence: int = Field(description="The event's place among the job's events.")
    kind: EventKind = Field(description="The event's kind.")
    state: DeliveryState = Field(
        description="pending; delivered once the receiver answered with 2xx; dead when that was given up."
    )
    attempts: int = Field(description="How often it was tried since it was made or retried.")
    due_at: datetime | None = Field(description="When it is tried next; null where it is not.")
    last_status: int | None = Field(description="The HTTP status of the last answer; null where none came.")
    last_error: str | None = Field(description="What went wrong the last time.")
    created_at: At
    delivered_at: datetime | None = Field(description="When it was delivered.")
