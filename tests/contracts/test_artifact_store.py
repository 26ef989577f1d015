"""What every `ArtifactStore` must do."""

import pickle
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from coterie.search.artifacts import (
    Location,
    RemoteArtifacts,
    artifacts_at,
    list_files,
    location_of,
    reaching,
)
from coterie.search.store import ArtifactStore, FilesUnavailable

LEADS_ELSEWHERE = [
    "",
    ".",
    "..",
    "../trial_1",
    "/etc",
    "trial_1/x",
    "trial_1\\",
    "trial\x00",
    "trial 1",
    ".x",
    "-x",
]


@pytest.fixture(params=["folder", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a job's artifacts are to be."""
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/job_1"
    return str(tmp_path / "job_1") if request.param == "folder" else f"memory://{uuid.uuid4().hex}/job_1"


@pytest.fixture
def artifacts(place: str) -> ArtifactStore:
    return artifacts_at(location_of(place))


def content_of(place: str) -> dict[str, bytes]:
    """What is kept, by its path."""
    location = location_of(place)
    if isinstance(location, Path):
        files = [path for path in location.rglob("*") if path.is_file()]
        return {str(path.relative_to(location)): path.read_bytes() for path in files}
    found = [file.location for file in list_files(location)]
    return {path.path.removeprefix(f"{location.path}/"): path.read_bytes() for path in found}


def save_checkpoint(artifacts: ArtifactStore, content: bytes, trial_id: str = "trial_1") -> None:
    with artifacts.keep_checkpoint(trial_id) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoint").write_bytes(content)


def saved(artifacts: ArtifactStore, trial_id: str = "trial_1") -> bytes | None:
    with artifacts.saved_checkpoint(trial_id) as folder:
        file = folder / "checkpoint"
        return file.read_bytes() if file.exists() else None


def test_what_a_trial_writes_is_kept(artifacts: ArtifactStore, place: str) -> None:
    weights = bytes(range(256)) * 30_000
    with artifacts.keep_trial("trial_1") as folder:
        (folder / "weights.safetensors").write_bytes(weights)
        (folder / "architecture.json").write_bytes(b"{}")
    assert content_of(place) == {
        "trials/trial_1/weights.safetensors": weights,
        "trials/trial_1/architecture.json": b"{}",
    }


def test_a_trial_that_is_run_again_replaces_what_it_left(artifacts: ArtifactStore, place: str) -> None:
    for content in (b"old", b"newer"):
        with artifacts.keep_trial("trial_1") as folder:
            (folder / "weights.safetensors").write_bytes(content)
    assert content_of(place) == {"trials/trial_1/weights.safetensors": b"newer"}


def test_a_checkpoint_takes_the_place_of_the_one_before(artifacts: ArtifactStore) -> None:
    assert saved(artifacts) is None
    for content in (b"first", b"second one"):
        save_checkpoint(artifacts, content)
        assert saved(artifacts) == content
    assert saved(artifacts, "trial_2") is None


def test_a_save_that_fails_leaves_the_checkpoint_before(artifacts: ArtifactStore) -> None:
    """In a folder it is the training that replaces the file at last."""
    save_checkpoint(artifacts, b"first")
    with suppress(KeyboardInterrupt), artifacts.keep_checkpoint("trial_1") as folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".part").write_bytes(b"half of")
        raise KeyboardInterrupt
    assert saved(artifacts) == b"first"


def test_a_checkpoint_is_dropped_as_often_as_one_likes(artifacts: ArtifactStore, place: str) -> None:
    for trial_id in ("trial_1", "trial_10"):
        save_checkpoint(artifacts, b"content", trial_id)
    for _ in range(2):
        artifacts.drop_checkpoint("trial_1")
    assert content_of(place) == {"checkpoints/trial_10/checkpoint": b"content"}


def test_what_only_a_running_job_needs_is_dropped(artifacts: ArtifactStore, place: str) -> None:
    artifacts.drop_working_files()
    with artifacts.workspace() as folder:
        (folder / "tune").mkdir()
        (folder / "tune" / "state").write_bytes(b"state")
    save_checkpoint(artifacts, b"content")
    with artifacts.keep_trial("trial_1") as folder:
        (folder / "architecture.json").write_bytes(b"{}")
    for _ in range(2):
        artifacts.drop_working_files()
    assert content_of(place) == {"trials/trial_1/architecture.json": b"{}"}


def test_each_process_sees_at_once_what_another_wrote(artifacts: ArtifactStore, place: str) -> None:
    other: ArtifactStore = pickle.loads(pickle.dumps(artifacts))
    assert saved(other) is None
    save_checkpoint(artifacts, b"first")
    assert saved(other) == b"first"
    other.drop_checkpoint("trial_1")
    assert saved(artifacts) is None


USES: list[Callable[[ArtifactStore, str], object]] = [
    lambda artifacts, name: artifacts.keep_trial(name).__enter__(),
    lambda artifacts, name: artifacts.keep_checkpoint(name).__enter__(),
    lambda artifacts, name: artifacts.saved_checkpoint(name).__enter__(),
    lambda artifacts, name: artifacts.drop_checkpoint(name),
]


@pytest.mark.parametrize("name", LEADS_ELSEWHERE)
@pytest.mark.parametrize("use", USES)
def test_no_name_leads_elsewhere(
    artifacts: ArtifactStore, use: Callable[[ArtifactStore, str], object], name: str
) -> None:
    with pytest.raises(ValueError, match="id: must be of letters"):
        use(artifacts, name)


@pytest.mark.usefixtures("s3_server")
def test_a_place_that_can_not_be_reached_is_told_as_that() -> None:
    artifacts = artifacts_at(location_of("s3://there-is-no-such-bucket/job_1"))
    with pytest.raises(FilesUnavailable, match="can't be reached in s3://there-is-no-such-bucket"):
        save_checkpoint(artifacts, b"content")
    artifacts.drop_working_files()  # nothing is left there


def test_what_is_not_dropped_is_left_to_gc_and_ends_no_search(caplog: pytest.LogCaptureFixture) -> None:
    class Away:
        path, parent = "bucket/job_1", "s3://bucket"

        @property
        def fs(self) -> None:
            raise TimeoutError("no answer")

        def __truediv__(self, name: str) -> "Away":
            return self

    RemoteArtifacts(Away()).drop_checkpoint("trial_1")  # type: ignore[arg-type]
    assert "the artifacts can't be reached in s3://bucket; working files are left there" in caplog.text


def test_what_is_expected_of_a_place_is_no_fault_of_it(tmp_path: Path) -> None:
    location: Location = tmp_path
    with pytest.raises(FileNotFoundError), reaching(location, FileNotFoundError):
        raise FileNotFoundError
    with pytest.raises(FilesUnavailable), reaching(location):
        raise FileNotFoundError
