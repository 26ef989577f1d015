"""Runs a search on Ray: the only file of `search` that knows it.

Ray Tune places the trials, one actor each, kept alive from trial to trial (`reuse_actors`). A searcher, a
scheduler and a callback of ours pass everything on to the `SearchController`; Tune's own experiment state is
never read, since the store is the only truth. Facts about Ray that shape this file:

- A stop by the scheduler reaches the callback exactly like a completion: only a completed trial brings an
  ending.
- `max_failures` loses a trial whose actor dies in a reset, so it stays 0, and the controller suggests the
  trial again, which goes on from its own checkpoint.
- A report comes before Tune's checkpoint. Ours is written before the report and holds the latest ones, so a
  kill repeats no epoch and leaves no gap.
- Searcher, scheduler and callback get pickled by Tune; they have nothing to say there.
- Side runs and confirming runs are trials to Tune, so it places them as it places candidates.
- A process that was stopped is alive to Ray, however long it says nothing: see `watchdog`.
"""

import itertools
import logging
import os
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import Callback, CheckpointConfig, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from coterie.models.tasks import Task, TaskSet
from coterie.search.baselines import (
    make_reference_point,
    make_yardstick,
    needed_references,
    own_width_keys,
    reference_candidate,
    side_setting,
)
from coterie.search.budget import Ledger
from coterie.search.controller import REASON_LENGTH, Order, SearchController
from coterie.search.data.base import Dataset
from coterie.search.disk import full_disk_told
from coterie.search.objective import Yardstick
from coterie.search.plan import Plan, make_plan
from coterie.search.recorder import Recorder, patiently
from coterie.search.result import SearchResult
from coterie.search.sampler import Sampler, make_sampler
from coterie.search.scheduler import make_scheduler
from coterie.search.spec import JobSpec, ResourcesSpec
from coterie.search.store import (
    AffinityResult,
    ArtifactStore,
    Candidate,
    Ending,
    FilesUnavailable,
    FolderArtifacts,
    InMemoryStore,
    JobState,
    Measurement,
    Reference,
    ReferenceKey,
    Resumed,
    SubsetResult,
    TrialState,
    TrialStore,
)
from coterie.search.subsets import run_affinity, run_subsets
from coterie.search.trial import Assignment, Training, make_bench, train_reference
from coterie.search.watchdog import SILENCE_SECONDS, end_if_silent
from coterie.search.work import SideRun, SubsetRun

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
LONGEST_SILENCE = 30.0  # behind a job's last second: seconds in which what runs must report, or it is ended


class BudgetSpent(Exception):
    """The job's budget was spent before its yardstick was trained."""


def run_search(spec: JobSpec | Mapping[str, Any], folder: Path | None = None) -> SearchResult:
    """Run a job in this process, without a server; the same spec gives the same results as there.

    Where Ray is not initialised it is started on this machine for the search, and ended behind it.

    Args:
        spec: The job; a mapping is checked as a server would.
        folder: Where the networks go, by default a temporary folder that is never deleted by Coterie. Nothing
            else is kept there.

    Raises:
        pydantic.ValidationError: If a mapping breaks the schema.
        SpecError: If the spec asks for what does not exist or cannot be.
        DiskFull: If there is no space left for its networks or checkpoints.

    Example:
        result = run_search({"dataset": {"source": "digits"}, "budget": {"trials": 20}})
        best = result.best("delta_m", max_macs=10_000)
        network = result.load(best)
    """
    plan = make_plan(spec if isinstance(spec, JobSpec) else JobSpec.model_validate(spec))
    artifacts = FolderArtifacts(Path(tempfile.mkdtemp(prefix="coterie-") if folder is None else folder))
    store = InMemoryStore()
    with _local_ray():
        drive(plan, store, artifacts)
    return SearchResult.read(plan, store, artifacts)


