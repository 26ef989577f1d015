"""A trial's network in another form, made when it is first asked for and kept beside the weights.

The conversion runs in a process of its own: the exporters of torch take much memory and are not made for
threads, and what goes wrong there must not reach the server.
"""

import errno
import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Literal

from coterie.search.artifacts import Location, local_copy, put_file, reaching
from coterie.search.disk import full_disk_told
from coterie.search.store import DiskFull

Form = Literal["onnx", "pt2"]

_FULL = tuple(f"[Errno {number}]" for number in (errno.ENOSPC, errno.EDQUOT))
_NEEDED = ("architecture.json", "weights.safetensors")
FAULTY = 2  # exit status of `coterie.models.convert`: the files are at fault
WAIT_SECONDS = 30.0
CONVERSION_SECONDS = 600.0  # a large network of many branches takes a minute; beyond this something hangs
MOST_WAITING = 4  # requests, that which is converted included: each holds one of the server's 40 threads
_PLACES = threading.BoundedSemaphore(MOST_WAITING)
_ONE_AT_A_TIME = threading.Lock()  # each takes a core and a gigabyte
_BUSY = "other networks are being converted; try again in a minute"

logger = logging.getLogger(__name__)


class ConversionFailed(Exception):
    """A network could not be converted; the server's log says why."""


class NotConvertible(Exception):
    """The network's files are such that no conversion is possible; the message says why."""


class ConversionBusy(Exception):
    """Other conversions take too long to wait for."""


def convert(folder: Location, form: Form) -> Location:
    """Give the network in `folder` in another form.

    Args:
        folder: Holds `architecture.json` and `weights.safetensors`.
        form: `onnx`, or `pt2` for a program of `torch.export`.

    Returns:
        The file, complete.

    Raises:
        NotConvertible: If the files are damaged, of another version, or too large for the form.
        ConversionBusy: If others are made and this one had to wait for long.
        ConversionFailed: If it can't be made for another reason.
        FilesUnavailable: If the folder can't be reached, or its disk is full.
    """
    file = folder / f"network.{form}"
    if _exists(file):
        return file
    if not _PLACES.acquire(blocking=False):
        raise ConversionBusy(_BUSY)
    try:
        if not _ONE_AT_A_TIME.acquire(timeout=WAIT_SECONDS):
            raise ConversionBusy(_BUSY)
        try:
            if not _exists(file):
                with full_disk_told(), local_copy(folder, _NEEDED) as local:
                    _run(local, form, local / file.name)
                    if not isinstance(file, Path):
                        put_file(local / file.name, file)
        finally:
            _ONE_AT_A_TIME.release()
    finally:
        _PLACES.release()
    return file


def _exists(file: Location) -> bool:
    with reaching(file):
        return file.exists()


def _run(folder: Path, form: Form, file: Path) -> None:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "coterie.models.convert", str(folder), form, str(file)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CONVERSION_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        logger.error("making %s took more than %g s", file, CONVERSION_SECONDS)
        raise ConversionFailed(f"{file.name} could not be made in {CONVERSION_SECONDS:g} s") from error
    if any(number in done.stderr for number in _FULL):
        raise DiskFull(f"no space left for {file.name}")
    if done.returncode == FAULTY:
        # Where the server keeps its files is no client's affair.
        fault = done.stderr.strip().removeprefix(f"{folder}: ")
        raise NotConvertible(f"there is no {form} of it: {fault}")
    if done.returncode != 0 or not file.exists():
        logger.error("making %s failed with code %d: %s", file, done.returncode, done.stderr)
        raise ConversionFailed(f"{file.name} could not be made; the server's log says why")
