"""Asking and telling: what a rebuilt sampler knows, it proposes as the first one would have."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.models.tasks import Direction, TaskSet
from coterie.search.front import feasible
from coterie.search.sampler import OptunaSampler, derive_seed, key_of, population_for
from coterie.search.space import Space, make_space
from coterie.search.spec import EVERY_FAMILY, ConstraintSpec, Domain
from coterie.search.store import Candidate, Ending, Trial, TrialState

OBJECTIVES = [("delta_m", Direction.MAXIMIZE), ("macs", Direction.MINIMIZE)]
ALL = list(EVERY_FAMILY)
TRIALS = 40  # of the jobs
POPULATION = 8  # of NSGA-II in a job of so many trials

# Optuna's own products of nearly singular matrices; nothing of ours.
gp_warnings = pytest.mark.filterwarnings("ignore::RuntimeWarning:optuna")

Outcome = Callable[[Trial], Ending]


def completed(trial: Trial) -> Ending:
    """Values that follow from the candidate: best at a learning rate of 10^-2.5 and few macs."""
    parameters = trial.candidate.parameters
    gain = -((math.log10(parameters["lr"]) + 2.5) ** 2) - 0.3 * abs(parameters["depth"] - 2)
    macs = float(parameters["width"] * parameters["depth"])
    return Ending(state=TrialState.COMPLETED, values={"delta_m": gain, "macs": macs, "params": macs + 1})


def mixed(trial: Trial) -> Ending:
    """Every fifth trial failed, every seventh was stopped."""
    if trial.number % 5 == 4:
        return Ending(state=TrialState.FAILED, reason="ValueError: of course")
    if trial.number % 7 == 6:
        return Ending(state=TrialState.STOPPED)
    return completed(trial)


class Search:
    """A space and a sampler's settings, to make the same sampler again and again."""

    def __init__(
        self,
        tasks: TaskSet,
        name: str,
        families: Sequence[str] = ALL,
        objectives: Sequence[tuple[str, Direction]] = OBJECTIVES,
        constraints: Sequence[ConstraintSpec] = (),
        seed: int = 0,
        wanted: Mapping[str, Mapping[str, Domain]] = MappingProxyType({}),
        repeats: bool = False,
    ) -> None:
        self.space: Space = make_space(families, ["mlp"], tasks, (12, 12), wanted)
        self._settings = (name, self.space, objectives, constraints, seed)
        self._repeats = repeats

    def sampler(self, told: Iterable[Trial] = ()) -> OptunaSampler:
        """A new one that has been told of these trials, as they come out of a database."""
        sampler = OptunaSampler(*self._settings, trials=TRIALS, repeats=self._repeats)
        for trial in told:
            sampler.tell(replace(trial, choices=json.loads(json.dumps(trial.choices))))
        return sampler

    def run(self, numbers: range, sampler: OptunaSampler, outcome: Outcome = completed) -> list[Trial]:
        """One trial after the other."""
        return [end(sampler, ask(sampler, number), outcome) for number in numbers]


def ask(sampler: OptunaSampler, number: int) -> Trial:
    proposal = sampler.ask(number)
    assert proposal is not None
    candidate, choices, origin = proposal
    return Trial(
        id=f"trial_{number}", number=number, candidate=candidate, choices=choices, origin=origin, seed=number
    )


def end(sampler: OptunaSampler, trial: Trial, outcome: Outcome) -> Trial:
    ending = outcome(trial)
    ended = replace(trial, state=ending.state, ending=ending)
    sampler.tell(ended)
    return ended


@pytest.fixture(scope="module")
def tasks(make_tasks: Callable[[int], TaskSet]) -> TaskSet:
    return make_tasks(4)


@pytest.mark.parametrize("outcome", [completed, mixed], ids=["all complete", "some fail or stop"])
@pytest.mark.parametrize("objectives", [OBJECTIVES, OBJECTIVES[:1]], ids=["two", "one"])
@pytest.mark.parametrize("families", [ALL, ["dmtg"]], ids=["all families", "dmtg"])
@pytest.mark.parametrize("name", ["tpe", "random"])
def test_a_sampler_rebuilt_at_any_trial_proposes_what_the_first_one_did(
    name: str, families: list[str], objectives: list[tuple[str, Direction]], outcome: Outcome, tasks: TaskSet
) -> None:
    search = Search(tasks, name, families, objectives)
    trials = search.run(range(24), search.sampler(), outcome)
    for stop in range(24):
        assert ask(search.sampler(trials[:stop]), stop) == ask_of(trials[stop]), stop


