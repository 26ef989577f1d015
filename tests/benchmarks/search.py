"""What a whole search finds, and what it pays: samplers side by side, groupings, and a negative control.

    python -m tests.benchmarks.search [volume] [regret] [control] [--seeds N] [--processes N]
        [--on mlp cnn] [--png FILE]

Searches run as a job's driver runs them (controller, sampler, scheduler, ledger, recorder), but for Ray: what
is to run trains in this process, one thing at a time on one thread. Each search is a process of its own.

- `volume`: hypervolume over device-seconds at equal budgets: random, Optuna's TPE without early stopping,
  NSGA-II, TPE with `pareto_asha`, and `coterie` with and without it, on `digits` with `mlp`, and with `cnn`
  on its 12x12 images. Subset networks are charged; the yardstick, which all have in common, is not. The last
  columns are the share of its device-seconds after which each has reached what random search has at the end
  (the mean over seeds), by seed: median, and range. A plot of it goes to FILE.
- `regret`: the grouping regret of a whole search, after 10, 20 and 40 trials, for K = 2 and 3: of that of the
  best completed trial with groups (by delta_m), and of the one that the sampler believes in. 0 is the
  best partition, 1 no better than a random one, judged by networks for all 63 subsets with fresh seeds.
- `control`: verdicts on tasks that neither help nor hurt, over seeds.
"""

import argparse
import multiprocessing
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch

from coterie.models.backbones import MLP
from coterie.models.tasks import Grouping
from coterie.search.affinity import SubsetTable, all_subsets, measure_subsets, regret
from coterie.search.coterie_sampler import CoterieSampler
from coterie.search.data.digits import Digits, DigitsOptions
from coterie.search.data.registry import sources
from coterie.search.store import (
    Trial,
    TrialState,
)
from coterie.search.subsets import Recipe
from coterie.search.trial import make_bench
from tests.search.control import Control
from tests.search.in_process import Search

ASHA = {"name": "pareto_asha", "grace_epochs": 3}
METHODS: Mapping[str, dict[str, Any]] = {
    "random": {"sampler": {"name": "random"}},
    "tpe": {"sampler": {"name": "tpe"}},
    "nsga2": {"sampler": {"name": "nsga2"}},
    "tpe + pareto_asha": {"sampler": {"name": "tpe"}, "scheduler": ASHA},
    "coterie": {"sampler": {"name": "coterie"}},
    "coterie + pareto_asha": {"sampler": {"name": "coterie"}, "scheduler": ASHA},
}
FAMILIES = ["single", "shared", "grouped", "affinity", "dmtg", "interrogate"]
SETTINGS: Mapping[str, dict[str, Any]] = {
    "mlp": {
        "dataset": {"source": "digits", "options": {"samples": 2000}},
        "search": {"families": FAMILIES},
        "budget": {"epochs": 20, "device_seconds": 30.0},
    },
    "cnn": {
        "dataset": {"source": "digits", "options": {"samples": 1000}},
        "search": {
            "families": FAMILIES,
            "backbones": ["cnn"],
            "space": {family: {"width": [0.125, 0.25]} for family in FAMILIES},
        },
        "budget": {"epochs": 10, "device_seconds": 60.0},
    },
}
REGRET = {
    "dataset": {"source": "digits"},
    "budget": {"epochs": 40, "trials": 40},
}
CHECKPOINTS = (10, 20, 40)  # trials
FRESH_SEEDS = range(1_000_000, 1_000_020)
CONTROL = {
    "dataset": {"source": Control.name},
    "search": {"families": ["single", "shared", "grouped"]},
    "budget": {"epochs": 10, "trials": 20},
    "confirm": {"top": 3, "seeds": 5},
}


# Hypervolume


