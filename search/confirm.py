"""What holds up when it is trained again: points of the front beside `shared` networks, and the verdict.

Everything follows from the plan and from what is recorded. What is compared, and every verdict, rests on the
validation split; the test split is reported.
"""

import heapq
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, variance
from typing import Any

import moocore
import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from coterie.models.backbones import BACKBONES
from coterie.models.tasks import Direction
from coterie.search.baselines import yardstick_candidate
from coterie.search.confirmed import FALSE_ALARMS, Comparison, PointSummary, Runs, Trained, summarise, unlike
from coterie.search.front import feasible
from coterie.search.objective import YARDSTICK_SEEDS
from coterie.search.plan import SIZES, Plan, measure_size
from coterie.search.recipe import recipe_of
from coterie.search.seeds import derive_seed
from coterie.search.space import GIVEN_GROUPING, sizes_of
from coterie.search.store import (
    Candidate,
    Confirmation,
    Role,
    Trial,
    Verdict,
    VerdictKind,
)

# Percent points; seeds alone move delta_m by 4 on `digits`, and nobody deploys another network for less.
LEAST_GAIN = 1.0
SAME_SIZE = 1.05  # so many times the macs still count as no more
FAR_SIZE = 1.5  # so many times the macs no longer count as about the same


@dataclass(frozen=True, kw_only=True)
class Rerun:
    """A confirming run to start.

    Attributes:
        trial_id: The point that it is for.
        role: What it trains for it.
        candidate: What it trains.
        seed: Of the training.
    """

    trial_id: str
    role: Role
    candidate: Candidate
    seed: int

    @property
    def id(self) -> str:
        """Names it among all that its job runs."""
        return f"confirm-{self.trial_id}-{self.role}-{self.seed}"


def choose_points(
    trials: Sequence[Trial],
    front: Mapping[str, Mapping[str, float]],
    objectives: Sequence[tuple[str, Direction]],
    most: int,
) -> list[Trial]:
    """Choose the points of the front that a user may deploy, the most important ones first.

    The best one by the first objective comes first. Then come those that add most hypervolume to what is
    chosen, above the worst values on the front itself: so bends of the front come before its far ends. Of
    networks that would be trained again alike, only the first is chosen.

    Args:
        trials: The job's.
        front: Trial id -> value of each objective, for the trials on the front.
        objectives: Metric and direction, in the job's order.
        most: How many to choose.
    """
    points = sorted((trial for trial in trials if trial.id in front), key=lambda trial: trial.number)
    if not points or most < 1:
        return []
    signs = [-1.0 if direction is Direction.MAXIMIZE else 1.0 for _, direction in objectives]
    losses_PM = np.array([[front[point.id][metric] for metric, _ in objectives] for point in points]) * signs
    first = min(range(len(points)), key=lambda index: (*losses_PM[index], index))
    chosen: list[Trial] = []
    again: set[str] = set()
    for index in itertools.chain([first], _by_added_volume(losses_PM, first)):
        network = _name(retrained(points[index]))
        if network not in again:
            again.add(network)
            chosen.append(points[index])
        if len(chosen) == most:
            break
    return chosen


def retrained(point: Trial) -> Candidate:
    """What is trained again for a point: the network that a user deploys, as far as that can be fixed.

    Groups that a training has found are given to it (another seed may find others): what is confirmed is the
    grouping, and not the method that found it. Gates learn again.
    """
    candidate = point.candidate
    grouping = None if point.ending is None else point.ending.grouping
    if grouping is None:
        return candidate
    parameters = dict(candidate.parameters)
    if candidate.family == "dmtg+interrogate":
        for name in GIVEN_GROUPING[candidate.family]:
            parameters.pop(name, None)
        return _like(candidate, candidate.family, {**parameters, "grouping": grouping})
    plain = {**sizes_of(candidate), **recipe_of(candidate)}
    split = parameters.get("split", 0)
    if len(grouping) == 1:
        return _like(candidate, "shared", plain)
    if split == 0 and all(len(group) == 1 for group in grouping):
        return _like(candidate, "single", plain)
    return _like(candidate, "grouped", {**plain, "split": split, "grouping": grouping})


