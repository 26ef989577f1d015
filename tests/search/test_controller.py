"""A job's search from the first trial to its verdict, trained by an executor that trains nothing.

Store, recorder, ledger, sampler and front are the real ones.
"""

import contextlib
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.models.tasks import KIND_METRICS, TaskKind
from coterie.search import controller
from coterie.search.baselines import side_setting
from coterie.search.budget import Ledger
from coterie.search.controller import MOST_CRASHES, REASON_LENGTH, Order, SearchController
from coterie.search.data.digits import Digits
from coterie.search.front import Front, feasible
from coterie.search.objective import Yardstick
from coterie.search.plan import Plan, make_plan
from coterie.search.recorder import Recorder
from coterie.search.sampler import derive_seed, make_sampler
from coterie.search.scheduler import make_scheduler
from coterie.search.spec import JobSpec
from coterie.search.store import (
    AffinityResult,
    Candidate,
    Ending,
    Fenced,
    FolderArtifacts,
    InMemoryStore,
    JobState,
    Measurement,
    Role,
    StoreUnavailable,
    SubsetResult,
    TrialState,
)
from coterie.search.trial import Assignment
from coterie.search.work import AffinityRun, SubsetRun

REFERENCE_POINT = {"delta_m": -300.0, "macs": 1e5}
EPOCHS = 3
SECONDS_AN_EPOCH = 2.0


def _each(value: float) -> dict[str, dict[str, float]]:
    return {name: dict.fromkeys(KIND_METRICS[TaskKind.BINARY], value) for name in Digits.tasks().names}


YARDSTICK = Yardstick(
    validation=_each(0.2),
    test=_each(0.25),
    costs={"latency_ms": 0.1, "train_device_seconds": 1.0, "macs": 1000.0, "params": 1000.0},
)

MakeJob = Callable[..., JobSpec]


