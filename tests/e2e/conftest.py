"""What every end-to-end test starts from."""

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def hangups_are_heard() -> Iterator[None]:
    """A program started with SIGHUP ignored goes on to ignore it; CI or nohup may start these tests so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
