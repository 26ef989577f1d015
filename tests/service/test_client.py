"""The Python client, against a real server."""

import hashlib
import http.server
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from onnxruntime import InferenceSession

from coterie.search.spec import JobSpec
from coterie.search.store import JobState
from coterie.service import client as client_module
from coterie.service.client import ApiError, Client, Unreachable
from tests.service.conftest import SPEC
from tests.service.live import ALL, LEFT, RIGHT, VERDICT, LiveServer, finished_job, live_server


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveServer]:
    with live_server(tmp_path / "data") as server:
        yield server


@pytest.fixture
def coterie(live: LiveServer) -> Iterator[Client]:
    with Client(live.url) as client:
        yield client


def test_a_mapping_and_a_job_spec_are_the_same_job(coterie: Client) -> None:
    mapped = coterie.submit(SPEC)
    typed = coterie.submit(JobSpec.model_validate(SPEC))
    assert mapped.state == "queued"
    assert mapped.document["spec"] == typed.document["spec"]
    assert mapped.id != typed.id


def test_the_same_key_gives_the_same_job(coterie: Client) -> None:
    first = coterie.submit(SPEC, idempotency_key="once")
    assert coterie.submit(SPEC, idempotency_key="once").id == first.id
    with pytest.raises(ApiError) as refused:
        coterie.submit({**SPEC, "name": "another"}, idempotency_key="once")
    assert refused.value.status == 409


def test_a_refusal_points_to_each_fault(coterie: Client) -> None:
    with pytest.raises(ApiError, match="/budget/trials") as refused:
        coterie.submit({**SPEC, "budget": {"trials": -1}, "surprise": 1})
    assert refused.value.status == 422
    assert {fault["pointer"] for fault in refused.value.errors} == {"/budget/trials", "/surprise"}


def test_what_is_no_json_number_is_refused_by_the_server(coterie: Client) -> None:
    with pytest.raises(ApiError, match="/budget/seconds"):
        coterie.submit({**SPEC, "budget": {"seconds": float("nan")}})


def test_all_jobs_are_listed_over_several_pages(
    live: LiveServer, coterie: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "PAGE_SIZE", 2)
    ids = [live.submit(name=f"job {number}") for number in range(5)]
    assert [job.id for job in coterie.jobs()] == ids[::-1]
    assert [job.id for job in coterie.jobs(limit=3)] == ids[:1:-1]
    assert [job.id for job in coterie.jobs(name="job 1")] == [ids[1]]
    assert list(coterie.jobs(state="running")) == []


def test_trials_are_listed_over_several_pages(
    live: LiveServer, coterie: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "PAGE_SIZE", 3)
    job = coterie.job(finished_job(live))
    assert [trial.family for trial in job.trials()] == ["single", "grouped", "shared", "dmtg"]
    assert [trial.document["number"] for trial in job.trials(sort="-number", limit=2)] == [3, 2]
    assert [trial.family for trial in job.trials(family="grouped", state="completed")] == ["grouped"]


def test_the_front_and_its_history(live: LiveServer, coterie: Client) -> None:
    job = coterie.job(finished_job(live))
    front = job.front()
    assert [objective["metric"] for objective in front["objectives"]] == ["delta_m", "macs"]
    assert {point["family"] for point in front["points"]} == {"single", "grouped", "shared"}
    cheap = job.front(max_macs=2000)
    assert {point["family"] for point in cheap["points"]} == {"shared"}
    alone = job.front(objectives=["params"], feasible=False)
    assert {point["family"] for point in alone["points"]} == {"shared", "dmtg"}
    assert [step["hypervolume"] for step in job.history()] == [1.0, 2.0, 3.0, 4.0]


def test_the_best_trial_keeps_the_limits(live: LiveServer, coterie: Client) -> None:
    job = coterie.job(finished_job(live))
    assert job.best().family == "single"
    best = job.best(metric="delta_m", max_macs=3000)
    assert best.grouping == [LEFT, RIGHT]
    assert best.values["delta_m"] == 4.0
    assert best.test["delta_m"] == 3.0
    with pytest.raises(ApiError, match="nearest") as refused:
        job.best(max_params=1)
    assert refused.value.status == 404


