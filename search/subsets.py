"""What is trained beside the candidates to learn which tasks go together: networks for subsets, affinities.

Networks for many subsets of the tasks train as one stack (`coterie.models.stacked`) and come to what they
would come to alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.models.affinity import AffinityMeter
from coterie.models.backbones import MLP
from coterie.models.families import Grouped
from coterie.models.metrics import Evaluator
from coterie.models.stacked import STACKED_BATCH, StackedMLP, Subset
from coterie.models.tasks import DENSE, TaskSet
from coterie.search.recipe import recipe_of
from coterie.search.space import sizes_of
from coterie.search.store import AffinityResult, Candidate, SubsetResult
from coterie.search.trial import Assignment, Bench, Samples, Training
from coterie.search.work import AffinityRun, SubsetRun

# Shapes: T tasks.

ONE_STEP = "one_step"  # the method's name in `AffinityResult`


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a network is trained: by Adam, with a job's defaults.

    Attributes:
        epochs: Passes over the training split.
        lr: Learning rate.
        weight_decay: Times the weights, added to the gradient.
        batch_size: Samples a step.
    """

    epochs: int = 40
    lr: float = 5e-3
    weight_decay: float = 1e-6
    batch_size: int = 64


def stackable(backbone: str, tasks: TaskSet) -> bool:
    """Say whether networks for subsets of these tasks can train as one stack."""
    return backbone == MLP.name and not any(task.kind in DENSE for task in tasks)


def run_subsets(
    run: SubsetRun, bench: Bench, on_epoch: Callable[[], None] = lambda: None
) -> list[SubsetResult]:
    """Train a network for each subset and seed, and measure every metric of its tasks.

    Args:
        run: What to train; one stack a seed.
        bench: The job's data.
        on_epoch: Called behind each epoch; what it raises ends the run.

    Returns:
        By seed, then by subset, in the order of the run. A network whose weights or validation metrics are
        not finite is left out, and so is a test metric that is not.

    Raises:
        ValueError: If the candidate's networks can't be stacked, or are too many or too large.
    """
    backbone, recipe = _stack_of(run.candidate, bench, run.epochs)
    results = []
    for seed in run.seeds:
        stack = train_stack(bench, backbone, run.subsets, seed, recipe, on_epoch)
        finite = _finite_networks(stack)
        validation, test = measure_stack(stack, bench.validation), measure_stack(stack, bench.test)
        for n, subset in enumerate(stack.subsets):
            values = [value for metrics in validation[n].values() for value in metrics.values()]
            if not finite[n] or not all(map(math.isfinite, values)):
                continue
            members = [bench.tasks[t] for t in subset]
            results.append(
                SubsetResult(
                    tasks=tuple(task.name for task in members),
                    weights=tuple(task.weight for task in members),
                    seed=seed,
                    validation=validation[n],
                    test={
                        name: {metric: value for metric, value in metrics.items() if math.isfinite(value)}
                        for name, metrics in test[n].items()
                    },
                    run=run.run,
                )
            )
    return results


def run_affinity(
    run: AffinityRun, bench: Bench, on_epoch: Callable[[], None] = lambda: None
) -> AffinityResult:
    """Train a `shared` network, and measure on its batches how much the tasks help each other.

    It is what the family `affinity` does while it measures, for all of the run's epochs.

    Args:
        run: What to train.
        bench: The job's data.
        on_epoch: Called behind each epoch; what it raises ends the run.

    Raises:
        ValueError: If the candidate is impossible, or of another family.
        Diverged: If the training's loss or a metric is not finite.
    """
    if run.candidate.family != "shared":
        raise ValueError(f"family: of an affinity run must be 'shared', found {run.candidate.family!r}")
    assignment = Assignment(trial_id="", candidate=run.candidate, seed=run.seed, epochs=run.epochs)
    training = Training(assignment, bench, yardstick=None)
    network = training.network
    assert isinstance(network, Grouped)
    meter = AffinityMeter(bench.tasks).to(bench.device)
    shared = network.shared_parameters()

    def measure(x: Tensor, targets: Mapping[str, Tensor]) -> None:
        meter.step(network, shared, x, targets)

    while not training.done:
        training.run_epoch(before_step=measure)
        on_epoch()
    measured_TT = (meter.counts_TT > 0) & meter.affinity_TT.isfinite()
    return AffinityResult(
        method=ONE_STEP,
        tasks=bench.tasks.names,
        weights=tuple(task.weight for task in bench.tasks),
        seed=run.seed,
        matrix=[
            [value if is_measured else None for value, is_measured in zip(*row, strict=True)]
            for row in zip(meter.affinity_TT.tolist(), measured_TT.tolist(), strict=True)
        ],
    )


