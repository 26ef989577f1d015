"""What was trained beside a job's trials, over HTTP."""

from typing import Any

import pytest

from coterie.search.store import SubsetResult
from coterie.service.storage.repositories import JobRepository
from tests.service.conftest import Problem, Server
from tests.service.side_runs import SETTING, TASKS, measure_affinities, use_references


def _affinities(server: Server, job_id: str) -> dict[str, dict[str, Any]]:
    answer = server.client.get(f"/v1/jobs/{job_id}/affinity")
    assert answer.status_code == 200, answer.text
    assert answer.json()["next_cursor"] is None
    return {item["method"]: item for item in answer.json()["items"]}


def test_a_job_that_has_measured_nothing_has_no_affinities_and_no_references(server: Server) -> None:
    job_id = server.submit()
    assert _affinities(server, job_id) == {}
    server.claim().use_setting(SETTING)
    assert _affinities(server, job_id) == {}
    assert server.client.get(f"/v1/jobs/{job_id}/references").json() == {"items": [], "next_cursor": None}


def test_affinities_say_how_they_were_measured(server: Server) -> None:
    job_id = server.submit()
    measure_affinities(server.claim())
    found = _affinities(server, job_id)
    assert list(found) == ["one_step", "pairwise"]
    for item in found.values():
        assert (item["tasks"], item["seeds"], item["epochs"]) == ([*TASKS], 2, 20)
        assert (item["backbone"], item["sizes"]) == ("mlp", {"depth": 2, "width": 24})
        assert item["recipe"] == {"batch_size": 64, "lr": 0.005}
        assert item["description"]
    assert [item["split"] for item in found.values()] == ["train", "validation"]
    one_step, pairwise = found["one_step"], found["pairwise"]
    assert one_step["matrix"][3][1] == pytest.approx(3e-4)  # the mean of 2e-4 and 4e-4
    assert one_step["standard_error"][3][1] == pytest.approx(1e-4)
    # The second task makes the first one better, by a tenth and by three; the first makes the second worse.
    assert pairwise["matrix"][1][0] == pytest.approx(20.0)
    assert pairwise["standard_error"][1][0] == pytest.approx(10.0)
    assert pairwise["matrix"][0][1] == pytest.approx(-50.0)
    assert [cell for row in pairwise["matrix"] for cell in row].count(None) == len(TASKS) ** 2 - 2


def test_affinities_are_those_of_the_jobs_tasks_in_its_order(server: Server) -> None:
    first = server.submit()
    measure_affinities(server.claim())
    backwards = server.submit(tasks=[*TASKS[::-1]])
    server.claim().use_setting(SETTING)
    one, other = (_affinities(server, job_id) for job_id in (first, backwards))
    for method, item in other.items():
        assert item["tasks"] == [*TASKS[::-1]]
        assert item["matrix"] == [row[::-1] for row in one[method]["matrix"][::-1]]
    few = server.submit(tasks=[*TASKS[:2]])
    server.claim().use_setting(SETTING)
    assert list(_affinities(server, few)) == ["pairwise"]  # one step was measured among other tasks
    heavy = server.submit(tasks=[{"name": TASKS[0], "weight": 2.0}, TASKS[1]])
    server.claim().use_setting(SETTING)
    assert _affinities(server, heavy) == {}


def test_what_other_jobs_store_after_a_jobs_start_does_not_show(server: Server) -> None:
    job_id = server.submit()
    server.claim().use_setting(SETTING)
    server.submit()
    measure_affinities(server.claim())
    assert "pairwise" not in _affinities(server, job_id)


def test_a_network_that_diverged_measures_nothing(server: Server) -> None:
    job_id = server.submit()
    store = server.claim()
    measure_affinities(store)
    diverged = SubsetResult(
        tasks=(TASKS[0], TASKS[2]),
        weights=(1.0, 1.0),
        seed=0,
        validation={name: {"error": float("nan")} for name in (TASKS[0], TASKS[2])},
        test={},
    )
    store.add_subsets(SETTING, 2, [diverged], 1.0)
    assert _affinities(server, job_id)["pairwise"]["matrix"][0][2] is None


def test_a_job_whose_data_are_not_installed_any_more_says_so(server: Server, problem: Problem) -> None:
    job_id = server.submit()
    measure_affinities(server.claim())
    with server.database.write() as session:
        row = JobRepository(session).get(job_id)
        row.spec = {**row.spec, "dataset": {"source": "gone", "options": {}}}
    assert (
        "'gone' is no data source" in problem(server.client.get(f"/v1/jobs/{job_id}/affinity"), 409)["detail"]
    )


def test_references_are_listed_page_by_page_for_each_job_that_uses_them(server: Server) -> None:
    first = server.submit()
    use_references(server.claim())
    second = server.submit()
    use_references(server.claim(), seeds=1)
    path = f"/v1/jobs/{first}/references"
    page = server.client.get(path, params={"limit": 10}).json()
    rest = server.client.get(path, params={"limit": 10, "cursor": page["next_cursor"]}).json()
    assert (len(page["items"]), len(rest["items"]), rest["next_cursor"]) == (10, 8, None)
    found = page["items"] + rest["items"]
    assert {(item["task"], item["seed"]) for item in found} == {(name, s) for name in TASKS for s in range(3)}
    assert found[0] == {
        "task": TASKS[0],
        "backbone": "mlp",
        "sizes": {"depth": 2, "width": 24},
        "recipe": {"batch_size": 64, "lr": 0.005},
        "epochs": 20,
        "seed": 0,
        "validation": {"error": 0.25, "auc": None},
        "test": {"error": 0.5},
        "device_seconds": 1.5,
    }
    assert server.client.get(f"/v1/jobs/{second}/references").json()["items"] == found[: len(TASKS)]


def test_a_jobs_links_lead_to_both(server: Server) -> None:
    links = server.client.get(f"/v1/jobs/{server.submit()}").json()["links"]
    for name in ("affinity", "references"):
        assert server.client.get(links[name]).json() == {"items": [], "next_cursor": None}


@pytest.mark.parametrize(
    ("path", "status", "pointer"),
    [
        ("job_unknown/affinity", 404, None),
        ("job_unknown/references", 404, None),
        ("{job}/affinity?method=one_step", 400, "/query/method"),
        ("{job}/references?limit=0", 400, "/query/limit"),
        ("{job}/references?cursor=x", 400, "/query/cursor"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(
    server: Server, problem: Problem, path: str, status: int, pointer: str | None
) -> None:
    problem(server.client.get(f"/v1/jobs/{path.format(job=server.submit())}"), status, pointer)
