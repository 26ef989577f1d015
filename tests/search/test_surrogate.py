from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from coterie.models.tasks import Grouping
from coterie.search.affinity import all_subsets, singles_and_pairs
from coterie.search.surrogate import GroupBelief, Observation, SubsetSurrogate
from coterie.search.work import Subset

TASKS = 6
PLANTED = Grouping(((0, 2, 4), (1, 3, 5)))


def planted_affinity(grouping: Grouping, strength: float = 0.1) -> NDArray[np.float64]:
    labels = np.array(grouping.labels)
    return np.where(labels[:, None] == labels, strength, -strength)


def gains(subset: Subset, affinity_TT: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over the partners, as HOA has it."""
    return np.array([np.mean([affinity_TT[s, t] for s in subset if s != t] or [0.0]) for t in subset])


def observe(
    subsets: Sequence[Subset],
    seeds: int,
    noise: float,
    *,
    grouping: Grouping = PLANTED,
    strength: float = 0.1,
    start: int = 0,
) -> list[Observation]:
    rng = np.random.default_rng(start)
    affinity_TT = planted_affinity(grouping, strength)
    return [
        Observation(subset, tuple(gains(subset, affinity_TT) + noise * rng.normal(size=len(subset))), seed)
        for seed in range(seeds)
        for subset in subsets
    ]


def test_what_is_measured_often_is_believed() -> None:
    subsets = all_subsets(TASKS)
    surrogate = SubsetSurrogate(TASKS, observe(subsets, seeds=20, noise=0.1))
    affinity_TT = planted_affinity(PLANTED)
    errors = [
        (surrogate.mean(subset) - gains(subset, affinity_TT)) / surrogate.std(subset) for subset in subsets
    ]
    assert np.sqrt(np.mean(np.concatenate(errors) ** 2)) < 1.5  # it knows how wrong it may be
    assert np.max(np.abs(surrogate.mean((0, 2, 4)) - 0.1)) < 0.04


def test_more_replicates_leave_less_doubt() -> None:
    few, many = (SubsetSurrogate(TASKS, observe(all_subsets(TASKS), seeds, 0.1)) for seeds in (2, 20))
    for subset in all_subsets(TASKS):
        assert (many.std(subset) < few.std(subset)).all()


def test_what_was_measured_leaves_less_doubt_than_what_was_not() -> None:
    surrogate = SubsetSurrogate(TASKS, observe(singles_and_pairs(TASKS), seeds=3, noise=0.05))
    assert surrogate.std((0, 2)).max() < surrogate.std(tuple(range(TASKS))).min()


def test_one_seed_is_pooled_over_the_subsets() -> None:
    """Measured once, at a noise as large as the effect, single networks mislead and the belief does not."""
    observations = observe(all_subsets(TASKS), seeds=1, noise=0.1)
    affinity_TT = planted_affinity(PLANTED)
    surrogate = SubsetSurrogate(TASKS, observations)
    measured, believed = [], []
    for observation in observations:
        truth = gains(observation.subset, affinity_TT)
        measured.append(observation.gains - truth)
        believed.append(surrogate.mean(observation.subset) - truth)
    assert np.std(np.concatenate(believed)) < 0.6 * np.std(np.concatenate(measured))


def test_draws_have_the_mean_and_the_spread_of_the_belief_and_are_correlated() -> None:
    surrogate = SubsetSurrogate(TASKS, observe(singles_and_pairs(TASKS), seeds=2, noise=0.1))
    subsets = [(0, 1, 2), (0, 1, 2, 3), (5,)]
    rng = np.random.default_rng(0)
    draws = [surrogate.draw(rng, subsets) for _ in range(400)]
    for subset in subsets:
        drawn_DT = np.array([draw[subset] for draw in draws])
        std_T = surrogate.std(subset)
        assert np.abs((drawn_DT.mean(axis=0) - surrogate.mean(subset)) / std_T).max() < 0.2
        assert drawn_DT.std(axis=0) == pytest.approx(std_T, rel=0.15)
    alike = np.corrcoef([draw[subsets[0]][0] for draw in draws], [draw[subsets[1]][0] for draw in draws])
    assert alike[0, 1] > 0.5


def test_nothing_measured_leaves_the_prior() -> None:
    surrogate = SubsetSurrogate(3, [])
    assert surrogate.mean((0, 2)).tolist() == [0, 0]
    assert (surrogate.std((0, 2)) > 0.05).all()
    belief = GroupBelief(surrogate)
    assert belief.best(3) == Grouping.apart(3)
    _, confidence = belief.probability_best(np.random.default_rng(0), 2)
    assert confidence < 0.6


def test_affinity_decides_until_something_is_measured() -> None:
    affinity_TT = planted_affinity(PLANTED)
    assert GroupBelief(SubsetSurrogate(TASKS, [], prior_TT=affinity_TT)).best(2) == PLANTED
    other = Grouping(((0, 1, 2), (3, 4, 5)))
    measured = observe(all_subsets(TASKS), seeds=3, noise=0.05, grouping=other)
    assert GroupBelief(SubsetSurrogate(TASKS, measured, prior_TT=affinity_TT)).best(2) == other


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(TASKS)), st.integers(0, 100))
def test_the_names_of_the_tasks_and_the_order_of_the_measurements_play_no_part(
    order: list[int], start: int
) -> None:
    observations = observe(all_subsets(TASKS), seeds=2, noise=0.05, start=start)
    renamed = []
    for one in np.random.default_rng(start).permutation(len(observations)):
        gained = {order[t]: g for t, g in zip(observations[one].subset, observations[one].gains, strict=True)}
        subset = tuple(sorted(gained))
        renamed.append(Observation(subset, [gained[t] for t in subset], observations[one].seed))
    found = GroupBelief(SubsetSurrogate(TASKS, observations)).best(2)
    again = GroupBelief(SubsetSurrogate(TASKS, renamed)).best(2)
    assert again == Grouping(tuple(tuple(order[t] for t in group) for group in found.groups))


@pytest.mark.parametrize("tasks", [9, 15])
def test_groups_planted_in_many_tasks_are_found_from_single_tasks_and_pairs(tasks: int) -> None:
    """None of the groups was measured, and there are too many subsets to look at all."""
    planted = Grouping.from_labels([t % 3 for t in range(tasks)])
    belief = GroupBelief(
        SubsetSurrogate(tasks, observe(singles_and_pairs(tasks), seeds=1, noise=0.03, grouping=planted))
    )
    assert belief.best(3) == planted


def test_a_weight_of_zero_takes_a_task_out() -> None:
    """Only tasks 0 to 2 count, and each of them loses by the company of the others."""
    affinity_TT = np.full((4, 4), -0.1)
    affinity_TT[:, 3] = 0.1
    observations = [Observation(s, tuple(gains(s, affinity_TT)), 0) for s in all_subsets(4)]
    surrogate = SubsetSurrogate(4, observations)
    assert GroupBelief(surrogate, [1, 0, 0, 1]).best(2) == Grouping(((0,), (1, 2, 3)))


def test_top_two_differ_where_it_is_unclear_and_there_is_one_where_it_is_clear() -> None:
    rng = np.random.default_rng(0)
    first, second = GroupBelief(SubsetSurrogate(TASKS, [])).top_two(rng, 2)
    assert second is not None
    assert first != second
    clear = GroupBelief(SubsetSurrogate(TASKS, observe(all_subsets(TASKS), seeds=5, noise=0.02)))
    assert clear.top_two(rng, 2) == (PLANTED, None)


def test_nothing_more_is_measured_where_the_best_is_clear() -> None:
    belief = GroupBelief(SubsetSurrogate(TASKS, observe(all_subsets(TASKS), seeds=5, noise=0.02)))
    rng = np.random.default_rng(0)
    assert belief.probability_best(rng, 2) == (PLANTED, 1.0)
    assert belief.next_subsets(rng, [1, 2, TASKS], most=8) == ()


def test_partitions_that_differ_by_little_need_no_more_measurements() -> None:
    observations = observe(all_subsets(TASKS), seeds=3, noise=0, strength=0.001)
    belief = GroupBelief(SubsetSurrogate(TASKS, observations))
    assert belief.next_subsets(np.random.default_rng(0), [2, 3], most=8) == ()


def test_what_decides_between_partitions_is_measured_next() -> None:
    """All is known well but where task 4 belongs: it was measured alone only."""
    subsets = [subset for subset in all_subsets(5) if 4 not in subset or len(subset) == 1]
    planted = Grouping(((0, 1), (2, 3, 4)))
    observations = observe(subsets, seeds=20, noise=0.03, grouping=planted, strength=0.3)
    belief = GroupBelief(SubsetSurrogate(5, observations))
    chosen = belief.next_subsets(np.random.default_rng(0), [2], most=2)
    assert sorted(chosen) == [(0, 1, 4), (2, 3, 4)]


def test_measuring_what_it_asks_for_finds_the_groups_with_few_networks() -> None:
    """From single tasks and pairs, measured once at a noise as large as the effect."""
    affinity_TT = planted_affinity(PLANTED)
    for start in range(3):
        rng = np.random.default_rng(start)
        observations = observe(singles_and_pairs(TASKS), seeds=1, noise=0.1, start=start)
        while chosen := (belief := GroupBelief(SubsetSurrogate(TASKS, observations))).next_subsets(
            rng, [2], 8
        ):
            observations += [
                Observation(
                    s, tuple(gains(s, affinity_TT) + 0.1 * rng.normal(size=len(s))), len(observations)
                )
                for s in chosen
            ]
            assert len(observations) < 150
        assert belief.best(2) == PLANTED


def test_the_same_is_found_for_the_same_measurements_and_generator() -> None:
    def found() -> object:
        belief = GroupBelief(SubsetSurrogate(TASKS, observe(singles_and_pairs(TASKS), seeds=2, noise=0.1)))
        rng = np.random.default_rng(3)
        return belief.top_two(rng, 3), belief.probability_best(rng, 3), belief.next_subsets(rng, [2, 3], 5)

    assert found() == found()


@pytest.mark.parametrize(
    "observation",
    [
        Observation((0, 1), (0.0,), 0),
        Observation((0,), (float("nan"),), 0),
        Observation((1, 0), (0.0, 0.0), 0),
        Observation((0, 2), (0.0, 0.0), 0),
        Observation((), (), 0),
    ],
)
def test_observations_that_do_not_fit_are_refused(observation: Observation) -> None:
    with pytest.raises(ValueError, match="must"):
        SubsetSurrogate(2, [observation])


def test_an_affinity_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="prior_TT"):
        SubsetSurrogate(2, [], prior_TT=np.zeros((3, 3)))
    with pytest.raises(ValueError, match="weights"):
        GroupBelief(SubsetSurrogate(2, []), [1.0])