@dataclass(frozen=True)
class Curve:
    """Of one search: device-seconds and hypervolume after each completed trial, and how many trials ended."""

    points: list[tuple[float, float]]
    trials: int

    def at(self, seconds: float) -> float:
        return max((volume for when, volume in self.points if when <= seconds), default=0.0)

    def reaches(self, volume: float) -> float:
        return min((when for when, found in self.points if found >= volume), default=np.inf)


def trace(setting: str, method: str, seed: int) -> Curve:
    """Run one search of `volume`."""
    base = SETTINGS[setting]
    search = Search({**base, "search": {**base["search"], **METHODS[method]}, "seed": seed})
    search.run()
    return Curve(search.store.curve, len(search.store.trials))


def volume(seeds: int, processes: int, settings: Sequence[str], png: Path | None) -> None:
    """Compare the methods."""
    jobs = [(setting, method, seed) for seed in range(seeds) for setting in settings for method in METHODS]
    with _pool(processes) as pool:
        curves = dict(zip(jobs, pool.map(trace, *zip(*jobs, strict=True)), strict=True))
    for setting in settings:
        budget = SETTINGS[setting]["budget"]["device_seconds"]
        of = {method: [curves[setting, method, seed] for seed in range(seeds)] for method in METHODS}
        goal = fmean(curve.at(budget) for curve in of["random"])
        best = max(curve.at(budget) for found in of.values() for curve in found)
        print(
            f"\ndigits, {setting}: {seeds} seeds, {budget:g} device-seconds; hypervolume over the best found"
        )
        print(
            f"{'method':24}{'trials':>7}{'at 1/6':>8}{'at 1/3':>8}{'at 2/3':>8}{'end':>8}   as random's end"
        )
        for method, found in of.items():
            shares = [
                fmean(curve.at(share * budget) for curve in found) / best
                for share in (1 / 6, 1 / 3, 2 / 3, 1)
            ]
            reached = sorted(curve.reaches(goal) / budget for curve in found)
            words = f"{_share(median(reached))} ({_share(reached[0])} to {_share(reached[-1])})"
            trials = round(fmean(curve.trials for curve in found))
            print(f"{method:24}{trials:7}" + "".join(f"{share:8.4f}" for share in shares) + f"   {words}")
    if png is not None:
        _plot(curves, settings, seeds, png)


def _share(value: float) -> str:
    return f"{value:.2f}" if value <= 1 else "never"


