import itertools
import re
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from coterie.models.families import FAMILIES
from coterie.search.store import Ending, Fenced, JobState, TrialState, Verdict, VerdictKind
from coterie.service.storage.repositories import JobRepository
from coterie.service.storage.store import SqlTrialStore
from tests.service.conftest import SPEC, Problem, Server, trial

JOB_FIELDS = {
    *("id", "name", "state", "reason", "spec", "tenant", "priority", "created_at", "started_at", "ended_at"),
    *("queue", "progress", "hypervolume", "verdict", "links"),
}


def test_a_submitted_job_is_queued_and_shown(client: httpx.Client) -> None:
    answer = client.post("/v1/jobs", json=SPEC)
    assert answer.status_code == 201
    job = answer.json()
    assert answer.headers["location"] == job["links"]["self"] == f"/v1/jobs/{job['id']}"
    assert set(job) == JOB_FIELDS
    assert re.fullmatch("job_[0-9a-f]{16}", job["id"])
    assert (job["state"], job["name"], job["tenant"], job["priority"]) == ("queued", "digits", "default", 0)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", job["created_at"])
    assert job["spec"]["search"]["families"] == list(FAMILIES)
    assert job["progress"] == {
        "trials": {"pending": 0, "running": 0, "completed": 0, "stopped": 0, "failed": 0},
        "budget": {
            "trials": {"used": 0, "total": 4},
            "seconds": {"used": 0.0, "total": None},
            "device_seconds": {"used": 0.0, "total": None},
            "failures": {"used": 0, "total": 5},
        },
        "eta_seconds": None,
    }
    assert client.get(job["links"]["self"]).json() == job


def test_the_same_key_and_body_make_one_job(server: Server, problem: Problem) -> None:
    headers = {"Idempotency-Key": "a" * 255}
    first = server.client.post("/v1/jobs", json=SPEC, headers=headers)
    again = server.client.post("/v1/jobs", json=dict(reversed(SPEC.items())), headers=headers)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json()
    assert again.headers["location"] == first.headers["location"]
    other = server.client.post("/v1/jobs", json={**SPEC, "seed": 1}, headers=headers)
    assert first.json()["id"] in problem(other, 409)["detail"]
    assert len(server.client.get("/v1/jobs").json()["items"]) == 1


@pytest.mark.parametrize("key", ["", "a" * 256, "two words", "ä".encode(), b"\x01"])
def test_a_key_that_is_no_key_is_refused(client: httpx.Client, problem: Problem, key: str | bytes) -> None:
    answer = client.post("/v1/jobs", json=SPEC, headers=[("Idempotency-Key", key)])  # type: ignore[list-item]
    problem(answer, 400, "/header/idempotency-key")
    assert client.get("/v1/jobs").json()["items"] == []


def test_jobs_are_listed_newest_first_page_by_page(server: Server) -> None:
    ids = [server.submit(name=f"n{number % 2}") for number in range(5)]
    seen: list[str] = []
    cursor: str | None = None
    for size in (2, 2, 1):
        page = server.client.get(
            "/v1/jobs", params={"limit": 2, **({"cursor": cursor} if cursor else {})}
        ).json()
        assert len(page["items"]) == size
        seen += [job["id"] for job in page["items"]]
        cursor = page["next_cursor"]
        server.submit(name="meanwhile")
    assert cursor is None
    assert seen == ids[::-1]


def test_jobs_are_filtered_by_state_and_name(server: Server) -> None:
    first, second = server.submit(name="a"), server.submit(name="b")
    server.client.post(f"/v1/jobs/{first}/cancel")

    def listed(**params: str) -> list[str]:
        return [job["id"] for job in server.client.get("/v1/jobs", params=params).json()["items"]]

    assert listed(state="cancelled") == [first]
    assert listed(name="b") == [second]
    assert listed(name="b", state="cancelled") == []


