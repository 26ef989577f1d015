"""Files of jobs that nobody needs any more, and rows of jobs that are old: what `coterie gc` removes.

It works beside running servers. Files are listed first and SQL is read second: a file is written before SQL
says that it counts, so one that SQL does not know by then will never count, unless it is young.
"""

import logging
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from coterie.search.artifacts import (
    FoundFile,
    Location,
    artifacts_at,
    list_files,
    reaching,
    remove_files,
)
from coterie.search.store import CHECKPOINTS, JOB_ENDED, SCRATCH, TRIALS, FilesUnavailable
from coterie.service.access import operator
from coterie.service.config import JOB_ID, Settings
from coterie.service.storage.audit import audit
from coterie.service.storage.database import Database, DatabaseUnavailable
from coterie.service.storage.files import FileRepository
from coterie.service.storage.repositories import JobRepository, NotFound

if TYPE_CHECKING:
    from upath import UPath

logger = logging.getLogger(__name__)

# What is younger may belong to what is only being written; clocks of machines that share a disk differ, too.
ORPHAN_SECONDS = 3600.0
# What is not whole yet, as a training and `replace_file` name it.
_TEMPORARY = re.compile(r".+\.[0-9]+\.part|\..+\.[0-9a-f]{32}")
_CONVERTED = ("network.onnx", "network.pt2")  # made from a completed trial's files, and known to no row
ORDER_FILE = "driver.json"  # for the job's driver; it holds the database's password
_WORKING = (CHECKPOINTS, SCRATCH, ORDER_FILE)


OWNER_FILE = "database.id"  # in the root of all jobs' folders: of whose jobs they are


class WrongDatabase(Exception):
    """The files are those of another database's jobs."""


class Kind(StrEnum):
    """What is removed, in words."""

    JOB = "job that ended long ago"
    EVENTS = "events of a job that ended long ago"
    JOB_FOLDER = "files of no job"
    TRIAL_FILES = "files of no completed trial"
    WORKING = "working files of an ended job"
    TEMPORARY = "temporary file"


@dataclass(frozen=True)
class Removed:
    """Something that was removed, or would be.

    Attributes:
        kind: What it is.
        name: A job's id, or a path below the folder of all jobs.
        size: Bytes of files.
        events: Number of events.
        problem: Why it could not be removed.
    """

    kind: Kind
    name: str
    size: int = 0
    events: int = 0
    problem: str | None = None


@dataclass(frozen=True)
class _Entry:
    """A file, or a folder with all below it; `changed` is when any of it last was, in Unix time."""

    path: Location
    size: int
    changed: float
    children: tuple["_Entry", ...] = ()


def claim_root(settings: Settings, database: Database) -> None:
    """Say in the root of all jobs' files which database they belong to, if nothing is said there yet.

    Another database's is used all the same, since no two jobs have one id; but `gc` keeps its hands off.

    Raises:
        FilesUnavailable: If the root can't be read or written.
    """
    with database.read() as session:
        own = FileRepository(session).database_id()
    owner = _owner_of(settings)
    if owner is None:
        root = settings.jobs_dir
        with reaching(root):
            if isinstance(root, Path):
                root.mkdir(mode=0o700, parents=True, exist_ok=True)
            (root / OWNER_FILE).write_text(own)
    elif owner != own:
        logger.warning("%s", _of_another(settings))


def _owner_of(settings: Settings) -> str | None:
    try:
        with reaching(settings.jobs_dir, FileNotFoundError):
            return (settings.jobs_dir / OWNER_FILE).read_text().strip() or None
    except FileNotFoundError:
        return None


def _of_another(settings: Settings) -> str:
    return (
        f"{settings.jobs_dir} belongs to another database, so `coterie gc` removes nothing there. Give each "
        "database a place of its own (COTERIE_ARTIFACTS, COTERIE_DATABASE_URL, --data-dir); if the other one "
        f"is gone for good, remove {OWNER_FILE} there."
    )


