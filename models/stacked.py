"""Many small networks as one: an MLP for each of many task subsets, trained in one stacked batch.

Small networks cost a CPU the calls, not the arithmetic. Networks of one shape become one batched product a
layer; Adam works number by number, so one optimizer step moves all of them as one of their own would.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn

from coterie.models.backbones import MLP
from coterie.models.cost import sum_costs, unit_costs
from coterie.models.families.grouped import Grouped
from coterie.models.families.shared import Shared
from coterie.models.heads import head_cost
from coterie.models.losses import LOSSES, labelled
from coterie.models.tasks import DENSE, Grouping, Task, TaskKind, TaskSet

# Shapes: B batch, D features, H hidden neurons, N subsets, O outputs of all heads, R replicates, T tasks;
# M = R * N networks, those of one replicate one behind another.

Subset = tuple[int, ...]

STACKED_BATCH = 1024  # samples at once that `largest_stack` leaves room for
STACKED_NUMBERS = 2**29  # 2 GiB in single precision


class StackedMLP(nn.Module):
    """For each seed and each subset of the tasks the network that family `shared` has for that subset.

    A network's weights are those that `Shared` on the subset's tasks draws after
    `torch.manual_seed(start_seed(subset, seed))`: each has a start of its own, so that what is averaged over
    subsets is not off by what one start happens to be good at. Trained by one Adam on the sum of all losses,
    each network comes to what it would come to alone (allclose). Every network has a head for every task;
    those outside its subset are zero and stay so.

    Features stand before samples, [M, H, B]: weights keep the layout of `nn.Linear` and no operand is copied.
    On one thread a step of 63 networks of width 24 with batch 64 takes 1.3 ms so, 1.4 ms with samples first
    and 1.9 ms with `torch.func.vmap`.

    Args:
        backbone: The shape of each.
        tasks: All tasks; none may be dense.
        subsets: One network each, as task indices; no subset twice.
        seeds: One replicate of all subsets each; all see the same batches.

    Attributes:
        subsets: The same, indices rising.
        task_weights_NT: The tasks' weights in the loss, 0 where a subset has not the task.

    Raises:
        ValueError: If a parameter breaks its rule, or there are more networks than `largest_stack`; nothing
            is allocated then.

    Example:
        >>> tasks = TaskSet(Task(name=name, kind=TaskKind.BINARY) for name in "abc")
        >>> backbone = MLP(input_shape=(8,), width=4, depth=1)
        >>> stack = StackedMLP(backbone=backbone, tasks=tasks, subsets=[(0,), (1, 2)])
        >>> stack(torch.zeros(5, 8))["c"].shape
        torch.Size([1, 2, 5])
        >>> stack.assemble(Grouping(((0,), (1, 2)))).grouping.names(tasks)
        [['a'], ['b', 'c']]
    """

    task_weights_NT: Tensor

    def __init__(
        self, *, backbone: MLP, tasks: TaskSet, subsets: Iterable[Iterable[int]], seeds: Sequence[int] = (0,)
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.tasks = tasks
        self.subsets = tuple(tuple(sorted(subset)) for subset in subsets)
        self.seeds = tuple(seeds)
        _check(backbone, tasks, self.subsets, self.seeds)
        task_weights_NT = [
            [float(task.weight) if t in subset else 0.0 for t, task in enumerate(tasks)]
            for subset in self.subsets
        ]
        self.register_buffer("task_weights_NT", torch.tensor(task_weights_NT), persistent=False)

        networks = [self._draw(subset, seed) for seed in self.seeds for subset in self.subsets]
        trunks = [_linears(network.branches) for network in networks]
        layers = list(zip(*trunks, strict=True))
        heads = [self._all_heads(network) for network in networks]
        self.weights = nn.ParameterList(
            [
                *(torch.stack([linear.weight.detach() for linear in layer]) for layer in layers),
                torch.stack([weight_OH for weight_OH, _ in heads]),
            ]
        )
        self.biases = nn.ParameterList(
            [
                *(torch.stack([linear.bias.detach() for linear in layer]) for layer in layers),
                torch.stack([bias_O for _, bias_O in heads]),
            ]
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Give the outputs of all networks for each task, as `Head` gives one network's.

        Args:
            x: [B, *input_shape].

        Returns:
            Task name -> [R, N, B] or [R, N, B, O]; what a network answers to a task outside its subset means
            nothing.
        """
        outputs = {}
        parts = torch.split(self._heads(x), [task.outputs for task in self.tasks], dim=2)
        for task, part_RNOB in zip(self.tasks, parts, strict=True):
            outputs[task.name] = part_RNOB.squeeze(2) if task.outputs == 1 else part_RNOB.transpose(2, 3)
        return outputs

    def losses(self, x: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Give every network's losses, [R, N, T], without weights; those outside its subset mean nothing.

        Args:
            x: [B, *input_shape].
            targets: Each task's targets, as `coterie.models.losses` describes them.

        Raises:
            ValueError: If a task's targets do not have its outputs' shape.
        """
        # Neighbouring tasks of one form are cut out of the heads as they lie there: to take them apart and
        # stack them again, as `task_losses` has to, is a tenth of a step.
        heads_RNOB = self._heads(x)
        losses = []
        start = 0
        for (kind, loss, outputs), alike in groupby(self.tasks, key=_form):
            expected = torch.stack([targets[task.name] for task in alike])
            shape = (len(x), outputs) if kind is TaskKind.REGRESSION and outputs > 1 else (len(x),)
            if expected.shape[1:] != shape:  # they would be broadcast into a wrong loss
                raise ValueError(f"targets: must have the shape {shape}, found {tuple(expected.shape[1:])}")
            end = start + len(expected) * outputs
            part = heads_RNOB[:, :, start:end]
            if outputs > 1:
                part = part.view(*part.shape[:2], len(expected), outputs, -1).transpose(3, 4)
            losses.append(LOSSES[kind, loss](part, expected, labelled(expected, kind)))
            start = end
        return torch.cat(losses, dim=2)

    def training_loss(self, x: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Give the scalar to minimise on one batch: the sum of what each network would minimise alone."""
        weighted_RNT = self.losses(x, targets) * self.task_weights_NT
        # One task's loss may be infinite; 0 times that must not reach the networks without the task.
        return weighted_RNT.masked_fill(self.task_weights_NT == 0, 0).sum()

    def unstack(self, subset: Iterable[int], replicate: int = 0) -> Shared:
        """Give a copy of one network; its `prune` gives the static one.

        Raises:
            ValueError: If there is none for this subset.
        """
        members = tuple(sorted(subset))
        network = self._draw(members, seed=0).to(self.weights[0].device, self.weights[0].dtype)
        self._copy(members, replicate, network.branches, network.heads)
        return network

    def assemble(self, grouping: Grouping, replicate: int = 0) -> Grouped:
        """Put the grouped network of a partition of all tasks together, without training.

        Raises:
            ValueError: If there is no network for one of its groups.
        """
        groups = grouping.names(self.tasks)
        with torch.random.fork_rng(devices=[]):
            network = Grouped(backbone=self.backbone, tasks=self.tasks, grouping=groups)
        network.to(self.weights[0].device, self.weights[0].dtype)
        for branch, group in zip(network.branches, grouping.groups, strict=True):
            self._copy(group, replicate, branch, [network.heads[t] for t in group])
        return network

    def _heads(self, x: Tensor) -> Tensor:
        """Every output of every network, [R, N, O, B]."""
        (first_MHD, *weights), (first_MH, *biases) = self.weights, self.biases
        h_MHB = torch.addmm(first_MH.view(-1, 1), first_MHD.flatten(0, 1), x.flatten(1).T)
        h_MHB = h_MHB.view(*first_MH.shape, len(x))
        for weight_MOH, bias_MO in zip(weights, biases, strict=True):
            h_MHB = torch.baddbmm(bias_MO.unsqueeze(2), weight_MOH, h_MHB.relu())
        return h_MHB.view(len(self.seeds), len(self.subsets), *h_MHB.shape[1:])

    def _draw(self, subset: Subset, seed: int) -> Shared:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(start_seed(subset, seed))
            return Shared(backbone=self.backbone, tasks=TaskSet(self.tasks[t] for t in subset))

    def _all_heads(self, network: Shared) -> tuple[Tensor, Tensor]:
        """One network's heads, zero for the tasks that it has not: weight [O, H] and bias [O]."""
        heads = dict(zip(network.tasks.names, _linears(network.heads), strict=True))
        weight_OH, bias_O = [], []
        for task in self.tasks:
            head = heads.get(task.name)
            weight_OH.append(
                torch.zeros(task.outputs, self.backbone.width) if head is None else head.weight.detach()
            )
            bias_O.append(torch.zeros(task.outputs) if head is None else head.bias.detach())
        return torch.cat(weight_OH), torch.cat(bias_O)

    @torch.no_grad()
    def _copy(self, subset: Subset, replicate: int, trunk: nn.Module, heads: Iterable[nn.Module]) -> None:
        """Write a network's weights into a trunk and its heads."""
        if subset not in self.subsets:
            raise ValueError(f"subset: must be one of the stack's, found {subset}")
        m = replicate * len(self.subsets) + self.subsets.index(subset)
        *layers, (weight_MOH, bias_MO) = zip(self.weights, self.biases, strict=True)
        for linear, (weight, bias) in zip(_linears([trunk]), layers, strict=True):
            linear.weight.copy_(weight[m])
            linear.bias.copy_(bias[m])
        sizes = [task.outputs for task in self.tasks]
        weights, biases = torch.split(weight_MOH[m], sizes), torch.split(bias_MO[m], sizes)
        for linear, t in zip(_linears(heads), subset, strict=True):
            linear.weight.copy_(weights[t])
            linear.bias.copy_(biases[t])


def _form(task: Task) -> tuple[TaskKind, str, int]:
    """What tasks must have in common for their losses to be one call."""
    return task.kind, task.loss, task.outputs


def start_seed(subset: Iterable[int], seed: int) -> int:
    """Give the seed of one network's initial weights: another for each subset and seed."""
    return int(np.random.SeedSequence([seed, sum(1 << t for t in subset)]).generate_state(1, np.uint64)[0])


def largest_stack(backbone: MLP, tasks: TaskSet) -> int:
    """Give how many networks a stack may hold, at least 0.

    So many that all their numbers are at most `STACKED_NUMBERS`: each weight with its gradient and Adam's two
    means, and every layer's sums and activations for `STACKED_BATCH` samples.
    """
    outputs = sum(task.outputs for task in tasks)
    weights = sum_costs((*unit_costs(backbone), *(head_cost(task, backbone) for task in tasks))).params
    features = 2 * (backbone.depth * backbone.width + outputs)
    return int(STACKED_NUMBERS // (4 * weights + STACKED_BATCH * features))


def _linears(modules: Iterable[nn.Module]) -> list[nn.Linear]:
    return [part for module in modules for part in module.modules() if isinstance(part, nn.Linear)]


def _check(backbone: MLP, tasks: TaskSet, subsets: Sequence[Subset], seeds: Sequence[int]) -> None:
    if not isinstance(backbone, MLP):
        raise ValueError(f"backbone: of a stack must be 'mlp', found {backbone.name!r}")
    dense = [task.name for task in tasks if task.kind in DENSE]
    if dense:
        raise ValueError(f"tasks: of a stack must not be dense, found {dense}")
    if not subsets or len(set(subsets)) != len(subsets):
        raise ValueError(f"subsets: must be one or more, none twice, found {list(subsets)}")
    for subset in subsets:
        if not subset or len(set(subset)) != len(subset) or not 0 <= subset[0] <= subset[-1] < len(tasks):
            raise ValueError(
                f"subsets: must hold indices from 0 to {len(tasks) - 1}, none twice, found {subset}"
            )
    if not seeds:
        raise ValueError("seeds: must be one or more, found none")
    most = largest_stack(backbone, tasks)
    if len(subsets) * len(seeds) > most:
        raise ValueError(
            f"subsets: must be at most {most} networks of this size over all seeds, "
            f"found {len(subsets)} for each of {len(seeds)}"
        )
