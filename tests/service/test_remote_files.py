"""Files of jobs in S3: served, converted, logged, deleted and tidied up as those in a folder are."""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from pydantic import ValidationError

from coterie.search.artifacts import artifacts_at, list_files
from coterie.search.store import (
    Ending,
    FilesUnavailable,
    FrontUpdate,
    JobState,
    StoredFile,
    TrialState,
)
from coterie.service import files, job_log
from coterie.service.config import Settings
from coterie.service.dispatcher import _write_private
from coterie.service.files import (
    ORPHAN_SECONDS,
    OWNER_FILE,
    Kind,
    Removed,
    WrongDatabase,
    claim_root,
    collect_garbage,
)
from coterie.service.job_log import kept_log
from tests.service.conftest import Problem, Server, open_server, trial
from tests.service.live import LEFT, RIGHT, _write_network

WEIGHTS = bytes(range(256)) * 20_000
DOCUMENT = b'{"family": "shared"}'


@pytest.fixture
def server(s3: str, tmp_path: Path) -> Iterator[Server]:
    """A server on whose disk no file of a job ever is."""
    with open_server(tmp_path / "data", artifacts=s3) as server:
        yield server
        assert not (tmp_path / "data" / "jobs").exists()


def keep(server: Server, number: int = 0, **contents: bytes) -> str:
    """A succeeded job with one completed trial, whose files are these, by the names of their kinds."""
    job_id = server.submit()
    store = server.claim()
    name = f"trial_{number}"
    store.add_trial(trial(number))
    store.start_trial(name)
    with artifacts_at(server.settings.artifacts_of(job_id)).keep_trial(name) as folder:
        if not contents:
            _write_network(folder, "grouped", [LEFT, RIGHT], 8)
        for kind, content in contents.items():
            file = {"weights": "weights.safetensors", "architecture": "architecture.json"}[kind]
            (folder / file).write_bytes(content)
        stored = {file.name: _describe(file.read_bytes()) for file in folder.iterdir()}
    ending = Ending(state=TrialState.COMPLETED, values={"delta_m": 1.0, "macs": 5.0}, files=stored)
    store.set_reference_point({"delta_m": -10.0, "macs": 1000.0})
    store.end_trial(name, ending, FrontUpdate(on_front=True, displaced=(), hypervolume=1.0, size=1))
    store.finish(JobState.SUCCEEDED, None)
    return job_id


def _describe(content: bytes) -> StoredFile:
    return StoredFile(size=len(content), sha256=hashlib.sha256(content).hexdigest())


def names(server: Server) -> list[str]:
    root = server.settings.jobs_dir
    return [str(file.location).removeprefix(f"{root}/") for file in list_files(root)]


