"""Files of trials as they are served, and what is left of a job that is deleted."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from sqlalchemy import text

from coterie.search.artifacts import Location
from coterie.search.store import (
    Ending,
    FolderArtifacts,
    FrontUpdate,
    JobState,
    Role,
    StoredFile,
    TrialState,
)
from coterie.service import trials
from coterie.service.config import Settings
from coterie.service.routes import file_response
from coterie.service.storage.tables import Table
from tests.service.conftest import Problem, Server, complete, confirm, on_front, open_server, trial
from tests.service.live import LiveServer, finished_job, live_server
from tests.service.side_runs import measure_affinities, use_references

DOCUMENT = json.dumps({"family": "shared", "padding": " " * 3000}).encode()  # as long as is compressed
WEIGHTS = bytes(range(256)) * 1000
FILES = {"architecture": ("architecture.json", DOCUMENT), "model": ("weights.safetensors", WEIGHTS)}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server on a real port with a trial whose files are long."""
    with live_server(tmp_path_factory.mktemp("live") / "data") as live:
        job_id = live.submit()
        store = live.claim()
        store.add_trial(trial(0))
        store.start_trial("trial_0")
        folder = FolderArtifacts(live.settings.artifacts_of(job_id)).trial_folder("trial_0")
        files = {}
        for name, content in FILES.values():
            (folder / name).write_bytes(content)
            files[name] = StoredFile(size=len(content), sha256=hashlib.sha256(content).hexdigest())
        ending = Ending(state=TrialState.COMPLETED, values={"delta_m": 1.0, "macs": 5.0}, files=files)
        store.end_trial("trial_0", ending, FrontUpdate(on_front=True, displaced=(), hypervolume=1.0, size=1))
        yield live


