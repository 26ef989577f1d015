"""What a process can be given to do beside the trials themselves; all of it is picklable."""

from dataclasses import dataclass

from coterie.search.store import Candidate

Subset = tuple[int, ...]  # task indices, rising


@dataclass(frozen=True, kw_only=True)
class SubsetRun:
    """Train a network for each of some subsets of the tasks, with each of some seeds, as stacks.

    Attributes:
        run: Which of the job's such runs it is, from 0.
        candidate: Family `shared`: the backbone, its sizes and the recipe of every network.
        subsets: The subsets; none twice.
        seeds: One stack each.
        epochs: Length of the training.
    """

    run: int
    candidate: Candidate
    subsets: tuple[Subset, ...]
    seeds: tuple[int, ...]
    epochs: int

    @property
    def id(self) -> str:
        """Names it within its job."""
        return f"subsets-{self.run}"


@dataclass(frozen=True, kw_only=True)
class AffinityRun:
    """Train one `shared` network for a while and measure how much the tasks help each other.

    Attributes:
        candidate: Family `shared`: the backbone, its sizes and the recipe.
        seed: Of the training.
        epochs: Length of the training.
    """

    candidate: Candidate
    seed: int
    epochs: int

    @property
    def id(self) -> str:
        """Names it within its job."""
        return f"affinity-{self.seed}"


SideRun = SubsetRun | AffinityRun
