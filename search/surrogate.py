"""What each task gains in each subset of the tasks: a belief learned from noisy measurements.

Finding the best groups is a noisy best-arm problem: on small data one seed's noise is as large as what there
is to find. So a Gaussian process for each task pools what subsets have in common, and says what it does not
know. Draws from it name the partitions that may be the best (top-two Thompson sampling: Russo, "Simple
Bayesian Algorithms for Best-Arm Identification", Operations Research 68(6), 2020, arXiv 1602.08448), and
where those differ is where another network is worth its training.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import fsum

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, solve_triangular

from coterie.models.tasks import Grouping
from coterie.search.affinity import all_subsets
from coterie.search.partition import best_partition
from coterie.search.work import Subset

# Shapes: N observations, A subsets that were measured, S and U subsets, P partitions, T tasks, D draws.

SCALE = 0.2  # of gains before any is known: what groups on `digits` differ by
SCALE_COUNTS = 4  # so many subsets is that worth
NOISE_COUNTS = 4  # so many replicates is the noise that all tasks have worth to each
EVIDENCE_SUBSETS = 150  # of a task that judge the form: its cost is their number's cube
AFFINITY_SLOPE = 0.5  # scales for one standard deviation of affinity: what is expected, and how unsurely
JITTER = 1e-8  # of a task's variance: keeps covariances of subsets that are known alike positive
CLEAR = 0.95  # from this probability on a partition is taken to be the best
INDIFFERENT = 0.01  # partitions whose mean gains differ by less are equally good
CONTENDING_DRAWS = 64  # whose best partitions are the contenders
JUDGING_DRAWS = 1000  # that decide between them: the probability's standard error is below 0.016
TRIES = 20  # draws for a second partition: one that is the best at 1 in 7 is found at 19 in 20
ALL_SUBSETS_TASKS = 8  # up to here every subset is a candidate
MOST_CANDIDATES = 2000
ROUNDS = 5  # of adding the neighbours of the best partition to the candidates


@dataclass(frozen=True, slots=True)
class Observation:
    """What one network reached.

    Attributes:
        subset: Its tasks, rising.
        gains: For each of them the relative gain over the yardstick; higher is better.
        seed: Of the training.
    """

    subset: Subset
    gains: Sequence[float]
    seed: int


@dataclass(frozen=True, slots=True)
class _Form:
    """Standard deviations of what a gain is made of, in units of the task's scale.

    Attributes:
        level: Common to all subsets of the task.
        together: Common to all but the task alone.
        size: Grows with the number of partners, up to this for all tasks.
        partner: What one partner does; in a larger subset the mean over the partners.
        shape: What subsets have in common that differ in few tasks.
        reach: In how many tasks, for that to fall to 1/e.
        own: Of each subset alone.
        noise: Of one measurement.
    """

    level: float = 0.5
    together: float = 0.5
    size: float = 0.5
    partner: float = 0.5
    shape: float = 1.0
    reach: float = 8.0
    own: float = 0.05
    noise: float = 1.0


# What evidence chooses; the rest of the form is fixed. With more to choose the groups found on `digits` were
# worse where little was measured, and no better where much was.
NOISES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4)
REACHES = (4.0, 8.0, 16.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Measured:
    """What was measured of one task, A distinct subsets.

    Attributes:
        has_AT: The subsets.
        means_A: Over their observations.
        counts_A: Number of observations.
        squares: Sum of the squared distances of observations to their subset's mean.
        replicates: Observations beyond each subset's first.
        scale: The size of the task's gains: their distance to the middle, each subset counted once.
    """

    has_AT: NDArray[np.bool_]
    means_A: NDArray[np.float64]
    counts_A: NDArray[np.float64]
    squares: float
    replicates: int
    scale: float


def _measure(has_AT: NDArray[np.bool_], gains: Sequence[NDArray[np.float64]]) -> _Measured:
    """Sum up one task's gains, an array for each of its subsets."""
    means_A = np.array([found.mean() for found in gains])
    middle = float(means_A.mean()) if len(gains) else 0.0
    squares = float(sum(((found - middle) ** 2).mean() for found in gains))
    return _Measured(
        has_AT=has_AT,
        means_A=means_A,
        counts_A=np.array([len(found) for found in gains], dtype=np.float64),
        squares=float(sum(((found - found.mean()) ** 2).sum() for found in gains)),
        replicates=sum(len(found) - 1 for found in gains),
        scale=float(np.sqrt((SCALE_COUNTS * SCALE**2 + squares) / (SCALE_COUNTS + len(gains)))),
    )