def test_a_queued_job_is_cancelled_at_once_and_once(server: Server, problem: Problem) -> None:
    job_id = server.submit()
    answer = server.client.post(f"/v1/jobs/{job_id}/cancel")
    assert answer.status_code == 200
    assert answer.json()["state"] == "cancelled"
    assert answer.json()["ended_at"] is not None
    assert server.dispatcher.calls == ["start", f"stop {job_id}"]
    assert "cancelled" in problem(server.client.post(f"/v1/jobs/{job_id}/cancel"), 409)["detail"]
    assert server.dispatcher.calls == ["start", f"stop {job_id}"]


def test_cancelling_a_running_job_cancels_its_unfinished_trials(searched: tuple[Server, str]) -> None:
    server, job_id = searched
    job = server.client.post(f"/v1/jobs/{job_id}/cancel").json()
    assert job["progress"]["trials"] == {
        "pending": 0,
        "running": 0,
        "completed": 3,
        "stopped": 0,
        "failed": 0,
    }
    assert server.client.get("/v1/trials/trial_3").json()["state"] == "cancelled"


def test_a_running_job_shows_how_far_it_is(searched: tuple[Server, str]) -> None:
    server, job_id = searched
    store = SqlTrialStore(server.database, job_id, 1)
    time.sleep(0.3)
    store.beat()
    job = server.client.get(f"/v1/jobs/{job_id}").json()
    assert job["state"] == "running"
    assert job["hypervolume"] == 11500.0
    assert job["progress"]["trials"] == {
        "pending": 0,
        "running": 1,
        "completed": 3,
        "stopped": 0,
        "failed": 0,
    }
    assert job["progress"]["budget"]["trials"] == {"used": 3, "total": 4}
    assert job["progress"]["budget"]["device_seconds"] == {"used": 6.0, "total": None}
    assert 0.3 <= job["progress"]["budget"]["seconds"]["used"] < 3
    assert job["links"]["ray_dashboard"] == f"http://127.0.0.1:8265/#/jobs/{job_id}-1"


def _eta(server: Server, job_id: str) -> Any:
    return server.client.get(f"/v1/jobs/{job_id}").json()["progress"]["eta_seconds"]


def test_the_time_left_is_what_the_driver_expects_while_the_job_runs(server: Server) -> None:
    job_id = server.submit()
    store = server.claim()
    assert _eta(server, job_id) is None
    store.set_estimate(90.0)
    assert _eta(server, job_id) == pytest.approx(90, abs=5)
    with server.database.write() as session:
        JobRepository(session).get(job_id).eta_at = datetime.now(UTC) - timedelta(seconds=60)
    assert _eta(server, job_id) == pytest.approx(30, abs=5)
    with server.database.write() as session:
        JobRepository(session).get(job_id).eta_at = datetime.now(UTC) - timedelta(seconds=600)
    assert _eta(server, job_id) == 0
    store.set_estimate(None)
    assert _eta(server, job_id) is None
    store.set_estimate(90.0)
    server.client.post(f"/v1/jobs/{job_id}/pause")
    assert _eta(server, job_id) is None


def test_what_a_job_has_found_is_shown(searched: tuple[Server, str]) -> None:
    server, job_id = searched
    assert server.client.get(f"/v1/jobs/{job_id}").json()["verdict"] is None
    SqlTrialStore(server.database, job_id, 1).set_verdict(
        Verdict(
            kind=VerdictKind.GROUPS,
            words="Learn them in these groups.",
            trial_id="trial_2",
            grouping=[["left_parity"], ["right_parity"]],
        )
    )
    job = server.client.get(f"/v1/jobs/{job_id}").json()
    assert job["verdict"] == {
        "kind": "groups",
        "words": "Learn them in these groups.",
        "trial_id": "trial_2",
        "grouping": [["left_parity"], ["right_parity"]],
    }
    assert server.client.get("/v1/jobs").json()["items"] == [job]


RULES = {  # action -> state in which it is allowed -> state after it
    "pause": {"queued": "paused", "running": "paused"},
    "resume": {"paused": "queued"},
    "cancel": {"queued": "cancelled", "running": "cancelled", "paused": "cancelled"},
}


