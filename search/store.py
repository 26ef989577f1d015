"""What a search needs of storage: the interfaces, the records they exchange, and in-memory stores.

The contract, for every store (`tests/contracts/` holds each to it):

- A store belongs to one job and to one attempt at it, and may be called from several threads. Once a newer
  attempt has begun, or the job has ended, every write raises `Fenced` and changes nothing.
- Each write is atomic, and durable when the call returns.
- An ended trial is immutable: writing to it raises `TrialEnded`.
- A store that cannot be reached raises `StoreUnavailable`. The write may or may not have happened: it must be
  tried again, with the same arguments, before any other, and then has happened once.
- What comes out is the caller's: changing it changes nothing in the store.
"""

import copy
import re
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

Values = dict[str, float | None]
_ID = re.compile("[0-9A-Za-z][0-9A-Za-z._-]*")  # of a trial or another run
# Folders of a job.
TRIALS, CHECKPOINTS, SCRATCH = "trials", "checkpoints", "scratch"
# Metrics that every completed trial has, whatever its job aims at.
COSTS = ("macs", "params", "latency_ms", "peak_memory_mb", "train_device_seconds")


class TrialState(StrEnum):
    """Where a trial stands; see `ENDED` for the final ones."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    STOPPED = "stopped"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = frozenset({TrialState.COMPLETED, TrialState.STOPPED, TrialState.FAILED, TrialState.CANCELLED})


class JobState(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


JOB_ENDED = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})


class Fenced(Exception):
    """A newer attempt at the job has begun, or the job has ended: this driver must stop."""


class StoreUnavailable(Exception):
    """The store is away; what was being written is to be tried again before anything else is written."""


class TrialEnded(Exception):
    """The trial has ended, and an ended trial never changes."""


class FilesUnavailable(Exception):
    """A file of the job's can't be written or read now: no fault of a trial's; it goes on when it can."""


# Ends the reason of a job whose driver gave it back for that.
GOES_ON = "it goes on when that is over"


class DiskFull(FilesUnavailable):
    """There was no space left for a file of the job's; it goes on when there is."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A family with all its hyper-parameters fixed.

    Attributes:
        family: Name of the family.
        backbone: Name of the backbone.
        parameters: Dimension -> value: the recipe, the backbone's and the family's own.
    """

    family: str
    backbone: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one epoch of a trial gave, on the validation split.

    Attributes:
        epoch: Epochs trained, from 1.
        values: Metric name -> value.
        tasks: Task name -> metric name -> value.
        device_seconds: Devices reserved times time since the trial's start, interruptions left out.
        worker: Host and process that trained.
    """

    epoch: int
    values: Values
    tasks: Mapping[str, Mapping[str, float]]
    device_seconds: float
    worker: str


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a trial ended, and what it reached.

    Attributes:
        state: One of `ENDED`.
        reason: Why, where it did not simply complete.
        values: Validation value of every metric; empty unless completed.
        test: The same on the test split: reported, never used to choose.
        tasks: Task -> {"validation": {metric: value}, "test": {metric: value}}.
        grouping: Groups of task names, where the network has them.
        epochs: Epochs trained.
        device_seconds: As in `Measurement`.
        files: Names of the artifacts kept, with size in bytes and SHA-256.
    """

    state: TrialState
    reason: str | None = None
    values: Values = field(default_factory=dict)
    test: Values = field(default_factory=dict)
    tasks: Mapping[str, Any] = field(default_factory=dict)
    grouping: list[list[str]] | None = None
    epochs: int = 0
    device_seconds: float = 0.0
    files: Mapping[str, "StoredFile"] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """An artifact's size in bytes and SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class FrontUpdate:
    """How a completed trial changed the front.

    Attributes:
        on_front: Whether the trial is on it.
        displaced: Trials that it dominates and that were on it.
        hypervolume: After it; None where no reference point exists.
        size: Points on the front after it.
    """

    on_front: bool
    displaced: tuple[str, ...]
    hypervolume: float | None
    size: int


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training of one candidate with one seed, as stored.

    Attributes:
        id: Ours, unique over all jobs.
        number: Its place among the job's trials, from 0.
        candidate: What is trained.
        choices: The sampler's choice by name of dimension: what a rebuilt sampler is told.
        origin: What proposed it: `baseline`, `grouping`, or the name of the sampler.
        seed: Seeds initialisation, shuffling and noise.
        state: Where it stands.
        crashes: How often its process died.
        ending: What it reached; None until it ended.
        epochs: Epochs measured so far.
        device_seconds: Charged so far.
    """

    id: str
    number: int
    candidate: Candidate
    choices: Mapping[str, Any]
    seed: int
    origin: str = ""
    state: TrialState = TrialState.PENDING
    crashes: int = 0
    ending: Ending | None = None
    epochs: int = 0
    device_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ReferenceKey:
    """What decides a single-task reference network, and so who may share it.

    Attributes:
        data: Fingerprint of source and options, so of data and splits.
        task: The one task.
        backbone: Name and shape of the backbone.
        recipe: The optimiser's settings, canonical.
        epochs: Length of the training.
        seed: Which of the replicates.
    """

    data: str
    task: str
    backbone: str
    recipe: str
    epochs: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a single-task reference network reached: metric values, device seconds, latency in ms."""

    validation: Mapping[str, float]
    test: Mapping[str, float]
    device_seconds: float
    latency_ms: float


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What decides a network that is trained beside the trials, but for its tasks and its seed.

    Attributes:
        data: Fingerprint of source and options, so of data and splits.
        backbone: Name and sizes of the backbone, canonical JSON.
        recipe: The optimiser's settings, canonical JSON.
        epochs: Length of the training.
    """

    data: str
    backbone: str
    recipe: str
    epochs: int