def plan_confirmation(plan: Plan, points: Sequence[Trial]) -> list[Rerun]:
    """List the runs that confirm points, the first point's first; each seed trains a point and its rival.

    The rival is the `shared` network whose macs are nearest to the point's, among all sizes of its backbone:
    a fair comparison needs it even where the job's space has it not. It has the point's recipe. A point that
    is `shared` itself has none, nor has any where there is one task. What several need is trained once.
    """
    candidates = {point.id: retrained(point) for point in points}
    trained = {_name(candidate) for candidate in candidates.values()}
    used = {point.seed for point in points}
    fresh = (derive_seed(plan.spec.seed, "confirm", number) for number in itertools.count())
    seeds = list(itertools.islice((seed for seed in fresh if seed not in used), plan.spec.confirm.seeds))
    sizes = {name: _shared_sizes(plan, name) for name in {one.backbone for one in candidates.values()}}
    runs: list[Rerun] = []
    for point in points:
        wanted = [(Role.POINT, candidates[point.id])]
        if candidates[point.id].family != "shared" and len(plan.tasks) > 1:
            rival = _nearest_shared(sizes, point, candidates[point.id])
            if _name(rival) not in trained:
                trained.add(_name(rival))
                wanted.append((Role.SHARED, rival))
        runs += [
            Rerun(trial_id=point.id, role=role, candidate=candidate, seed=seed)
            for seed in seeds
            for role, candidate in wanted
        ]
    return runs


def make_verdict(plan: Plan, points: Sequence[Trial], confirmations: Sequence[Confirmation]) -> Verdict:
    """Say what the confirmed points tell about the tasks: together, apart, in groups, or not to be known.

    Each point is judged against a `shared` network of its size, and all of them against the job's yardstick,
    single-task networks of the default size and recipe. Both questions are answered wrongly at most once in
    twenty jobs whose tasks don't care, and differences below one percent point are none.
    """
    if len(plan.tasks) == 1:
        return Verdict(kind=VerdictKind.UNKNOWN, words="The job has one task, so there is nothing to share.")
    runs, summaries = Runs.read(confirmations), summarise(confirmations)
    known = [point for point in points if point.id in summaries and len(runs.points[point.id].gains) > 1]
    if not known:
        return Verdict(
            kind=VerdictKind.UNKNOWN,
            words=f"Too few confirming runs completed to say: {sum(s.seeds for s in summaries.values())} for "
            f"{_count(len(points), 'point')}, and each needs two.",
        )
    known.sort(key=lambda point: -fmean(runs.points[point.id].gains))  # stable: equal ones as chosen
    evidence = _Evidence(plan, known, runs, summaries)
    return (
        evidence.apart_by_yardstick()
        or evidence.better_than_shared()
        or evidence.together()
        or evidence.no_difference()
    )


