"""What an untried candidate is expected to add to the hypervolume: a belief learned from a job's trials.

A Gaussian process for each objective (Rasmussen and Williams, "Gaussian Processes for Machine Learning",
2006, chapters 2 and 5), and the expected improvement of the hypervolume (Emmerich et al., "Single- and
multiobjective evolutionary optimization assisted by Gaussian random field metamodels", IEEE TEVC 10(4), 2006)
by draws. Trials are noisy, so means are compared with means (as in Daulton et al., "Parallel Bayesian
Optimization of Multiple Noisy Objectives with Expected Hypervolume Improvement", NeurIPS 2021).
"""

import itertools

import moocore
import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, solve_triangular

# Shapes: N trials, P candidates in question, F features, D objectives, S draws.

SOFT = (
    0.05  # share of the way from the best to the worst value that counts, below which values are not spread
)
DRAWS = 32
MOST_TRIALS = 300  # that are learned from, the best ones first: the price is their cube
LINEAR = (0.3, 1.0)  # standard deviation of a feature's slope
REACH = (1.0, 2.0, 4.0)  # distance of features at which what is not linear falls to 0.6
NOISE = (0.2, 0.4, 0.8)  # standard deviation of an outcome around what its candidate reaches on average


class CandidateModel:
    """Gaussian processes over the features of a job's candidates, one an objective.

    Objectives are seen on a scale that spreads what is good: the logarithm of the distance to the best value.

    Args:
        features_NF: Of the trials; each from about -1/2 to 1/2, or 1 where a name is meant.
        losses_ND: What they reached; lower is better.
        known_ND: Losses that follow from the candidate alone; NaN where they do not.
        counts_N: Whether a trial may be on the front.
        reference_D: The worst values that count.
    """

    def __init__(
        self,
        features_NF: NDArray[np.float64],
        losses_ND: NDArray[np.float64],
        known_ND: NDArray[np.float64],
        counts_N: NDArray[np.bool_],
        reference_D: NDArray[np.float64],
    ) -> None:
        self._reference_D = reference_D
        self._best_D = losses_ND.min(axis=0)
        self._range_D = np.maximum(reference_D - self._best_D, np.finfo(np.float64).tiny)
        shares_ND = np.clip((losses_ND - self._best_D) / self._range_D, 0, 1)
        order_N = np.argsort(shares_ND.sum(axis=1), kind="stable")[:MOST_TRIALS]
        self._processes = [
            _Process(features_NF[order_N], np.log(SOFT + shares_ND[order_N, d]))
            for d in range(len(reference_D))
        ]
        expected_ND = self._losses(np.stack([p.mean(features_NF) for p in self._processes], axis=1))
        self._front_ND = np.where(np.isnan(known_ND), expected_ND, known_ND)[counts_N]

    def gains(
        self, features_PF: NDArray[np.float64], known_PD: NDArray[np.float64], rng: np.random.Generator
    ) -> NDArray[np.float64]:
        """Give what each candidate is expected to add to the hypervolume, [P].

        What it reaches on average is compared with what the trials are expected to reach on average.

        Args:
            features_PF: Of the candidates.
            known_PD: As `known_ND`.
            rng: What is random here.
        """
        drawn_SPD = np.stack([p.draw(features_PF, rng, DRAWS) for p in self._processes], axis=2)
        losses_SPD = np.where(np.isnan(known_PD), self._losses(drawn_SPD), known_PD)
        losses_SPD, front_ND = _at_least_two(losses_SPD), _at_least_two(self._front_ND)
        reference_D = _at_least_two(self._reference_D, 1.0)
        if len(front_ND):
            front_ND = moocore.filter_dominated(front_ND)
        volume = moocore.Hypervolume(ref=reference_D)
        before = volume(front_ND)
        gained_SP = np.zeros(losses_SPD.shape[:2])
        for s, p in np.ndindex(gained_SP.shape):
            point_D = losses_SPD[s, p]
            if not (front_ND <= point_D).all(axis=1).any() and (point_D < reference_D).all():
                gained_SP[s, p] = volume(np.vstack([front_ND, point_D])) - before
        return np.asarray(gained_SP.mean(axis=0))

    def _losses(self, seen_D: NDArray[np.float64]) -> NDArray[np.float64]:
        """Back from the scale on which objectives are seen."""
        return np.asarray(self._best_D + self._range_D * (np.exp(seen_D) - SOFT))


def volume_shares(losses_ND: NDArray[np.float64], reference_D: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give what each point of a front adds to its hypervolume, [N]; all alike where none adds anything."""
    reference_D = _at_least_two(reference_D, 1.0)
    shares_N = np.asarray(moocore.hv_contributions(_at_least_two(losses_ND), ref=reference_D))
    return shares_N if shares_N.any() else np.ones(len(losses_ND))


def _at_least_two(losses_D: NDArray[np.float64], value: float = 0.0) -> NDArray[np.float64]:
    """Put another objective beside a single one: moocore knows volumes from two on."""
    if losses_D.shape[-1] > 1:
        return losses_D
    return np.concatenate([losses_D, np.full_like(losses_D, value)], axis=-1)


class _Process:
    """A Gaussian process with a linear and a smooth part; how large each is, the evidence decides."""

    def __init__(self, features_NF: NDArray[np.float64], values_N: NDArray[np.float64]) -> None:
        self._features_NF = features_NF
        self._mean = float(values_N.mean())
        self._scale = float(values_N.std()) or 1.0
        standard_N = (values_N - self._mean) / self._scale
        best = -np.inf
        for form in itertools.product(LINEAR, REACH, NOISE):
            covariance_NN = _covariance(features_NF, features_NF, form)
            root_NN = np.linalg.cholesky(covariance_NN + form[2] ** 2 * np.eye(len(values_N)))
            weights_N = cho_solve((root_NN, True), standard_N)
            evidence = -float(standard_N @ weights_N) / 2 - float(np.log(np.diag(root_NN)).sum())
            if evidence > best:
                best, self._form, self._root_NN, self._weights_N = evidence, form, root_NN, weights_N

    def mean(self, features_PF: NDArray[np.float64]) -> NDArray[np.float64]:
        """What each candidate is expected to reach, [P]."""
        shared_PN = _covariance(features_PF, self._features_NF, self._form)
        return np.asarray(self._mean + self._scale * (shared_PN @ self._weights_N))

    def draw(
        self, features_PF: NDArray[np.float64], rng: np.random.Generator, draws: int
    ) -> NDArray[np.float64]:
        """What each candidate may reach on average, by itself, [S, P]."""
        shared_NP = _covariance(self._features_NF, features_PF, self._form)
        known_NP = solve_triangular(self._root_NN, shared_NP, lower=True)
        own_P = 1 + self._form[0] ** 2 * (features_PF**2).sum(axis=1)
        deviation_P = np.sqrt(np.maximum(own_P - (known_NP**2).sum(axis=0), 0))
        drawn_SP = rng.standard_normal((draws, len(own_P)))
        return np.asarray(self.mean(features_PF) + self._scale * deviation_P * drawn_SP)


def _covariance(
    one_NF: NDArray[np.float64], other_MF: NDArray[np.float64], form: tuple[float, float, float]
) -> NDArray[np.float64]:
    linear, reach, _ = form
    products_NM = one_NF @ other_MF.T
    squares_NM = (one_NF**2).sum(axis=1)[:, None] + (other_MF**2).sum(axis=1) - 2 * products_NM
    smooth_NM = np.exp(-np.maximum(squares_NM, 0) / (2 * reach**2))
    return np.asarray(linear**2 * products_NM + smooth_NM)