@dataclass(frozen=True, kw_only=True)
class SubsetResult:
    """What one network for a subset of the tasks reached.

    Attributes:
        tasks: Names, in the source's order.
        weights: Of the tasks' losses, in the same order.
        seed: Of initial weights and batches.
        validation: Task -> metric -> value.
        test: The same on the test split: reported, never used to choose.
        run: Which of the job's own runs it came from, from 0; None where another job trained it.
    """

    tasks: tuple[str, ...]
    weights: tuple[float, ...]
    seed: int
    validation: Mapping[str, Mapping[str, float]]
    test: Mapping[str, Mapping[str, float]]
    run: int | None = None


@dataclass(frozen=True, kw_only=True)
class AffinityResult:
    """How much the tasks help each other, measured in one training.

    Attributes:
        method: `one_step`, as `coterie.models.affinity` measures it.
        tasks: Names, in the source's order.
        weights: Of the tasks' losses, in the same order.
        seed: Of the training.
        matrix: [i][j], of task i onto task j; None where it was not measured.
    """

    method: str
    tasks: tuple[str, ...]
    weights: tuple[float, ...]
    seed: int
    matrix: Sequence[Sequence[float | None]]


class Role(StrEnum):
    """What a confirming run trains: a point of the front, or what that is compared with."""

    POINT = "point"
    SHARED = "shared"


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """One ended training with a fresh seed, for a point of the front.

    Attributes:
        trial_id: The point's trial.
        role: What was trained for it: its candidate, or a `shared` network of about the same macs.
        candidate: What was trained.
        seed: Fresh.
        ending: What it reached, as a trial's; without files.
    """

    trial_id: str
    role: Role
    candidate: Candidate
    seed: int
    ending: Ending