class Clock:
    """Seconds that pass by `SECONDS_AN_EPOCH` an epoch."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Driver:
    """One attempt at a job: a controller and everything around it, as `run_search` puts it together.

    Args:
        plan: What to search.
        store: Of this attempt.
        folder: Of the job's artifacts; a file a trial is its checkpoint and says how many epochs it has.
        concurrent: Trials at a time.
        prompt: Wait until the store has what was reported, so that a death comes at a known point.
    """

    def __init__(
        self, plan: Plan, store: InMemoryStore, folder: Path, concurrent: int = 1, prompt: bool = False
    ) -> None:
        self.plan = plan
        self.store = store
        self.artifacts = FolderArtifacts(folder)
        self.clock = Clock()
        self.prompt = prompt
        self.recorder = Recorder(store)
        self.running: dict[str, Order] = {}
        resumed = store.resume()
        scheduler = make_scheduler(plan.spec.search.scheduler, plan.objectives, plan.spec.budget.epochs)
        sampler = make_sampler(plan, YARDSTICK)
        setting = side_setting(plan)
        sampler.learn(store.find_subsets(setting))
        for result in store.find_affinities(setting):
            sampler.learn_affinity(result)
        self.controller = SearchController(
            plan,
            resumed,
            store.measurements_at(scheduler.rungs),
            self.recorder,
            self.artifacts,
            Ledger(plan.spec.budget, resumed, concurrent, self.clock),
            sampler,
            scheduler,
            REFERENCE_POINT,
            concurrent,
        )

    def start(self) -> Order | None:
        order = self.controller.suggest()
        if order is not None:
            assert order.id not in self.running
            self.running[order.id] = order
            self.controller.started(order.id)
            self.wait()
            epochs = self.epochs_of(order.id)
            if epochs:  # what the last report before a kill may not have told
                self.report(order, epochs)
        return order

    def step(self, run_id: str) -> None:
        """Train one epoch and report it, and the ending after the last one; a side run is trained whole."""
        if run_id not in self.running:
            return
        order = self.running[run_id]
        self.clock.now += SECONDS_AN_EPOCH
        if not isinstance(order.work, Assignment):
            del self.running[run_id]
            self.controller.learned(run_id, outcome(order.work, self.plan), SECONDS_AN_EPOCH)
            self.wait()
            return
        epochs = self.epochs_of(run_id) + 1
        folder = self.artifacts.checkpoint_folder(run_id)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "epochs").write_text(str(epochs))
        self.report(order, epochs)

    def report(self, order: Order, epochs: int) -> None:
        work = assignment_of(order)
        go_on = self.controller.measured(order.id, measurement(work, epochs))
        self.wait()
        if epochs == work.epochs:
            del self.running[order.id]
            self.controller.ended(order.id, ending(work))
        elif not go_on:
            del self.running[order.id]
            self.controller.stopped(order.id)

    def over(self) -> bool:
        return self.controller.over

    def wait(self) -> None:
        if self.prompt:
            self.recorder.flush()

    def crash(self, trial_id: str) -> None:
        del self.running[trial_id]
        self.controller.crashed(trial_id, "the process died")

    def fail(self, trial_id: str) -> None:
        del self.running[trial_id]
        epochs = self.epochs_of(trial_id)
        self.controller.ended(
            trial_id,
            Ending(
                state=TrialState.FAILED,
                reason="ValueError: impossible",
                epochs=epochs,
                device_seconds=SECONDS_AN_EPOCH * epochs,
            ),
        )

    def epochs_of(self, trial_id: str) -> int:
        return checkpointed(self.artifacts.root, trial_id)

    def run(self) -> tuple[JobState, str | None]:
        """To the end, one trial after the other where one may run."""
        with self.recorder:
            while not self.controller.over:
                self.start()
                for trial_id in list(self.running):
                    self.step(trial_id)
            verdict = self.controller.verdict()
            self.recorder.write(lambda store: store.finish(*verdict))
            self.recorder.flush()
        return verdict


def checkpointed(folder: Path, trial_id: str) -> int:
    file = FolderArtifacts(folder).checkpoint_folder(trial_id) / "epochs"
    return int(file.read_text()) if file.exists() else 0


class DriverDied(Exception):
    """After this nothing more is written."""


class Dying(InMemoryStore):
    """The store of a driver that dies after so many writes."""

    def __init__(self, shared: Any, writes: int) -> None:
        super().__init__(shared)
        self._left = writes

    def beat(self) -> None:
        pass  # they come when they come, and are not counted

    def _writing(self) -> Any:
        if self._left == 0:
            raise DriverDied
        self._left -= 1
        return super()._writing()


def assignment_of(order: Order) -> Assignment:
    assert isinstance(order.work, Assignment)
    return order.work


def reached(work: Assignment, epochs: int) -> dict[str, float | None]:
    """Values that follow from candidate, seed and epochs."""
    parameters = work.candidate.parameters
    return {
        "delta_m": -10 * (math.log10(parameters["lr"]) + 2.5) ** 2 + work.seed % 7 - 5.0 / epochs,
        "macs": float(parameters["width"] * parameters["depth"] * 100),
        "params": float(parameters["width"] * 100),
    }


def measurement(work: Assignment, epoch: int) -> Measurement:
    return Measurement(
        epoch=epoch,
        values=reached(work, epoch),
        tasks={},
        device_seconds=SECONDS_AN_EPOCH * epoch,
        worker="here:1",
    )


def ending(work: Assignment) -> Ending:
    return Ending(
        state=TrialState.COMPLETED,
        values=reached(work, work.epochs),
        epochs=work.epochs,
        device_seconds=SECONDS_AN_EPOCH * work.epochs,
    )


def outcome(run: SubsetRun | AffinityRun, plan: Plan) -> list[SubsetResult] | AffinityResult:
    """Tasks help each other where they ask about the same digit, and each seed is off by a little."""
    tasks = plan.tasks
    weights = tuple(task.weight for task in tasks)

    def alike(one: int, other: int) -> bool:
        return tasks.names[one].split("_")[0] == tasks.names[other].split("_")[0]

    if isinstance(run, AffinityRun):
        matrix = [[0.1 * alike(i, j) for j in range(len(tasks))] for i in range(len(tasks))]
        return AffinityResult(
            method="one_step", tasks=tasks.names, weights=weights, seed=run.seed, matrix=matrix
        )
    results = []
    for seed in run.seeds:
        for subset in run.subsets:
            noise = Random(f"{seed} {subset}")
            found = {
                tasks.names[t]: dict.fromkeys(
                    KIND_METRICS[TaskKind.BINARY],
                    0.2
                    - sum(0.02 if alike(t, other) else -0.02 for other in subset if other != t)
                    + noise.gauss(0, 0.01),
                )
                for t in subset
            }
            results.append(
                SubsetResult(
                    tasks=tuple(tasks.names[t] for t in subset),
                    weights=tuple(weights[t] for t in subset),
                    seed=seed,
                    validation=found,
                    test=found,
                    run=run.run,
                )
            )
    return results


@pytest.fixture(scope="module")
def make(make_job: MakeJob) -> Callable[..., Plan]:
    def make(sampler: str = "tpe", families: list[str] | None = None, **fields: Any) -> Plan:
        search = {"sampler": {"name": sampler}} | ({} if families is None else {"families": families})
        search |= fields.pop("search", {})
        budget = {"trials": 8, "epochs": EPOCHS} | fields.pop("budget", {})
        return make_plan(make_job(search=search, budget=budget, **fields))

    return make


MakePlan = Callable[..., Plan]


def assert_the_books_are_right(store: InMemoryStore, plan: Plan) -> None:
    """What must hold of every job, however it went."""
    trials = store.trials
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert len({trial.id for trial in trials}) == len(trials)
    front = Front(plan.objectives, REFERENCE_POINT)
    for trial in trials:
        assert trial.seed == derive_seed(plan.spec.seed, "trial", trial.number)
        measured = [epoch for trial_id, epoch in store.measurements if trial_id == trial.id]
        assert sorted(measured) == list(range(1, trial.epochs + 1))  # no gap, none twice
        if trial.state is TrialState.COMPLETED:
            assert trial.ending is not None
            assert trial.epochs == plan.spec.budget.epochs
            if feasible(trial.ending.values, plan.spec.constraints):
                front.insert(trial.id, trial.ending.values)
    assert store.front == set(front.points)
    completed = {trial.id for trial in trials if trial.state is TrialState.COMPLETED}
    assert sorted(trial_id for trial_id, _ in store.history) == sorted(completed)
    volumes = [volume for _, volume in store.history if volume is not None]
    assert len(volumes) == len(completed)
    assert volumes == sorted(volumes)
    if volumes:
        assert volumes[-1] == pytest.approx(front.hypervolume)


def what_happened(store: InMemoryStore) -> list[tuple[int, Candidate, int, TrialState, Ending | None]]:
    return [(trial.number, trial.candidate, trial.seed, trial.state, trial.ending) for trial in store.trials]


# To the end


@pytest.mark.parametrize("sampler", ["coterie", "tpe", "nsga2", "random"])
def test_a_job_runs_until_its_trials_are_spent(sampler: str, make: MakePlan, tmp_path: Path) -> None:
    plan, store = make(sampler), InMemoryStore()
    assert Driver(plan, store, tmp_path).run() == (JobState.SUCCEEDED, None)
    assert store.state == (JobState.SUCCEEDED, None)
    assert [trial.state for trial in store.trials] == [TrialState.COMPLETED] * 8
    assert_the_books_are_right(store, plan)


def test_the_same_job_twice_tries_the_same_candidates_with_the_same_seeds(
    make: MakePlan, tmp_path: Path
) -> None:
    stores = [InMemoryStore(), InMemoryStore()]
    for number, store in enumerate(stores):
        Driver(make(), store, tmp_path / str(number)).run()
    assert what_happened(stores[0]) == what_happened(stores[1])
    ids = [{trial.id for trial in store.trials} for store in stores]
    assert not ids[0] & ids[1]


def test_another_seed_tries_others(make: MakePlan, tmp_path: Path) -> None:
    stores = [InMemoryStore(), InMemoryStore()]
    for seed, store in enumerate(stores):
        Driver(make(seed=seed), store, tmp_path / str(seed)).run()
    one, other = ([trial.candidate for trial in store.trials][3:] for store in stores)
    assert one != other


def test_the_first_trials_are_the_families_defaults(make: MakePlan, tmp_path: Path) -> None:
    store = InMemoryStore()
    Driver(make(families=["shared", "grouped", "single"]), store, tmp_path).run()
    first = [trial.candidate for trial in store.trials[:2]]
    assert [candidate.family for candidate in first] == ["shared", "single"]
    assert all(
        candidate.parameters["width"] == 24 and candidate.parameters["lr"] == 5e-3 for candidate in first
    )


def test_checkpoints_are_gone_when_their_trials_have_ended(make: MakePlan, tmp_path: Path) -> None:
    store = InMemoryStore()
    Driver(make(), store, tmp_path).run()
    assert not any((tmp_path / "checkpoints").iterdir())


def test_no_more_trials_run_at_a_time_than_allowed_nor_start_than_budgeted(
    make: MakePlan, tmp_path: Path
) -> None:
    plan, store = make(budget={"trials": 4}), InMemoryStore()
    driver = Driver(plan, store, tmp_path, concurrent=3)
    with driver.recorder:
        started = [driver.start() for _ in range(3)]
        assert None not in started
        assert driver.start() is None
        assert not driver.over()
        while len(driver.running) == 3:
            driver.step(next(iter(driver.running)))
        assert driver.start() is not None
        while driver.running:
            driver.step(next(iter(driver.running)))
            assert driver.start() is None  # the fifth
        assert driver.over()
    assert len(store.trials) == 4


class Away(InMemoryStore):
    """A store that can't be written to until it is back."""

    def __init__(self) -> None:
        super().__init__()
        self.back = threading.Event()

    def _writing(self) -> Any:
        if not self.back.is_set():
            raise StoreUnavailable("the database is down")
        return super()._writing()