def ask_of(trial: Trial) -> Trial:
    """The trial as it was before it ended."""
    return replace(trial, state=TrialState.PENDING, ending=None)


@pytest.mark.parametrize("outcome", [completed, mixed], ids=["all complete", "some fail or stop"])
@pytest.mark.parametrize("objectives", [OBJECTIVES, OBJECTIVES[:1]], ids=["two", "one"])
@pytest.mark.parametrize("families", [ALL, ["dmtg"]], ids=["all families", "dmtg"])
def test_a_rebuilt_nsga2_is_in_the_same_generation_with_the_same_parents(
    families: list[str], objectives: list[tuple[str, Direction]], outcome: Outcome, tasks: TaskSet
) -> None:
    search = Search(tasks, "nsga2", families, objectives)
    trials = search.run(range(60), search.sampler(), outcome)
    generations = [trial.choices.get("optuna", {}).get("NSGAIISampler:generation") for trial in trials]
    assert generations[-1] >= 2
    firsts = [generations.index(generation) for generation in range(1, generations[-1] + 1)]
    stops = {0, 1, 3, 30, 59, *(first + step for first in firsts for step in (-1, 0, 1, 2))}
    for stop in sorted(stop for stop in stops if stop < 60):
        assert ask(search.sampler(trials[:stop]), stop) == ask_of(trials[stop]), stop


@pytest.mark.slow
@gp_warnings
@pytest.mark.parametrize("families", [ALL, ["shared"]], ids=["all families", "shared"])
def test_a_rebuilt_gp_proposes_what_the_first_one_did(families: list[str], tasks: TaskSet) -> None:
    search = Search(tasks, "gp", families)
    trials = search.run(range(13), search.sampler())
    for stop in (3, 12):
        assert ask(search.sampler(trials[:stop]), stop) == ask_of(trials[stop]), stop


@pytest.mark.parametrize(
    ("name", "families", "length"), [("tpe", ALL, 30), ("nsga2", ["dmtg"], 40), ("random", ALL, 20)]
)
def test_a_search_that_is_restarted_again_and_again_goes_the_same_way(
    name: str, families: list[str], length: int, tasks: TaskSet
) -> None:
    search = Search(tasks, name, families)
    expected = search.run(range(length), search.sampler(), mixed)
    trials: list[Trial] = []
    while len(trials) < length:
        sampler = search.sampler(trials)
        trials += search.run(range(len(trials), min(len(trials) + 13, length)), sampler, mixed)
    assert trials == expected


@pytest.mark.parametrize(
    ("name", "families", "length"), [("tpe", ALL, 30), ("nsga2", ["dmtg"], 40), ("random", ALL, 20)]
)
def test_a_trial_that_outlives_its_sampler_is_told_to_the_next_one(
    name: str, families: list[str], length: int, tasks: TaskSet
) -> None:
    search = Search(tasks, name, families)
    expected = search.run(range(length), search.sampler())
    for stop in (0, 3, 12, POPULATION, POPULATION + 1, 2 * POPULATION + 1):
        if stop + 1 < length:
            sampler = search.sampler(expected[:stop])
            trial = end(sampler, ask_of(expected[stop]), completed)  # asked for by the one that died
            assert trial == expected[stop]
            assert ask(sampler, stop + 1) == ask_of(expected[stop + 1])


@pytest.mark.parametrize("name", ["tpe", "nsga2", "random"])
def test_trials_may_run_side_by_side_and_end_in_any_order(name: str, tasks: TaskSet) -> None:
    search = Search(tasks, name)
    sampler = search.sampler()
    running: list[Trial] = []
    ended: list[Trial] = []
    for number in range(40):
        running.append(ask(sampler, number))
        if len(running) == 4:
            ended.append(end(sampler, running.pop(number % 4), mixed))
    candidates = [trial.candidate for trial in (*ended, *running)]
    assert len({json.dumps([c.family, dict(c.parameters)], sort_keys=True) for c in candidates}) == 40
    search.sampler(sorted(ended, key=lambda trial: trial.number)).ask(40)


@pytest.mark.parametrize("name", ["tpe", "nsga2", "random"])
def test_another_seed_asks_for_other_candidates_after_the_defaults(name: str, tasks: TaskSet) -> None:
    one, other = (
        [trial.candidate for trial in search.run(range(10), search.sampler())]
        for search in (Search(tasks, name, seed=1), Search(tasks, name, seed=2))
    )
    assert one[:7] == other[:7]
    assert one[7:] != other[7:]


