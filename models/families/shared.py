"""All tasks share everything but their heads."""

from coterie.models.backbones import Backbone
from coterie.models.families.grouped import Grouped
from coterie.models.tasks import TaskSet


class Shared(Grouped):
    """One backbone and T heads (hard parameter sharing; Caruana 1997): `Grouped` with one group.

    Args:
        backbone: What all tasks share.
        tasks: The job's tasks.
    """

    def __init__(self, *, backbone: Backbone, tasks: TaskSet) -> None:
        super().__init__(backbone=backbone, tasks=tasks, grouping=[tasks.names])
