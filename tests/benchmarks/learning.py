"""How well each family learns, and what InterroGate trades: figures on real and on made data, over seeds.

    python -m tests.benchmarks.learning [families] [gates] [--seeds N]

- `families`: the test error of each family beside the best seed of single-task networks of the same
  width, as the mean over tasks of the ratio of the two, on `digits` (`mlp` 24) and on dense tasks with
  missing labels (`cnn`). An error is the metric that judges a task, or 1 minus it where more is better.
- `gates`: InterroGate over five strengths: macs of the exported network and delta_m on the test split,
  against single-task networks of the same width, on `digits` with `mlp` and with `cnn`.
"""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, ClassVar

from coterie.models.cost import count_cost
from coterie.models.metrics import delta_m
from coterie.models.tasks import DENSE, Direction, TaskSet
from coterie.search.data.digits import Digits, DigitsOptions
from coterie.search.store import Candidate
from coterie.search.trial import Assignment, Bench, Training, evaluate, make_bench
from tests.search.shapes import Shapes, ShapesOptions

Errors = dict[str, float]
STRENGTHS = (0.0, 0.03, 0.1, 0.3, 1.0)


class ManyShapes(Shapes):
    sizes: ClassVar[Mapping[str, int]] = {"train": 400, "validation": 50, "test": 200}


@dataclass(frozen=True, kw_only=True)
class Setting:
    name: str
    bench: Bench
    backbone: str
    epochs: int
    recipe: dict[str, Any]
    families: dict[str, dict[str, Any]]


def halves(bench: Bench) -> list[list[str]]:
    """On `digits`: the tasks of the left digit, and those of the right one."""
    names = list(bench.tasks.names)
    return [names[: (len(names) + 1) // 2], names[(len(names) + 1) // 2 :]]


def settings(which: str) -> Iterator[Setting]:
    digits = make_bench(Digits.tasks(), Digits.load(DigitsOptions()), cpus=1, gpus=0)
    groups = {"groups": 2, "split": 0}
    families: dict[str, dict[str, Any]] = {
        "single": {},
        "shared": {},
        "grouped": {"grouping": halves(digits)},
        "affinity": {**groups},
        "dmtg": {**groups, "init": "affinity", "fine_tune": 0.2},
        "interrogate": {"sparsity_weight": 0.1},
        "dmtg+interrogate": {"grouping": halves(digits), "split": 0, "sparsity_weight": 0.05},
        "etr_nlp": {"gamma": 0.5, "own_width": "full"},
    }
    yield Setting(
        name="digits, mlp",
        bench=digits,
        backbone="mlp",
        epochs=40,
        recipe={"width": 24, "depth": 2, "lr": 5e-3, "weight_decay": 1e-6, "batch_size": 64},
        families=families,
    )
    image = {"width": 0.25, "lr": 3e-3, "weight_decay": 1e-6, "batch_size": 32}
    if which == "gates":
        yield Setting(
            name="digits, cnn", bench=digits, backbone="cnn", epochs=15, recipe=image, families=families
        )
        return
    tasks = TaskSet(task for task in Shapes.tasks() if task.kind in DENSE)
    dense = make_bench(tasks, ManyShapes.load(ShapesOptions()), cpus=1, gpus=0)
    yield Setting(
        name="dense shapes, cnn",
        bench=dense,
        backbone="cnn",
        epochs=40,
        recipe=image,
        families={
            name: parameters | ({"grouping": halves(dense)} if "grouping" in parameters else {})
            for name, parameters in families.items()
        },
    )


def train(setting: Setting, family: str, seed: int, parameters: dict[str, Any]) -> tuple[Errors, float]:
    """Test metric by task, and macs of the exported network."""
    candidate = Candidate(
        family=family, backbone=setting.backbone, parameters={**setting.recipe, **parameters}
    )
    assignment = Assignment(trial_id="", candidate=candidate, seed=seed, epochs=setting.epochs)
    training = Training(assignment, setting.bench, yardstick=None)
    while not training.done:
        training.run_epoch()
    network = training.conclude()
    found = evaluate(network, setting.bench.test, setting.bench.tasks)
    values = {task.name: found[task.name][task.metric] for task in setting.bench.tasks}
    return values, count_cost(network, setting.bench.input_shape).macs


def as_errors(setting: Setting, values: Errors) -> Errors:
    return {
        task.name: 1 - values[task.name] if task.direction is Direction.MAXIMIZE else values[task.name]
        for task in setting.bench.tasks
    }


def compare_families(seeds: int) -> None:
    for setting in settings("families"):
        print(
            f"{setting.name}, {setting.epochs} epochs, {seeds} seeds: error over the best single-task one's"
        )
        best: Errors = {}
        for family, parameters in setting.families.items():
            runs = [train(setting, family, seed, parameters) for seed in range(seeds)]
            errors = [as_errors(setting, values) for values, _ in runs]
            if family == "single":
                usual = {name: fmean(run[name] for run in errors) for name in errors[0]}
                best = min(errors, key=lambda run: fmean(run[name] / usual[name] for name in usual))
            ratios = [fmean(run[name] / best[name] for name in best) for run in errors]
            own = " ".join(f"{fmean(run[name] for run in errors):.3f}" for name in best)
            macs = fmean(macs for _, macs in runs)
            print(f"  {family:17} {fmean(ratios):5.2f} {macs:12,.0f} macs, by task {own}", flush=True)


def trace_gates(seeds: int) -> None:
    for setting in settings("gates"):
        singles = [train(setting, "single", seed, {}) for seed in range(seeds)]
        tasks = setting.bench.tasks
        yardstick = {name: fmean(values[name] for values, _ in singles) for name in tasks.names}
        print(f"{setting.name}, {setting.epochs} epochs, {seeds} seeds")
        print(f"  single-task: {singles[0][1]:,} macs, mean error {fmean(yardstick.values()):.4f}")
        for strength in STRENGTHS:
            parameters = {"sparsity_weight": strength}
            runs = [train(setting, "interrogate", seed, parameters) for seed in range(seeds)]
            gains = [delta_m(values, yardstick, tasks) for values, _ in runs]
            spread = stdev(gains) if seeds > 1 else 0.0
            macs = fmean(macs for _, macs in runs)
            error = fmean(fmean(values.values()) for values, _ in runs)
            print(
                f"  strength {strength:5}: {macs:12,.0f} macs, mean error {error:.4f}, "
                f"delta_m {fmean(gains):+6.1f} ± {spread:.1f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["families", "gates"])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    for part in arguments.parts:
        {"families": compare_families, "gates": trace_gates}[part](arguments.seeds)


if __name__ == "__main__":
    main()