def test_while_the_store_is_far_behind_what_runs_goes_on_but_no_more_starts(
    make: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller, "MOST_BEHIND", 3)
    plan, store = make(budget={"trials": 2}), Away()
    driver = Driver(plan, store, tmp_path, concurrent=2)
    with driver.recorder:
        first = driver.start()
        assert first is not None
        for _ in range(EPOCHS):
            assert not driver.controller.idle
            driver.step(first.id)
        assert driver.recorder.behind > 3
        assert driver.start() is None
        assert driver.controller.idle
        assert not driver.over()
        store.back.set()
        driver.recorder.flush()
        second = driver.start()
        assert second is not None
        for _ in range(EPOCHS):
            driver.step(second.id)
        assert driver.over()
    assert [trial.state for trial in store.trials] == [TrialState.COMPLETED] * 2
    assert len(store.measurements) == 2 * EPOCHS


# Drivers that die


def test_a_job_whose_driver_dies_at_any_point_ends_as_if_it_had_not(make: MakePlan, tmp_path: Path) -> None:
    plan, expected = make(budget={"trials": 4}), InMemoryStore()
    Driver(plan, expected, tmp_path / "whole").run()
    writes = 0
    while True:
        first = InMemoryStore()
        dying = Dying(first._memory, writes)
        folder = tmp_path / str(writes)
        try:
            Driver(plan, dying, folder, prompt=True).run()
        except DriverDied:
            pass
        else:
            break
        second = first.attempt()
        for trial in second.trials:
            if trial.ending is None:
                assert checkpointed(folder, trial.id) >= trial.epochs
        ended_before = {trial.id: trial for trial in second.trials if trial.ending is not None}
        assert Driver(plan, second, folder).run() == (JobState.SUCCEEDED, None)
        assert what_happened(second) == what_happened(expected), writes
        assert [volume for _, volume in second.history] == [volume for _, volume in expected.history]
        after = {trial.id: trial for trial in second.trials}
        assert all(after[name] == trial for name, trial in ended_before.items())  # not run again
        assert_the_books_are_right(second, plan)
        writes += 1
    # Each trial is added, started, measured, ended, and what is left is estimated; and the end.
    assert writes == 4 * (2 + EPOCHS + 2) + 1