@contextmanager
def _local_ray() -> Iterator[None]:
    """A Ray of our own on loopback, unless there is one already."""
    if ray.is_initialized():
        yield
        return
    with _environment(RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0"):
        ray.init(
            address="local",  # never another's: without an address Ray attaches to any on the host
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            _node_ip_address="127.0.0.1",
        )
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _environment(**settings: str) -> Iterator[None]:
    """Variables of this process and its children while the block lasts."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@full_disk_told()
def drive(
    plan: Plan, store: TrialStore, artifacts: ArtifactStore, silence: float = SILENCE_SECONDS
) -> tuple[JobState, str | None]:
    """Run a job, or go on with it, to its end in `store`; Ray must be initialised.

    Args:
        plan: What to search.
        store: Of this attempt; holds what earlier attempts left.
        artifacts: A place that all workers see.
        silence: Seconds after which a process that trains and gives no sign of life is killed; what it ran
            goes on from its checkpoint in another.

    Returns:
        State and reason, which are in the store too.

    Raises:
        Fenced: If a newer attempt has begun, or the job was cancelled: nothing more was written.
        FilesUnavailable: If a file can't be written or read, as on a full disk. No trial has ended for it: a
            later attempt goes on.
    """
    resumed = patiently(store.resume)
    concurrent = _concurrency(plan)
    ledger = Ledger(plan.spec.budget, resumed, devices=min(concurrent, _fitting(plan)) * plan.devices)
    with Recorder(store) as recorder:  # which says that the driver lives while the data are loaded
        data_ref = ray.put(plan.source.load(plan.options))
        try:
            yardstick = _measure_yardstick(plan, store, recorder, ledger, data_ref, silence)
        except BudgetSpent:
            reason = f"{ledger.spent()}, before the yardstick was trained"
            ending: tuple[JobState, str | None] = (JobState.FAILED, reason)
        else:
            point = resumed.reference_point
            if point is None:
                point = make_reference_point(plan, yardstick)
                fixed = dict(point)
                recorder.write(lambda store: store.set_reference_point(fixed))
            scheduler = make_scheduler(plan.spec.search.scheduler, plan.objectives, plan.spec.budget.epochs)
            epochs = [*scheduler.rungs, *_unfinished_epochs(resumed)]
            controller = SearchController(
                plan,
                resumed,
                patiently(lambda: store.measurements_at(epochs)),
                recorder,
                artifacts,
                ledger,
                _make_sampler(plan, yardstick, store, recorder),
                scheduler,
                point,
                concurrent,
            )
            _tune(plan, controller, artifacts, data_ref, yardstick, silence)
            ending = controller.verdict()
        recorder.write(lambda store: store.finish(*ending))
        recorder.flush()
    artifacts.drop_working_files()
    return ending


def _unfinished_epochs(resumed: Resumed) -> set[int]:
    """Where trials stand that go on: they may yet be stopped, and then show what they had reached."""
    return {trial.epochs for trial in resumed.trials if trial.ending is None}


def _make_sampler(plan: Plan, yardstick: Yardstick, store: TrialStore, recorder: Recorder) -> Sampler:
    """The job's sampler, with what is known of its tasks already."""
    setting = side_setting(plan)
    recorder.write(lambda store: store.use_setting(setting))
    sampler = make_sampler(plan, yardstick)
    sampler.learn(patiently(lambda: store.find_subsets(setting)))
    for result in patiently(lambda: store.find_affinities(setting)):
        sampler.learn_affinity(result)
    return sampler


def _concurrency(plan: Plan) -> int:
    """What the job asks for, else what fits."""
    return plan.spec.budget.concurrent or _fitting(plan)


def _fitting(plan: Plan) -> int:
    """How many trials fit on the nodes that are there now; one may have to wait for its node."""
    wish = plan.spec.resources
    found = ray.cluster_resources()
    fits = [found.get("CPU", 0) / wish.cpus]
    if wish.gpus > 0:
        fits.append(found.get("GPU", 0) / wish.gpus)
    return max(1, int(min(fits)))


def _measure_yardstick(
    plan: Plan,
    store: TrialStore,
    recorder: Recorder,
    ledger: Ledger,
    data: "ray.ObjectRef[Dataset]",
    silence: float,
) -> Yardstick:
    keys = needed_references(plan)
    known = [*keys, *itertools.chain(*own_width_keys(plan).values())]
    found = patiently(lambda: store.find_references(known))
    wish = plan.spec.resources
    train = ray.remote(_train_reference).options(num_cpus=wish.cpus, num_gpus=wish.gpus)
    tasks = {task.name: task for task in plan.tasks}
    waiting: dict[Any, ReferenceKey] = {
        train.remote(
            tasks[key.task], reference_candidate(key), key.seed, key.epochs, data, wish, silence
        ): key
        for key in keys
        if key not in found
    }
    while waiting:
        recorder.check()
        if ledger.spent() is not None:
            for ref in waiting:
                ray.cancel(ref)
            raise BudgetSpent
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=POLL_SECONDS)
        for ref in done:
            key, reference = waiting.pop(ref), ray.get(ref)
            found[key] = reference
            ledger.charge_side("reference", reference.device_seconds)
            recorder.write(partial(_add_reference, key=key, reference=reference))
    used = list(found)
    recorder.write(lambda store: store.use_references(used))
    return make_yardstick(plan, found)


def _add_reference(store: TrialStore, key: ReferenceKey, reference: Reference) -> None:
    store.add_reference(key, reference)


