"""What is trained beside the candidates: networks for subsets of the tasks, and affinities."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from coterie.models.backbones import MLP
from coterie.models.families import AffinityGrouped
from coterie.models.stacked import StackedMLP
from coterie.models.tasks import KIND_METRICS, Task, TaskKind, TaskSet
from coterie.search import subsets
from coterie.search.affinity import all_subsets
from coterie.search.data.base import Dataset
from coterie.search.data.digits import Digits
from coterie.search.store import Candidate
from coterie.search.subsets import Recipe, run_affinity, run_subsets, stackable, train_stack
from coterie.search.trial import Assignment, Bench, Diverged, Samples, Training, evaluate, make_bench
from coterie.search.work import AffinityRun, Subset, SubsetRun
from tests.search.shapes import Shapes, ShapesOptions

RECIPE = {"lr": 1e-2, "weight_decay": 1e-4, "batch_size": 32, "balancing": "fixed"}
SIZES = {"width": 12, "depth": 2}
SUBSETS: tuple[Subset, ...] = ((0,), (1, 4), (0, 2, 5), (0, 1, 2, 3, 4, 5))
SEEDS = (3, 8)
EPOCHS = 3


@pytest.fixture(scope="module")
def bench(digits: Dataset) -> Bench:
    """Digits, some tasks weighed and some labels missing."""
    tasks = TaskSet(
        replace(task, weight=weight)
        for task, weight in zip(Digits.tasks(), (1.0, 2.0, 0.5, 1.0, 1.0, 3.0), strict=True)
    )
    bench = make_bench(tasks, digits, cpus=1, gpus=0)
    labels = bench.validation.targets["left_loop"].float()
    labels[::5] = torch.nan
    return replace(bench, validation=with_targets(bench.validation, left_loop=labels))


@pytest.fixture(scope="module")
def mixed() -> Bench:
    """Tasks of each kind that a stack takes."""
    tasks = TaskSet(
        [
            Task(name="positive", kind=TaskKind.BINARY),
            Task(name="third", kind=TaskKind.MULTICLASS, outputs=3),
            Task(name="total", kind=TaskKind.REGRESSION),
            Task(name="parts", kind=TaskKind.REGRESSION, outputs=2),
        ]
    )
    random = torch.Generator().manual_seed(0)

    def samples(size: int) -> Samples:
        inputs = torch.randn(size, 2, 3, generator=random)
        total = inputs.sum(dim=(1, 2))
        targets = {
            "positive": (total > 0).float(),
            "third": torch.bucketize(total, torch.tensor([-1.0, 1.0])),
            "total": total,
            "parts": inputs.sum(dim=2),
        }
        return Samples(inputs=inputs, targets=targets)

    digits_like = make_bench(Digits.tasks(), Digits.load(Digits.options(samples=50)), cpus=1, gpus=0)
    return replace(
        digits_like, tasks=tasks, train=samples(60), validation=samples(40), test=samples(1100)
    )  # more than are measured at once


def with_targets(samples: Samples, **targets: torch.Tensor) -> Samples:
    return replace(samples, targets={**samples.targets, **targets})


def shared(backbone: str = "mlp", **changes: Any) -> Candidate:
    sizes = SIZES if backbone == "mlp" else {"width": 0.125}
    return Candidate(family="shared", backbone=backbone, parameters={**RECIPE, **sizes, **changes})


def subset_run(**changes: Any) -> SubsetRun:
    run = SubsetRun(run=2, candidate=shared(), subsets=SUBSETS, seeds=SEEDS, epochs=EPOCHS)
    return replace(run, **changes)


def affinity_run(candidate: Candidate | None = None, seed: int = 4, epochs: int = 4) -> AffinityRun:
    return AffinityRun(candidate=candidate or shared(), seed=seed, epochs=epochs)


class Interrupted(Exception):
    pass


# Subset networks


@pytest.mark.parametrize("where", ["bench", "mixed"])
def test_every_metric_is_that_of_the_network_alone(where: str, request: pytest.FixtureRequest) -> None:
    bench: Bench = request.getfixturevalue(where)
    subsets = ((1,), (0, 2), (1, 2, 3), (3,))
    results = run_subsets(subset_run(subsets=subsets), bench)
    backbone = MLP(input_shape=bench.input_shape, **SIZES)
    recipe = Recipe(epochs=EPOCHS, lr=1e-2, weight_decay=1e-4, batch_size=32)
    for seed in SEEDS:
        stack = train_stack(bench, backbone, subsets, seed, recipe)
        for subset in subsets:
            tasks = TaskSet(bench.tasks[t] for t in subset)
            [result] = [r for r in results if r.seed == seed and r.tasks == tasks.names]
            assert result.weights == tuple(task.weight for task in tasks)
            assert result.run == 2
            alone = stack.unstack(subset).prune()
            for found, samples in ((result.validation, bench.validation), (result.test, bench.test)):
                expected = evaluate(alone, samples, tasks)
                assert list(found) == list(tasks.names)
                for task in tasks:
                    assert set(found[task.name]) == set(KIND_METRICS[task.kind])
                    assert found[task.name] == pytest.approx(expected[task.name], rel=1e-5)


def test_results_come_by_seed_and_then_by_subset(bench: Bench) -> None:
    results = run_subsets(subset_run(), bench)
    names = bench.tasks.names
    assert [(result.seed, result.tasks) for result in results] == [
        (seed, tuple(names[t] for t in subset)) for seed in SEEDS for subset in SUBSETS
    ]


def test_a_seed_gives_the_same_whatever_is_trained_beside_it(bench: Bench) -> None:
    both, again, alone = (
        run_subsets(subset_run(**changes), bench)
        for changes in ({}, {}, {"seeds": (8,), "subsets": SUBSETS[1:]})
    )
    assert both == again
    assert [result.seed for result in alone] == [8] * 3
    for found, expected in zip(alone, both[-3:], strict=True):
        for name, metrics in expected.validation.items():
            assert found.validation[name] == pytest.approx(metrics, abs=1e-6)
    assert both[0].validation != both[len(SUBSETS)].validation


def test_the_recipe_is_the_candidates(bench: Bench) -> None:
    plain = run_subsets(subset_run(seeds=(3,)), bench)
    for changes in ({"lr": 1e-3}, {"weight_decay": 0.1}, {"batch_size": 64}, {"width": 8}, {"depth": 1}):
        other = run_subsets(subset_run(seeds=(3,), candidate=shared(**changes)), bench)
        assert [r.validation for r in other] != [r.validation for r in plain], changes
    assert run_subsets(subset_run(seeds=(3,), epochs=1), bench) != plain


def test_labels_of_the_test_split_change_nothing_but_the_report(bench: Bench) -> None:
    poisoned = with_targets(bench.test, **{name: 1 - labels for name, labels in bench.test.targets.items()})
    results = run_subsets(subset_run(), bench)
    others = run_subsets(subset_run(), replace(bench, test=poisoned))
    assert [replace(result, test={}) for result in results] == [replace(other, test={}) for other in others]
    assert all(result.test != other.test for result, other in zip(results, others, strict=True))


def test_networks_that_diverge_are_left_out(mixed: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_subsets(subset_run(subsets=((0,), (2,)), candidate=shared(lr=math.inf)), mixed) == []

    def train_and_break_one(*arguments: Any) -> StackedMLP:
        stack = train_stack(*arguments)
        with torch.no_grad():
            stack.biases[1][1, 0] = torch.nan
        return stack

    monkeypatch.setattr(subsets, "train_stack", train_and_break_one)
    found = run_subsets(subset_run(subsets=((0,), (2,), (1, 3))), mixed)
    assert [result.tasks for result in found] == [("positive",), ("third", "parts")] * 2


def test_what_is_no_number_on_the_test_split_is_left_out_of_the_report_alone(mixed: Bench) -> None:
    far = with_targets(mixed.test, total=torch.full_like(mixed.test.targets["total"], torch.inf))
    [plain], [found] = (
        run_subsets(subset_run(subsets=((0, 2),), seeds=(3,)), bench)
        for bench in (mixed, replace(mixed, test=far))
    )
    assert found.validation == plain.validation
    assert found.test == {"positive": plain.test["positive"], "total": {}}


def test_all_subsets_of_the_tasks_train_at_once(bench: Bench) -> None:
    subsets = tuple(all_subsets(6))
    results = run_subsets(subset_run(subsets=subsets, seeds=(0,), epochs=1), bench)
    assert len({result.tasks for result in results}) == 63


@pytest.mark.parametrize("epochs", [1, 4])
def test_a_run_can_be_ended_behind_each_epoch(bench: Bench, epochs: int) -> None:
    seen: list[int] = []

    def stop() -> None:
        seen.append(1)
        if len(seen) == epochs:
            raise Interrupted

    with pytest.raises(Interrupted):
        run_subsets(subset_run(), bench, stop)  # of 3 epochs for each of 2 seeds
    assert len(seen) == epochs
    seen.clear()
    with pytest.raises(Interrupted):
        run_affinity(affinity_run(), bench, stop)
    assert len(seen) == epochs


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        (shared("cnn"), "backbone: of subset networks must be 'mlp' without dense tasks, found 'cnn'"),
        (shared(balancing="dwa"), "balancing: of subset networks must be 'fixed', found 'dwa'"),
        (replace(shared(), family="single"), "family: of subset networks must be 'shared', found 'single'"),
        (shared(width=2**16, depth=2), "subsets: must be at most 0 networks of this size"),
    ],
)
def test_what_cannot_be_stacked_is_refused(bench: Bench, candidate: Candidate, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_subsets(subset_run(candidate=candidate), bench)


def test_what_is_stackable_is_what_a_stack_takes(bench: Bench, mixed: Bench) -> None:
    assert stackable("mlp", bench.tasks)
    assert stackable("mlp", mixed.tasks)
    assert not stackable("cnn", bench.tasks)
    assert not stackable("mlp", Shapes.tasks())


# Affinities


def test_the_affinity_is_what_the_family_measures_in_its_first_epochs(bench: Bench) -> None:
    family = Candidate(
        family="affinity", backbone="mlp", parameters={**RECIPE, **SIZES, "groups": 2, "probe": 0.5}
    )
    training = Training(Assignment(trial_id="", candidate=family, seed=4, epochs=8), bench, yardstick=None)
    for _ in range(4):
        training.run_epoch()
    network = training.network
    assert isinstance(network, AffinityGrouped)
    assert network.affinity_TT is not None
    result = run_affinity(affinity_run(), bench)
    assert (result.method, result.seed) == ("one_step", 4)
    assert result.tasks == bench.tasks.names
    assert result.weights == tuple(task.weight for task in bench.tasks)
    torch.testing.assert_close(torch.tensor(result.matrix), network.affinity_TT, rtol=1e-2, atol=1e-6)


def test_a_seed_gives_the_same_affinity_and_another_seed_another(bench: Bench) -> None:
    one, again, other = (run_affinity(affinity_run(seed=seed), bench) for seed in (4, 4, 5))
    assert one == again
    assert one.matrix != other.matrix


def test_a_task_without_labels_is_not_measured(bench: Bench) -> None:
    missing = torch.full_like(bench.train.targets["left_loop"], torch.nan, dtype=torch.float32)
    unlabelled = replace(bench, train=with_targets(bench.train, left_loop=missing))
    t = bench.tasks.names.index("left_loop")
    result = run_affinity(affinity_run(epochs=1), unlabelled)
    for i, row in enumerate(result.matrix):
        for j, value in enumerate(row):
            assert (value is None) == (t in (i, j))


def test_affinity_is_measured_on_convolutions_and_between_dense_tasks() -> None:
    bench = make_bench(Shapes.tasks(), Shapes.load(ShapesOptions()), cpus=1, gpus=0)
    result = run_affinity(affinity_run(shared("cnn"), epochs=2), bench)
    values = [value for row in result.matrix for value in row]
    assert len(values) == 16
    assert all(value is not None and math.isfinite(value) for value in values)


def test_the_candidates_balancing_holds_while_affinity_is_measured(bench: Bench) -> None:
    plain, balanced = (
        run_affinity(affinity_run(shared(balancing=balancing)), bench) for balancing in ("fixed", "random")
    )
    assert plain.matrix != balanced.matrix


def test_a_training_that_explodes_says_so(bench: Bench) -> None:
    with pytest.raises(Diverged):
        run_affinity(affinity_run(shared(lr=1e15)), bench)


def test_affinity_is_measured_in_a_shared_network_only(bench: Bench) -> None:
    with pytest.raises(ValueError, match="family: of an affinity run must be 'shared', found 'single'"):
        run_affinity(affinity_run(replace(shared(), family="single")), bench)