def _plot(
    curves: Mapping[tuple[str, str, int], Curve], settings: Sequence[str], seeds: int, png: Path
) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(settings), figsize=(6 * len(settings), 4.5), squeeze=False)
    for axis, setting in zip(axes[0], settings, strict=True):
        budget = SETTINGS[setting]["budget"]["device_seconds"]
        times = np.linspace(budget / 60, budget, 240)
        best = max(curve.at(budget) for (name, _, _), curve in curves.items() if name == setting)
        for method in METHODS:
            table = np.array(
                [[curves[setting, method, seed].at(when) for when in times] for seed in range(seeds)]
            )
            lost = 1 - table / best
            axis.plot(times, lost.mean(axis=0), label=method)
        axis.set(
            title=f"digits, {setting}",
            xlabel="device-seconds",
            ylabel="share of the best hypervolume that is missing",
        )
        axis.set_yscale("log")
        axis.grid(visible=True, which="both", alpha=0.3)
    axes[0, -1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(png, dpi=120)
    print(f"\n{png}")


# Groupings


def groupings(groups: int, seed: int) -> dict[int, tuple[Grouping | None, Grouping | None]]:
    """By number of trials: the grouping of the best trial with groups, and the one believed in."""
    found: dict[int, tuple[Grouping | None, Grouping | None]] = {}

    def look(search: Search, ended: int) -> None:
        if ended not in CHECKPOINTS:
            return
        tasks = search.plan.tasks
        grouped = [
            trial
            for trial in search.store.trials
            if trial.state is TrialState.COMPLETED and trial.candidate.family == "grouped"
        ]
        best = max(grouped, key=_gain, default=None)
        assert isinstance(search.sampler, CoterieSampler)
        believed = search.sampler.believed(groups)
        found[ended] = (
            None if best is None else Grouping.from_names(best.candidate.parameters["grouping"], tasks),
            believed,
        )

    space = {"grouped": {"groups": groups, "split": 0}}
    search = {"families": ["single", "shared", "grouped"], "space": space}
    Search({**REGRET, "search": search, "seed": seed}, look).run()
    return found


def _gain(trial: Trial) -> float:
    assert trial.ending is not None
    return trial.ending.values["delta_m"] or 0.0


def oracle(seeds: Sequence[int]) -> SubsetTable:
    """Networks for all subsets, with seeds that no search has seen, on the test split."""
    torch.set_num_threads(1)
    data = Digits.load(DigitsOptions())
    bench = make_bench(data.tasks, data, cpus=1, gpus=0)
    backbone = MLP(input_shape=data.input_shape, **MLP.defaults)
    _, test = measure_subsets(bench, backbone, all_subsets(len(data.tasks)), seeds, Recipe(epochs=40))
    return test


def regrets(seeds: int, processes: int) -> None:
    """Print the regrets."""
    jobs = [(groups, seed) for groups in (2, 3) for seed in range(seeds)]
    with _pool(processes) as pool:
        tables = list(pool.map(oracle, [FRESH_SEEDS[::2], FRESH_SEEDS[1::2]]))
        results = dict(zip(jobs, pool.map(groupings, *zip(*jobs, strict=True)), strict=True))
    table = SubsetTable(
        subsets=tables[0].subsets, errors_RNT=np.concatenate([part.errors_RNT for part in tables])
    )
    print(f"\ngrouping regret on digits, mlp 24, 40 epochs, mean over {seeds} seeds (each seed)")
    for groups in (2, 3):
        for which, name in enumerate(("best trial", "believed")):
            for checkpoint in CHECKPOINTS:
                values = []
                for seed in range(seeds):
                    grouping = results[groups, seed][checkpoint][which]
                    values.append(1.0 if grouping is None else regret(grouping, table, groups))
                row = " ".join(f"{value:.2f}" for value in values)
                print(f"K={groups} {name:10} after {checkpoint:2} trials: {fmean(values):5.2f}  ({row})")


# The negative control


def verdict(seed: int) -> tuple[str, str]:
    """The verdict on tasks that neither help nor hurt."""
    with _control():
        dataset = {"source": Control.name, "options": {"seed": seed}}
        search = Search({**CONTROL, "dataset": dataset, "seed": seed})
        search.run()
    found = search.store.verdict
    assert found is not None
    return str(found.kind), found.words


def control(seeds: int, processes: int) -> None:
    """Print the verdicts."""
    with _pool(processes) as pool:
        found = list(pool.map(verdict, range(seeds)))
    print(
        f"\nverdicts on tasks that neither help nor hurt, {seeds} seeds: {dict(Counter(k for k, _ in found))}"
    )
    for kind, words in found:
        print(f"- {kind}: {words}")


class _control:
    """The source is registered while it lasts."""

    def __enter__(self) -> None:
        from coterie.search import plan

        self._before = plan.sources
        plan.sources = lambda: {**sources(), Control.name: Control}  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        from coterie.search import plan

        plan.sources = self._before  # type: ignore[assignment]


def _pool(processes: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, mp_context=context)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", nargs="*", default=["volume", "regret", "control"])
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--on", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--png", type=Path)
    arguments = parser.parse_args()
    run = {
        "volume": partial(volume, arguments.seeds or 5, arguments.processes, arguments.on, arguments.png),
        "regret": partial(regrets, arguments.seeds or 10, arguments.processes),
        "control": partial(control, arguments.seeds or 10, arguments.processes),
    }
    for what in arguments.what:
        if what not in run:
            parser.error(f"'{what}': must be among {list(run)}")
        run[what]()


if __name__ == "__main__":
    main()
