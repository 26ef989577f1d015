"""DMTG and InterroGate in one: groups are found first, then gates share inside each of them."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from coterie.models.affinity import check_groups
from coterie.models.backbones import Backbone
from coterie.models.checks import check_number
from coterie.models.cost import Cost, sum_costs, unit_costs
from coterie.models.families.base import Losses, MultiTaskNetwork
from coterie.models.families.dmtg import CELEBA_TAU, DMTG, check_temperature, probe_epochs
from coterie.models.families.grouped import check_split
from coterie.models.families.interrogate import GatedNetwork, GatedTrunk, Gating
from coterie.models.graph import INPUT
from coterie.models.heads import Head, Necks, head_cost
from coterie.models.pruning import PrunedAssembly, Value, prune_gated
from coterie.models.static import Assembly, StaticNetwork
from coterie.models.tasks import Grouping, TaskSet

# Shapes: B batch, T tasks.


class GatedGroups(GatedNetwork):
    """A shared prefix, and behind it a `GatedTrunk` for each group, or a plain branch for a task alone.

    Args:
        backbone: What is split into prefix and branches.
        tasks: The job's tasks.
        grouping: Which tasks share, by gates.
        gating: How the gates learn.
        prefix: The shared units, trained or not.
        branches: For each group the other units; each of its tasks starts from a copy.
        heads: One a task.
    """

    labels_T: Tensor

    def __init__(
        self,
        *,
        backbone: Backbone,
        tasks: TaskSet,
        grouping: Grouping,
        gating: Gating,
        prefix: Sequence[nn.Module],
        branches: Sequence[Sequence[nn.Module]],
        heads: Sequence[nn.Module],
    ) -> None:
        super().__init__(backbone, tasks)
        self._grouping = grouping
        self.gating = gating
        self.register_buffer("labels_T", torch.tensor(grouping.labels))  # so that `restore` finds them
        split = len(prefix)
        self.shape = backbone.output_shapes[split - 1] if split else backbone.input_shape
        self.necks = Necks(backbone, tasks)
        self.prefix = nn.Sequential(*prefix)
        self.branches = nn.ModuleList(
            nn.Sequential(*branch)
            if len(group) == 1
            else GatedTrunk(
                backbone.plan()[split:],
                [branch, *(copy.deepcopy(branch) for _ in group)],
                shape=self.shape,
                gate_start=gating.gate_start,
                weighting=gating.weighting,
            )
            for group, branch in zip(grouping.groups, branches, strict=True)
        )
        self.heads = nn.ModuleList(heads)

    @classmethod
    def fresh(
        cls, *, backbone: Backbone, tasks: TaskSet, grouping: Grouping, gating: Gating, split: int
    ) -> "GatedGroups":
        """Build it with weights drawn from torch's global generator, in the order of `Grouped`."""
        Necks(backbone, tasks)  # raises where a head can't be fed, before anything is drawn
        units = list(backbone.build())
        others = [list(backbone.build())[split:] for _ in grouping.groups[1:]]
        return cls(
            backbone=backbone,
            tasks=tasks,
            grouping=grouping,
            gating=gating,
            prefix=units[:split],
            branches=[units[split:], *others],
            heads=[Head(task, backbone) for task in tasks],
        )

    @classmethod
    def from_dmtg(cls, dmtg: DMTG, gating: Gating) -> "GatedGroups":
        """Go on with the groups and weights that DMTG has come to; the modules become this network's."""
        labels = dmtg.A_TK.argmax(dim=1).tolist()
        gated = cls(
            backbone=dmtg.backbone,
            tasks=dmtg.tasks,
            grouping=dmtg.grouping,
            gating=gating,
            prefix=list(dmtg.prefix),
            branches=[
                list(cast(nn.Sequential, dmtg.branches[labels[group[0]]])) for group in dmtg.grouping.groups
            ],
            heads=[cast(nn.ModuleList, dmtg.heads[k])[t] for t, k in enumerate(labels)],
        )
        return gated.to(dmtg.A_TK.device).train(dmtg.training)

    @property
    def grouping(self) -> Grouping:
        """The given one."""
        return self._grouping

    def gated_trunks(self) -> Sequence[GatedTrunk]:
        """Of the groups of more than one task."""
        return [branch for branch in self.branches if isinstance(branch, GatedTrunk)]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Give each task's output: [B, *input_shape] -> {task name: ...}."""
        shared = self.prefix(x)
        values: dict[int, Tensor] = {}
        for group, branch in zip(self._grouping.groups, self.branches, strict=True):
            result = branch(shared)
            values.update(zip(group, result if isinstance(branch, GatedTrunk) else [result], strict=True))
        heads = zip(self.tasks.names, self.heads, strict=True)
        return {
            name: head(self.necks[cast(Head, head).reads](values[t])) for t, (name, head) in enumerate(heads)
        }

    def prune(self) -> StaticNetwork:
        """Give each group's branch as its gates left it: a copy, in eval mode, allclose to `forward`."""
        assembly = Assembly(self.backbone.input_shape)
        pruned = PrunedAssembly(assembly, self.task_weights_T.device)
        shared = Value.whole(assembly.chains("prefix", list(self.prefix), INPUT), self.shape)
        values: dict[int, Value] = {}
        for number, (group, branch) in enumerate(zip(self._grouping.groups, self.branches, strict=True)):
            name = f"groups.{number}"
            if isinstance(branch, GatedTrunk):
                names = [f"{name}.shared", *(f"{name}.tasks.{t}" for t in group)]
                values.update(zip(group, prune_gated(pruned, branch.graph(), shared, names), strict=True))
            else:
                end = assembly.chains(name, list(cast(nn.Sequential, branch)), shared.name)
                values[group[0]] = Value.whole(end, self.backbone.output_shapes[-1])
        heads = [cast(Head, head) for head in self.heads]
        outputs = [pruned.head(t, head, self.necks, values[t]) for t, head in enumerate(heads)]
        return assembly.finish(dict(zip(self.tasks.names, outputs, strict=True)))

    def expected_cost(self) -> Cost:
        """Give that of prefix, heads, and each group's branches as `GatedTrunk.expected_cost` says."""
        units = unit_costs(self.backbone)
        split = len(self.prefix)
        plain = sum_costs(units[split:])
        branches = [
            branch.expected_cost() if isinstance(branch, GatedTrunk) else plain for branch in self.branches
        ]
        heads = [head_cost(task, self.backbone) for task in self.tasks]
        return sum_costs((*units[:split], *branches, *heads))

    def trunks(self) -> Sequence[Sequence[nn.Module]]:
        """Of each group the shared branch, then each task's, or the one branch; the first with the prefix."""
        copies: list[list[nn.Module]] = []
        for branch in self.branches:
            if isinstance(branch, GatedTrunk):
                copies += [list(branch.shared), *(list(cast(nn.ModuleList, own)) for own in branch.own)]
            else:
                copies.append(list(cast(nn.Sequential, branch)))
        return [[*self.prefix, *copies[0]], *copies[1:]]