class VerdictKind(StrEnum):
    """What a search found about the tasks."""

    TOGETHER = "together"
    APART = "apart"
    GROUPS = "groups"
    PARTLY = "partly"
    NO_DIFFERENCE = "no_difference"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The confirmed answer of a job, on the validation split.

    Attributes:
        kind: In one word.
        words: In a sentence or two.
        trial_id: The point that it speaks of; None where it speaks of none.
        grouping: Its groups of task names, where the answer is groups.
    """

    kind: VerdictKind
    words: str
    trial_id: str | None = None
    grouping: list[list[str]] | None = None


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """All that a driver must know to go on with a job.

    Attributes:
        trials: By number.
        seconds: Time that earlier attempts ran.
        side_device_seconds: Charged to this job beside its trials: for the references, subset networks,
            affinities and confirming runs that it trained.
        reference_point: Of the hypervolume, by objective; None until it is known.
        confirmations: In the order in which they were recorded.
    """

    trials: Sequence[Trial]
    seconds: float
    side_device_seconds: float
    reference_point: Mapping[str, float] | None
    confirmations: Sequence[Confirmation] = ()


class TrialStore(Protocol):
    """Where a search keeps its trials: the contract is in the module's docstring."""

    def resume(self) -> Resumed:
        """Read all that this job has so far."""

    def beat(self) -> None:
        """Say that this attempt lives; raises `Fenced` where it should not."""

    def add_trial(self, trial: Trial) -> None:
        """Add a pending trial. Its number and id are new."""

    def start_trial(self, trial_id: str) -> None:
        """A pending trial runs."""

    def measure(self, trial_id: str, measurement: Measurement) -> None:
        """Add or replace the trial's measurement of that epoch."""

    def preempt(self, trial_id: str) -> None:
        """A running trial's process died: pending again, one more crash."""

    def end_trial(self, trial_id: str, ending: Ending, front: FrontUpdate | None) -> None:
        """End a trial, and for a completed one move the front, in one step."""

    def set_reference_point(self, point: Mapping[str, float]) -> None:
        """Fix the job's reference point, once."""

    def find_references(self, keys: Sequence[ReferenceKey]) -> dict[ReferenceKey, Reference]:
        """Those of `keys` that some job of the same tenant has trained."""

    def add_reference(self, key: ReferenceKey, reference: Reference) -> None:
        """Keep a reference; where another job was faster, the first one stays. Charged to this job."""

    def use_references(self, keys: Sequence[ReferenceKey]) -> None:
        """Note that this job measures against these stored references; noting one again changes nothing."""

    def measurements_at(self, epochs: Sequence[int]) -> dict[str, dict[int, Measurement]]:
        """The measurements of this job's trials at these epochs: trial id -> epoch -> measurement."""

    def find_subsets(self, setting: Setting) -> list[SubsetResult]:
        """Subset networks of this setting: this job's, and its tenant's stored when its first attempt began.

        So what a job knows of others does not change while it runs. Of a subset with the same weights and
        the same seed the job's own comes, else the oldest; in the order in which they were stored.
        """

    def add_subsets(
        self, setting: Setting, run: int, results: Sequence[SubsetResult], device_seconds: float
    ) -> None:
        """Keep the results of one run of this job, all or none, and charge it. Its number is new."""

    def find_affinities(self, setting: Setting) -> list[AffinityResult]:
        """Affinities of this setting, of any job of the tenant, in the order in which they were stored."""

    def add_affinity(self, setting: Setting, result: AffinityResult, device_seconds: float) -> None:
        """Keep an affinity; where another job was faster, the first one stays. Charged to this job."""

    def charge_side(self, device_seconds: float) -> None:
        """Charge a side run that gave nothing."""

    def use_setting(self, setting: Setting) -> None:
        """Note in which setting this job measures subsets and affinities; the last one counts."""

    def add_confirmation(self, confirmation: Confirmation) -> None:
        """Keep a confirming run and charge it. Its trial, role and seed are new."""

    def set_verdict(self, verdict: Verdict) -> None:
        """Keep what the job has found; the last one counts."""

    def set_estimate(self, seconds_left: float | None) -> None:
        """Keep how long the job is expected to run from now on; None where nothing is known."""

    def finish(self, state: JobState, reason: str | None) -> None:
        """End the job; trials that have not ended become cancelled."""


class ArtifactStore(Protocol):
    """Where the files of a job's trials live, for every process of the job.

    Trials write and read in folders of their own machine, while a block lasts; where these are not the place
    itself, files are brought there and fetched, each whole or not at all. Names are ours: ids, never a user's
    words. Where the place can't be reached, `FilesUnavailable` is raised.
    """

    def keep_trial(self, trial_id: str) -> AbstractContextManager[Path]:
        """A folder to write a trial's artifacts to, which are kept when the block ends without an error."""

    def keep_checkpoint(self, trial_id: str) -> AbstractContextManager[Path]:
        """A folder to write a trial's checkpoint to, existing or not; kept in the same way."""

    def saved_checkpoint(self, trial_id: str) -> AbstractContextManager[Path]:
        """A folder, existing or not, with a trial's checkpoint if it has one."""

    def drop_checkpoint(self, trial_id: str) -> None:
        """Delete a trial's checkpoint, if it has one."""

    def workspace(self) -> AbstractContextManager[Path]:
        """A folder for the runner's own files, existing."""

    def drop_working_files(self) -> None:
        """Delete what only a running job needs: checkpoints and the runner's own files."""


def checked_id(name: str) -> str:
    """The id itself, which is the name of one file or folder.

    Raises:
        ValueError: If it might lead elsewhere.
    """
    if not _ID.fullmatch(name):
        raise ValueError(f"id: must be of letters, digits, dots, dashes and underscores, found {name!r}")
    return name


