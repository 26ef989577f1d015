import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.models import affinity
from coterie.models.affinity import (
    AffinityMeter,
    best_partition,
    hoa_partition,
    hoa_scores,
    partitions,
    random_partition,
    tag_cover,
    tag_partition,
)
from coterie.models.backbones import CNN, MLP
from coterie.models.cost import count_cost
from coterie.models.families import DMTG, MultiTaskNetwork, Shared, build_network
from coterie.models.families.affinity import AffinityGrouped
from coterie.models.families.grouped import cost_of_groups
from coterie.models.losses import task_losses
from coterie.models.tasks import Grouping, TaskSet
from tests.models.not_numbers import NO_NUMBERS

MakeTasks = Callable[..., TaskSet]
BACKBONE = MLP(input_shape=(12,), width=12, depth=2)
PLANTED = Grouping(((0, 2), (1, 3)))


def partition_sizes(most_tasks: int, most_groups: int) -> st.SearchStrategy[tuple[int, int]]:
    """Numbers of tasks and groups."""
    return st.integers(1, most_tasks).flatmap(
        lambda tasks: st.tuples(st.just(tasks), st.integers(1, min(tasks, most_groups)))
    )


sizes = partition_sizes(6, 6)
small_sizes = partition_sizes(4, 3)
seeds = st.integers(0, 2**31)


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(tasks: int, seed: int) -> Tensor:
    return torch.randn(tasks, tasks, generator=random(seed), dtype=torch.float64)


@pytest.fixture
def tasks(make_tasks: MakeTasks) -> TaskSet:
    return make_tasks(1.0, 2.0, 0.5, 1.0)


