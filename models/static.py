"""The static network that a trial of a grouping family ends with."""

from typing import Self

import torch
from torch import Tensor, nn

from coterie.models.backbones import Backbone
from coterie.models.heads import build_head
from coterie.models.tasks import Grouping, TaskSet

# Shapes: B batch, D features.


class GroupedNetwork(nn.Module):
    """A shared prefix, one branch for each group of tasks, one head for each task.

    The weights are drawn from torch's global generator, in the order prefix, branches, heads. Equal
    arguments and an equal seed give bit-equal networks.

    Args:
        backbone: Its first `split` units are the prefix, each branch has the rest.
        tasks: One head for each, in order.
        grouping: Branch k belongs to `grouping.groups[k]`.
        split: Units that all groups share, from 0 (nothing but the input) to `backbone.units - 1`.

    Raises:
        ValueError: If `split` is out of range, the grouping is of another number of tasks, or a task's kind
            has no head.
    """

    def __init__(self, *, backbone: Backbone, tasks: TaskSet, grouping: Grouping, split: int = 0) -> None:
        super().__init__()
        if type(split) is not int or not 0 <= split < backbone.units:
            raise ValueError(f"split: must be a whole number from 0 to {backbone.units - 1}, found {split!r}")
        if len(grouping.labels) != len(tasks):
            raise ValueError(f"grouping: must be of {len(tasks)} tasks, found one of {len(grouping.labels)}")
        self.backbone = backbone
        self.tasks = tasks
        self.grouping = grouping
        self.split = split
        units = backbone.build()
        self.prefix = nn.Sequential(*units[:split])
        self.branches = nn.ModuleList([nn.Sequential(*units[split:])])
        self.branches.extend(nn.Sequential(*backbone.build()[split:]) for _ in grouping.groups[1:])
        self.heads = nn.ModuleList(build_head(task, backbone.features) for task in tasks)

    @classmethod
    def from_state(
        cls, state: dict[str, Tensor], *, backbone: Backbone, tasks: TaskSet, grouping: Grouping, split: int
    ) -> Self:
        """Build the network around the tensors of `state`, without drawing or copying; in eval mode.

        Raises:
            ValueError: As the class does.
            RuntimeError: If `state` does not fit, as in `nn.Module.load_state_dict`.
        """
        network = cls.empty(backbone=backbone, tasks=tasks, grouping=grouping, split=split)
        network.load_state_dict(state, assign=True)
        return network.eval()

    @classmethod
    def empty(cls, *, backbone: Backbone, tasks: TaskSet, grouping: Grouping, split: int) -> Self:
        """Build the network on the meta device: shapes without memory, nothing drawn."""
        with torch.device("meta"):
            return cls(backbone=backbone, tasks=tasks, grouping=grouping, split=split)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Give each task's logits: [B, *input_shape] -> {task name: [B]}, in the tasks' order."""
        shared = self.prefix(x)
        branch_of = self.grouping.labels
        features_BD = [branch(shared) for branch in self.branches]
        return {
            name: head(features_BD[branch])
            for name, head, branch in zip(self.tasks.names, self.heads, branch_of, strict=True)
        }
