"""The ledger: what a job has used of its budget, whether it may start or go on, and how long it will take."""

import time
from collections.abc import Callable, Iterator

from coterie.search.spec import BudgetSpec
from coterie.search.store import Ending, Resumed, TrialState

SECONDS, DEVICE_SECONDS = "seconds", "device-seconds"
MOST_RESERVED = 0.5  # of a budget, for confirming: the search itself gets at least as much


class Ledger:
    """Counts trials, failures, seconds and device-seconds of one job, over all its attempts.

    Beside the trials stand the *side runs*: references, subset networks, affinities and confirming runs. They
    are charged in device-seconds and count as no trial.

    Args:
        budget: What the job may use.
        resumed: What earlier attempts used. Time in which no attempt ran is not in it.
        devices: Devices that are reserved while as much runs at a time as may.
        clock: Seconds that only rise.
    """

    def __init__(
        self,
        budget: BudgetSpec,
        resumed: Resumed,
        devices: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._budget = budget
        self._devices = devices
        self._clock = clock
        self._began = clock() - resumed.seconds
        self._side_device_seconds = resumed.side_device_seconds
        self._running: dict[str, float] = {}
        self._ended_device_seconds = 0.0
        self._completed_device_seconds = 0.0
        self._completed = 0
        self._reserved = 0.0  # device-seconds
        self.trials = 0
        self.failures = 0
        for trial in resumed.trials:
            if trial.ending is not None:
                self.end(trial.id, trial.ending)
            else:
                self.charge(trial.id, trial.device_seconds)
        self.begin_trials()

    def begin_trials(self) -> None:
        """Measure the pace from here on: what came before has another one."""
        self._pace_from = self.seconds, self.device_seconds

    @property
    def seconds(self) -> float:
        """Time that the job ran, over all attempts."""
        return self._clock() - self._began

    @property
    def device_seconds(self) -> float:
        """Charged so far: side runs, ended trials, and running ones up to their last report."""
        return self._side_device_seconds + self._ended_device_seconds + sum(self._running.values())

    @property
    def a_trial(self) -> float:
        """Device-seconds of a trial that trains to its end: the mean so far, 0 before the first."""
        return self._completed_device_seconds / self._completed if self._completed else 0.0

    def charge(self, run_id: str, device_seconds: float) -> None:
        """Set what something that runs has cost so far."""
        self._running[run_id] = device_seconds

    def running(self, run_id: str) -> float:
        """What something that runs has cost so far, in device-seconds."""
        return self._running.get(run_id, 0.0)

    def charge_side(self, run_id: str, device_seconds: float) -> None:
        """Charge a side run that ended."""
        self._running.pop(run_id, None)
        self._side_device_seconds += device_seconds

    def end(self, trial_id: str, ending: Ending) -> None:
        """Charge a trial that ended."""
        self._running.pop(trial_id, None)
        self._ended_device_seconds += ending.device_seconds
        if ending.state is TrialState.COMPLETED:
            self._completed += 1
            self._completed_device_seconds += ending.device_seconds
        if ending.state in (TrialState.COMPLETED, TrialState.STOPPED):
            self.trials += 1
        elif ending.state is TrialState.FAILED:
            self.failures += 1

    def reserve(self, device_seconds: float) -> None:
        """Keep device-seconds, and the time that they take, for what follows the trials."""
        self._reserved = device_seconds

    def may_start(self, in_flight: int) -> bool:
        """Whether one more trial may start beside `in_flight` unfinished ones."""
        if self.spent() is not None:
            return False
        return self._budget.trials is None or self.trials + in_flight < self._budget.trials

    def spent(self, *, confirming: bool = False) -> str | None:
        """Which limit leaves no time for what runs either, in words; None where it may go on.

        Args:
            confirming: Whether what is reserved may be used too.
        """
        if self.failed:
            return f"more than {self._budget.failures} trials failed"
        for name, used, total, open_to in self._times(confirming):
            if used >= total:
                return f"the budget of {total:g} {name} is spent"
            if used >= open_to:
                return f"the budget of {total:g} {name} is spent but for the confirming runs"
        return None

    def side_seconds(self, devices: float) -> float | None:
        """How long a side run on `devices` devices may take before a limit is reached; None without one."""
        left = [
            (open_to - used) / (devices if name == DEVICE_SECONDS else 1.0)
            for name, used, _, open_to in self._times(confirming=False)
        ]
        return max(0.0, min(left)) if left else None

    @property
    def overdue(self) -> float:
        """Seconds since the job's last second; negative before it, and where it has no such limit."""
        return -1.0 if self._budget.seconds is None else self.seconds - self._budget.seconds

    @property
    def failed(self) -> bool:
        """Whether more trials failed than the job bears."""
        return self.failures > self._budget.failures

    def seconds_left(self, in_flight: float, *, confirming: bool = False) -> float | None:
        """How long the job will take from now on, at its pace so far; None before a trial has ended.

        What is left of the trials costs what those that ended cost, and it goes on as fast as it went since
        `begin_trials`.

        Args:
            in_flight: Trials that run or wait, each counted by the share that it has trained already.
            confirming: Whether no more trials come: only what is reserved is left.
        """
        if not self.trials:
            return None
        seconds_before, charged_before = self._pace_from
        seconds, charged = self.seconds - seconds_before, self.device_seconds - charged_before
        pace = charged / seconds if charged > 0 and seconds > 0 else self._devices
        left: list[float] = []
        if confirming:
            left.append(self._reserved / pace)
        elif self._budget.trials is not None:
            a_trial = self._ended_device_seconds / (self.trials + self.failures)
            trials = max(0.0, self._budget.trials - self.trials - in_flight)
            left.append((trials * a_trial + self._reserved) / pace)
        if self._budget.device_seconds is not None:
            left.append(max(0.0, self._budget.device_seconds - self.device_seconds) / pace)
        if self._budget.seconds is not None:
            left.append(max(0.0, self._budget.seconds - self.seconds))
        return min(left) if left else None

    def _times(self, confirming: bool) -> Iterator[tuple[str, float, float, float]]:
        """Each limit of time: its name, what is used, all there is, and what may be used now."""
        for name, used, total, reserved in (
            (SECONDS, self.seconds, self._budget.seconds, self._reserved / self._devices),
            (DEVICE_SECONDS, self.device_seconds, self._budget.device_seconds, self._reserved),
        ):
            if total is not None:
                kept = 0.0 if confirming else min(reserved, MOST_RESERVED * total)
                yield name, used, total, total - kept
