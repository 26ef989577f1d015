"""Peak memory of `coterie demo` and all that it starts, by part.

    python tests/benchmarks/footprint.py

Samples the proportional set size (shared pages divided among those who share them) of the demo's whole
process tree every second, and prints the parts at the moment when their sum was greatest.
"""

import subprocess
import sys
import tempfile
import time
from collections import Counter

import psutil

SAMPLE_SECONDS = 1.0
MIB = 2**20


def part_of(process: psutil.Process) -> str:
    """Which part of Coterie a process belongs to."""
    command = " ".join(process.cmdline())
    if "coterie.service.worker" in command:
        return "driver, with Ray's supervisor"
    if "JobSupervisor" in command:
        return "driver, with Ray's supervisor"
    if command.startswith("ray::") and "IDLE" not in command:
        return "trials"
    if "coterie.service.cli serve" in command:
        return "server"
    if "coterie.service.cli demo" in command:
        return "demo"
    return "Ray"


def measure(root: psutil.Process) -> Counter[str]:
    """MiB by part, now."""
    found: Counter[str] = Counter()
    for process in [root, *root.children(recursive=True)]:
        try:
            found[part_of(process)] += process.memory_full_info().pss / MIB
        except psutil.Error:
            continue  # it ended meanwhile
    return found


def main() -> None:
    began = time.monotonic()
    peak: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "coterie.service.cli", "demo", "--data-dir", folder]
        demo = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        root = psutil.Process(demo.pid)
        while demo.poll() is None:
            now = measure(root)
            peak = max(peak, now, key=Counter.total)
            time.sleep(SAMPLE_SECONDS)
    print(f"the demo ended with code {demo.returncode} after {time.monotonic() - began:.0f} s")
    for part, mib in peak.most_common():
        print(f"{part:>30} {mib:7.0f} MiB")
    print(f"{'together, at the peak':>30} {peak.total():7.0f} MiB")


if __name__ == "__main__":
    main()
