"""The ledger: what counts against which limit, over all attempts at a job."""

from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.search.budget import Ledger
from coterie.search.spec import BudgetSpec
from coterie.search.store import Candidate, Ending, InMemoryStore, Resumed, Trial, TrialState

NOTHING = Resumed(trials=[], seconds=0.0, side_device_seconds=0.0, reference_point=None)
COUNTED = (TrialState.COMPLETED, TrialState.STOPPED)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def budget(**limits: Any) -> BudgetSpec:
    return BudgetSpec(**{"trials": 10, "failures": 2} | limits)


def ending(state: TrialState, device_seconds: float = 1.0) -> Ending:
    return Ending(state=state, device_seconds=device_seconds)


def trial(number: int, ended: Ending | None = None, device_seconds: float = 0.0) -> Trial:
    return Trial(
        id=f"trial_{number}",
        number=number,
        candidate=Candidate(family="shared", backbone="mlp", parameters={}),
        choices={},
        seed=0,
        state=TrialState.PENDING if ended is None else ended.state,
        ending=ended,
        device_seconds=device_seconds,
    )


def test_completed_and_stopped_trials_count_failed_and_cancelled_ones_do_not() -> None:
    ledger = Ledger(budget(), NOTHING)
    for index, state in enumerate(TrialState):
        if state not in (TrialState.PENDING, TrialState.RUNNING):
            ledger.end(str(index), ending(state))
    assert ledger.trials == 2
    assert ledger.failures == 1


def test_trials_in_flight_are_counted_on_so_none_too_many_starts() -> None:
    ledger = Ledger(budget(trials=3), NOTHING)
    assert ledger.may_start(2)
    assert not ledger.may_start(3)
    ledger.end("a", ending(TrialState.COMPLETED))
    assert ledger.may_start(1)
    assert not ledger.may_start(2)


def test_running_trials_finish_once_all_have_started() -> None:
    ledger = Ledger(budget(trials=1), NOTHING)
    ledger.end("a", ending(TrialState.COMPLETED))
    assert not ledger.may_start(0)
    assert ledger.spent() is None


def test_a_failed_trial_is_made_up_for() -> None:
    ledger = Ledger(budget(trials=1), NOTHING)
    ledger.end("a", ending(TrialState.FAILED))
    assert ledger.may_start(0)


@given(st.lists(st.sampled_from([*COUNTED, TrialState.FAILED]), max_size=30))
def test_failures_are_borne_up_to_the_limit_and_not_beyond(states: list[TrialState]) -> None:
    ledger = Ledger(budget(trials=1000), NOTHING)
    failures = 0
    for number, state in enumerate(states):
        ledger.end(str(number), ending(state))
        failures += state is TrialState.FAILED
        assert ledger.failed is (failures > 2)
        assert (ledger.spent() == "more than 2 trials failed") is ledger.failed
        assert ledger.may_start(0) is not ledger.failed


def test_a_job_may_bear_no_failure_at_all() -> None:
    ledger = Ledger(budget(failures=0), NOTHING)
    assert not ledger.failed
    ledger.end("a", ending(TrialState.FAILED))
    assert ledger.failed


def test_seconds_stop_everything_when_they_have_passed(clock: Clock) -> None:
    ledger = Ledger(budget(seconds=60), NOTHING, clock=clock)
    clock.now += 59.9
    assert ledger.spent() is None
    assert ledger.may_start(0)
    clock.now += 0.1
    assert ledger.spent() == "the budget of 60 seconds is spent"
    assert not ledger.may_start(0)


def test_time_in_which_no_attempt_ran_is_not_charged(clock: Clock) -> None:
    first = Ledger(budget(seconds=60), NOTHING, clock=clock)
    clock.now += 25
    used = first.seconds
    clock.now += 10_000  # nobody runs it
    second = Ledger(
        budget(seconds=60),
        Resumed(trials=[], seconds=used, side_device_seconds=0.0, reference_point=None),
        clock=clock,
    )
    assert second.seconds == 25
    clock.now += 34.9
    assert second.spent() is None
    clock.now += 0.1
    assert second.spent() is not None


def test_device_seconds_are_those_of_side_runs_ended_and_running_trials() -> None:
    ledger = Ledger(budget(trials=None, device_seconds=100), NOTHING)
    ledger.charge_side("a reference", 10)
    ledger.charge("a subset run", 2)
    ledger.charge_side("a subset run", 5)
    ledger.charge("a", 3)
    ledger.charge("a", 7)  # what it has cost so far, not once more
    ledger.charge("b", 20)
    assert ledger.device_seconds == 42
    ledger.end("a", ending(TrialState.COMPLETED, 8))
    assert ledger.device_seconds == 43
    ledger.end("b", ending(TrialState.FAILED, 20))
    assert ledger.device_seconds == 43
    assert ledger.spent() is None
    ledger.charge("c", 57)
    assert ledger.spent() == "the budget of 100 device-seconds is spent"
    assert not ledger.may_start(0)


@pytest.mark.parametrize("state", [*COUNTED, TrialState.FAILED, TrialState.CANCELLED])
def test_every_ended_trial_is_paid_for(state: TrialState) -> None:
    ledger = Ledger(budget(), NOTHING)
    ledger.end("a", ending(state, 4))
    assert ledger.device_seconds == 4


