"""How good the groupings are that each method finds on `digits`, and what they cost.

    python tests/benchmarks/groupings.py [--seeds N] [--fresh N] [--groups K ...] [--data-seed N]
                                         [--surrogate]

The figure is the grouping regret: `(found - best) / (mean over all partitions of the same K - best)`, in test
error relative to single-task networks, averaged over tasks; 0 is the best partition, 1 is no better than
random. It comes from networks for all 63 subsets of the tasks, retrained with seeds that no method has seen.

Every method runs once for each seed, on MLPs of width 24 for 40 epochs with batches of 64. `s` is the median
of the processor's seconds until the grouping is known, on one thread; `units` is that over the seconds of one
standard network's training, all tasks shared. Networks for subsets train as one stacked batch, so they cost
less than a unit each: 21 of them for HOA and 63 for all subsets, for each of their seeds.

With `--surrogate` it is instead what the belief of `coterie.search.surrogate` makes of measured subsets: of
all subsets with 1 to 8 seeds, beside the choice by their plain means; and of few, measured once, and then
those that it asks for, 16 networks at a time for all numbers of groups, until it asks for none.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from functools import cache
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from coterie.models.affinity import random_partition
from coterie.models.backbones import MLP
from coterie.models.families.dmtg import probe_epochs
from coterie.models.tasks import Grouping
from coterie.search.affinity import (
    SubsetTable,
    all_subsets,
    exhaustive,
    hoa,
    measure_subsets,
    regret,
    singles_and_pairs,
)
from coterie.search.data.base import Dataset
from coterie.search.data.digits import Digits, DigitsOptions
from coterie.search.store import Candidate
from coterie.search.subsets import Recipe
from coterie.search.surrogate import GroupBelief, Observation, SubsetSurrogate
from coterie.search.trial import Assignment, Training, make_bench
from coterie.search.work import Subset

WIDTH = 24
DEPTH = 2
RECIPE = Recipe()
PROBE = 0.25  # of the epochs, as the families have it
FRESH_SEEDS = 1_000_000  # and up: far from those that the methods use
ROW = 10  # regrets of single seeds beside a name
REPLICATES = (1, 2, 3, 5, 8)  # of every subset
BATCH = 16  # networks that are asked for at a time
CHECKPOINTS = (21, 40, 63, 80, 100, 126, 160, 240)  # networks, the last one the most that are trained


class Found(NamedTuple):
    """What one run found, and the processor's seconds that it took."""

    grouping: Grouping
    seconds: float


