"""A fixed grouping: tasks of one group share a network."""

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from coterie.models.backbones import Backbone
from coterie.models.families.base import MultiTaskNetwork
from coterie.models.losses import task_losses
from coterie.models.static import GroupedNetwork
from coterie.models.tasks import Grouping, TaskSet

# Shapes: T tasks.


class Grouped(MultiTaskNetwork):
    """One backbone for each group of a given partition, after an optional prefix for all, and T heads.

    The loss is `sum_t w_t * loss_t`.

    Args:
        backbone: What each group has a copy of, with weights of its own.
        tasks: The job's tasks.
        grouping: The groups, as names of tasks: each task in exactly one.
        split: Units that all groups share.

    Raises:
        ValueError: If `grouping` is not a partition of the tasks, or as `GroupedNetwork` does.
    """

    def __init__(
        self, *, backbone: Backbone, tasks: TaskSet, grouping: Iterable[Iterable[str]], split: int = 0
    ) -> None:
        super().__init__(tasks)
        self.network = GroupedNetwork(
            backbone=backbone, tasks=tasks, grouping=Grouping.from_names(grouping, tasks), split=split
        )

    @property
    def grouping(self) -> Grouping:
        """The given one."""
        return self.network.grouping

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Give each task's logits: [B, *input_shape] -> {task name: [B]}."""
        outputs: dict[str, Tensor] = self.network(x)
        return outputs

    def training_loss(self, x: Tensor, targets: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """Give `sum_t w_t * loss_t`; draws nothing."""
        return task_losses(self(x), targets, self.tasks) @ self.task_weights_T

    def prune(self) -> GroupedNetwork:
        """Give a copy of the network, in eval mode: it is static already."""
        return copy.deepcopy(self.network).eval()