@dataclass(frozen=True)
class FolderArtifacts:
    """Artifacts of one job in a folder that every worker sees; picklable."""

    root: Path

    def trial_folder(self, trial_id: str) -> Path:
        """The folder of a trial's artifacts, existing."""
        return self._made(TRIALS, checked_id(trial_id))

    def checkpoint_folder(self, trial_id: str) -> Path:
        """The folder of a trial's checkpoint, existing or not."""
        return self.root / CHECKPOINTS / checked_id(trial_id)

    def keep_trial(self, trial_id: str) -> AbstractContextManager[Path]:  # noqa: D102 - ArtifactStore says it
        return nullcontext(self.trial_folder(trial_id))

    def keep_checkpoint(self, trial_id: str) -> AbstractContextManager[Path]:  # noqa: D102
        return nullcontext(self.checkpoint_folder(trial_id))

    def saved_checkpoint(self, trial_id: str) -> AbstractContextManager[Path]:  # noqa: D102
        return nullcontext(self.checkpoint_folder(trial_id))

    def drop_checkpoint(self, trial_id: str) -> None:  # noqa: D102
        shutil.rmtree(self.checkpoint_folder(trial_id), ignore_errors=True)

    def scratch(self) -> Path:
        """The folder of the runner's own files, existing."""
        return self._made(SCRATCH)

    def workspace(self) -> AbstractContextManager[Path]:  # noqa: D102
        return nullcontext(self.scratch())

    def drop_working_files(self) -> None:  # noqa: D102
        for folder in (CHECKPOINTS, SCRATCH):
            shutil.rmtree(self.root / folder, ignore_errors=True)

    def _made(self, *parts: str) -> Path:
        folder = self.root.joinpath(*parts)
        folder.mkdir(parents=True, exist_ok=True)
        return folder


