"""Balancing: how the losses of several tasks become one step for the parameters that they share."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torchjd.aggregation import (
    IMTLG,
    MGDA,
    Aggregator,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    GradDrop,
    NashMTL,
    PCGrad,
    UPGrad,
)
from torchjd.scalarization import UW

from coterie.models.families.base import Losses, MultiTaskNetwork
from coterie.models.losses import COUNTED
from coterie.models.tasks import TaskSet

# Shapes: M tasks that share parameters, P numbers of those parameters, T tasks.

DWA_TEMPERATURE = 2.0  # the paper's
CAGRAD_RADIUS = 0.4  # the paper's, on NYU-v2
GREATEST_SEED = 2**63 - 1


class Balancer(nn.Module, ABC):
    """Turns the losses of one batch into gradients.

    Its parameters, where it has any, belong in the optimizer, and its `state_dict` in the checkpoint.
    """

    @abstractmethod
    def backward(self, losses: Losses, network: MultiTaskNetwork, generator: torch.Generator) -> Tensor:
        """Add to the `.grad` of the network's parameters and of its own.

        Args:
            losses: Of `network`, on one batch; the graph behind them is used up.
            network: Its task weights multiply the losses before anything else.
            generator: The source of whatever is drawn.

        Returns:
            The scalar that was minimised, or that would have been without aggregation; detached.
        """

    def end_epoch(self) -> None:
        """Take note that an epoch is over."""


class _Weighting(Balancer):
    """Minimises a weighted sum of the losses."""

    def backward(self, losses: Losses, network: MultiTaskNetwork, generator: torch.Generator) -> Tensor:
        total = self.combine(losses.tasks_T, network.task_weights_T, generator) + losses.penalty
        torch.autograd.backward(total)
        return total.detach()

    @abstractmethod
    def combine(self, losses_T: Tensor, weights_T: Tensor, generator: torch.Generator) -> Tensor:
        """Give the scalar to minimise."""


class Fixed(_Weighting):
    """The sum of the losses times their tasks' weights."""

    def combine(self, losses_T: Tensor, weights_T: Tensor, generator: torch.Generator) -> Tensor:
        """Give `sum_t w_t * L_t`."""
        return losses_T @ weights_T


class Uncertainty(_Weighting):
    """Weights by learned uncertainty (Kendall et al., CVPR 2018, arXiv 1705.07115, eq. 7 and 10).

    With s_t = log sigma_t^2, a parameter that starts at 0:

        sum_t exp(-s_t) * c_t * w_t * L_t + s_t / 2

    where c_t is 1/2 for regression (binary, multiclass and segmentation tasks have 1): the negative log
    likelihood of a Gaussian of variance sigma^2, and nearly that of a softmax of temperature sigma^2. An L1
    loss is treated like a squared one, which is usual. A task without labels has only its s_t / 2.
    """

    factors_T: Tensor

    def __init__(self, tasks: TaskSet) -> None:
        super().__init__()
        self.uncertainty = UW(len(tasks))
        # UW multiplies every loss by 1/2.
        factors_T = torch.tensor([2.0 if task.kind in COUNTED else 1.0 for task in tasks])
        self.register_buffer("factors_T", factors_T, persistent=False)

    def combine(self, losses_T: Tensor, weights_T: Tensor, generator: torch.Generator) -> Tensor:
        """Give the sum."""
        total: Tensor = self.uncertainty(self.factors_T * weights_T * losses_T)
        return total


