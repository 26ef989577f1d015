"""DMTG: weights and task groups learned in one run.

Gao et al., "DMTG: One-Shot Differentiable Multi-Task Grouping", ICML 2024, arXiv 2407.05082.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.models.affinity import AffinityMeter, best_partition, centred_affinity, check_groups
from coterie.models.backbones import Backbone, Feature
from coterie.models.checks import check_number, check_whole_number
from coterie.models.cost import Cost
from coterie.models.families.base import Losses, MultiTaskNetwork
from coterie.models.families.grouped import assemble_groups, check_split, cost_of_groups
from coterie.models.heads import Head, Necks
from coterie.models.losses import task_losses
from coterie.models.static import StaticNetwork
from coterie.models.tasks import DENSE, Grouping, TaskSet

# Shapes: A heads of a task, B batch, D features, K groups, N tasks with equally many heads, S draws, T tasks.

Scaling = Literal["auto", "intended", "as_released", "off"]
LossNormalisation = Literal["none", "initial", "running"]
Start = Literal["equal", "affinity"]

LEAST_TAU, MOST_TAU = 1e-3, 1e3  # below, a sample is a hard choice without gradient; above, always even
MAX_PATIENCE = 2**31 - 1  # far more epochs than a training has
CELEBA_TAU = 2.5  # the paper's CelebA recipe; its Taskonomy recipe has 4
LOSS_FLOOR = 1e-8  # a loss of nearly zero would make later ones infinite
LOSS_MEMORY = 0.99  # the running mean looks back about a hundred batches
START_SCALE = 1.5  # times tau: the typical wrong head keeps about 6 % of the sample, which A can still undo
EXPECTATION_DRAWS = 4096  # of a Sobol sequence: E[G] to about 1e-3


class DMTG(MultiTaskNetwork):
    """K branches that every task can use, and logits that learn which one it should.

    The first `split` units are a shared prefix. The K branches are copies of the rest, each with a head for
    every task; equal weights to start from, so that only the noise tells the groups apart at first. Grouping
    logits A [T, K] start at ones. Each step draws one relaxed sample of the grouping, for the whole batch:

        G = gumbel_softmax(A, tau)
        loss = sum_{t,k} w_t * G[t, k] * loss_t(head_{k,t}(branch_k(x)), y_t)

    and one Adam moves weights and logits together. In the end task t belongs to group argmax_k A[t, k], and
    only head (k*, t) counts; groups that no task chose vanish in `prune`.

    The linear heads of a branch are one matrix product in training, the losses of one kind one call: allclose
    to the plain loop.

    Ours, off in the faithful form:

    - **Affinity start**: the first epochs train one branch for all tasks and measure their one-step affinity.
      Then all branches and heads start from equal, untrained weights (on `digits` better than from those that
      all tasks have pulled at), and A at the affinities to the members of the best partition's groups.
    - **Progressive pruning**: a head whose expected sample E[G][t, k] stays below `epsilon` leaves the
      computation with its loss, and a branch without heads too. The softmax goes over the others; the noise
      is drawn as before.
    - **Fine-tuning** (the paper's published networks had one): the last epochs train each group on its own
      tasks, with A, the prefix and its batch-norm statistics fixed.

    Args:
        backbone: What is split into prefix and branches.
        tasks: The job's tasks.
        groups: K, from 1 to the number of tasks.
        split: Units of the shared prefix.
        tau: Temperature of the relaxed sample, from 0.001 to 1000, at the first epoch.
        tau_end: At the last one, reached geometrically; None keeps it constant, as in the paper.
        logits_lr: Learning rate of A; None takes the weights'. Adam moves A by about its learning rate a
            step, so this times the number of steps bounds how decided the groups can get.
        entropy_weight: Factor, from 0, of the mean over tasks of the sum over k of the binary entropies of
            softmax(A). In the released code, off in its published settings.
        scaling: `intended` multiplies the gradient by 1/sqrt(K) between prefix and branches and by 1/sqrt(T)
            between a branch and its heads; `as_released` by 1/sqrt(K) at both places, which is what the
            released code computes; `off` leaves it as it is. `auto` is the paper's choice: `intended` where
            a task is dense, else `off`.
        loss_normalisation: Divides each task's loss, for losses of different scale (ours): by its value on
            the first batch (`initial`) or its running mean (`running`), averaged over the task's heads;
            `none` is the paper's form.
        init: `equal` starts A at ones, as the paper does; `affinity` see above.
        probe: Share of the epochs that the affinity start takes, above 0; one epoch at the least, and never
            the last one.
        epsilon: Of the progressive pruning, from 0, which prunes nothing, to below 1.
        patience: Epochs, from 1, at whose beginnings E[G] must be below `epsilon` in a row.
        fine_tune: Share of the epochs that fine-tune at the end, from 0 to below 1 (with the affinity start,
            below 1 - `probe`).

    Raises:
        ValueError: If a parameter is out of range, or the backbone can't feed a task's head; nothing is
            allocated then.
    """

    loss_scales_T: Tensor
    dropped_TK: Tensor
    _active_TK: Tensor
    faint_since_TK: Tensor
    probing: Tensor

    def __init__(
        self,
        *,
        backbone: Backbone,
        tasks: TaskSet,
        groups: int,
        split: int = 0,
        tau: float = CELEBA_TAU,
        tau_end: float | None = None,
        logits_lr: float | None = None,
        entropy_weight: float = 0.0,
        scaling: Scaling = "auto",
        loss_normalisation: LossNormalisation = "none",
        init: Start = "equal",
        probe: float = 0.25,
        epsilon: float = 0.0,
        patience: int = 2,
        fine_tune: float = 0.0,
    ) -> None:
        super().__init__(backbone, tasks)
        check_groups(len(tasks), groups)
        check_split(split, backbone)
        check_temperature("tau", tau)
        if tau_end is not None:
            check_temperature("tau_end", tau_end)
        if logits_lr is not None:
            check_number("logits_lr", logits_lr, 0, above=True)
        check_number("entropy_weight", entropy_weight, 0)
        for name, choice, choices in (
            ("scaling", scaling, get_args(Scaling)),
            ("loss_normalisation", loss_normalisation, get_args(LossNormalisation)),
            ("init", init, get_args(Start)),
        ):
            if choice not in choices:
                raise ValueError(f"{name}: must be one of {choices}, found {choice!r}")
        check_number("probe", probe, 0, 1, above=True, below=True)
        check_number("epsilon", epsilon, 0, 1, below=True)
        check_whole_number("patience", patience, 1, MAX_PATIENCE)
        check_number("fine_tune", fine_tune, 0, 1 - probe if init == "affinity" else 1, below=True)
        self.split = split
        self.tau = tau
        self.tau_end = tau if tau_end is None else tau_end
        self.logits_lr = logits_lr
        self.entropy_weight = entropy_weight
        self.loss_normalisation = loss_normalisation
        self.probe = probe
        self.epsilon = epsilon
        self.patience = patience
        self.fine_tune = fine_tune
        if scaling == "auto":
            scaling = "intended" if any(task.kind in DENSE for task in tasks) else "off"
        self.branch_scale, self.head_scale = {
            "intended": (groups**-0.5, len(tasks) ** -0.5),
            "as_released": (groups**-0.5, groups**-0.5),
            "off": (1.0, 1.0),
        }[scaling]

        self.necks = Necks(backbone, tasks)
        units = backbone.build()
        self.prefix = nn.Sequential(*units[:split])
        first = nn.Sequential(*units[split:])
        self.branches = nn.ModuleList([first, *(copy.deepcopy(first) for _ in range(groups - 1))])
        heads = nn.ModuleList(Head(task, backbone) for task in tasks)
        self.heads = nn.ModuleList([heads, *(copy.deepcopy(heads) for _ in range(groups - 1))])
        self.A_TK = nn.Parameter(torch.ones(len(tasks), groups))
        self.register_buffer("loss_scales_T", torch.zeros(len(tasks)))  # 0 until a loss was seen
        self.register_buffer("dropped_TK", torch.zeros(len(tasks), groups, dtype=torch.bool))
        self.register_buffer("faint_since_TK", torch.full((len(tasks), groups), -1))  # an epoch, or -1
        probing = init == "affinity" and groups > 1
        self.register_buffer("probing", torch.tensor(probing))
        self.register_buffer("_active_TK", ~self.dropped_TK, persistent=False)
        self.meter = AffinityMeter(tasks) if probing else None

        # What `begin_epoch` makes of the state and the epoch.
        self._tau = tau
        self._probing = probing
        self._tuning = False
        self._plan()

    @property
    def grouping(self) -> Grouping:
        """The group of each task, argmax_k A[t, k]: the first of equal ones."""
        return Grouping.from_labels(self._labels())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Give the output of each task's head in its group: [B, *input_shape] -> {task name: ...}."""
        labels = self._labels()
        shared = self.prefix(x)
        features = {k: self.necks(self.branches[k](shared)) for k in set(labels)}
        return {
            name: head(features[k][head.reads])
            for name, k, head in zip(self.tasks.names, labels, self._chosen_heads(labels), strict=True)
        }

    def losses(self, x: Tensor, targets: Mapping[str, Tensor], generator: torch.Generator) -> Losses:
        """Give the losses at one relaxed sample of the grouping, drawn from `generator`.

        The noise is drawn on the generator's device, so that a generator on the CPU gives the same noise
        wherever the network is. Nothing is drawn where the grouping is fixed.
        """
        if self._probing and self.meter:
            self.meter.step(self, self._probed_parameters(), x, targets)
        if self._fixed:
            return self.losses_at(self._active_TK.to(self.A_TK), x, targets)
        noise_TK = gumbel_noise(self.A_TK.shape, generator).to(self.A_TK)
        return self.losses_at(gumbel_softmax(self._logits(), noise_TK, self._tau), x, targets)

    def losses_at(self, G_TK: Tensor, x: Tensor, targets: Mapping[str, Tensor]) -> Losses:
        """Give the losses at a given relaxed grouping [T, K], whose rows sum to 1 over the heads left.

        With `initial` normalisation a task's first loss sets what later ones are divided by.
        """
        losses_KT = self._head_losses(x, targets)
        if self.loss_normalisation != "none":
            self._follow_losses(losses_KT.detach().sum(dim=0) / self._active_TK.sum(dim=1))
            losses_KT = losses_KT / torch.where(self.loss_scales_T > 0, self.loss_scales_T, 1)
        penalty = losses_KT.new_zeros(())
        if self.entropy_weight and not self._fixed:
            penalty = self.entropy_weight * grouping_entropy(self._logits())
        return Losses((G_TK.T * losses_KT).sum(dim=0), penalty)

    def begin_epoch(self, epoch: int, epochs: int) -> bool:
        """Set the temperature, end the affinity start, drop faint heads, start to fine-tune."""
        self._tau = self.tau * (self.tau_end / self.tau) ** (epoch / max(epochs - 1, 1))
        probed = probe_epochs(self.probe, epochs) if self.meter else 0
        # An epoch at least learns the groups.
        self._tuning = epoch >= max(probed + 1, epochs - round(self.fine_tune * epochs))
        self.train(self.training)
        grouped = bool(self.probing) and epoch >= probed
        if grouped:
            self._start_groups()
        self._probing = bool(self.probing)
        if self.epsilon and not self._probing:
            self._drop_heads(epoch)
        self._plan()
        return grouped

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a prefix that is fixed keeps its batch-norm statistics."""
        super().train(mode)
        self.prefix.train(mode and not self._tuning)
        return self

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Give the weights, and A at its own learning rate and without decay."""
        weights = [parameter for name, parameter in self.named_parameters() if name != "A_TK"]
        logits_lr = lr if self.logits_lr is None else self.logits_lr
        return [
            {"params": weights, "lr": lr, "weight_decay": weight_decay},
            {"params": [self.A_TK], "lr": logits_lr, "weight_decay": 0.0},
        ]

    def prune(self) -> StaticNetwork:
        """Give the branches that some task chose and each task's head there: a copy, in eval mode.

        Its outputs are bit-equal to this network's own `forward` in eval mode.
        """
        labels = self._labels()
        return assemble_groups(
            backbone=self.backbone,
            tasks=self.tasks,
            prefix=self.prefix,
            branches=list(self.branches),
            labels=labels,
            necks=self.necks,
            heads=self._chosen_heads(labels),
        )

    def expected_cost(self) -> Cost:
        """Give that of prefix, heads and as many branches as some task is expected to end in.

        Task t ends in branch k with probability P[t, k] = softmax(A)[t, k] over the heads that are left,
        independently of the others, so branch k is kept with 1 - prod_t (1 - P[t, k]). This is how often a
        relaxed sample is greatest at k, whatever tau (Gumbel-max), so it says how sure the grouping is; the
        expected sample E[G] stays even at a high tau. While the affinity start measures, A is even. Where
        fine-tuning has fixed the groups, the cost is exact.
        """
        return cost_of_groups(self.backbone, self.tasks, self.split, self._expected_branches())

    def trunks(self) -> Sequence[Sequence[nn.Module]]:
        """The first branch with the prefix, then the others."""
        first, *others = (cast(nn.Sequential, branch) for branch in self.branches)
        return [[*self.prefix, *first], *(list(branch) for branch in others)]

    @property
    def _fixed(self) -> bool:
        """Whether each task has one head now, and A does not learn."""
        return self._tuning or self._probing

    def _expected_branches(self) -> float:
        if self._tuning:
            return len(self.grouping)
        P_TK = torch.softmax(self._logits().detach().double(), dim=1)
        return float((1 - (1 - P_TK).prod(dim=0)).sum())

    def _logits(self) -> Tensor:
        """A, and minus infinity where a head was dropped."""
        return self.A_TK.masked_fill(self.dropped_TK, -math.inf)

    def _labels(self) -> list[int]:
        labels: list[int] = self._logits().argmax(dim=1).tolist()
        return labels

    def _chosen_heads(self, labels: Sequence[int]) -> list[Head]:
        return [self._head(k, t) for t, k in enumerate(labels)]

    def _head(self, k: int, t: int) -> Head:
        return cast(Head, cast(nn.ModuleList, self.heads[k])[t])

    def _plan(self) -> None:
        """Set which heads are computed: [T, K] as a mask, and tasks with equally many heads together."""
        if self._fixed:  # before the groups start A is even, so every task has its head in the first branch
            labels_T = self._logits().argmax(dim=1)
            self._active_TK = F.one_hot(labels_T, self.A_TK.shape[1]).bool()
        else:
            self._active_TK = ~self.dropped_TK
        self._members: list[list[int]] = [column.nonzero()[:, 0].tolist() for column in self._active_TK.T]
        counts_T = self._active_TK.sum(dim=1)
        self._alike = []
        for count in sorted(set(counts_T.tolist())):
            tasks_N = (counts_T == count).nonzero()[:, 0]
            groups_AN = self._active_TK[tasks_N].nonzero()[:, 1].view(-1, count).T
            self._alike.append((TaskSet(self.tasks[t] for t in tasks_N.tolist()), tasks_N, groups_AN))

    def _head_losses(self, x: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """The loss of every head that is computed, 0 of the others: [K, T]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._tuning):
            shared = self.prefix(x)
        shared = scale_gradient(shared, self.branch_scale)
        outputs: dict[str, list[Tensor]] = {name: [] for name in self.tasks.names}
        for k, members in enumerate(self._members):
            if members:
                features = self.necks(scale_gradient(self.branches[k](shared), self.head_scale))
                heads = [self._head(k, t) for t in members]
                for t, output in zip(members, apply_heads(heads, features), strict=True):
                    outputs[self.tasks[t].name].append(output)
        losses_KT = self.A_TK.new_zeros(self.A_TK.T.shape)
        for tasks, tasks_N, groups_AN in self._alike:
            stacked = {name: torch.stack(outputs[name]) for name in tasks.names}
            losses_AN = task_losses(stacked, targets, tasks).to(losses_KT)
            losses_KT = losses_KT.index_put((groups_AN, tasks_N.expand_as(groups_AN)), losses_AN)
        return losses_KT

    def _follow_losses(self, losses_T: Tensor) -> None:
        """Take a batch's losses into what they are divided by; a loss of 0 is a batch without labels."""
        memory = LOSS_MEMORY if self.loss_normalisation == "running" else 1.0
        memory_T = torch.where(self.loss_scales_T > 0, memory, 0.0)
        followed_T = memory_T * self.loss_scales_T + (1 - memory_T) * losses_T.clamp(min=LOSS_FLOOR)
        self.loss_scales_T.copy_(torch.where(losses_T > 0, followed_T, self.loss_scales_T))

    def _probed_parameters(self) -> list[str]:
        """Names of what all tasks share while the affinity is measured."""
        shared = ("prefix.", "branches.0.")
        return [name for name, _ in self.named_parameters() if name.startswith(shared)]

    @torch.no_grad()
    def _start_groups(self) -> None:
        """End the affinity start: the first branch becomes as fresh as the others, and A what was found."""
        assert self.meter is not None
        self.branches[0].load_state_dict(self.branches[1].state_dict())
        self.heads[0].load_state_dict(self.heads[1].state_dict())
        self.A_TK.copy_(self._found_logits(self.meter.affinity_TT))
        self.probing.fill_(False)

    def _found_logits(self, affinity_TT: Tensor) -> Tensor:
        grouping = best_partition(affinity_TT, self.A_TK.shape[1])
        return START_SCALE * self.tau * group_affinities(affinity_TT, grouping)

    @torch.no_grad()
    def _drop_heads(self, epoch: int) -> None:
        """Drop the heads whose expected sample was below epsilon for long enough, never a task's first."""
        faint_TK = expected_sample(self._logits(), self._tau) < self.epsilon
        faint_TK &= ~F.one_hot(self._logits().argmax(dim=1), self.A_TK.shape[1]).bool()
        since_TK = torch.where(self.faint_since_TK < 0, epoch, self.faint_since_TK)
        self.faint_since_TK.copy_(torch.where(faint_TK, since_TK, -1))
        self.dropped_TK |= faint_TK & (epoch - since_TK + 1 >= self.patience)


def probe_epochs(share: float, epochs: int) -> int:
    """How many of the epochs measure affinity: their share, one at the least, and never the last one."""
    return min(max(1, round(share * epochs)), epochs - 1) if epochs > 1 else epochs


def group_affinities(affinity_TT: Tensor, grouping: Grouping) -> Tensor:
    """Give each task's mean centred affinity to the other members of each group, [T, K], scaled to rms 1.

    All 0 where the affinities tell nothing.
    """
    affinity_TT = centred_affinity(affinity_TT)
    members_TK = F.one_hot(torch.tensor(grouping.labels)).to(affinity_TT)
    mean_TK = affinity_TT @ members_TK / (members_TK.sum(dim=0) - members_TK).clamp(min=1)
    rms = mean_TK.square().mean().sqrt()
    return mean_TK / rms if rms > 0 else mean_TK


def apply_heads(heads: Sequence[Head], features: Mapping[Feature, Tensor]) -> list[Tensor]:
    """Give each head's output, all linear ones by one matrix product: allclose to `head(features)`.

    Args:
        heads: Of one branch.
        features: What they read, as `Necks` gives it.
    """
    linear = [cast(nn.Linear, head.layer("linear")) for head in heads if head.reads == "vector"]
    if linear:
        weight_OD = torch.cat([layer.weight for layer in linear])
        bias_O = torch.cat([layer.bias for layer in linear])
        together_BO = F.linear(features["vector"], weight_OD, bias_O)
        apart = iter(torch.split(together_BO, [layer.out_features for layer in linear], dim=1))
    outputs = []
    for head in heads:
        output = next(apart) if head.reads == "vector" else head(features[head.reads])
        outputs.append(output.squeeze(1) if head.reads == "vector" and head.output == "squeeze" else output)
    return outputs


def expected_sample(A_TK: Tensor, tau: float) -> Tensor:
    """The mean of `gumbel_softmax(A, tau)` over the noise, [T, K], to about 1e-3; equal for equal arguments.

    By `EXPECTATION_DRAWS` points of a scrambled Sobol sequence of fixed seed.
    """
    sobol = torch.quasirandom.SobolEngine(A_TK.shape[1], scramble=True, seed=0)  # type: ignore[no-untyped-call]
    tiny = torch.finfo(torch.float64).tiny
    noise_SK = -(-sobol.draw(EXPECTATION_DRAWS, dtype=torch.float64).clamp(min=tiny).log()).log()
    samples_STK = torch.softmax((A_TK.detach().cpu() + noise_SK.unsqueeze(1)) / tau, dim=2)
    return samples_STK.mean(dim=0).to(A_TK)


def check_temperature(name: str, tau: object) -> None:
    """Check a temperature of the relaxed sample.

    Raises:
        ValueError: If it is not a number from `LEAST_TAU` to `MOST_TAU`.
    """
    check_number(name, tau, LEAST_TAU, MOST_TAU)


def gumbel_noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw standard Gumbel noise, minus the log of an exponential variable, on the generator's device."""
    return -torch.empty(shape, device=generator.device).exponential_(generator=generator).log()


def gumbel_softmax(A_TK: Tensor, noise_TK: Tensor, tau: float) -> Tensor:
    """Relax a choice of group for each task: `softmax_k((A + noise) / tau)`, [T, K], rows sum to 1.

    Jang et al., arXiv 1611.01144, eq. 2; Maddison et al., arXiv 1611.00712.
    """
    return torch.softmax((A_TK + noise_TK) / tau, dim=1)


def grouping_entropy(A_TK: Tensor) -> Tensor:
    """Mean over tasks of the sum over k of the binary entropies of softmax(A): 0 once all is decided."""
    tiny = torch.finfo(A_TK.dtype).eps  # at 0 and 1 the entropy's slope is infinite
    p_TK = torch.softmax(A_TK, dim=1).clamp(tiny, 1 - tiny)
    entropy_TK = -torch.xlogy(p_TK, p_TK) - torch.xlogy(1 - p_TK, 1 - p_TK)
    return entropy_TK.sum(dim=1).mean()


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Pass `x` on unchanged, and its gradient times `factor`."""
    return x if factor == 1 else _ScaleGradient.apply(x, factor)  # type: ignore[no-untyped-call]


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        _, ctx.factor = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None