class Lab:
    """The data, and the ways to find groups in them."""

    def __init__(self, data: Dataset) -> None:
        self.bench = make_bench(data.tasks, data, cpus=1, gpus=0)
        self.backbone = MLP(input_shape=data.input_shape, width=WIDTH, depth=DEPTH)

    def by_training(self, family: str, seed: int, epochs: int = RECIPE.epochs, **parameters: Any) -> Found:
        """Train as a trial does, for the first `epochs`."""
        began = time.process_time()
        candidate = Candidate(
            family=family,
            backbone="mlp",
            parameters={
                "width": WIDTH,
                "depth": DEPTH,
                "lr": RECIPE.lr,
                "weight_decay": RECIPE.weight_decay,
                "batch_size": RECIPE.batch_size,
                **parameters,
            },
        )
        assignment = Assignment(trial_id="", candidate=candidate, seed=seed, epochs=RECIPE.epochs)
        training = Training(assignment, self.bench, yardstick=None)
        while training.epoch < epochs:
            training.run_epoch()
        if not training.done:
            training.network.begin_epoch(epochs, RECIPE.epochs)
        grouping = training.network.grouping
        assert grouping is not None
        return Found(grouping, time.process_time() - began)

    def by_affinity(self, groups: int, seed: int, method: str) -> Found:
        """Measure affinities; the training of the groups that follow from them is left out."""
        return self.by_training(
            "affinity", seed, probe_epochs(PROBE, RECIPE.epochs), groups=groups, method=method, probe=PROBE
        )

    @cache  # noqa: B019 - there is one lab, and a table serves every number of groups
    def measured(self, largest: int, seeds: range) -> tuple[SubsetTable, float]:
        """Measure every subset of up to `largest` tasks on validation; with the seconds that it took."""
        began = time.process_time()
        subsets = [subset for subset in all_subsets(len(self.bench.tasks)) if len(subset) <= largest]
        validation, _ = measure_subsets(self.bench, self.backbone, subsets, seeds, RECIPE)
        return validation, time.process_time() - began

    def by_pairs(self, groups: int, seeds: range) -> Found:
        """HOA."""
        table, seconds = self.measured(2, seeds)
        return Found(hoa(table, groups), seconds)

    def by_all_subsets(self, groups: int, seeds: range) -> Found:
        """Choose what is best on validation."""
        table, seconds = self.measured(len(self.bench.tasks), seeds)
        return Found(exhaustive(table, groups), seconds)

    def by_chance(self, groups: int, seed: int) -> Found:
        """Draw a partition."""
        generator = torch.Generator().manual_seed(seed)
        return Found(random_partition(len(self.bench.tasks), groups, generator), 0.0)

    def methods(self) -> dict[str, Callable[[int, int], Found]]:
        """Name -> what takes the number of groups and a seed."""

        def seeds(seed: int, number: int) -> range:
            return range(number * seed, number * (seed + 1))

        return {
            "DMTG, faithful": lambda k, seed: self.by_training("dmtg", seed, groups=k),
            "DMTG, affinity start": lambda k, seed: self.by_training("dmtg", seed, groups=k, init="affinity"),
            "affinity": lambda k, seed: self.by_affinity(k, seed, "affinity"),
            "TAG": lambda k, seed: self.by_affinity(k, seed, "tag"),
            "HOA, 1 seed": lambda k, seed: self.by_pairs(k, seeds(seed, 1)),
            "HOA, 3 seeds": lambda k, seed: self.by_pairs(k, seeds(seed, 3)),
            "all subsets, 1 seed": lambda k, seed: self.by_all_subsets(k, seeds(seed, 1)),
            "all subsets, 3 seeds": lambda k, seed: self.by_all_subsets(k, seeds(seed, 3)),
            "random": self.by_chance,
        }


def observe(table: SubsetTable, counts: Mapping[Subset, int], start: int) -> list[Observation]:
    """So many networks of each subset, from a replicate on; beyond the last one the first follows.

    Gains are over the mean of the single-task networks among them.
    """
    index = {subset: n for n, subset in enumerate(table.subsets)}

    def errors(subset: Subset, replicate: int) -> NDArray[np.float64]:
        return table.errors_RNT[(start + replicate) % len(table.errors_RNT), index[subset], list(subset)]

    single_T = np.array(
        [fmean(float(errors((t,), r)[0]) for r in range(counts[t,])) for t in range(table.tasks)]
    )
    return [
        Observation(subset, 1 - errors(subset, r) / single_T[list(subset)], r)
        for subset, count in counts.items()
        for r in range(count)
    ]


def adapt(
    table: SubsetTable, first: list[Subset], start: int, numbers: list[int]
) -> list[tuple[int, dict[int, Grouping]]]:
    """Measure the first subsets once, then what is asked for; networks and the best after each step."""
    counts = dict.fromkeys(first, 1)
    steps = []
    while (networks := sum(counts.values())) <= CHECKPOINTS[-1]:
        belief = GroupBelief(SubsetSurrogate(table.tasks, observe(table, counts, start)))
        steps.append((networks, {groups: belief.best(groups) for groups in numbers}))
        chosen = belief.next_subsets(np.random.default_rng([start, len(steps)]), numbers, BATCH)
        if not chosen:
            break
        for subset in chosen:
            counts[subset] = counts.get(subset, 0) + 1
    return steps


