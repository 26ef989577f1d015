"""What every family offers: a network of many tasks that trains, and prunes to a static one."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from coterie.models.static import GroupedNetwork
from coterie.models.tasks import Grouping, TaskSet

# Shapes: B batch, T tasks.


class MultiTaskNetwork(nn.Module, ABC):
    """A trainable network for all tasks of a job, in one family's way of sharing.

    Args:
        tasks: The job's tasks.

    Attributes:
        tasks: The same.
        task_weights_T: Each task's factor in the loss.
    """

    task_weights_T: Tensor

    def __init__(self, tasks: TaskSet) -> None:
        super().__init__()
        self.tasks = tasks
        weights_T = torch.tensor([task.weight for task in tasks])
        self.register_buffer("task_weights_T", weights_T, persistent=False)

    @property
    @abstractmethod
    def grouping(self) -> Grouping | None:
        """Which tasks share now; None for a family that does not share by groups."""

    @abstractmethod
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Give each task's logits, in the tasks' order.

        Args:
            x: [B, *input_shape].

        Returns:
            By task name; [B] for a binary task, whose answer is yes above 0.
        """

    @abstractmethod
    def training_loss(self, x: Tensor, targets: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """Give the scalar to minimise on one batch, each task's loss times its weight.

        Args:
            x: [B, *input_shape].
            targets: Each task's targets, [B].
            generator: The source of whatever the family draws; one that draws nothing leaves it as it is.
        """

    @abstractmethod
    def prune(self) -> GroupedNetwork:
        """Give the static network that this one has come to: a copy, in eval mode."""

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Give the optimizer's parameter groups: every parameter once."""
        return [{"params": list(self.parameters()), "lr": lr, "weight_decay": weight_decay}]
