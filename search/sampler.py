"""What proposes candidates: the interface, and Optuna behind it by ask and tell.

A proposal is a function of the job's seed, the trial's number and what was told, so a sampler that is rebuilt
from the stored trials asks what the first one would have asked. For that, Optuna's study is put together anew
for each ask, its trials in the order of their numbers (0.1 s at 1,000 trials), and its random state is
drawn afresh.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from random import Random
from typing import Any, NamedTuple, Protocol

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState

from coterie.models.tasks import Direction
from coterie.search.objective import Yardstick
from coterie.search.plan import Plan
from coterie.search.seeds import derive_seed as derive_seed
from coterie.search.space import Choices, Dimension, Space, Value, default_of
from coterie.search.spec import ConstraintSpec
from coterie.search.store import AffinityResult, Candidate, SubsetResult, Trial, TrialState
from coterie.search.work import SideRun

BASELINE = "baseline"  # the origin of the families' default candidates

# NSGA-II learns only from one generation to the next, so a job should see some. The largest population is
# Optuna's own; in a smaller one than the least hardly any two parents differ.
GENERATIONS = 5
LEAST_POPULATION, GREATEST_POPULATION = 4, 50

SAMPLERS: Mapping[str, Callable[[int, int], BaseSampler]] = {
    "tpe": lambda seed, _: TPESampler(seed=seed),
    "nsga2": lambda seed, population: NSGAIISampler(seed=seed, population_size=population),
    # A space with conditions is what its warning warns of: dimensions of one family only are drawn at random.
    "gp": lambda seed, _: GPSampler(seed=seed, warn_independent_sampling=False),
    "random": lambda seed, _: RandomSampler(seed=seed),
}

# Optuna keeps here what NSGA-II must know of a trial after a restart; stored with the trial's choices.
ATTRIBUTES = "optuna"

# Draws of a candidate that was not tried yet, before a finite space is searched for one.
OWN_DRAWS = 10  # by the sampler itself
MOST_DRAWS = 200  # with those that are uniform
CHOSEN_AMONG = 1000  # of the untried candidates of a finite space: the first so many


class Proposal(NamedTuple):
    """A candidate to try.

    Attributes:
        candidate: What to train.
        choices: What `tell` needs of it later beside the candidate; JSON.
        origin: `baseline`, `grouping`, or the name of the sampler.
    """

    candidate: Candidate
    choices: dict[str, Any]
    origin: str


class Sampler(Protocol):
    """Proposes the candidates of one job, and what to learn beside them.

    What it answers depends on the plan, on what it was told and learned, and on the number: never on a clock.
    """

    def ask(self, number: int) -> Proposal | None:
        """Propose trial `number`; None where the space has nothing that was not tried."""

    def tell(self, trial: Trial) -> None:
        """Learn how a trial ended; of one that has not ended, that it was proposed."""

    def wanted(self, number: int) -> SideRun | None:
        """What to learn before trial `number` is asked for; None to go on."""

    def learn(self, results: Sequence[SubsetResult]) -> None:
        """Learn from subset networks: at the start those stored, then each run's."""

    def learn_affinity(self, result: AffinityResult) -> None:
        """Learn from an affinity: at the start those stored, then each run's."""


def key_of(candidate: Candidate) -> str:
    """The same text for equal candidates, and for no others."""
    return json.dumps([candidate.family, candidate.backbone, dict(candidate.parameters)], sort_keys=True)


