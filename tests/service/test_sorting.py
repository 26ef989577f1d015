import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from coterie.search.store import JobState, TrialState
from coterie.service import fronts, jobs, trials
from coterie.service.config import Settings
from coterie.service.context import Context
from coterie.service.cursors import (
    InvalidQuery,
    decode_cursor,
    decode_value_cursor,
    encode_cursor,
    encode_value_cursor,
)
from coterie.service.hub import Hub
from coterie.service.routes.parameters import PageParameters
from coterie.service.storage.database import Database
from coterie.service.storage.tables import TrialRow
from tests.service.conftest import Problem, RecordingDispatcher, Server
from tests.service.rows import add_job, add_trials

FINITE = st.floats(allow_nan=False, allow_infinity=False)
# Few values, so that many are equal; numbers that differ in their last bit only; both ends of what there is.
VALUES = st.sampled_from([0.0, 1.0, math.nextafter(1.0, 2.0), 0.1 + 0.2, -5e-324, 1.7976931348623157e308])
# An example adds rows to one database, so that each takes a job of its own.
ROWS_STAY = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def context(database: Database, tmp_path: Path) -> Context:
    return Context(
        Settings(data_dir=tmp_path, _env_file=None), database, RecordingDispatcher(), Hub(database, 1)
    )


def _page(context: Context, job_id: str, **query: Any) -> tuple[list[int], str | None]:
    asked: dict[str, Any] = {"state": None, "family": None, "limit": 50, "cursor": None} | query
    page = trials.list_trials(context, job_id, **asked)
    return [item["number"] for item in page["items"]], page["next_cursor"]


def _all(context: Context, job_id: str, **query: Any) -> list[int]:
    found, cursor = _page(context, job_id, **query)
    while cursor is not None:
        page, cursor = _page(context, job_id, **query, cursor=cursor)
        found += page
    return found


@pytest.fixture
def job(context: Context) -> str:
    with context.database.write() as session:
        job_id = add_job(session)
        add_trials(session, job_id, {0: {"macs": 30.0}, 1: {"macs": 10.0}, 3: {"macs": 20.0}})
        add_trials(session, job_id, {2: {"macs": 10.0}, 5: {"macs": 5.0}}, state="stopped", family="dmtg")
        add_trials(session, job_id, {4: {"params": 1.0}})
    return job_id


@pytest.mark.parametrize("limit", [1, 2, 50])
def test_trials_are_sorted_by_a_metric_either_way_and_equal_ones_by_number(
    context: Context, job: str, limit: int
) -> None:
    assert _all(context, job, sort="macs", limit=limit) == [5, 1, 2, 3, 0]
    assert _all(context, job, sort="-macs", limit=limit) == [0, 3, 2, 1, 5]


@pytest.mark.parametrize("sequence", [2**31, 10**18 - 1])
def test_a_cursor_beyond_all_rows_finds_nothing(context: Context, job: str, sequence: int) -> None:
    with context.database.read() as session:
        trial_id = session.scalars(select(TrialRow.id)).first()
    assert trial_id is not None
    order = encode_cursor("measurements", sequence)
    assert trials.list_measurements(context, trial_id, limit=5, cursor=order)["items"] == []
    order = encode_cursor("history", sequence)
    assert fronts.read_history(context, job, limit=5, cursor=order)["items"] == []


def test_trials_without_a_value_are_left_out(context: Context, job: str) -> None:
    assert _all(context, job, sort="params") == [4]
    assert _all(context, job, sort="latency_ms") == []


@pytest.mark.parametrize("limit", [1, 50])
def test_filters_hold_in_each_order(context: Context, job: str, limit: int) -> None:
    assert _all(context, job, sort="-macs", state=TrialState.STOPPED, limit=limit) == [2, 5]
    assert _all(context, job, sort="macs", family="shared", limit=limit) == [1, 3, 0]
    assert _all(context, job, sort="macs", family="dmtg", state=TrialState.COMPLETED, limit=limit) == []


@pytest.mark.parametrize("sort", ["beauty", "-beauty", "number.x"])
def test_an_unknown_metric_is_refused_with_those_there_are(
    searched: tuple[Server, str], problem: Problem, sort: str
) -> None:
    server, job_id = searched
    answer = server.client.get(f"/v1/jobs/{job_id}/trials", params={"sort": sort})
    assert "number, delta_m" in problem(answer, 400, "/query/sort")["detail"]