def _job_in(server: Server, state: JobState, priority: int) -> str:
    """A job in this state; `priority` is above that of every job before it, so that it is claimed first."""
    job_id = server.submit(priority=priority)
    if state in (JobState.RUNNING, JobState.SUCCEEDED, JobState.FAILED):
        store = server.claim()
        if state is not JobState.RUNNING:
            store.finish(state, None)
    elif state is JobState.PAUSED:
        server.client.post(f"/v1/jobs/{job_id}/pause")
    elif state is JobState.CANCELLED:
        server.client.post(f"/v1/jobs/{job_id}/cancel")
    assert server.client.get(f"/v1/jobs/{job_id}").json()["state"] == state
    return job_id


def test_each_state_allows_what_it_should_and_nothing_else(server: Server, problem: Problem) -> None:
    for priority, (action, state) in enumerate(itertools.product(RULES, JobState)):
        job_id = _job_in(server, state, priority)
        path = f"/v1/jobs/{job_id}"
        before = server.client.get(path).json()
        server.dispatcher.calls.clear()
        answer = server.client.post(f"{path}/{action}")
        after = server.client.get(path).json()
        if state in RULES[action]:
            assert (answer.status_code, answer.json()) == (200, after), (action, state)
            assert after["state"] == RULES[action][state], (action, state)
            assert server.dispatcher.calls == ([] if action == "resume" else [f"stop {job_id}"])
        else:
            assert f"{job_id} is {state}" in problem(answer, 409)["detail"]
            assert after == before, (action, state)
            assert server.dispatcher.calls == []


@pytest.mark.parametrize("action", RULES)
def test_an_unknown_job_changes_in_no_way(client: httpx.Client, problem: Problem, action: str) -> None:
    problem(client.post(f"/v1/jobs/job_unknown/{action}"), 404)
    problem(client.post(f"/v1/jobs/job_unknown/{action}?now=1"), 400, "/query/now")


def test_a_paused_job_goes_on_where_it_was(searched: tuple[Server, str]) -> None:
    server, job_id = searched
    paused = server.client.post(f"/v1/jobs/{job_id}/pause").json()
    assert paused["progress"]["trials"] == {
        "pending": 1,
        "running": 0,
        "completed": 3,
        "stopped": 0,
        "failed": 0,
    }
    assert (paused["ended_at"], paused["hypervolume"]) == (None, 11500.0)
    with pytest.raises(Fenced):
        SqlTrialStore(server.database, job_id, 1).beat()
    with server.database.write() as session:
        assert JobRepository(session).claim_next(datetime.now(UTC), timedelta(seconds=1)) is None
    server.client.post(f"/v1/jobs/{job_id}/resume")
    store = server.claim()
    assert [found.number for found in store.resume().trials if found.ending is None] == [3]
    resumed = server.client.get(f"/v1/jobs/{job_id}").json()
    assert (resumed["state"], resumed["started_at"]) == ("running", paused["started_at"])


def test_failed_and_stopped_trials_are_counted_where_they_belong(server: Server) -> None:
    job_id = server.submit()
    store = server.claim()
    for number, state in enumerate((TrialState.FAILED, TrialState.STOPPED)):
        store.add_trial(trial(number))
        store.end_trial(f"trial_{number}", Ending(state=state, reason="so it is"), None)
    progress = server.client.get(f"/v1/jobs/{job_id}").json()["progress"]
    assert progress["trials"] == {"pending": 0, "running": 0, "completed": 0, "stopped": 1, "failed": 1}
    assert progress["budget"]["trials"]["used"] == 1
    assert progress["budget"]["failures"] == {"used": 1, "total": 5}


def test_the_log_is_read_from_its_end(server: Server, problem: Problem) -> None:
    job_id = server.submit()
    answer = server.client.get(f"/v1/jobs/{job_id}/logs")
    assert (answer.status_code, answer.text) == (200, "")
    log = server.settings.log_of(job_id)
    log.parent.mkdir(parents=True)
    log.write_bytes(b"".join(b"line %d \xff\n" % number for number in range(1000)))
    answer = server.client.get(f"/v1/jobs/{job_id}/logs", params={"tail": 2})
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.text == "line 998 �\nline 999 �\n"
    assert len(server.client.get(f"/v1/jobs/{job_id}/logs").text.splitlines()) == 200
    problem(server.client.get("/v1/jobs/job_unknown/logs"), 404)