@pytest.mark.parametrize("writes", [0, 1, 5, 9, 20])
def test_reports_that_were_not_written_yet_are_lost_with_their_driver_but_no_trial_is(
    writes: int, make: MakePlan, tmp_path: Path
) -> None:
    plan, expected = make(budget={"trials": 4}), InMemoryStore()
    Driver(plan, expected, tmp_path / "whole").run()
    store = InMemoryStore()
    with pytest.raises(DriverDied):
        Driver(plan, Dying(store._memory, writes), tmp_path / "broken").run()
    second = store.attempt()
    assert Driver(plan, second, tmp_path / "broken").run() == (JobState.SUCCEEDED, None)
    assert what_happened(second) == what_happened(expected)


@pytest.mark.parametrize(("writes", "trials", "sampler"), [(3, 7, "tpe"), (80, 20, "tpe"), (25, 20, "nsga2")])
def test_a_job_whose_drivers_die_again_and_again_still_ends_the_same(
    writes: int, trials: int, sampler: str, make: MakePlan, tmp_path: Path
) -> None:
    plan, expected = make(sampler, budget={"trials": trials}), InMemoryStore()
    Driver(plan, expected, tmp_path / "whole").run()
    store, verdict, attempts = InMemoryStore(), None, 0
    while verdict is None:
        attempts += 1
        try:
            verdict = Driver(plan, Dying(store._memory, writes), tmp_path / "broken", prompt=True).run()
        except DriverDied:
            continue
    assert attempts > 1
    assert what_happened(store) == what_happened(expected)
    assert_the_books_are_right(store, plan)


def test_a_driver_that_was_replaced_starts_nothing_more(make: MakePlan, tmp_path: Path) -> None:
    old = InMemoryStore()
    driver = Driver(make(), old, tmp_path)
    with contextlib.suppress(Fenced), driver.recorder:
        order = driver.start()
        assert order is not None
        driver.recorder.flush()
        old.attempt()
        driver.step(order.id)
        driver.recorder._thread.join(10)
        with pytest.raises(Fenced):
            driver.start()
    assert len(old.trials) == 1
    assert old.measurements == {}


# Trials that end in other ways


def test_a_trial_whose_process_died_goes_on_under_its_number_before_new_ones(
    make: MakePlan, tmp_path: Path
) -> None:
    plan, store = make(), InMemoryStore()
    driver = Driver(plan, store, tmp_path)
    with driver.recorder:
        first = driver.start()
        assert first is not None
        driver.step(first.id)
        driver.crash(first.id)
        driver.recorder.flush()
        assert (store.trials[0].state, store.trials[0].crashes) == (TrialState.PENDING, 1)
        assert driver.start() == Order(first.id, replace(assignment_of(first), recorded=1))
        for _ in range(2):
            driver.step(first.id)
    assert len(store.trials) == 1
    assert (store.trials[0].state, store.trials[0].crashes) == (TrialState.COMPLETED, 1)
    assert_the_books_are_right(store, plan)


def test_a_candidate_that_kills_its_process_each_time_fails_and_the_job_goes_on(
    make: MakePlan, tmp_path: Path
) -> None:
    plan, store = make(budget={"trials": 2}), InMemoryStore()
    driver = Driver(plan, store, tmp_path)
    with driver.recorder:
        for _ in range(MOST_CRASHES + 1):
            order = driver.start()
            assert order is not None
            driver.crash(order.id)
        driver.recorder.flush()
        failed = store.trials[0]
        assert len(store.trials) == 1
        assert failed.state is TrialState.FAILED
        assert failed.ending is not None
        assert failed.ending.reason == f"its process died {MOST_CRASHES + 1} times: the process died"
        following = driver.start()
        assert following is not None
        assert following.id != failed.id


def test_crashes_are_counted_over_all_attempts(make: MakePlan, tmp_path: Path) -> None:
    plan, store = make(), InMemoryStore()
    for _ in range(MOST_CRASHES + 1):
        driver = Driver(plan, store.attempt(), tmp_path)
        with driver.recorder:
            order = driver.start()
            assert order is not None
            driver.crash(order.id)
    assert [trial.state for trial in store.trials] == [TrialState.FAILED]


def test_failures_within_the_budget_are_made_up_for(make: MakePlan, tmp_path: Path) -> None:
    plan, store = make(budget={"trials": 3, "failures": 2}), InMemoryStore()
    driver = Driver(plan, store, tmp_path)
    with driver.recorder:
        for _ in range(2):
            order = driver.start()
            assert order is not None
            driver.fail(order.id)
    assert Driver(plan, store.attempt(), tmp_path).run() == (JobState.SUCCEEDED, None)
    states = [trial.state for trial in store.trials]
    assert states == [TrialState.FAILED] * 2 + [TrialState.COMPLETED] * 3
    assert store.trials[0].ending is not None
    assert store.trials[0].ending.reason == "ValueError: impossible"