class _Evidence:
    """What a verdict is made of.

    Args:
        plan: The job's.
        known: Points with two completed trainings at least, the best by delta_m first.
        runs: All confirming runs.
        summaries: What they come to.
    """

    def __init__(
        self, plan: Plan, known: Sequence[Trial], runs: Runs, summaries: Mapping[str, PointSummary]
    ) -> None:
        self._known = known
        self._runs = runs
        self._summaries = summaries
        self._plan = plan
        trained = [runs.points[point.id] for point in known] + list(runs.rivals.values())
        self._trained = [one for one in trained if len(one.gains) > 1]
        self._shared = [one for one in self._trained if one.candidate.family == "shared"]

    def apart_by_yardstick(self) -> Verdict | None:
        """Whether even the best of all confirmed networks stays behind single-task ones."""
        best = max(self._trained, key=lambda one: fmean(one.gains))
        gain, margin = fmean(best.gains), self._yardstick_margin(best)
        if gain > -LEAST_GAIN or gain + margin >= 0 or not self._may_be_apart:
            return None
        return Verdict(
            kind=VerdictKind.APART,
            words="Train the tasks apart: the best confirmed network has a delta_m of "
            f"{gain:.1f} ± {margin:.1f} %, worse than single-task networks of the default size and recipe, "
            f"at {self._over_yardstick(best)} times their macs ({self._basis(best)}).",
        )

    def better_than_shared(self) -> Verdict | None:
        """The best point that beats one network for all tasks of its size."""
        for point in self._known:
            found = self._summaries[point.id].over_shared
            if found is not None and found.low > 0 and found.gain >= LEAST_GAIN:
                return self._not_shared(point, found)
        return None

    def together(self) -> Verdict | None:
        """Whether one network for all tasks beats the best point, or single-task ones that cost as much."""
        best = self._known[0]
        found, rival = self._summaries[best.id].over_shared, self._runs.rival(best.id)
        if found is not None and found.high < 0 and found.gain <= -LEAST_GAIN:
            trained = self._runs.points[best.id]
            return Verdict(
                kind=VerdictKind.TOGETHER,
                words=f"Train all tasks together: one shared network gains {_interval(found, -1)} percent "
                f"points of delta_m over the best point ({trained.candidate.family}), at "
                f"{found.shared_macs / trained.macs:.2f} times its macs ({self._basis(trained)})."
                f"{self._if_unequal(found.shared_macs, trained)}",
                trial_id=self._trial_of(rival),
            )
        for one in sorted(self._shared, key=lambda one: -fmean(one.gains)):
            gain, margin = fmean(one.gains), self._yardstick_margin(one)
            beats = gain - margin > 0 and gain >= LEAST_GAIN
            if beats and one.macs <= SAME_SIZE * self._yardstick_macs:
                return Verdict(
                    kind=VerdictKind.TOGETHER,
                    words=f"Train all tasks together: one shared network has a delta_m of {gain:.1f} ± "
                    f"{margin:.1f} %, better than single-task networks of the default size and recipe, at "
                    f"{self._over_yardstick(one)} times their macs, and nothing that was confirmed beats a "
                    f"shared network of its size beyond noise ({self._basis(one)}).",
                    trial_id=self._trial_of(one),
                )
        return None

    def no_difference(self) -> Verdict:
        """Nothing was seen: say how large what was not seen may be."""
        compared = [found for point in self._known if (found := self._summaries[point.id].over_shared)]
        best = self._runs.points[self._known[0].id]
        if not compared and not self._shared:
            return Verdict(
                kind=VerdictKind.UNKNOWN,
                words="Too few confirming runs completed to say: no shared network of the points' size was "
                "trained with two seeds.",
            )
        margins = [(found.high - found.low) / 2 for found in compared]
        hidden = max(LEAST_GAIN, self._yardstick_margin(best), *margins)
        beside = (
            "nor is sharing known to help or hurt beside single-task networks"
            if self._may_be_apart
            else "and single-task networks of the default size break the job's constraints"
        )
        return Verdict(
            kind=VerdictKind.NO_DIFFERENCE,
            words="No difference beyond noise: nothing that was confirmed is known to beat one shared "
            f"network of about its macs by {LEAST_GAIN:g} percent point of delta_m, {beside}. Differences "
            f"below {hidden:.1f} percent points may be hidden; more seeds would show smaller ones "
            f"({self._basis(best)}).",
        )

    def _not_shared(self, point: Trial, found: Comparison) -> Verdict:
        trained = self._runs.points[point.id]
        family, grouping = trained.candidate.family, trained.candidate.parameters.get("grouping")
        groups = None
        if grouping is not None and len(grouping) > 1:
            kind = VerdictKind.GROUPS
            what = f"Train the tasks in these groups: {_groups(grouping)}. They gain"
            groups = [list(group) for group in grouping]
        elif family == "single":
            kind = VerdictKind.APART
            what = "Train the tasks apart: single-task networks gain"
        elif trained.candidate.parameters.get("gamma") == 1.0:  # all channels are for all tasks
            kind = VerdictKind.TOGETHER
            what = f"Train all tasks together, by {family}: its network gains"
        else:
            kind = VerdictKind.PARTLY
            what = f"Let the tasks share a part of one network, by {family}: it gains"
        return Verdict(
            kind=kind,
            words=f"{what} {_interval(found)} percent points of delta_m over one shared network of "
            f"{found.shared_macs / trained.macs:.2f} times the macs ({self._basis(trained)}). Beside "
            f"single-task networks of the default size and recipe the delta_m is {fmean(trained.gains):.1f} "
            f"%, at {self._over_yardstick(trained)} times their macs."
            f"{self._if_unequal(found.shared_macs, trained)}",
            trial_id=point.id,
            grouping=groups,
        )

    def _trial_of(self, one: Trained | None) -> str | None:
        """The trial that was trained again; None of a network that was trained beside one."""
        return next((point.id for point in self._known if self._runs.points[point.id] is one), None)

    def _if_unequal(self, shared_macs: float, one: Trained) -> str:
        """A warning where the backbone has no `shared` network of about the same size."""
        if max(shared_macs / one.macs, one.macs / shared_macs) <= FAR_SIZE:
            return ""
        return " The backbone has no shared network nearer in size, so a part of this may be size alone."

    def _yardstick_margin(self, one: Trained) -> float:
        """Half the width of the interval of a candidate's delta_m, which is 0 where it is as the yardstick.

        The yardstick has seeds of its own, of which only the mean is in delta_m. They are taken to be as
        noisy as all that was confirmed is on average.
        """
        freedom = sum(len(other.gains) - 1 for other in self._trained)
        noise = sum((len(other.gains) - 1) * variance(other.gains) for other in self._trained) / freedom
        tail = FALSE_ALARMS / 2 / (len(self._shared) + 1)  # each shared one may win, the best one may lose
        spread = math.sqrt(noise * (1 / len(one.gains) + 1 / len(YARDSTICK_SEEDS)))
        return float(stdtrit(freedom, 1 - tail)) * spread

    @cached_property
    def _yardstick_size(self) -> dict[str, float]:
        yardstick = yardstick_candidate(self._plan)
        return measure_size(yardstick, self._plan.input_shape, self._plan.tasks)

    @property
    def _yardstick_macs(self) -> float:
        return self._yardstick_size["macs"]

    @property
    def _may_be_apart(self) -> bool:
        """Whether networks such as the yardstick's keep the job's limits on size: else they are no advice."""
        bounds = [bound for bound in self._plan.spec.constraints if bound.metric in SIZES]
        return not bounds or feasible({**self._yardstick_size}, bounds)

    def _over_yardstick(self, one: Trained) -> str:
        return f"{one.macs / self._yardstick_macs:.2f}"

    def _basis(self, one: Trained) -> str:
        """What figures rest on."""
        failed = sum(trained.failed for trained in (*self._runs.points.values(), *self._runs.rivals.values()))
        basis = f"validation split, {len(one.gains)} fresh seeds, 95 % over seeds"
        return f"{basis}; {_count(failed, 'confirming run')} did not complete" if failed else basis


