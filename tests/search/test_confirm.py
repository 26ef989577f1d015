"""Confirming: what is trained again, what the figures say, and what is said of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

import moocore
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_ind

import coterie.search.plan as plan_module
from coterie.models.backbones import MLP
from coterie.models.tasks import Direction, Grouping
from coterie.search.baselines import default_candidate
from coterie.search.confirm import (
    LEAST_GAIN,
    choose_points,
    make_verdict,
    plan_confirmation,
    retrained,
)
from coterie.search.confirmed import FALSE_ALARMS, summarise
from coterie.search.plan import Plan, make_plan, measure_size
from coterie.search.seeds import derive_seed
from coterie.search.space import build_candidate
from coterie.search.spec import JobSpec
from coterie.search.store import Candidate, Confirmation, Ending, Role, Trial, TrialState, VerdictKind
from coterie.search.trial import Assignment, Training, make_bench
from tests.search.control import Control, ControlOptions

MakeJob = Callable[..., JobSpec]

PLAIN = {
    "width": 24,
    "depth": 2,
    "lr": 5e-3,
    "weight_decay": 1e-6,
    "batch_size": 64,
    "balancing": "fixed",
}
LEFT = ["left_parity", "left_large", "left_loop"]
RIGHT = ["right_parity", "right_large", "right_loop"]
GROUPS = [LEFT, RIGHT]
SINGLES = [[name] for name in (*LEFT, *RIGHT)]
GATES = {"sparsity_weight": 0.1, "own_share": 0.0, "gate_lr": 0.05}
OBJECTIVES = (("delta_m", Direction.MAXIMIZE), ("macs", Direction.MINIMIZE))
OF_YARDSTICK = 24336.0  # macs: six networks of two units of 24
SEEDS = (11, 12, 13)


@pytest.fixture(scope="module")
def plan(make_job: MakeJob) -> Plan:
    return make_plan(make_job(confirm={"top": 3, "seeds": 3}))


def candidate(family: str, **parameters: Any) -> Candidate:
    return Candidate(family=family, backbone="mlp", parameters=PLAIN | parameters)


GROUPED = candidate("grouped", split=0, grouping=GROUPS)
SHARED = candidate("shared")


def point(
    number: int, what: Candidate = SHARED, grouping: Any = None, seed: int = 0, **values: float
) -> Trial:
    return Trial(
        id=f"trial_{number}",
        number=number,
        candidate=what,
        choices={},
        seed=seed,
        state=TrialState.COMPLETED,
        ending=Ending(
            state=TrialState.COMPLETED,
            values={"delta_m": 0.0, "macs": 5000.0, **values},
            grouping=grouping or what.parameters.get("grouping"),
        ),
    )


def runs(
    trial: Trial,
    gains: Sequence[float | None],
    role: Role = Role.POINT,
    what: Candidate | None = None,
    macs: float = 5000.0,
    test: float = 0.0,
) -> list[Confirmation]:
    """One for each gain; one without failed."""
    return [
        Confirmation(
            trial_id=trial.id,
            role=role,
            candidate=what or (retrained(trial) if role is Role.POINT else SHARED),
            seed=100 + number,
            ending=Ending(state=TrialState.FAILED, reason="diverged")
            if gain is None
            else Ending(
                state=TrialState.COMPLETED,
                values={"delta_m": gain, "macs": macs, "delta_m_own_width": None},
                test={"delta_m": test + number, "macs": macs},
            ),
        )
        for number, gain in enumerate(gains)
    ]


def around(mean: float, spread: float = 1.0) -> list[float]:
    return [mean - spread, mean, mean + spread]


# Which points


def test_the_best_by_the_first_objective_is_chosen_first_and_bends_come_before_far_ends() -> None:
    points = [
        point(0, SHARED, delta_m=-200.0, macs=100.0),  # cheap and useless
        point(1, candidate("single"), delta_m=10.0, macs=9000.0),
        point(2, GROUPED, delta_m=9.0, macs=2000.0),  # the bend
        point(3, candidate("single", width=8), delta_m=-150.0, macs=1900.0),
    ]
    front = {trial.id: values_of(trial) for trial in points}
    assert [trial.number for trial in choose_points(points, front, OBJECTIVES, 2)] == [1, 2]
    assert [trial.number for trial in choose_points(points, front, OBJECTIVES, 9)] == [1, 2, 3, 0]
    assert choose_points(points, front, OBJECTIVES, 0) == []
    assert choose_points(points, {}, OBJECTIVES, 3) == []


def values_of(trial: Trial) -> dict[str, float]:
    assert trial.ending is not None
    return {metric: float(trial.ending.values[metric] or 0) for metric, _ in OBJECTIVES}


@given(
    losses=st.lists(st.tuples(*[st.integers(0, 20)] * 3), min_size=1, max_size=12, unique=True),
    order=st.randoms(use_true_random=False),
    most=st.integers(1, 6),
)
def test_each_chosen_point_adds_the_most_volume_to_those_before_it(
    losses: list[tuple[int, ...]], order: Any, most: int
) -> None:
    metrics = ("a", "b", "c")
    kept = [loss for loss in losses if not any(_dominates(other, loss) for other in losses)]
    points = [point(number, candidate("single", lr=0.001 + number)) for number in range(len(kept))]
    front = {trial.id: dict(zip(metrics, kept[trial.number], strict=True)) for trial in points}
    shuffled = list(points)
    order.shuffle(shuffled)
    objectives = [(metric, Direction.MINIMIZE) for metric in metrics]
    chosen = choose_points(shuffled, front, objectives, most)
    assert chosen == choose_points(points, front, objectives, most)
    assert len(chosen) == min(most, len(kept))
    assert kept[chosen[0].number] == min(kept)
    table = np.array(kept, dtype=float)
    extent = np.ptp(table, axis=0)
    table = (table - table.min(axis=0)) / np.where(extent > 0, extent, 1.0)

    def volume(numbers: Sequence[int]) -> float:
        return float(moocore.hypervolume(table[list(numbers)], ref=np.ones(3)))

    for place in range(1, len(chosen)):
        before = [trial.number for trial in chosen[:place]]
        best = max(volume([*before, n]) for n in range(len(kept)) if n not in before)
        assert volume([*before, chosen[place].number]) == pytest.approx(best)


def _dominates(one: Sequence[int], other: Sequence[int]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def test_of_points_that_are_trained_again_alike_one_is_chosen() -> None:
    found = candidate("dmtg", groups=3, split=0, tau=2.0)
    points = [point(0, GROUPED), point(1, found, grouping=GROUPS), point(2, SHARED)]
    front = {trial.id: {"delta_m": 5.0 - trial.number, "macs": 100.0} for trial in points}
    assert [trial.number for trial in choose_points(points, front, OBJECTIVES, 3)] == [0, 2]


# What is trained again


@pytest.mark.parametrize(
    ("trained", "grouping", "again"),
    [
        (SHARED, None, SHARED),
        (candidate("interrogate", **GATES), None, candidate("interrogate", **GATES)),
        (GROUPED, GROUPS, GROUPED),
        (
            candidate("dmtg", groups=3, split=1, tau=2.0, init="equal"),
            GROUPS,
            candidate("grouped", split=1, grouping=GROUPS),
        ),
        (candidate("affinity", groups=2, split=0, method="tag"), GROUPS, GROUPED),
        (candidate("dmtg", groups=2, split=0), [LEFT + RIGHT], SHARED),
        (candidate("dmtg", groups=6, split=0), SINGLES, candidate("single")),
        (candidate("dmtg", groups=6, split=1), SINGLES, candidate("grouped", split=1, grouping=SINGLES)),
        (
            candidate(
                "dmtg+interrogate", groups=2, tau=2.0, logits_lr=0.1, group_share=0.5, split=0, **GATES
            ),
            GROUPS,
            candidate("dmtg+interrogate", split=0, grouping=GROUPS, **GATES),
        ),
    ],
)
def test_the_network_that_was_found_is_trained_again_and_not_the_way_to_it(
    trained: Candidate, grouping: Any, again: Candidate, plan: Plan
) -> None:
    found = retrained(point(0, trained, grouping=grouping))
    assert found == again
    network = build_candidate(found, plan.input_shape, plan.tasks)
    if grouping is not None and found.family not in ("single", "shared"):
        assert network.grouping == Grouping.from_names(grouping, plan.tasks)


def test_each_point_is_trained_with_fresh_seeds_beside_the_shared_network_nearest_in_macs(plan: Plan) -> None:
    points = [
        point(0, GROUPED, macs=8000.0),
        point(1, candidate("interrogate", lr=1e-3, **GATES), macs=500.0),
    ]
    found = plan_confirmation(plan, points)
    assert len({run.id for run in found}) == len(found) == 2 * 2 * 3
    assert [run.trial_id for run in found] == ["trial_0"] * 6 + ["trial_1"] * 6
    seeds = {run.seed for run in found}
    assert len(seeds) == 3
    for trial in points:
        assert trial.ending is not None
        by_role = {
            role: [run for run in found if (run.trial_id, run.role) == (trial.id, role)] for role in Role
        }
        assert {role: {run.seed for run in by_role[role]} for role in Role} == dict.fromkeys(Role, seeds)
        assert all(run.candidate == retrained(trial) for run in by_role[Role.POINT])
        (shared,) = {repr(run.candidate): run.candidate for run in by_role[Role.SHARED]}.values()
        assert shared.family == "shared"
        assert shared.parameters["lr"] == trial.candidate.parameters["lr"]
        macs = trial.ending.values["macs"]
        assert macs is not None
        every = [
            measure_size(candidate("shared", width=width, depth=depth), plan.input_shape, plan.tasks)["macs"]
            for width in MLP.choices["width"]
            for depth in MLP.choices["depth"]
        ]
        nearest = min(every, key=lambda size: abs(math.log(size / macs)))
        assert measure_size(shared, plan.input_shape, plan.tasks)["macs"] == nearest


def test_no_seed_is_a_trials_and_a_rebuilt_driver_plans_the_same(plan: Plan) -> None:
    taken = derive_seed(plan.spec.seed, "confirm", 1)
    points = [point(0, GROUPED, seed=taken)]
    found = plan_confirmation(plan, points)
    assert taken not in {run.seed for run in found}
    assert len({run.seed for run in found}) == 3
    assert found == plan_confirmation(plan, points)


def test_what_several_points_need_is_trained_once(plan: Plan) -> None:
    width = MLP.choices["width"].index(24)
    macs = measure_size(SHARED, plan.input_shape, plan.tasks)["macs"]
    near = measure_size(
        candidate("shared", width=MLP.choices["width"][width + 1]), plan.input_shape, plan.tasks
    )
    points = [
        point(0, GROUPED, macs=near["macs"]),
        point(1, candidate("grouped", split=1, grouping=GROUPS), macs=near["macs"]),
        point(2, candidate("etr_nlp", gamma=0.5), macs=macs),
        point(3, SHARED, macs=macs),
    ]
    found = plan_confirmation(plan, points)
    roles = {trial.id: {run.role for run in found if run.trial_id == trial.id} for trial in points}
    assert roles == {
        "trial_0": {Role.POINT, Role.SHARED},
        "trial_1": {Role.POINT},
        "trial_2": {Role.POINT},  # beside trial_3
        "trial_3": {Role.POINT},
    }


def test_a_job_of_one_task_has_nothing_to_compare_with(make_job: MakeJob) -> None:
    alone = make_plan(make_job(tasks=["left_loop"], confirm={"top": 1, "seeds": 2}))
    trial = point(0, candidate("single"))
    found = plan_confirmation(alone, [trial])
    assert [run.role for run in found] == [Role.POINT] * 2
    verdict = make_verdict(alone, [trial], runs(trial, [1.0, 2.0]))
    assert verdict.kind is VerdictKind.UNKNOWN
    assert "one task" in verdict.words


# What the figures say


@given(
    st.lists(st.floats(-100, 100), min_size=2, max_size=6),
    st.lists(st.floats(-100, 100), min_size=2, max_size=6),
)
def test_a_points_gain_has_welchs_interval(ours: list[float], theirs: list[float]) -> None:
    assume(min(np.ptp(ours), np.ptp(theirs)) > 1e-3)
    trial = point(0, GROUPED)
    found = summarise([*runs(trial, ours), *runs(trial, theirs, Role.SHARED, macs=4800.0)])[trial.id]
    assert found.over_shared is not None
    expected = ttest_ind(ours, theirs, equal_var=False).confidence_interval(1 - FALSE_ALARMS)
    assert found.over_shared.metric == "delta_m"
    assert found.over_shared.shared_macs == 4800.0
    assert found.over_shared.gain == pytest.approx(fmean(ours) - fmean(theirs), abs=1e-9)
    assert (found.over_shared.low, found.over_shared.high) == pytest.approx(tuple(expected), abs=1e-6)
    assert found.over_shared.within_noise == (found.over_shared.low <= 0 <= found.over_shared.high)


def test_hardly_any_noise_still_has_an_interval() -> None:
    trial = point(0, GROUPED)
    figures = [*runs(trial, [0.0, 1e-99]), *runs(trial, [0.0, 2e-99], Role.SHARED)]
    found = summarise(figures)[trial.id].over_shared
    assert found is not None
    assert found.within_noise


def test_failed_runs_are_left_out_and_counted() -> None:
    trial = point(0, GROUPED)
    (found,) = summarise(
        [*runs(trial, [1.0, None, 3.0]), *runs(trial, [0.5, None, None], Role.SHARED)]
    ).values()
    assert (found.seeds, found.failed) == (2, 1)
    assert found.validation["delta_m"].mean == 2.0
    assert found.validation["delta_m"].std == pytest.approx(stdev([1.0, 3.0]))
    assert found.validation["delta_m"].n == 2
    assert found.test["delta_m"].mean == 1.0
    assert "delta_m_own_width" not in found.validation  # nothing has it
    assert found.over_shared is None  # one seed has no spread
    (alone,) = summarise(runs(trial, [4.0, None])).values()
    assert (alone.validation["delta_m"].std, alone.validation["delta_m"].n) == (None, 1)
    (none,) = summarise(runs(trial, [None])).values()
    assert (none.seeds, none.failed, none.validation, none.over_shared) == (0, 1, {}, None)


def test_a_point_is_compared_with_the_nearest_shared_network_of_its_recipe_that_another_needed() -> None:
    one, two = point(0, GROUPED), point(1, candidate("etr_nlp", gamma=0.5))
    other_recipe = candidate("shared", lr=0.02)
    found = summarise(
        [
            *runs(one, around(9.0)),
            *runs(one, around(5.0), Role.SHARED, macs=4000.0),
            *runs(two, around(6.0), macs=5000.0),
            *runs(point(2, SHARED), around(1.0), macs=900.0),
            *runs(point(3, other_recipe), around(2.0), macs=5000.0),
        ]
    )
    assert found["trial_1"].over_shared is not None
    assert found["trial_1"].over_shared.shared_macs == 4000.0
    assert found["trial_1"].over_shared.gain == pytest.approx(1.0)
    assert found["trial_2"].over_shared is None
    assert found["trial_3"].over_shared is None


@settings(max_examples=10)
@given(order=st.permutations(range(12)))
def test_the_order_of_the_runs_tells_nothing(order: list[int], plan: Plan) -> None:
    one, two = point(0, GROUPED), point(1, candidate("etr_nlp", gamma=0.5))
    records = [
        *runs(one, [8.0, 9.5, 10.0]),
        *runs(one, [1.0, 2.0, 2.5], Role.SHARED),
        *runs(two, [4.0, 5.0, 5.5]),
        *runs(two, [3.0, None, 2.5], Role.SHARED),
    ]
    mixed = [records[index] for index in order]
    assert summarise(mixed) == summarise(records)
    assert make_verdict(plan, [one, two], mixed) == make_verdict(plan, [one, two], records)


# What is said of them


def test_where_nothing_differs_hardly_any_job_sees_a_difference(plan: Plan) -> None:
    """Noise of every size, in three points and their rivals, and in the yardstick beneath them all."""
    rng = np.random.default_rng(0)
    jobs, intervals_missed, verdicts_wrong = 150, 0, 0
    trials = [point(0, GROUPED), point(1, candidate("single")), point(2, candidate("etr_nlp", gamma=0.5))]
    for _ in range(jobs):
        noise = rng.uniform(1, 20)
        zero = rng.normal(0, noise / math.sqrt(3))
        records = [
            record
            for trial in trials
            for role in Role
            for record in runs(trial, list(rng.normal(zero, noise, 3)), role)
        ]
        found = summarise(records).values()
        intervals_missed += any(s.over_shared is not None and not s.over_shared.within_noise for s in found)
        verdicts_wrong += make_verdict(plan, trials, records).kind is not VerdictKind.NO_DIFFERENCE
    three_sigma = 3 * math.sqrt(FALSE_ALARMS * (1 - FALSE_ALARMS) / jobs)
    assert intervals_missed / jobs <= FALSE_ALARMS + three_sigma
    assert verdicts_wrong / jobs <= 2 * FALSE_ALARMS + three_sigma  # two questions


def test_where_noise_is_the_same_for_all_the_intervals_miss_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    trial = point(0, GROUPED)
    missed = 0
    for _ in range(1000):
        records = [record for role in Role for record in runs(trial, list(rng.normal(0, 1, 5)), role)]
        found = summarise(records)[trial.id].over_shared
        missed += found is not None and not found.within_noise
    assert 0.5 * FALSE_ALARMS < missed / 1000 < 1.5 * FALSE_ALARMS


@settings(max_examples=25)
@given(gains=st.lists(st.floats(-50, 50), min_size=2, max_size=5))
def test_equal_figures_never_make_groups(gains: list[float], plan: Plan) -> None:
    trial = point(0, GROUPED)
    verdict = make_verdict(plan, [trial], [*runs(trial, gains), *runs(trial, gains, Role.SHARED)])
    assert verdict.kind in (VerdictKind.NO_DIFFERENCE, VerdictKind.APART, VerdictKind.TOGETHER)


@settings(max_examples=15)
@given(noise=st.floats(0, 3), shared=st.floats(-20, 20), rng=st.randoms(use_true_random=False))
def test_a_strong_effect_is_found(noise: float, shared: float, rng: Any, plan: Plan) -> None:
    trial = point(0, GROUPED)
    seeds = range(3)
    verdict = make_verdict(
        plan,
        [trial],
        [
            *runs(trial, [60 + shared + noise * rng.uniform(-1, 1) for _ in seeds]),
            *runs(trial, [shared + noise * rng.uniform(-1, 1) for _ in seeds], Role.SHARED),
        ],
    )
    assert verdict.kind is VerdictKind.GROUPS
    assert verdict.grouping == GROUPS
    assert verdict.trial_id == trial.id


@settings(max_examples=10)
@given(poison=st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=12, max_size=12))
def test_the_test_split_decides_nothing(poison: list[float | None], plan: Plan) -> None:
    one, two = point(0, GROUPED), point(1, candidate("single"))
    records = [
        *runs(one, [8.0, 9.5, 10.0]),
        *runs(one, [1.0, 2.0, 2.5], Role.SHARED),
        *runs(two, [4.0, 5.0, 5.5]),
        *runs(two, [3.0, 2.0, 2.5], Role.SHARED),
    ]
    poisoned = [
        replace(record, ending=replace(record.ending, test={"delta_m": value, "macs": value}))
        for record, value in zip(records, poison, strict=True)
    ]
    assert make_verdict(plan, [one, two], poisoned) == make_verdict(plan, [one, two], records)
    for name, found in summarise(records).items():
        assert replace(summarise(poisoned)[name], test=found.test) == found


Case = tuple[Trial, list[Confirmation]]


def case(
    what: Candidate,
    ours: Sequence[float | None],
    theirs: Sequence[float | None] = (),
    macs: float = 5000.0,
    shared_macs: float = 5000.0,
    number: int = 0,
) -> Case:
    trial = point(number, what, macs=macs)
    return trial, [
        *runs(trial, ours, macs=macs),
        *runs(trial, theirs, Role.SHARED, macs=shared_macs),
    ]


@pytest.mark.parametrize(
    ("cases", "kind", "trial_id", "words"),
    [
        (
            [case(GROUPED, around(12.0), around(-30.0), shared_macs=5100.0)],
            VerdictKind.GROUPS,
            "trial_0",
            "Train the tasks in these groups: {left_parity, left_large, left_loop}, {right_parity, "
            "right_large, right_loop}. They gain 42.0 ± 2.3 percent points of delta_m over one shared "
            "network of 1.02 times the macs (validation split, 3 fresh seeds, 95 % over seeds). Beside "
            "single-task networks of the default size and recipe the delta_m is 12.0 %, at 0.21 times their "
            "macs.",
        ),
        (
            [case(candidate("single"), around(2.0), around(-30.0), macs=OF_YARDSTICK, shared_macs=20000.0)],
            VerdictKind.APART,
            "trial_0",
            "Train the tasks apart: single-task networks gain 32.0 ± 2.3",
        ),
        (
            [case(candidate("single"), around(2.0), around(-30.0), macs=90000.0, shared_macs=20000.0)],
            VerdictKind.APART,
            "trial_0",
            "a part of this may be size alone",
        ),
        (
            [case(candidate("interrogate", **GATES), around(9.0), around(-3.0))],
            VerdictKind.PARTLY,
            "trial_0",
            "Let the tasks share a part of one network, by interrogate: it gains 12.0 ± 2.3",
        ),
        (
            [case(candidate("etr_nlp", gamma=1.0), around(9.0), around(-3.0))],
            VerdictKind.TOGETHER,
            "trial_0",
            "Train all tasks together, by etr_nlp: its network gains 12.0",
        ),
        (  # even the best is worse than single-task networks
            [case(GROUPED, around(-20.0), around(-50.0))],
            VerdictKind.APART,
            None,
            "the best confirmed network has a delta_m of -20.0 ± 2.9 %, worse than single-task networks",
        ),
        (  # the shared network beside a point is good enough
            [case(GROUPED, around(-20.0), around(0.0))],
            VerdictKind.TOGETHER,
            None,
            "one shared network gains 20.0 ± 2.3 percent points of delta_m over the best point (grouped)",
        ),
        (
            [case(SHARED, around(15.0)), case(GROUPED, around(14.0), around(15.0), number=1)],
            VerdictKind.TOGETHER,
            "trial_0",
            "one shared network has a delta_m of 15.0 ± 2.7 %, better than single-task networks",
        ),
        (  # the shared network that it speaks of was trained beside the point, and is no other trial
            [
                case(GROUPED, around(-5.0), around(10.0), shared_macs=9000.0),
                case(candidate("shared", width=12), around(-40.0), macs=1500.0, number=1),
            ],
            VerdictKind.TOGETHER,
            None,
            "1.80 times its macs (validation split, 3 fresh seeds, 95 % over seeds). The backbone has no "
            "shared network nearer in size",
        ),
        (
            [
                case(candidate("interrogate", **GATES), around(14.0), around(15.0)),
                case(candidate("shared", width=12), around(-40.0), macs=1500.0, number=1),
            ],
            VerdictKind.TOGETHER,
            None,
            "one shared network has a delta_m of 15.0",
        ),
        (  # so large that single-task networks of that size may be as good
            [case(SHARED, around(15.0), macs=2 * OF_YARDSTICK)],
            VerdictKind.NO_DIFFERENCE,
            None,
            "No difference beyond noise",
        ),
        (  # the better point first, unless only another one is beyond noise
            [
                case(candidate("single"), [0.0, 20.0, 40.0], [0.0, 15.0, 30.0]),
                case(GROUPED, around(10.0), around(-10.0), number=1),
            ],
            VerdictKind.GROUPS,
            "trial_1",
            "gain 20.0",
        ),
        (
            [case(GROUPED, around(1.0), around(0.5))],
            VerdictKind.NO_DIFFERENCE,
            None,
            "Differences below 2.9 percent points may be hidden",
        ),
        (  # beyond noise, but nothing that anybody would change a network for
            [case(GROUPED, around(0.5, 0.01), around(0.0, 0.01))],
            VerdictKind.NO_DIFFERENCE,
            None,
            "by 1 percent point",
        ),
        (  # who can tell from so much noise?
            [case(GROUPED, around(20.0, 25.0), around(0.0, 25.0))],
            VerdictKind.NO_DIFFERENCE,
            None,
            "Differences below 71.3 percent points may be hidden; more seeds would show smaller ones",
        ),
        (
            [case(GROUPED, [12.0, None, None], around(0.0))],
            VerdictKind.UNKNOWN,
            None,
            "Too few confirming runs completed to say: 1 for 1 point, and each needs two.",
        ),
        (
            [case(GROUPED, around(1.0), [0.0, None, None])],
            VerdictKind.UNKNOWN,
            None,
            "no shared network of the points' size was trained with two seeds",
        ),
        ([case(GROUPED, [None, None, None])], VerdictKind.UNKNOWN, None, "0 for 1 point"),
        (
            [case(GROUPED, [12.0, 13.0, None], around(-30.0))],
            VerdictKind.GROUPS,
            "trial_0",
            "(validation split, 2 fresh seeds, 95 % over seeds; 1 confirming run did not complete)",
        ),
    ],
)
def test_the_verdict_says_in_plain_words_what_was_confirmed(
    cases: list[Case], kind: VerdictKind, trial_id: str | None, words: str, plan: Plan
) -> None:
    records = [record for _, found in cases for record in found]
    verdict = make_verdict(plan, [trial for trial, _ in cases], records)
    assert (verdict.kind, verdict.trial_id) == (kind, trial_id)
    assert words in verdict.words
    assert (verdict.grouping is not None) == (kind is VerdictKind.GROUPS)


@pytest.mark.parametrize(
    ("shared", "kind", "words"),
    [
        (-50.0, VerdictKind.GROUPS, "They gain 30.0 ± 2.3 percent points of delta_m over"),
        (-20.0, VerdictKind.NO_DIFFERENCE, "networks of the default size break the job's constraints"),
    ],
)
def test_networks_that_the_constraints_forbid_are_no_advice(
    make_job: MakeJob, shared: float, kind: VerdictKind, words: str
) -> None:
    small = make_plan(
        make_job(constraints=[{"metric": "macs", "max": 6000}, {"metric": "delta_m", "min": -90}])
    )
    trial, records = case(GROUPED, around(-20.0), around(shared))
    verdict = make_verdict(small, [trial], records)
    assert verdict.kind is kind
    assert words in verdict.words


def test_nothing_confirmed_is_nothing_known(plan: Plan) -> None:
    for points in ([], [point(0, GROUPED)]):
        assert make_verdict(plan, points, []).kind is VerdictKind.UNKNOWN


# The negative control


def test_on_the_negative_control_it_makes_no_difference_what_is_shared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(plan_module, "sources", lambda: {"control": Control})
    plan = make_plan(
        JobSpec.model_validate(
            {"dataset": {"source": "control"}, "budget": {"trials": 3, "epochs": 4}, "confirm": {"top": 3}}
        )
    )
    bench = make_bench(plan.tasks, Control.load(ControlOptions()), cpus=1, gpus=0)
    names = plan.tasks.names
    shared = default_candidate(plan, "shared")
    grouped = replace(
        shared,
        family="grouped",
        parameters={**shared.parameters, "split": 0, "grouping": [list(names[:2]), list(names[2:])]},
    )
    wide = replace(shared, parameters={**shared.parameters, "width": 48})  # the macs of `single`
    errors: Mapping[str, list[float]] = {
        name: [_mean_error(what, seed, bench) for seed in SEEDS]
        for name, what in {
            "single": default_candidate(plan, "single"),
            "shared": shared,
            "wide": wide,
            "grouped": grouped,
        }.items()
    }
    gains = {name: [100 * (0.5 - error) / 0.5 for error in found] for name, found in errors.items()}
    points = [point(0, replace(grouped)), point(1, default_candidate(plan, "single"))]
    records = [
        *runs(points[0], gains["grouped"], what=grouped),
        *runs(points[0], gains["shared"], Role.SHARED),
        *runs(points[1], gains["single"]),
        *runs(points[1], gains["wide"], Role.SHARED),
    ]
    assert all(stdev(found) > 0.1 for found in gains.values())  # there is noise
    assert all(abs(fmean(found)) < 2 * LEAST_GAIN for found in gains.values())
    assert make_verdict(plan, points, records).kind is VerdictKind.NO_DIFFERENCE


def _mean_error(what: Candidate, seed: int, bench: Any) -> float:
    training = Training(Assignment(trial_id="", candidate=what, seed=seed, epochs=4), bench, None)
    while not training.done:
        measurement = training.run_epoch()
    return fmean(found["error"] for found in measurement.tasks.values())
