"""A search as a job's driver runs it, but for Ray: what is to run trains here, one thing at a time."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from coterie.search.baselines import (
    make_reference_point,
    make_yardstick,
    reference_candidate,
    side_setting,
    yardstick_keys,
)
from coterie.search.budget import Ledger
from coterie.search.controller import Order, SearchController
from coterie.search.objective import Yardstick
from coterie.search.plan import Plan, make_plan
from coterie.search.recorder import Recorder
from coterie.search.sampler import make_sampler
from coterie.search.scheduler import make_scheduler
from coterie.search.spec import JobSpec
from coterie.search.store import (
    AffinityResult,
    Ending,
    FolderArtifacts,
    FrontUpdate,
    InMemoryStore,
    JobState,
    Measurement,
    Setting,
    SubsetResult,
    TrialState,
)
from coterie.search.subsets import run_affinity, run_subsets
from coterie.search.trial import Assignment, Bench, Training, make_bench, train_reference
from coterie.search.work import SubsetRun


@dataclass
class Watched(InMemoryStore):
    """A store that notes what was charged when the front moved."""

    curve: list[tuple[float, float]] = field(default_factory=list)
    charged: float = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.curve = []
        self._charged: dict[str, float] = {}

    def _charge(self, what: str, device_seconds: float) -> None:
        self._charged[what] = device_seconds
        self.charged = sum(self._charged.values())

    def measure(self, trial_id: str, measurement: Measurement) -> None:
        super().measure(trial_id, measurement)
        self._charge(trial_id, measurement.device_seconds)

    def end_trial(self, trial_id: str, ending: Ending, front: FrontUpdate | None) -> None:
        super().end_trial(trial_id, ending, front)
        self._charge(trial_id, ending.device_seconds)
        if front is not None and front.hypervolume is not None:
            self.curve.append((self.charged, front.hypervolume))

    def add_subsets(
        self, setting: Setting, run: int, results: Sequence[SubsetResult], device_seconds: float
    ) -> None:
        super().add_subsets(setting, run, results, device_seconds)
        self._charge(f"subsets {run}", device_seconds)

    def add_affinity(self, setting: Setting, result: AffinityResult, device_seconds: float) -> None:
        super().add_affinity(setting, result, device_seconds)
        self._charge(f"affinity {result.seed}", device_seconds)


class Search:
    """One job in this process.

    Args:
        document: Its spec.
        after: Called with the search and the number of ended trials as each ends.
        laboratory_of: What the data and the yardstick are shared between jobs of, beside their spec.
    """

    def __init__(
        self,
        document: Mapping[str, Any],
        after: Callable[["Search", int], None] = lambda *_: None,
        laboratory_of: type[Any] | None = None,
    ) -> None:
        torch.set_num_threads(1)
        self.plan = make_plan(JobSpec.model_validate(document))
        self.store = Watched()
        self._after = after
        self._bench, self._yardstick = laboratory(self.plan, laboratory_of)

    def run(self) -> tuple[JobState, str | None]:
        plan, store = self.plan, self.store
        resumed = store.resume()
        self.sampler = make_sampler(plan, self._yardstick)
        scheduler = make_scheduler(plan.spec.search.scheduler, plan.objectives, plan.spec.budget.epochs)
        store.use_setting(side_setting(plan))
        with tempfile.TemporaryDirectory() as folder, Recorder(store) as recorder:
            self._artifacts = FolderArtifacts(Path(folder))
            self._controller = SearchController(
                plan,
                resumed,
                {},
                recorder,
                self._artifacts,
                Ledger(plan.spec.budget, resumed),
                self.sampler,
                scheduler,
                make_reference_point(plan, self._yardstick),
                concurrent=1,
            )
            ended = 0
            while not self._controller.over:
                order = self._controller.suggest()
                if order is None:
                    continue
                if isinstance(order.work, Assignment):
                    self._train(order, order.work)
                    if not order.work.confirms:
                        ended += 1
                        recorder.flush()
                        self._after(self, ended)
                else:
                    self._aside(order)
            verdict = self._controller.verdict()
            recorder.write(lambda store: store.finish(*verdict))
            recorder.flush()
        return verdict

    def _train(self, order: Order, assignment: Assignment) -> None:
        controller = self._controller
        controller.started(order.id)
        training = None
        try:
            training = Training(assignment, self._bench, self._yardstick)
            while not training.done:
                if not controller.measured(order.id, training.run_epoch()) and not training.done:
                    return controller.stopped(order.id)
            folder = self._artifacts.trial_folder(order.id)
            controller.ended(order.id, training.finish(folder))
        except Exception as error:  # as in the actor: it is the candidate's ending
            spent = 0.0 if training is None else training.device_seconds
            controller.ended(
                order.id, Ending(state=TrialState.FAILED, reason=str(error), device_seconds=spent)
            )
        return None

    def _aside(self, order: Order) -> None:
        began = time.perf_counter()
        if isinstance(order.work, SubsetRun):
            outcome: Any = run_subsets(order.work, self._bench)
        else:
            assert not isinstance(order.work, Assignment)
            outcome = run_affinity(order.work, self._bench)
        self._controller.learned(order.id, outcome, time.perf_counter() - began)


@cache
def _laboratory(key: str, source: type[Any] | None) -> tuple[Bench, Yardstick]:
    plan = make_plan(JobSpec.model_validate_json(key))
    bench = make_bench(plan.tasks, plan.source.load(plan.options), cpus=1, gpus=0)
    tasks = {task.name: task for task in plan.tasks}
    references = {
        key: train_reference(tasks[key.task], reference_candidate(key), key.seed, key.epochs, bench)
        for key in yardstick_keys(plan)
    }
    return bench, make_yardstick(plan, references)


def laboratory(plan: Plan, source: type[Any] | None = None) -> tuple[Bench, Yardstick]:
    """Data and yardstick, which jobs that differ in how they search have in common."""
    spec = plan.spec
    same = {
        "dataset": spec.dataset.model_dump(mode="json"),
        "search": {"backbones": spec.search.backbones},
        "budget": {"trials": 1, "epochs": spec.budget.epochs},
    }
    return _laboratory(JobSpec.model_validate(same).model_dump_json(), source)
