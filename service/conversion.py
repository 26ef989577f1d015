"""A trial's network in another form, made when it is first asked for and kept beside the weights.

The conversion runs in a process of its own: the exporters of torch take much memory and are not made for
threads, and what goes wrong there must not reach the server.
"""

import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Literal

Form = Literal["onnx", "pt2"]

CONVERSION_SECONDS = 600.0  # a large network of many branches takes a minute; beyond this something hangs
_ONE_AT_A_TIME = threading.Lock()  # each takes a core and a gigabyte

logger = logging.getLogger(__name__)


class ConversionFailed(Exception):
    """A network could not be converted; the server's log says why."""


def convert(folder: Path, form: Form) -> Path:
    """Give the network in `folder` in another form.

    Args:
        folder: Holds `architecture.json` and `weights.safetensors`.
        form: `onnx`, or `pt2` for a program of `torch.export`.

    Returns:
        The file, complete.

    Raises:
        ConversionFailed: If it can't be made.
    """
    file = folder / f"network.{form}"
    if file.exists():
        return file
    with _ONE_AT_A_TIME:
        if not file.exists():
            _run([sys.executable, "-m", "coterie.models.convert", str(folder), form, str(file)], file)
    return file


def _run(command: list[str], file: Path) -> None:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CONVERSION_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        logger.error("making %s took more than %g s", file, CONVERSION_SECONDS)
        raise ConversionFailed(f"{file.name} could not be made in {CONVERSION_SECONDS:g} s") from error
    if done.returncode != 0 or not file.exists():
        logger.error("making %s failed with code %d: %s", file, done.returncode, done.stderr)
        raise ConversionFailed(f"{file.name} could not be made; the server's log says why")