class OptunaSampler:
    """Proposes the families' default candidates, then what one of Optuna's samplers draws.

    Args:
        name: Key in `SAMPLERS`.
        space: What may be proposed.
        objectives: Metric and direction, in the job's order.
        constraints: Bounds on metrics; candidates outside them count as infeasible.
        seed: The job's.
        trials: How many the job will have; None where it is not known.
        repeats: Whether a candidate may be proposed again.
    """

    def __init__(
        self,
        name: str,
        space: Space,
        objectives: Sequence[tuple[str, Direction]],
        constraints: Sequence[ConstraintSpec],
        seed: int,
        *,
        trials: int | None = None,
        repeats: bool = False,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._name = name
        self._space = space
        self._objectives = objectives
        self._constraints = constraints
        self._seed = seed
        self._population = population_for(trials)
        self._repeats = repeats
        self._baselines = baselines(space)
        self._known: dict[int, FrozenTrial] = {}
        self._tried: set[str] = set()

    def ask(self, number: int) -> Proposal | None:  # noqa: D102 - Sampler says it
        if number < len(self._baselines):
            proposal: Proposal | None = Proposal(self._baselines[number], {}, BASELINE)
        else:
            proposal = self.propose(number)
        if proposal is not None:
            self.note(number, proposal)
        return proposal

    def propose(self, number: int) -> Proposal | None:
        """Draw a candidate that was not tried yet; None where a search for one finds none.

        Where the sampler draws only what was tried, it is drawn uniformly; where that finds nothing either
        and the space is finite, it is chosen among what is left.
        """
        study = self._study()
        for attempt in range(MOST_DRAWS):
            name = self._name if attempt < OWN_DRAWS else "random"
            what = ("ask", number, attempt) if attempt else ("ask", number)
            study.sampler = SAMPLERS[name](derive_seed(self._seed, *what), self._population)
            proposal = self._draw(study)
            if not self.tried(proposal.candidate):
                return proposal
        if not self._space.finite:
            return None
        untried = (found for found in self._space.candidates() if not self.tried(found))
        left = list(islice(untried, CHOSEN_AMONG))
        if not left:
            return None
        return Proposal(Random(derive_seed(self._seed, "left", number)).choice(left), {}, self._name)

    def note(self, number: int, proposal: Proposal) -> None:
        """Know that a candidate was proposed."""
        self.tell(Trial(id="", number=number, candidate=proposal.candidate, choices=proposal.choices, seed=0))

    def tried(self, candidate: Candidate) -> bool:
        """Whether it was proposed and must not be again."""
        return not self._repeats and key_of(candidate) in self._tried

    def tell(self, trial: Trial) -> None:
        """Learn how a trial ended: a stopped one counts as pruned, one that has not ended as running."""
        distributions: dict[str, BaseDistribution] = {}
        answers: dict[str, Value] = {}
        recall = self._space.recall(trial.candidate)

        def choose(name: str, dimension: Dimension) -> Value:
            answer = recall(name, dimension)
            # A dimension that a newer version has added was at its default.
            answers[name] = default_of(dimension) if answer is None else answer
            distributions[name] = _distribution(dimension)
            return answers[name]

        self._tried.add(key_of(self._space.walk(choose)))
        state, values = self._outcome(trial)
        self._known[trial.number] = create_trial(
            state=state,
            values=values,
            params=answers,
            distributions=distributions,
            system_attrs=dict(trial.choices.get(ATTRIBUTES, {})),
            constraints=self._violations(trial),
        )

    def wanted(self, number: int) -> SideRun | None:
        """Nothing: it learns from trials alone."""
        return None

    def learn(self, results: Sequence[SubsetResult]) -> None:
        """Nothing."""

    def learn_affinity(self, result: AffinityResult) -> None:
        """Nothing."""

    def _study(self) -> optuna.Study:
        """All that is known, in the order of the trials' numbers."""
        study = optuna.create_study(directions=[direction.value for _, direction in self._objectives])
        study.add_trials([self._known[number] for number in sorted(self._known)])
        return study

    def _draw(self, study: optuna.Study) -> Proposal:
        trial = study.ask()
        candidate = self._space.walk(partial(_suggest, trial))
        choices = {}
        if isinstance(study.sampler, NSGAIISampler):
            choices[ATTRIBUTES] = dict(study.get_trials(deepcopy=False)[trial.number].system_attrs)
        study.tell(trial, state=OptunaState.FAIL)  # a draw, not a trial: it teaches nothing
        return Proposal(candidate, choices, self._name)

    def _outcome(self, trial: Trial) -> tuple[OptunaState, list[float] | None]:
        ending = trial.ending
        if ending is None:
            return OptunaState.RUNNING, None
        if ending.state in (TrialState.FAILED, TrialState.CANCELLED):
            return OptunaState.FAIL, None
        if ending.state is TrialState.STOPPED:
            return OptunaState.PRUNED, None
        values = [ending.values[metric] for metric, _ in self._objectives]
        return OptunaState.COMPLETE, [float(value) for value in values if value is not None]

    def _violations(self, trial: Trial) -> dict[str, float]:
        """How far the trial is outside each bound; at most 0 where it keeps it."""
        if trial.ending is None or trial.ending.state is not TrialState.COMPLETED:
            return {}
        violations = {}
        for constraint in self._constraints:
            value = trial.ending.values[constraint.metric]
            assert value is not None  # a completed trial has every metric
            if constraint.max is not None:
                violations[f"{constraint.metric} at most {constraint.max}"] = value - constraint.max
            if constraint.min is not None:
                violations[f"{constraint.metric} at least {constraint.min}"] = constraint.min - value
        return violations


def make_sampler(plan: Plan, yardstick: Yardstick) -> Sampler:
    """Make the job's sampler."""
    name = plan.spec.search.sampler.name
    if name == "coterie":
        from coterie.search.coterie_sampler import CoterieSampler  # it builds on this module

        return CoterieSampler(plan, yardstick)
    return optuna_sampler(name, plan)


def optuna_sampler(name: str, plan: Plan) -> OptunaSampler:
    """Make one of Optuna's for a job."""
    return OptunaSampler(
        name,
        plan.space,
        plan.objectives,
        plan.spec.constraints,
        plan.spec.seed,
        trials=plan.spec.budget.trials,
        repeats=plan.spec.search.repeats,
    )


def population_for(trials: int | None) -> int:
    """Give NSGA-II's population for a job of so many trials."""
    if trials is None:
        return GREATEST_POPULATION
    return max(LEAST_POPULATION, min(GREATEST_POPULATION, trials // GENERATIONS))


def baselines(space: Space) -> list[Candidate]:
    """Give the families' default candidates, on the first backbone, in the families' order."""
    return [space.walk(lambda name, _, choices=choices: choices[name]) for choices in space.defaults()]  # type: ignore[misc]


def _suggest(trial: optuna.Trial, name: str, dimension: Dimension) -> Value:
    distribution = _distribution(dimension)
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)  # type: ignore[return-value]
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(name, distribution.low, distribution.high, log=distribution.log)
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)


def _distribution(dimension: Dimension) -> BaseDistribution:
    domain = dimension.domain
    if isinstance(domain, Choices):
        return CategoricalDistribution(domain.values)
    if domain.integer:
        return IntDistribution(int(domain.low), int(domain.high), log=domain.log)
    return FloatDistribution(domain.low, domain.high, log=domain.log)