def ask(live: LiveServer, what: str, method: str = "GET", **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return live.client.request(
        method, f"/v1/trials/trial_0/{what}", headers={"Accept-Encoding": "identity", **named}
    )


def tag_of(what: str) -> str:
    return f'"{hashlib.sha256(FILES[what][1]).hexdigest()}"'


every_file = pytest.mark.parametrize("what", FILES)


@every_file
def test_a_file_comes_whole_with_its_checksum_as_its_tag(live: LiveServer, what: str) -> None:
    name, content = FILES[what]
    answer, head = ask(live, what), ask(live, what, "HEAD")
    assert answer.status_code == head.status_code == 200
    assert answer.content == content
    assert head.content == b""
    for headers in (answer.headers, head.headers):
        assert headers["etag"] == tag_of(what)
        assert headers["content-length"] == str(len(content))
        assert headers["accept-ranges"] == "bytes"
        assert headers["content-disposition"] == f'attachment; filename="trial_0.{name}"'


@every_file
@pytest.mark.parametrize(
    ("ranges", "start", "end"),
    [
        ("bytes=10-19", 10, 20),
        ("bytes=100-", 100, None),
        ("bytes=-5", -5, None),
        ("bytes=0-9999999", 0, None),
    ],
)
def test_a_part_of_a_file(live: LiveServer, what: str, ranges: str, start: int, end: int | None) -> None:
    content = FILES[what][1]
    answer = ask(live, what, Range=ranges)
    assert answer.status_code == 206
    assert answer.content == content[start:end]
    first = start % len(content)
    assert answer.headers["content-range"] == (
        f"bytes {first}-{first + len(answer.content) - 1}/{len(content)}"
    )
    assert answer.headers["etag"] == tag_of(what)
    head = ask(live, what, "HEAD", Range=ranges)
    assert head.content == b""


@every_file
def test_nothing_is_read_of_a_file_whose_head_is_asked_for(
    live: LiveServer, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ask(live, what).headers
    monkeypatch.delattr(file_response, "_open")
    head = ask(live, what, "HEAD")
    assert (head.status_code, head.content) == (200, b"")
    assert all(head.headers[name] == whole[name] for name in ("etag", "content-length", "content-type"))


@every_file
def test_a_part_is_never_compressed(live: LiveServer, what: str) -> None:
    answer = ask(live, what, Range="bytes=0-2000", Accept_Encoding="gzip")
    assert answer.status_code == 206
    assert "content-encoding" not in answer.headers
    assert answer.content == FILES[what][1][:2001]


@every_file
def test_several_parts_of_a_file(live: LiveServer, what: str) -> None:
    content = FILES[what][1]
    answer = ask(live, what, Range="bytes=0-9,50-59")
    assert answer.status_code == 206
    boundary = answer.headers["content-type"].partition("multipart/byteranges; boundary=")[2].encode()
    parts = [part.partition(b"\r\n\r\n") for part in answer.content.split(b"--" + boundary)[1:-1]]
    assert [body.removesuffix(b"\r\n") for _, _, body in parts] == [content[:10], content[50:60]]
    total = str(len(content)).encode()
    for (head, _, _), span in zip(parts, (b"0-9", b"50-59"), strict=True):
        assert b"bytes " + span + b"/" + total in head
    assert answer.headers["content-length"] == str(len(answer.content))


@every_file
def test_a_part_beyond_the_end_is_refused_with_the_size(
    live: LiveServer, problem: Problem, what: str
) -> None:
    answer = ask(live, what, Range="bytes=9999999-")
    problem(answer, 416)
    assert answer.headers["content-range"] == f"bytes */{len(FILES[what][1])}"


@every_file
@pytest.mark.parametrize("ranges", ["bytes=abc", "bytes=5-2", "lines=1-2", "5-6"])
def test_what_is_no_part_counts_for_nothing(live: LiveServer, what: str, ranges: str) -> None:
    answer = ask(live, what, Range=ranges)
    assert (answer.status_code, answer.content) == (200, FILES[what][1])


def test_a_file_that_is_deleted_while_it_is_asked_for_is_not_found(
    live: LiveServer, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_file = trials.find_file

    def find_and_delete(*arguments: Any) -> tuple[Location, StoredFile]:
        file, stored = find_file(*arguments)
        return file.with_name("deleted"), stored

    monkeypatch.setattr(trials, "find_file", find_and_delete)
    problem(ask(live, "model"), 404)


@every_file
def test_a_download_goes_on_only_where_the_file_is_the_same(live: LiveServer, what: str) -> None:
    content = FILES[what][1]
    same = ask(live, what, Range="bytes=100-", If_Range=tag_of(what))
    assert (same.status_code, same.content) == (206, content[100:])
    other = ask(live, what, Range="bytes=100-", If_Range='"other"')
    assert (other.status_code, other.content) == (200, content)


@every_file
@pytest.mark.parametrize("form", ["{}", "W/{}", '"other", {}', "*"])
def test_who_has_the_file_is_told_so(live: LiveServer, what: str, form: str) -> None:
    for method in ("GET", "HEAD"):
        answer = ask(live, what, method, If_None_Match=form.format(tag_of(what)))
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["etag"] == tag_of(what)
    for other in ('"other"', f'"{tag_of(what)[1:10]}"', tag_of(what).strip('"')):
        assert ask(live, what, If_None_Match=other).status_code == 200


def test_servers_with_folders_of_their_own_share_the_files(tmp_path: Path) -> None:
    shared, url = tmp_path / "shared", f"sqlite:///{tmp_path}/coterie.db"
    with (
        live_server(tmp_path / "one", artifacts=shared, database_url=url) as one,
        live_server(tmp_path / "two", artifacts=shared, database_url=url) as two,
    ):
        job_id = finished_job(one)
        path = "/v1/trials/trial_0000000000000001/model"
        assert two.client.get(path).content == one.client.get(path).content
        assert two.client.delete(f"/v1/jobs/{job_id}").status_code == 204
        assert one.client.get(path).status_code == 404
        assert list(shared.iterdir()) == []
        assert not (one.settings.data_dir / "jobs").exists()


def test_the_folder_of_files_does_not_depend_on_where_a_process_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COTERIE_ARTIFACTS", "files")
    settings = Settings(data_dir=tmp_path / "data", _env_file=None)
    assert settings.artifacts_of("job_1") == tmp_path / "files" / "job_1"
    assert Settings.model_validate(settings.model_dump(mode="json")) == settings


@pytest.mark.parametrize("job_id", ["", ".", "..", "/etc", "job_1/../..", "job_1/x", "job_\x00", "job_", "x"])
def test_no_id_leads_out_of_the_folder(tmp_path: Path, job_id: str) -> None:
    settings = Settings(data_dir=tmp_path, _env_file=None)
    for ask_for in (settings.artifacts_of, settings.log_of):
        with pytest.raises(ValueError, match="job_id: must be"):
            ask_for(job_id)


@pytest.mark.parametrize("days", [0, -1, float("nan"), float("inf")])
def test_a_retention_is_a_time(tmp_path: Path, days: float) -> None:
    for name in ("retention_days", "event_retention_days"):
        with pytest.raises(ValidationError):
            Settings(data_dir=tmp_path, _env_file=None, **{name: days})  # type: ignore[arg-type]


@pytest.fixture(params=["sqlite", "postgres"])
def on_each(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """A server on each kind of database."""
    url = None
    if request.param == "postgres":
        engine = request.getfixturevalue("postgres_database").engine
        url = engine.url.render_as_string(hide_password=False)
    with open_server(tmp_path / "data", database_url=url, webhook_allow_private=True) as server:
        yield server


def rows(server: Server) -> dict[str, int]:
    with server.database.read() as session:
        return {
            name: session.execute(text(f"SELECT count(*) FROM {name}")).scalar_one()
            for name in Table.metadata.tables
        }


def test_a_deleted_job_leaves_what_others_may_know_and_nothing_else(on_each: Server) -> None:
    server = on_each
    hook = {"url": "http://127.0.0.1:9/", "kinds": ["job", "front"]}
    assert server.client.post("/v1/webhooks", json=hook).status_code == 201
    before = rows(server)
    job_id = server.submit(name="old")
    store = server.claim()
    store.set_reference_point({"delta_m": -10.0, "macs": 1000.0})
    artifacts = FolderArtifacts(server.settings.artifacts_of(job_id))
    complete(store, 0, 5.0, 500.0, on_front(7500.0, 1), artifacts=artifacts)
    confirm(store, "trial_0", Role.POINT, 4.0, 500.0, 0)
    use_references(store)
    measure_affinities(store)
    store.finish(JobState.SUCCEEDED, None)
    filled = rows(server)
    own = ["attempts", "trials", "trial_values", "measurements", "front_history", "job_references"]
    own += ["confirmations", "events", "deliveries", "jobs"]
    shared = ["reference_networks", "subset_networks", "affinities", "tenant_usage"]
    for name in (*own, *shared):
        assert filled[name] > before[name], name
    assert artifacts.root.exists()
    assert server.client.delete(f"/v1/jobs/{job_id}").status_code == 204
    after = rows(server)
    assert {name: after[name] for name in own} == {name: before[name] for name in own}
    assert {name: after[name] for name in shared} == {name: filled[name] for name in shared}
    assert not artifacts.root.exists()
    [change] = server.client.get("/v1/audit?action=job.delete").json()["items"]
    assert (change["target"], change["detail"]) == (job_id, {"name": "old", "bytes": 27})
    for path in ("", "/trials", "/events?timeout_seconds=0", "/logs"):
        assert server.client.get(f"/v1/jobs/{job_id}{path}").status_code == 404


@pytest.mark.parametrize("state", ["queued", "running", "paused"])
def test_only_a_job_that_has_ended_is_deleted(server: Server, problem: Problem, state: str) -> None:
    job_id = server.submit()
    if state == "running":
        server.claim()
    elif state == "paused":
        server.client.post(f"/v1/jobs/{job_id}/pause")
    detail = problem(server.client.delete(f"/v1/jobs/{job_id}"), 409)["detail"]
    assert f"is {state}: only a job that has ended can be deleted" in detail
    assert server.client.get(f"/v1/jobs/{job_id}").json()["state"] == state


def test_a_job_is_deleted_once(server: Server, problem: Problem) -> None:
    job_id = server.submit()
    server.client.post(f"/v1/jobs/{job_id}/cancel")
    assert server.client.delete(f"/v1/jobs/{job_id}").status_code == 204
    problem(server.client.delete(f"/v1/jobs/{job_id}"), 404)


def test_files_that_can_not_be_removed_keep_no_job(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = server.submit()
    server.client.post(f"/v1/jobs/{job_id}/cancel")
    folder = server.settings.artifacts_of(job_id)
    folder.mkdir(parents=True)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("shutil.rmtree", refuse)
    assert server.client.delete(f"/v1/jobs/{job_id}").status_code == 204
    assert f"files of {job_id}, which was deleted, are left to `coterie gc`" in caplog.text
    assert folder.exists()


def test_a_full_disk_is_no_fault_of_the_network(
    live: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: Problem
) -> None:
    converter = tmp_path / "converter"
    converter.write_text("#!/bin/sh\necho '[Errno 28] No space left on device: /secret' >&2\nexit 2\n")
    converter.chmod(0o700)
    monkeypatch.setattr("coterie.service.conversion.sys.executable", str(converter))
    document = problem(ask(live, "model?format=onnx"), 507)
    assert document["type"] == "urn:coterie:problem:disk-full"
    assert "/secret" not in str(document)
    monkeypatch.undo()
    assert (
        ask(live, "model?format=onnx").status_code == 409
    )  # its files are no network; nothing half made is left
