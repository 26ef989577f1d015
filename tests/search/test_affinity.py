from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.models.affinity import partitions
from coterie.models.backbones import MLP
from coterie.models.families import Shared
from coterie.models.metrics import Evaluator
from coterie.models.stacked import start_seed
from coterie.models.tasks import Direction, Grouping, Task, TaskKind, TaskSet
from coterie.search.affinity import (
    AffinityTable,
    SubsetTable,
    all_subsets,
    exhaustive,
    grouping_error,
    hoa,
    measure_subsets,
    one_step_affinity,
    pairwise_affinity,
    regret,
    singles_and_pairs,
)
from coterie.search.data.base import Dataset, Split
from coterie.search.store import AffinityResult, SubsetResult
from coterie.search.subsets import Recipe
from coterie.search.trial import make_bench

TASKS = 5
PLANTED = Grouping(((0, 2), (1, 3, 4)))
HELP, HARM = -0.1, 0.15  # of one task to another's error, in the same planted group and in another


def planted_table(noise: float = 0.0, seed: int = 0) -> SubsetTable:
    """Errors that fall with each task of the same planted group beside them, and rise with each other one."""
    rng = np.random.default_rng(seed)
    subsets = tuple(all_subsets(TASKS))
    errors_RNT = np.full((1, len(subsets), TASKS), np.nan)
    for n, subset in enumerate(subsets):
        for t in subset:
            effects = [HELP if PLANTED.labels[s] == PLANTED.labels[t] else HARM for s in subset if s != t]
            size = max(len(effects), 1)
            errors_RNT[0, n, t] = 0.1 * (t + 1) * (1 + sum(effects) / size) + noise * rng.normal()
    return SubsetTable(subsets=subsets, errors_RNT=errors_RNT)


