"""The default sampler: baselines first, then what was learned of the tasks and of the candidates."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coterie.models.tasks import Grouping, TaskSet
from coterie.search.coterie_sampler import CoterieSampler
from coterie.search.group_knowledge import (
    AFFINITY_SEEDS,
    REPLICATE_EVERY,
    SIDE_SHARE,
    STACKED_NETWORKS,
    GroupKnowledge,
)
from coterie.search.objective import Yardstick
from coterie.search.plan import Plan, make_plan, measure_size
from coterie.search.sampler import key_of, make_sampler
from coterie.search.spec import JobSpec
from coterie.search.store import AffinityResult, Candidate, Ending, SubsetResult, Trial, TrialState
from coterie.search.work import AffinityRun, SideRun, SubsetRun

FAMILIES = ["interrogate", "single", "grouped", "shared", "affinity"]
BASELINES = 4  # all but grouped have a default
LEFT, RIGHT = (0, 1, 2), (3, 4, 5)  # the tasks of `digits` that ask about the same digit
NOISE = 0.03  # standard deviation of an error's share


def error_of(task: int, partners: Iterable[int], seed: int) -> float:
    """A task's error: less with each partner of its side, more with each of the other, and noise."""
    others = [partner // 3 == task // 3 for partner in partners if partner != task]
    share = 1 - 0.15 * sum(others) + 0.1 * (len(others) - sum(others))
    return 0.2 * (share + NOISE * random.Random(f"{task} {sorted(partners)} {seed}").gauss(0, 1))


def measured(errors: dict[str, float]) -> dict[str, dict[str, float]]:
    return {name: {"error": error, "f1": 1 - error, "accuracy": 1 - error} for name, error in errors.items()}


def run_subsets(run: SubsetRun, tasks: TaskSet) -> list[SubsetResult]:
    return [
        SubsetResult(
            tasks=tuple(tasks[t].name for t in subset),
            weights=(1.0,) * len(subset),
            seed=seed,
            validation=measured({tasks[t].name: error_of(t, subset, seed) for t in subset}),
            test={},
            run=run.run,
        )
        for seed in run.seeds
        for subset in run.subsets
    ]


def run_affinity(run: AffinityRun, tasks: TaskSet) -> AffinityResult:
    sides = [[1.0 if i // 3 == j // 3 else -1.0 for j in range(6)] for i in range(6)]
    return AffinityResult(
        method="one_step", tasks=tasks.names, weights=(1.0,) * 6, seed=run.seed, matrix=sides
    )


def grouping_of(candidate: Candidate, tasks: TaskSet) -> Grouping:
    if "grouping" in candidate.parameters:
        return Grouping.from_names(candidate.parameters["grouping"], tasks)
    return Grouping.apart(6) if candidate.family == "single" else Grouping.together(6)


def outcome(trial: Trial, tasks: TaskSet) -> Ending:
    """Every ninth fails, every seventh is stopped; others gain by groups, width and learning rate."""
    if trial.number % 9 == 8:
        return Ending(state=TrialState.FAILED, reason="ValueError: of course")
    parameters = trial.candidate.parameters
    groups = grouping_of(trial.candidate, tasks).groups
    errors = {tasks[t].name: error_of(t, group, trial.seed) for group in groups for t in group}
    gain = 100 * (1 - sum(errors.values()) / 6 / 0.2)
    gain += 10 * np.log2(parameters["width"] / 24) - 40 * np.log10(parameters["lr"] / 5e-3) ** 2
    macs = float(parameters["width"] * 150 * len(groups))
    values = {"delta_m": gain, "macs": macs, "params": macs + 10}
    if trial.number % 7 == 6:
        return Ending(state=TrialState.STOPPED, values={**values, "delta_m": gain - 50})
    tables = {name: {"validation": found} for name, found in measured(errors).items()}
    return Ending(state=TrialState.COMPLETED, values=values, tasks=tables)


@dataclass
class Search:
    """A job's search with made-up outcomes: all that a sampler was told and learned, in order."""

    plan: Plan
    yardstick: Yardstick
    trials: dict[int, Trial] = field(default_factory=dict)
    results: list[SubsetResult] = field(default_factory=list)
    affinities: list[AffinityResult] = field(default_factory=list)
    side_runs: dict[int, list[SideRun]] = field(default_factory=dict)

    def sampler(self) -> CoterieSampler:
        """One that knows what this search has come to."""
        sampler = make_sampler(self.plan, self.yardstick)
        assert isinstance(sampler, CoterieSampler)
        sampler.learn(self.results)
        for affinity in self.affinities:
            sampler.learn_affinity(affinity)
        for number in sorted(self.trials):
            sampler.tell(self.trials[number])
        return sampler

    def learn(self, sampler: CoterieSampler, number: int) -> None:
        """Do the side runs that are wanted before a trial."""
        while (run := sampler.wanted(number)) is not None:
            self.side_runs.setdefault(number, []).append(run)
            if isinstance(run, SubsetRun):
                found = run_subsets(run, self.plan.tasks)
                self.results += found
                sampler.learn(found)
            else:
                affinity = run_affinity(run, self.plan.tasks)
                self.affinities.append(affinity)
                sampler.learn_affinity(affinity)

    def ask(self, sampler: CoterieSampler, number: int) -> Trial | None:
        proposal = sampler.ask(number)
        if proposal is None:
            return None
        self.trials[number] = Trial(
            id=f"trial_{number}",
            number=number,
            candidate=proposal.candidate,
            choices=proposal.choices,
            origin=proposal.origin,
            seed=number,
        )
        return self.trials[number]

    def end(self, sampler: CoterieSampler, number: int) -> None:
        ending = outcome(self.trials[number], self.plan.tasks)
        self.trials[number] = replace(self.trials[number], state=ending.state, ending=ending)
        sampler.tell(self.trials[number])

    def run(self, length: int) -> "Search":
        """One trial after the other, by one sampler."""
        sampler = self.sampler()
        for number in range(length):
            self.learn(sampler, number)
            self.ask(sampler, number)
            self.end(sampler, number)
        return self


MakeSearch = Callable[..., Search]


@pytest.fixture
def make_search(make_job: Callable[..., JobSpec], yardstick: Yardstick) -> MakeSearch:
    def make(families: Sequence[str] = FAMILIES, trials: int | None = 40, **fields: Any) -> Search:
        search = {"families": list(families), **fields.pop("search", {})}
        budget = {"trials": trials, "epochs": 20} if trials else {"seconds": 60, "epochs": 20}
        return Search(make_plan(make_job(search=search, budget=budget, **fields)), yardstick)

    return make


def candidates(search: Search, origin: str) -> list[Candidate]:
    return [trial.candidate for trial in search.trials.values() if trial.origin == origin]


def test_single_and_shared_are_the_first_of_the_baselines(make_search: MakeSearch) -> None:
    first = [trial.candidate.family for trial in make_search().run(BASELINES).trials.values()]
    assert first == ["single", "shared", "interrogate", "affinity"]


def test_after_the_baselines_each_way_to_propose_has_its_turns(make_search: MakeSearch) -> None:
    origins = [trial.origin for trial in make_search().run(18).trials.values()]
    assert origins[:BASELINES] == ["baseline"] * BASELINES
    assert {origin: origins.count(origin) for origin in ("grouping", "coterie", "tpe")} == {
        "grouping": 6,
        "coterie": 6,
        "tpe": 2,
    }


def test_the_planted_groups_are_proposed_first(make_search: MakeSearch) -> None:
    search = make_search(search={"space": {"grouped": {"groups": 2}}}).run(BASELINES + 8)
    planted = Grouping((LEFT, RIGHT))
    found = [grouping_of(candidate, search.plan.tasks) for candidate in candidates(search, "grouping")]
    assert found[:3] == [planted] * 3
    assert found.count(planted) >= len(found) - 1


def test_the_first_groupings_have_the_default_recipe_and_other_sizes(make_search: MakeSearch) -> None:
    first = candidates(make_search().run(BASELINES + 6), "grouping")[:3]
    assert first[0].parameters["width"] == 24
    assert len({(c.parameters["width"], c.parameters["depth"]) for c in first}) == 3
    assert all(candidate.parameters["lr"] == 5e-3 for candidate in first)


def test_what_was_learned_moves_the_proposals(make_search: MakeSearch) -> None:
    """Wide networks with the default learning rate gain most; at random, widths and rates are anywhere."""
    search = make_search(objectives=[{"metric": "delta_m"}]).run(30)
    late = [trial.candidate.parameters for trial in search.trials.values() if trial.origin == "coterie"][-5:]
    assert np.mean([parameters["width"] for parameters in late]) > 32
    assert np.mean([abs(np.log10(parameters["lr"] / 5e-3)) for parameters in late]) < 0.4


# Side runs


def test_networks_for_all_subsets_train_once_before_the_first_grouping(make_search: MakeSearch) -> None:
    search = make_search().run(BASELINES + 1)
    assert list(search.side_runs) == [BASELINES]
    (run,) = search.side_runs[BASELINES]
    assert isinstance(run, SubsetRun)
    assert (run.run, len(run.subsets), len(run.seeds), run.epochs) == (0, 63, 1, 20)
    assert run.candidate.family == "shared"


def test_later_ones_are_few_and_stay_within_their_share(make_search: MakeSearch) -> None:
    search = make_search().run(40)
    later = {number: runs for number, runs in search.side_runs.items() if number > BASELINES}
    networks = [
        len(run.subsets) for runs in search.side_runs.values() for run in runs if isinstance(run, SubsetRun)
    ]
    assert all(number - BASELINES >= REPLICATE_EVERY for number in later)
    assert sum(networks) <= SIDE_SHARE * 40 * STACKED_NETWORKS
    seeds = [result.seed for result in search.results]
    assert len({(result.tasks, result.seed) for result in search.results}) == len(seeds)


def test_what_other_jobs_have_trained_is_not_trained_again(make_search: MakeSearch) -> None:
    first = make_search().run(BASELINES + 1)
    second = make_search(seed=1)
    second.results = [replace(result, run=None) for result in first.results]
    assert second.run(BASELINES + 1).side_runs == {}
    part = make_search(seed=1)
    part.results = second.results[:20]
    (run,) = part.run(BASELINES + 1).side_runs[BASELINES]
    assert isinstance(run, SubsetRun)
    assert len(run.subsets) == 43


def test_results_for_tasks_of_other_weights_teach_nothing(make_search: MakeSearch) -> None:
    search = make_search()
    first = make_search().run(BASELINES + 1).results
    search.results = [replace(r, run=None, weights=(2.0,) * len(r.tasks)) for r in first]
    (run,) = search.run(BASELINES + 1).side_runs[BASELINES]
    assert isinstance(run, SubsetRun)
    assert len(run.subsets) == 57  # all but the single tasks, whose weight is nothing to compare with


@pytest.mark.parametrize(
    "fields",
    [
        {"families": ["single", "shared", "interrogate"]},
        {"search": {"space": {"grouped": {"split": 1, "depth": 3}}}},
        {
            "search": {
                "space": {
                    "grouped": {
                        "grouping": [
                            [f"{s}_{q}" for q in ("parity", "large", "loop") for s in ("left", "right")]
                        ]
                    }
                }
            }
        },
        {"tasks": ["left_parity", "left_loop"]},
        {"trials": 1},
        {"constraints": [{"metric": "macs", "max": 1300}]},
    ],
    ids=["not grouped", "no networks of their own", "given", "two tasks", "one trial", "nothing fits"],
)
def test_nothing_is_measured_beside_where_it_could_not_be_used(
    make_search: MakeSearch, fields: dict[str, Any]
) -> None:
    sampler = make_search(**fields).sampler()
    assert [sampler.wanted(number) for number in range(40)] == [None] * 40


def test_a_backbone_that_cannot_be_stacked_starts_from_affinities(make_search: MakeSearch) -> None:
    search = make_search(search={"backbones": ["cnn"], "space": {"grouped": {"groups": 2}}})
    search.run(BASELINES + 3)
    runs = search.side_runs[BASELINES]
    assert [run.seed for run in runs if isinstance(run, AffinityRun)] == list(AFFINITY_SEEDS)
    assert all(isinstance(run, AffinityRun) and run.epochs == 5 for run in runs)
    found = candidates(search, "grouping")
    assert grouping_of(found[0], search.plan.tasks) == Grouping((LEFT, RIGHT))


def test_without_stacks_the_groups_are_learned_from_trials(
    make_search: MakeSearch, yardstick: Yardstick
) -> None:
    search = make_search(search={"backbones": ["cnn"]})
    knowledge = GroupKnowledge(search.plan, yardstick)
    names = search.plan.tasks.names
    rng = random.Random(0)
    for number in range(30):
        labels = [rng.randrange(2) for _ in names]
        grouping = Grouping.from_labels(labels).names(search.plan.tasks)
        parameters = {"width": rng.choice((0.25, 0.5)), "lr": 5e-3, "batch_size": 64, "grouping": grouping}
        candidate = Candidate(family="grouped", backbone="cnn", parameters=parameters)
        trial = Trial(id="", number=number, candidate=candidate, choices={}, seed=number)
        errors = {
            names[t]: error_of(t, group, number)
            for group in grouping_of(candidate, search.plan.tasks).groups
            for t in group
        }
        tables = {name: {"validation": found} for name, found in measured(errors).items()}
        knowledge.tell(replace(trial, ending=Ending(state=TrialState.COMPLETED, tasks=tables)))
    planted = Grouping((LEFT, RIGHT))
    mixed = Grouping(((0, 1, 3), (2, 4, 5)))
    assert knowledge.expected(planted) > knowledge.expected(mixed)


# Bounds


@pytest.mark.parametrize(
    "bound", [{"metric": "macs", "max": 9000}, {"metric": "params", "min": 9000, "max": 20000}]
)
def test_groupings_keep_the_jobs_bounds(make_search: MakeSearch, bound: dict[str, Any]) -> None:
    search = make_search(constraints=[bound]).run(30)
    found = candidates(search, "grouping")
    assert len(found) >= 8
    for candidate in found:
        size = measure_size(candidate, search.plan.input_shape, search.plan.tasks)[bound["metric"]]
        assert bound.get("min", 0) <= size <= bound["max"]


def test_groupings_have_as_many_groups_as_the_job_asks_for(make_search: MakeSearch) -> None:
    search = make_search(search={"space": {"grouped": {"groups": [3, 4]}}}).run(24)
    assert {len(candidate.parameters["grouping"]) for candidate in candidates(search, "grouping")} <= {3, 4}


# Duplicates, resuming


def test_nothing_is_proposed_twice_and_a_small_space_is_used_up(make_search: MakeSearch) -> None:
    fixed = {"weight_decay": 1e-6, "batch_size": 64, "balancing": "fixed", "lr": [1e-3, 5e-3], "depth": 2}
    space = {"shared": {**fixed, "width": [8, 24, 96]}, "single": {**fixed, "width": [8, 24, 96]}}
    search = make_search(families=["shared", "single"], search={"space": space}).run(12)
    assert len({key_of(trial.candidate) for trial in search.trials.values()}) == 12
    assert search.sampler().ask(12) is None


@given(data=st.data())
@settings(max_examples=2, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_rebuilt_sampler_asks_and_wants_the_same(data: st.DataObject, make_search: MakeSearch) -> None:
    search = make_search(search={"backbones": [data.draw(st.sampled_from(["mlp", "cnn"]))]})
    sampler = search.sampler()
    running: list[int] = []
    for number in range(16):
        search.learn(sampler, number)
        search.ask(sampler, number)
        running.append(number)
        while running and (len(running) == 3 or data.draw(st.booleans())):
            search.end(sampler, running.pop(data.draw(st.integers(0, len(running) - 1))))
        if number in (5, 10, 15):
            rebuilt = search.sampler()
            assert rebuilt.wanted(number + 1) == sampler.wanted(number + 1)
            assert rebuilt.ask(number + 1) == search.sampler().ask(number + 1)
    assert search.sampler().ask(16) == sampler.ask(16)


def test_another_seed_proposes_others(make_search: MakeSearch) -> None:
    one, other = (make_search(seed=seed).run(12) for seed in (1, 2))
    assert [t.candidate for t in one.trials.values()] != [t.candidate for t in other.trials.values()]
