"""A wall clock that steps, for `test_faults.py`: Python imports this first where its folder is on the path.

In Coterie's own processes the time and the date are those of the machine plus the seconds in a file. Times
that only rise are left alone, as they are when a machine's clock is set.
"""

import builtins
import datetime
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

STEPPED = "COTERIE_TEST_CLOCK"  # names the file
PROGRAM = "coterie.service"  # the server's and the driver's
ASKING = (  # what asks for the date; others only name its type, which must be the real one
    "coterie.service.dispatcher",
    "coterie.service.jobs",
    "coterie.service.storage",
    "coterie.service.worker",
)

_import, _seconds, _nanoseconds = builtins.__import__, time.time, time.time_ns


def _step() -> float:
    return float(Path(os.environ[STEPPED]).read_text() or 0)


class _Kind(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, datetime.datetime)


class _Stepped(datetime.datetime, metaclass=_Kind):
    """Makes the standard library's own."""

    def __new__(cls, *parts: Any, **named: Any) -> Any:
        return datetime.datetime(*parts, **named)

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Any:
        return datetime.datetime.fromtimestamp(time.time(), tz)


def _stepped_import(name: str, namespace: Any = None, *rest: Any, **named: Any) -> ModuleType:
    if name == "datetime" and str((namespace or {}).get("__name__")).startswith(ASKING):
        return _stepped_module
    return _import(name, namespace, *rest, **named)


_stepped_module = ModuleType("datetime")
vars(_stepped_module).update(vars(datetime) | {"datetime": _Stepped})

if STEPPED in os.environ and any(word.startswith(PROGRAM) for word in sys.orig_argv):
    time.time = lambda: _seconds() + _step()
    time.time_ns = lambda: _nanoseconds() + int(_step() * 1e9)
    builtins.__import__ = _stepped_import
