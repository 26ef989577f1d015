"""Files as answers, whole or in parts, from wherever they are."""

import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import anyio
from anyio.to_thread import run_sync
from fastapi.responses import FileResponse
from starlette.responses import MalformedRangeHeader, RangeNotSatisfiable
from starlette.types import Receive, Scope, Send

from coterie.search.artifacts import Location, reaching

BLOCK_BYTES = 2**22  # fetched at a time, beyond what is read: by default 50 MB, for each who reads
ONLY_HEAD = "coterie.only_head"  # in the scope of a GET that was a HEAD
DIGESTS = 1000  # of files, remembered


class OutOfRange(Exception):
    """A part was asked for that a file of `size` bytes does not have."""

    def __init__(self, size: int) -> None:
        super().__init__(f"the file has {size:,} bytes")
        self.size = size


class FileAnswer(FileResponse):
    """Starlette's answer, from any place, with problem documents for parts that there are not.

    Args:
        file: What to send.
        options: As Starlette has them.

    Raises:
        FilesUnavailable: If its place can't be reached.
        FileNotFoundError: If it does not exist.
    """

    def __init__(self, file: Location, **options: Any) -> None:
        super().__init__(str(file), stat_result=_stat(file), **options)
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        method = "HEAD" if ONLY_HEAD in scope else scope["method"]
        await super().__call__({**scope, "method": method}, receive, send)

    @classmethod
    def _parse_range_header(cls, http_range: str, file_size: int) -> list[tuple[int, int]]:
        try:
            return super()._parse_range_header(http_range, file_size)
        except MalformedRangeHeader:  # a range of another kind than bytes, or none: it counts for nothing
            return []  # (RFC 9110, 14.2)
        except RangeNotSatisfiable as error:
            raise OutOfRange(error.max_size) from None

    @asynccontextmanager
    async def _open_file(self) -> AsyncIterator[anyio.AsyncFile[bytes]]:
        file = await run_sync(_open, self._file)
        try:
            yield anyio.wrap_file(file)
        finally:
            with anyio.CancelScope(shield=True):
                await run_sync(file.close)


def digest_of(file: Location) -> str:
    """The SHA-256 of a file's content, in hexadecimal; read once, for as long as the file stays as it is.

    Raises:
        FilesUnavailable: If its place can't be reached.
        FileNotFoundError: If it does not exist.
    """
    about = _stat(file)
    return _digest_of(file, about.st_size, about.st_mtime)


@lru_cache(DIGESTS)
def _digest_of(file: Location, _size: int, _changed: float) -> str:
    digest = hashlib.sha256()
    with reaching(file, FileNotFoundError), _open(file) as content:
        while block := content.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _stat(file: Location) -> os.stat_result:
    with reaching(file, FileNotFoundError):
        about = file.stat()
    if isinstance(about, os.stat_result):
        return about
    fields = [0] * os.stat_result.n_sequence_fields
    fields[6], fields[8] = about.st_size, int(about.st_mtime)
    return os.stat_result(fields)


def _open(file: Location) -> IO[bytes]:
    return file.open("rb") if isinstance(file, Path) else file.open("rb", block_size=BLOCK_BYTES)