class InMemoryStore:
    """A `TrialStore` without a database: for `run_search` in a script, and the tests' oracle.

    `attempt()` begins a new attempt on the same job, as a restarted driver does.
    """

    def __init__(self, shared: "_Memory | None" = None) -> None:
        self._memory = shared or _Memory()
        with self._memory.lock:
            self._memory.attempt += 1
            self._attempt = self._memory.attempt
            self._seconds_before = self._memory.seconds
            self._began = time.monotonic()

    def attempt(self) -> "InMemoryStore":
        """A store of a newer attempt at the same job."""
        return InMemoryStore(self._memory)

    @property
    def trials(self) -> list[Trial]:
        """All trials, by number."""
        with self._memory.lock:
            return copy.deepcopy(sorted(self._memory.trials.values(), key=lambda trial: trial.number))

    @property
    def measurements(self) -> dict[tuple[str, int], Measurement]:
        """All measurements by trial id and epoch."""
        with self._memory.lock:
            return copy.deepcopy(self._memory.measurements)

    @property
    def front(self) -> set[str]:
        """Ids of the trials on the front."""
        with self._memory.lock:
            return set(self._memory.front)

    @property
    def history(self) -> list[tuple[str, float | None]]:
        """Trial id and hypervolume after each completed trial."""
        with self._memory.lock:
            return list(self._memory.history)

    @property
    def used_references(self) -> set[ReferenceKey]:
        """The references that the job measures against."""
        with self._memory.lock:
            return set(self._memory.used_references)

    @property
    def setting(self) -> Setting | None:
        """Where the job measures subsets and affinities; None until it is noted."""
        with self._memory.lock:
            return self._memory.setting

    @property
    def subsets(self) -> list[tuple[Setting, SubsetResult]]:
        """All subset networks, in the order in which they were stored."""
        with self._memory.lock:
            return copy.deepcopy(self._memory.subsets)

    @property
    def affinities(self) -> list[tuple[Setting, AffinityResult]]:
        """All affinities, in the order in which they were stored."""
        with self._memory.lock:
            return copy.deepcopy(self._memory.affinities)

    @property
    def confirmations(self) -> list[Confirmation]:
        """The confirming runs, in the order in which they were recorded."""
        with self._memory.lock:
            return copy.deepcopy(list(self._memory.confirmations.values()))

    @property
    def verdict(self) -> Verdict | None:
        """What the job has found; None until it is known."""
        with self._memory.lock:
            return copy.deepcopy(self._memory.verdict)

    @property
    def estimate(self) -> float | None:
        """How long the job was last expected to run on, in s."""
        with self._memory.lock:
            return self._memory.estimate

    @property
    def state(self) -> tuple[JobState, str | None]:
        """State and reason of the job."""
        with self._memory.lock:
            return self._memory.state, self._memory.reason

    def resume(self) -> Resumed:  # noqa: D102 - TrialStore says it
        with self._memory.lock:
            return Resumed(
                trials=self.trials,
                seconds=self._seconds_before,
                side_device_seconds=self._memory.side_device_seconds,
                reference_point=copy.deepcopy(self._memory.reference_point),
                confirmations=self.confirmations,
            )

    def beat(self) -> None:  # noqa: D102
        with self._writing():
            pass

    def add_trial(self, trial: Trial) -> None:  # noqa: D102
        with self._writing() as memory:
            if trial.id in memory.trials or any(t.number == trial.number for t in memory.trials.values()):
                raise ValueError(f"trial {trial.id}, number {trial.number}: id and number must be new")
            memory.trials[trial.id] = copy.deepcopy(trial)

    def start_trial(self, trial_id: str) -> None:  # noqa: D102
        with self._writing() as memory:
            memory.trials[trial_id] = replace(self._live(trial_id), state=TrialState.RUNNING)

    def measure(self, trial_id: str, measurement: Measurement) -> None:  # noqa: D102
        with self._writing() as memory:
            trial = self._live(trial_id)
            memory.measurements[trial_id, measurement.epoch] = copy.deepcopy(measurement)
            memory.trials[trial_id] = replace(
                trial,
                state=TrialState.RUNNING,
                epochs=measurement.epoch,
                device_seconds=measurement.device_seconds,
            )

    def preempt(self, trial_id: str) -> None:  # noqa: D102
        with self._writing() as memory:
            trial = self._live(trial_id)
            memory.trials[trial_id] = replace(trial, state=TrialState.PENDING, crashes=trial.crashes + 1)

    def end_trial(self, trial_id: str, ending: Ending, front: FrontUpdate | None) -> None:  # noqa: D102
        with self._writing() as memory:
            memory.trials[trial_id] = replace(
                self._live(trial_id),
                state=ending.state,
                ending=copy.deepcopy(ending),
                epochs=ending.epochs,
                device_seconds=ending.device_seconds,
            )
            if front is not None:
                memory.front -= set(front.displaced)
                if front.on_front:
                    memory.front.add(trial_id)
                memory.history.append((trial_id, front.hypervolume))

    def set_reference_point(self, point: Mapping[str, float]) -> None:  # noqa: D102
        with self._writing() as memory:
            memory.reference_point = dict(point)

    def find_references(self, keys: Sequence[ReferenceKey]) -> dict[ReferenceKey, Reference]:  # noqa: D102
        with self._memory.lock:
            return {key: self._memory.references[key] for key in keys if key in self._memory.references}

    def add_reference(self, key: ReferenceKey, reference: Reference) -> None:  # noqa: D102
        with self._writing() as memory:
            memory.references.setdefault(key, reference)
            memory.side_device_seconds += reference.device_seconds

    def use_references(self, keys: Sequence[ReferenceKey]) -> None:  # noqa: D102
        with self._writing() as memory:
            missing = [key for key in keys if key not in memory.references]
            if missing:
                raise KeyError(missing[0])
            memory.used_references |= set(keys)

    def measurements_at(self, epochs: Sequence[int]) -> dict[str, dict[int, Measurement]]:  # noqa: D102
        found: dict[str, dict[int, Measurement]] = {}
        for (trial_id, epoch), measurement in self.measurements.items():
            if epoch in epochs:
                found.setdefault(trial_id, {})[epoch] = measurement
        return found

    def find_subsets(self, setting: Setting) -> list[SubsetResult]:  # noqa: D102
        found: dict[Any, SubsetResult] = {}
        for where, result in self.subsets:
            if where == setting:
                found.setdefault((result.tasks, result.weights, result.seed), result)
        return list(found.values())

    def add_subsets(  # noqa: D102
        self, setting: Setting, run: int, results: Sequence[SubsetResult], device_seconds: float
    ) -> None:
        new = [(setting, replace(copy.deepcopy(result), run=run)) for result in results]
        with self._writing() as memory:
            if any(result.run == run for _, result in memory.subsets):
                raise ValueError(f"run: must be new, {run} holds other results")
            memory.subsets += new
            memory.side_device_seconds += device_seconds

    def find_affinities(self, setting: Setting) -> list[AffinityResult]:  # noqa: D102
        return [result for where, result in self.affinities if where == setting]

    def add_affinity(  # noqa: D102
        self, setting: Setting, result: AffinityResult, device_seconds: float
    ) -> None:
        def key(found: AffinityResult) -> object:
            return found.method, found.tasks, found.weights, found.seed

        with self._writing() as memory:
            memory.side_device_seconds += device_seconds
            if all(where != setting or key(known) != key(result) for where, known in memory.affinities):
                memory.affinities.append((setting, copy.deepcopy(result)))

    def charge_side(self, device_seconds: float) -> None:  # noqa: D102
        with self._writing() as memory:
            memory.side_device_seconds += device_seconds

    def use_setting(self, setting: Setting) -> None:  # noqa: D102
        with self._writing() as memory:
            memory.setting = setting

    def add_confirmation(self, confirmation: Confirmation) -> None:  # noqa: D102
        key = confirmation.trial_id, confirmation.role, confirmation.seed
        with self._writing() as memory:
            if confirmation.trial_id not in memory.trials:
                raise KeyError(confirmation.trial_id)
            if key in memory.confirmations:
                raise ValueError(
                    f"confirmation: trial, role and seed must be new, found {', '.join(map(str, key))}"
                )
            memory.confirmations[key] = copy.deepcopy(confirmation)
            memory.side_device_seconds += confirmation.ending.device_seconds

    def set_verdict(self, verdict: Verdict) -> None:  # noqa: D102
        with self._writing() as memory:
            memory.verdict = copy.deepcopy(verdict)

    def set_estimate(self, seconds_left: float | None) -> None:  # noqa: D102
        with self._writing() as memory:
            memory.estimate = seconds_left

    def finish(self, state: JobState, reason: str | None) -> None:  # noqa: D102
        with self._writing() as memory:
            memory.state, memory.reason = state, reason
            for trial in memory.trials.values():
                if trial.state not in ENDED:
                    memory.trials[trial.id] = replace(
                        trial,
                        state=TrialState.CANCELLED,
                        ending=Ending(
                            state=TrialState.CANCELLED,
                            epochs=trial.epochs,
                            device_seconds=trial.device_seconds,
                        ),
                    )

    def _live(self, trial_id: str) -> Trial:
        trial = self._memory.trials[trial_id]
        if trial.state in ENDED:
            raise TrialEnded(f"trial {trial_id} is {trial.state}: an ended trial never changes")
        return trial

    def _writing(self) -> "_Writing":
        return _Writing(self._memory, self._attempt, self._seconds_before, self._began)


