"""The registered sources: entry points of the group `coterie.datasets`."""

from functools import cache
from importlib.metadata import entry_points

from coterie.search.data.base import Source

GROUP = "coterie.datasets"


@cache
def sources() -> dict[str, type[Source]]:
    """Every installed source by name."""
    return {point.name: point.load() for point in sorted(entry_points(group=GROUP), key=lambda p: p.name)}
