from typing import Any

import pytest

from coterie.search.store import Role, TrialState
from coterie.service.storage.store import SqlTrialStore
from tests.service.conftest import Problem, Server, complete, confirm, dominated, on_front


def _front(server: Server, job_id: str, **params: Any) -> dict[str, Any]:
    answer = server.client.get(f"/v1/jobs/{job_id}/front", params=params)
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()
    return document


def _ids(front: dict[str, Any]) -> list[str]:
    return [point["trial_id"] for point in front["points"]]


def test_the_front_is_what_the_search_stored(searched: tuple[Server, str]) -> None:
    front = _front(*searched)
    assert front["objectives"] == [
        {"metric": "delta_m", "direction": "maximize"},
        {"metric": "macs", "direction": "minimize"},
    ]
    assert front["reference_point"] == {"delta_m": -10.0, "macs": 1000.0}
    assert front["hypervolume"] == 11500.0
    assert _ids(front) == ["trial_0", "trial_2"]
    assert front["points"][1] == {
        "trial_id": "trial_2",
        "values": {"delta_m": 0.0, "macs": 100.0, "params": 50.0, "latency_ms": None},
        "family": "dmtg",
        "grouping": [["left_parity"]],
        "test": {"delta_m": -1.0},
        "confirmed": None,
    }


def test_a_confirmed_point_says_what_fresh_seeds_gave(searched: tuple[Server, str]) -> None:
    server, job_id = searched
    store = SqlTrialStore(server.database, job_id, 1)
    for seed, (point, shared) in enumerate([(4.0, 1.0), (5.0, 1.5), (6.0, 0.5)]):
        confirm(store, "trial_0", Role.POINT, point, 500.0, seed)
        confirm(store, "trial_0", Role.SHARED, shared, 510.0, seed)
    for seed in range(2):
        confirm(store, "trial_2", Role.POINT, 1.0, 100.0, seed)
    first, second = (point["confirmed"] for point in _front(server, job_id)["points"])
    assert (first["seeds"], first["failed"]) == (3, 0)
    assert first["validation"]["delta_m"] == {"mean": 5.0, "std": 1.0}
    assert first["test"]["delta_m"] == {"mean": 4.0, "std": 1.0}
    over_shared = first["over_shared"]
    assert (over_shared["metric"], over_shared["gain"], over_shared["shared_macs"]) == ("delta_m", 4.0, 510.0)
    assert over_shared["low"] < 4.0 < over_shared["high"]
    assert over_shared["low"] > 0
    assert not over_shared["within_noise"]
    assert (second["seeds"], second["over_shared"]) == (2, None)
    # Another front over the same trials says the same of them.
    assert _front(server, job_id, objectives="delta_m")["points"][0]["confirmed"] == first


def test_a_front_without_limits_of_its_own_is_the_stored_one_however_it_is_asked_for(
    searched: tuple[Server, str],
) -> None:
    server, job_id = searched
    stored = _front(server, job_id)
    assert _front(server, job_id, objectives="delta_m,macs") == stored
    assert _front(server, job_id, feasible="false") == stored
    assert _front(server, job_id, max_macs=1e9) == stored


def test_limits_make_a_front_of_what_keeps_them(searched: tuple[Server, str]) -> None:
    front = _front(*searched, max_macs=400)
    assert (_ids(front), front["hypervolume"]) == (["trial_2"], 9000.0)
    assert _ids(_front(*searched, max_params=60)) == ["trial_2"]
    assert _ids(_front(*searched, max_latency_ms=1)) == []  # never measured, so never kept


def test_other_objectives_make_another_front(searched: tuple[Server, str]) -> None:
    front = _front(*searched, objectives="params")
    assert (_ids(front), front["hypervolume"], front["reference_point"]) == (["trial_2"], None, None)
    front = _front(*searched, objectives="delta_m")
    assert (_ids(front), front["hypervolume"]) == (["trial_0"], 15.0)
    assert _ids(_front(*searched, objectives="latency_ms")) == []