def planted(tasks: TaskSet, seed: int, size: int = 128) -> tuple[Tensor, dict[str, Tensor]]:
    """Tasks a and c ask about the first half of the input, b and d about the second, each pair much alike."""
    x = torch.randn(size, 12, generator=random(seed))
    halves = x.view(size, 2, 6).sum(dim=2)
    return x, {
        name: (halves[:, t % 2] * (-1) ** (t // 2) > 0.3 * (t // 2)).float()
        for t, name in enumerate(tasks.names)
    }


def names_of_shared(network: MultiTaskNetwork) -> list[str]:
    return [name for name, _ in network.named_parameters() if not name.startswith("heads.")]


# The meter


def test_the_affinity_is_what_a_gradient_step_on_one_task_does_to_the_others_losses(tasks: TaskSet) -> None:
    torch.manual_seed(0)
    network = Shared(backbone=BACKBONE, tasks=tasks)
    meter = AffinityMeter(tasks, lr=0.1)
    expected_TT = torch.zeros(4, 4)
    for seed in range(2):
        x, targets = planted(tasks, seed)
        meter.measure(network, names_of_shared(network), x, targets)
        before = task_losses(network(x), targets, tasks)
        for i in range(4):
            stepped = copy.deepcopy(network)
            torch.autograd.backward(task_losses(stepped(x), targets, tasks)[i])
            with torch.no_grad():
                for name in names_of_shared(network):
                    parameter = stepped.get_parameter(name)
                    assert parameter.grad is not None
                    parameter -= 0.1 * parameter.grad
            after = task_losses(stepped(x), targets, tasks)
            expected_TT[i] += (1 - after / before).detach() / 2
    torch.testing.assert_close(meter.affinity_TT, expected_TT, rtol=1e-3, atol=1e-6)


def test_measuring_leaves_network_gradients_and_random_streams_as_they_are(tasks: TaskSet) -> None:
    backbone = CNN(input_shape=(3, 8, 8), width=1 / 16)
    network = Shared(backbone=backbone, tasks=tasks).train()
    x = torch.randn(5, 3, 8, 8)
    targets = {name: torch.randint(2, (5,)) for name in tasks.names}
    before = copy.deepcopy(network.state_dict())
    stream = torch.get_rng_state()
    meter = AffinityMeter(tasks)
    meter.measure(network, names_of_shared(network), x, targets)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(torch.get_rng_state(), stream)
    assert (meter.affinity_TT.diagonal() > 0).all()


def test_a_task_without_labels_is_not_measured(tasks: TaskSet) -> None:
    network = Shared(backbone=BACKBONE, tasks=tasks)
    meter = AffinityMeter(tasks)
    x, targets = planted(tasks, 0)
    meter.measure(network, names_of_shared(network), x, targets)
    once_TT = meter.affinity_TT
    targets["b"] = torch.full_like(targets["b"], math.nan)
    meter.measure(network, names_of_shared(network), x, targets)
    assert meter.counts_TT.tolist() == [[2, 1, 2, 2], [1, 1, 1, 1], [2, 1, 2, 2], [2, 1, 2, 2]]
    torch.testing.assert_close(meter.affinity_TT, once_TT)


@pytest.mark.parametrize(("count", "every"), [(2, 2), (8, 2)])
def test_the_meter_measures_every_few_steps(count: int, every: int, make_tasks: MakeTasks) -> None:
    tasks = make_tasks(*[1.0] * count)
    network = Shared(backbone=BACKBONE, tasks=tasks)
    meter = AffinityMeter(tasks)
    x, targets = planted(tasks, 0)
    for _ in range(2 * every + 1):
        meter.step(network, names_of_shared(network), x, targets)
    assert (meter.counts_TT == 3).all()


# Partitions


@given(small_sizes)
def test_partitions_are_all_there_once_each(size: tuple[int, int]) -> None:
    tasks, groups = size
    found = list(partitions(tasks, groups))
    every = {Grouping.from_labels(labels) for labels in itertools.product(range(groups), repeat=tasks)}
    assert len(found) == len(set(found))
    assert set(found) == {partition for partition in every if len(partition) == groups}


def test_random_partitions_are_equally_likely() -> None:
    generator = random(0)
    draws = [random_partition(5, 3, generator) for _ in range(10_000)]
    counts = [draws.count(partition) for partition in partitions(5, 3)]
    assert sum(counts) == 10_000
    assert len(counts) == 25
    assert all(count == pytest.approx(400, abs=5 * 20) for count in counts)  # five standard deviations


def test_a_random_partition_comes_from_the_given_generator_or_torchs_own() -> None:
    before = torch.get_rng_state()
    assert random_partition(9, 4, random(3)) == random_partition(9, 4, random(3))
    assert torch.equal(torch.get_rng_state(), before)
    random_partition(9, 4)
    assert not torch.equal(torch.get_rng_state(), before)


@given(sizes, seeds)
def test_the_best_partition_has_the_largest_sum_of_centred_affinities(
    size: tuple[int, int], seed: int
) -> None:
    tasks, groups = size
    Z_TT = matrix(tasks, seed)
    pairs = list(itertools.combinations(range(tasks), 2))
    mean = math.fsum(float(Z_TT[i, j] + Z_TT[j, i]) / 2 for i, j in pairs) / max(len(pairs), 1)

    def total(partition: Grouping) -> float:
        return math.fsum(
            float(Z_TT[i, j] + Z_TT[j, i]) / 2 - mean
            for group in partition.groups
            for i, j in itertools.combinations(group, 2)
        )

    found = best_partition(Z_TT, groups)
    assert len(found) == groups
    assert total(found) == pytest.approx(max(map(total, partitions(tasks, groups))), abs=1e-9)


@given(sizes, seeds, st.floats(-3, 3), st.floats(0.1, 10))
def test_the_best_partition_asks_for_differences_only(
    size: tuple[int, int], seed: int, shift: float, scale: float
) -> None:
    tasks, groups = size
    Z_TT = matrix(tasks, seed)
    found = best_partition(Z_TT, groups)
    assert best_partition(Z_TT.T, groups) == found
    assert best_partition(scale * Z_TT + shift, groups) == found
    assert best_partition(Z_TT + 100 * torch.eye(tasks), groups) == found


def tag_total(Z_TT: Tensor, groups: tuple[tuple[int, ...], ...]) -> float:
    """Each task's best mean affinity from the others of a group that it is in."""
    total = 0.0
    for j in range(len(Z_TT)):
        mine = [[i for i in group if i != j] for group in groups if j in group]
        total += max(
            (sum(float(Z_TT[i, j]) for i in others) / max(len(others), 1) for others in mine),
            default=-math.inf,
        )
    return total


@given(sizes, seeds)
def test_tags_partition_is_the_best_by_its_objective(size: tuple[int, int], seed: int) -> None:
    tasks, groups = size
    Z_TT = matrix(tasks, seed)
    found = tag_partition(Z_TT, groups)
    best = max(tag_total(Z_TT, partition.groups) for partition in partitions(tasks, groups))
    assert tag_total(Z_TT, found.groups) == pytest.approx(best)


@settings(max_examples=25)
@given(small_sizes, seeds)
def test_tags_groups_may_overlap_and_are_the_best_of_all(size: tuple[int, int], seed: int) -> None:
    tasks, groups = size
    Z_TT = matrix(tasks, seed)
    cover = tag_cover(Z_TT, groups)
    subsets = [s for n in range(1, tasks + 1) for s in itertools.combinations(range(tasks), n)]
    choices = itertools.combinations(subsets, min(groups, len(subsets)))
    best = max(tag_total(Z_TT, chosen) for chosen in choices)
    assert tag_total(Z_TT, cover.groups) == pytest.approx(best)
    assert len(cover.groups) <= groups
    assert set(cover.serving) == set(range(len(cover.groups)))
    assert all(t in cover.groups[k] for t, k in enumerate(cover.serving))


@settings(max_examples=15)
@given(seeds)
def test_tags_exchange_is_nearly_the_best_where_there_is_too_much_to_look_at(seed: int) -> None:
    Z_TT = matrix(5, seed)
    exact = tag_total(Z_TT, tag_cover(Z_TT, 3).groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(affinity, "EXACT_COVERS", 0)
        found = tag_total(Z_TT, tag_cover(Z_TT, 3).groups)
    together = tag_total(Z_TT, (tuple(range(5)),))
    assert together <= found <= exact + 1e-9
    assert found - together >= 0.8 * (exact - together)


def test_hoa_takes_a_tasks_mean_over_its_pairs_and_its_own_figure_where_it_is_alone() -> None:
    single_T = torch.tensor([1.0, 2.0, 3.0])
    pair_TT = torch.tensor([[0.0, 0.5, 4.0], [1.0, 0.0, 5.0], [6.0, 7.0, 0.0]])
    assert hoa_scores(single_T, pair_TT, (2,)) == [3.0]
    assert hoa_scores(single_T, pair_TT, (0, 1)) == [0.5, 1.0]
    assert hoa_scores(single_T, pair_TT, (0, 1, 2)) == [2.25, 3.0, 6.5]
    assert hoa_partition(single_T, pair_TT, 2) == Grouping(((0, 1), (2,)))


@given(sizes, seeds)
def test_hoas_partition_has_the_least_mean_over_the_tasks(size: tuple[int, int], seed: int) -> None:
    tasks, groups = size
    single_T, pair_TT = matrix(tasks, seed)[0], matrix(tasks, seed + 1)

    def total(partition: Grouping) -> float:
        return sum(score for group in partition.groups for score in hoa_scores(single_T, pair_TT, group))

    found = hoa_partition(single_T, pair_TT, groups)
    assert total(found) == pytest.approx(min(map(total, partitions(tasks, groups))))


@pytest.mark.parametrize("groups", [2, 3, 5])
def test_among_many_tasks_clear_groups_are_found(groups: int) -> None:
    labels = [t * t % 7 % groups for t in range(24)]
    planted = Grouping.from_labels(labels)
    same_TT = torch.tensor(labels)[:, None] == torch.tensor(labels)
    Z_TT = same_TT + 0.3 * matrix(24, groups)
    assert best_partition(Z_TT, len(planted)) == planted
    assert tag_partition(Z_TT, len(planted)) == planted
    assert hoa_partition(torch.ones(24), -Z_TT, len(planted)) == planted


@settings(max_examples=15)
@given(seeds)
def test_the_local_search_is_rarely_worse_than_looking_at_everything(seed: int) -> None:
    Z_TT = matrix(7, seed)
    exact = best_partition(Z_TT, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(affinity, "EXACT_TASKS", 0)
        found = best_partition(Z_TT, 3)
    centred_TT = affinity.centred_affinity(Z_TT)

    def total(partition: Grouping) -> float:
        return sum(float(centred_TT[list(group)][:, list(group)].sum()) for group in partition.groups)

    assert 0.8 * total(exact) <= total(found) <= total(exact) + 1e-9


@pytest.mark.parametrize("groups", [0, 4, 1.0])
def test_a_number_of_groups_out_of_range_is_refused(groups: Any) -> None:
    calls: list[Callable[[], object]] = [
        lambda: best_partition(torch.zeros(3, 3), groups),
        lambda: tag_partition(torch.zeros(3, 3), groups),
        lambda: tag_cover(torch.zeros(3, 3), groups),
        lambda: hoa_partition(torch.zeros(3), torch.zeros(3, 3), groups),
        lambda: partitions(3, groups),
        lambda: random_partition(3, groups),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="groups: must be a whole number from 1 to 3"):
            call()


def test_groups_that_overlap_are_refused_where_the_subsets_are_too_many() -> None:
    with pytest.raises(ValueError, match="tasks: must be at most 16 for groups that overlap, found 17"):
        tag_cover(torch.zeros(17, 17), 2)


# The family


def build(tasks: TaskSet, seed: int = 0, **parameters: Any) -> AffinityGrouped:
    torch.manual_seed(seed)
    parameters = {"groups": 2, **parameters}
    network = build_network("affinity", backbone=BACKBONE, tasks=tasks, parameters=parameters)
    assert isinstance(network, AffinityGrouped)
    return network


def train(
    network: MultiTaskNetwork, epochs: int, start: int = 0, optimizer_state: dict[str, Any] | None = None
) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Train, five batches an epoch; give the network's and the optimizer's state before each epoch."""
    optimizer = torch.optim.Adam(network.parameter_groups(1e-2, 0))
    if optimizer_state:
        optimizer.load_state_dict(optimizer_state)
    checkpoints = []
    for epoch in range(start, epochs):
        checkpoints.append(copy.deepcopy((network.state_dict(), optimizer.state_dict())))
        if network.begin_epoch(epoch, epochs):
            optimizer = torch.optim.Adam(network.parameter_groups(1e-2, 0))
        for part in range(5):
            optimizer.zero_grad(set_to_none=True)
            x, targets = planted(network.tasks, 10 * epoch + part)
            torch.autograd.backward(network.training_loss(x, targets, random(0)))
            optimizer.step()
    return checkpoints


@pytest.mark.parametrize("method", ["affinity", "tag"])
@pytest.mark.parametrize("seed", range(3))
def test_planted_groups_are_found_and_trained(method: str, seed: int, tasks: TaskSet) -> None:
    network = build(tasks, seed, method=method)
    train(network, 20)
    assert network.grouping == PLANTED
    x, targets = planted(tasks, 999, size=500)
    outputs = network.prune()(x)
    errors = [((outputs[name] > 0) != (targets[name] > 0)).float().mean() for name in tasks.names]
    assert max(errors) < 0.15
    assert network.affinity_TT is not None
    assert network.affinity_TT[0, 2] > network.affinity_TT[0, 1]


def test_dmtg_with_the_affinity_start_finds_planted_groups(tasks: TaskSet) -> None:
    torch.manual_seed(0)
    parameters = {"groups": 2, "init": "affinity"}
    network = build_network("dmtg", backbone=BACKBONE, tasks=tasks, parameters=parameters)
    assert isinstance(network, DMTG)
    train(network, 20)
    assert network.grouping == PLANTED


def test_until_the_groups_are_found_all_tasks_are_one_and_then_none_moves(tasks: TaskSet) -> None:
    network = build(tasks, probe=0.5)
    assert network.grouping == Grouping.together(4)
    for epoch in range(6):
        assert network.begin_epoch(epoch, 6) == (epoch == 3)
        network.losses(*planted(tasks, epoch), random(0))
        assert (len(network.grouping) == 2) == (epoch >= 3)
    torch.autograd.backward(network.training_loss(*planted(tasks, 0), random(0)))
    assert network.A_TK.grad is None
    assert network.meter is not None
    assert network.meter.steps == 3


def test_after_the_probe_the_loss_is_that_of_the_groups_networks(tasks: TaskSet) -> None:
    network = build(tasks)
    train(network, 6)
    x, targets = planted(tasks, 0)
    losses = network.losses(x, targets, random(0))
    torch.testing.assert_close(losses.tasks_T, task_losses(network.prune()(x), targets, tasks))
    assert losses.penalty == 0


@pytest.mark.parametrize("method", ["affinity", "random"])
@pytest.mark.parametrize("epoch", range(6))
def test_a_training_goes_on_from_any_epoch_as_if_it_had_not_stopped(
    method: str, epoch: int, tasks: TaskSet
) -> None:
    network = build(tasks, method=method, probe=0.5)
    state, optimizer_state = train(network, 6)[epoch]
    other = build(tasks, seed=4, method=method, probe=0.5)
    other.restore(state)
    train(other, 6, epoch, optimizer_state)
    expected = network.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())


def test_a_random_partition_is_drawn_at_once_from_torchs_generator(make_tasks: MakeTasks) -> None:
    tasks = make_tasks(*[1.0] * 6)
    drawn = [build(tasks, seed, groups=3, method="random") for seed in (0, 0, 1, 2, 3)]
    assert drawn[0].grouping == drawn[1].grouping
    assert len({network.grouping for network in drawn}) > 1
    assert all(len(network.grouping) == 3 for network in drawn)
    assert drawn[0].affinity_TT is None
    assert not any(drawn[0].begin_epoch(epoch, 4) for epoch in range(4))


def test_while_it_measures_it_is_expected_to_cost_all_groups_and_then_what_it_does(tasks: TaskSet) -> None:
    network = build(tasks, groups=3, split=1)
    three = cost_of_groups(BACKBONE, tasks, 1, 3)
    assert network.expected_cost() == three != count_cost(network.prune(), BACKBONE.input_shape)
    train(network, 6)
    assert network.expected_cost() == three == count_cost(network.prune(), BACKBONE.input_shape)
    drawn = build(tasks, groups=2, split=1, method="random")
    assert drawn.expected_cost() == count_cost(drawn.prune(), BACKBONE.input_shape)


def test_one_group_needs_no_measurement(tasks: TaskSet) -> None:
    network = build(tasks, groups=1)
    train(network, 2)
    assert network.grouping == Grouping.together(4)
    assert network.affinity_TT is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("groups", 5),
        ("split", 2),
        ("method", "hoa"),
        ("probe", 0.0),
        ("affinity_lr", 0.0),
        ("affinity_lr", math.nan),
        *((name, value) for name in ("probe", "affinity_lr") for value in NO_NUMBERS),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_its_name(name: str, value: object, tasks: TaskSet) -> None:
    with pytest.raises(ValueError, match=f"{name}: must be"):
        build(tasks, **{name: value})