def _train_reference(
    task: Task,
    candidate: Candidate,
    seed: int,
    epochs: int,
    data: Dataset,
    wish: ResourcesSpec,
    silence: float,
) -> Reference:
    end_if_silent(silence)  # Ray tries again
    bench = make_bench(TaskSet([task]), data, cpus=wish.cpus, gpus=wish.gpus)
    return train_reference(task, candidate, seed, epochs, bench)


def _tune(
    plan: Plan,
    controller: SearchController,
    artifacts: ArtifactStore,
    data: "ray.ObjectRef[Dataset]",
    yardstick: Yardstick,
    silence: float,
) -> None:
    wish = plan.spec.resources
    context = {
        "tasks": plan.tasks,
        "data": data,
        "yardstick": yardstick,
        "artifacts": artifacts,
        "resources": wish,
        "silence": silence,
    }
    trainable = tune.with_resources(
        tune.with_parameters(TrialActor, context=context), {"cpu": wish.cpus, "gpu": wish.gpus}
    )
    relay = _Relay(controller)
    with _quiet_tune(), artifacts.workspace() as scratch:
        Tuner(
            trainable,
            tune_config=TuneConfig(
                search_alg=_Suggestions(relay),
                scheduler=_Stops(relay),
                num_samples=-1,  # the searcher says when it is over
                reuse_actors=True,
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=RunConfig(
                name="tune",
                storage_path=str(scratch),
                callbacks=[_Events(relay)],
                stop=_OutOfTime(relay),
                checkpoint_config=CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
                verbose=0,
            ),
        ).fit()
    if relay.error is not None:
        raise relay.error
    if not controller.over and controller.overdue <= LONGEST_SILENCE:
        raise RuntimeError("Ray Tune ended before the search was over")
    controller.end_what_runs()


@contextmanager
def _quiet_tune() -> Iterator[None]:
    """Leave out Tune's own result files and tables, which repeat the store, and warnings of their absence.

    And its handlers of signals: Ctrl-C would end the search as if it were over.
    """
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGUSR1)  # which Tune takes in any case
    try:
        with _environment(
            TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1", RAY_AIR_NEW_OUTPUT="0", TUNE_DISABLE_SIGINT_HANDLER="1"
        ):
            yield
    finally:
        if in_main and before is not None:
            signal.signal(signal.SIGUSR1, before)


