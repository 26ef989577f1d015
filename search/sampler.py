"""Optuna by ask and tell: proposes candidates, and goes on exactly where a killed driver stopped.

The study lives in memory and is rebuilt from the stored trials. Its random state is drawn afresh for each ask
from the job's seed and the trial's number, so a rebuilt sampler asks what the first one would have asked.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import TrialState as OptunaState
from optuna.trial import create_trial

from coterie.models.tasks import Direction
from coterie.search.space import Choices, Dimension, Space, Value, default_of
from coterie.search.spec import ConstraintSpec
from coterie.search.store import Candidate, Trial, TrialState

SAMPLERS: Mapping[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: TPESampler(seed=seed),
    "nsga2": lambda seed: NSGAIISampler(seed=seed),
    # A space with conditions is what its warning warns of: dimensions of one family only are drawn at random.
    "gp": lambda seed: GPSampler(seed=seed, warn_independent_sampling=False),
    "random": lambda seed: RandomSampler(seed=seed),
}

# Optuna keeps here what NSGA-II must know of a trial after a restart; stored with the trial's choices.
ATTRIBUTES = "optuna"


def derive_seed(seed: int, *what: object) -> int:
    """A seed in [0, 2^31) for one purpose, from the job's seed and what names the purpose."""
    text = "/".join(str(part) for part in (seed, *what))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


class OptunaSampler:
    """Proposes the candidates of one job.

    Args:
        name: Key in `SAMPLERS`.
        space: What may be proposed.
        objectives: Metric and direction, in the job's order.
        constraints: Bounds on metrics; candidates outside them count as infeasible.
        seed: The job's.
    """

    def __init__(
        self,
        name: str,
        space: Space,
        objectives: Sequence[tuple[str, Direction]],
        constraints: Sequence[ConstraintSpec],
        seed: int,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._make = SAMPLERS[name]
        self._space = space
        self._objectives = objectives
        self._constraints = constraints
        self._seed = seed
        self._study = optuna.create_study(
            directions=[direction.value for _, direction in objectives], sampler=self._make(0)
        )
        self._first = space.defaults()
        self._live: dict[int, optuna.Trial] = {}
        self._told_generation = 0

    def ask(self, number: int) -> tuple[Candidate, dict[str, Any]]:
        """The candidate of trial `number`, and the choices that `tell` needs of it later."""
        if number < len(self._first):
            choices = dict(self._first[number])
            return self._space.walk(_recall(choices, {}, {})), choices
        self._study.sampler = self._make(derive_seed(self._seed, "ask", number))
        self._recall_parents(self._study.sampler)
        trial = self._study.ask()
        self._live[number] = trial
        chosen: dict[str, Any] = {}

        def choose(name: str, dimension: Dimension) -> Value:
            chosen[name] = value = _suggest(trial, name, dimension)
            return value

        candidate = self._space.walk(choose)
        attributes = self._study.get_trials(deepcopy=False)[trial.number].system_attrs
        return candidate, chosen | {ATTRIBUTES: dict(attributes)}

    def tell(self, trial: Trial) -> None:
        """Learn how a trial of this attempt or an earlier one ended; a stopped one counts as pruned."""
        live = self._live.pop(trial.number, None)
        state, values = self._outcome(trial)
        constraints = self._violations(trial)
        if live is not None:
            for name, violation in constraints.items():
                live.set_constraint(name, violation)
            self._study.tell(live, values=values, state=state)
            return
        choices = dict(trial.choices)
        attributes = choices.pop(ATTRIBUTES, {})
        distributions: dict[str, BaseDistribution] = {}
        answers: dict[str, Value] = {}
        self._space.walk(_recall(choices, distributions, answers))
        told = create_trial(
            state=state,
            values=values,
            params=answers,
            distributions=distributions,
            system_attrs=attributes,
            constraints=constraints,
        )
        self._study.add_trial(told)
        sampler = self._study.sampler
        if isinstance(sampler, NSGAIISampler) and attributes:
            generation = sampler.get_trial_generation(self._study, told)
            self._told_generation = max(self._told_generation, generation)

    def _recall_parents(self, sampler: BaseSampler) -> None:
        """Let a rebuilt NSGA-II choose each generation's parents as it did when that generation began.

        Optuna keeps them in the study, and goes through them in another order while it chooses them.
        """
        if isinstance(sampler, NSGAIISampler):
            for generation in range(1, self._told_generation + 1):
                sampler.get_parent_population(self._study, generation)
            self._told_generation = 0

    def _outcome(self, trial: Trial) -> tuple[OptunaState, list[float] | None]:
        ending = trial.ending
        if ending is None or ending.state in (TrialState.FAILED, TrialState.CANCELLED):
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


def _recall(
    choices: Mapping[str, Any], distributions: dict[str, BaseDistribution], answers: dict[str, Value]
) -> Callable[[str, Dimension], Value]:
    """Answer from `choices`, noting each answer and the distribution that it was drawn from.

    A dimension that a newer version has added was at its default.
    """

    def choose(name: str, dimension: Dimension) -> Value:
        distributions[name] = _distribution(dimension)
        answers[name] = choices.get(name, default_of(dimension))
        return answers[name]

    return choose