class SubsetSurrogate:
    """A Gaussian process for each task over the subsets that contain it.

    A task's gain is a level, the mean of its partners' effects (as HOA has it), an effect of the number of
    partners, and a deviation that subsets with few differences share. Noise comes from replicates, pooled
    over a task's subsets, and where there are none from what the process can't explain. Its form is common to
    all tasks, in units of each one's scale, and chosen by marginal likelihood. Tasks are independent in it:
    on `digits` those of one network err together (correlations of 0 to 0.5), yet the differences between the
    best partitions were off by 0.9 to 1.1 of their standard deviations.

    Args:
        tasks: How many there are, 0..tasks-1.
        observations: Any number, also none; their order plays no part.
        prior_TT: Affinity of task i onto task j, where it was measured: only how pairs compare plays a part,
            not the size. The diagonal is not read.

    Attributes:
        counts: Measured subset -> number of its observations.

    Raises:
        ValueError: If an observation or `prior_TT` does not fit.
    """

    def __init__(
        self,
        tasks: int,
        observations: Iterable[Observation],
        *,
        prior_TT: NDArray[np.float64] | None = None,
    ) -> None:
        if tasks < 1:
            raise ValueError(f"tasks: must be 1 or more, found {tasks}")
        self.tasks = tasks
        self._affinity_TT = np.zeros((tasks, tasks)) if prior_TT is None else _standard(prior_TT, tasks)
        gains: dict[Subset, list[Sequence[float]]] = {}
        for observation in sorted(
            observations, key=lambda observation: (observation.subset, observation.seed)
        ):
            subset = observation.subset
            if len(observation.gains) != len(subset) or not np.isfinite(observation.gains).all():
                raise ValueError(
                    f"gains: must be finite and one for each task of {subset}, found {observation.gains}"
                )
            gains.setdefault(subset, []).append(observation.gains)
        has_ST = self._has(gains)
        self.counts: Mapping[Subset, int] = {subset: len(found) for subset, found in gains.items()}
        self._measured = [
            _measure(
                has_ST[has_ST[:, t]],
                [
                    np.array([one[subset.index(t)] for one in found], dtype=np.float64)
                    for subset, found in gains.items()
                    if t in subset
                ],
            )
            for t in range(tasks)
        ]
        self._form = self._choose_form()
        self._noise_T = np.array([self._noise(measured) for measured in self._measured])
        self._fits = [self._fit(t) for t in range(tasks)]

    def mean(self, subset: Subset) -> NDArray[np.float64]:
        """What each task of a subset is expected to gain."""
        has_ST = self._has([subset])
        return np.array([self._expected(t, has_ST)[0] for t in subset])

    def std(self, subset: Subset) -> NDArray[np.float64]:
        """The standard deviation of that: of the mean over many seeds, not of one seed."""
        has_ST = self._has([subset])
        return np.array([np.sqrt(self._posterior(t, has_ST)[1][0, 0]) for t in subset])

    def draw(self, rng: np.random.Generator, subsets: Sequence[Subset]) -> dict[Subset, NDArray[np.float64]]:
        """Draw what the tasks gain in these subsets, together, from the posterior."""
        has_ST = self._has(subsets)
        drawn_ST = np.zeros(has_ST.shape)
        for t in range(self.tasks):
            has_S = has_ST[:, t]
            if has_S.any():
                mean_S, cov_SS = self._posterior(t, has_ST[has_S])
                normal_S = rng.standard_normal(len(mean_S))
                drawn_ST[has_S, t] = mean_S + np.linalg.cholesky(cov_SS) @ normal_S
        return {subset: drawn_T[list(subset)] for subset, drawn_T in zip(subsets, drawn_ST, strict=True)}

    def expected(self, subsets: Sequence[Subset], weights: Sequence[float]) -> NDArray[np.float64]:
        """The sum over each subset's tasks of weight times expected gain, [S]."""
        has_ST = self._has(subsets)
        expected_S = np.zeros(len(has_ST))
        for t, weight in enumerate(weights):
            has_S = has_ST[:, t]
            expected_S[has_S] += weight * self._expected(t, has_ST[has_S])
        return expected_S

    def values(
        self, subsets: Sequence[Subset], weights: Sequence[float]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """What subsets are worth: the sum over their tasks of weight times gain.

        Returns:
            The mean [S] and covariance [S, S] of the belief, and the variance [S] of one measurement's noise.
        """
        has_ST = self._has(subsets)
        mean_S, cov_SS, noise_S = np.zeros(len(has_ST)), np.zeros((len(has_ST),) * 2), np.zeros(len(has_ST))
        for t, weight in enumerate(weights):
            index = np.flatnonzero(has_ST[:, t])
            if len(index):
                task_mean_S, task_cov_SS = self._posterior(t, has_ST[index])
                mean_S[index] += weight * task_mean_S
                cov_SS[np.ix_(index, index)] += weight**2 * task_cov_SS
                noise_S[index] += (weight * self._noise_T[t]) ** 2
        return mean_S, cov_SS, noise_S

    def _has(self, subsets: Iterable[Subset]) -> NDArray[np.bool_]:
        """[S, T]: whether a subset has a task."""
        listed = list(subsets)
        has_ST = np.zeros((len(listed), self.tasks), dtype=np.bool_)
        for row_T, subset in zip(has_ST, listed, strict=True):
            rising = subset == tuple(sorted(set(subset)))
            if not subset or not rising or subset[0] < 0 or subset[-1] >= self.tasks:
                raise ValueError(
                    f"subset: must hold rising indices from 0 to {self.tasks - 1}, found {subset}"
                )
            row_T[list(subset)] = True
        return has_ST

    def _choose_form(self) -> _Form:
        """The one with the greatest evidence."""
        if not self.counts:
            return _Form()
        forms = [_Form(noise=noise, reach=reach) for noise in NOISES for reach in REACHES]
        return max(forms, key=self._evidence)

    def _evidence(self, form: _Form) -> float:
        """Log marginal likelihood of all that was measured, but for a constant."""
        total = 0.0
        for t, measured in enumerate(self._measured):
            noise = measured.scale * form.noise
            total -= measured.replicates * np.log(noise) + measured.squares / (2 * noise**2)
            most_A = np.argsort(-measured.counts_A, kind="stable")[:EVIDENCE_SUBSETS]
            root_AA, above_A = self._root(form, t, most_A, form.noise)
            total -= np.log(np.diag(root_AA)).sum()
            total -= (solve_triangular(root_AA, above_A, lower=True) ** 2).sum() / 2
        return float(total)

    def _noise(self, measured: _Measured) -> float:
        """A task's own standard deviation of one measurement."""
        common = (measured.scale * self._form.noise) ** 2
        return float(
            np.sqrt((NOISE_COUNTS * common + measured.squares) / (NOISE_COUNTS + measured.replicates))
        )

    def _fit(self, t: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """A root of its measurements' covariance [A, A], and that covariance's inverse times them [A]."""
        measured = self._measured[t]
        every_A = np.arange(len(measured.means_A))
        root_AA, above_A = self._root(self._form, t, every_A, self._noise_T[t] / measured.scale)
        return root_AA, cho_solve((root_AA, True), above_A)

    def _root(
        self, form: _Form, t: int, which_A: NDArray[np.int64], noise: float
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """A root of measurements' covariance, and how far they are above what is expected, in scales."""
        measured = self._measured[t]
        has_AT = measured.has_AT[which_A]
        cov_AA = self._covariance(form, t, has_AT, has_AT) + np.diag(noise**2 / measured.counts_A[which_A])
        above_A = measured.means_A[which_A] / measured.scale - AFFINITY_SLOPE * self._affinity(t, has_AT)
        return np.asarray(np.linalg.cholesky(cov_AA), dtype=np.float64), above_A

    def _posterior(
        self, t: int, has_ST: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean [S] and covariance [S, S] of a task's gains in subsets that all contain it."""
        measured = self._measured[t]
        root_AA, _ = self._fits[t]
        known_AS = solve_triangular(
            root_AA, self._covariance(self._form, t, measured.has_AT, has_ST), lower=True
        )
        cov_SS = self._covariance(self._form, t, has_ST, has_ST) - known_AS.T @ known_AS
        cov_SS[np.diag_indices_from(cov_SS)] += JITTER
        return self._expected(t, has_ST), cov_SS * measured.scale**2

    def _expected(self, t: int, has_ST: NDArray[np.bool_]) -> NDArray[np.float64]:
        """The mean that `_posterior` gives."""
        measured, (_, weights_A) = self._measured[t], self._fits[t]
        cov_SA = self._covariance(self._form, t, has_ST, measured.has_AT)
        expected_S = AFFINITY_SLOPE * self._affinity(t, has_ST) + cov_SA @ weights_A
        return np.asarray(expected_S * measured.scale)

    def _affinity(self, t: int, has_ST: NDArray[np.bool_]) -> NDArray[np.float64]:
        """The mean affinity onto a task from its partners, 0 where it is alone."""
        return np.asarray(_partner_shares(t, has_ST) @ self._affinity_TT[:, t])

    def _covariance(
        self, form: _Form, t: int, has_ST: NDArray[np.bool_], has_UT: NDArray[np.bool_]
    ) -> NDArray[np.float64]:
        """Prior covariance of a task's gains in two lists of subsets that have it, [S, U], in its scale."""
        one_ST, other_UT = has_ST.astype(np.float64), has_UT.astype(np.float64)
        sizes_S, sizes_U = one_ST.sum(axis=1), other_UT.sum(axis=1)
        different_SU = sizes_S[:, None] + sizes_U - 2 * (one_ST @ other_UT.T)
        partners = max(self.tasks - 1, 1)
        covariance_SU = (
            form.level**2
            + form.together**2 * np.outer(sizes_S > 1, sizes_U > 1)
            + (form.size / partners) ** 2 * np.outer(sizes_S - 1, sizes_U - 1)
            + form.partner**2 * (_partner_shares(t, has_ST) @ _partner_shares(t, has_UT).T)
            + form.shape**2 * np.exp(-different_SU / form.reach)
            + form.own**2 * (different_SU == 0)
            + AFFINITY_SLOPE**2 * np.outer(self._affinity(t, has_ST), self._affinity(t, has_UT))
        )
        return np.asarray(covariance_SU)


def _partner_shares(t: int, has_ST: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[S, T]: one over the number of partners of task t for each partner, else 0."""
    partners_ST = has_ST.astype(np.float64)
    partners_ST[:, t] = 0
    return np.asarray(partners_ST / np.maximum(partners_ST.sum(axis=1, keepdims=True), 1))


def _standard(affinity_TT: NDArray[np.float64], tasks: int) -> NDArray[np.float64]:
    """Centre and scale the affinities between different tasks; the diagonal is 0."""
    affinity_TT = np.array(affinity_TT, dtype=np.float64)
    pairs_TT = ~np.eye(tasks, dtype=np.bool_)
    if affinity_TT.shape != (tasks, tasks) or not np.isfinite(affinity_TT[pairs_TT]).all():
        raise ValueError(f"prior_TT: must be finite and of shape {(tasks, tasks)}, found {affinity_TT.shape}")
    centred_TT = np.where(pairs_TT, affinity_TT, 0) - (affinity_TT[pairs_TT].mean() if tasks > 1 else 0)
    spread = centred_TT[pairs_TT].std() if tasks > 1 else 0.0
    return np.where(pairs_TT, centred_TT / spread, 0) if spread > 0 else np.zeros_like(affinity_TT)


@dataclass(frozen=True, eq=False)
class _Belief:
    """About the values of subsets: mean, covariance, and the variance of one more measurement."""

    subsets: list[Subset]
    mean_S: NDArray[np.float64]
    cov_SS: NDArray[np.float64]
    noise_S: NDArray[np.float64]

    @cached_property
    def root_SS(self) -> NDArray[np.float64]:
        return np.asarray(np.linalg.cholesky(self.cov_SS), dtype=np.float64)

    def draw(self, rng: np.random.Generator, draws: int) -> NDArray[np.float64]:
        """[D, S]."""
        return self.mean_S + rng.standard_normal((draws, len(self.mean_S))) @ self.root_SS.T


@dataclass(frozen=True, kw_only=True, eq=False)
class _Contest:
    """Partitions that are the best in some draw.

    Attributes:
        partitions: In canonical order.
        member_PS: 1 where a subset is a group of the partition.
        leader: Number of the one that is good enough most often.
        confidence: How often it is.
        loss: What it is behind the best of a draw on average.
        beaten_P: How often the leader is not, because of each.
    """

    partitions: list[Grouping]
    member_PS: NDArray[np.float64]
    leader: int
    confidence: float
    loss: float
    beaten_P: NDArray[np.float64]

    def telling(self, belief: _Belief, most: int) -> list[tuple[Subset, float]]:
        """Up to `most` subsets, chosen one after another, and what share of the doubt each removes."""
        rivals = np.flatnonzero(self.beaten_P)
        contrast_SP = (self.member_PS[rivals] - self.member_PS[self.leader]).T
        between_S = contrast_SP.any(axis=1)
        cov_SS, noise_S = belief.cov_SS.copy(), belief.noise_S
        chosen = []
        for _ in range(min(most, int(between_S.sum()))):
            shared_SP = cov_SS @ contrast_SP
            doubt_P = np.maximum((contrast_SP * shared_SP).sum(axis=0), np.finfo(np.float64).tiny)
            measured_S = np.diag(cov_SS) + noise_S
            share_S = (shared_SP**2 / doubt_P) @ self.beaten_P[rivals] / measured_S
            s = int(np.where(between_S, share_S, -1).argmax())
            chosen.append((belief.subsets[s], float(share_S[s])))
            between_S[s] = False
            cov_SS -= np.outer(cov_SS[s], cov_SS[s]) / measured_S[s]
        return chosen


class GroupBelief:
    """Which partitions may be the best, by a surrogate of what subsets of the tasks gain.

    A partition is worth the mean over the tasks of weight times gain. What is found is a function of the
    surrogate and of the generator that is passed.

    Args:
        surrogate: The belief about subsets.
        weights: Of the tasks; 1 each where it is None.
    """

    def __init__(self, surrogate: SubsetSurrogate, weights: Sequence[float] | None = None) -> None:
        tasks = surrogate.tasks
        weights = [1.0] * tasks if weights is None else weights
        if len(weights) != tasks:
            raise ValueError(f"weights: must be {tasks}, one for each task, found {len(weights)}")
        self.surrogate = surrogate
        self._shares = [weight / tasks for weight in weights]
        self._values: dict[Subset, float] = {}
        self._beliefs: dict[int, _Belief] = {}

    def value_table(self, subsets: Sequence[Subset]) -> dict[Subset, float]:
        """What each subset adds to the worth of a partition, as expected."""
        new = [subset for subset in subsets if subset not in self._values]
        if new:
            means = self.surrogate.expected(new, self._shares).tolist()
            self._values.update(zip(new, means, strict=True))
        return {subset: self._values[subset] for subset in subsets}

    def best(self, groups: int) -> Grouping:
        """The partition into so many groups that is expected to be the best."""
        return self._best(self.value_table(self.candidates(groups)), groups)

    def top_two(
        self, rng: np.random.Generator, groups: int, tries: int = TRIES
    ) -> tuple[Grouping, Grouping | None]:
        """Top-two Thompson sampling: the best partition of one draw, and the first other one of later draws.

        The second is None where `tries` draws have the same best partition.
        """
        belief = self._belief(groups)
        draws = (
            self._best(dict(zip(belief.subsets, drawn_S, strict=True)), groups)
            for drawn_S in belief.draw(rng, 1 + tries).tolist()
        )
        first = next(draws)
        return first, next((other for other in draws if other != first), None)

    def probability_best(
        self, rng: np.random.Generator, groups: int, draws: int = JUDGING_DRAWS
    ) -> tuple[Grouping, float]:
        """The leading partition, and the share of draws in which none is better by `INDIFFERENT`."""
        contest = self._contest(rng, groups, draws)
        return contest.partitions[contest.leader], contest.confidence

    def next_subsets(self, rng: np.random.Generator, groups: Sequence[int], most: int) -> tuple[Subset, ...]:
        """The subsets to train one more network for, most telling first; none where the best are clear.

        The best partition is clear where few draws have one better by `INDIFFERENT` than the leading one
        (`CLEAR`), or where that is expected to lose less than this. Else the leading one is compared with
        those that beat it: a network for a group that one of the two has takes a share off the variance of
        the difference between them. Subsets are chosen one after another for that share, summed over the
        rivals by how often each wins.

        Args:
            rng: What is random here.
            groups: Numbers of groups, each judged for itself.
            most: Subsets at the most; none comes twice.
        """
        gains: dict[Subset, float] = {}
        for number in groups:
            contest = self._contest(rng, number, JUDGING_DRAWS)
            if contest.confidence < CLEAR and contest.loss >= INDIFFERENT:
                for subset, gain in contest.telling(self._belief(number), most):
                    gains[subset] = gains.get(subset, 0.0) + gain
        return tuple(sorted(gains, key=lambda subset: (-gains[subset], subset))[:most])

    def candidates(self, groups: int) -> list[Subset]:
        """The subsets that partitions into so many groups are made of.

        All of them for few tasks. Otherwise what was measured, single tasks, and the neighbours of the best
        partition: groups with one task more, less or exchanged, and two groups as one.
        """
        tasks = self.surrogate.tasks
        if tasks <= ALL_SUBSETS_TASKS:
            return all_subsets(tasks)
        found = Grouping.apart(tasks)
        while len(found) > groups:
            found = max(_merged(found), key=self._worth)
        often = sorted(self.surrogate.counts, key=lambda subset: (-self.surrogate.counts[subset], subset))
        pool = dict.fromkeys([*found.groups, *Grouping.apart(tasks).groups, *often[: MOST_CANDIDATES // 2]])
        for _ in range(ROUNDS):
            pool.update(dict.fromkeys(_neighbours(found)))
            pool = dict.fromkeys(list(pool)[:MOST_CANDIDATES])
            better = self._best(self.value_table(list(pool)), groups)
            if better == found:
                break
            found = better
        return list(pool)

    def _worth(self, grouping: Grouping) -> float:
        return fsum(self.value_table(grouping.groups).values())

    def _best(self, values: Mapping[Subset, float], groups: int) -> Grouping:
        solution = best_partition(values, self.surrogate.tasks, most_groups=groups, least_groups=groups)
        assert solution is not None  # the candidates hold a partition of each size
        return Grouping(solution.groups)

    def _belief(self, groups: int) -> _Belief:
        if groups not in self._beliefs:
            subsets = self.candidates(groups)
            self._beliefs[groups] = _Belief(subsets, *self.surrogate.values(subsets, self._shares))
        return self._beliefs[groups]

    def _contest(self, rng: np.random.Generator, groups: int, draws: int) -> _Contest:
        belief = self._belief(groups)
        contenders = {
            self._best(dict(zip(belief.subsets, drawn_S, strict=True)), groups)
            for drawn_S in belief.draw(rng, CONTENDING_DRAWS).tolist()
        }
        partitions = sorted({self.best(groups), *contenders}, key=lambda grouping: grouping.groups)
        index = {subset: s for s, subset in enumerate(belief.subsets)}
        member_PS = np.zeros((len(partitions), len(index)))
        for row_S, partition in zip(member_PS, partitions, strict=True):
            row_S[[index[group] for group in partition.groups]] = 1
        worth_DP = belief.draw(rng, draws) @ member_PS.T
        behind_DP = worth_DP.max(axis=1, keepdims=True) - worth_DP
        good_P = (behind_DP < INDIFFERENT).mean(axis=0)
        leader = int(good_P.argmax())
        lost_D = behind_DP[:, leader] >= INDIFFERENT
        return _Contest(
            partitions=partitions,
            member_PS=member_PS,
            leader=leader,
            confidence=float(good_P[leader]),
            loss=float(behind_DP[:, leader].mean()),
            beaten_P=np.bincount(worth_DP[lost_D].argmax(axis=1), minlength=len(partitions)) / draws,
        )


def _merged(grouping: Grouping) -> Iterator[Grouping]:
    """Every partition with two of the groups made one."""
    for one, other in combinations(grouping.groups, 2):
        kept = [group for group in grouping.groups if group not in (one, other)]
        yield Grouping((*kept, one + other))


def _neighbours(grouping: Grouping) -> Iterator[Subset]:
    """Groups with one task less, more or exchanged, and two groups as one."""
    for group in grouping.groups:
        inside = set(group)
        outside = [t for t in range(len(grouping.labels)) if t not in inside]
        changed = [inside - {t} for t in group]
        changed += [inside | {t} for t in outside]
        changed += [inside - {t} | {s} for t in group for s in outside]
        changed += [inside.union(other) for other in grouping.groups if other != group]
        yield from (tuple(sorted(new)) for new in changed if new)
