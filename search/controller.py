"""A job's search, without Ray: what runs next, what is recorded, when it is over.

It is called from one thread. What it decides depends only on the plan and on what was reported, so one that
is rebuilt from the store goes on as the first one would have.
"""

import logging
import secrets
from collections import deque
from collections.abc import Mapping
from dataclasses import replace

from coterie.search.budget import Ledger
from coterie.search.front import Front, feasible
from coterie.search.plan import Plan
from coterie.search.recorder import Recorder
from coterie.search.sampler import OptunaSampler, derive_seed
from coterie.search.store import (
    ArtifactStore,
    Ending,
    FrontUpdate,
    JobState,
    Measurement,
    Resumed,
    Trial,
    TrialState,
    TrialStore,
)
from coterie.search.trial import Assignment, drop_checkpoint

logger = logging.getLogger(__name__)

MOST_CRASHES = 5  # of one trial's process; a candidate that kills it each time must not hold the job for ever
REASON_LENGTH = 2000


class SearchController:
    """Decides for one attempt at a job.

    Args:
        plan: What to search.
        resumed: What earlier attempts left in the store.
        recorder: Where everything that happens is written.
        artifacts: Where checkpoints lie, to delete those of ended trials.
        ledger: What the job has used.
        reference_point: Of the hypervolume.
        concurrent: Trials at a time.
    """

    def __init__(
        self,
        plan: Plan,
        resumed: Resumed,
        recorder: Recorder,
        artifacts: ArtifactStore,
        ledger: Ledger,
        reference_point: Mapping[str, float],
        concurrent: int,
    ) -> None:
        self._plan = plan
        self._recorder = recorder
        self._artifacts = artifacts
        self._ledger = ledger
        self._concurrent = concurrent
        self._front = Front(plan.objectives, reference_point)
        spec = plan.spec
        self._sampler = OptunaSampler(
            spec.search.sampler.name, plan.space, plan.objectives, spec.constraints, spec.seed
        )
        self._trials: dict[str, Trial] = {}
        self._waiting: deque[str] = deque()
        self._running: set[str] = set()
        self._next_number = 0
        for trial in resumed.trials:
            self._take_back(trial)

    @property
    def over(self) -> bool:
        """Whether nothing runs, nothing waits and nothing more may start."""
        return not self._running and not self._waiting and not self._ledger.may_start(0)

    @property
    def completed(self) -> int:
        """Trials on or behind the front."""
        return sum(1 for trial in self._trials.values() if trial.state is TrialState.COMPLETED)

    def suggest(self) -> Assignment | None:
        """What to start now; None where nothing may start (see `over`)."""
        self._recorder.check()
        spent = self._ledger.spent()
        while spent is not None and self._waiting:
            # What waits to go on will not go on any more.
            self._end_unfinished(self._waiting.popleft(), TrialState.STOPPED, spent)
        if len(self._running) >= self._concurrent:
            return None
        if self._waiting:
            trial = self._trials[self._waiting.popleft()]
        elif self._ledger.may_start(len(self._running)):
            trial = self._propose()
        else:
            return None
        self._running.add(trial.id)
        return Assignment(
            trial_id=trial.id,
            candidate=trial.candidate,
            seed=trial.seed,
            epochs=self._plan.spec.budget.epochs,
            recorded=trial.epochs,
        )

    def started(self, trial_id: str) -> None:
        """The trial has got its resources."""
        self._recorder.write(lambda store: store.start_trial(trial_id))

    def measured(self, trial_id: str, measurement: Measurement) -> bool:
        """Record an epoch; whether the trial may go on."""
        self._ledger.charge(trial_id, measurement.device_seconds)
        self._trials[trial_id] = replace(
            self._trials[trial_id], epochs=measurement.epoch, device_seconds=measurement.device_seconds
        )
        self._recorder.write(lambda store: store.measure(trial_id, measurement))
        return self._ledger.spent() is None

    def ended(self, trial_id: str, ending: Ending) -> None:
        """Record how a trial ended, and move the front."""
        front = None
        if ending.state is TrialState.COMPLETED:
            front = self._place(trial_id, ending)
        self._running.discard(trial_id)
        trial = replace(self._trials[trial_id], state=ending.state, ending=ending)
        self._trials[trial_id] = trial
        self._ledger.end(trial_id, ending)
        self._sampler.tell(trial)

        def record(store: TrialStore) -> None:
            store.end_trial(trial_id, ending, front)
            drop_checkpoint(self._artifacts.checkpoint_folder(trial_id))

        self._recorder.write(record)

    def stopped(self, trial_id: str) -> None:
        """A trial was stopped because the budget is spent."""
        self._end_unfinished(trial_id, TrialState.STOPPED, self._ledger.spent())

    def crashed(self, trial_id: str, reason: str) -> None:
        """The trial's process died: it goes on from its checkpoint, unless it has died too often."""
        trial = replace(self._trials[trial_id], crashes=self._trials[trial_id].crashes + 1)
        self._trials[trial_id] = trial
        if trial.crashes > MOST_CRASHES:
            words = f"its process died {trial.crashes} times: {reason}"[:REASON_LENGTH]
            self._end_unfinished(trial_id, TrialState.FAILED, words)
            return
        logger.warning("the process of %s died (%d times so far): %s", trial_id, trial.crashes, reason)
        self._running.discard(trial_id)
        self._waiting.append(trial_id)
        self._recorder.write(lambda store: store.preempt(trial_id))

    def verdict(self) -> tuple[JobState, str | None]:
        """How the job ended, once it is over."""
        if self._ledger.failed:
            return JobState.FAILED, self._ledger.spent()
        if self.completed == 0:
            return JobState.FAILED, self._ledger.spent() or "no trial completed"
        return JobState.SUCCEEDED, None

    def _propose(self) -> Trial:
        number = self._next_number
        candidate, choices = self._sampler.ask(number)
        trial = Trial(
            id=f"trial_{secrets.token_hex(8)}",
            number=number,
            candidate=candidate,
            choices=choices,
            seed=derive_seed(self._plan.spec.seed, "trial", number),
        )
        self._next_number += 1
        self._trials[trial.id] = trial
        self._recorder.write(lambda store: store.add_trial(trial))
        return trial

    def _take_back(self, trial: Trial) -> None:
        self._trials[trial.id] = trial
        self._next_number = max(self._next_number, trial.number + 1)
        if trial.ending is None:
            self._waiting.append(trial.id)
            return
        self._sampler.tell(trial)
        if trial.state is TrialState.COMPLETED:
            self._place(trial.id, trial.ending)

    def _place(self, trial_id: str, ending: Ending) -> FrontUpdate:
        if feasible(ending.values, self._plan.spec.constraints):
            return self._front.insert(trial_id, ending.values)
        return self._front.leave_out()

    def _end_unfinished(self, trial_id: str, state: TrialState, reason: str | None) -> None:
        trial = self._trials[trial_id]
        ending = Ending(state=state, reason=reason, epochs=trial.epochs, device_seconds=trial.device_seconds)
        self.ended(trial_id, ending)