def train_stack(
    bench: Bench,
    backbone: MLP,
    subsets: Sequence[Subset],
    seed: int,
    recipe: Recipe,
    on_epoch: Callable[[], None] = lambda: None,
) -> StackedMLP:
    """Train a network for each subset, all as one stack.

    Args:
        bench: The data, and where to train.
        backbone: The shape of each network.
        subsets: Task indices.
        seed: Of initial weights and batches.
        recipe: How each is trained.
        on_epoch: Called behind each epoch.

    Raises:
        ValueError: As `StackedMLP` does.
    """
    stack = StackedMLP(backbone=backbone, tasks=bench.tasks, subsets=subsets, seeds=(seed,)).to(bench.device)
    optimizer = torch.optim.Adam(
        stack.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
    )
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = bench.train.inputs, bench.train.targets
    for _ in range(recipe.epochs):
        order = torch.randperm(len(inputs), generator=generator).to(bench.device)
        for index in torch.split(order, recipe.batch_size):
            batch = {name: targets[name][index] for name in bench.tasks.names}
            loss = stack.training_loss(inputs[index], batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        on_epoch()
    return stack


@torch.no_grad()
def measure_stack(stack: StackedMLP, samples: Samples) -> list[dict[str, dict[str, float]]]:
    """Measure every network of a stack of one seed on a split, as `coterie.search.trial.evaluate` does one.

    Returns:
        For each subset: task -> metric -> value, for the tasks that it has.
    """
    evaluators = [Evaluator(TaskSet(stack.tasks[t] for t in subset)) for subset in stack.subsets]
    for index in torch.split(torch.arange(len(samples.inputs)), STACKED_BATCH):
        outputs = stack(samples.inputs[index])
        targets = {name: samples.targets[name][index] for name in stack.tasks.names}
        for n, evaluator in enumerate(evaluators):
            evaluator.update({name: output[0, n] for name, output in outputs.items()}, targets)
    return [evaluator.compute() for evaluator in evaluators]


def _stack_of(candidate: Candidate, bench: Bench, epochs: int) -> tuple[MLP, Recipe]:
    """The shape and the training of each network of a run."""
    if candidate.family != "shared":
        raise ValueError(f"family: of subset networks must be 'shared', found {candidate.family!r}")
    if not stackable(candidate.backbone, bench.tasks):
        raise ValueError(
            f"backbone: of subset networks must be {MLP.name!r} without dense tasks, "
            f"found {candidate.backbone!r} with {list(bench.tasks.names)}"
        )
    recipe = recipe_of(candidate)
    if recipe["balancing"] != "fixed":
        raise ValueError(f"balancing: of subset networks must be 'fixed', found {recipe['balancing']!r}")
    backbone = MLP(input_shape=bench.input_shape, **sizes_of(candidate))
    return backbone, Recipe(
        epochs=epochs,
        lr=float(recipe["lr"]),
        weight_decay=float(recipe["weight_decay"]),
        batch_size=int(recipe["batch_size"]),
    )


def _finite_networks(stack: StackedMLP) -> list[bool]:
    """Whether all weights of each network are finite."""
    finite_M = torch.stack(
        [parameter.detach().isfinite().flatten(1).all(dim=1) for parameter in stack.parameters()]
    ).all(dim=0)
    found: list[bool] = finite_M.tolist()
    return found