def test_trials_are_sorted_over_http_as_they_ended(searched: tuple[Server, str]) -> None:
    server, job_id = searched
    path = f"/v1/jobs/{job_id}/trials"
    first = server.client.get(path, params={"sort": "-delta_m", "limit": 2}).json()
    rest = server.client.get(path, params={"sort": "-delta_m", "cursor": first["next_cursor"]}).json()
    shown = [item["values"]["delta_m"] for item in first["items"] + rest["items"]]
    assert shown == [5.0, 2.0, 0.0]
    assert rest["next_cursor"] is None


def test_a_cursor_serves_its_own_order_alone(searched: tuple[Server, str]) -> None:
    server, job_id = searched
    path = f"/v1/jobs/{job_id}/trials"
    cursors = {
        sort: server.client.get(path, params={"sort": sort, "limit": 1}).json()["next_cursor"]
        for sort in ("number", "-number", "macs", "-macs", "params")
    }
    for sort in cursors:
        for other, cursor in cursors.items():
            answer = server.client.get(path, params={"sort": sort, "cursor": cursor})
            assert (answer.status_code == 200) == (sort == other)


def test_jobs_are_listed_oldest_first_too(context: Context) -> None:
    with context.database.write() as session:
        ids = [add_job(session) for _ in range(5)]
    for sort, expected in (("created_at", ids), ("-created_at", ids[::-1])):
        found: list[str] = []
        cursor = None
        while cursor is not None or not found:
            page = jobs.list_jobs(context, sort=sort, state=JobState.QUEUED, limit=2, cursor=cursor)
            found += [item["id"] for item in page["items"]]
            cursor = page["next_cursor"]
        assert found == expected


@ROWS_STAY
@given(
    sort=st.sampled_from(["number", "-number", "macs", "-macs"]),
    values=st.lists(VALUES | FINITE, min_size=1, max_size=20),
    limit=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_paging_while_trials_end_shows_each_that_was_there_once(
    context: Context, sort: str, values: list[float], limit: int, seed: int
) -> None:
    chance = random.Random(seed)
    numbers = list(range(2 * len(values)))
    chance.shuffle(numbers)
    there, later = numbers[: len(values)], numbers[len(values) :]
    with context.database.write() as session:
        job_id = add_job(session)
        add_trials(session, job_id, {n: {"macs": v} for n, v in zip(there, values, strict=True)})
    seen, cursor = _page(context, job_id, sort=sort, limit=limit)
    while cursor is not None:
        if later:
            with context.database.write() as session:
                add_trials(session, job_id, {later.pop(): {"macs": chance.choice([*values, 0.0])}})
        page, cursor = _page(context, job_id, sort=sort, limit=limit, cursor=cursor)
        seen += page
    assert len(set(seen)) == len(seen)
    value_of = dict(zip(there, values, strict=True))
    expected = sorted(there, key=lambda n: (value_of[n], n) if "macs" in sort else n)
    assert [n for n in seen if n in value_of] == expected[:: -1 if sort.startswith("-") else 1]


@given(value=FINITE, position=st.integers(0, 10**17))
def test_a_cursor_holds_its_place_to_the_last_bit(value: float, position: int) -> None:
    cursor = encode_value_cursor("trials.-macs", value, position)
    assert decode_value_cursor("trials.-macs", cursor) == (value, position)
    assert decode_cursor("jobs", encode_cursor("jobs", position)) == position


def test_the_longest_cursor_is_accepted() -> None:
    sort = "-" + "m" * 100
    cursor = encode_value_cursor(f"trials.{sort}", -1.7976931348623157e-308, 10**17)
    assert PageParameters(cursor=cursor).cursor == cursor


@given(st.text(max_size=40) | st.builds(lambda text: encode_cursor(text, 1), st.text(max_size=20)))
def test_what_is_no_cursor_is_refused(text: str) -> None:
    for decode in (decode_cursor, decode_value_cursor):
        with pytest.raises(InvalidQuery):
            decode("trials.macs", text)


@pytest.mark.parametrize("value", ["nan", "inf", "1e999", "-1e999", "1.2.3", "", "--1", "1e", "0x1p3", "1_0"])
def test_a_forged_value_is_refused(value: str) -> None:
    class Forged(float):
        def __repr__(self) -> str:
            return value

    with pytest.raises(InvalidQuery):
        decode_value_cursor("trials.macs", encode_value_cursor("trials.macs", Forged(), 1))
