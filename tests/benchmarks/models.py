"""What the networks cost in time and memory, each beside the plain way, in one run.

    python tests/benchmarks/models.py [SECTION ...] [--pairs N] [--threads N ...]

Sections (all by default; `memory` prints a peak, the others ratios, smaller is better but for `subsets`):

- `step`: a DMTG training step of the CelebA recipe (64x64, `cnn`, 9 tasks, K=3, batch 64) over the plain way:
  one forward for each branch and each head, one loss call for each pair, default memory format, default Adam.
- `pruning`: a whole DMTG run with progressive pruning over one without, and the test errors of both.
- `export`: latency of InterroGate's exports over dense networks of the same macs.
- `routing`: one ETR-NLP forward for all tasks over one network a task.
- `subsets`: all 63 task subsets of `digits` one after another over one stacked batch.
- `memory`: peak memory of a process that does DMTG steps of the CelebA recipe at batch 256.

Every ratio is the median over pairs: both sides are timed in turns, so that what else the machine does meets
both alike.
"""

import argparse
import copy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.models.backbones import BACKBONES, CNN, MLP, Backbone
from coterie.models.cost import count_cost
from coterie.models.families import DMTG, ETRNLP, InterroGate, MultiTaskNetwork, Shared
from coterie.models.families.dmtg import gumbel_noise, gumbel_softmax
from coterie.models.metrics import Evaluator
from coterie.models.stacked import StackedMLP
from coterie.models.tasks import Task, TaskKind, TaskSet
from coterie.search.data.digits import Digits, DigitsOptions

CELEBA_TASKS = 9
CELEBA_GROUPS = 3
CELEBA_LR = 8e-4
BATCH = 64
MEMORY_BATCH = 256
DIGITS_LR = 5e-3

Batch = tuple[Tensor, dict[str, Tensor]]


def binary_tasks(number: int) -> TaskSet:
    return TaskSet(Task(name=f"task_{t}", kind=TaskKind.BINARY) for t in range(number))


def random_batch(backbone: Backbone, tasks: TaskSet, size: int) -> Batch:
    x = torch.rand(size, *backbone.input_shape)
    return x, {name: torch.randint(2, (size,)).float() for name in tasks.names}


def pair_ratio(ours: Callable[[], object], plain: Callable[[], object], pairs: int) -> float:
    """Median over pairs of our time over the plain one's; the first pair warms up."""
    ratios = []
    for _ in range(pairs + 1):
        seconds = []
        for side in (ours, plain):
            began = time.perf_counter()
            side()
            seconds.append(time.perf_counter() - began)
        ratios.append(seconds[0] / seconds[1])
    return median(ratios[1:])


