"""The recorder between a search and its store: nothing lost, nothing doubled, nothing out of order."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.search import recorder as recorder_module
from coterie.search.recorder import Recorder
from coterie.search.store import (
    Candidate,
    Ending,
    Fenced,
    FrontUpdate,
    InMemoryStore,
    JobState,
    Measurement,
    StoreUnavailable,
    Trial,
    TrialEnded,
    TrialState,
    TrialStore,
)

Action = Callable[[TrialStore], None]

COMPLETED = Ending(state=TrialState.COMPLETED, values={"delta_m": 1.0}, epochs=3, device_seconds=3.0)
ON_FRONT = FrontUpdate(on_front=True, displaced=(), hypervolume=1.0, size=1)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "FIRST_RETRY_SECONDS", 0.001)
    monkeypatch.setattr(recorder_module, "LONGEST_RETRY_SECONDS", 0.004)
    monkeypatch.setattr(recorder_module, "BEAT_SECONDS", 0.02)


class Flaky(InMemoryStore):
    """A store whose database goes away for a number of calls at a time, before or after it has written.

    Args:
        outages: For each call in turn, how often it fails before it goes through; then the store stays.
        lossy: A failing call has been carried out: only the answer is lost.
    """

    def __init__(self, outages: Sequence[int], *, lossy: bool = False) -> None:
        super().__init__()
        self._outages = iter(outages)
        self._left = next(self._outages, 0)
        self._lossy = lossy
        self.failed = 0

    @contextmanager
    def outage(self) -> Iterator[None]:
        if self._left == 0:
            self._left = next(self._outages, 0)
            yield
            return
        self._left -= 1
        self.failed += 1
        if self._lossy:
            yield
        raise StoreUnavailable("the database is away")

    def beat(self) -> None:
        super().beat()  # no turn of its own: beats come when they come

    def add_trial(self, trial: Trial) -> None:
        with self.outage():
            super().add_trial(trial)

    def start_trial(self, trial_id: str) -> None:
        with self.outage():
            super().start_trial(trial_id)

    def measure(self, trial_id: str, measurement: Measurement) -> None:
        with self.outage():
            super().measure(trial_id, measurement)

    def preempt(self, trial_id: str) -> None:
        with self.outage():
            super().preempt(trial_id)

    def end_trial(self, trial_id: str, ending: Ending, front: FrontUpdate | None) -> None:
        with self.outage():
            super().end_trial(trial_id, ending, front)

    def finish(self, state: JobState, reason: str | None) -> None:
        with self.outage():
            super().finish(state, reason)


class Away(InMemoryStore):
    """A store that is away until told otherwise, and says who tries to reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.back = threading.Event()
        self.tried = threading.Event()

    def measure(self, trial_id: str, measurement: Measurement) -> None:
        self.tried.set()
        if not self.back.is_set():
            raise StoreUnavailable("the database is away")
        super().measure(trial_id, measurement)


def trial(number: int) -> Trial:
    candidate = Candidate(family="shared", backbone="mlp", parameters={"lr": 0.01})
    return Trial(id=f"trial_{number}", number=number, candidate=candidate, choices={}, seed=number)


def measurement(epoch: int) -> Measurement:
    return Measurement(
        epoch=epoch, values={"delta_m": float(epoch)}, tasks={}, device_seconds=float(epoch), worker="w:1"
    )


def life_of(number: int) -> list[Action]:
    """All that happens to a trial, with a crash after its first epoch."""
    name = f"trial_{number}"
    return [
        lambda store: store.add_trial(trial(number)),
        lambda store: store.start_trial(name),
        lambda store: store.measure(name, measurement(1)),
        lambda store: store.preempt(name),
        lambda store: store.start_trial(name),
        lambda store: store.measure(name, measurement(2)),
        lambda store: store.measure(name, measurement(3)),
        lambda store: store.end_trial(name, COMPLETED, ON_FRONT),
    ]


def write(store: TrialStore, actions: Iterable[Action], then: Exception | None = None) -> None:
    with Recorder(store) as recorder:
        for action in actions:
            recorder.write(action)
        if then is not None:
            if isinstance(store, Away):
                assert store.tried.wait(10)
            raise then


def write_lives(store: TrialStore, lives: int = 2) -> None:
    end: Action = lambda store: store.finish(JobState.SUCCEEDED, None)  # noqa: E731
    write(store, [*(action for number in range(lives) for action in life_of(number)), end])


def contents(store: InMemoryStore) -> tuple[object, ...]:
    return store.trials, store.measurements, store.front, store.history, store.state


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_writes_are_applied_in_their_order() -> None:
    seen: list[int] = []
    with Recorder(InMemoryStore()) as recorder:
        for number in range(500):
            recorder.write(lambda _, number=number: seen.append(number))  # type: ignore[misc]
    assert seen == list(range(500))