def judge_surrogate(lab: Lab, judge: SubsetTable, runs: int, numbers: list[int]) -> None:
    """Print what the surrogate finds, each run with seeds of its own as far as they reach."""
    subsets = all_subsets(len(lab.bench.tasks))
    block = max(REPLICATES)
    table, _ = measure_subsets(lab.bench, lab.backbone, subsets, range(block * runs), RECIPE)
    heads = " ".join(f"K={groups} {'means':>6} {'belief':>6}" for groups in numbers)
    print(f"all subsets, regret\n{'seeds':>6} {'networks':>8}  {heads}")
    for seeds in REPLICATES:
        columns = []
        for groups in numbers:
            means, beliefs = [], []
            for start in range(0, seeds * runs, seeds):
                measured = SubsetTable(
                    subsets=table.subsets, errors_RNT=table.errors_RNT[start : start + seeds]
                )
                means.append(regret(exhaustive(measured, groups), judge, groups))
                observations = observe(table, dict.fromkeys(subsets, seeds), start)
                found = GroupBelief(SubsetSurrogate(table.tasks, observations)).best(groups)
                beliefs.append(regret(found, judge, groups))
            columns.append(f"    {fmean(means):6.2f} {fmean(beliefs):6.2f}")
        print(f"{seeds:6} {seeds * len(subsets):8}  {' '.join(columns)}", flush=True)
    for name, first in {"single tasks and pairs": singles_and_pairs(table.tasks), "all": subsets}.items():
        found = [adapt(table, first, block * run, numbers) for run in range(runs)]
        print(f"first {name}, then what it asks for\n{'up to':>6} {'networks':>8}  regret")
        for most in CHECKPOINTS:
            if most >= len(first):
                last = [[step for step in steps if step[0] <= most][-1] for steps in found]
                regrets = " ".join(
                    f"K={groups} {fmean(regret(best[groups], judge, groups) for _, best in last):4.2f}"
                    for groups in numbers
                )
                print(f"{most:6} {fmean(networks for networks, _ in last):8.0f}  {regrets}")
        print("networks at the end of each run:", *(steps[-1][0] for steps in found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="runs of each method")
    parser.add_argument("--fresh", type=int, default=20, help="seeds of the networks that judge")
    parser.add_argument("--groups", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--data-seed", type=int, default=0, help="of the data set")
    parser.add_argument("--surrogate", action="store_true", help="judge what the surrogate finds")
    arguments = parser.parse_args()
    lab = Lab(Digits.load(DigitsOptions(seed=arguments.data_seed)))
    names = lab.bench.tasks.names
    fresh = range(FRESH_SEEDS, FRESH_SEEDS + arguments.fresh)
    _, judge = measure_subsets(lab.bench, lab.backbone, all_subsets(len(names)), fresh, RECIPE)
    if arguments.surrogate:
        judge_surrogate(lab, judge, arguments.seeds, arguments.groups)
        return
    unit = median(lab.by_training("shared", seed).seconds for seed in range(3))
    print(f"one standard network's training: {unit:.2f} s")
    for groups in arguments.groups:
        best = exhaustive(judge, groups)
        print(f"\nK={groups}: " + " | ".join(" ".join(group) for group in best.names(lab.bench.tasks)))
        print(f"{'':20} {'regret':>6} {'s':>6} {'units':>5}  of each seed")
        for name, find in lab.methods().items():
            runs = [find(groups, seed) for seed in range(arguments.seeds)]
            regrets = [regret(run.grouping, judge, groups) for run in runs]
            seconds = median(run.seconds for run in runs)
            print(f"{name:20} {fmean(regrets):6.2f} {seconds:6.2f} {seconds / unit:5.1f} ", end="")
            for start in range(0, len(regrets), ROW):
                row = " ".join(f"{value:3.1f}" for value in regrets[start : start + ROW])
                print(row if start == 0 else f"{'':41}{row}", flush=True)


if __name__ == "__main__":
    main()
