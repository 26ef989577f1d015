"""Groups found by the affinity of tasks, then trained: the old way, for comparison with DMTG."""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.models.affinity import AFFINITY_LR, best_partition, random_partition, tag_partition
from coterie.models.backbones import Backbone
from coterie.models.checks import check_number
from coterie.models.families.dmtg import DMTG, Start
from coterie.models.tasks import Grouping, TaskSet

# Shapes: T tasks, K groups.

Method = Literal["affinity", "tag", "random"]
PARTITIONS = {"affinity": best_partition, "tag": tag_partition}


class AffinityGrouped(DMTG):
    """A partition that is measured first and then trained; it does not learn.

    A `DMTG` whose grouping logits are set once: the first epochs train one branch for all tasks and measure
    the tasks' affinity (`AffinityMeter`), then each group of the partition found trains from fresh weights.
    Until then, and in a training of one epoch, all tasks are one group.

    Args:
        backbone: What the groups have copies of.
        tasks: The job's tasks.
        groups: K, from 1 to the number of tasks.
        split: Units that all groups share; they go on from what they learned while measuring.
        method: `affinity` maximises the sum of centred affinities inside the groups, `tag` the mean affinity
            onto each task (TAG, restricted to partitions); `random` measures nothing and takes a partition
            drawn from torch's global generator.
        probe: Share of the epochs that are measured, above 0; one epoch at the least, never the last one.
        affinity_lr: Of the gradient step whose effect is measured, above 0.

    Raises:
        ValueError: As `DMTG` does, or if `method` or `affinity_lr` is out of range.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        tasks: TaskSet,
        groups: int,
        split: int = 0,
        method: Method = "affinity",
        probe: float = 0.25,
        affinity_lr: float = AFFINITY_LR,
    ) -> None:
        if method not in get_args(Method):
            raise ValueError(f"method: must be one of {get_args(Method)}, found {method!r}")
        check_number("affinity_lr", affinity_lr, 0, above=True)
        init: Start = "equal" if method == "random" else "affinity"
        super().__init__(
            backbone=backbone, tasks=tasks, groups=groups, split=split, scaling="off", init=init, probe=probe
        )
        self.method = method
        if self.meter is not None:
            self.meter.lr = affinity_lr
        if method == "random":
            with torch.no_grad():
                self.A_TK.copy_(as_logits(random_partition(len(tasks), groups)))
            self._plan()

    @property
    def affinity_TT(self) -> Tensor | None:
        """What was measured (`AffinityMeter.affinity_TT`), None where nothing is."""
        return None if self.meter is None else self.meter.affinity_TT

    @property
    def _fixed(self) -> bool:
        return True

    def _expected_branches(self) -> float:
        """All of them while it measures: a partition into exactly K groups follows."""
        return self.A_TK.shape[1] if self.probing else len(self.grouping)

    def _found_logits(self, affinity_TT: Tensor) -> Tensor:
        return as_logits(PARTITIONS[self.method](affinity_TT, self.A_TK.shape[1]))


def as_logits(grouping: Grouping) -> Tensor:
    """Give grouping logits [T, K] that say just this partition."""
    return F.one_hot(torch.tensor(grouping.labels), len(grouping))