class PlainDMTG(nn.Module):
    """The same network as one would write it down: every head by itself, every loss by itself."""

    def __init__(self, network: DMTG) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)

    def training_loss(self, x: Tensor, targets: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        network = self.network
        noise_TK = gumbel_noise(network.A_TK.shape, generator)
        G_TK = gumbel_softmax(network.A_TK, noise_TK, network.tau)
        loss = torch.zeros(())
        for k, branch in enumerate(network.branches):
            features = branch(x)
            for t, name in enumerate(network.tasks.names):
                logits = network.heads[k][t](features.flatten(1))
                loss = loss + G_TK[t, k] * F.binary_cross_entropy_with_logits(logits, targets[name])
        return loss


def step_section(pairs: int) -> Iterator[str]:
    backbone, tasks = CNN(input_shape=(3, 64, 64)), binary_tasks(CELEBA_TASKS)
    network = DMTG(backbone=backbone, tasks=tasks, groups=CELEBA_GROUPS)
    x, targets = random_batch(backbone, tasks, BATCH)
    generator = torch.Generator().manual_seed(0)

    def stepper(module: nn.Module, inputs: Tensor, *, fused: bool, bf16: bool = False) -> Callable[[], None]:
        optimizer = torch.optim.Adam(module.parameters(), lr=CELEBA_LR, fused=fused)

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
                loss = module.training_loss(inputs, targets, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

        return step

    plain = stepper(PlainDMTG(network), x, fused=False)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = x.to(memory_format=torch.channels_last)
    for name, bf16 in (("fp32", False), ("bf16 autocast", True)):
        ours = stepper(copy.deepcopy(network), x, fused=True, bf16=bf16)
        yield f"DMTG step, {name}, over the plain way: {pair_ratio(ours, plain, pairs):.2f}"


def train_dmtg(epochs: int, **parameters: object) -> tuple[float, float, tuple[tuple[int, ...], ...]]:
    """Train DMTG on `digits` as images; give seconds, mean test error in percent, and the groups found."""
    data = Digits.load(DigitsOptions())
    tasks = Digits.tasks()
    torch.manual_seed(0)
    network = DMTG(backbone=CNN(input_shape=data.input_shape, width=0.25), tasks=tasks, **parameters)  # type: ignore[arg-type]
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(network.parameter_groups(2e-3, 0.0), fused=True)
    generator = torch.Generator().manual_seed(0)
    inputs = (torch.tensor(data.train.inputs) - data.mean) / data.std
    targets = {name: torch.tensor(values) for name, values in data.train.targets.items()}
    began = time.perf_counter()
    for epoch in range(epochs):
        network.begin_epoch(epoch, epochs)
        network.train()
        for index in torch.randperm(len(inputs), generator=generator).split(BATCH):
            batch = {name: values[index] for name, values in targets.items()}
            loss = network.training_loss(inputs[index], batch, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    seconds = time.perf_counter() - began
    evaluator = Evaluator(tasks)
    with torch.no_grad():
        evaluator.update(
            network.prune()((torch.tensor(data.test.inputs) - data.mean) / data.std),
            {name: torch.tensor(values) for name, values in data.test.targets.items()},
        )
    errors = [metrics["error"] for metrics in evaluator.compute().values()]
    return seconds, 100 * sum(errors) / len(errors), network.grouping.groups


def pruning_section(pairs: int, epochs: int = 20) -> Iterator[str]:
    """What is saved are branches: at K=3 every group stays in use, at K=6 (as many as tasks) some don't."""
    for groups in (3, 6):
        settings = {"groups": groups, "tau": 1.0, "logits_lr": 0.1}
        runs = [
            [train_dmtg(epochs, epsilon=0.7 / groups, **settings), train_dmtg(epochs, **settings)]
            for _ in range(max(1, min(pairs, 3)))
        ]
        ratio = median(pruned[0] / plain[0] for pruned, plain in runs)
        (_, pruned_error, pruned_groups), (_, plain_error, plain_groups) = runs[0]  # equal in each pair
        yield f"DMTG run of {groups} groups with progressive pruning over one without: {ratio:.2f}"
        yield f"  test error {pruned_error:.2f} % over {plain_error:.2f} %"
        yield f"  groups {pruned_groups} over {plain_groups}"


def dense_of_macs(backbone: Backbone, tasks: TaskSet, macs: int) -> tuple[nn.Module, int]:
    """The `shared` network whose macs are nearest to these, by its width."""
    low, high = 0.02, 8.0
    best: tuple[int, Backbone] | None = None
    for _ in range(24):
        width = (low * high) ** 0.5
        wider = replace(backbone, width=max(1, round(width * 64)) if isinstance(backbone, MLP) else width)
        with torch.device("meta"):
            found = count_cost(Shared(backbone=wider, tasks=tasks).prune(), backbone.input_shape).macs
        if best is None or abs(found - macs) < abs(best[0] - macs):
            best = found, wider
        low, high = (width, high) if found < macs else (low, width)
    assert best is not None
    return Shared(backbone=best[1], tasks=tasks).prune(), best[0]


def export_section(pairs: int) -> Iterator[str]:
    tasks = binary_tasks(3)
    settings: list[tuple[Backbone, int]] = [
        (MLP(input_shape=(12, 12), width=96, depth=2), 200),
        (CNN(input_shape=(3, 64, 64), width=0.5), 20),
        (BACKBONES["resnet20"](input_shape=(3, 32, 32), width=1.0), 10),
        (BACKBONES["resnet18"](input_shape=(3, 112, 112), width=0.5), 5),
        (BACKBONES["vit_tiny"](input_shape=(3, 112, 112), width=0.5), 5),
    ]
    for backbone, repeats in settings:
        for share in (0.1, 0.3, 0.6):
            network = InterroGate(backbone=backbone, tasks=tasks)
            with torch.no_grad():
                for alpha in network.trunk.alphas:
                    alpha.copy_(torch.where(torch.rand_like(alpha) < share, 1.0, -1.0))
            gated = network.prune()
            macs = count_cost(gated, backbone.input_shape).macs
            dense, dense_macs = dense_of_macs(backbone, tasks, macs)
            x = torch.rand(1, *backbone.input_shape)

            def run(module: nn.Module, x: Tensor = x, repeats: int = repeats) -> None:
                with torch.inference_mode():
                    for _ in range(repeats):
                        module(x)

            ratio = pair_ratio(lambda g=gated: run(g), lambda d=dense: run(d), pairs)  # type: ignore[misc]
            yield (
                f"InterroGate export, {backbone.name}, {share:.0%} of gates open, {macs:,} macs, over dense "
                f"({dense_macs / macs:.2f} of its macs): {ratio:.2f}"
            )


def routing_section(pairs: int) -> Iterator[str]:
    tasks = binary_tasks(3)
    for name, shape, width in (("cnn", (3, 64, 64), 0.5), ("resnet20", (3, 32, 32), 1.0)):
        backbone = BACKBONES[name](input_shape=shape, width=width)
        x = torch.rand(16, *shape)
        together: MultiTaskNetwork = ETRNLP(backbone=backbone, tasks=tasks).eval()
        alone = [ETRNLP(backbone=backbone, tasks=TaskSet([task])).eval() for task in tasks]

        @torch.inference_mode()
        def one(network: MultiTaskNetwork = together, x: Tensor = x) -> None:
            network(x)

        @torch.inference_mode()
        def several(networks: list[ETRNLP] = alone, x: Tensor = x) -> None:
            for network in networks:
                network(x)

        yield f"ETR-NLP, {name}, one forward over one a task (3): {pair_ratio(one, several, pairs):.2f}"


def subsets_section(pairs: int) -> Iterator[str]:
    """One epoch of all subsets; evaluation is left out on both sides."""
    data = Digits.load(DigitsOptions())
    tasks = Digits.tasks()
    backbone = MLP(input_shape=data.input_shape, width=24, depth=2)
    subsets = [c for size in range(1, len(tasks) + 1) for c in combinations(range(len(tasks)), size)]
    inputs = (torch.tensor(data.train.inputs) - data.mean) / data.std
    targets = {name: torch.tensor(values) for name, values in data.train.targets.items()}
    generator = torch.Generator().manual_seed(0)

    def epoch(network: Any, names: Sequence[str], optimizer: torch.optim.Adam, batch: int) -> None:
        for index in torch.randperm(len(inputs), generator=generator).split(batch):
            y = {name: targets[name][index] for name in names}
            arguments = () if isinstance(network, StackedMLP) else (generator,)
            loss = network.training_loss(inputs[index], y, *arguments)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    def fresh(network: nn.Module) -> torch.optim.Adam:
        return torch.optim.Adam(network.parameters(), lr=DIGITS_LR, fused=True)

    stack = StackedMLP(backbone=backbone, tasks=tasks, subsets=subsets)
    networks = [Shared(backbone=backbone, tasks=TaskSet(tasks[t] for t in subset)) for subset in subsets]
    stack_optimizer, optimizers = fresh(stack), [fresh(network) for network in networks]
    for batch in (32, 64, 256):

        def stacked(batch: int = batch) -> None:
            epoch(stack, tasks.names, stack_optimizer, batch)

        def apart(batch: int = batch) -> None:
            for network, optimizer in zip(networks, optimizers, strict=True):
                epoch(network, network.tasks.names, optimizer, batch)

        ratio = 1 / pair_ratio(stacked, apart, pairs)
        yield f"63 subsets, batch {batch}: one after another over one stack: {ratio:.1f}"


def memory_section(pairs: int) -> Iterator[str]:
    command = [sys.executable, __file__, "one-big-step"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    yield done.stdout.strip()


def one_big_step() -> None:
    backbone, tasks = CNN(input_shape=(3, 64, 64)), binary_tasks(CELEBA_TASKS)
    network = DMTG(backbone=backbone, tasks=tasks, groups=CELEBA_GROUPS)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(network.parameters(), lr=CELEBA_LR, fused=True)
    x, targets = random_batch(backbone, tasks, MEMORY_BATCH)
    x = x.to(memory_format=torch.channels_last)
    before = peak_mib()
    for _ in range(3):
        loss = network.training_loss(x, targets, torch.Generator())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    print(f"DMTG step of the CelebA recipe, batch 256: peak {peak_mib():.0f} MiB, {before:.0f} before it")


def peak_mib() -> float:
    """Of this program alone: `getrusage` would count what its parent had when it was forked."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


SECTIONS: dict[str, Callable[[int], Iterator[str]]] = {
    "step": step_section,
    "pruning": pruning_section,
    "export": export_section,
    "routing": routing_section,
    "subsets": subsets_section,
    "memory": memory_section,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, "one-big-step"], default=[*SECTIONS])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    arguments = parser.parse_args()
    if arguments.sections == ["one-big-step"]:
        one_big_step()
        return
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        print(f"{threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}")
        for section in arguments.sections:
            torch.manual_seed(0)
            for line in SECTIONS[section](arguments.pairs):
                print(line, flush=True)


if __name__ == "__main__":
    main()