def drop_working_files(settings: Settings, job_id: str) -> None:
    """Remove what only a job that has not ended needs; what can't be removed is left to `gc`."""
    place = settings.artifacts_of(job_id)
    artifacts_at(place).drop_working_files()
    try:
        _remove(place / ORDER_FILE)
    except (OSError, FilesUnavailable) as error:
        logger.warning("working files of %s are left to `coterie gc`: %s", job_id, error)


def remove_job_files(settings: Settings, job_id: str) -> None:
    """Remove the files of a job that SQL does not have any more; what can't be removed is left to `gc`."""
    try:
        _remove(settings.artifacts_of(job_id))
    except (OSError, FilesUnavailable) as error:
        logger.warning("files of %s, which was deleted, are left to `coterie gc`: %s", job_id, error)


def collect_garbage(settings: Settings, database: Database, *, dry_run: bool = False) -> Iterator[Removed]:
    """Remove what nobody needs, one thing after another, and tell it; with `dry_run` only tell it.

    Raises:
        WrongDatabase: If the files are another database's, as their root says or since this one knows no
            job of theirs; nothing is removed.
        OSError, FilesUnavailable: If the files can't be listed.
    """
    now = datetime.now(UTC)
    folders = _job_folders(settings.jobs_dir)
    expired: list[tuple[str, str]] = []
    passing: list[tuple[str, int]] = []
    with database.read() as session:
        found = FileRepository(session)
        owner = _owner_of(settings)
        if owner is not None and owner != found.database_id():
            raise WrongDatabase(_of_another(settings))
        if owner is None and folders and not found.states([folder.name for folder in folders]):
            raise WrongDatabase(
                f"None of the {len(folders)} jobs with files in {settings.jobs_dir} is in the database. Is "
                "it the right one (COTERIE_DATABASE_URL, COTERIE_ARTIFACTS, --data-dir)? Nothing was removed."
            )
        if settings.retention_days is not None:
            expired = found.ended_before(now - timedelta(days=settings.retention_days))
        if settings.event_retention_days is not None:
            passing = found.passing_events(now - timedelta(days=settings.event_retention_days))
    gone = {job_id for _, job_id in expired}
    for tenant, job_id in expired:
        yield _remove_job(settings, database, tenant, job_id, dry_run)
    for job_id, events in passing:
        if job_id not in gone:
            if not dry_run:
                with database.write() as session:
                    FileRepository(session).remove_passing_events(job_id)
            yield Removed(Kind.EVENTS, job_id, events=events)
    oldest = time.time() - ORPHAN_SECONDS
    for folder in folders:
        if folder.name not in gone:
            for kind, entry in _garbage_of(database, folder, oldest):
                removed = Removed(kind, str(entry.path).removeprefix(f"{settings.jobs_dir}/"), entry.size)
                yield removed if dry_run else _try_to_remove(removed, entry.path)


def _remove_job(settings: Settings, database: Database, tenant: str, job_id: str, dry_run: bool) -> Removed:
    folder = settings.artifacts_of(job_id)
    files = _list(folder)
    removed = Removed(Kind.JOB, job_id, files.size if files else 0)
    if dry_run:
        return removed
    try:
        with database.write() as session:
            row = JobRepository(session, tenant).delete(job_id)
            audit(
                session,
                operator(tenant),
                "job.delete",
                job_id,
                name=row.name,
                bytes=row.stored_bytes,
                retention_days=settings.retention_days,
            )
    except NotFound:
        return replace(removed, problem="somebody else deletes it just now")
    except DatabaseUnavailable as error:
        return replace(removed, problem=str(error))
    return _try_to_remove(removed, folder)