def test_waiting_ends_with_the_job(live: LiveServer, coterie: Client) -> None:
    job = coterie.submit(SPEC)
    store = live.claim()
    states = []

    def note(seen: client_module.Job) -> None:
        states.append(seen.state)
        if len(states) == 2:
            store.finish(JobState.FAILED, "nothing completed")

    assert job.wait(0.01, note) is job
    assert states == ["running", "running", "failed"]
    assert job.ended
    assert job.reason == "nothing completed"


def test_waiting_has_an_end_of_its_own(coterie: Client) -> None:
    job = coterie.submit(SPEC)
    with pytest.raises(TimeoutError, match=f"{job.id} is still queued"):
        job.wait(0.01, timeout=0.05)


def test_a_job_is_cancelled_once(coterie: Client) -> None:
    job = coterie.submit(SPEC)
    assert job.cancel().state == "cancelled"
    assert job.refresh().ended
    with pytest.raises(ApiError) as refused:
        job.cancel()
    assert refused.value.status == 409


def test_a_paused_job_is_waited_for_and_goes_on(live: LiveServer, coterie: Client) -> None:
    job = coterie.submit(SPEC)
    live.claim()
    assert job.pause().state == "paused"
    assert not job.ended
    with pytest.raises(TimeoutError, match=f"{job.id} is still paused"):
        job.wait(0.01, timeout=0.05)
    with pytest.raises(ApiError, match="is paused: only a queued or running job") as refused:
        job.pause()
    assert refused.value.status == 409
    assert job.resume().state == "queued"
    with pytest.raises(ApiError, match="only a paused job"):
        job.resume()
    store = live.claim()
    store.finish(JobState.FAILED, "nothing completed")
    assert job.wait(0.01).state == "failed"


def test_what_was_measured_beside_the_trials(
    live: LiveServer, coterie: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "PAGE_SIZE", 7)
    job = coterie.job(finished_job(live))
    assert [item["method"] for item in job.affinity()] == ["one_step", "pairwise"]
    assert [(item["task"], item["seed"]) for item in job.references()] == [
        (task, seed) for seed in range(3) for task in ALL
    ]
    assert job.document["verdict"]["words"] == VERDICT


def test_the_end_of_a_drivers_log(live: LiveServer, coterie: Client) -> None:
    job = coterie.submit(SPEC)
    folder = live.settings.artifacts_of(job.id)
    folder.mkdir(parents=True)
    (folder / "worker.log").write_text("one\ntwo\nthree\n")
    assert job.logs().splitlines() == ["one", "two", "three"]
    assert job.logs(tail=2).splitlines() == ["two", "three"]


def test_a_downloaded_network_is_the_exported_one(live: LiveServer, coterie: Client, tmp_path: Path) -> None:
    trial = coterie.job(finished_job(live)).best()
    folder = trial.download(tmp_path / "deep" / "network")
    assert {file.name for file in folder.iterdir()} == {"architecture.json", "weights.safetensors"}
    assert trial.architecture()["family"] == "single"
    network = trial.load()
    x = torch.rand(2, 12, 12)
    assert set(network(x)) == {*LEFT, *RIGHT}
    assert not network.training
    from coterie.models.export import load_architecture

    again = load_architecture(folder)(x)
    assert all(torch.equal(again[name], value) for name, value in network(x).items())


def test_a_whole_network_comes_as_onnx_and_as_a_program_of_torch_export(
    live: LiveServer, coterie: Client, tmp_path: Path
) -> None:
    trial = coterie.job(finished_job(live)).best()
    x = torch.rand(3, 12, 12)
    expected = trial.load()(x)

    program = torch.export.load(trial.download_model(tmp_path / "network.pt2", "pt2")).module()(x)
    session = InferenceSession(trial.download_model(tmp_path / "network.onnx", "onnx"))
    answers = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    by_onnx = dict(zip((output.name for output in session.get_outputs()), answers, strict=True))
    assert set(program) == set(by_onnx) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(program[name], value)
        torch.testing.assert_close(torch.from_numpy(by_onnx[name]), value)


