"""How a candidate is trained, besides what its family and backbone ask for."""

from collections.abc import Mapping

from coterie.search.store import Candidate

# In the order in which they are drawn; `coterie.search.space` says what else each may be.
RECIPE_DEFAULTS: Mapping[str, float | str] = {
    "lr": 5e-3,
    "weight_decay": 1e-6,
    "batch_size": 64,
    "balancing": "fixed",
}


def recipe_of(candidate: Candidate) -> dict[str, bool | int | float | str]:
    """How a candidate is trained; what an older one does not say is at its default."""
    return {name: candidate.parameters.get(name, default) for name, default in RECIPE_DEFAULTS.items()}
