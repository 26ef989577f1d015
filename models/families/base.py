"""What every family offers: a network of many tasks that trains, and prunes to a static one."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coterie.models.backbones import Backbone
from coterie.models.cost import Cost
from coterie.models.static import StaticNetwork
from coterie.models.tasks import Grouping, TaskSet

# Shapes: B batch, T tasks.


class Losses(NamedTuple):
    """What one batch costs.

    Attributes:
        tasks_T: Each task's loss, without its weight.
        penalty: What is added to their weighted sum; 0 where a family adds nothing.
    """

    tasks_T: Tensor
    penalty: Tensor


class MultiTaskNetwork(nn.Module, ABC):
    """A trainable network for all tasks of a job, in one family's way of sharing.

    A training calls `begin_epoch` before each epoch, `losses` (or `training_loss`) on each batch, `settle`
    once behind the last epoch and then `prune`.

    Args:
        backbone: What its units are.
        tasks: The job's tasks.

    Attributes:
        backbone: The same.
        tasks: The same.
        task_weights_T: Each task's factor in the loss.
    """

    task_weights_T: Tensor

    def __init__(self, backbone: Backbone, tasks: TaskSet) -> None:
        super().__init__()
        self.backbone = backbone
        self.tasks = tasks
        weights_T = torch.tensor([float(task.weight) for task in tasks])
        self.register_buffer("task_weights_T", weights_T, persistent=False)

    @property
    @abstractmethod
    def grouping(self) -> Grouping | None:
        """Which tasks share now; None for a family that does not share by groups."""

    @abstractmethod
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Give each task's output as its head does (`coterie.models.heads.Head`), in the tasks' order.

        Args:
            x: [B, *input_shape].
        """

    @abstractmethod
    def losses(self, x: Tensor, targets: Mapping[str, Tensor], generator: torch.Generator) -> Losses:
        """Give each task's loss on one batch, and what the family adds.

        Args:
            x: [B, *input_shape].
            targets: Each task's targets, as `coterie.models.losses` describes them.
            generator: The source of whatever the family draws; one that draws nothing leaves it as it is.
        """

    @abstractmethod
    def prune(self) -> StaticNetwork:
        """Give the static network that this one has come to: a copy, in eval mode."""

    @abstractmethod
    def expected_cost(self) -> Cost:
        """Give what `count_cost` of the network that the training will come to is expected to be, as of now.

        So that trainings can be compared by cost while gates and groups still learn. Where nothing that it
        depends on learns (any more), it is exactly the cost of `prune()`. Fast enough for every epoch, and
        a function of the state and of the last `begin_epoch`.
        """

    @abstractmethod
    def trunks(self) -> Sequence[Sequence[nn.Module]]:
        """Every copy of the backbone in it, each a list of the backbone's units, in order.

        A unit that several copies share is in the first of them only, so a list may be shorter than the
        backbone, and then holds its last units.
        """

    def training_loss(self, x: Tensor, targets: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """Give the scalar to minimise on one batch: each task's loss times its weight, and the penalty."""
        losses = self.losses(x, targets, generator)
        return losses.tasks_T @ self.task_weights_T + losses.penalty

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Give the optimizer's parameter groups: every parameter once."""
        return [{"params": list(self.parameters()), "lr": lr, "weight_decay": weight_decay}]

    def begin_epoch(self, epoch: int, epochs: int) -> bool:
        """Prepare for an epoch, counted from 0, of `epochs` in all.

        It depends on nothing but the network's state and these numbers, so a training that goes on from a
        checkpoint calls it again and comes to the same.

        Returns:
            Whether parameters were replaced by others: then the optimizer starts anew.
        """
        return False

    def settle(self, batches: Iterable[Tensor]) -> None:
        """Adjust what is not learned by gradient once training is over, such as batch-norm statistics.

        Args:
            batches: Of the training inputs, each [B, *input_shape].
        """

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back a `state_dict` of any moment of a training, whatever phase it was in.

        This network must be as it was built, from equal arguments.
        """
        self.load_state_dict(state)
