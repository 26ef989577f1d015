"""A full disk, told in one word whoever meets it."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from coterie.search.disk import full_disk_told
from coterie.search.store import DiskFull, FilesUnavailable


def _write_to_a_full_device() -> None:
    Path("/dev/full").write_text("a checkpoint")


def _write_in_rust() -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def _exceed_a_quota() -> None:
    raise OSError(errno.EDQUOT, "Disk quota exceeded")


def _wrap() -> None:
    try:
        _write_to_a_full_device()
    except OSError as error:
        raise RuntimeError("the search ended") from error


def _already_told() -> None:
    raise DiskFull("no space left on the disk of another")


@pytest.mark.parametrize(
    "fail", [_write_to_a_full_device, _write_in_rust, _exceed_a_quota, _wrap, _already_told]
)
def test_a_full_disk_is_told_whoever_meets_it(fail: Callable[[], None]) -> None:
    with pytest.raises(DiskFull, match=r"^no space left on the disk of "), full_disk_told():
        fail()


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.ESTALE])
def test_a_disk_that_is_away_is_no_fault_of_a_trials(number: int) -> None:
    with pytest.raises(FilesUnavailable, match="is away") as found, full_disk_told():
        raise OSError(number, os.strerror(number))
    assert not isinstance(found.value, DiskFull)


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), ValueError("(os error 2)")])
def test_another_error_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as found, full_disk_told():
        raise error
    assert found.value is error
