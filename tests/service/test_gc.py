"""What `coterie gc` removes, what it never touches, and what it says."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, update

from coterie.search.store import Ending, FolderArtifacts, FrontUpdate, JobState, StoredFile, TrialState
from coterie.service import files
from coterie.service.files import (
    ORPHAN_SECONDS,
    Kind,
    Removed,
    WrongDatabase,
    claim_root,
    collect_garbage,
)
from coterie.service.storage.files import FileRepository
from coterie.service.storage.store import SqlTrialStore
from coterie.service.storage.tables import DeliveryRow, EventRow, JobRow, TrialRow
from tests.service.conftest import Server, open_server, trial

TEMPORARY = f".weights.safetensors.{'a' * 32}"
NAMES = ("architecture.json", "weights.safetensors")


@pytest.fixture(params=["sqlite", "postgres"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """A server on each kind of database."""
    url = None
    if request.param == "postgres":
        engine = request.getfixturevalue("postgres_database").engine
        url = engine.url.render_as_string(hide_password=False)
    with open_server(tmp_path / "data", database_url=url, webhook_allow_private=True) as server:
        yield server


def run_job(server: Server, state: JobState | None = JobState.SUCCEEDED) -> tuple[str, FolderArtifacts]:
    """A job with a completed trial, with all that a driver leaves; None leaves it running."""
    job_id = server.submit()
    store = server.claim()
    store.set_reference_point({"delta_m": -10.0, "macs": 1000.0})
    artifacts = FolderArtifacts(server.settings.artifacts_of(job_id))
    finish_trial(store, artifacts, trial_of(job_id, 0))
    for folder in (artifacts.checkpoint_folder("x"), artifacts.scratch() / "tune", artifacts.root):
        write(folder / "driver.json")
    write(artifacts.root / "worker.log")
    if state is not None:
        store.finish(state, None)
    return job_id, artifacts


def trial_of(job_id: str, number: int) -> str:
    return f"trial_{job_id[4:]}_{number}"


def finish_trial(store: SqlTrialStore, artifacts: FolderArtifacts, trial_id: str) -> None:
    number = int(trial_id.rpartition("_")[2])
    store.add_trial(replace(trial(number), id=trial_id))
    store.start_trial(trial_id)
    for name in NAMES:
        write(artifacts.trial_folder(trial_id) / name)
    end_trial(store, trial_id)


def end_trial(store: SqlTrialStore, trial_id: str) -> None:
    stored = {name: StoredFile(size=5, sha256="ab" * 32) for name in NAMES}
    ending = Ending(state=TrialState.COMPLETED, values={"delta_m": 1.0, "macs": 5.0}, files=stored)
    store.end_trial(trial_id, ending, FrontUpdate(on_front=True, displaced=(), hypervolume=1.0, size=1))


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"12345")
    return path


def age(root: Path, seconds: float = 10 * ORPHAN_SECONDS) -> None:
    """Let all that is there have been so for a while."""
    at = time.time() - seconds
    for path in (*root.rglob("*"), root):
        os.utime(path, (at, at), follow_symlinks=False)


def tree(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def collect(server: Server, *, dry_run: bool = False, **settings: Any) -> list[Removed]:
    """What is removed; what a dry run told before, which changed nothing, is the same."""
    chosen = server.settings.model_copy(update=settings)
    before = tree(chosen.jobs_dir)
    told = list(collect_garbage(chosen, server.database, dry_run=True))
    assert tree(chosen.jobs_dir) == before
    if dry_run:
        return told
    found = list(collect_garbage(chosen, server.database))
    assert found == told
    assert list(collect_garbage(chosen, server.database)) == []
    return found


def test_where_there_is_nothing_nothing_is_removed(server: Server) -> None:
    assert collect(server) == []


@pytest.mark.parametrize("state", ["running", "paused", "queued"])
def test_of_a_job_that_has_not_ended_only_old_temporary_files_are_removed(server: Server, state: str) -> None:
    job_id, artifacts = run_job(server, None)
    if state != "running":
        server.client.post(f"/v1/jobs/{job_id}/pause")
    if state == "queued":
        server.client.post(f"/v1/jobs/{job_id}/resume")
    write(artifacts.trial_folder("trial_unknown") / "weights.safetensors")
    write(artifacts.scratch() / TEMPORARY)  # Ray Tune's, whatever it is
    kept = tree(artifacts.root)
    part = write(artifacts.checkpoint_folder("x") / "checkpoint.safetensors.123.part")
    write(artifacts.trial_folder("trial_unknown") / TEMPORARY)
    age(artifacts.root)
    young = write(artifacts.checkpoint_folder("x") / "checkpoint.safetensors.124.part")
    assert [(item.kind, item.size) for item in collect(server)] == [(Kind.TEMPORARY, 5)] * 2
    assert not part.exists()
    assert tree(artifacts.root) - {str(young.relative_to(artifacts.root))} == kept
    assert young.exists()


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED])
def test_of_a_job_that_has_ended_its_networks_and_its_log_stay(server: Server, state: JobState) -> None:
    job_id, artifacts = run_job(server, state)
    trial_id = trial_of(job_id, 0)
    folder = artifacts.trial_folder(trial_id)
    write(folder / "network.onnx")
    write(folder / "weights.old")
    write(folder / TEMPORARY)
    write(artifacts.trial_folder("trial_unknown") / "weights.safetensors")
    age(artifacts.root)
    found = {(item.kind, item.name.removeprefix(f"{job_id}/")) for item in collect(server)}
    assert found == {
        (Kind.WORKING, "checkpoints"),
        (Kind.WORKING, "scratch"),
        (Kind.WORKING, "driver.json"),
        (Kind.TRIAL_FILES, "trials/trial_unknown"),
        (Kind.TRIAL_FILES, f"trials/{trial_id}/weights.old"),
        (Kind.TEMPORARY, f"trials/{trial_id}/{TEMPORARY}"),
    }
    assert tree(artifacts.root) == {
        *("worker.log", "trials", f"trials/{trial_id}"),
        *(f"trials/{trial_id}/{name}" for name in (*NAMES, "network.onnx")),
    }


def test_nothing_that_is_young_is_removed(server: Server) -> None:
    _, artifacts = run_job(server)
    orphan = server.settings.artifacts_of("job_unknown")
    for folder in (artifacts.trial_folder("trial_unknown"), orphan / "trials" / "trial_1"):
        write(folder / "weights.safetensors")
    age(server.settings.jobs_dir)
    for folder in (
        artifacts.root / "checkpoints",
        artifacts.root / "scratch",
        artifacts.trial_folder("trial_unknown"),
        orphan / "trials" / "trial_1",
    ):
        write(folder / "just_now")
    write(artifacts.root / "driver.json")
    before = tree(server.settings.jobs_dir)
    assert collect(server) == []
    assert tree(server.settings.jobs_dir) == before


def test_files_of_a_job_that_was_deleted_are_removed(server: Server) -> None:
    run_job(server)
    folder = server.settings.artifacts_of("job_unknown")
    write(folder / "trials" / "trial_1" / "weights.safetensors")
    write(folder / "worker.log")
    age(folder)
    assert collect(server) == [Removed(Kind.JOB_FOLDER, "job_unknown", 10)]
    assert not folder.exists()


def test_what_is_not_ours_stays(server: Server, tmp_path: Path) -> None:
    run_job(server)
    elsewhere = write(tmp_path / "elsewhere" / "file")
    root = server.settings.jobs_dir
    write(root / "lost+found" / TEMPORARY)
    write(root / "job_file")
    (root / "job_link").symlink_to(elsewhere.parent)
    gone = root / "job_gone"
    gone.mkdir()
    (gone / "link").symlink_to(elsewhere.parent)
    age(root)
    age(elsewhere.parent)
    assert [item.name for item in collect(server) if "/" not in item.name] == ["job_gone"]
    assert elsewhere.exists()
    assert {"lost+found", "job_file", "job_link"} <= tree(root)


def test_files_of_another_database_are_not_taken_for_orphans(server: Server) -> None:
    folder = server.settings.artifacts_of("job_of_another_database")
    write(folder / "worker.log")
    age(folder)
    with pytest.raises(WrongDatabase, match="None of the 1 jobs with files"):
        list(collect_garbage(server.settings, server.database))
    assert folder.exists()


def test_a_root_says_whose_it_is_and_another_database_removes_nothing_there(
    server: Server, tmp_path: Path
) -> None:
    claim_root(server.settings, server.database)
    claim_root(server.settings, server.database)
    job_id, _ = run_job(server)
    write(server.settings.artifacts_of("job_gone") / "worker.log")
    age(server.settings.jobs_dir)
    with open_server(tmp_path / "other", artifacts=str(server.settings.jobs_dir)) as other:
        claim_root(other.settings, other.database)
        with pytest.raises(WrongDatabase, match=r"another database, .* remove database\.id"):
            list(collect_garbage(other.settings, other.database))
    assert "job_gone" in [removed.name for removed in collect(server)]
    assert job_id in tree(server.settings.jobs_dir)


def call_around(
    patch: pytest.MonkeyPatch, owner: Any, name: str, call: int, *, before: bool, action: Callable[[], None]
) -> None:
    """Do something just before or after the `call`-th call of a function."""
    function, calls = getattr(owner, name), count(1)

    def wrapped(*arguments: Any) -> Any:
        due = next(calls) == call
        if due and before:
            action()
        result = function(*arguments)
        if due and not before:
            action()
        return result

    patch.setattr(owner, name, wrapped)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [(files, "_list", 1), (FileRepository, "states", 2), (FileRepository, "files", 1)],
)
def test_a_trial_that_ends_between_the_list_and_the_look_loses_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, before: bool
) -> None:
    """Its files are old, as on a machine whose clock is slow: only the order of the steps saves them."""
    job_id, artifacts = run_job(server, None)
    store = SqlTrialStore(server.database, job_id, 1)
    late = trial_of(job_id, 1)
    store.add_trial(replace(trial(1), id=late))
    store.start_trial(late)
    for file in NAMES:
        write(artifacts.trial_folder(late) / file)
    age(artifacts.root)

    def end() -> None:
        end_trial(store, late)
        store.finish(JobState.SUCCEEDED, None)

    call_around(monkeypatch, owner, name, call, before=before, action=end)
    removed = list(collect_garbage(server.settings, server.database))
    assert {item.kind for item in removed} <= {Kind.WORKING}
    for file in NAMES:
        assert (artifacts.trial_folder(late) / file).exists()
    with server.database.read() as session:
        assert FileRepository(session).states([job_id]) == {job_id: "succeeded"}


def test_a_job_that_is_new_while_others_are_looked_at_loses_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_job(server)
    made: list[FolderArtifacts] = []

    def make() -> None:
        made.append(run_job(server, None)[1])
        age(made[0].root)

    call_around(monkeypatch, files, "_job_folders", 1, before=True, action=make)
    assert list(collect_garbage(server.settings, server.database)) == []
    assert (made[0].root / "worker.log").exists()


def test_beside_a_job_that_runs_no_network_is_ever_lost(server: Server) -> None:
    """Trials end, and jobs with them, while one sweep follows another, with every file taken for old."""
    done: list[tuple[FolderArtifacts, str]] = []
    over = threading.Event()
    faults: list[BaseException] = []

    def sweep() -> None:
        try:
            while not over.is_set():
                list(collect_garbage(server.settings, server.database))
        except BaseException as error:  # told in the test's own thread
            faults.append(error)

    run_job(server)
    sweeper = threading.Thread(target=sweep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "ORPHAN_SECONDS", -3600.0)
        sweeper.start()
        try:
            for _ in range(4):
                job_id = server.submit()
                store = server.claim()
                store.set_reference_point({"delta_m": -10.0, "macs": 1000.0})
                artifacts = FolderArtifacts(server.settings.artifacts_of(job_id))
                for number in range(5):
                    finish_trial(store, artifacts, trial_of(job_id, number))
                    done.append((artifacts, trial_of(job_id, number)))
                store.finish(JobState.SUCCEEDED, None)
        finally:
            over.set()
            sweeper.join()
    assert faults == []
    for artifacts, trial_id in done:
        assert {path.name for path in artifacts.trial_folder(trial_id).iterdir()} == set(NAMES)


def end_days_ago(server: Server, job_id: str, days: float) -> None:
    with server.database.write() as session:
        at = datetime.now(UTC) - timedelta(days=days)
        session.execute(update(JobRow).where(JobRow.id == job_id).values(ended_at=at))


def rows_of(server: Server, table: type, job_id: str) -> int:
    with server.database.read() as session:
        query = select(func.count()).select_from(table).where(table.job_id == job_id)  # type: ignore[attr-defined]
        return session.scalar(query) or 0


def test_jobs_that_ended_long_ago_are_deleted_if_that_is_set(server: Server) -> None:
    old, old_files = run_job(server)
    new, new_files = run_job(server)
    running, running_files = run_job(server, None)
    end_days_ago(server, old, 31)
    end_days_ago(server, new, 29)
    with server.database.write() as session:  # started long ago, and not ended
        at = datetime.now(UTC) - timedelta(days=99)
        session.execute(update(JobRow).where(JobRow.id == running).values(started_at=at, created_at=at))
    assert collect(server) == []
    [removed] = collect(server, retention_days=30)
    assert (removed.kind, removed.name) == (Kind.JOB, old)
    assert removed.size == 5 * 6
    assert server.client.get(f"/v1/jobs/{old}").status_code == 404
    assert not old_files.root.exists()
    for job_id, artifacts in ((new, new_files), (running, running_files)):
        assert server.client.get(f"/v1/jobs/{job_id}").status_code == 200
        assert artifacts.root.exists()
    [change] = server.client.get("/v1/audit?action=job.delete").json()["items"]
    assert change["target"] == old
    assert change["detail"]["retention_days"] == 30


def events_of(server: Server, job_id: str, after: int = 0) -> list[dict[str, Any]]:
    path = f"/v1/jobs/{job_id}/events?after={after}&timeout_seconds=5"
    lines = server.client.get(path).text.splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def test_events_that_are_old_go_and_a_stream_stays_what_it_was_without_them(server: Server) -> None:
    job_id, _ = run_job(server)
    other, _ = run_job(server)
    before = events_of(server, job_id)
    assert {event["kind"] for event in before} == {"job", "trial", "front"}
    end_days_ago(server, job_id, 8)
    assert collect(server, event_retention_days=9) == []
    [removed] = collect(server, event_retention_days=7)
    passing = [event for event in before if event["kind"] in ("trial", "measurement")]
    assert removed == Removed(Kind.EVENTS, job_id, events=len(passing))
    left = [event for event in before if event not in passing]
    for after in range(before[-1]["sequence"] + 1):
        expected = [event for event in left if event["sequence"] > after]
        began = time.monotonic()
        assert events_of(server, job_id, after) == expected
        assert time.monotonic() - began < 2.5  # the stream ends by itself
    assert server.client.get(f"/v1/jobs/{job_id}/events?after=999").status_code == 400
    assert len(events_of(server, other)) == len(before)
    with server.database.read() as session:
        assert session.scalar(select(func.count()).select_from(TrialRow)) == 2


def test_events_that_a_webhook_may_still_be_told_stay(server: Server) -> None:
    made = server.client.post("/v1/webhooks", json={"url": "http://127.0.0.1:9/", "kinds": ["trial"]})
    assert made.status_code == 201
    job_id, _ = run_job(server)
    assert rows_of(server, DeliveryRow, job_id)
    events = rows_of(server, EventRow, job_id)
    end_days_ago(server, job_id, 8)
    assert collect(server, event_retention_days=7) == []
    assert rows_of(server, EventRow, job_id) == events
    server.client.delete(f"/v1/webhooks/{made.json()['id']}")
    assert [item.kind for item in collect(server, event_retention_days=7)] == [Kind.EVENTS]


def test_what_can_not_be_removed_is_told_and_the_rest_is_removed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_job(server)
    orphans = [server.settings.artifacts_of(f"job_unknown_{number}") for number in (1, 2)]
    for folder in orphans:
        write(folder / "worker.log")
        age(folder)
    remove: Callable[[Path], None] = files._remove

    def refuse(path: Path) -> None:
        if path == orphans[0]:
            raise PermissionError(13, "Permission denied", str(path))
        remove(path)

    monkeypatch.setattr(files, "_remove", refuse)
    first, second = collect_garbage(server.settings, server.database)
    assert first.problem
    assert "Permission denied" in first.problem
    assert second.problem is None
    assert [folder.exists() for folder in orphans] == [True, False]


def gc(server: Server, *arguments: str, **settings: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "coterie.service.cli", "gc", "--data-dir", str(server.settings.data_dir)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COTERIE_")}
    environment |= {"COTERIE_DATABASE_URL": server.settings.url}
    environment |= {f"COTERIE_{name.upper()}": value for name, value in settings.items()}
    return subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("server", ["sqlite"], indirect=True)
def test_the_command_says_what_it_removed_and_a_dry_run_the_same(server: Server) -> None:
    old, _ = run_job(server)
    run_job(server)
    end_days_ago(server, old, 8)
    orphan = server.settings.artifacts_of("job_unknown")
    write(orphan / "worker.log").write_bytes(bytes(2_500_000))
    age(orphan)
    dry = gc(server, "--dry-run", retention_days="7")
    assert dry.returncode == 0, dry.stderr
    assert orphan.exists()
    assert dry.stderr.splitlines()[-1] == "This was a dry run: nothing was removed."
    listed = json.loads(gc(server, "--dry-run", "--json", retention_days="7").stdout)
    assert listed["dry_run"] is True
    assert [(item["kind"], item["name"]) for item in listed["removed"]] == [
        ("job that ended long ago", old),
        ("files of no job", "job_unknown"),
    ]
    done = gc(server, retention_days="7")
    assert done.stdout == dry.stdout
    assert done.stderr == "2 things, 2.5 MB\n"
    assert "2.5 MB  files of no job  job_unknown\n" in done.stdout
    assert not orphan.exists()


@pytest.mark.parametrize("server", ["sqlite"], indirect=True)
def test_the_command_refuses_what_can_not_be_meant(server: Server) -> None:
    folder = server.settings.artifacts_of("job_of_another_database")
    write(folder / "worker.log")
    refused = gc(server)
    assert refused.returncode == 2
    assert "Is it the right one" in refused.stderr
    bad = gc(server, retention_days="0")
    assert bad.returncode == 2
    assert "retention_days" in bad.stderr
    assert folder.exists()