def _garbage_of(database: Database, folder: Location, oldest: float) -> Iterator[tuple[Kind, _Entry]]:
    """What nobody needs of a job's files, and no process has changed since `oldest`."""
    job = _list(folder)
    if job is None:
        return
    # Behind the list, and the state first: a trial that ends meanwhile is then one of a job that runs.
    with database.read() as session:
        found = FileRepository(session)
        state = found.states([folder.name]).get(folder.name)
        files = found.files(folder.name)
    if state is None:
        if job.changed < oldest:
            yield Kind.JOB_FOLDER, job
        return
    for part in job.children:
        if part.path.name in _WORKING and state in JOB_ENDED:
            if part.changed < oldest:
                yield Kind.WORKING, part
        elif part.path.name == TRIALS and state in JOB_ENDED:
            for trial in part.children:
                yield from _garbage_of_trial(trial, files.get(trial.path.name), oldest)
        elif part.path.name in (TRIALS, CHECKPOINTS):
            yield from _temporary(part, oldest)


def _garbage_of_trial(
    trial: _Entry, names: Collection[str] | None, oldest: float
) -> Iterator[tuple[Kind, _Entry]]:
    if names is None:
        if trial.changed < oldest:
            yield Kind.TRIAL_FILES, trial
        return
    kept = {*names, *_CONVERTED}
    for file in trial.children:
        if file.path.name not in kept and file.changed < oldest:
            yield Kind.TEMPORARY if _TEMPORARY.fullmatch(file.path.name) else Kind.TRIAL_FILES, file


def _temporary(entry: _Entry, oldest: float) -> Iterator[tuple[Kind, _Entry]]:
    if _TEMPORARY.fullmatch(entry.path.name) and entry.changed < oldest:
        yield Kind.TEMPORARY, entry
    for child in entry.children:
        yield from _temporary(child, oldest)


def _job_folders(root: Location) -> list[Location]:
    """The folders of jobs, by name; what has another name is not ours."""
    if not isinstance(root, Path):
        names: set[str] = set()
        with suppress(FileNotFoundError), reaching(root, FileNotFoundError):
            names = {path.rstrip("/").rpartition("/")[2] for path in root.fs.ls(root.path, detail=False)}
        return [root / name for name in sorted(names) if JOB_ID.fullmatch(name)]
    if not root.exists():
        return []
    with os.scandir(root) as found:
        return sorted(
            Path(entry.path)
            for entry in found
            if JOB_ID.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        )


def _list(path: Location) -> _Entry | None:
    """A file or folder as it is now; None where it is gone. Links are not followed."""
    if not isinstance(path, Path):
        return _tree(path, list_files(path))
    try:
        status = path.lstat()
        if path.is_symlink() or not path.is_dir():
            return _Entry(path, status.st_size, status.st_mtime)
        children = tuple(found for name in sorted(os.listdir(path)) if (found := _list(path / name)))
    except FileNotFoundError:
        return None
    return _Entry(
        path,
        sum(child.size for child in children),
        max([status.st_mtime, *(child.changed for child in children)]),
        children,
    )


def _tree(path: "UPath", files: Sequence[FoundFile]) -> _Entry | None:
    """What files make of folders where there are none by themselves."""
    if [file.location for file in files] == [path]:
        return _Entry(path, files[0].size, files[0].changed)
    below: dict[str, list[FoundFile]] = {}
    for file in files:
        below.setdefault(file.location.relative_to(path).parts[0], []).append(file)
    children = tuple(found for name, some in below.items() if (found := _tree(path / name, some)))
    if not children:
        return None
    size, changed = sum(child.size for child in children), max(child.changed for child in children)
    return _Entry(path, size, changed, children)


def _try_to_remove(removed: Removed, path: Location) -> Removed:
    try:
        _remove(path)
    except (OSError, FilesUnavailable) as error:
        return replace(removed, problem=str(error))
    return removed


def _remove(path: Location) -> None:
    """Remove a file or a folder that may be gone already; links are removed, not followed."""
    if not isinstance(path, Path):
        remove_files(path)
        return
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        return
