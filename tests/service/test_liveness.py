"""Silence is what this server could have heard, and did not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.service import liveness
from coterie.service.liveness import LOOKS, Listener

LEASE = 30.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(liveness, "monotonic", clock)
    return clock


def test_silence_is_counted_from_the_last_sign(clock: Clock) -> None:
    listener, found = Listener(LEASE), []
    for second in range(32):
        clock.now = 1000 + second
        found.append(listener.look({"still": 7, "writes": second}))
    assert found == [{"still": second, "writes": 0} for second in range(32)]


def test_time_in_which_nothing_could_be_heard_does_not_count(clock: Clock) -> None:
    listener = Listener(LEASE)
    for second in range(29):
        assert listener.look({"job": 0}) == {"job": second}
        clock.now += 1
    listener.forget()  # the database was away
    clock.now += 3600
    for second in range(30):
        assert listener.look({"job": 0}) == {"job": second}
        clock.now += 1


def test_a_job_that_is_new_or_was_away_is_listened_to_from_the_beginning(clock: Clock) -> None:
    listener = Listener(LEASE)
    for _ in range(29):
        listener.look({"job": 0})
        clock.now += 1
    listener.look({})
    clock.now += 1
    assert listener.look({"job": 0}) == {"job": 0}


@given(st.lists(st.tuples(st.floats(0, 1e5), st.booleans()), max_size=30))
def test_no_pause_of_this_server_makes_a_driver_silent(looks: list[tuple[float, bool]]) -> None:
    clock, listener, quiet_looks = Clock(), Listener(LEASE), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(liveness, "monotonic", clock)
        beats = 0
        listener.look({"job": beats})
        for pause, writes in looks:
            clock.now += pause
            beats += writes
            quiet_looks = 0 if writes else quiet_looks + 1
            assert listener.look({"job": beats})["job"] <= LEASE * quiet_looks / LOOKS
