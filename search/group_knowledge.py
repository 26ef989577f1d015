"""What is known of a job's groupings, and what to measure beside its trials to know more.

What tasks gain in each subset is believed as `coterie.search.surrogate` does. Networks for subsets train as
stacks where the backbone can be stacked; elsewhere the belief starts from one-step affinities and learns from
the trials whose groups are networks of their own.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import combinations
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.models.backbones import BACKBONES, MLP
from coterie.models.cost import Cost
from coterie.models.families.grouped import cost_of_groups
from coterie.models.metrics import delta_m
from coterie.models.stacked import largest_stack
from coterie.models.tasks import Grouping, TaskSet
from coterie.search.affinity import all_subsets
from coterie.search.baselines import default_candidate
from coterie.search.front import feasible
from coterie.search.objective import TaskValues, Yardstick
from coterie.search.plan import Plan
from coterie.search.recipe import recipe_of
from coterie.search.sampler import derive_seed
from coterie.search.space import size_choices, sizes_of, whole_values
from coterie.search.store import AffinityResult, Candidate, SubsetResult, Trial
from coterie.search.subsets import stackable
from coterie.search.surrogate import GroupBelief, Observation, SubsetSurrogate
from coterie.search.work import AffinityRun, SideRun, Subset, SubsetRun

# Shapes: N trials, F features, S seeds, T tasks.

SIDE_SHARE = 0.25  # of what the job's trials cost: what side runs may cost at the most, by what follows
NOMINAL_TRIALS = 40  # of a job that does not say how many
STACKED_NETWORKS = 16  # of width 24 in a stack of 63 take about as long as one trial
MOST_SUBSETS = 127  # of the first run: all subsets of up to 7 tasks
MOST_REPLICATES = 31  # of a later run
REPLICATE_EVERY = 6  # trials
AFFINITY_SEEDS = (0, 1, 2)  # the same for all jobs, so that they share what was measured
AFFINITY_SHARE = 0.25  # of a trial's epochs: enough, see `methods.md`
AFFINITY_TRIALS = 3  # take about as long as the three runs: each step is measured, too

SECOND_DRAWS = 3  # for a second partition of as many groups: where none differs, the first is the one to try

GROUPED_FAMILIES = ("single", "shared", "grouped")  # whose networks' groups are known


def finds_groupings(plan: Plan) -> bool:
    """Whether there are partitions among which a job may choose, each group a network of its own."""
    space = plan.space
    if "grouped" not in space.families or "grouped" in space.groupings or len(plan.tasks) < 3:
        return False
    return 0 in whole_values(space.table["grouped", space.backbones[0]]["split"].domain)


class GroupKnowledge:
    """What is known of the job's groupings, and what to measure next.

    Args:
        plan: A job of which `finds_groupings` holds.
        yardstick: What gains are measured against.

    Attributes:
        backbone: On which groupings are proposed: the job's first.
        sizes: Number of groups -> the sizes of the backbone at which they keep the job's bounds.
    """

    def __init__(self, plan: Plan, yardstick: Yardstick) -> None:
        self._plan = plan
        self._yardstick = yardstick
        self._seed = plan.spec.seed
        self._tasks = plan.tasks
        self.backbone = plan.space.backbones[0]
        self._candidate = default_candidate(plan, "shared")
        self._stacks = stackable(self.backbone, plan.tasks)
        self.sizes = self._fitting_sizes()
        self._results: dict[tuple[Subset, int], SubsetResult] = {}
        self._affinities: dict[int, AffinityResult] = {}
        self._trials: dict[int, Trial] = {}
        self._belief: GroupBelief | None = None
        self._telling: tuple[Subset, ...] | None = None
        self._bests: dict[int, Grouping] = {}

    def draw(self, seed: int) -> list[Grouping]:
        """Draw partitions that may be the best, for each number of groups that keeps the job's bounds."""
        rng = np.random.default_rng(seed)
        belief = self._believed()
        found = [belief.top_two(rng, number, SECOND_DRAWS) for number in sorted(self.sizes)]
        return [grouping for both in found for grouping in both if grouping is not None]

    def worth(self, candidate: Candidate, number: int) -> float:
        """What the tasks are expected to gain, as a mean, in a candidate's groups, or in the best so many."""
        if candidate.family in GROUPED_FAMILIES:
            return self.expected(grouping_of(candidate, self._tasks))
        return self.expected(self.best(number))

    def best(self, number: int) -> Grouping:
        """Give the partition into so many groups that is believed to be the best."""
        if number not in self._bests:
            self._bests[number] = self._believed().best(number)
        return self._bests[number]

    def expected(self, grouping: Grouping) -> float:
        """What the tasks are expected to gain in a partition, as a mean."""
        return sum(self._believed().value_table(grouping.groups).values())

    def sizes_at(self, groups: int, share: float, default: Mapping[str, Any]) -> dict[str, Any]:
        """Give sizes of a backbone for so many groups, that far from the default ones to the largest."""
        rising = sorted(self.sizes[groups], key=lambda sizes: self._cost(groups, sizes).macs)
        first = rising.index(dict(default)) if default in rising else 0
        return rising[round(first + share * (len(rising) - 1 - first))]

    def wanted(self, number: int) -> SideRun | None:
        """What to measure before the trial of this number after the baselines."""
        if not self._stacks:
            return self._wanted_affinity()
        run = self._wanted_subsets(number)
        # Subsets say more than affinities, which are for the picture of who helps whom: they can wait.
        return self._wanted_affinity() if run is None and number >= REPLICATE_EVERY else run

    def learn(self, results: Sequence[SubsetResult]) -> None:
        """Learn what networks for subsets reached: those of the last run that was wanted, or stored ones."""
        self._forget()
        for result in results:
            if not set(result.tasks) <= set(self._tasks.names):
                continue
            members = [self._tasks.names.index(name) for name in result.tasks]
            weights = tuple(self._tasks[t].weight for t in members)
            if len(members) == 1 or result.weights == weights:  # the weight of the only one changes nothing
                self._results[tuple(sorted(members)), result.seed] = result

    def learn_affinity(self, result: AffinityResult) -> None:
        """Learn from an affinity of the job's tasks; those of others are left out."""
        if not self._stacks:
            self._forget()
        if result.tasks == self._tasks.names and result.weights == tuple(t.weight for t in self._tasks):
            self._affinities[result.seed] = result

    def tell(self, trial: Trial) -> None:
        """Learn from a completed trial, where nothing is measured in stacks."""
        parameters = trial.candidate.parameters
        if self._stacks or trial.candidate.family not in GROUPED_FAMILIES:
            return
        if trial.candidate.backbone == self.backbone and parameters.get("split", 0) == 0:
            self._forget()
            self._trials[trial.number] = trial

    def _forget(self) -> None:
        self._belief = None
        self._telling = None
        self._bests.clear()

    def _believed(self) -> GroupBelief:
        if self._belief is None:
            observations = [*self._subset_observations(), *self._trial_observations()]
            prior_TT = None if self._stacks else self._mean_affinity()
            surrogate = SubsetSurrogate(len(self._tasks), observations, prior_TT=prior_TT)
            self._belief = GroupBelief(surrogate)
        return self._belief

    @cached_property
    def _trials_planned(self) -> int:
        return self._plan.spec.budget.trials or NOMINAL_TRIALS

    def _wanted_subsets(self, number: int) -> SubsetRun | None:
        """First networks for subsets that nobody has trained, then now and then for those that tell most."""
        if not self.sizes or not self._first_subsets:
            return None
        before = {subset for (subset, _), result in self._results.items() if result.run is None}
        own = [result.run for result in self._results.values() if result.run is not None]
        run = max(own, default=-1) + 1
        missing = [subset for subset in self._first_subsets if subset not in before]
        if missing and not own:
            return self._subset_run(run, missing)
        replicated = run - bool(missing)
        room = min(MOST_REPLICATES, self._most_networks - len(own))
        if replicated >= number // REPLICATE_EVERY or room <= 0:
            return None
        if self._telling is None:
            rng = np.random.default_rng(derive_seed(self._seed, "replicates", run))
            self._telling = self._believed().next_subsets(rng, sorted(self.sizes), room)
        return self._subset_run(run, self._telling) if self._telling else None

    @property
    def _most_networks(self) -> int:
        """How many networks for subsets the job may train."""
        return int(SIDE_SHARE * self._trials_planned * STACKED_NETWORKS)

    @cached_property
    def _first_subsets(self) -> list[Subset]:
        """All subsets where they are few, else single tasks, then pairs, then some larger ones."""
        tasks = len(self._tasks)
        backbone = MLP(input_shape=self._plan.input_shape, **sizes_of(self._candidate))
        most = min(self._most_networks, MOST_SUBSETS, largest_stack(backbone, self._tasks))
        if 2**tasks - 1 <= most:
            return list(all_subsets(tasks))
        rng = Random(derive_seed(self._seed, "first subsets"))
        pairs = list(combinations(range(tasks), 2))
        rng.shuffle(pairs)
        found = dict.fromkeys([*((task,) for task in range(tasks)), *pairs])
        if most < len(found):
            return list(found)[:most] if most > tasks else []
        while len(found) < most:
            size = rng.randrange(3, tasks + 1)
            found[tuple(sorted(rng.sample(range(tasks), size)))] = None
        return list(found)

    def _subset_run(self, run: int, subsets: Sequence[Subset]) -> SubsetRun:
        """With a seed that no network was trained with."""
        known = {seed for (_, seed) in self._results}
        seeds = (derive_seed(self._seed, "subsets", run, attempt) for attempt in range(len(known) + 1))
        seed = next(seed for seed in seeds if seed not in known)
        return SubsetRun(
            run=run,
            candidate=self._candidate,
            subsets=tuple(subsets),
            seeds=(seed,),
            epochs=self._plan.spec.budget.epochs,
        )

    def _wanted_affinity(self) -> AffinityRun | None:
        missing = [seed for seed in AFFINITY_SEEDS if seed not in self._affinities]
        if not missing or not self.sizes or SIDE_SHARE * self._trials_planned < AFFINITY_TRIALS:
            return None
        epochs = max(1, round(AFFINITY_SHARE * self._plan.spec.budget.epochs))
        return AffinityRun(candidate=self._candidate, seed=missing[0], epochs=epochs)

    def _subset_observations(self) -> list[Observation]:
        return [
            Observation(subset, self._gains(subset, result.validation), seed)
            for (subset, seed), result in sorted(self._results.items(), key=lambda item: item[0])
        ]

    def _trial_observations(self) -> list[Observation]:
        """What the groups of trials gained, less what their sizes and recipe made of it."""
        trials = [self._trials[number] for number in sorted(self._trials)]
        if not trials:
            return []
        everything = tuple(range(len(self._tasks)))
        gains_NT = np.array([self._gains(everything, _validation(trial)) for trial in trials])
        effects_N = recipe_effects([trial.candidate for trial in trials], gains_NT.mean(axis=1))
        return [
            Observation(group, [float(gains_T[t] - effect) for t in group], trial.number)
            for trial, gains_T, effect in zip(trials, gains_NT, effects_N, strict=True)
            for group in grouping_of(trial.candidate, self._tasks).groups
        ]

    def _gains(self, subset: Subset, values: TaskValues) -> list[float]:
        """What each task of a subset gains over the yardstick, as a share of it."""
        gains = []
        for task in (self._tasks[t] for t in subset):
            reached = {task.name: values[task.name][task.metric]}
            reference = {task.name: self._yardstick.validation[task.name][task.metric]}
            gains.append(delta_m(reached, reference, TaskSet([task])) / 100)
        return gains

    def _mean_affinity(self) -> NDArray[np.float64] | None:
        """Over seeds, [T, T]; what was not measured is as the mean of the rest."""
        found_STT = np.array(
            [self._affinities[seed].matrix for seed in sorted(self._affinities)], dtype=np.float64
        )
        known_STT = np.isfinite(found_STT)
        if not known_STT.any():
            return None
        mean = found_STT[known_STT].mean()
        sums_TT = np.where(known_STT, found_STT, 0).sum(axis=0)
        counts_TT = known_STT.sum(axis=0)
        return np.asarray(np.where(counts_TT > 0, sums_TT / np.maximum(counts_TT, 1), mean))

    def _fitting_sizes(self) -> dict[int, list[dict[str, Any]]]:
        table = self._plan.space.table["grouped", self.backbone]
        numbers = whole_values(table["groups"].domain)
        if "single" in self._plan.space.families and len(numbers) > 1:
            numbers = [number for number in numbers if number < len(self._tasks)]  # as many are that family
        every = list(size_choices(self.backbone, table))
        found = {
            number: [sizes for sizes in every if self._keeps_bounds(number, sizes)] for number in numbers
        }
        return {number: sizes for number, sizes in found.items() if sizes}

    def _keeps_bounds(self, groups: int, sizes: Mapping[str, Any]) -> bool:
        bounds = [bound for bound in self._plan.spec.constraints if bound.metric in ("macs", "params")]
        if not bounds:
            return True
        cost = self._cost(groups, sizes)
        return feasible({"macs": cost.macs, "params": cost.params}, bounds)

    def _cost(self, groups: int, sizes: Mapping[str, Any]) -> Cost:
        backbone = BACKBONES[self.backbone](input_shape=self._plan.input_shape, **sizes)
        return cost_of_groups(backbone, self._tasks, 0, groups)


