"""A disk without space left, or a shared one that is away: what libraries make of it, in one word each."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from socket import gethostname

from coterie.search.store import DiskFull, FilesUnavailable

_FULL = (errno.ENOSPC, errno.EDQUOT)
_AWAY = (errno.EIO, errno.EROFS, errno.ESTALE)
_FULL_IN_RUST = tuple(f"(os error {number})" for number in _FULL)  # safetensors tells it in words alone


@contextmanager
def full_disk_told() -> Iterator[None]:
    """Raise `DiskFull` in place of an error that came of it, `FilesUnavailable` where a disk is away."""
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if _means_full_disk(error):
            raise DiskFull(f"no space left on the disk of {gethostname()}") from error
        if isinstance(error, OSError) and error.errno in _AWAY:
            raise FilesUnavailable(f"a disk of {gethostname()} is away: {error.strerror}") from error
        raise


def _means_full_disk(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, DiskFull) or (isinstance(error, OSError) and error.errno in _FULL):
            return True
        if any(words in str(error) for words in _FULL_IN_RUST):
            return True
        error = error.__cause__ or error.__context__
    return False