def _like(candidate: Candidate, family: str, parameters: Mapping[str, Any]) -> Candidate:
    return Candidate(family=family, backbone=candidate.backbone, parameters=parameters)


def _name(candidate: Candidate) -> str:
    return json.dumps([candidate.family, candidate.backbone, candidate.parameters], sort_keys=True)


def _shared_sizes(plan: Plan, backbone: str) -> list[tuple[dict[str, Any], float]]:
    """Every size of a backbone that goes with the job's input, with the macs of its `shared` network."""
    choices = BACKBONES[backbone].choices
    found = []
    for values in itertools.product(*choices.values()):
        sizes = dict(zip(choices, values, strict=True))
        shared = Candidate(family="shared", backbone=backbone, parameters=sizes)
        try:
            found.append((sizes, measure_size(shared, plan.input_shape, plan.tasks)["macs"]))
        except ValueError:
            continue  # too large or too small for the input
    return found


def _nearest_shared(
    sizes: Mapping[str, Sequence[tuple[dict[str, Any], float]]], point: Trial, candidate: Candidate
) -> Candidate:
    """Give the `shared` network of a candidate's backbone and recipe whose macs are nearest to a point's."""
    assert point.ending is not None
    macs = point.ending.values["macs"]
    assert macs is not None  # a completed trial has them
    nearest, _ = min(sizes[candidate.backbone], key=lambda size: unlike(size[1], macs))
    return _like(candidate, "shared", {**nearest, **recipe_of(candidate)})


def _by_added_volume(losses_PM: NDArray[np.float64], first: int) -> Iterator[int]:
    """Row numbers of points of a front but the first, by what each adds to the volume of those before it.

    What a point adds only shrinks as others come, so what it would have added earlier bounds it.
    """
    worst_M = losses_PM.max(axis=0)
    best_M = losses_PM.min(axis=0)
    scaled_PM = (losses_PM - best_M) / np.where(worst_M > best_M, worst_M - best_M, 1.0)
    taken = [first]

    def volume(rows: Sequence[int]) -> float:
        return float(moocore.hypervolume(scaled_PM[list(rows)], ref=np.ones(len(worst_M))))

    reached = volume(taken)
    # Those that add nothing come last, the better by the first objective first.
    queue = [(-math.inf, tuple(scaled_PM[row]), row, 0) for row in range(len(scaled_PM)) if row != first]
    heapq.heapify(queue)
    while queue:
        _, place, row, counted_at = heapq.heappop(queue)
        if counted_at == len(taken):
            yield row
            taken.append(row)
            reached = volume(taken)
        else:
            added = max(0.0, volume([*taken, row]) - reached)
            heapq.heappush(queue, (-added, place, row, len(taken)))


def _interval(found: Comparison, sign: int = 1) -> str:
    return f"{sign * found.gain:.1f} ± {(found.high - found.low) / 2:.1f}"


def _groups(grouping: Sequence[Sequence[str]]) -> str:
    return ", ".join(f"{{{', '.join(group)}}}" for group in grouping)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