class DWA(_Weighting):
    """Dynamic weight average (Liu et al., CVPR 2019, arXiv 1803.10704, eq. 7): what falls slowly weighs more.

        lambda_t = T * softmax_t(r_t / 2),  r_t = L_t(last epoch) / L_t(the one before)

    with L_t a task's mean loss over an epoch; 1 in the first two epochs. torchjd's form keeps its means where
    no checkpoint finds them.
    """

    means_2T: Tensor
    sums_T: Tensor
    batches: Tensor

    def __init__(self, tasks: TaskSet) -> None:
        super().__init__()
        # Of the epoch before the last one and of the last; NaN where there was none.
        self.register_buffer("means_2T", torch.full((2, len(tasks)), torch.nan))
        self.register_buffer("sums_T", torch.zeros(len(tasks)))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def combine(self, losses_T: Tensor, weights_T: Tensor, generator: torch.Generator) -> Tensor:
        """Give `sum_t lambda_t * w_t * L_t`, and add the losses to the epoch's."""
        self.sums_T += losses_T.detach()
        self.batches += 1
        before_T, last_T = self.means_2T
        rates_T = torch.where(before_T > 0, last_T / before_T, 1)
        lambdas_T = len(rates_T) * torch.softmax(rates_T / DWA_TEMPERATURE, dim=0)
        return losses_T @ (weights_T * lambdas_T)

    def end_epoch(self) -> None:
        """Keep the epoch's means."""
        self.means_2T.copy_(torch.stack([self.means_2T[1], self.sums_T / self.batches]))
        self.sums_T.zero_()
        self.batches.zero_()


class RandomWeighting(_Weighting):
    """New weights each step, the softmax of normal draws (Lin et al., TMLR 2022, arXiv 2111.10603).

    Times T, so that their mean is 1 and a family's penalty keeps its strength.
    """

    def combine(self, losses_T: Tensor, weights_T: Tensor, generator: torch.Generator) -> Tensor:
        """Give the sum."""
        draws_T = torch.randn(len(losses_T), generator=generator, device=generator.device)
        lambdas_T = len(draws_T) * torch.softmax(draws_T, dim=0).to(losses_T)
        return losses_T @ (weights_T * lambdas_T)


class Aggregation(Balancer):
    """Aggregates the gradients of the tasks, where they share parameters, by one of torchjd's methods.

    Parameters that the same two or more tasks reach are aggregated together: the gradients of `w_t * L_t` by
    them are the rows of one Jacobian. (A grouped network has one for each group.) What one task alone reaches
    gets its plain gradient, and what the family adds to the losses is not aggregated. A task reaches a
    parameter where its gradient is not all 0: one without labels in a batch has no say in it.

    It takes one backward pass a task, and memory for as many gradients as tasks reach each parameter.

    Args:
        build: Gives the method for M rows, from as many ones: the weights that make it a sum where nothing
            conflicts, for methods that take some.
    """

    def __init__(self, build: Callable[[Tensor], Aggregator]) -> None:
        super().__init__()
        self._build = build

    def backward(self, losses: Losses, network: MultiTaskNetwork, generator: torch.Generator) -> Tensor:
        """Aggregate, and add the penalty's gradient."""
        weighted_T = losses.tasks_T * network.task_weights_T
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        gradients = _task_gradients(weighted_T, parameters)
        sharing: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for p, by_task in gradients.items():
            sharing[tuple(by_task)].append(p)
        with _drawing_from(generator, weighted_T.device):
            for reached_by, members in sharing.items():
                if not reached_by:
                    for p in members:
                        _accumulate(parameters[p], torch.zeros_like(parameters[p]))
                    continue
                jacobian_MP = torch.cat(
                    [torch.stack([gradients[p][t].flatten() for t in reached_by]) for p in members], dim=1
                )
                sizes = [parameters[p].numel() for p in members]
                for p, gradient in zip(
                    members, torch.split(self._aggregate(jacobian_MP), sizes), strict=True
                ):
                    _accumulate(parameters[p], gradient.view(parameters[p].shape))
        if losses.penalty.requires_grad:
            torch.autograd.backward(losses.penalty)
        return (weighted_T.sum() + losses.penalty).detach()

    def _aggregate(self, jacobian_MP: Tensor) -> Tensor:
        """[M, P] -> [P]; what is not finite is passed on for the caller to see: the solvers would fail."""
        if len(jacobian_MP) == 1 or not jacobian_MP.isfinite().all():
            return jacobian_MP.sum(dim=0)
        return self._build(jacobian_MP.new_ones(len(jacobian_MP)))(jacobian_MP)