def test_more_failures_than_the_budget_bears_fail_the_job(make: MakePlan, tmp_path: Path) -> None:
    plan, store = make(budget={"trials": 9, "failures": 2}), InMemoryStore()
    driver = Driver(plan, store, tmp_path, concurrent=2)
    with driver.recorder:
        completing = driver.start()
        assert completing is not None
        for _ in range(3):
            order = driver.start()
            assert order is not None
            driver.fail(order.id)
        assert driver.start() is None
        assert not driver.over()
        driver.step(completing.id)  # still running: it is stopped at its next report
        assert driver.over()
        assert driver.controller.verdict() == (JobState.FAILED, "more than 2 trials failed")
    assert sorted(trial.state for trial in store.trials) == ["failed", "failed", "failed", "stopped"]


def test_a_long_story_of_crashes_is_cut(make: MakePlan, tmp_path: Path) -> None:
    store = InMemoryStore()
    driver = Driver(make(), store, tmp_path)
    with driver.recorder:
        for _ in range(MOST_CRASHES + 1):
            order = driver.controller.suggest()
            assert order is not None
            driver.controller.crashed(order.id, "x" * 10_000)
    found = store.trials[0].ending
    assert found is not None
    assert found.reason is not None
    assert found.reason.startswith("its process died 6 times: xxx")
    assert len(found.reason) == REASON_LENGTH


def test_the_seconds_of_the_budget_stop_what_runs_and_what_waits(make: MakePlan, tmp_path: Path) -> None:
    plan, store = make(budget={"trials": None, "seconds": 20}), InMemoryStore()
    driver = Driver(plan, store, tmp_path, concurrent=2)
    with driver.recorder:
        crashed, running = driver.start(), driver.start()
        assert crashed is not None
        assert running is not None
        driver.step(running.id)
        driver.crash(crashed.id)
        driver.clock.now = 100
        driver.step(running.id)
        assert driver.start() is None
        assert driver.over()
        reason = "the budget of 20 seconds is spent"
        assert driver.controller.verdict() == (JobState.FAILED, reason)  # nothing completed
    assert [(trial.state, trial.epochs) for trial in store.trials] == [
        (TrialState.STOPPED, 0),
        (TrialState.STOPPED, 2),
    ]
    assert {trial.ending.reason for trial in store.trials if trial.ending is not None} == {reason}
    assert store.front == set()
    assert store.history == []


def test_a_trial_that_finishes_as_the_time_is_up_counts(make: MakePlan, tmp_path: Path) -> None:
    plan, store = make(budget={"trials": None, "seconds": 4 * SECONDS_AN_EPOCH * EPOCHS - 1}), InMemoryStore()
    assert Driver(plan, store, tmp_path).run() == (JobState.SUCCEEDED, None)
    assert [trial.state for trial in store.trials] == [TrialState.COMPLETED] * 4


def test_device_seconds_are_a_limit_too(make: MakePlan, tmp_path: Path) -> None:
    limit = 2 * SECONDS_AN_EPOCH * EPOCHS + SECONDS_AN_EPOCH
    plan, store = make(budget={"trials": None, "device_seconds": limit}), InMemoryStore()
    assert Driver(plan, store, tmp_path).run() == (JobState.SUCCEEDED, None)
    states = [trial.state for trial in store.trials]
    assert states == [TrialState.COMPLETED, TrialState.COMPLETED, TrialState.STOPPED]
    assert_the_books_are_right(store, plan)


def test_an_infeasible_candidate_completes_and_is_never_on_the_front(make: MakePlan, tmp_path: Path) -> None:
    plan = make(constraints=[{"metric": "params", "max": 2000}], budget={"trials": 20})
    store = InMemoryStore()
    assert Driver(plan, store, tmp_path).run() == (JobState.SUCCEEDED, None)
    sizes = {trial.id: trial.ending.values["params"] for trial in store.trials if trial.ending is not None}
    assert any(size is not None and size > 2000 for size in sizes.values())
    assert store.front
    assert all((sizes[trial_id] or 0) <= 2000 for trial_id in store.front)
    assert len(store.history) == 20
    assert_the_books_are_right(store, plan)


def test_only_completed_trials_are_on_the_front(make: MakePlan, tmp_path: Path) -> None:
    plan, store = make(), InMemoryStore()
    driver = Driver(plan, store, tmp_path, concurrent=3)
    with driver.recorder:
        for _ in range(3):
            driver.start()
        completed, failed, crashed = driver.running
        for _ in range(EPOCHS):
            driver.step(completed)
        driver.fail(failed)
        driver.crash(crashed)
    assert store.front == {completed}


# What is learned between the trials


LEARNING: dict[str, Any] = {
    "sampler": "coterie",
    "families": ["single", "shared", "grouped", "interrogate"],
    "tasks": ["left_parity", "left_loop", "right_parity", "right_loop"],
    "budget": {"trials": 12},
}


