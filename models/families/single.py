"""No task shares anything."""

from coterie.models.backbones import Backbone
from coterie.models.families.grouped import Grouped
from coterie.models.tasks import TaskSet


class Single(Grouped):
    """T backbones with a head each, no parameter in common: `Grouped` with T groups.

    Args:
        backbone: What each task has a copy of, with weights of its own.
        tasks: The job's tasks.
    """

    def __init__(self, *, backbone: Backbone, tasks: TaskSet) -> None:
        super().__init__(backbone=backbone, tasks=tasks, grouping=[[name] for name in tasks.names])