class DMTGInterroGate(MultiTaskNetwork):
    """First the groups (`DMTG`), then gates inside each group of more than one task (`InterroGate`); ours.

    In the first `group_share` of the epochs it is DMTG. Then each group keeps its branch: as its shared one,
    and copied as each of its tasks' own. Prefix and heads are kept too. The first phase falls away where a
    `grouping` is given. Its export is the union of both prunings.

    Args:
        backbone: What is split into prefix and branches.
        tasks: The job's tasks.
        groups: K, from 1 to the number of tasks; not needed where `grouping` is given.
        split: Units of the shared prefix.
        tau: As in `DMTG`.
        logits_lr: As in `DMTG`.
        sparsity_weight: As in `InterroGate`; the mean in L_s is over all tasks, one that is alone in its
            group costs 0.
        own_share: As in `InterroGate`.
        gate_lr: As in `InterroGate`.
        grouping: The groups, as names of tasks, if they are known.
        group_share: Share of the epochs for the first phase, between 0 and 1; one epoch at the least, and
            never the last one.

    Attributes:
        current: The network of the phase that it is in.

    Raises:
        ValueError: If a parameter is out of range, or the backbone can't feed a task's head.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        tasks: TaskSet,
        groups: int | None = None,
        split: int = 0,
        tau: float = CELEBA_TAU,
        logits_lr: float | None = None,
        sparsity_weight: float = 0.1,
        own_share: float = 0.0,
        gate_lr: float = 0.05,
        grouping: Sequence[Sequence[str]] | None = None,
        group_share: float = 0.5,
    ) -> None:
        super().__init__(backbone, tasks)
        self.gating = Gating(sparsity_weight=sparsity_weight, own_share=own_share, gate_lr=gate_lr)
        check_temperature("tau", tau)
        if logits_lr is not None:
            check_number("logits_lr", logits_lr, 0, above=True)
        check_number("group_share", group_share, 0, 1, above=True, below=True)
        check_split(split, backbone)
        self.split = split
        self.group_share = group_share
        self.dmtg: DMTG | None = None
        self.gated: GatedGroups | None = None
        if grouping is not None:
            given = Grouping.from_names(grouping, tasks)
            if groups is not None:
                check_groups(len(tasks), groups)
                if len(given) > groups:
                    raise ValueError(f"grouping: must have at most {groups} groups, found {len(given)}")
            self.gated = self._fresh(given)
        elif groups is None:
            raise ValueError("groups: must be given where `grouping` is not, found None")
        else:
            self.dmtg = DMTG(
                backbone=backbone, tasks=tasks, groups=groups, split=split, tau=tau, logits_lr=logits_lr
            )

    @property
    def current(self) -> DMTG | GatedGroups:
        """The network of the phase that it is in."""
        network = self.dmtg or self.gated
        assert network is not None
        return network

    @property
    def grouping(self) -> Grouping:
        """DMTG's at this moment, or the one that it has come to."""
        return self.current.grouping

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Give each task's output: [B, *input_shape] -> {task name: ...}."""
        outputs: dict[str, Tensor] = self.current(x)
        return outputs

    def losses(self, x: Tensor, targets: Mapping[str, Tensor], generator: torch.Generator) -> Losses:
        """Give the phase's losses; the second one draws nothing."""
        return self.current.losses(x, targets, generator)

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Give those of the phase."""
        return self.current.parameter_groups(lr, weight_decay)

    def begin_epoch(self, epoch: int, epochs: int) -> bool:
        """Go over from groups to gates when it is time, and prepare the phase's epoch."""
        grouping_epochs = probe_epochs(self.group_share, epochs)
        if self.dmtg is None:
            return self.current.begin_epoch(epoch, epochs)
        if epoch < grouping_epochs:
            return self.dmtg.begin_epoch(epoch, grouping_epochs)
        self.gated = GatedGroups.from_dmtg(self.dmtg, self.gating)
        self.dmtg = None
        self.gated.begin_epoch(epoch, epochs)
        return True

    def settle(self, batches: Iterable[Tensor]) -> None:
        """Take the batch-norm statistics anew."""
        self.current.settle(batches)

    def prune(self) -> StaticNetwork:
        """Give the groups' branches as their gates left them: a copy, in eval mode."""
        return self.current.prune()

    def expected_cost(self) -> Cost:
        """Give that of the phase: DMTG's does not know of the branches that gates will add."""
        return self.current.expected_cost()

    def trunks(self) -> Sequence[Sequence[nn.Module]]:
        """Those of the phase."""
        return self.current.trunks()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back a `state_dict` of either phase; that of the second one brings its grouping along."""
        labels_T = state.get("gated.labels_T")
        if labels_T is not None:
            gated = self._fresh(Grouping.from_labels(labels_T.tolist()))
            self.gated = gated.to(self.task_weights_T.device).train(self.training)
            self.dmtg = None
        self.load_state_dict(state)

    def _fresh(self, grouping: Grouping) -> GatedGroups:
        return GatedGroups.fresh(
            backbone=self.backbone,
            tasks=self.tasks,
            grouping=grouping,
            gating=self.gating,
            split=self.split,
        )
