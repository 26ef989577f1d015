from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from coterie.search.store import Ending, TrialState
from coterie.service.storage.store import SqlTrialStore
from tests.service.conftest import Problem, Server, trial

TRIAL_FIELDS = {
    *(
        "id",
        "job_id",
        "number",
        "state",
        "reason",
        "family",
        "backbone",
        "candidate",
        "origin",
        "seed",
        "grouping",
        "values",
    ),
    *("tasks", "test", "epochs", "device_seconds", "worker", "on_front", "started_at", "ended_at", "links"),
}


def _numbers(answer: httpx.Response) -> list[int]:
    return [item["number"] for item in answer.json()["items"]]


def test_a_completed_trial_shows_what_it_reached(searched: tuple[Server, str]) -> None:
    server, job_id = searched
    found = server.client.get("/v1/trials/trial_0").json()
    assert set(found) == TRIAL_FIELDS
    assert (found["job_id"], found["number"], found["state"], found["on_front"]) == (
        job_id,
        0,
        "completed",
        True,
    )
    assert found["values"] == {
        "delta_m": 5.0,
        "macs": 500.0,
        "params": 250.0,
        "latency_ms": None,
        "peak_memory_mb": None,
        "train_device_seconds": None,
    }
    assert found["test"]["delta_m"] == 4.0
    assert found["tasks"] == {"left_parity": {"validation": {"error": 0.25}, "test": {"error": 0.5}}}
    assert (found["grouping"], found["epochs"], found["device_seconds"]) == ([["left_parity"]], 2, 2.0)
    assert (found["candidate"], found["seed"], found["worker"]) == ({"lr": 0.005}, 7, "host:2")
    assert found["origin"] == "tpe"
    assert found["links"] == {
        "self": "/v1/trials/trial_0",
        "job": f"/v1/jobs/{job_id}",
        "measurements": "/v1/trials/trial_0/measurements",
        "architecture": "/v1/trials/trial_0/architecture",
        "model": "/v1/trials/trial_0/model",
    }


def test_a_trial_that_is_not_measured_has_nulls_for_what_it_will_have(searched: tuple[Server, str]) -> None:
    found = searched[0].client.get("/v1/trials/trial_3").json()
    assert (found["state"], found["grouping"], found["ended_at"]) == ("running", None, None)
    assert found["values"] == dict.fromkeys(
        ["delta_m", "macs", "params", "latency_ms", "peak_memory_mb", "train_device_seconds"]
    )
    assert (found["links"]["model"], found["links"]["architecture"]) == (None, None)


def test_trials_are_listed_by_number_either_way_page_by_page(searched: tuple[Server, str]) -> None:
    server, job_id = searched
    path = f"/v1/jobs/{job_id}/trials"
    assert _numbers(server.client.get(path)) == [0, 1, 2, 3]
    for sort, expected in (("number", [[0, 1, 2], [3]]), ("-number", [[3, 2, 1], [0]])):
        first = server.client.get(path, params={"sort": sort, "limit": 3})
        second = server.client.get(
            path, params={"sort": sort, "limit": 3, "cursor": first.json()["next_cursor"]}
        )
        assert [_numbers(first), _numbers(second)] == expected
        assert second.json()["next_cursor"] is None


def test_trials_are_filtered_by_state_and_family(searched: tuple[Server, str]) -> None:
    server, job_id = searched
    path = f"/v1/jobs/{job_id}/trials"
    assert _numbers(server.client.get(path, params={"state": "running"})) == [3]
    assert _numbers(server.client.get(path, params={"family": "dmtg"})) == [2]
    assert _numbers(server.client.get(path, params={"family": "dmtg", "state": "running"})) == []


@pytest.fixture
def stopped(searched: tuple[Server, str]) -> tuple[Server, str]:
    """Of the job's trials one was stopped early, when it was better than every other in everything."""
    server, job_id = searched
    values = {"delta_m": 99.0, "macs": 1.0, "params": 1.0, "latency_ms": 0.1}
    SqlTrialStore(server.database, job_id, 1).end_trial(
        "trial_3",
        Ending(
            state=TrialState.STOPPED,
            reason="at epoch 2 it was not among the best 1/3",
            values=values,
            epochs=2,
            device_seconds=2.0,
        ),
        None,
    )
    return server, job_id


def test_a_stopped_trial_shows_why_and_what_it_had_reached(stopped: tuple[Server, str]) -> None:
    server, job_id = stopped
    [found] = server.client.get(f"/v1/jobs/{job_id}/trials", params={"state": "stopped"}).json()["items"]
    assert found == server.client.get("/v1/trials/trial_3").json()
    assert (found["state"], found["reason"]) == ("stopped", "at epoch 2 it was not among the best 1/3")
    assert (found["values"]["delta_m"], found["values"]["macs"], found["epochs"]) == (99.0, 1.0, 2)
    assert (found["test"]["delta_m"], found["tasks"], found["on_front"]) == (None, {}, False)
    assert (found["links"]["architecture"], found["links"]["model"]) == (None, None)