def recipe_effects(candidates: Sequence[Candidate], gains_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the sizes and the recipe of each candidate add to its gain, by ridge regression, centred."""
    rows = []
    for candidate in candidates:
        recipe, sizes = recipe_of(candidate), sizes_of(candidate)
        lr = float(np.log(float(recipe["lr"])))
        numbers = [float(np.log(float(value))) for value in (*sizes.values(), recipe["batch_size"])]
        rows.append([lr, lr**2, *numbers])
    features_NF = np.array(rows)
    features_NF = features_NF - features_NF.mean(axis=0)
    features_NF = features_NF / np.maximum(features_NF.std(axis=0), 1e-9)
    penalty_FF = np.eye(features_NF.shape[1])
    slopes_F = np.linalg.solve(
        features_NF.T @ features_NF + penalty_FF, features_NF.T @ (gains_N - gains_N.mean())
    )
    return np.asarray(features_NF @ slopes_F)


def grouping_of(candidate: Candidate, tasks: TaskSet) -> Grouping:
    """Give the groups of a candidate of one of the `GROUPED_FAMILIES`."""
    if candidate.family == "single":
        return Grouping.apart(len(tasks))
    if candidate.family == "shared":
        return Grouping.together(len(tasks))
    return Grouping.from_names(candidate.parameters["grouping"], tasks)


def _validation(trial: Trial) -> TaskValues:
    assert trial.ending is not None
    return {name: found["validation"] for name, found in trial.ending.tasks.items()}