def test_the_default_candidates_of_single_shared_and_dmtg_come_first(tasks: TaskSet) -> None:
    search = Search(tasks, "tpe", ["dmtg", "grouped", "single", "shared"])
    first = [trial.candidate for trial in search.run(range(4), search.sampler())]
    assert [candidate.family for candidate in first[:3]] == ["dmtg", "single", "shared"]
    recipe = {"lr": 5e-3, "weight_decay": 1e-6, "batch_size": 64, "balancing": "fixed"}
    recipe |= {"width": 24, "depth": 2}
    assert first[1] == Candidate(family="single", backbone="mlp", parameters=recipe)
    assert first[2] == Candidate(family="shared", backbone="mlp", parameters=recipe)
    assert {**first[0].parameters, **recipe} == first[0].parameters


def test_what_was_learned_moves_the_proposals(tasks: TaskSet) -> None:
    """Told that only large learning rates are good, TPE asks for larger ones than at random."""

    def larger_is_better(trial: Trial) -> Ending:
        gain = math.log10(trial.candidate.parameters["lr"])
        return Ending(state=TrialState.COMPLETED, values={"delta_m": gain})

    learned, at_random = (
        [
            math.log10(trial.candidate.parameters["lr"])
            for trial in search.run(range(60), search.sampler(), larger_is_better)[-20:]
        ]
        for search in (Search(tasks, name, ["shared"], OBJECTIVES[:1]) for name in ("tpe", "random"))
    )
    assert sum(learned) / 20 > sum(at_random) / 20 + 0.5


@pytest.mark.parametrize(
    "constraints",
    [
        [ConstraintSpec(metric="params", max=60)],
        [ConstraintSpec(metric="params", min=100)],
        [ConstraintSpec(metric="params", max=60), ConstraintSpec(metric="params", max=200)],
    ],
    ids=["max", "min", "the tighter one counts"],
)
def test_tpe_learns_which_candidates_are_infeasible(
    constraints: list[ConstraintSpec], tasks: TaskSet
) -> None:
    def kept(trials: list[Trial]) -> float:
        return sum(feasible(completed(trial).values, constraints) for trial in trials[-40:]) / 40

    told, untold = (
        search.run(range(80), search.sampler())
        for search in (
            Search(tasks, "tpe", ["shared"], OBJECTIVES[:1], constraints),
            Search(tasks, "tpe", ["shared"], OBJECTIVES[:1]),
        )
    )
    assert kept(told) >= 0.7
    assert kept(told) > kept(untold)


