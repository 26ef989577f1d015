"""The ledger: what a job has used of its budget, and whether it may start or go on."""

import time
from collections.abc import Callable

from coterie.search.spec import BudgetSpec
from coterie.search.store import Ending, Resumed, TrialState


class Ledger:
    """Counts trials, failures, seconds and device-seconds of one job, over all its attempts.

    Args:
        budget: What the job may use.
        resumed: What earlier attempts used. Time in which no attempt ran is not in it.
        clock: Seconds that only rise.
    """

    def __init__(
        self, budget: BudgetSpec, resumed: Resumed, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._budget = budget
        self._clock = clock
        self._began = clock() - resumed.seconds
        self._references = resumed.reference_device_seconds
        self._running: dict[str, float] = {}
        self._ended_device_seconds = 0.0
        self.trials = 0
        self.failures = 0
        for trial in resumed.trials:
            if trial.ending is not None:
                self.end(trial.id, trial.ending)
            else:
                self.charge(trial.id, trial.device_seconds)

    @property
    def seconds(self) -> float:
        """Time that the job ran, over all attempts."""
        return self._clock() - self._began

    @property
    def device_seconds(self) -> float:
        """Charged so far: references, ended trials, and running ones up to their last report."""
        return self._references + self._ended_device_seconds + sum(self._running.values())

    def charge_reference(self, device_seconds: float) -> None:
        """Charge a reference that this job trained."""
        self._references += device_seconds

    def charge(self, trial_id: str, device_seconds: float) -> None:
        """Set what a running trial has cost so far."""
        self._running[trial_id] = device_seconds

    def end(self, trial_id: str, ending: Ending) -> None:
        """Charge a trial that ended."""
        self._running.pop(trial_id, None)
        self._ended_device_seconds += ending.device_seconds
        if ending.state in (TrialState.COMPLETED, TrialState.STOPPED):
            self.trials += 1
        elif ending.state is TrialState.FAILED:
            self.failures += 1

    def may_start(self, in_flight: int) -> bool:
        """Whether one more trial may start beside `in_flight` unfinished ones."""
        if self.spent() is not None:
            return False
        return self._budget.trials is None or self.trials + in_flight < self._budget.trials

    def spent(self) -> str | None:
        """Which limit leaves no time for running trials either, in words; None where they may go on."""
        if self.failed:
            return f"more than {self._budget.failures} trials failed"
        if self._budget.seconds is not None and self.seconds >= self._budget.seconds:
            return f"the budget of {self._budget.seconds:g} seconds is spent"
        if self._budget.device_seconds is not None and self.device_seconds >= self._budget.device_seconds:
            return f"the budget of {self._budget.device_seconds:g} device-seconds is spent"
        return None

    @property
    def failed(self) -> bool:
        """Whether more trials failed than the job bears."""
        return self.failures > self._budget.failures
