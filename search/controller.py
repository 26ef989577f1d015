"""A job's search, without Ray: what runs next, what is recorded, when it is over.

It is called from one thread. What it decides depends only on the plan and on what was reported, so one that
is rebuilt from the store goes on as the first one would have. A search first tries candidates, with side runs
between them that the sampler learns from; then it confirms the front's best.
"""

import logging
import secrets
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from coterie.search.baselines import side_setting
from coterie.search.budget import Ledger
from coterie.search.confirm import Rerun, choose_points, make_verdict, plan_confirmation
from coterie.search.front import Front, feasible
from coterie.search.plan import Plan
from coterie.search.recorder import Recorder
from coterie.search.sampler import Sampler
from coterie.search.scheduler import Scheduler
from coterie.search.seeds import derive_seed
from coterie.search.store import (
    AffinityResult,
    ArtifactStore,
    Confirmation,
    Ending,
    FrontUpdate,
    JobState,
    Measurement,
    Resumed,
    SubsetResult,
    Trial,
    TrialState,
    TrialStore,
)
from coterie.search.trial import Assignment
from coterie.search.work import SideRun, SubsetRun

logger = logging.getLogger(__name__)

MOST_CRASHES = 5  # of one trial's process; a candidate that kills it each time must not hold the job for ever
REASON_LENGTH = 2000
# Writes that wait for a store that is away, some kB each, before no more is started: what runs goes on.
MOST_BEHIND = 10_000
KEPT_TO_THE_END = frozenset({"single", "shared"})  # baselines, which every other candidate is compared with


@dataclass(frozen=True)
class Order:
    """Something to run now.

    Attributes:
        id: Names it until it has ended.
        work: What it is.
        seconds: How long a side run may take; None for as long as it takes.
    """

    id: str
    work: Assignment | SideRun
    seconds: float | None = None