def _task_gradients(losses_T: Tensor, parameters: Sequence[Tensor]) -> dict[int, dict[int, Tensor]]:
    """For each parameter in the losses' graph the gradient of every task that reaches it.

    Task by task, since `torchjd.autojac.jac` keeps a row for every task and parameter, most of them zeros
    where tasks are apart.
    """
    reaching: dict[int, dict[int, Tensor]] = defaultdict(dict)
    for t, loss in enumerate(losses_T.unbind()):
        every: Sequence[Tensor | None] = torch.autograd.grad(
            loss, parameters, retain_graph=True, allow_unused=True
        )
        found = {p: gradient for p, gradient in enumerate(every) if gradient is not None}
        nonzero = torch.stack([gradient.any() for gradient in found.values()]).tolist()
        for (p, gradient), reached in zip(found.items(), nonzero, strict=True):
            by_task = reaching[p]
            if reached:
                by_task[t] = gradient
    return reaching


def _accumulate(parameter: Tensor, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


@contextmanager
def _drawing_from(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Let torch's global generators follow `generator` for a while: the methods draw from nothing else."""
    seed = torch.randint(GREATEST_SEED, (), generator=generator, device=generator.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(seed))
        yield


_WEIGHTINGS: Mapping[str, Callable[[TaskSet], Balancer]] = {
    "fixed": lambda tasks: Fixed(),
    "uncertainty": Uncertainty,
    "dwa": DWA,
    "random": lambda tasks: RandomWeighting(),
}

# Those that keep nothing from step to step. MGDA and IMTL-G stay the means that they are as published.
_AGGREGATORS: Mapping[str, Callable[[Tensor], Aggregator]] = {
    "upgrad": lambda ones_M: UPGrad(ones_M),
    "mgda": lambda ones_M: MGDA(),
    "pcgrad": lambda ones_M: PCGrad(),
    "imtl_g": lambda ones_M: IMTLG(),
    "aligned_mtl": lambda ones_M: AlignedMTL(ones_M),
    "config": lambda ones_M: ConFIG(ones_M),
    "dualproj": lambda ones_M: DualProj(ones_M),
    "graddrop": lambda ones_M: GradDrop(),
    "cagrad": lambda ones_M: CAGrad(CAGRAD_RADIUS),
    "nash_mtl": lambda ones_M: NashMTL(len(ones_M)),  # solved anew each step: no state to keep
}

# The packages that a method needs beyond torchjd; the extra that brings them has the method's name.
_EXTRAS: Mapping[str, tuple[str, ...]] = {"cagrad": ("cvxpy", "clarabel"), "nash_mtl": ("cvxpy", "ecos")}


def _installed(name: str) -> bool:
    return all(find_spec(package) for package in _EXTRAS.get(name, ()))


# Those that run here, by name.
BALANCINGS: tuple[str, ...] = (*_WEIGHTINGS, *filter(_installed, _AGGREGATORS))


def build_balancer(name: str, tasks: TaskSet) -> Balancer:
    """Build a balancer.

    Args:
        name: One of `BALANCINGS`.
        tasks: Those of the network.

    Raises:
        ValueError: If the name is unknown, or its method needs a package that is not installed.
    """
    if name in _AGGREGATORS and name not in BALANCINGS:
        raise ValueError(f"balancing: {name!r} must have 'torchjd[{name}]' installed, found it missing")
    if name not in BALANCINGS:
        raise ValueError(f"balancing: must be one of {list(BALANCINGS)}, found {name!r}")
    if name in _WEIGHTINGS:
        return _WEIGHTINGS[name](tasks)
    return Aggregation(_AGGREGATORS[name])