def test_a_form_is_made_once_and_known_by_its_hash(live: LiveServer, coterie: Client) -> None:
    path = f"{live.url}/v1/trials/{coterie.job(finished_job(live)).best().id}/model?format=pt2"
    first = httpx.get(path, timeout=60)
    assert first.headers["etag"] == f'"{hashlib.sha256(first.content).hexdigest()}"'
    again = httpx.get(path, headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_a_download_that_fails_leaves_what_was_there(
    live: LiveServer, coterie: Client, tmp_path: Path
) -> None:
    job_id = finished_job(live)
    trial = coterie.job(job_id).best()
    folder = trial.download(tmp_path / "network")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for file in (live.settings.artifacts_of(job_id)).rglob("weights.safetensors"):
        file.unlink()
    with pytest.raises(ApiError) as refused:
        trial.download(folder)
    assert refused.value.status == 404
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_job_is_deleted(live: LiveServer, coterie: Client) -> None:
    job = coterie.job(live.submit())
    with pytest.raises(ApiError, match="only a job that has ended"):
        job.delete()
    job.cancel().delete()
    with pytest.raises(ApiError) as gone:
        coterie.job(job.id)
    assert gone.value.status == 404


def test_the_catalogue(coterie: Client) -> None:
    assert [item["name"] for item in coterie.datasets()] == ["digits"]
    assert {"single", "shared", "grouped", "dmtg"} <= {item["name"] for item in coterie.families()}
    assert {"mlp", "cnn", "resnet20", "vit_tiny"} <= {item["name"] for item in coterie.backbones()}
    assert "delta_m" in {item["name"] for item in coterie.metrics()}


def test_health_and_readiness(live: LiveServer, coterie: Client) -> None:
    assert coterie.health()["status"] == "ok"
    assert coterie.ready()["status"] == "ready"
    live.dispatcher.state = (False, "Ray is starting")
    with pytest.raises(ApiError) as refused:
        coterie.ready()
    assert refused.value.status == 503


@pytest.mark.parametrize("words", ["job_0", "../datasets", "a/b?c#d", "job_é", "%2e%2e"])
def test_an_unknown_id_is_not_found_whatever_is_in_it(coterie: Client, words: str) -> None:
    with pytest.raises(ApiError) as refused:
        coterie.job(words)
    assert refused.value.status == 404


def test_nobody_at_the_address() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with Client(url) as client, pytest.raises(Unreachable, match=f"No server answers at {url}"):
            client.health()


def test_a_server_that_never_answers() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Client(url, timeout=0.1) as client, pytest.raises(Unreachable, match="did not answer in time"):
            client.health()


class _Elsewhere(http.server.BaseHTTPRequestHandler):
    """Some other program's server."""

    def do_GET(self) -> None:
        self.send_response(404 if "jobs" in self.path else 200)
        self.end_headers()
        self.wfile.write(b"<html>hello</html>")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


def test_a_server_that_is_not_coterie() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Elsewhere) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with Client(f"http://127.0.0.1:{server.server_port}") as client:
            with pytest.raises(Unreachable, match="is no Coterie server"):
                client.health()
            with pytest.raises(ApiError, match="no Coterie server") as refused:
                client.job("job_1")
        assert refused.value.status == 404
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host", "http://", "http://host:port", "/path"])
def test_an_address_that_is_none_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="base_url: must be like"):
        Client(url)


def test_an_environments_proxy_is_not_asked(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with Client(live.url) as client:
        assert client.health()["status"] == "ok"


def test_importing_the_client_imports_nothing_heavy() -> None:
    code = (
        "import sys, coterie.service.client; "
        "print([name for name in ('torch', 'ray', 'pydantic', 'sqlalchemy') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
