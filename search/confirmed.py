"""What confirming runs gave for each point of a front, without what it takes to plan or to train them.

A server reads this with every front that was confirmed: nothing here may import torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev, variance

from coterie.search.recipe import recipe_of
from coterie.search.store import Candidate, Confirmation, Role, TrialState, Values

COMPARED = "delta_m"  # every job has it, whatever its objectives
FALSE_ALARMS = 0.05  # share of jobs in which any of all intervals may miss 0 where nothing differs


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A metric over fresh seeds.

    Attributes:
        mean: Over the seeds.
        std: Standard deviation over the seeds; None where there is only one.
        n: How many seeds have it.
    """

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A point beside a `shared` network of about the same macs.

    Attributes:
        metric: What is compared, on the validation split.
        gain: Mean of the point less that of the shared network.
        low: Lower end of the gain's confidence interval.
        high: Its upper end.
        within_noise: Whether the interval holds 0.
        shared_macs: Of the shared network.
    """

    metric: str
    gain: float
    low: float
    high: float
    within_noise: bool
    shared_macs: float


@dataclass(frozen=True, kw_only=True)
class PointSummary:
    """What fresh seeds gave for a point of the front.

    Attributes:
        seeds: Trainings that completed.
        failed: Those that did not; they count nowhere else.
        validation: Metric -> its spread on the validation split.
        test: The same on the test split.
        over_shared: None where nothing was trained beside it, or too little completed.
    """

    seeds: int
    failed: int
    validation: Mapping[str, Spread]
    test: Mapping[str, Spread]
    over_shared: Comparison | None


def summarise(confirmations: Sequence[Confirmation]) -> dict[str, PointSummary]:
    """Say what confirming runs gave, by the point's trial id.

    The intervals are Welch's, at 95 % for all points together (Bonferroni). A point without a rival of its
    own is compared with the nearest `shared` network of its recipe that was trained for another one.
    """
    runs = Runs.read(confirmations)
    pairs = {
        trial_id: (point, rival)
        for trial_id, point in runs.points.items()
        if (rival := runs.rival(trial_id)) is not None and min(len(point.gains), len(rival.gains)) > 1
    }
    return {
        trial_id: PointSummary(
            seeds=len(point.validation),
            failed=point.failed,
            validation=_spreads(point.validation),
            test=_spreads(point.test),
            over_shared=_compare(*pairs[trial_id], len(pairs)) if trial_id in pairs else None,
        )
        for trial_id, point in runs.points.items()
    }


@dataclass
class Trained:
    """The trainings of one candidate, in the order of their seeds."""

    candidate: Candidate
    validation: list[Values] = field(default_factory=list)
    test: list[Values] = field(default_factory=list)
    failed: int = 0

    @property
    def gains(self) -> list[float]:
        """What is compared, of each training that completed."""
        return _numbers(self.validation, COMPARED)

    @property
    def macs(self) -> float:
        """Mean over the trainings, since gates may come to others; NaN where none completed."""
        found = _numbers(self.validation, "macs")
        return fmean(found) if found else math.nan


@dataclass
class Runs:
    """Confirming runs by what they trained.

    Attributes:
        points: Trial id -> the point's trainings.
        rivals: Trial id -> those of the `shared` network beside it, where it has one of its own.
    """

    points: dict[str, Trained]
    rivals: dict[str, Trained]

    @classmethod
    def read(cls, confirmations: Sequence[Confirmation]) -> "Runs":
        """Sort what was recorded by what was trained."""
        runs = cls({}, {})
        for found in sorted(confirmations, key=lambda found: found.seed):
            place = runs.points if found.role is Role.POINT else runs.rivals
            trained = place.setdefault(found.trial_id, Trained(found.candidate))
            if found.ending.state is TrialState.COMPLETED:
                trained.validation.append(found.ending.values)
                trained.test.append(found.ending.test)
            else:
                trained.failed += 1
        return runs

    @property
    def shared(self) -> list[Trained]:
        """All `shared` networks that were trained, for whatever point."""
        every = (*self.points.values(), *self.rivals.values())
        return [trained for trained in every if trained.candidate.family == "shared" and trained.gains]

    def rival(self, trial_id: str) -> Trained | None:
        """What a point is compared with."""
        point = self.points[trial_id]
        if point.candidate.family == "shared" or trial_id in self.rivals or not point.validation:
            return self.rivals.get(trial_id)
        alike = [
            other
            for other in self.shared
            if other.candidate.backbone == point.candidate.backbone
            and recipe_of(other.candidate) == recipe_of(point.candidate)
        ]
        return min(alike, key=lambda other: unlike(other.macs, point.macs), default=None)


def unlike(macs: float, wanted: float) -> tuple[float, float]:
    """How far macs are from those wanted, as a ratio; of two that are equally far the larger comes first."""
    return abs(math.log(macs / wanted)), -macs


def _numbers(values: Sequence[Values], metric: str) -> list[float]:
    return [number for found in values if (number := found.get(metric)) is not None]


def _spreads(values: Sequence[Values]) -> dict[str, Spread]:
    metrics = dict.fromkeys(metric for found in values for metric in found)
    numbers = {metric: _numbers(values, metric) for metric in metrics}
    return {
        metric: Spread(mean=fmean(found), std=stdev(found) if len(found) > 1 else None, n=len(found))
        for metric, found in numbers.items()
        if found
    }


def _compare(point: Trained, rival: Trained, comparisons: int) -> Comparison:
    """Compare two candidates by Welch's interval, one of several that shall all hold at once."""
    from scipy.special import stdtrit  # 17 MB, which a server without such fronts need not have

    parts = [variance(one.gains) / len(one.gains) for one in (point, rival)]
    freedoms = [len(one.gains) - 1 for one in (point, rival)]
    gain, noise = fmean(point.gains) - fmean(rival.gains), sum(parts)
    margin = 0.0
    if noise > 0:
        freedom = 1 / sum((part / noise) ** 2 / free for part, free in zip(parts, freedoms, strict=True))
        margin = float(stdtrit(freedom, 1 - FALSE_ALARMS / 2 / comparisons)) * math.sqrt(noise)
    low, high = gain - margin, gain + margin
    return Comparison(
        metric=COMPARED,
        gain=gain,
        low=low,
        high=high,
        within_noise=low <= 0 <= high,
        shared_macs=rival.macs,
    )