def model(server: Server, method: str = "GET", **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.client.request(method, "/v1/trials/trial_0/model", headers=named)


def test_a_network_is_served_whole_and_in_parts(server: Server, problem: Problem) -> None:
    keep(server, weights=WEIGHTS, architecture=DOCUMENT)
    whole, tag = model(server), f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'
    assert (whole.status_code, whole.content, whole.headers["etag"]) == (200, WEIGHTS, tag)
    assert whole.headers["content-length"] == str(len(WEIGHTS))
    assert whole.headers["content-disposition"] == 'attachment; filename="trial_0.weights.safetensors"'
    assert server.client.get("/v1/trials/trial_0/architecture").json() == {"family": "shared"}
    last = len(WEIGHTS) - 1
    for asked, start, end in (("1000000-2999999", 10**6, 3 * 10**6), ("-5", last - 4, None), ("0-", 0, None)):
        part = model(server, Range=f"bytes={asked}", If_Range=tag)
        assert (part.status_code, part.content) == (206, WEIGHTS[start:end])
        first = start + len(part.content) - 1
        assert part.headers["content-range"] == f"bytes {start}-{first}/{len(WEIGHTS)}"
    several = model(server, Range="bytes=0-9,50-59")
    assert several.status_code == 206
    assert WEIGHTS[:10] in several.content
    assert WEIGHTS[50:60] in several.content
    assert several.headers["content-length"] == str(len(several.content))
    problem(model(server, Range="bytes=99999999-"), 416)
    assert model(server, Range="lines=5-").content == WEIGHTS
    assert model(server, Range="bytes=5-", If_Range='"other"').content == WEIGHTS
    assert model(server, If_None_Match=tag).status_code == 304
    head = model(server, "HEAD")
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", tag)


def test_what_is_gone_or_damaged_is_said_to_be_so(
    server: Server, problem: Problem, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = keep(server, weights=WEIGHTS, architecture=DOCUMENT)
    file = server.settings.artifacts_of(job_id) / "trials" / "trial_0" / "weights.safetensors"
    file.write_bytes(WEIGHTS[:-1])
    assert "not what the trial wrote" in problem(model(server), 404)["detail"]
    file.unlink()
    assert "is gone" in problem(model(server), 404)["detail"]
    assert caplog.text.count(f"{file}") == 2


def test_a_place_that_does_not_answer_is_no_fault_of_the_client(
    server: Server, problem: Problem, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = keep(server, weights=WEIGHTS, architecture=DOCUMENT)
    place = server.settings.artifacts_of(job_id)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    for name in ("info", "find", "ls"):
        monkeypatch.setattr(place.fs, name, refuse)
    for path in ("/v1/trials/trial_0/model", f"/v1/jobs/{job_id}/logs"):
        document = problem(server.client.get(path), 503)
        assert document["type"] == "urn:coterie:problem:files-unavailable"
        assert "s3" not in str(document)
    assert "Access Denied" in caplog.text
    with pytest.raises(FilesUnavailable):
        list(collect_garbage(server.settings, server.database))


def test_a_network_is_converted_once_and_kept_beside_its_weights(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = keep(server)
    path = "/v1/trials/trial_0/model?format=pt2"
    first = server.client.get(path)
    assert first.status_code == 200, first.text
    assert f"{job_id}/trials/trial_0/network.pt2" in names(server)
    monkeypatch.setattr("coterie.service.conversion._run", None)
    assert server.client.get(path).content == first.content
    assert first.headers["etag"] == f'"{hashlib.sha256(first.content).hexdigest()}"'


def test_the_log_of_a_job_is_that_of_all_its_attempts(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_log, "KEEP_SECONDS", 0.02)
    job_id = server.submit()
    log, path = server.settings.log_of(job_id), f"/v1/jobs/{job_id}/logs"
    assert server.client.get(path).text == ""
    for attempt in (1, 2, 10):
        with kept_log(log, attempt) as file:
            file.write_text(f"attempt {attempt}\n")
            while not server.client.get(path).text.endswith(f"attempt {attempt}\n"):  # while it runs
                time.sleep(0.01)
            with file.open("a") as opened:
                opened.write("its end\n")
        assert not file.exists()
    lines = ["attempt 1", "its end", "attempt 2", "its end", "attempt 10", "its end"]
    assert server.client.get(path).text.splitlines() == lines
    assert server.client.get(path, params={"tail": 3}).text.splitlines() == lines[-3:]


@pytest.mark.usefixtures("s3_server")
def test_a_log_that_can_not_be_kept_ends_no_driver(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings(data_dir=tmp_path, artifacts="s3://there-is-no-such-bucket/x", _env_file=None)
    with kept_log(settings.log_of("job_1"), 1) as file:
        file.write_text("attempt 1\n")
    assert "the log can't be kept" in caplog.text


def test_a_deleted_job_takes_its_files_with_it_and_no_others(server: Server) -> None:
    for number in (0, 1):
        deleted = keep(server, number, weights=b"weights", architecture=DOCUMENT)
    before = names(server)
    assert server.client.delete(f"/v1/jobs/{deleted}").status_code == 204
    assert names(server) == [name for name in before if not name.startswith(deleted)]
    assert len(names(server)) == 2


def test_what_nobody_needs_is_removed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = keep(server, weights=b"weights", architecture=DOCUMENT)
    place = server.settings.artifacts_of(job_id)
    artifacts = artifacts_at(place)
    _write_private(place / "driver.json", "{}")
    with kept_log(server.settings.log_of(job_id), 1) as file:
        file.write_text("attempt 1\n")
    with artifacts.keep_checkpoint("trial_9") as folder:
        (folder / "checkpoint.safetensors").write_bytes(b"123")
    with artifacts.keep_trial("trial_9") as folder:
        (folder / "weights.safetensors").write_bytes(b"12345")
    with artifacts_at(server.settings.artifacts_of("job_unknown")).keep_trial("trial_1") as folder:
        (folder / "weights.safetensors").write_bytes(b"1234567")
    (server.settings.jobs_dir / "of_others" / "file").write_text("x")
    everything = names(server)
    assert list(collect_garbage(server.settings, server.database)) == []  # all of it is young
    later = time.time() + 2 * ORPHAN_SECONDS
    monkeypatch.setattr(files.time, "time", lambda: later)
    expected = [
        Removed(Kind.WORKING, f"{job_id}/checkpoints", 3),
        Removed(Kind.WORKING, f"{job_id}/driver.json", 2),
        Removed(Kind.TRIAL_FILES, f"{job_id}/trials/trial_9", 5),
        Removed(Kind.JOB_FOLDER, "job_unknown", 7),
    ]
    assert list(collect_garbage(server.settings, server.database, dry_run=True)) == expected
    assert names(server) == everything
    assert list(collect_garbage(server.settings, server.database)) == expected
    assert names(server) == [
        f"{job_id}/trials/trial_0/architecture.json",
        f"{job_id}/trials/trial_0/weights.safetensors",
        f"{job_id}/worker.log/000001",
        "of_others/file",
    ]


def test_files_of_another_database_are_not_taken_for_orphans(server: Server) -> None:
    assert list(collect_garbage(server.settings, server.database)) == []
    (server.settings.artifacts_of("job_of_another") / "driver.json").write_text("{}")
    with pytest.raises(WrongDatabase):
        list(collect_garbage(server.settings, server.database))
    claim_root(server.settings, server.database)
    assert list(collect_garbage(server.settings, server.database, dry_run=True)) == []
    owner = server.settings.jobs_dir / OWNER_FILE
    owner.write_text(f"{owner.read_text()}_2")
    with pytest.raises(WrongDatabase, match="another database"):
        list(collect_garbage(server.settings, server.database))


def test_a_driver_is_told_the_same_place(s3: str, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, artifacts=f"{s3}/", _env_file=None)
    told = Settings.model_validate(settings.model_dump(mode="json"))
    assert told == settings
    assert str(told.artifacts_of("job_1")) == f"{s3}/job_1"


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("nowhere://bucket/x", "a URL that fsspec writes to"),
        ("s3://name:secret@bucket/x", "must hold no password"),
        ("gs://bucket/x", "install gcsfs"),
        ("file:///data", "a folder by its path"),
        ("https://example.org/x", "a folder by its path"),
        ("zip://a", "a URL that fsspec writes to"),
    ],
)
def test_a_place_that_can_not_be_is_refused(tmp_path: Path, place: str, why: str) -> None:
    with pytest.raises(ValidationError, match=why) as refused:
        Settings(data_dir=tmp_path, artifacts=place, _env_file=None)
    assert refused.value.error_count() == 1