def test_leaving_waits_until_all_is_written() -> None:
    store = InMemoryStore()
    write_lives(store)
    assert [(found.state, found.crashes, found.epochs) for found in store.trials] == [
        (TrialState.COMPLETED, 1, 3)
    ] * 2
    assert store.state == (JobState.SUCCEEDED, None)


def test_writing_does_not_wait_for_the_store() -> None:
    store = Away()
    with Recorder(store) as recorder:
        recorder.write(lambda store: store.add_trial(trial(0)))
        before = time.monotonic()
        for epoch in range(1, 200):
            recorder.write(lambda store, epoch=epoch: store.measure("trial_0", measurement(epoch)))  # type: ignore[misc]
        assert time.monotonic() - before < 1
        assert store.tried.wait(10)
        recorder.check()  # being away is no error
        store.back.set()
    assert len(store.measurements) == 199


@given(st.lists(st.integers(0, 3), max_size=17))
@settings(max_examples=30)
def test_a_store_that_is_away_for_a_while_loses_and_doubles_nothing(outages: list[int]) -> None:
    expected, flaky = InMemoryStore(), Flaky(outages)
    write_lives(expected)
    write_lives(flaky)
    assert flaky.failed == sum(outages)
    assert contents(flaky) == contents(expected)


def test_a_measurement_whose_answer_was_lost_is_written_again_with_the_same_result() -> None:
    store = Flaky([0, 2, 1], lossy=True)
    with Recorder(store) as recorder:
        recorder.write(lambda store: store.add_trial(trial(0)))
        recorder.write(lambda store: store.measure("trial_0", measurement(1)))
        recorder.write(lambda store: store.measure("trial_0", measurement(2)))
    assert store.failed == 3
    assert list(store.measurements) == [("trial_0", 1), ("trial_0", 2)]


def test_flush_waits_for_what_was_written_before() -> None:
    store = Away()
    with Recorder(store) as recorder:
        recorder.write(lambda store: store.add_trial(trial(0)))
        recorder.write(lambda store: store.measure("trial_0", measurement(1)))
        threading.Timer(0.05, store.back.set).start()
        recorder.flush()
        assert list(store.measurements) == [("trial_0", 1)]


@pytest.mark.parametrize("call", ["check", "flush"])
def test_a_fenced_attempt_hears_of_it_at_the_next_check(call: str) -> None:
    old = InMemoryStore()
    recorder = Recorder(old)

    def search() -> None:
        with recorder:
            recorder.write(lambda store: store.add_trial(trial(0)))
            recorder.flush()
            old.attempt()
            recorder.write(lambda store: store.add_trial(trial(1)))
            recorder.write(lambda store: store.add_trial(trial(2)))
            wait_for(lambda: call == "flush" or recorder._error is not None)
            getattr(recorder, call)()
            raise AssertionError("it did not hear of it")

    with pytest.raises(Fenced):
        search()
    assert [found.number for found in old.trials] == [0]


def test_an_idle_recorder_beats_and_so_hears_that_it_is_fenced() -> None:
    old = InMemoryStore()
    with contextlib.suppress(Fenced), Recorder(old) as recorder:
        old.attempt()
        wait_for(lambda: recorder._error is not None)
    with pytest.raises(Fenced):
        recorder.check()


def test_leaving_raises_what_stopped_the_recorder() -> None:
    old = InMemoryStore()
    old.attempt()
    with pytest.raises(Fenced):
        write(old, life_of(0)[:1])


def test_a_write_that_fails_for_good_stops_all_later_ones() -> None:
    store = InMemoryStore()
    actions: list[Action] = [
        *life_of(0),
        lambda store: store.measure("trial_0", measurement(4)),
        lambda store: store.add_trial(trial(1)),
    ]
    with pytest.raises(TrialEnded):
        write(store, actions)
    assert [found.number for found in store.trials] == [0]


def test_an_error_in_the_search_is_what_leaves_it_and_what_was_written_is_kept() -> None:
    store = InMemoryStore()
    with pytest.raises(KeyError, match="of the search"):
        write(store, life_of(0)[:1], then=KeyError("of the search"))
    assert [found.number for found in store.trials] == [0]


def test_leaving_with_an_error_does_not_wait_for_a_store_that_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recorder_module, "FIRST_RETRY_SECONDS", 60.0)
    store = Away()
    before = time.monotonic()
    with pytest.raises(KeyError, match="of the search"):
        write(store, life_of(0)[:3], then=KeyError("of the search"))
    assert store.tried.is_set()
    assert time.monotonic() - before < 5


def test_no_thread_stays_behind() -> None:
    before = set(threading.enumerate())
    write_lives(InMemoryStore())
    assert set(threading.enumerate()) == before