def test_side_runs_are_recorded_and_charged_and_are_no_trials(make: MakePlan, tmp_path: Path) -> None:
    plan, store = make(**LEARNING), InMemoryStore()
    driver = Driver(plan, store, tmp_path)
    assert driver.run() == (JobState.SUCCEEDED, None)
    assert len(store.trials) == 12
    runs = {result.run for _, result in store.subsets}
    assert runs == set(range(len(runs))) != set()
    side = store.resume().side_device_seconds
    assert side == SECONDS_AN_EPOCH * (len(runs) + len(store.affinities))
    charged = sum(trial.device_seconds for trial in store.trials)
    assert driver.controller._ledger.device_seconds == pytest.approx(side + charged)
    assert {trial.origin for trial in store.trials} >= {"baseline", "grouping"}


@pytest.mark.parametrize("writes", [17, 40])
def test_a_learning_job_whose_drivers_die_again_and_again_ends_the_same(
    writes: int, make: MakePlan, tmp_path: Path
) -> None:
    """Rungs, side runs and confirming runs included."""
    plan = make(
        **LEARNING,
        search={"scheduler": {"name": "pareto_asha", "eta": 2}},
        confirm={"top": 2, "seeds": 2},
    )
    expected = InMemoryStore()
    Driver(plan, expected, tmp_path / "whole").run()
    assert {trial.state for trial in expected.trials} == {TrialState.COMPLETED, TrialState.STOPPED}
    assert len(expected.confirmations) >= 4
    store, verdict, attempts = InMemoryStore(), None, 0
    while verdict is None:
        attempts += 1
        try:
            verdict = Driver(plan, Dying(store._memory, writes), tmp_path / "broken", prompt=True).run()
        except DriverDied:
            continue
    assert attempts > 2
    assert what_happened(store) == what_happened(expected)
    assert store.subsets == expected.subsets
    assert store.affinities == expected.affinities
    assert what_was_confirmed(store) == what_was_confirmed(expected)
    assert store.verdict is not None
    assert expected.verdict is not None
    assert (store.verdict.kind, store.verdict.words) == (expected.verdict.kind, expected.verdict.words)
    side = store.resume().side_device_seconds
    assert side == pytest.approx(expected.resume().side_device_seconds)


def what_was_confirmed(store: InMemoryStore) -> list[tuple[int, str, int, Ending]]:
    numbers = {trial.id: trial.number for trial in store.trials}
    return [(numbers[run.trial_id], run.role, run.seed, run.ending) for run in store.confirmations]


def test_a_side_run_that_gives_nothing_is_charged_and_the_search_goes_on_without(
    make: MakePlan, tmp_path: Path
) -> None:
    store = InMemoryStore()
    driver = Driver(make(**LEARNING), store, tmp_path)
    began = 0
    with driver.recorder:
        while not driver.over():
            order = driver.start()
            if order is not None and not isinstance(order.work, Assignment):
                began += 1
                del driver.running[order.id]
                driver.controller.learned(order.id, None, 7.0)
            for run_id in list(driver.running):
                driver.step(run_id)
    assert began == 1
    assert len(store.trials) == 12
    assert store.subsets == []
    assert store.resume().side_device_seconds == 7.0


def test_a_side_run_whose_process_dies_is_done_again(make: MakePlan, tmp_path: Path) -> None:
    plan, expected, store = make(**LEARNING), InMemoryStore(), InMemoryStore()
    Driver(plan, expected, tmp_path / "whole").run()
    driver = Driver(plan, store, tmp_path / "broken")
    died = False
    with driver.recorder:
        while not driver.over():
            order = driver.start()
            if order is not None and not died and not isinstance(order.work, Assignment):
                driver.clock.now += 5.0
                driver.crash(order.id)  # what it took is charged
                died = True
            for run_id in list(driver.running):
                driver.step(run_id)
        driver.recorder.flush()
        assert driver.controller._ledger.device_seconds == pytest.approx(
            store.resume().side_device_seconds + sum(trial.device_seconds for trial in store.trials)
        )
    assert died
    assert what_happened(store) == what_happened(expected)
    assert store.subsets == expected.subsets
    assert store.resume().side_device_seconds == expected.resume().side_device_seconds + 5.0


def test_a_side_run_has_the_time_that_is_left(make: MakePlan, tmp_path: Path) -> None:
    fields = LEARNING | {"budget": {"trials": None, "device_seconds": 100}}
    driver = Driver(make(**fields), InMemoryStore(), tmp_path)
    with driver.recorder:
        while not driver.over():
            order = driver.start()
            if order is not None and not isinstance(order.work, Assignment):
                used = driver.controller._ledger.device_seconds
                assert order.seconds == pytest.approx(100 - used)
                return
            for run_id in list(driver.running):
                driver.step(run_id)
    raise AssertionError("no side run began")


# Rungs


def test_a_stopped_trial_shows_what_it_reached_and_is_never_on_the_front(
    make: MakePlan, tmp_path: Path
) -> None:
    plan, store = make("random", search={"scheduler": {"name": "pareto_asha"}}), InMemoryStore()
    assert Driver(plan, store, tmp_path).run() == (JobState.SUCCEEDED, None)
    stopped = [trial for trial in store.trials if trial.state is TrialState.STOPPED]
    assert stopped
    for trial in stopped:
        assert trial.ending is not None
        assert trial.epochs == 1
        assert trial.ending.values == store.measurements[trial.id, 1].values
        assert (trial.ending.reason or "").startswith("stopped at epoch 1: not among the best third of ")
        assert trial.id not in store.front
    assert len(store.trials) == 8  # they count as trials
    assert_the_books_are_right(store, plan)