def mixed_data(samples: int = 60) -> Dataset:
    """Three tasks of different kinds, some labels missing."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(samples, 2, 3)).astype(np.float32)
    total = inputs.sum(axis=(1, 2))
    targets = {
        "positive": (total > 0).astype(np.float32),
        "third": np.digitize(total, [-1, 1]).astype(np.int64),
        "total": total,
    }
    targets["positive"][::7] = np.nan
    targets["third"][::5] = -1
    targets["total"][::6] = np.nan
    split = Split(inputs=inputs, targets=targets)
    tasks = TaskSet(
        [
            Task(name="positive", kind=TaskKind.BINARY),
            Task(name="third", kind=TaskKind.MULTICLASS, outputs=3),
            Task(name="total", kind=TaskKind.REGRESSION),
        ]
    )
    return Dataset(train=split, validation=split, test=split, tasks=tasks, mean=0.1, std=1.1)


def test_subsets_are_counted_out() -> None:
    assert len(all_subsets(6)) == len(set(all_subsets(6))) == 63
    assert singles_and_pairs(3) == [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]


def test_what_is_measured_is_what_each_network_reaches_alone() -> None:
    data, backbone = mixed_data(), MLP(input_shape=(2, 3), width=6, depth=1)
    bench = make_bench(data.tasks, data, cpus=1, gpus=0)
    recipe, seeds, subsets = Recipe(epochs=3, batch_size=16, lr=0.03), (4, 9), [(0,), (1, 2), (0, 1, 2)]
    table, test = measure_subsets(bench, backbone, subsets, seeds, recipe)
    np.testing.assert_array_equal(table.errors_RNT, test.errors_RNT)  # the splits are the same here
    inputs, targets = bench.train.inputs, bench.train.targets
    for r, seed in enumerate(seeds):
        for n, subset in enumerate(subsets):
            tasks = TaskSet(data.tasks[t] for t in subset)
            torch.manual_seed(start_seed(subset, seed))
            network = Shared(backbone=backbone, tasks=tasks)
            optimizer = torch.optim.Adam(network.parameter_groups(recipe.lr, recipe.weight_decay))
            generator = torch.Generator().manual_seed(seed)
            for _ in range(recipe.epochs):
                for index in torch.split(torch.randperm(len(inputs), generator=generator), recipe.batch_size):
                    batch = {name: targets[name][index] for name in tasks.names}
                    optimizer.zero_grad()
                    network.training_loss(inputs[index], batch, generator).backward()
                    optimizer.step()
            evaluator = Evaluator(tasks)
            with torch.no_grad():
                evaluator.update(network(inputs), {name: targets[name] for name in tasks.names})
            metrics = evaluator.compute()
            for t in range(len(data.tasks)):
                if t in subset:
                    task = data.tasks[t]
                    expected = metrics[task.name][task.metric]
                    assert table.errors_RNT[r, n, t] == pytest.approx(expected, rel=1e-4)
                else:
                    assert np.isnan(table.errors_RNT[r, n, t])


def test_an_answer_that_is_not_a_number_is_wrong() -> None:
    data = mixed_data()
    bench = make_bench(data.tasks, data, cpus=1, gpus=0)
    diverging = Recipe(epochs=1, lr=float("inf"))
    table, _ = measure_subsets(bench, MLP(input_shape=(2, 3), width=2, depth=1), [(0, 1, 2)], (0,), diverging)
    assert table.errors_RNT[0, 0, :2].tolist() == [1, 1]
    assert np.isinf(table.errors_RNT[0, 0, 2])


def test_relative_errors_are_one_for_a_task_alone_and_average_seeds_first() -> None:
    errors_RNT = np.array(
        [[[0.1, np.nan], [np.nan, 0.2], [0.3, 0.4]], [[0.3, np.nan], [np.nan, 0.2], [0.3, 0.2]]]
    )
    table = SubsetTable(subsets=((0,), (1,), (0, 1)), errors_RNT=errors_RNT)
    assert table.relative((0,))[0] == table.relative((1,))[1] == 1
    np.testing.assert_allclose(table.relative((0, 1)), [1.5, 1.5])
    assert grouping_error(Grouping.apart(2), table) == 1
    assert grouping_error(Grouping.together(2), table) == pytest.approx(1.5)


def test_a_planted_grouping_is_found_from_pairs_and_from_all_subsets() -> None:
    table = planted_table()
    assert hoa(table, 2) == exhaustive(table, 2) == PLANTED
    assert regret(PLANTED, table, 2) == 0


@given(st.integers(0, 10**6), st.integers(2, TASKS - 1))
def test_regret_is_zero_at_best_and_one_on_average(seed: int, groups: int) -> None:
    table = planted_table(noise=0.01, seed=seed)
    regrets = [regret(grouping, table, groups) for grouping in partitions(TASKS, groups)]
    assert min(regrets) == regret(exhaustive(table, groups), table, groups) == 0
    assert fmean(regrets) == pytest.approx(1)


def test_hoa_looks_at_singles_and_pairs_only() -> None:
    table = planted_table(noise=0.02)
    few = [n for n, subset in enumerate(table.subsets) if len(subset) <= 2]
    pairs = SubsetTable(subsets=tuple(singles_and_pairs(TASKS)), errors_RNT=table.errors_RNT[:, few])
    for groups in (2, 3):
        assert hoa(pairs, groups) == hoa(table, groups)


def test_a_table_of_equal_partitions_knows_no_regret() -> None:
    subsets = tuple(all_subsets(3))
    errors_RNT = np.array([[[0.5 if t in subset else np.nan for t in range(3)] for subset in subsets]])
    table = SubsetTable(subsets=subsets, errors_RNT=errors_RNT)
    assert regret(Grouping(((0, 1), (2,))), table, 2) == 0


def test_what_was_not_measured_is_named() -> None:
    table = planted_table()
    few = [n for n, subset in enumerate(table.subsets) if len(subset) <= 2]
    pairs = SubsetTable(subsets=tuple(singles_and_pairs(TASKS)), errors_RNT=table.errors_RNT[:, few])
    with pytest.raises(ValueError, match=r"subset: must be a measured one, found \(1, 3, 4\)"):
        grouping_error(PLANTED, pairs)
    alone = SubsetTable(subsets=tuple(combinations(range(3), 2)), errors_RNT=np.ones((1, 3, 3)))
    with pytest.raises(ValueError, match=r"subsets: must hold each task alone, found none for \[0, 1, 2\]"):
        hoa(alone, 2)


@pytest.mark.parametrize("groups", [1, TASKS])
def test_regret_needs_a_choice(groups: int) -> None:
    with pytest.raises(ValueError, match=f"groups: must be a whole number from 2 to 4, found {groups}"):
        regret(PLANTED, planted_table(), groups)


def test_measuring_needs_a_seed() -> None:
    data = mixed_data()
    with pytest.raises(ValueError, match="seeds: must be one or more, found none"):
        measure_subsets(
            make_bench(data.tasks, data, cpus=1, gpus=0),
            MLP(input_shape=(2, 3), width=2, depth=1),
            [(0,)],
            (),
            Recipe(),
        )


THREE = TaskSet(
    [
        Task(name="sign", kind=TaskKind.BINARY),  # judged by its error
        Task(name="area", kind=TaskKind.BINARY, metric="auc", weight=2.0),
        Task(name="size", kind=TaskKind.REGRESSION),
    ]
)


def subset(seed: int, weights: tuple[float, ...] | None = None, /, **reached: float | None) -> SubsetResult:
    """A network for these tasks, and the metric that judges each of them."""
    tasks = [task for task in THREE if task.name in reached]
    validation: dict[str, dict[str, Any]] = {task.name: {task.metric: reached[task.name]} for task in tasks}
    return SubsetResult(
        tasks=tuple(task.name for task in tasks),
        weights=weights or tuple(task.weight for task in tasks),
        seed=seed,
        validation=validation,
        test={},
    )


def test_a_pair_gains_over_each_task_alone_with_the_same_seed() -> None:
    assert THREE[1].direction is Direction.MAXIMIZE
    table = pairwise_affinity(
        [
            *(subset(0, sign=0.20), subset(0, area=0.80), subset(0, sign=0.10, area=0.88)),
            *(subset(1, sign=0.40), subset(1, area=0.50), subset(1, sign=0.40, area=0.45)),
            subset(2, sign=0.30, area=0.50),  # neither task was trained alone with this seed
            subset(0, size=1.0),
        ],
        THREE,
    )
    assert table is not None
    assert table.seeds == 2
    # area onto sign: the error halves, then stays; sign onto area: a tenth more of what is better, then less.
    assert table.mean == [[None, pytest.approx(0.0), None], [pytest.approx(25.0), None, None], [None] * 3]
    assert table.standard_error == [
        [None, pytest.approx(10.0), None],
        [pytest.approx(25.0), None, None],
        [None] * 3,
    ]


def test_one_seed_has_no_standard_error_and_a_network_that_diverged_no_gain() -> None:
    results = [subset(0, sign=0.2), subset(0, size=1.0), subset(0, sign=0.1, size=None)]
    table = pairwise_affinity(results, THREE)
    assert table is not None
    assert table.mean[2][0] == pytest.approx(50.0)
    assert table.mean[0][2] is None
    assert table.standard_error == [[None] * 3] * 3


def test_networks_with_other_weights_or_of_more_tasks_say_nothing_of_pairs() -> None:
    results = [
        *(subset(0, sign=0.2), subset(0, (1.0,), area=0.8), subset(0, size=1.0)),
        *(subset(0, (1.0, 1.0), sign=0.1, area=0.9), subset(0, sign=0.1, area=0.9, size=0.5)),
    ]
    assert pairwise_affinity(results, THREE) is None
    assert pairwise_affinity([], THREE) is None


def one_step(seed: int, tasks: tuple[str, ...], matrix: list[list[float | None]]) -> AffinityResult:
    weights = tuple({task.name: task.weight for task in THREE}[name] for name in tasks)
    return AffinityResult(method="one_step", tasks=tasks, weights=weights, seed=seed, matrix=matrix)


def test_one_step_affinities_are_averaged_in_the_order_of_the_tasks() -> None:
    first = one_step(0, ("sign", "area", "size"), [[9, 1, 2], [3, 9, None], [5, 6, 9]])
    second = one_step(4, ("size", "sign", "area"), [[9, 7, 6], [2, 9, 3], [8, 5, 9]])
    assert one_step_affinity([first, second], THREE) == AffinityTable(
        seeds=2,
        mean=[[9, 2, 2], [4, 9, 8], [6, 6, 9]],
        standard_error=[[0, 1, 0], [1, 0, None], [1, 0, 0]],
    )
    assert one_step_affinity([], THREE) is None


@given(st.permutations(range(4)), st.integers(0, 10**6))
def test_the_order_of_the_results_does_not_matter(order: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    results = [one_step(s, THREE.names, rng.normal(size=(3, 3)).tolist()) for s in range(4)]
    assert one_step_affinity([results[place] for place in order], THREE) == one_step_affinity(results, THREE)
