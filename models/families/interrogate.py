"""InterroGate: for every channel of every layer, learned gates between a shared and a task's own one.

Bejnordi et al., "InterroGate: Learning to Share, Specialize, and Prune Representations for Multi-task
Learning", arXiv 2402.16848.
"""

import copy
import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from coterie.models.backbones import Backbone, Unit
from coterie.models.checks import check_number
from coterie.models.cost import Cost, cost_by_node, sum_costs
from coterie.models.families.base import Losses, MultiTaskNetwork
from coterie.models.graph import INPUT, Chain, Node
from coterie.models.heads import Head, Necks, head_cost
from coterie.models.layers import channel_axis
from coterie.models.losses import task_losses
from coterie.models.pruning import GatedGraph, PrunedAssembly, Value, prune_gated
from coterie.models.static import Assembly, Graph, StaticNetwork
from coterie.models.tasks import TaskSet

# Shapes: B batch, T tasks, L gated layers, G gates of a layer, C channels.

Weighting = Literal["plain", "macs"]

GATE_LIMIT = (
    3.0  # |alpha|: beyond it the sigmoid's slope is below a fifth of its greatest, and no gate returns
)
LEAST_OPEN = 1 / (1 + math.exp(GATE_LIMIT))  # sigmoid(-GATE_LIMIT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Gating:
    """How gates learn; the attributes are those of `InterroGate`."""

    sparsity_weight: float = 0.1
    own_share: float = 0.0
    gate_lr: float = 0.05
    gate_start: float = 0.5
    weighting: Weighting = "plain"
    frozen: float = 0.1

    def __post_init__(self) -> None:
        check_number("sparsity_weight", self.sparsity_weight, 0)
        check_number("own_share", self.own_share, 0, 1)
        check_number("gate_lr", self.gate_lr, 0, above=True)
        check_number("gate_start", self.gate_start, -GATE_LIMIT, GATE_LIMIT)
        check_number("frozen", self.frozen, 0, 1)
        if self.weighting not in get_args(Weighting):
            raise ValueError(f"weighting: must be one of {get_args(Weighting)}, found {self.weighting!r}")

    def penalty(self, trunks: Iterable["GatedTrunk"], task_weights_T: Tensor) -> Tensor:
        """Give `sparsity_weight * sum_t w_t * L_s`; a task in none of `trunks` has no gates and counts 0."""
        excess = task_weights_T.new_zeros(())
        if self.sparsity_weight:
            for trunk in trunks:
                excess = excess + F.relu(trunk.own_shares() - self.own_share).sum()
        return self.sparsity_weight * task_weights_T.sum() * excess / len(task_weights_T)

    def parameter_groups(
        self, network: nn.Module, trunks: Sequence["GatedTrunk"], lr: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        """Give the weights, then beta without decay, then alpha without decay at its own learning rate."""
        alphas = [alpha for trunk in trunks for alpha in trunk.alphas]
        betas = [beta for trunk in trunks for beta in trunk.betas]
        gates = {id(parameter) for parameter in (*alphas, *betas)}
        weights = [parameter for parameter in network.parameters() if id(parameter) not in gates]
        return [
            {"params": weights, "lr": lr, "weight_decay": weight_decay},
            {"params": betas, "lr": lr, "weight_decay": 0.0},
            {"params": alphas, "lr": self.gate_lr, "weight_decay": 0.0},
        ]

    def freeze(self, trunks: Iterable["GatedTrunk"], epoch: int, epochs: int) -> None:
        """Hold the gates in the last `frozen` of the epochs; beta learns on, it is a weight of the result."""
        learning = epochs - epoch > round(self.frozen * epochs)
        for trunk in trunks:
            for alpha in trunk.alphas:
                alpha.requires_grad_(learning)
                alpha.grad = None  # an optimizer would go on to move a parameter that keeps one


class GatedTrunk(nn.Module):
    """A shared branch and one for each task over the same units, with gates between them at every site.

    With the shared branch's result psi and task t's own phi_t at a site, each channel by itself:

        phi'_t = phi_t where alpha_t >= 0, psi elsewhere
        psi' = sum_t softmax_t(beta)_t * phi'_t

    and the next layers of task t's branch read phi'_t, those of the shared one psi'. The forward value is
    exactly one of the two; the gradient of alpha is that of `sigmoid(alpha) * phi_t + (1 - sigmoid(alpha)) *
    psi` (straight through the threshold).

    Args:
        units: What a branch consists of; the last one's output is a site.
        branches: The modules of `units`, of the shared branch first, then of each task's.
        shape: Of one sample of what they read.
        gate_start: Of every alpha.
        weighting: What the mean over the sites in `own_shares` weighs them by.

    Attributes:
        shared: The shared branch.
        own: Each task's.
        alphas: Of each site, [T, G].
        betas: Of each site but the last, whose psi' nobody reads, [T, G].
    """

    gate_weights: Tensor

    def __init__(
        self,
        units: Sequence[Unit],
        branches: Sequence[Sequence[nn.Module]],
        *,
        shape: tuple[int, ...],
        gate_start: float,
        weighting: Weighting,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.shared, *own = (nn.ModuleList(branch) for branch in branches)
        self.own = nn.ModuleList(own)
        self.sites = tuple(site for unit in units for site in unit.sites)
        self.alphas = nn.ParameterList(
            torch.full((len(own), site.gates), float(gate_start)) for site in self.sites
        )
        self.betas = nn.ParameterList(torch.zeros(len(own), site.gates) for site in self.sites[:-1])
        self.nodes, self._ends = _join_units(units)
        assert self.nodes[-1].name == self.sites[-1].node, "nothing would gate what the heads read"

        if weighting == "plain":
            site_weights = [1.0] * len(self.sites)
        else:
            site_weights = [cost.macs for cost in self._site_costs]
        total = sum(site_weights)
        weights = [
            torch.full((site.gates,), weight / (total * site.gates))
            for site, weight in zip(self.sites, site_weights, strict=True)
        ]
        self.register_buffer("gate_weights", torch.cat(weights), persistent=False)

        self._layers = [_layers(units, branch) for branch in branches]
        site_numbers = {site.node: number for number, site in enumerate(self.sites)}
        last_use = {source: step for step, node in enumerate(self.nodes) for source in node.inputs}
        self._steps = [
            (
                node,
                [layers[node.name] for layers in self._layers],
                site_numbers.get(node.name),
                [name for name in dict.fromkeys(node.inputs) if last_use[name] == step],
            )
            for step, node in enumerate(self.nodes)
        ]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Give each task's phi' at the last site: [B, *shape] -> T times [B, *the last unit's output shape].

        Training holds alpha within its limit here, behind each of the optimizer's steps.
        """
        if self.training:
            with torch.no_grad():
                for alpha in self.alphas:
                    alpha.clamp_(-GATE_LIMIT, GATE_LIMIT)
        values = {INPUT: [x] * (1 + len(self.own))}
        for node, layers, number, over in self._steps:
            inputs = zip(*(values[name] for name in node.inputs), strict=True)
            results = [layer(*tensors) for layer, tensors in zip(layers, inputs, strict=True)]
            values[node.name] = results if number is None else self._gate(number, *results)
            for name in over:
                del values[name]
        return values[self.nodes[-1].name][1:]

    def own_shares(self) -> Tensor:
        """Give each task's mean of sigmoid(alpha): over the gates of each site, then over sites, [T]."""
        # No matrix product: autocast would round it.
        return (torch.cat(list(self.alphas), dim=1).sigmoid() * self.gate_weights).sum(dim=1)

    def expected_cost(self) -> Cost:
        """Give what is expected to be left of the branches.

        Gate c of task t at site l is taken to end open with probability p[t, l, c], independently of others:
        sigmoid(alpha), stretched so that it is 0 and 1 at the limits of alpha, where a gate stays; or as the
        gate stands, once it is held. A task's own channel is computed where its gate is open, a shared one
        where some task's is closed, each from all channels before it:

            sum_l cost_l * mean_c (sum_t p[t, l, c] + 1 - prod_t p[t, l, c])

        with cost_l that of the layers of one branch that are computed for site l. Where all gates are
        decided the macs are exact, and so are the parameters of all layers but layer norms: of these a branch
        has all or nothing, and here a share. What mixes the shared branch has no macs and no parameters.

        Without the stretch the six tasks of `digits` count for 1.28 times `shared` where all gates have
        closed for good.
        """
        # In double precision on the CPU: exact where gates are decided, and one copy from a GPU.
        alpha_TG = torch.cat([*self.alphas], dim=1).detach().cpu().double()
        if self.alphas[0].requires_grad:
            open_TG = ((alpha_TG.sigmoid() - LEAST_OPEN) / (1 - 2 * LEAST_OPEN)).clamp(0, 1)
        else:
            open_TG = (alpha_TG >= 0).double()
        copies_G = open_TG.sum(dim=0) + 1 - open_TG.prod(dim=0)
        gates = [site.gates for site in self.sites]
        copies_L = [float(copies.sum()) for copies in torch.split(copies_G, gates)]
        sites = zip(self.sites, self._site_costs, copies_L, strict=True)
        # Multiplied first: a whole number of channels then has a whole cost.
        return sum_costs(cost * copies / site.gates for site, cost, copies in sites)

    @cached_property
    def _site_costs(self) -> list[Cost]:
        return _costs_by_site(self.nodes, {site.node for site in self.sites}, self.shape)

    @property
    def gates(self) -> dict[str, Tensor]:
        """For each site's node which gates of each task are open to its own branch, [T, G], bool."""
        return {
            site.node: alpha_TG.detach() >= 0 for site, alpha_TG in zip(self.sites, self.alphas, strict=True)
        }

    def graph(self) -> GatedGraph:
        """Describe it as it is now, for pruning."""
        blocks = {site.node: site.block for site in self.sites}
        mixing = {
            site.node: beta_TG.detach().softmax(dim=0).repeat_interleave(site.block, dim=1)
            for site, beta_TG in zip(self.sites, self.betas, strict=False)  # the last has none
        }
        return GatedGraph(
            shape=self.shape,
            nodes=self.nodes,
            ends=self._ends,
            layers=self._layers,
            gates={name: gates.repeat_interleave(blocks[name], dim=1) for name, gates in self.gates.items()},
            mixing=mixing,
        )

    def _gate(self, number: int, psi: Tensor, *phis: Tensor) -> list[Tensor]:
        """Give psi' and each phi', without psi' at the last site."""
        block = self.sites[number].block
        alpha_TC = self.alphas[number].repeat_interleave(block, dim=1)
        gated = [
            cast(Tensor, _Gate.apply(_beside(psi, alpha_C), phi, psi))  # type: ignore[no-untyped-call]
            for alpha_C, phi in zip(alpha_TC.unbind(), phis, strict=True)
        ]
        if number == len(self.betas):
            return [psi, *gated]
        beta_TC = self.betas[number].softmax(dim=0).repeat_interleave(block, dim=1).to(psi.dtype)
        first, *others = (_beside(psi, beta_C) for beta_C in beta_TC.unbind())
        mixed = first * gated[0]
        for beta, value in zip(others, gated[1:], strict=True):
            mixed = torch.addcmul(mixed, beta, value)
        return [mixed, *gated]


class GatedNetwork(MultiTaskNetwork):
    """A family that learns gates.

    Attributes:
        gating: How it does.
    """

    gating: Gating

    @abstractmethod
    def gated_trunks(self) -> Sequence[GatedTrunk]:
        """Where its gates are."""

    def losses(self, x: Tensor, targets: Mapping[str, Tensor], generator: torch.Generator) -> Losses:
        """Give each task's loss, and the price of open gates; draws nothing."""
        losses_T = task_losses(self(x), targets, self.tasks)
        return Losses(losses_T, self.gating.penalty(self.gated_trunks(), self.task_weights_T))

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Give the weights, then beta, then alpha, the last two without decay."""
        return self.gating.parameter_groups(self, self.gated_trunks(), lr, weight_decay)

    def begin_epoch(self, epoch: int, epochs: int) -> bool:
        """Hold the gates towards the end."""
        self.gating.freeze(self.gated_trunks(), epoch, epochs)
        return False

    def settle(self, batches: Iterable[Tensor]) -> None:
        """Take the batch-norm statistics anew: they still hold those of gates that have moved since."""
        update_bn(batches, self)


class InterroGate(GatedNetwork):
    """A shared backbone, one for each task, and learned gates between them: see `GatedTrunk`.

    The loss is `sum_t w_t * loss_t + sparsity_weight * (sum_t w_t) * L_s` with

        L_s = 1/T * sum_t max(0, 1/L * sum_l mean_c sigmoid(alpha_{t,l,c}) - own_share)

    over the gated layers l and their gates c. In the end the gates stand still, and `prune` gives what
    they left: `coterie.models.pruning`. Own branches start as copies of the shared one, so that a channel
    means the same on both sides of its gate. Training takes about T + 1 times a network's memory.

    Args:
        backbone: What is gated.
        tasks: The job's tasks.
        sparsity_weight: lambda_s, from 0. Times the sum of the task weights, so that one range fits all jobs.
        own_share: tau_t of every task, from 0 to 1: the share of its channels that costs nothing.
        gate_lr: Learning rate of alpha.
        gate_start: Of every alpha; a closed gate gives its own weights no gradient, so above 0 is wise.
        weighting: `plain` is the paper's mean over the layers; `macs` weighs each by the macs of what is
            computed for it (ours).
        frozen: Share of the epochs, at the end, in which the gates no longer move.

    Raises:
        ValueError: If a parameter is out of range, or the backbone can't feed a task's head.

    Example:
        >>> from coterie.models.backbones import MLP
        >>> from coterie.models.tasks import Task, TaskKind
        >>> tasks = TaskSet(Task(name=name, kind=TaskKind.BINARY) for name in ("even", "round"))
        >>> network = InterroGate(backbone=MLP(input_shape=(64,), width=24, depth=2), tasks=tasks)
        >>> {name: tuple(gates.shape) for name, gates in network.trunk.gates.items()}
        {'relu1': (2, 24), 'relu2': (2, 24)}
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        tasks: TaskSet,
        sparsity_weight: float = 0.1,
        own_share: float = 0.0,
        gate_lr: float = 0.05,
        gate_start: float = 0.5,
        weighting: Weighting = "plain",
        frozen: float = 0.1,
    ) -> None:
        super().__init__(backbone, tasks)
        self.gating = Gating(
            sparsity_weight=sparsity_weight,
            own_share=own_share,
            gate_lr=gate_lr,
            gate_start=gate_start,
            weighting=weighting,
            frozen=frozen,
        )
        self.necks = Necks(backbone, tasks)
        units = list(backbone.build())
        self.trunk = GatedTrunk(
            backbone.plan(),
            [units, *(copy.deepcopy(units) for _ in tasks)],
            shape=backbone.input_shape,
            gate_start=gate_start,
            weighting=weighting,
        )
        self.heads = nn.ModuleList(Head(task, backbone) for task in tasks)

    @property
    def grouping(self) -> None:
        """It does not share by groups."""

    def gated_trunks(self) -> Sequence[GatedTrunk]:
        """The one."""
        return [self.trunk]

    def start_from(
        self, shared: Sequence[nn.Module], own: Sequence[Sequence[nn.Module]] | None = None
    ) -> None:
        """Copy trained weights.

        Args:
            shared: A backbone's units, for the shared branch.
            own: The same for each task's, as `Single.trunks()` gives them; None takes `shared` for all.

        Raises:
            ValueError: If there are more or fewer branches or units.
            RuntimeError: If weights do not fit.
        """
        sources = [shared, *(own or [shared] * len(self.tasks))]
        for branch, units in zip(self.trunks(), sources, strict=True):
            for unit, source in zip(branch, units, strict=True):
                unit.load_state_dict(source.state_dict())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Give each task's output: [B, *input_shape] -> {task name: ...}."""
        values = zip(self.tasks.names, self.heads, self.trunk(x), strict=True)
        return {name: head(self.necks[cast(Head, head).reads](value)) for name, head, value in values}

    def prune(self) -> StaticNetwork:
        """Give what the gates left: a copy, in eval mode, allclose to this network's own `forward` there."""
        assembly = Assembly(self.backbone.input_shape)
        pruned = PrunedAssembly(assembly, self.task_weights_T.device)
        names = ["shared", *(f"tasks.{t}" for t in range(len(self.tasks)))]
        source = Value.whole(INPUT, self.backbone.input_shape)
        values = prune_gated(pruned, self.trunk.graph(), source, names)
        return assembly.finish(
            {
                name: pruned.head(t, cast(Head, head), self.necks, value)
                for t, (name, head, value) in enumerate(
                    zip(self.tasks.names, self.heads, values, strict=True)
                )
            }
        )

    def expected_cost(self) -> Cost:
        """Give that of the trunk's branches as `GatedTrunk.expected_cost` says, and of the heads."""
        heads = sum_costs(head_cost(task, self.backbone) for task in self.tasks)
        return self.trunk.expected_cost() + heads

    def trunks(self) -> Sequence[Sequence[nn.Module]]:
        """The shared branch, then each task's."""
        return [list(self.trunk.shared), *(list(cast(nn.ModuleList, branch)) for branch in self.trunk.own)]


class _Gate(torch.autograd.Function):
    """phi where alpha >= 0, psi elsewhere; alpha's gradient is that of the sigmoid."""

    @staticmethod
    def forward(alpha: Tensor, phi: Tensor, psi: Tensor) -> Tensor:
        return torch.where(alpha >= 0, phi, psi)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        alpha, phi, psi = inputs
        share = alpha.sigmoid()
        ctx.save_for_backward(alpha >= 0, share * (1 - share), phi, psi)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        is_open, slope, phi, psi = ctx.saved_tensors
        to_phi = gradient * is_open
        to_alpha = None
        if ctx.needs_input_grad[0]:
            to_alpha = slope * (gradient * (phi - psi)).sum_to_size(slope.shape)
        return to_alpha, to_phi, gradient - to_phi


def _beside(x: Tensor, values_C: Tensor) -> Tensor:
    """Shape one number a channel so that it multiplies `x`."""
    return values_C.view(-1, *(1,) * (x.dim() - 1 - channel_axis(x)))


def _join_units(units: Sequence[Unit]) -> tuple[tuple[Node, ...], tuple[str, ...]]:
    """Write units as one graph: its nodes, and the name of each unit's output."""
    nodes: list[Node] = []
    ends = [INPUT]
    for unit in units:
        for node in unit.nodes:
            inputs = tuple(ends[-1] if name == INPUT else name for name in node.inputs)
            nodes.append(replace(node, inputs=inputs))
        ends.append(unit.nodes[-1].name)
    return tuple(nodes), tuple(ends[1:])


def _layers(units: Sequence[Unit], branch: Sequence[nn.Module]) -> dict[str, nn.Module]:
    return {
        node.name: cast(Chain, chain).layer(node.name)
        for unit, chain in zip(units, branch, strict=True)
        for node in unit.nodes
    }


def _costs_by_site(nodes: tuple[Node, ...], sites: set[str], shape: tuple[int, ...]) -> list[Cost]:
    """The cost of each site: of the layers that are computed for it alone, back to the sites before."""
    graph = Graph(input_shape=shape, nodes=nodes, outputs={"": nodes[-1].name})
    costs = cost_by_node(StaticNetwork.empty(graph))
    totals = []
    since: dict[str, set[str]] = {INPUT: set()}
    for node in nodes:
        feeding = {node.name}.union(*(since[name] for name in node.inputs))
        if node.name in sites:
            totals.append(sum_costs(costs[name] for name in feeding))
            feeding = set()
        since[node.name] = feeding
    return totals