def test_baselines_train_to_their_end_whatever_they_reach(make: MakePlan, tmp_path: Path) -> None:
    scheduler = {"name": "asha", "metric": "macs", "eta": 10}
    plan = make(families=["interrogate", "single", "shared"], search={"scheduler": scheduler})
    store = InMemoryStore()
    Driver(plan, store, tmp_path).run()
    baselines = [trial for trial in store.trials if trial.origin == "baseline"]
    by_family = {trial.candidate.family: trial.state for trial in baselines}
    assert by_family["single"] is by_family["shared"] is TrialState.COMPLETED


# When it ends before its limits


def test_a_space_that_is_used_up_ends_the_job(make: MakePlan, tmp_path: Path) -> None:
    fixed = {"depth": 2, "lr": 0.005, "weight_decay": 1e-6, "batch_size": 64, "balancing": "fixed"}
    space = {"shared": {**fixed, "width": [16, 24, 48]}}
    store = InMemoryStore()
    plan = make("random", families=["shared"], search={"space": space})
    assert Driver(plan, store, tmp_path).run() == (
        JobState.SUCCEEDED,
        "every candidate of the space was tried",
    )
    assert sorted(trial.candidate.parameters["width"] for trial in store.trials) == [16, 24, 48]


def test_a_front_that_has_stopped_moving_ends_the_job(make: MakePlan, tmp_path: Path) -> None:
    rule = {"hypervolume_gain_below": 0.5, "over_trials": 3}
    store = InMemoryStore()
    verdict = Driver(make("random", budget={"trials": 50, "stop_when": rule}), store, tmp_path).run()
    assert verdict == (
        JobState.SUCCEEDED,
        "the last 3 completed trials added less than 50 % of the hypervolume",
    )
    volumes = [volume or 0.0 for _, volume in store.history]
    assert 3 < len(volumes) < 50
    assert volumes[-1] - volumes[-4] < 0.5 * volumes[-1]
    assert all(volumes[i] - volumes[i - 3] >= 0.5 * volumes[i] for i in range(3, len(volumes) - 1))


# Confirming


CONFIRMING: dict[str, Any] = {"confirm": {"top": 2, "seeds": 3}, "families": ["single", "shared", "grouped"]}


def test_the_best_points_are_confirmed_beside_shared_networks(make: MakePlan, tmp_path: Path) -> None:
    plan, store = make("random", **CONFIRMING), InMemoryStore()
    assert Driver(plan, store, tmp_path).run() == (JobState.SUCCEEDED, None)
    points = {run.trial_id for run in store.confirmations if run.role is Role.POINT}
    assert 0 < len(points) <= 2
    assert points <= store.front
    seeds = {run.seed for run in store.confirmations}
    assert len(seeds) == 3
    assert not seeds & {trial.seed for trial in store.trials}
    assert store.verdict is not None
    assert store.resume().side_device_seconds == SECONDS_AN_EPOCH * EPOCHS * len(store.confirmations)
    assert not any((tmp_path / "checkpoints").iterdir())


def test_device_seconds_are_kept_for_confirming(make: MakePlan, tmp_path: Path) -> None:
    a_trial = SECONDS_AN_EPOCH * EPOCHS
    budget = {"trials": None, "device_seconds": 40 * a_trial}
    plan, store = make("random", budget=budget, **CONFIRMING), InMemoryStore()
    driver = Driver(plan, store, tmp_path)
    assert driver.run() == (JobState.SUCCEEDED, None)
    assert len(store.trials) == 28  # what 12 runs take is kept
    assert {run.ending.state for run in store.confirmations} == {TrialState.COMPLETED}
    assert driver.controller._ledger.device_seconds <= 40 * a_trial


def test_what_runs_when_the_runner_is_ended_is_stopped(make: MakePlan, tmp_path: Path) -> None:
    store = InMemoryStore()
    driver = Driver(make(budget={"trials": None, "seconds": 20}), store, tmp_path, concurrent=2)
    with driver.recorder:
        driver.start()
        driver.start()
        driver.clock.now = 60
        assert driver.controller.overdue == 40
        driver.controller.end_what_runs()
    assert [trial.state for trial in store.trials] == [TrialState.STOPPED] * 2
    assert {trial.ending.reason for trial in store.trials if trial.ending} == {
        "the budget of 20 seconds is spent"
    }


def test_the_time_left_is_estimated_at_every_end(make: MakePlan, tmp_path: Path) -> None:
    store = InMemoryStore()
    driver = Driver(make(), store, tmp_path)
    with driver.recorder:
        for _ in range(2):
            order = driver.start()
            assert order is not None
            for _ in range(EPOCHS):
                driver.step(order.id)
        driver.recorder.flush()
    assert store.estimate == pytest.approx(6 * EPOCHS * SECONDS_AN_EPOCH)


