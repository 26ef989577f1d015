"""Telling a driver that is dead from one that can't be heard, by this server's own clock alone."""

from collections.abc import Hashable, Mapping
from time import monotonic

LOOKS = 4  # within a lease, at least: a server that slept has heard nothing of what happened meanwhile


class Listener:
    """Counts for how long drivers have been silent, while this server could hear them.

    What the database says of times is the clocks' of other machines, and clocks jump. So a driver is heard
    when its signs of life change, whatever they are, and time counts only between two looks in a row.

    Args:
        lease: The least seconds of silence that are of any meaning.
    """

    def __init__(self, lease: float) -> None:
        self._lease = lease
        self._looked_at: float | None = None
        self._heard: dict[str, tuple[Hashable, float]] = {}  # job -> signs of life, seconds of silence since

    def look(self, signs: Mapping[str, Hashable]) -> dict[str, float]:
        """Note each running job's signs of life, and say for how many seconds its driver has been silent."""
        now = monotonic()
        passed = 0.0 if self._looked_at is None else min(now - self._looked_at, self._lease / LOOKS)
        before, self._heard, self._looked_at = self._heard, {}, now
        for job_id, sign in signs.items():
            known, silence = before.get(job_id, (None, 0.0))
            self._heard[job_id] = (sign, silence + passed if known == sign else 0.0)
        return {job_id: silence for job_id, (_, silence) in self._heard.items()}

    def forget(self) -> None:
        """Whatever was in the way of the last look may be in the drivers' way too: begin anew."""
        self._looked_at = None
        self._heard.clear()
