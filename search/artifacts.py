"""Artifacts where no folder reaches: in an object store such as S3, through fsspec."""

import logging
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from socket import gethostname
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias

from coterie.search.store import (
    CHECKPOINTS,
    TRIALS,
    ArtifactStore,
    FilesUnavailable,
    FolderArtifacts,
    checked_id,
)

if TYPE_CHECKING:
    from upath import UPath

Location: TypeAlias = "Path | UPath"  # a folder of this machine or one that all share, or a place by its URL

logger = logging.getLogger(__name__)

# fsspec's names of what is a folder, or can't be written.
_NO_STORES = frozenset({"file", "local", "http", "https", "data"})


def location_of(text: str) -> Location:
    """A folder by its path, or a place by its URL, as fsspec takes it.

    Raises:
        ValueError: If there is no such kind of place.
        ImportError: If what reads that kind of place is not installed.
    """
    protocol, found, _ = text.partition("://")
    if not found:
        return Path(text)
    if protocol in _NO_STORES:
        raise ValueError(f"nothing is kept at {protocol}://; a folder is given by its path")
    from upath import UPath  # of an extra, as what it reads is

    # What other processes write is to be seen at once.
    location = UPath(text, use_listings_cache=False)
    try:
        location.fs  # noqa: B018 - what it needs is imported here
    except ImportError:
        raise
    except Exception as error:  # each kind of place has errors of its own
        raise ValueError(f"{protocol}:// can't be used: {error}") from error
    return location


def artifacts_at(location: Location) -> ArtifactStore:
    """The artifacts of the one job whose they are."""
    return FolderArtifacts(location) if isinstance(location, Path) else RemoteArtifacts(location)


@contextmanager
def local_copy(location: Location, names: Collection[str] = ()) -> Iterator[Path]:
    """A folder of this machine with the files of a place, which has no folders in it, while the block lasts.

    A folder is given as it is; what is written to the copy of another place is lost. With `names` only files
    of these names are needed.

    Raises:
        FilesUnavailable: If the place can't be reached.
    """
    if isinstance(location, Path):
        yield location
        return
    with temporary_folder() as folder:
        for file in list_files(location):
            if not names or file.location.name in names:
                with reaching(location):
                    location.fs.get_file(file.location.path, str(folder / file.location.name))
        yield folder


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder of this machine while the block lasts.

    Raises:
        FilesUnavailable: If there can be none, as on a full disk.
    """
    try:
        made = TemporaryDirectory(prefix="coterie-")
    except OSError as error:  # with no word of a full disk: "No usable temporary directory"
        raise FilesUnavailable(f"{gethostname()} has no place for temporary files: {error}") from error
    with made as folder:
        yield Path(folder)


@dataclass(frozen=True)
class FoundFile:
    """A file in a place: its size in bytes, and when it was put there, in Unix time."""

    location: "UPath"
    size: int
    changed: float


def list_files(location: "UPath") -> list[FoundFile]:
    """What is below a place, by name; nothing where it does not exist.

    Raises:
        FilesUnavailable: If the place can't be reached.
    """
    with reaching(location):
        found = location.fs.find(location.path, detail=True)
    below = f"{location.path.rstrip('/')}/"
    return [
        FoundFile(location / path.removeprefix(below), about["size"], _changed(about))
        for path, about in sorted(found.items())
    ]


def put_file(file: Path, location: "UPath") -> None:
    """Write a file of this machine to a place, whole or not at all.

    Raises:
        FilesUnavailable: If the place can't be reached.
    """
    with reaching(location):
        location.fs.put_file(str(file), location.path)


def remove_files(location: "UPath") -> None:
    """Remove a file, or all that is below a place, if there is anything.

    Raises:
        FilesUnavailable: If the place can't be reached.
    """
    with suppress(FileNotFoundError), reaching(location, FileNotFoundError):
        location.fs.rm(location.path, recursive=True)


@dataclass(frozen=True)
class RemoteArtifacts:
    """Artifacts of one job in a place that fsspec reads and writes; picklable.

    Trials work in a temporary folder and put whole files. Each checkpoint is put as it is saved, as in a
    folder, so that an epoch that was recorded is never trained again.
    """

    root: "UPath"

    @contextmanager
    def keep_trial(self, trial_id: str) -> Iterator[Path]:  # noqa: D102 - ArtifactStore says it
        with self._put_into(self.root / TRIALS / checked_id(trial_id)) as folder:
            yield folder

    @contextmanager
    def keep_checkpoint(self, trial_id: str) -> Iterator[Path]:  # noqa: D102
        with self._put_into(self._checkpoint(trial_id)) as folder:
            yield folder

    @contextmanager
    def saved_checkpoint(self, trial_id: str) -> Iterator[Path]:  # noqa: D102
        with local_copy(self._checkpoint(trial_id)) as folder:
            yield folder

    def drop_checkpoint(self, trial_id: str) -> None:  # noqa: D102
        self._drop(self._checkpoint(trial_id))

    @contextmanager
    def workspace(self) -> Iterator[Path]:  # noqa: D102
        with temporary_folder() as folder:
            yield folder

    def drop_working_files(self) -> None:  # noqa: D102
        self._drop(self.root / CHECKPOINTS)

    def _checkpoint(self, trial_id: str) -> "UPath":
        return self.root / CHECKPOINTS / checked_id(trial_id)

    @contextmanager
    def _put_into(self, target: "UPath") -> Iterator[Path]:
        with temporary_folder() as folder:
            yield folder
            for file in sorted(folder.iterdir()):
                put_file(file, target / file.name)

    def _drop(self, location: "UPath") -> None:
        """What nobody needs any more is no reason to end a search: `coterie gc` removes it later."""
        try:
            remove_files(location)
        except FilesUnavailable as error:
            logger.warning("%s; working files are left there", error)


@contextmanager
def reaching(location: Location, *expected: type[Exception]) -> Iterator[None]:
    """Raise `FilesUnavailable` in place of what goes wrong there, but for what is expected."""
    try:
        yield
    except expected:
        raise
    except Exception as error:  # each kind of place has errors of its own
        raise FilesUnavailable(f"the artifacts can't be reached in {location.parent}") from error


def _changed(about: Mapping[str, Any]) -> float:
    """When a file was put where it is; without end where its place does not say."""
    for name in ("LastModified", "mtime", "updated", "created"):
        at = about.get(name)
        if at is not None:
            return at.timestamp() if isinstance(at, datetime) else float(at)
    return math.inf
