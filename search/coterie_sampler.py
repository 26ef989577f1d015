"""The default sampler: baselines, then groupings that may be the best and what a model expects to gain most.

Optuna's TPE takes its turns between them, so nothing depends on the model alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from types import MappingProxyType
from typing import Any

import numpy as np

from coterie.models.backbones import BACKBONES
from coterie.models.cost import Cost
from coterie.models.families.grouped import cost_of_groups
from coterie.models.tasks import Direction, Grouping
from coterie.search.baselines import make_reference_point
from coterie.search.candidate_model import CandidateModel, volume_shares
from coterie.search.front import Front, feasible
from coterie.search.group_knowledge import GroupKnowledge, finds_groupings
from coterie.search.objective import Yardstick
from coterie.search.plan import GATED_FAMILIES, Plan
from coterie.search.recipe import recipe_of
from coterie.search.sampler import BASELINE, Proposal, baselines, derive_seed, optuna_sampler
from coterie.search.space import Choices, Dimension, Recall, Value, default_of, sizes_of
from coterie.search.store import AffinityResult, Candidate, SubsetResult, Trial, TrialState, Values
from coterie.search.work import SideRun

# Shapes: N trials, P candidates in question, M both, F features, D objectives.

GROUPING, MODEL, TPE = "grouping", "coterie", "tpe"  # origins
FIRST_FAMILIES = ("single", "shared")  # what all others are compared with
TURNS = (GROUPING, MODEL) * 3 + (TPE,)  # after the baselines, again and again
FIRST_SIZES = (
    0.0,
    1.0,
    0.5,
)  # of the first groupings, by their share of the way from the default to the largest
POOL = 64  # candidates among which the model chooses
MOVED = 0.25  # share of them that take what they can of one on the front to any family and backbone
STEP = 0.2  # standard deviation of a small change of a number, of its range's length
MOST_CHANGES = 3  # dimensions that a small difference is made of
KNOWN_SIZE = frozenset({"single", "shared", "grouped", "affinity"})  # families, before they train
WORTH = 0.2  # of the yardstick, by which good groupings and bad ones differ: about 1 as a feature

# What a training step costs beside its arithmetic, as on one core: so many macs for each trunk, and as much
# as so many trunks besides.
STEP_MACS = 5e5
STEP_TRUNKS = 4


class CoterieSampler:
    """Proposes the candidates of one job.

    Args:
        plan: The job.
        yardstick: What gains are measured against.
    """

    def __init__(self, plan: Plan, yardstick: Yardstick) -> None:
        self._plan = plan
        self._space = plan.space
        self._seed = plan.spec.seed
        self._tpe = optuna_sampler("tpe", plan)
        self._baselines = sorted(
            baselines(plan.space), key=lambda candidate: candidate.family not in FIRST_FAMILIES
        )
        self._reference_D = np.array(self._losses(_tightened(make_reference_point(plan, yardstick), plan)))
        self._groups = GroupKnowledge(plan, yardstick) if finds_groupings(plan) else None
        self._told: dict[int, Trial] = {}  # those that the model learns from
        self._front = Front(plan.objectives)

    def ask(self, number: int) -> Proposal | None:  # noqa: D102 - Sampler says it
        if number < len(self._baselines):
            proposal: Proposal | None = Proposal(self._baselines[number], {}, BASELINE)
        else:
            proposal = self._propose(number)
        if proposal is not None:
            self._tpe.note(number, proposal)
        return proposal

    def tell(self, trial: Trial) -> None:  # noqa: D102
        self._tpe.tell(trial)
        ending = trial.ending
        if ending is None or not np.isfinite(self._losses(ending.values)).all():
            return
        self._told[trial.number] = trial
        if self._may_be_on_front(trial):
            self._front.insert(str(trial.number), ending.values)
        if self._groups is not None and ending.state is TrialState.COMPLETED:
            self._groups.tell(trial)

    def wanted(self, number: int) -> SideRun | None:  # noqa: D102
        if self._groups is None or number < len(self._baselines):
            return None
        return self._groups.wanted(number - len(self._baselines))

    def learn(self, results: Sequence[SubsetResult]) -> None:  # noqa: D102
        if self._groups is not None:
            self._groups.learn(results)

    def learn_affinity(self, result: AffinityResult) -> None:  # noqa: D102
        if self._groups is not None:
            self._groups.learn_affinity(result)

    def believed(self, groups: int) -> Grouping | None:
        """Give the best partition into so many groups as far as is known; None where none is searched."""
        return None if self._groups is None else self._groups.best(groups)

    def _propose(self, number: int) -> Proposal | None:
        turn, place = divmod(number - len(self._baselines), len(TURNS))
        way = TURNS[place]
        rng = Random(derive_seed(self._seed, way, number))
        pool: list[Candidate] = []
        if way == GROUPING and self._groups is not None:
            earlier = turn * TURNS.count(GROUPING) + TURNS[:place].count(GROUPING)
            pool = self._groupings(earlier, rng, self._groups)
        elif way != TPE:
            parents = self._parents()
            pool = [self._near(rng, parents) for _ in range(POOL)]
        pool = [candidate for candidate in pool if not self._tpe.tried(candidate)]
        if not pool:
            return self._tpe.propose(number)
        return Proposal(self._most_gaining(pool, derive_seed(self._seed, "gains", number)), {}, way)

    def _groupings(self, earlier: int, rng: Random, groups: GroupKnowledge) -> list[Candidate]:
        """Partitions that may be the best: at first by default in some sizes, then as on the front."""
        partitions = groups.draw(rng.randrange(2**31))
        if not partitions:
            return []
        place = {"family": "grouped", "backbone": groups.backbone}
        parents = self._parents()
        default = self._space.walk(lambda name, dimension: place.get(name) or default_of(dimension))
        found = []
        for _ in range(POOL if earlier >= len(FIRST_SIZES) else 1):
            if earlier < len(FIRST_SIZES):
                start, grouping = default, max(partitions, key=groups.expected)
                sizes = groups.sizes_at(len(grouping), FIRST_SIZES[earlier], sizes_of(start))
            else:
                start, grouping = self._near(rng, parents, place), rng.choice(partitions)
                fitting = groups.sizes[len(grouping)]
                sizes = sizes_of(start) if sizes_of(start) in fitting else rng.choice(fitting)
            own = {"split": 0, "grouping": grouping.names(self._plan.tasks)}
            found.append(replace(start, parameters={**start.parameters, **sizes, **own}))
        return found

    def _parents(self) -> tuple[list[Candidate], list[float]]:
        """The candidates on the front and what each adds to the hypervolume; else the first baseline."""
        points = dict(sorted(self._front.points.items(), key=lambda item: int(item[0])))
        if not points:
            first = (
                self._baselines[0] if self._baselines else self._space.walk(lambda _, dim: default_of(dim))
            )
            return [first], [1.0]
        losses_ND = np.array([self._losses(point) for point in points.values()])
        shares_N = volume_shares(losses_ND, self._reference_D)
        return [self._told[int(name)].candidate for name in points], shares_N.tolist()

    def _near(
        self,
        rng: Random,
        parents: tuple[list[Candidate], list[float]],
        place: Mapping[str, Any] = MappingProxyType({}),
    ) -> Candidate:
        """A candidate that differs little from one on the front that adds much to the hypervolume.

        Args:
            rng: What is random here.
            parents: Candidates, and how likely each is taken.
            place: `family` and `backbone` that it has; else now and then others than the parent's.
        """
        if not place and rng.random() < MOVED:
            # What is grouped has its own turns.
            families = [f for f in self._space.families if f != "grouped" or self._groups is None]
            place = {
                "family": rng.choice(families or ["grouped"]),
                "backbone": rng.choice(self._space.backbones),
            }
        parent = replace(rng.choices(*parents)[0], **place)
        recall = self._space.recall(parent)
        open_names: list[str] = []

        def note(name: str, dimension: Dimension) -> Value:
            if name not in ("family", "backbone") and not _is_grouping(parent.family, name, dimension):
                open_names.append(name)
            return _known_value(recall, name, dimension)

        self._space.walk(note)
        changed = rng.sample(open_names, min(len(open_names), rng.randint(1, MOST_CHANGES)))

        def choose(name: str, dimension: Dimension) -> Value:
            value = _known_value(recall, name, dimension)
            return _near_value(dimension, value, rng) if name in changed else value

        return self._space.walk(choose)

    def _most_gaining(self, pool: Sequence[Candidate], seed: int) -> Candidate:
        """The one that is expected to add most to the hypervolume, for what it takes to train."""
        told = [self._told[number] for number in sorted(self._told)]
        if not told or len(pool) == 1:
            return pool[0]
        candidates = [*(trial.candidate for trial in told), *pool]
        described = [self._features(candidate) for candidate in candidates]
        names = sorted({name for found in described for name in found})
        features_MF = np.array([[found.get(name, 0.0) for name in names] for found in described])
        known_MD = np.array([self._losses(self._known_costs(candidate)) for candidate in candidates])
        model = CandidateModel(
            features_MF[: len(told)],
            np.array([self._losses(_values(trial)) for trial in told]),
            known_MD[: len(told)],
            np.array([self._may_be_on_front(trial) for trial in told]),
            self._reference_D,
        )
        gains_P = model.gains(features_MF[len(told) :], known_MD[len(told) :], np.random.default_rng(seed))
        efforts_P = np.array([self._effort(candidate) for candidate in pool])
        return pool[int((gains_P / np.sqrt(efforts_P)).argmax())]

    def _may_be_on_front(self, trial: Trial) -> bool:
        ended = trial.ending is not None and trial.ending.state is TrialState.COMPLETED
        return ended and feasible(_values(trial), self._plan.spec.constraints)

    def _losses(self, values: Mapping[str, float | None]) -> list[float]:
        """By objective, lower is better; NaN where there is no value."""
        signs = {Direction.MAXIMIZE: -1.0, Direction.MINIMIZE: 1.0}
        found = [(values.get(metric), signs[way]) for metric, way in self._plan.objectives]
        return [math.nan if value is None else sign * value for value, sign in found]

    def _features(self, candidate: Candidate) -> dict[str, float]:
        """What the model knows of a candidate: 0 for the middle of a dimension, and for one that it has not.

        And how many groups its tasks have, at the most, and what these are believed to be worth.
        """
        recall = self._space.recall(candidate)
        found: dict[str, float] = {}

        def note(name: str, dimension: Dimension) -> Value:
            value = _known_value(recall, name, dimension)
            if not _is_grouping(candidate.family, name, dimension):
                found.update(_feature(name, dimension, value))
            return value

        self._space.walk(note)
        groups = self._groups_of(candidate)
        if groups is not None:
            found["groups"] = groups / len(self._plan.tasks) - 0.5
            if self._groups is not None:
                found["worth"] = self._groups.worth(candidate, groups) / WORTH
        return found

    def _groups_of(self, candidate: Candidate) -> int | None:
        if candidate.family in ("single", "shared"):
            return len(self._plan.tasks) if candidate.family == "single" else 1
        grouping = candidate.parameters.get("grouping")
        return candidate.parameters.get("groups") if grouping is None else len(grouping)

    def _known_costs(self, candidate: Candidate) -> dict[str, float]:
        """The sizes of a candidate whose number of groups is known before it trains."""
        groups = self._groups_of(candidate)
        if groups is None or candidate.family not in KNOWN_SIZE:
            return {}
        cost = self._cost(candidate, candidate.parameters.get("split", 0), groups)
        return {"macs": cost.macs, "params": cost.params}

    def _effort(self, candidate: Candidate) -> float:
        """About what an epoch of a candidate takes for each sample, in macs: many small steps cost more."""
        gated = candidate.family in GATED_FAMILIES
        trunks = len(self._plan.tasks) + 1 if gated else self._groups_of(candidate) or 1
        steps = STEP_MACS * (STEP_TRUNKS + trunks) / float(recipe_of(candidate)["batch_size"])
        return self._cost(candidate, 0, trunks).macs + steps

    def _cost(self, candidate: Candidate, split: int, groups: int) -> Cost:
        backbone = BACKBONES[candidate.backbone](input_shape=self._plan.input_shape, **sizes_of(candidate))
        return cost_of_groups(backbone, self._plan.tasks, split, groups)


def _tightened(reference: Mapping[str, float], plan: Plan) -> dict[str, float]:
    """The worst values that count: where the job bounds an objective, no worse than that."""
    found = dict(reference)
    directions = dict(plan.objectives)
    for bound in plan.spec.constraints:
        if bound.metric in found:
            least, most = (
                (-math.inf if bound.min is None else bound.min),
                (math.inf if bound.max is None else bound.max),
            )
            if directions[bound.metric] is Direction.MAXIMIZE:
                found[bound.metric] = max(found[bound.metric], least)
            else:
                found[bound.metric] = min(found[bound.metric], most)
    return found


def _values(trial: Trial) -> Values:
    assert trial.ending is not None
    return trial.ending.values


def _is_grouping(family: str, name: str, dimension: Dimension) -> bool:
    """Whether a choice is part of a partition of the tasks."""
    return name.startswith(f"{family}.grouping.") or (family == "grouped" and dimension.name == "groups")


def _known_value(recall: Recall, name: str, dimension: Dimension) -> Value:
    """Give what a walk was answered; the default where that is not known or not left."""
    value, domain = recall(name, dimension), dimension.domain
    if value is None or (isinstance(domain, Choices) and value not in domain.values):
        return default_of(dimension)
    return value


def _near_value(dimension: Dimension, value: Value, rng: Random) -> Value:
    """Give another value of a dimension: a number that is near, or any other name."""
    domain = dimension.domain
    if not isinstance(domain, Choices):
        assert not isinstance(value, str)
        return domain.at(domain.share(value) + rng.gauss(0, STEP))
    others = [other for other in domain.values if other != value]
    if _has_names(domain):
        return rng.choice(others)
    ordered: list[Value] = sorted(domain.values)
    place, last = ordered.index(value), len(ordered) - 1
    moved = place + (round(rng.gauss(0, STEP * last)) or rng.choice((-1, 1)))
    return ordered[min(max(moved, 0), last)]


def _feature(name: str, dimension: Dimension, value: Value) -> dict[str, float]:
    """A number from -1/2 to 1/2; each name is a feature of its own."""
    domain = dimension.domain
    if not isinstance(domain, Choices):
        return {name: domain.share(float(value)) - 0.5}
    if _has_names(domain):
        return {f"{name}={value}": 1.0}
    ordered = sorted(domain.values)
    return {name: ordered.index(value) / (len(ordered) - 1) - 0.5}


def _has_names(domain: Choices) -> bool:
    return any(isinstance(value, bool | str) for value in domain.values)
