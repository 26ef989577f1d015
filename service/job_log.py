"""The log of a job's drivers.

In a folder it is one file, which each attempt appends to. Elsewhere nothing can be appended to: there each
attempt has a part of its own, which is put anew while it grows.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coterie.search.artifacts import Location, list_files, put_file, reaching, temporary_folder
from coterie.search.store import FilesUnavailable

TAIL_BYTES = 1_000_000  # of a log are read at the most
KEEP_SECONDS = 10.0  # so much of what a driver that is killed has logged is lost

logger = logging.getLogger(__name__)


@contextmanager
def kept_log(log: Location, attempt: int) -> Iterator[Path]:
    """A file to which an attempt's log is to be appended; it is kept in `log` until the block has ended."""
    if isinstance(log, Path):
        yield log
        return
    with temporary_folder() as folder:
        file, part, ended = folder / log.name, log / f"{attempt:06}", threading.Event()
        file.touch()

        def keep() -> None:
            kept, over = 0, False
            while not over:
                over = ended.wait(KEEP_SECONDS)
                size = file.stat().st_size
                if size > kept:
                    try:
                        put_file(file, part)
                        kept = size
                    except FilesUnavailable:
                        logger.warning("the log can't be kept", exc_info=True)

        thread = threading.Thread(target=keep, name="log", daemon=True)
        thread.start()
        try:
            yield file
        finally:
            ended.set()
            thread.join()


def read_tail(log: Location, lines: int) -> str:
    """The last lines of a log, fewer where they are long; empty before there is one.

    Raises:
        FilesUnavailable: If its place can't be reached.
    """
    parts: list[Location]
    if isinstance(log, Path):
        parts = [log] if log.exists() else []
    else:
        parts = [part.location for part in list_files(log)]
    text = ""
    for part in reversed(parts):
        with reaching(part):
            text = _tail(part) + text
        if len(text) >= TAIL_BYTES or text.count("\n") >= lines:
            break
    return "".join(text.splitlines(keepends=True)[-lines:])


def _tail(file: Location) -> str:
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - TAIL_BYTES))
        return stream.read().decode("utf-8", errors="replace")
