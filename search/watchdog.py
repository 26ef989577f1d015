"""Ends this process should it fall silent, so that what it ran goes on in another one.

Ray notices a process that has ended, on any node and within a second. It does not notice one that was
stopped, or that hangs in native code with the interpreter locked: that would hold its trial and its devices
until the job's last second. So a process that trains has a child that it writes to every few seconds, and
that kills it once nothing has come for too long. A long epoch is not silence: torch lets the interpreter go
while it computes.
"""

import logging
import os
import subprocess
import sys
import threading
import time
from functools import cache
from typing import IO

logger = logging.getLogger(__name__)

SILENCE_SECONDS = 30.0  # as long as a driver may be silent
BEATS = 6  # in that time: one that comes late on a busy machine does no harm

# Its standard input is a pipe that ends with the process; a child's parent id is not reused while it is one.
_WATCHER = """
import os, select, signal, sys
watched, silence = int(sys.argv[1]), float(sys.argv[2])
while select.select([0], [], [], silence)[0]:
    if not os.read(0, 4096):
        sys.exit()
if os.getppid() == watched:
    os.kill(watched, signal.SIGKILL)
    print(f"process {watched} was silent for {silence:g} s and was ended", file=sys.stderr)
"""


@cache
def end_if_silent(silence: float = SILENCE_SECONDS) -> None:
    """Watch this process until it ends.

    Args:
        silence: Seconds without a sign of life after which it is killed.
    """
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _WATCHER, str(os.getpid()), str(silence)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is not for it
    )
    assert watcher.stdin is not None
    threading.Thread(
        target=_beat, args=(watcher, watcher.stdin, silence / BEATS), name="watchdog", daemon=True
    ).start()


def _beat(watcher: "subprocess.Popen[bytes]", pipe: IO[bytes], pause: float) -> None:
    with watcher:
        while True:
            try:
                os.write(pipe.fileno(), b".")
            except BrokenPipeError:
                logger.warning("the process that watches this one has ended: it is not watched any more")
                return
            time.sleep(pause)
