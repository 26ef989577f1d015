"""The catalogue, health, the page, errors of the router, and the app's beginning and end."""

import stat
from pathlib import Path

import httpx
import pytest
from sqlalchemy import text

from coterie.search.store import JobState
from coterie.service.storage.migrate import SchemaMismatch
from tests.service.conftest import Problem, RecordingDispatcher, Server, open_server


@pytest.mark.parametrize(
    ("kind", "name", "fields"),
    [
        ("datasets", "digits", {"tasks"}),
        ("families", "dmtg", set()),
        ("backbones", "mlp", set()),
        ("metrics", "delta_m", {"direction", "unit"}),
    ],
)
def test_the_catalogue_describes_what_a_spec_can_name(
    client: httpx.Client, kind: str, name: str, fields: set[str]
) -> None:
    page = client.get(f"/v1/{kind}").json()
    assert set(page) == {"items", "next_cursor"}
    items = {item["name"]: item for item in page["items"]}
    assert set(items[name]) == {"name", "title", "description", "schema"} | fields


def test_the_catalogue_lists_a_sources_tasks(client: httpx.Client) -> None:
    tasks = client.get("/v1/datasets").json()["items"][0]["tasks"]
    metrics = tasks[0].pop("metrics")
    assert tasks[0] == {"name": "left_parity", "kind": "binary", "metric": "error", "direction": "minimize"}
    assert [metric["name"] for metric in metrics] == ["error", "accuracy", "auc", "f1"]
    assert metrics[0] == {"name": "error", "direction": "minimize", "unit": "1"}
    assert len(tasks) == 6


def test_the_server_says_that_it_lives(client: httpx.Client) -> None:
    assert client.get("/healthz").json()["status"] == "ok"


def test_the_server_is_ready_when_ray_is(server: Server) -> None:
    answer = server.client.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (200, "ready")
    server.dispatcher.state = (False, "Ray ended")
    answer = server.client.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (503, "not ready")
    assert answer.json()["checks"]["ray"] == {"ok": False, "detail": "Ray ended"}
    assert answer.json()["checks"]["database"]["ok"]


def test_without_its_database_the_server_says_so(server: Server, problem: Problem) -> None:
    server.settings.data_dir.rename(server.settings.data_dir.with_name("gone"))
    server.break_connections()  # one that is open goes on with the file, whatever its name
    answer = server.client.get("/readyz")
    assert (answer.status_code, answer.json()["checks"]["database"]["ok"]) == (503, False)
    problem(server.client.get("/v1/jobs"), 503)


def test_the_page_lists_jobs_and_escapes_their_names(searched: tuple[Server, str]) -> None:
    server, job_id = searched
    server.submit(name="<script>alert(1)</script>")
    answer = server.client.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert f"/v1/jobs/{job_id}/front" in answer.text
    assert "3 of 4" in answer.text
    assert "1.15e+04" in answer.text
    assert "&lt;script&gt;" in answer.text
    assert "<script" not in answer.text


def test_the_page_says_how_to_begin(client: httpx.Client) -> None:
    assert "coterie demo" in client.get("/").text