@gp_warnings
@pytest.mark.parametrize("name", ["tpe", "nsga2", pytest.param("gp", marks=pytest.mark.slow)])
def test_a_rebuilt_sampler_knows_what_was_infeasible(name: str, tasks: TaskSet) -> None:
    bounds = [ConstraintSpec(metric="params", max=60), ConstraintSpec(metric="macs", min=20, max=50)]
    search = Search(tasks, name, ["shared"], constraints=bounds)
    length = {"gp": 12, "tpe": 25, "nsga2": 40}[name]
    trials = search.run(range(length), search.sampler(), completed if name == "gp" else mixed)
    for stop in (2, length // 2, length - 1):
        assert ask(search.sampler(trials[:stop]), stop) == ask_of(trials[stop])


def test_stopped_trials_are_learned_from_and_failed_ones_are_not(tasks: TaskSet) -> None:
    """TPE draws at random until it has seen ten trials that count."""

    def next_one(name: str, state: TrialState) -> Candidate:
        search = Search(tasks, name, ["shared"], OBJECTIVES[:1])
        sampler = search.sampler()
        search.run(range(15), sampler, lambda _: Ending(state=state))
        return ask(sampler, 15).candidate

    at_random = next_one("random", TrialState.FAILED)
    assert next_one("tpe", TrialState.FAILED) == next_one("tpe", TrialState.CANCELLED) == at_random
    assert next_one("tpe", TrialState.STOPPED) != at_random


@pytest.mark.parametrize("state", [TrialState.FAILED, TrialState.STOPPED, TrialState.CANCELLED])
def test_a_trial_without_values_teaches_nothing_that_breaks_the_next_ask(
    state: TrialState, tasks: TaskSet
) -> None:
    for name in ("tpe", "nsga2", "random"):
        search = Search(tasks, name)
        sampler = search.sampler()
        trials = search.run(range(15), sampler, lambda _: Ending(state=state))
        assert ask(search.sampler(trials), 15) == ask(sampler, 15)


def test_derived_seeds_depend_on_all_their_parts_and_fit_every_generator() -> None:
    seeds = [
        derive_seed(seed, what, number)
        for seed in (0, 1, 2**53 - 1)
        for what in ("ask", "trial")
        for number in range(50)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_derived_seeds_never_change_or_stored_jobs_would_go_on_differently() -> None:
    assert derive_seed(0, "trial", 0) == 1725501518
    assert derive_seed(7, "ask", 12) == 1511300303


def test_a_trial_from_before_a_dimension_was_added_had_it_at_its_default(tasks: TaskSet) -> None:
    search = Search(tasks, "tpe")
    trials = [
        with_parameter(trial, "balancing", "fixed") for trial in search.run(range(20), search.sampler())
    ]
    old = [without_parameter(trial, "balancing") for trial in trials]
    assert ask(search.sampler(old), 20) == ask(search.sampler(trials), 20)


def with_parameter(trial: Trial, name: str, value: object) -> Trial:
    candidate = trial.candidate
    return replace(trial, candidate=replace(candidate, parameters={**candidate.parameters, name: value}))


def without_parameter(trial: Trial, name: str) -> Trial:
    kept = {key: value for key, value in trial.candidate.parameters.items() if key != name}
    return replace(trial, candidate=replace(trial.candidate, parameters=kept))


def test_only_what_nsga2_must_know_is_kept_beside_the_candidate(tasks: TaskSet) -> None:
    """Choices of older versions have other names, so candidates alone must do."""
    for name in ("tpe", "nsga2", "random"):
        search = Search(tasks, name)
        for trial in search.run(range(20), search.sampler()):
            assert set(trial.choices) <= ({"optuna"} if name == "nsga2" else set())


# Duplicates

TWELVE: dict[str, Domain] = {
    "lr": [1e-3, 5e-3],
    "weight_decay": 1e-6,
    "batch_size": 64,
    "balancing": "fixed",
    "width": [8, 24, 96],
    "depth": [1, 2],
}


@pytest.mark.parametrize("name", ["tpe", "nsga2", "random"])
@pytest.mark.parametrize("side_by_side", [1, 3])
def test_a_space_of_twelve_is_used_up_with_each_candidate_tried_once(
    name: str, side_by_side: int, tasks: TaskSet
) -> None:
    search = Search(tasks, name, ["shared"], wanted={"shared": TWELVE})
    sampler = search.sampler()
    asked = [ask(sampler, number) for number in range(side_by_side)]
    for number in range(side_by_side, 12):
        end(sampler, asked[number - side_by_side], mixed)
        asked.append(ask(sampler, number))
    candidates = list(search.space.candidates())
    assert len(candidates) == 12
    assert sorted(map(key_of, candidates)) == sorted(key_of(trial.candidate) for trial in asked)
    assert sampler.ask(12) is None
    assert search.sampler(asked).ask(12) is None  # as a rebuilt one that is told what still runs


def test_candidates_come_again_where_the_job_wants_repeats(tasks: TaskSet) -> None:
    search = Search(tasks, "random", ["shared"], wanted={"shared": TWELVE}, repeats=True)
    trials = search.run(range(20), search.sampler())
    assert len({key_of(trial.candidate) for trial in trials}) < 12


def test_a_candidate_that_failed_is_not_tried_again(tasks: TaskSet) -> None:
    search = Search(tasks, "tpe", ["shared"], wanted={"shared": {**TWELVE, "lr": 1e-3, "depth": 1}})
    sampler = search.sampler()
    search.run(range(3), sampler, lambda _: Ending(state=TrialState.FAILED))
    assert sampler.ask(3) is None


@pytest.mark.parametrize("trials", [1, 10, 40, 1000, None])
def test_nsga2_sees_generations_in_any_job_that_is_not_tiny(trials: int | None) -> None:
    population = population_for(trials)
    assert 2 <= population <= 50
    if trials is not None and trials >= 20:
        assert trials // population >= 5


@given(data=st.data())
@settings(max_examples=8)
def test_what_is_asked_depends_on_what_was_told_and_not_on_when(data: st.DataObject, tasks: TaskSet) -> None:
    """Trials end in any order; one that is rebuilt is told those that ended and those that run."""
    search = Search(tasks, "tpe", objectives=data.draw(st.sampled_from([OBJECTIVES, OBJECTIVES[:1]])))
    sampler = search.sampler()
    running: list[Trial] = []
    known: dict[int, Trial] = {}
    for number in range(20):
        known[number] = ask(sampler, number)
        running.append(known[number])
        while running and data.draw(st.booleans()):
            trial = end(sampler, running.pop(data.draw(st.integers(0, len(running) - 1))), mixed)
            known[trial.number] = trial
    order = data.draw(st.permutations(sorted(known)))
    assert search.sampler(known[number] for number in order).ask(20) == sampler.ask(20)
