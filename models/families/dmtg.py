"""DMTG: weights and task groups learned in one run.

Gao et al., "DMTG: One-Shot Differentiable Multi-Task Grouping", ICML 2024, arXiv 2407.05082.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.models.backbones import Backbone
from coterie.models.families.base import MultiTaskNetwork
from coterie.models.losses import task_losses
from coterie.models.static import GroupedNetwork
from coterie.models.tasks import Grouping, TaskSet

# Shapes: B batch, T tasks, K groups, D features.

Scaling = Literal["intended", "as_released", "off"]
LossNormalisation = Literal["none", "initial"]

CELEBA_TAU = 2.5  # the paper's CelebA recipe; its Taskonomy recipe has 4
LOSS_FLOOR = 1e-8  # an initial loss of zero would make every later one infinite


class DMTG(MultiTaskNetwork):
    """K branches that every task can use, and logits that learn which one it should.

    The first `split` units are a shared prefix. The K branches are copies of the rest, each with a head for
    every task; equal weights to start from, so that only the noise tells the groups apart at first. Grouping
    logits A [T, K] start at ones. Each step draws one relaxed sample of the grouping, for the whole batch:

        G = gumbel_softmax(A, tau)
        loss = sum_{t,k} w_t * G[t, k] * loss_t(head_{k,t}(branch_k(x)), y_t)

    and one Adam moves weights and logits together. In the end task t belongs to group argmax_k A[t, k], and
    only head (k*, t) counts; groups that no task chose vanish in `prune`.

    The K * T heads are one batched matrix product and one loss call in training: allclose to the plain loop.

    Args:
        backbone: What is split into prefix and branches.
        tasks: The job's tasks.
        groups: K, from 1 to the number of tasks.
        split: Units of the shared prefix.
        tau: Temperature of the relaxed sample, above 0.
        logits_lr: Learning rate of A; None takes the weights'. Adam moves A by about its learning rate a
            step, so this times the number of steps bounds how decided the groups can get.
        entropy_weight: Factor, from 0, of the mean over tasks of the sum over k of the binary entropies of
            softmax(A). In the released code, off in its published settings.
        scaling: `intended` multiplies the gradient by 1/sqrt(K) between prefix and branches and by 1/sqrt(T)
            between a branch and its heads (the paper's choice for dense tasks); `as_released` by 1/sqrt(K) at
            both places, which is what the released code computes; `off` leaves it as it is.
        loss_normalisation: `initial` divides each task's loss by its value on the first batch, the mean over
            the K heads (ours, for losses of different scale); `none` is the paper's form.

    Raises:
        ValueError: If a parameter is out of range, or as `GroupedNetwork` does.
    """

    initial_losses_T: Tensor

    def __init__(
        self,
        *,
        backbone: Backbone,
        tasks: TaskSet,
        groups: int,
        split: int = 0,
        tau: float = CELEBA_TAU,
        logits_lr: float | None = None,
        entropy_weight: float = 0.0,
        scaling: Scaling = "off",
        loss_normalisation: LossNormalisation = "none",
    ) -> None:
        super().__init__(tasks)
        if type(groups) is not int or not 1 <= groups <= len(tasks):
            raise ValueError(f"groups: must be a whole number from 1 to {len(tasks)}, found {groups!r}")
        for name, value in (("tau", tau), ("logits_lr", logits_lr)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: must be a finite number above 0, found {value!r}")
        if not 0 <= entropy_weight < math.inf:
            raise ValueError(f"entropy_weight: must be a finite number from 0, found {entropy_weight!r}")
        if scaling not in get_args(Scaling):
            raise ValueError(f"scaling: must be one of {get_args(Scaling)}, found {scaling!r}")
        if loss_normalisation not in get_args(LossNormalisation):
            raise ValueError(
                f"loss_normalisation: must be one of {get_args(LossNormalisation)}, "
                f"found {loss_normalisation!r}"
            )
        self.backbone = backbone
        self.split = split
        self.tau = tau
        self.logits_lr = logits_lr
        self.entropy_weight = entropy_weight
        self.loss_normalisation = loss_normalisation
        self.branch_scale, self.head_scale = {
            "intended": (groups**-0.5, len(tasks) ** -0.5),
            "as_released": (groups**-0.5, groups**-0.5),
            "off": (1.0, 1.0),
        }[scaling]

        start = GroupedNetwork(
            backbone=backbone, tasks=tasks, grouping=Grouping.together(len(tasks)), split=split
        )
        self.prefix = start.prefix
        self.branches = nn.ModuleList(copy.deepcopy(start.branches[0]) for _ in range(groups))
        weight_TD = torch.cat([head.get_parameter("weight").detach() for head in start.heads])
        bias_T = torch.cat([head.get_parameter("bias").detach() for head in start.heads])
        self.head_weight_KTD = nn.Parameter(weight_TD.repeat(groups, 1, 1))
        self.head_bias_KT = nn.Parameter(bias_T.repeat(groups, 1))
        self.A_TK = nn.Parameter(torch.ones(len(tasks), groups))
        self.register_buffer("initial_losses_T", torch.full((len(tasks),), math.nan))

    @property
    def grouping(self) -> Grouping:
        """The group of each task, argmax_k A[t, k]: the first of equal ones."""
        return Grouping.from_labels(self._labels())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Give the logits of each task's head in its group: [B, *input_shape] -> {task name: [B]}."""
        labels = self._labels()
        shared = self.prefix(x)
        features = {k: self.branches[k](shared) for k in set(labels)}
        return {
            name: F.linear(features[k], *self._head(k, t)).squeeze(-1)
            for t, (name, k) in enumerate(zip(self.tasks.names, labels, strict=True))
        }

    def training_loss(self, x: Tensor, targets: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """Give the loss at one relaxed sample of the grouping, drawn from `generator`.

        The noise is drawn on the generator's device, so that a generator on the CPU gives the same noise
        wherever the network is.
        """
        noise_TK = gumbel_noise(self.A_TK.shape, generator).to(self.A_TK)
        return self.loss_at(gumbel_softmax(self.A_TK, noise_TK, self.tau), x, targets)

    def loss_at(self, G_TK: Tensor, x: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Give the loss at a given relaxed grouping [T, K], whose rows sum to 1.

        With `initial` normalisation the first call sets what later losses are divided by.
        """
        losses_KT = task_losses(self._all_heads(x), targets, self.tasks)
        if self.loss_normalisation == "initial":
            first_T = losses_KT.detach().mean(dim=0).clamp(min=LOSS_FLOOR)
            self.initial_losses_T = torch.where(self.initial_losses_T.isnan(), first_T, self.initial_losses_T)
            losses_KT = losses_KT / self.initial_losses_T
        loss = (G_TK.T * losses_KT).sum(dim=0) @ self.task_weights_T
        if self.entropy_weight:
            loss = loss + self.entropy_weight * grouping_entropy(self.A_TK)
        return loss

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Give the weights, and A at its own learning rate and without decay."""
        weights = [parameter for name, parameter in self.named_parameters() if name != "A_TK"]
        logits_lr = lr if self.logits_lr is None else self.logits_lr
        return [
            {"params": weights, "lr": lr, "weight_decay": weight_decay},
            {"params": [self.A_TK], "lr": logits_lr, "weight_decay": 0.0},
        ]

    def prune(self) -> GroupedNetwork:
        """Give the branches that some task chose and each task's head there: a copy, in eval mode.

        Its outputs are bit-equal to this network's own `forward` in eval mode.
        """
        labels = self._labels()
        modules: dict[str, nn.Module] = {"prefix": self.prefix}
        # Groups in canonical form are sorted by their first task: the order in which labels are first seen.
        for branch, k in enumerate(dict.fromkeys(labels)):
            modules[f"branches.{branch}"] = self.branches[k]
        state = {
            f"{name}.{key}": value
            for name, module in modules.items()
            for key, value in module.state_dict().items()
        }
        for t, k in enumerate(labels):
            state[f"heads.{t}.weight"], state[f"heads.{t}.bias"] = self._head(k, t)
        return GroupedNetwork.from_state(
            {key: value.detach().clone() for key, value in state.items()},
            backbone=self.backbone,
            tasks=self.tasks,
            grouping=self.grouping,
            split=self.split,
        )

    def _labels(self) -> list[int]:
        labels: list[int] = self.A_TK.argmax(dim=1).tolist()
        return labels

    def _head(self, k: int, t: int) -> tuple[Tensor, Tensor]:
        """Weight [1, D] and bias [1] of head (k, t)."""
        return self.head_weight_KTD[k, t : t + 1], self.head_bias_KT[k, t : t + 1]

    def _all_heads(self, x: Tensor) -> dict[str, Tensor]:
        """Every head's logits, by task: [K, B]."""
        shared = scale_gradient(self.prefix(x), self.branch_scale)
        features_KBD = torch.stack([branch(shared) for branch in self.branches])
        features_KBD = scale_gradient(features_KBD, self.head_scale)
        logits_KBT = torch.baddbmm(self.head_bias_KT.unsqueeze(1), features_KBD, self.head_weight_KTD.mT)
        return dict(zip(self.tasks.names, logits_KBT.unbind(-1), strict=True))


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
