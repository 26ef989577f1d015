"""A fixed grouping: tasks of one group share a network."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from coterie.models.backbones import Backbone
from coterie.models.cost import Cost, sum_costs, unit_costs
from coterie.models.families.base import Losses, MultiTaskNetwork
from coterie.models.heads import Head, Necks, head_cost
from coterie.models.losses import task_losses
from coterie.models.static import Assembly, StaticNetwork
from coterie.models.tasks import Grouping, TaskSet

# Shapes: B batch, T tasks.


class Grouped(MultiTaskNetwork):
    """One backbone for each group of a given partition, after an optional prefix for all, and T heads.

    The loss is `sum_t w_t * loss_t`. The weights are drawn in the order prefix, branches, heads: equal
    arguments and an equal seed give bit-equal networks.

    Args:
        backbone: What each group has a copy of, with weights of its own.
        tasks: The job's tasks.
        grouping: The groups, as names of tasks: each task in exactly one.
        split: Units that all groups share, from 0 (nothing but the input) to `backbone.units - 1`.

    Raises:
        ValueError: If `grouping` is not a partition of the tasks, `split` is out of range, or the backbone
            can't feed a task's head; nothing is allocated then.
    """

    def __init__(
        self, *, backbone: Backbone, tasks: TaskSet, grouping: Sequence[Sequence[str]], split: int = 0
    ) -> None:
        super().__init__(backbone, tasks)
        self._grouping = Grouping.from_names(grouping, tasks)
        check_split(split, backbone)
        self.split = split
        self.necks = Necks(backbone, tasks)
        units = backbone.build()
        self.prefix = nn.Sequential(*units[:split])
        self.branches = nn.ModuleList([nn.Sequential(*units[split:])])
        self.branches.extend(nn.Sequential(*backbone.build()[split:]) for _ in self._grouping.groups[1:])
        self.heads = nn.ModuleList(Head(task, backbone) for task in tasks)

    @property
    def grouping(self) -> Grouping:
        """The given one."""
        return self._grouping

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Give each task's output: [B, *input_shape] -> {task name: ...}."""
        shared = self.prefix(x)
        features = [self.necks(branch(shared)) for branch in self.branches]
        return {
            name: head(features[k][head.reads])
            for name, head, k in zip(self.tasks.names, self.heads, self._grouping.labels, strict=True)
        }

    def shared_parameters(self) -> list[str]:
        """Name those that several tasks may share: all but the heads'."""
        return [name for name, _ in self.named_parameters() if not name.startswith("heads.")]

    def losses(self, x: Tensor, targets: Mapping[str, Tensor], generator: torch.Generator) -> Losses:
        """Give each task's loss; draws nothing."""
        losses_T = task_losses(self(x), targets, self.tasks)
        return Losses(losses_T, losses_T.new_zeros(()))

    def prune(self) -> StaticNetwork:
        """Give a copy of the network as it is: it is static already."""
        return assemble_groups(
            backbone=self.backbone,
            tasks=self.tasks,
            prefix=self.prefix,
            branches=list(self.branches),
            labels=self._grouping.labels,
            necks=self.necks,
            heads=list(self.heads),
        )

    def expected_cost(self) -> Cost:
        """Give that of the network as it is."""
        return cost_of_groups(self.backbone, self.tasks, self.split, len(self._grouping))

    def trunks(self) -> Sequence[Sequence[nn.Module]]:
        """The first group's with the prefix, then the others' branches."""
        first, *others = (cast(nn.Sequential, branch) for branch in self.branches)
        return [[*self.prefix, *first], *(list(branch) for branch in others)]


def check_split(split: object, backbone: Backbone) -> None:
    """Check the number of units that all groups share.

    Raises:
        ValueError: If it leaves no unit behind it.
    """
    if type(split) is not int or not 0 <= split < backbone.units:
        raise ValueError(
            f"split: must be a whole number from 0 to {backbone.units - 1}, so that a unit of "
            f"{backbone.name!r} follows, found {split!r}"
        )


def cost_of_groups(backbone: Backbone, tasks: TaskSet, split: int, groups: float) -> Cost:
    """Count the static network of a grouping.

    Args:
        backbone: Of the branches.
        tasks: A head each.
        split: Units of the shared prefix.
        groups: Number of branches behind it, or how many there are expected to be.
    """
    units = unit_costs(backbone)
    heads = [head_cost(task, backbone) for task in tasks]
    return sum_costs((*units[:split], *heads)) + sum_costs(units[split:]) * groups


def assemble_groups(
    *,
    backbone: Backbone,
    tasks: TaskSet,
    prefix: Sequence[nn.Module] | nn.Sequential,
    branches: Sequence[nn.Module],
    labels: Sequence[int],
    necks: Necks,
    heads: Sequence[nn.Module],
) -> StaticNetwork:
    """Put the static network of a grouping together.

    Args:
        backbone: Of the branches.
        tasks: In order.
        prefix: The shared units.
        branches: One a group, each an `nn.Sequential` of units.
        labels: The branch of each task.
        necks: Of the heads.
        heads: One a task.
    """
    assembly = Assembly(backbone.input_shape)
    shared = assembly.chains("prefix", list(prefix), "input")
    features: dict[int, dict[str, str]] = {}
    outputs = {}
    # Groups in canonical form are sorted by their first task: the order in which labels are first seen.
    for number, k in enumerate(dict.fromkeys(labels)):
        branch = branches[k]
        assert isinstance(branch, nn.Sequential)
        end = assembly.chains(f"groups.{number}", list(branch), shared)
        features[k] = {
            feature: assembly.chains(f"groups.{number}.neck", [neck], end) for feature, neck in necks.items()
        }
    for t, (name, head, k) in enumerate(zip(tasks.names, heads, labels, strict=True)):
        assert isinstance(head, Head)
        outputs[name] = assembly.chain(f"heads.{t}", head, features[k][head.reads])
    return assembly.finish(outputs)