def test_the_jobs_constraints_hold_unless_they_are_forgotten(server: Server) -> None:
    job_id = server.submit(constraints=[{"metric": "params", "max": 2000}])
    store = server.claim()
    complete(store, 0, 5.0, 5000.0, dominated(0.0, 0))
    complete(store, 1, 1.0, 3000.0, on_front(1.0, 1))
    assert _ids(_front(server, job_id)) == ["trial_1"]
    assert _ids(_front(server, job_id, max_macs=1e9)) == ["trial_1"]
    assert _ids(_front(server, job_id, feasible="false")) == ["trial_0", "trial_1"]
    assert server.client.get(f"/v1/jobs/{job_id}/best").json()["id"] == "trial_1"


def test_the_history_has_a_step_for_each_completed_trial(searched: tuple[Server, str]) -> None:
    server, job_id = searched
    path = f"/v1/jobs/{job_id}/front/history"
    first = server.client.get(path, params={"limit": 2}).json()
    second = server.client.get(path, params={"limit": 2, "cursor": first["next_cursor"]}).json()
    steps = first["items"] + second["items"]
    assert [(step["trial_id"], step["number"], step["hypervolume"], step["size"]) for step in steps] == [
        ("trial_0", 0, 7500.0, 1),
        ("trial_1", 1, 7500.0, 1),
        ("trial_2", 2, 11500.0, 2),
    ]
    assert second["next_cursor"] is None


@pytest.mark.parametrize(
    ("params", "best"),
    [
        ({}, "trial_0"),
        ({"metric": "delta_m", "max_macs": 499}, "trial_2"),
        ({"metric": "macs"}, "trial_2"),
        ({"metric": "params", "max_params": 1000}, "trial_2"),
        ({"max_macs": 500}, "trial_0"),
    ],
)
def test_the_best_is_the_best_within_the_limits(
    searched: tuple[Server, str], params: dict[str, Any], best: str
) -> None:
    server, job_id = searched
    answer = server.client.get(f"/v1/jobs/{job_id}/best", params=params)
    assert answer.json() == server.client.get(f"/v1/trials/{best}").json()


def test_where_none_fits_the_nearest_is_named(searched: tuple[Server, str], problem: Problem) -> None:
    server, job_id = searched
    document = problem(server.client.get(f"/v1/jobs/{job_id}/best", params={"max_macs": 90}), 404)
    assert "trial_2 with macs 100" in document["detail"]
    assert document["nearest"]["trial_id"] == "trial_2"
    assert document["nearest"]["values"]["macs"] == 100.0


def test_before_a_trial_has_completed_there_is_no_best(server: Server, problem: Problem) -> None:
    job_id = server.submit()
    assert "no completed trial" in problem(server.client.get(f"/v1/jobs/{job_id}/best"), 404)["detail"]
    assert _front(server, job_id)["points"] == []


def test_of_equal_trials_the_cheaper_is_best(server: Server) -> None:
    job_id = server.submit()
    store = server.claim()
    complete(store, 0, 5.0, 500.0, on_front(1.0, 1))
    complete(store, 1, 5.0, 400.0, on_front(1.0, 1, "trial_0"))
    found = server.client.get(f"/v1/jobs/{job_id}/best").json()
    assert (found["id"], found["state"]) == ("trial_1", TrialState.COMPLETED)


@pytest.mark.parametrize(
    ("path", "pointer"),
    [
        ("front?objectives=beauty", "/query/objectives"),
        ("front?objectives=macs,,params", "/query/objectives"),
        ("front?max_macs=-1", "/query/max_macs"),
        ("front?max_macs=nan", "/query/max_macs"),
        ("front?max_macs=1e999", "/query/max_macs"),
        ("front?feasible=perhaps", "/query/feasible"),
        ("front?limit=5", "/query/limit"),
        ("best?metric=beauty", "/query/metric"),
        ("best?metric=", "/query/metric"),
        ("front/history?limit=0", "/query/limit"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(
    searched: tuple[Server, str], problem: Problem, path: str, pointer: str
) -> None:
    server, job_id = searched
    problem(server.client.get(f"/v1/jobs/{job_id}/{path}"), 400, pointer)