def test_the_time_left_while_confirming_is_that_of_the_runs_that_are_left(
    make: MakePlan, tmp_path: Path
) -> None:
    """Not of all that might have been confirmed, nor of trials that a used up space has not."""
    fixed = {"depth": 2, "lr": 0.005, "weight_decay": 1e-6, "batch_size": 64, "balancing": "fixed"}
    space = {"shared": {**fixed, "width": [16, 24, 48]}}
    plan = make(
        "random",
        families=["shared"],
        search={"space": space},
        budget={"trials": 50},
        confirm={"top": 5, "seeds": 2},
    )
    store = InMemoryStore()
    driver = Driver(plan, store, tmp_path)
    estimates: list[float] = []
    with driver.recorder:
        while not driver.over():
            driver.start()
            for run_id in list(driver.running):
                driver.step(run_id)
            driver.recorder.flush()
            if len(store.confirmations) > len(estimates):
                estimates.append(store.estimate or 0.0)
    left = range(len(estimates))[::-1]
    assert len(left) > 1
    assert estimates == pytest.approx([runs * EPOCHS * SECONDS_AN_EPOCH for runs in left])


def test_a_confirming_run_whose_process_dies_goes_on_within_what_is_kept_for_it(
    make: MakePlan, tmp_path: Path
) -> None:
    budget = {"trials": None, "device_seconds": 40 * SECONDS_AN_EPOCH * EPOCHS}
    store = InMemoryStore()
    driver = Driver(make("random", budget=budget, **CONFIRMING), store, tmp_path)
    died = False
    with driver.recorder:
        while not driver.over():
            order = driver.start()
            if order is not None and assignment_of(order).confirms and not died:
                driver.crash(order.id)
                died = True
            for run_id in list(driver.running):
                driver.step(run_id)
    assert died
    assert {run.ending.state for run in store.confirmations} == {TrialState.COMPLETED}


def test_no_candidate_comes_any_more_once_the_front_is_confirmed(make: MakePlan, tmp_path: Path) -> None:
    """Also where confirming takes less than was kept for it, and in the next attempt."""
    budget = {"trials": None, "device_seconds": 40 * SECONDS_AN_EPOCH * EPOCHS}
    plan, store = make("random", budget=budget, **CONFIRMING), InMemoryStore()
    for _ in range(2):
        driver = Driver(plan, store.attempt(), tmp_path)
        with driver.recorder:
            failed = False
            while not failed:
                order = driver.start()
                assert order is not None
                failed = assignment_of(order).confirms
                if failed:
                    driver.fail(order.id)
                while driver.running:
                    driver.step(order.id)
    assert Driver(plan, store.attempt(), tmp_path).run() == (JobState.SUCCEEDED, None)
    assert len(store.trials) == 28


def test_what_waits_in_a_new_attempt_is_not_proposed_again(make: MakePlan, tmp_path: Path) -> None:
    fixed = {"depth": 2, "lr": 0.005, "weight_decay": 1e-6, "batch_size": 64, "balancing": "fixed"}
    space = {"shared": {**fixed, "width": [16, 24, 48]}}
    for seed in range(5):
        plan = make("random", families=["shared"], search={"space": space}, seed=seed)
        store = InMemoryStore()
        for concurrent in (2, 3):
            driver = Driver(plan, store.attempt(), tmp_path, concurrent=concurrent)
            with driver.recorder:
                for _ in range(concurrent):
                    driver.start()
        assert sorted(trial.candidate.parameters["width"] for trial in store.trials) == [16, 24, 48]


# Anything at all


@given(
    seed=st.integers(0, 10**6),
    concurrent=st.integers(1, 4),
    sampler=st.sampled_from(["tpe", "nsga2", "random"]),
)
@settings(max_examples=40)
def test_whatever_happens_the_books_are_right(
    seed: int, concurrent: int, sampler: str, make: MakePlan, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Trials step, crash and fail in any order, and drivers die."""
    random = Random(seed)
    plan = make(sampler, budget={"trials": 7, "failures": 4}, constraints=[{"metric": "params", "max": 5000}])
    folder = tmp_path_factory.mktemp("job")
    store = InMemoryStore()
    over = False
    while not over:
        driver = Driver(plan, store.attempt(), folder, concurrent)
        with driver.recorder:
            while True:
                over = driver.controller.over
                if over or random.random() < 0.03:
                    break
                driver.start()
                if driver.running:
                    trial_id = random.choice(list(driver.running))
                    chance = random.random()
                    if chance < 0.08:
                        driver.crash(trial_id)
                    elif chance < 0.14:
                        driver.fail(trial_id)
                    else:
                        driver.step(trial_id)
                assert len(driver.running) <= concurrent
        assert driver.controller.completed == sum(
            trial.state is TrialState.COMPLETED for trial in store.trials
        )
    state, _ = driver.controller.verdict()
    by_state = [trial.state for trial in store.trials]
    failures = by_state.count(TrialState.FAILED)
    assert (state is JobState.FAILED) == (failures > 4 or TrialState.COMPLETED not in by_state)
    if state is JobState.SUCCEEDED:
        assert by_state.count(TrialState.COMPLETED) == 7
        assert len(by_state) == 7 + failures
    assert_the_books_are_right(store, plan)
