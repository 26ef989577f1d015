"""Files as answers, whole or in parts, from wherever they are."""

import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
from anyio.to_thread import run_sync
from fastapi.responses import FileResponse

from coterie.search.artifacts import Location, reaching

if TYPE_CHECKING:
    from upath import UPath

BLOCK_BYTES = 2**22  # fetched at a time, beyond what is read: by default 50 MB, for each who reads


def file_response(file: Location, **options: Any) -> FileResponse:
    """Answer with a file, or with the ranges of it that are asked for.

    Raises:
        FilesUnavailable: If its place can't be reached.
        FileNotFoundError: If it does not exist.
    """
    return FileResponse(file, **options) if isinstance(file, os.PathLike) else _RemoteFile(file, **options)


def digest_of(file: Location) -> str:
    """The SHA-256 of a file's content, in hexadecimal.

    Raises:
        FilesUnavailable: If its place can't be reached.
    """
    digest = hashlib.sha256()
    with reaching(file), file.open("rb") as content:
        while block := content.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


class _RemoteFile(FileResponse):
    """Starlette's answer, read through fsspec."""

    def __init__(self, file: "UPath", **options: Any) -> None:
        with reaching(file):
            about = file.stat()
        fields = [0] * os.stat_result.n_sequence_fields
        fields[6], fields[8] = about.st_size, int(about.st_mtime)
        super().__init__(str(file), stat_result=os.stat_result(fields), **options)
        self._file = file

    @asynccontextmanager
    async def _open_file(self) -> AsyncIterator[anyio.AsyncFile[bytes]]:
        file = await run_sync(lambda: self._file.open("rb", block_size=BLOCK_BYTES))
        try:
            yield anyio.wrap_file(file)
        finally:
            with anyio.CancelScope(shield=True):
                await run_sync(file.close)