@pytest.mark.parametrize("path", ["/nothing", "/v1", "/v1/jobs/", "/v1/jobs/job_1/nothing"])
def test_an_unknown_path_is_not_found(client: httpx.Client, problem: Problem, path: str) -> None:
    problem(client.get(path), 404)


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/v1/jobs/job_0",
            "/v1/jobs/nonsense",
            "/v1/jobs/%00",
            "/v1/jobs/job_%F0%9F%92%A9",
            f"/v1/jobs/job_{'x' * 5000}",
        ),
        *(
            "/v1/jobs/job_0/trials",
            "/v1/jobs/job_0/front",
            "/v1/jobs/job_0/front/history",
            "/v1/jobs/job_0/best",
        ),
        *("/v1/jobs/job_0/logs", "/v1/jobs/..%2F..%2Fetc/logs"),
        *("/v1/trials/trial_x", "/v1/trials/trial_x/measurements", "/v1/trials/trial_x/architecture"),
        *("/v1/trials/trial_x/model", "/v1/trials/..%2f..%2fx/model"),
    ],
)
def test_an_unknown_id_is_not_found(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"
    assert len(answer.content) < 1000


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PUT", "/v1/jobs", {"GET", "HEAD", "OPTIONS", "POST"}),
        ("DELETE", "/v1/trials/trial_0", {"GET", "HEAD", "OPTIONS"}),
        ("GET", "/v1/jobs/job_0/cancel", {"OPTIONS", "POST"}),
        ("POST", "/healthz", {"GET", "HEAD", "OPTIONS"}),
    ],
)
def test_a_method_that_is_not_there_is_answered_with_those_that_are(
    client: httpx.Client, problem: Problem, method: str, path: str, allow: set[str]
) -> None:
    answer = client.request(method, path)
    problem(answer, 405)
    assert set(answer.headers["allow"].split(", ")) == allow


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/jobs?limit=0", "/v1/jobs?limit=1001", "/v1/jobs?limit=1.5", "/v1/jobs?limit=" + "9" * 5000),
        *("/v1/jobs?limit=", "/v1/jobs?cursor=broken", "/v1/jobs?cursor=", "/v1/jobs?cursor=%F0%9F%92%A9"),
        *(
            "/v1/jobs?cursor=am9iczotMQ",
            "/v1/jobs?cursor=" + "A" * 300,
            "/v1/jobs?state=done",
            "/v1/jobs?name=%00",
        ),
        *("/v1/jobs?sort=name", "/v1/families?limit=1", "/v1/jobs/job_0?verbose=1"),
        *(
            "/v1/jobs/job_0/trials?sort=a%20b",
            "/v1/jobs/job_0/trials?state=queued",
            "/v1/jobs/job_0/logs?tail=0",
        ),
        *("/v1/jobs/job_0/trials?family=a%20b", "/v1/trials/trial_x/model?format=exe"),
    ],
)
def test_a_bad_query_is_refused_with_a_pointer(client: httpx.Client, problem: Problem, path: str) -> None:
    name = path.partition("?")[2].partition("=")[0]
    problem(client.get(path), 400, f"/query/{name}")


def test_a_cursor_serves_the_list_that_gave_it_alone(searched: tuple[Server, str], problem: Problem) -> None:
    server, job_id = searched
    path = f"/v1/jobs/{job_id}/trials"
    cursor = server.client.get(path, params={"limit": 1}).json()["next_cursor"]
    problem(server.client.get(path, params={"cursor": cursor, "sort": "-number"}), 400, "/query/cursor")
    problem(server.client.get("/v1/jobs", params={"cursor": cursor}), 400, "/query/cursor")


def test_a_fault_of_ours_is_a_problem_without_a_trace(
    server: Server, problem: Problem, caplog: pytest.LogCaptureFixture
) -> None:
    server.dispatcher.node_resources = None  # type: ignore[assignment]
    job = {"dataset": {"source": "digits"}, "budget": {"trials": 1}}
    answer = server.client.post("/v1/jobs", json=job)
    problem(answer, 500)
    assert "TypeError" not in answer.text
    assert "POST /v1/jobs" in caplog.text


def test_the_data_folder_is_the_owners_alone_and_the_dispatcher_starts_and_stops(tmp_path: Path) -> None:
    with open_server(tmp_path / "a" / "data") as server:
        assert stat.S_IMODE((tmp_path / "a" / "data").stat().st_mode) == 0o700
        dispatcher: RecordingDispatcher = server.dispatcher
        assert dispatcher.calls == ["start"]
    assert dispatcher.calls == ["start", "stop"]


def test_what_was_stored_is_there_after_a_restart(tmp_path: Path) -> None:
    with open_server(tmp_path) as server:
        job_id = server.submit()
        store = server.claim()
        store.finish(JobState.FAILED, "nothing completed")
    with open_server(tmp_path) as server:
        job = server.client.get(f"/v1/jobs/{job_id}").json()
    assert (job["state"], job["reason"]) == ("failed", "nothing completed")


def test_a_server_does_not_start_on_a_database_of_another_version(tmp_path: Path) -> None:
    with open_server(tmp_path) as server, server.database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = 'x'"))
    with pytest.raises(SchemaMismatch), open_server(tmp_path):
        pass
