"""What users see of the queue, and how they change it."""

from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from coterie.search.store import JobState
from coterie.service.storage.repositories import JobRepository
from tests.service.conftest import SPEC, Problem, Server, open_server


def _queue(server: Server, job_id: str) -> Any:
    return server.client.get(f"/v1/jobs/{job_id}").json()["queue"]


def test_a_queued_job_shows_its_place_and_no_other_job_has_one(server: Server) -> None:
    first, second, third = (server.submit(budget={"trials": 4, "seconds": 60}) for _ in range(3))
    store = server.claim()
    store.set_estimate(90.0)
    assert _queue(server, first) is None
    places = [_queue(server, job_id) for job_id in (second, third)]
    assert [(place["position"], place["waits_for"]) for place in places] == [(1, "place"), (2, "place")]
    starts = [datetime.fromisoformat(place["expected_start_at"]) for place in places]
    assert (starts[1] - starts[0]).total_seconds() == 60
    listed = {job["id"]: job["queue"] for job in server.client.get("/v1/jobs").json()["items"]}
    assert listed == {first: None, second: places[0], third: places[1]}
    store.finish(JobState.SUCCEEDED, None)
    assert _queue(server, first) is None


def test_priority_moves_a_job_in_the_queue_and_leaves_its_spec(server: Server) -> None:
    first, second = server.submit(), server.submit()
    moved = server.client.patch(f"/v1/jobs/{second}", json={"priority": 3})
    assert moved.status_code == 200
    assert moved.json() == server.client.get(f"/v1/jobs/{second}").json()
    assert (moved.json()["priority"], moved.json()["spec"]["priority"]) == (3, 0)
    assert (_queue(server, second)["position"], _queue(server, first)["position"]) == (1, 2)
    server.claim()
    assert server.client.patch(f"/v1/jobs/{second}", json={"priority": -1}).json()["state"] == "running"
    server.client.post(f"/v1/jobs/{second}/pause")
    server.client.post(f"/v1/jobs/{second}/resume")
    assert (_queue(server, second)["position"], _queue(server, first)["position"]) == (2, 1)


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/priority"),
        ({"priority": 1001}, "/priority"),
        ({"priority": 0.5}, "/priority"),
        ({"priority": None}, "/priority"),
        ({"priority": 1, "name": "x"}, "/name"),
        ([], ""),
    ],
)
def test_a_change_is_held_to_its_schema(server: Server, problem: Problem, body: object, pointer: str) -> None:
    job_id = server.submit()
    problem(server.client.patch(f"/v1/jobs/{job_id}", json=body), 422, pointer)
    assert server.client.get(f"/v1/jobs/{job_id}").json()["priority"] == 0


def test_what_has_ended_or_never_was_can_not_be_changed(server: Server, problem: Problem) -> None:
    job_id = server.submit()
    server.client.post(f"/v1/jobs/{job_id}/cancel")
    refused = problem(server.client.patch(f"/v1/jobs/{job_id}", json={"priority": 1}), 409)
    assert f"{job_id} is cancelled" in refused["detail"]
    problem(server.client.patch("/v1/jobs/job_unknown", json={"priority": 1}), 404)
    problem(server.client.patch(f"/v1/jobs/{job_id}", content="priority=1"), 415)


def test_a_tenant_queues_no_more_than_it_may(tmp_path: Path, problem: Problem) -> None:
    with open_server(tmp_path, tenant_max_queued_jobs=1) as server:
        key = {"Idempotency-Key": "one"}
        first = server.client.post("/v1/jobs", json=SPEC, headers=key)
        assert first.status_code == 201
        refused = problem(server.client.post("/v1/jobs", json=SPEC), 403)
        assert refused["type"] == "urn:coterie:problem:quota-exceeded"
        assert "queued jobs of tenant default: at most 1, found 1" in refused["detail"]
        again = server.client.post("/v1/jobs", json=SPEC, headers=key)
        assert (again.status_code, again.json()) == (200, first.json())
        server.client.post(f"/v1/jobs/{first.json()['id']}/pause")
        other = server.submit()
        problem(server.client.post(f"/v1/jobs/{first.json()['id']}/resume"), 403)
        assert len(server.client.get("/v1/jobs", params={"state": "queued"}).json()["items"]) == 1
        server.client.post(f"/v1/jobs/{other}/cancel")
        assert server.client.post(f"/v1/jobs/{first.json()['id']}/resume").status_code == 200


def test_a_tenant_whose_files_fill_their_quota_submits_nothing(tmp_path: Path, problem: Problem) -> None:
    with open_server(tmp_path, tenant_max_stored_bytes=1000) as server:
        job_id = server.submit()
        with server.database.write() as session:
            JobRepository(session).get(job_id).stored_bytes = 1000
        refused = problem(server.client.post("/v1/jobs", json=SPEC), 403)
        assert "must be below 1,000, found 1,000" in refused["detail"]


def test_the_change_is_part_of_the_contract(client: httpx.Client) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/v1/jobs/{job_id}"]["patch"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert (schema["required"], schema["additionalProperties"]) == (["priority"], False)
    assert (schema["properties"]["priority"]["minimum"], schema["properties"]["priority"]["maximum"]) == (
        -1000,
        1000,
    )