class SearchController:
    """Decides for one attempt at a job.

    Args:
        plan: What to search.
        resumed: What earlier attempts left in the store.
        recorded: Trial id -> epoch -> measurement: what was recorded of its trials at the scheduler's rungs.
        recorder: Where everything that happens is written.
        artifacts: Where checkpoints lie, to delete those of ended trials.
        ledger: What the job has used.
        sampler: What proposes; it knows the side runs of earlier attempts, and is told the trials here.
        scheduler: What stops trials early; it is told here what was recorded.
        reference_point: Of the hypervolume.
        concurrent: Trials at a time.
    """

    def __init__(
        self,
        plan: Plan,
        resumed: Resumed,
        recorded: Mapping[str, Mapping[int, Measurement]],
        recorder: Recorder,
        artifacts: ArtifactStore,
        ledger: Ledger,
        sampler: Sampler,
        scheduler: Scheduler,
        reference_point: Mapping[str, float],
        concurrent: int,
    ) -> None:
        self._plan = plan
        self._recorder = recorder
        self._artifacts = artifacts
        self._ledger = ledger
        self._sampler = sampler
        self._concurrent = concurrent
        self._setting = side_setting(plan)
        self._front = Front(plan.objectives, reference_point)
        self._scheduler = scheduler
        self._trials: dict[str, Trial] = {}
        self._latest: dict[str, Measurement] = {}
        self._waiting: deque[str] = deque()
        self._running: set[str] = set()
        self._why_stopped: dict[str, str] = {}
        self._next_number = 0
        self._used_up = False
        self._hypervolumes: list[float] = []
        self._side_run: SideRun | None = None
        self._side_began = 0.0
        self._side_crashes = 0
        self._side_runs_off = False
        self._reruns: deque[Rerun] | None = None
        self._confirming: dict[str, Rerun] = {}
        self._crashes: Counter[str] = Counter()
        self._confirmations = list(resumed.confirmations)
        for trial in resumed.trials:
            self._take_back(trial, recorded.get(trial.id, {}))
        self._stop_at_rungs()
        self._reserve()
        self._ledger.begin_trials()

    @property
    def over(self) -> bool:
        """Whether nothing runs, nothing waits and nothing more may start."""
        return not self._running and not self._waiting and not self._searching and not self._next_reruns()

    @property
    def idle(self) -> bool:
        """Whether nothing runs."""
        return not self._running

    @property
    def completed(self) -> int:
        """Trials on or behind the front."""
        return sum(1 for trial in self._trials.values() if trial.state is TrialState.COMPLETED)

    def suggest(self) -> Order | None:
        """What to start now; None where nothing may start (see `over`)."""
        self._recorder.check()
        while self._waiting and (spent := self._spent_for(self._waiting[0])) is not None:
            # What waits to go on will not go on any more.
            self._end_unfinished(self._waiting.popleft(), TrialState.STOPPED, spent)
        if len(self._running) >= self._concurrent or self._recorder.behind > MOST_BEHIND:
            return None
        order = self._next_order()
        if order is not None:
            self._running.add(order.id)
        return order

    def started(self, run_id: str) -> None:
        """It has got its resources."""
        if run_id in self._trials:
            self._recorder.write(lambda store: store.start_trial(run_id))

    def measured(self, run_id: str, measurement: Measurement) -> bool:
        """Record an epoch of a trial or of a confirming run; whether it may go on."""
        self._ledger.charge(run_id, measurement.device_seconds)
        if run_id in self._confirming:
            return self._spent_for(run_id) is None
        trial = replace(
            self._trials[run_id], epochs=measurement.epoch, device_seconds=measurement.device_seconds
        )
        self._trials[run_id] = trial
        self._latest[run_id] = measurement
        self._recorder.write(lambda store: store.measure(run_id, measurement))
        if self._spent_for(run_id) is not None:
            return False
        return self._may_pass_rung(trial, measurement)

    def ended(self, run_id: str, ending: Ending) -> None:
        """Record how a trial or a confirming run ended, and move the front."""
        if run_id in self._confirming:
            return self._confirmed(run_id, ending)
        front = None
        if ending.state is TrialState.COMPLETED:
            front = self._place(run_id, ending)
        self._running.discard(run_id)
        self._latest.pop(run_id, None)
        trial = replace(self._trials[run_id], state=ending.state, ending=ending)
        self._trials[run_id] = trial
        self._ledger.end(run_id, ending)
        self._reserve()
        self._sampler.tell(trial)

        def record(store: TrialStore) -> None:
            store.end_trial(run_id, ending, front)
            self._artifacts.drop_checkpoint(run_id)

        self._recorder.write(record)
        self._estimate()
        return None

    def stopped(self, run_id: str) -> None:
        """A trial or a confirming run was stopped: by the scheduler, or because the budget is spent."""
        reason = self._why_stopped.pop(run_id, None) or self._spent_for(run_id)
        self._end_unfinished(run_id, TrialState.STOPPED, reason)

    def learned(
        self, run_id: str, outcome: Sequence[SubsetResult] | AffinityResult | None, device_seconds: float
    ) -> None:
        """A side run has ended; without an outcome it failed, gave nothing, or had no time left.

        Then this attempt begins no other: the search goes on without.
        """
        run, self._side_run = self._side_run, None
        self._running.discard(run_id)
        self._ledger.charge_side(run_id, device_seconds)
        setting = self._setting
        if not outcome:
            self._side_runs_off = True
            self._recorder.write(lambda store: store.charge_side(device_seconds))
        elif isinstance(outcome, AffinityResult):
            self._sampler.learn_affinity(outcome)
            self._recorder.write(lambda store: store.add_affinity(setting, outcome, device_seconds))
        else:
            assert isinstance(run, SubsetRun)
            number = run.run
            self._sampler.learn(outcome)
            self._recorder.write(lambda store: store.add_subsets(setting, number, outcome, device_seconds))

    def crashed(self, run_id: str, reason: str) -> None:
        """A process died: what it ran goes on from its checkpoint, unless it has died too often."""
        self._running.discard(run_id)
        if self._side_run is not None and run_id == self._side_run.id:
            self._drop_side_run()
            self._side_crashes += 1
            self._side_runs_off = self._side_crashes > MOST_CRASHES
            logger.warning("the process of %s died (%d times so far): %s", run_id, self._side_crashes, reason)
            return
        self._crashes[run_id] += 1
        crashes = self._crashes[run_id]
        if crashes > MOST_CRASHES:
            words = f"its process died {crashes} times: {reason}"[:REASON_LENGTH]
            self._end_unfinished(run_id, TrialState.FAILED, words)
            return
        logger.warning("the process of %s died (%d times so far): %s", run_id, crashes, reason)
        self._waiting.append(run_id)
        if run_id in self._trials:
            self._trials[run_id] = replace(self._trials[run_id], crashes=crashes)
            self._recorder.write(lambda store: store.preempt(run_id))

    @property
    def overdue(self) -> float:
        """Seconds since the job's last one; negative before it."""
        return self._ledger.overdue

    def end_what_runs(self) -> None:
        """The runner was ended before what ran had: none of it goes on."""
        for run_id in sorted(self._running):
            if self._side_run is not None and run_id == self._side_run.id:
                self._running.discard(run_id)
                self._drop_side_run()
            else:
                self.stopped(run_id)
        while self._waiting:
            self.stopped(self._waiting.popleft())

    def verdict(self) -> tuple[JobState, str | None]:
        """How the job ended, once it is over; what it found is recorded, where it has confirmed it."""
        if self._ledger.failed:
            return JobState.FAILED, self._ledger.spent()
        if self.completed == 0:
            return JobState.FAILED, self._ledger.spent() or "no trial completed"
        if self._plan.spec.confirm.top:
            found = make_verdict(self._plan, self._points(), self._confirmations)
            self._recorder.write(lambda store: store.set_verdict(found))
        return JobState.SUCCEEDED, self._why_early

    def _spent_for(self, run_id: str) -> str | None:
        """Why a trial or a confirming run may not go on, in words."""
        return self._ledger.spent(confirming=run_id in self._confirming)

    @property
    def _searching(self) -> bool:
        """Whether one more candidate may start: none once the front's best are being confirmed."""
        if self._why_early is not None or self._reruns is not None or self._confirmations:
            return False
        return self._ledger.may_start(sum(run_id in self._trials for run_id in self._running))

    @property
    def _why_early(self) -> str | None:
        """Why no more candidates start although the budget has room, in words."""
        if self._used_up:
            return "every candidate of the space was tried"
        rule = self._plan.spec.budget.stop_when
        if rule is None or len(self._hypervolumes) <= rule.over_trials:
            return None
        now, before = self._hypervolumes[-1], self._hypervolumes[-1 - rule.over_trials]
        if now - before >= rule.hypervolume_gain_below * now:
            return None
        return (
            f"the last {rule.over_trials} completed trials added less than "
            f"{100 * rule.hypervolume_gain_below:g} % of the hypervolume"
        )

    def _next_order(self) -> Order | None:
        if self._waiting:
            run_id = self._waiting.popleft()
            if run_id in self._confirming:
                return Order(run_id, self._rerun_assignment(run_id, self._confirming[run_id]))
            return self._trial_order(self._trials[run_id])
        if self._searching:
            side_run = self._next_side_run()
            if side_run is not None:
                self._side_run, self._side_began = side_run, self._ledger.seconds
                return Order(side_run.id, side_run, self._ledger.side_seconds(self._plan.devices))
            proposed = self._propose()
            if proposed is not None:
                return self._trial_order(proposed)
        reruns = self._next_reruns()
        if not reruns:
            return None
        rerun = reruns.popleft()
        self._confirming[rerun.id] = rerun
        return Order(rerun.id, self._rerun_assignment(rerun.id, rerun))

    def _trial_order(self, trial: Trial) -> Order:
        return Order(
            trial.id,
            Assignment(
                trial_id=trial.id,
                candidate=trial.candidate,
                seed=trial.seed,
                epochs=self._plan.spec.budget.epochs,
                recorded=trial.epochs,
            ),
        )

    def _drop_side_run(self) -> None:
        """Charge a side run that can't say any more what it took: from its start until now."""
        assert self._side_run is not None
        device_seconds = (self._ledger.seconds - self._side_began) * self._plan.devices
        self._ledger.charge_side(self._side_run.id, device_seconds)
        self._side_run = None
        self._recorder.write(lambda store: store.charge_side(device_seconds))

    def _next_side_run(self) -> SideRun | None:
        if self._side_run is not None or self._side_runs_off:
            return None
        return self._sampler.wanted(self._next_number)

    def _propose(self) -> Trial | None:
        number = self._next_number
        proposal = self._sampler.ask(number)
        if proposal is None:
            self._used_up = True
            return None
        trial = Trial(
            id=f"trial_{secrets.token_hex(8)}",
            number=number,
            candidate=proposal.candidate,
            choices=proposal.choices,
            seed=derive_seed(self._plan.spec.seed, "trial", number),
            origin=proposal.origin,
        )
        self._next_number += 1
        self._trials[trial.id] = trial
        self._recorder.write(lambda store: store.add_trial(trial))
        return trial

    def _may_pass_rung(self, trial: Trial, measurement: Measurement) -> bool:
        if measurement.epoch not in self._scheduler.rungs:
            return True
        reason = self._scheduler.report(trial.number, measurement.epoch, measurement.values)
        if reason is None or _kept_to_the_end(trial):
            return True
        self._why_stopped[trial.id] = reason
        return False

    def _take_back(self, trial: Trial, recorded: Mapping[int, Measurement]) -> None:
        self._trials[trial.id] = trial
        self._crashes[trial.id] = trial.crashes
        self._next_number = max(self._next_number, trial.number + 1)
        for epoch, measurement in recorded.items():
            self._scheduler.recall(trial.number, epoch, measurement.values)
        self._sampler.tell(trial)
        if trial.ending is None:
            self._waiting.append(trial.id)
            if trial.epochs in recorded:
                self._latest[trial.id] = recorded[trial.epochs]
            return
        if trial.state is TrialState.COMPLETED:
            self._place(trial.id, trial.ending)

    def _stop_at_rungs(self) -> None:
        """Decide again about trials that wait at a rung: the decision may not have been recorded."""
        for trial_id in list(self._waiting):
            measurement = self._latest.get(trial_id)
            if measurement is not None and not self._may_pass_rung(self._trials[trial_id], measurement):
                self._waiting.remove(trial_id)
                self.stopped(trial_id)

    def _place(self, trial_id: str, ending: Ending) -> FrontUpdate:
        if feasible(ending.values, self._plan.spec.constraints):
            update = self._front.insert(trial_id, ending.values)
        else:
            update = self._front.leave_out()
        self._hypervolumes.append(update.hypervolume or 0.0)
        return update

    def _end_unfinished(self, run_id: str, state: TrialState, reason: str | None) -> None:
        if run_id in self._confirming:
            self._confirmed(
                run_id, Ending(state=state, reason=reason, device_seconds=self._ledger.running(run_id))
            )
            return
        trial, latest = self._trials[run_id], self._latest.get(run_id)
        self.ended(
            run_id,
            Ending(
                state=state,
                reason=reason,
                values={} if latest is None or state is not TrialState.STOPPED else dict(latest.values),
                epochs=trial.epochs,
                device_seconds=trial.device_seconds,
            ),
        )

    def _points(self) -> list[Trial]:
        """The front's best, which are confirmed."""
        return choose_points(
            list(self._trials.values()),
            self._front.points,
            self._plan.objectives,
            self._plan.spec.confirm.top,
        )

    def _next_reruns(self) -> "deque[Rerun]":
        """The confirming runs that are left to start: none while candidates may still come."""
        if not self._plan.spec.confirm.top or self._ledger.spent(confirming=True) is not None:
            return deque()
        if self._reruns is None:
            if self._searching or self._running or self._waiting:
                return deque()
            done = {(found.trial_id, found.role, found.seed) for found in self._confirmations}
            self._reruns = deque(
                rerun
                for rerun in plan_confirmation(self._plan, self._points())
                if (rerun.trial_id, rerun.role, rerun.seed) not in done
            )
            self._reserve()
        return self._reruns

    def _rerun_assignment(self, run_id: str, rerun: Rerun) -> Assignment:
        return Assignment(
            trial_id=run_id,
            candidate=rerun.candidate,
            seed=rerun.seed,
            epochs=self._plan.spec.budget.epochs,
            confirms=True,
        )

    def _confirmed(self, run_id: str, ending: Ending) -> None:
        rerun = self._confirming.pop(run_id)
        self._running.discard(run_id)
        self._ledger.charge_side(run_id, ending.device_seconds)
        confirmation = Confirmation(
            trial_id=rerun.trial_id,
            role=rerun.role,
            candidate=rerun.candidate,
            seed=rerun.seed,
            ending=replace(ending, files={}),
        )
        self._confirmations.append(confirmation)
        self._reserve()

        def record(store: TrialStore) -> None:
            store.add_confirmation(confirmation)
            self._artifacts.drop_checkpoint(run_id)

        self._recorder.write(record)
        self._estimate()

    def _reserve(self) -> None:
        """Keep for the confirming runs what they will take: as much as trials that trained to their end."""
        if self._reruns is None:  # at the most
            spec = self._plan.spec.confirm
            runs = max(0, 2 * spec.top * spec.seeds - len(self._confirmations))
        else:
            runs = len(self._reruns) + len(self._confirming)
        self._ledger.reserve(runs * self._ledger.a_trial)

    def _estimate(self) -> None:
        trained = sum(
            self._trials[name].epochs for name in (*self._running, *self._waiting) if name in self._trials
        )
        seconds = self._ledger.seconds_left(
            trained / self._plan.spec.budget.epochs, confirming=self._reruns is not None
        )
        self._recorder.write(partial(_set_estimate, seconds=seconds))


def _set_estimate(store: TrialStore, seconds: float | None) -> None:
    store.set_estimate(seconds)


def _kept_to_the_end(trial: Trial) -> bool:
    return trial.origin == "baseline" and trial.candidate.family in KEPT_TO_THE_END