@dataclass
class _Memory:
    trials: dict[str, Trial] = field(default_factory=dict)
    measurements: dict[tuple[str, int], Measurement] = field(default_factory=dict)
    references: dict[ReferenceKey, Reference] = field(default_factory=dict)
    used_references: set[ReferenceKey] = field(default_factory=set)
    subsets: list[tuple[Setting, SubsetResult]] = field(default_factory=list)
    affinities: list[tuple[Setting, AffinityResult]] = field(default_factory=list)
    setting: Setting | None = None
    confirmations: dict[tuple[str, Role, int], Confirmation] = field(default_factory=dict)
    verdict: Verdict | None = None
    estimate: float | None = None
    side_device_seconds: float = 0.0
    reference_point: dict[str, float] | None = None
    front: set[str] = field(default_factory=set)
    history: list[tuple[str, float | None]] = field(default_factory=list)
    state: JobState = JobState.RUNNING
    reason: str | None = None
    attempt: int = 0
    seconds: float = 0.0
    lock: Any = field(default_factory=threading.RLock)


@dataclass
class _Writing:
    """Holds the lock, refuses an old attempt, and keeps the time that the attempt ran."""

    memory: _Memory
    attempt: int
    seconds_before: float
    began: float

    def __enter__(self) -> _Memory:
        self.memory.lock.acquire()
        if self.attempt != self.memory.attempt or self.memory.state != JobState.RUNNING:
            self.memory.lock.release()
            raise Fenced(
                f"attempt {self.attempt} is over: the job is at {self.memory.attempt}, {self.memory.state}"
            )
        self.memory.seconds = self.seconds_before + time.monotonic() - self.began
        return self.memory

    def __exit__(self, *_: object) -> None:
        self.memory.lock.release()