@pytest.mark.parametrize(
    ("path", "params"),
    [
        ("front", {}),
        ("front", {"objectives": "delta_m,macs", "max_macs": "1e9"}),
        ("front", {"objectives": "latency_ms"}),
        ("front", {"feasible": "false", "objectives": "macs"}),
        ("best", {}),
        ("best", {"metric": "macs"}),
        ("best", {"max_macs": "2"}),
        ("front/history", {}),
    ],
)
def test_a_stopped_trial_is_on_no_front_and_never_the_best(
    stopped: tuple[Server, str], path: str, params: dict[str, Any]
) -> None:
    server, job_id = stopped
    assert "trial_3" not in server.client.get(f"/v1/jobs/{job_id}/{path}", params=params).text


@pytest.mark.parametrize("what", ["model", "architecture"])
def test_a_stopped_trial_has_no_network(stopped: tuple[Server, str], problem: Problem, what: str) -> None:
    document = problem(stopped[0].client.get(f"/v1/trials/trial_3/{what}"), 404)
    assert "is stopped: only a completed trial" in document["detail"]


def test_measurements_come_by_epoch(searched: tuple[Server, str]) -> None:
    client = searched[0].client
    first = client.get("/v1/trials/trial_0/measurements", params={"limit": 1}).json()
    [item] = first["items"]
    assert set(item) == {"epoch", "values", "tasks", "device_seconds", "at"}
    assert (item["epoch"], item["values"], item["tasks"]) == (
        1,
        {"total_error": 1.0},
        {"left_parity": {"error": 1.0}},
    )
    second = client.get("/v1/trials/trial_0/measurements", params={"cursor": first["next_cursor"]}).json()
    assert [item["epoch"] for item in second["items"]] == [2]
    assert second["next_cursor"] is None


def test_the_model_comes_with_its_hash_and_length(searched: tuple[Server, str]) -> None:
    client = searched[0].client
    answer = client.get("/v1/trials/trial_0/model")
    assert (answer.status_code, answer.content) == (200, b"weights")
    assert (answer.headers["etag"], answer.headers["content-length"]) == (f'"{"ab" * 32}"', "7")
    again = client.get("/v1/trials/trial_0/model", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/v1/trials/trial_0/model", params={"format": "safetensors"}).content == b"weights"


def test_the_architecture_is_json(searched: tuple[Server, str]) -> None:
    answer = searched[0].client.get("/v1/trials/trial_0/architecture")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {"family": "shared"}


def test_an_unknown_format_is_refused(searched: tuple[Server, str], problem: Problem) -> None:
    answer = searched[0].client.get("/v1/trials/trial_0/model", params={"format": "pickle"})
    assert "'safetensors', 'onnx' or 'pt2'" in problem(answer, 400, "/query/format")["detail"]


def test_a_network_that_can_not_be_converted_is_a_problem_without_a_trace(
    searched: tuple[Server, str], problem: Problem
) -> None:
    """Its files are no network, which the process that converts them finds out."""
    server, job_id = searched
    document = problem(server.client.get("/v1/trials/trial_0/model", params={"format": "onnx"}), 409)
    assert document["type"] == "urn:coterie:problem:not-convertible"
    assert document["detail"].startswith("there is no onnx of it: architecture.json: must be")
    assert str(server.settings.data_dir) not in str(document)
    folder = server.settings.artifacts_of(job_id) / "trials" / "trial_0"
    assert sorted(file.name for file in folder.iterdir()) == ["architecture.json", "weights.safetensors"]


@pytest.mark.parametrize("what", ["model", "architecture"])
def test_a_trial_that_has_not_completed_has_no_network(
    searched: tuple[Server, str], problem: Problem, what: str
) -> None:
    document = problem(searched[0].client.get(f"/v1/trials/trial_3/{what}"), 404)
    assert "is running: only a completed trial" in document["detail"]


def test_a_file_that_is_gone_is_said_to_be_gone(searched: tuple[Server, str], problem: Problem) -> None:
    server, job_id = searched
    (server.settings.artifacts_of(job_id) / "trials" / "trial_0" / "weights.safetensors").unlink()
    assert "gone" in problem(server.client.get("/v1/trials/trial_0/model"), 404)["detail"]


@pytest.mark.parametrize("by", ["another size", "a link", "a linked folder", "a folder", "a device"])
@pytest.mark.parametrize("form", ["safetensors", "onnx"])
def test_a_file_that_is_not_the_trials_is_not_sent(
    searched: tuple[Server, str], problem: Problem, by: str, form: str, tmp_path: Path
) -> None:
    server, job_id = searched
    file = server.settings.artifacts_of(job_id) / "trials" / "trial_0" / "weights.safetensors"
    other = tmp_path / "elsewhere" / file.name
    other.parent.mkdir()
    if by == "a linked folder":
        file.parent.rename(other.parent / "trial")
        file.parent.symlink_to(other.parent / "trial")
    else:
        file.rename(other)
        if by == "a link":
            file.symlink_to(other)
        elif by == "a device":
            file.symlink_to("/dev/zero")
        elif by == "a folder":
            file.mkdir()
        else:
            file.write_bytes(b"other weights")
    answer = server.client.get("/v1/trials/trial_0/model", params={"format": form})
    assert "is not what the trial wrote" in problem(answer, 404)["detail"]


def test_trials_of_two_jobs_do_not_mix(searched: tuple[Server, str]) -> None:
    server, job_id = searched
    other = server.submit()
    server.claim().add_trial(replace(trial(0), id="trial_other"))
    assert _numbers(server.client.get(f"/v1/jobs/{other}/trials")) == [0]
    assert len(_numbers(server.client.get(f"/v1/jobs/{job_id}/trials"))) == 4