def test_a_resumed_ledger_goes_on_where_the_last_one_stopped() -> None:
    resumed = Resumed(
        trials=[
            trial(0, ending(TrialState.COMPLETED, 10)),
            trial(1, ending(TrialState.FAILED, 20)),
            trial(2, ending(TrialState.STOPPED, 30)),
            trial(3, device_seconds=5),
        ],
        seconds=12.0,
        side_device_seconds=7.0,
        reference_point=None,
    )
    ledger = Ledger(budget(trials=4, failures=1), resumed)
    assert (ledger.trials, ledger.failures) == (2, 1)
    assert ledger.device_seconds == 72
    assert ledger.seconds >= 12
    assert ledger.may_start(1)
    assert not ledger.may_start(2)
    ledger.end("trial_3", ending(TrialState.COMPLETED, 9))
    assert ledger.device_seconds == 76


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 100), st.booleans()), max_size=30))
def test_a_ledger_rebuilt_from_the_store_has_the_same_books(events: list[tuple[int, float, bool]]) -> None:
    """Trials run and end in any order; what the store keeps of them is enough."""
    store = InMemoryStore()
    ledger = Ledger(budget(), store.resume())
    known: dict[int, Trial] = {}
    for number, cost, ends in events:
        before = known.setdefault(number, trial(number))
        if before.ending is None:
            ended = ending(TrialState.COMPLETED, cost) if ends else None
            known[number] = trial(number, ended, cost)
            if ended is not None:
                ledger.end(before.id, ended)
            else:
                ledger.charge(before.id, cost)
    resumed = Resumed(trials=list(known.values()), seconds=0.0, side_device_seconds=0.0, reference_point=None)
    rebuilt = Ledger(budget(), resumed)
    assert rebuilt.trials == ledger.trials
    assert rebuilt.device_seconds == pytest.approx(ledger.device_seconds)


# What is kept for confirming


def test_what_is_reserved_is_left_for_confirming_and_for_nothing_else() -> None:
    ledger = Ledger(budget(trials=None, device_seconds=100), NOTHING)
    ledger.reserve(30)
    ledger.charge("a", 69)
    assert ledger.spent() is None
    ledger.charge("a", 70)
    assert ledger.spent() == "the budget of 100 device-seconds is spent but for the confirming runs"
    assert ledger.spent(confirming=True) is None
    ledger.charge("a", 100)
    assert ledger.spent(confirming=True) == "the budget of 100 device-seconds is spent"


def test_the_search_gets_at_least_half_of_the_time_however_much_is_reserved(clock: Clock) -> None:
    ledger = Ledger(budget(trials=None, seconds=60), NOTHING, devices=2, clock=clock)
    ledger.reserve(1e6)
    clock.now += 29.9
    assert ledger.spent() is None
    clock.now += 0.1
    assert ledger.spent() == "the budget of 60 seconds is spent but for the confirming runs"


@pytest.mark.parametrize(
    ("limits", "left"),
    [({}, None), ({"seconds": 50}, 40), ({"device_seconds": 50}, 10), ({"seconds": 5}, 0)],
)
def test_a_side_run_has_what_is_left_of_the_nearest_limit(
    limits: dict[str, float], left: float | None, clock: Clock
) -> None:
    ledger = Ledger(budget(**limits), NOTHING, clock=clock)
    clock.now += 10
    ledger.charge_side("a reference", 30)
    assert ledger.side_seconds(devices=2) == left


# How long it will take


def simulate(
    clock: Clock, limits: dict[str, Any], concurrent: int, costs: list[float], yardstick: float
) -> tuple[list[tuple[float, float]], float]:
    """Run a job whose trials take these seconds, on a device each: (when, seconds left then), and its end."""
    ledger = Ledger(BudgetSpec(**limits), NOTHING, devices=concurrent, clock=clock)
    began = clock.now
    clock.now += yardstick
    ledger.charge_side("yardstick", yardstick)
    ledger.begin_trials()
    waiting, running = list(enumerate(costs)), dict[int, tuple[float, float]]()
    estimates: list[tuple[float, float]] = []
    while True:
        while waiting and len(running) < concurrent and ledger.may_start(len(running)):
            number, cost = waiting.pop(0)
            running[number] = (clock.now + cost + 0.1, cost)  # which takes a little to start
        if not running:
            return estimates, clock.now - began
        number = min(running, key=lambda name: running[name][0])
        clock.now, cost = running.pop(number)
        ledger.end(str(number), ending(TrialState.COMPLETED, cost))
        shares = {str(name): 1 - (until - clock.now) / (c + 0.1) for name, (until, c) in running.items()}
        for name, share in shares.items():
            ledger.charge(name, share * costs[int(name)])
        left = ledger.seconds_left(sum(shares.values()))
        assert left is not None
        estimates.append((clock.now - began, left))


@given(
    limits=st.sampled_from([{"trials": 30}, {"seconds": 120.0}, {"device_seconds": 150.0}]),
    concurrent=st.integers(1, 4),
    seed=st.integers(0, 2**20),
    yardstick=st.floats(0, 60),
)
def test_from_a_third_of_the_job_on_the_time_left_is_within_a_factor_of_two(
    limits: dict[str, float], concurrent: int, seed: int, yardstick: float
) -> None:
    random = Random(seed)
    costs = [random.uniform(2, 9) for _ in range(400)]
    estimates, end = simulate(Clock(), limits, concurrent, costs, yardstick)
    longest = max(costs)  # what still runs when a limit is reached is not known
    for when, left in estimates:
        if when > end / 3:
            assert left <= 2 * (end - when) + longest
            assert left >= (end - when) / 2 - longest


def test_nothing_is_known_of_the_time_before_a_trial_has_ended() -> None:
    ledger = Ledger(budget(), NOTHING)
    ledger.charge_side("a reference", 10)
    ledger.charge("a", 10)
    assert ledger.seconds_left(0) is None