class TrialActor(tune.Trainable):
    """The process that trains; each call of `step` is one epoch, or a whole side run."""

    def setup(self, config: dict[str, Any], context: dict[str, Any] | None = None) -> None:
        """Put the job's data on the device, then take the first assignment."""
        assert context is not None  # with_parameters supplies it
        end_if_silent(context["silence"])
        wish: ResourcesSpec = context["resources"]
        data = ray.get(context["data"])
        self._bench = make_bench(context["tasks"], data, cpus=wish.cpus, gpus=wish.gpus)
        self._yardstick: Yardstick = context["yardstick"]
        self._artifacts: ArtifactStore = context["artifacts"]
        self._unusable = False
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next assignment, from its checkpoint where there is one."""
        if self._unusable:
            os._exit(1)  # the trial starts again in a new process
        self._order: Order = new_config["order"]
        self._training: Training | None = None
        self._unreported: deque[Measurement] = deque()
        return True

    def step(self) -> dict[str, Any]:
        """Train an epoch, keep it, report it; after the last one the trial's ending too.

        What a candidate raises is its ending, so that an error that reaches Tune always means a dead process.
        But a full disk, or a store that is away, is no fault of its own: then it has no ending yet.
        """
        work = self._order.work
        if not isinstance(work, Assignment):
            return self._run_aside(work)
        try:
            with full_disk_told():
                return self._advance(work)
        except FilesUnavailable as error:
            logger.warning("%s can't go on", self._order.id, exc_info=True)
            return {"measurement": None, "ending": None, "without_files": error, "done": True}
        except Exception as error:
            logger.exception("%s failed", self._order.id)
            self._unusable = self._bench.device.type == "cuda"  # an error there can break the whole process
            training = self._training
            ending = Ending(
                state=TrialState.FAILED,
                reason=f"{type(error).__name__}: {error}"[:REASON_LENGTH],
                epochs=0 if training is None else training.epoch,
                device_seconds=0.0 if training is None else training.device_seconds,
            )
            return {"measurement": None, "ending": ending, "done": True}

    def _advance(self, assignment: Assignment) -> dict[str, Any]:
        if self._training is None:
            self._training = Training(assignment, self._bench, self._yardstick)
            with self._artifacts.saved_checkpoint(self._order.id) as folder:
                found = self._training.restore(folder)
            self._unreported.extend(m for m in found if m.epoch > assignment.recorded)
        training = self._training
        if self._unreported:
            return {"measurement": self._unreported.popleft(), "ending": None, "done": False}
        measurement = training.run_epoch()
        report: dict[str, Any] = {"measurement": measurement, "ending": None, "done": training.done}
        if not training.done:  # the last epoch's checkpoint would be deleted at once
            with self._artifacts.keep_checkpoint(self._order.id) as folder:
                training.save(folder)
        elif assignment.confirms:
            with self._artifacts.workspace() as scratch:
                folder = scratch / self._order.id
                folder.mkdir(exist_ok=True)
                report["ending"] = training.finish(folder)
        else:
            with self._artifacts.keep_trial(self._order.id) as folder:
                report["ending"] = training.finish(folder)
        return report

    def _run_aside(self, run: SideRun) -> dict[str, Any]:
        began, limit = time.perf_counter(), self._order.seconds

        def check() -> None:
            if limit is not None and time.perf_counter() - began >= limit:
                raise BudgetSpent

        outcome: Sequence[SubsetResult] | AffinityResult | None = None
        try:
            if isinstance(run, SubsetRun):
                outcome = run_subsets(run, self._bench, check)
            else:
                outcome = run_affinity(run, self._bench, check)
        except BudgetSpent:
            logger.info("%s: no time was left for it", self._order.id)
        except Exception:  # the search goes on without it
            logger.exception("%s failed", self._order.id)
            self._unusable = self._bench.device.type == "cuda"
        return {
            "measurement": None,
            "ending": None,
            "outcome": outcome,
            "device_seconds": (time.perf_counter() - began) * self._bench.devices,
            "done": True,
        }


class _Relay:
    """What Tune's three hooks share: Tune's trial ids, and the error that ended the search.

    An exception in a hook would end the Tuner in ways that differ from hook to hook, so it is kept here, and
    the search winds down.
    """

    def __init__(self, controller: SearchController) -> None:
        self.controller = controller
        self.ours: dict[str, Order] = {}
        self.error: BaseException | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    @contextmanager
    def guard(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.error = self.error or error


class _Suggestions(Searcher):
    def __init__(self, relay: _Relay) -> None:
        super().__init__()
        self._relay = relay

    def suggest(self, trial_id: str) -> Any:
        with self._relay.guard():
            if self._relay.error is None:
                order = self._relay.controller.suggest()
                if order is not None:
                    self._relay.ours[trial_id] = order
                    return {"order": order}
                if not self._relay.controller.over:
                    if self._relay.controller.idle:
                        time.sleep(POLL_SECONDS)  # Tune would ask again at once
                    return None
        return Searcher.FINISHED

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        pass  # the callback has more to tell

    def save(self, checkpoint_path: str) -> None:
        pass  # rebuilt from the store

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search goes on from its store")


class _Stops(FIFOScheduler):
    def __init__(self, relay: _Relay) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._relay = relay

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        relay, go_on = self._relay, False
        with relay.guard():
            go_on = relay.controller.measured(relay.ours[trial.trial_id].id, result["measurement"])
        if go_on and relay.error is None:
            return str(TrialScheduler.CONTINUE)
        return str(TrialScheduler.STOP)


class _OutOfTime(Stopper):
    """Ends what has not reported since long after the job's last second."""

    def __init__(self, relay: _Relay) -> None:
        self._relay = relay

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._relay.error is None and self._relay.controller.overdue > LONGEST_SILENCE


class _Events(Callback):
    def __init__(self, relay: _Relay) -> None:
        self._relay = relay

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        with self._relay.guard():
            self._relay.controller.started(self._relay.ours[trial.trial_id].id)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        # Tune asks the scheduler only about trials that go on: the last report is recorded here.
        if result["ending"] is not None and result["measurement"] is not None:
            with self._relay.guard():
                self._relay.controller.measured(self._relay.ours[trial.trial_id].id, result["measurement"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        relay = self._relay
        if relay.error is not None:
            return
        with relay.guard():
            order, result = relay.ours.pop(trial.trial_id), trial.last_result
            if "without_files" in result:
                raise result["without_files"]
            if not isinstance(order.work, Assignment):
                relay.controller.learned(order.id, result["outcome"], result["device_seconds"])
            elif result["ending"] is not None:
                relay.controller.ended(order.id, result["ending"])
            else:
                relay.controller.stopped(order.id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        relay = self._relay
        if relay.error is not None:
            return
        with relay.guard():
            lines = Path(trial.error_file).read_text().strip().splitlines() if trial.error_file else []
            relay.controller.crashed(
                relay.ours.pop(trial.trial_id).id, lines[-1] if lines else "no word of why"
            )
