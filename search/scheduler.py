"""What stops trials early: asynchronous successive halving, on one metric or on all objectives.

Inside, lower is better. N trials at a rung, D criteria.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import moocore
import numpy as np
from numpy.typing import NDArray

from coterie.models.tasks import KIND_METRICS, Direction
from coterie.search.objective import METRICS
from coterie.search.spec import SchedulerSpec

# What is only known of a finished network is judged by what grows with it and is known at each epoch.
STAND_INS: Mapping[str, str] = {"latency_ms": "macs", "peak_memory_mb": "macs"}
# Trials at a rung have trained equally long; what that took would let a job's decisions hang on its machine.
NOT_JUDGED = frozenset({"train_device_seconds"})
# 1/eta in words, from eta 2 on.
SHARES = ("half", "third", "quarter", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


@dataclass(frozen=True)
class Criterion:
    """A value that trials at a rung are compared by.

    Attributes:
        metric: Its name in a measurement's values.
        sign: What makes lower values better.
        words: Its name for users; says what it stands in for.
    """

    metric: str
    sign: float
    words: str


class Scheduler:
    """Lets the best `1/eta` of a rung go on, judged when a trial gets there (Schmucker et al. 2021).

    MO-ASHA, arXiv 2106.12639, as a stopping rule: of the n trials that are recorded at a rung, the one that
    reports included, `ceil(n / eta)` go on; while they are fewer than eta, all do. They are those of the
    lowest non-dominated rank. In the rank that does not go on as a whole they are taken in the order of an
    epsilon-net: first the best one by the first criterion, then always the one farthest from all that are
    taken, in criteria scaled to the rung's range. Equally far ones come in the order of their values, equal
    ones in that of their numbers. With one criterion this is ASHA (Li et al. 2020, arXiv 1810.05934).

    A trial with a criterion that is not finite comes after all others. A decision follows from what is
    recorded at the rung, in whatever order it came.

    Args:
        criteria: What trials are judged by, at least one where there are rungs.
        rungs: Epochs at which trials are judged, rising.
        eta: From 2 to 10.
    """

    def __init__(self, criteria: Sequence[Criterion], rungs: Sequence[int], eta: int) -> None:
        assert criteria or not rungs
        self.rungs = tuple(rungs)
        self._criteria = tuple(criteria)
        self._eta = eta
        self._recorded = {epoch: _Rung(len(criteria)) for epoch in rungs}

    def report(self, number: int, epoch: int, values: Mapping[str, float | None]) -> str | None:
        """Record a running trial, and say why it stops; None where it goes on.

        Args:
            number: The trial's, which settles ties: its id is random, and would let equal jobs part.
            epoch: Epochs trained.
            values: The trial's after that epoch, on the validation split.
        """
        self.recall(number, epoch, values)
        if epoch not in self._recorded:
            return None
        rung = self._recorded[epoch]
        if rung.keeps(number, self._eta):
            return None
        share = SHARES[self._eta - 2]
        *names, last = [criterion.words for criterion in self._criteria]
        judged_by = f"{', '.join(names)} and {last}" if names else last
        return f"stopped at epoch {epoch}: not among the best {share} of {len(rung)} trials by {judged_by}"

    def recall(self, number: int, epoch: int, values: Mapping[str, float | None]) -> None:
        """Record a trial without judging it; what was recorded of it at this rung before is replaced."""
        if epoch in self._recorded:
            found = [(values.get(criterion.metric), criterion.sign) for criterion in self._criteria]
            self._recorded[epoch].record(
                number, [np.inf if value is None else sign * value for value, sign in found]
            )


class _Rung:
    """The trials that got to one epoch."""

    def __init__(self, criteria: int) -> None:
        self._row_of: dict[int, int] = {}
        self._losses_ND: NDArray[np.float64] = np.empty((0, criteria))

    def __len__(self) -> int:
        return len(self._row_of)

    def record(self, number: int, losses_D: Sequence[float]) -> None:
        row = self._row_of.setdefault(number, len(self))
        if row == len(self._losses_ND):
            self._losses_ND = np.vstack([self._losses_ND, losses_D])
        else:
            self._losses_ND[row] = losses_D

    def keeps(self, number: int, eta: int) -> bool:
        """Whether a trial is among the best `1/eta`."""
        places = len(self) if len(self) < eta else -(-len(self) // eta)
        row = self._row_of[number]
        numbers_N = np.fromiter(self._row_of, dtype=np.int64, count=len(self))
        finite_N = np.all(np.isfinite(self._losses_ND), axis=1)
        rank_N = np.full(len(self), len(self))  # after every other
        rank_N[finite_N] = moocore.pareto_rank(self._losses_ND[finite_N])
        places -= int(np.count_nonzero(rank_N < rank_N[row]))
        rivals = np.flatnonzero(rank_N == rank_N[row])
        if not 0 < places < len(rivals):
            return places > 0
        if not finite_N[row]:
            return bool(np.count_nonzero(numbers_N[rivals] < number) < places)
        rivals = rivals[np.lexsort((numbers_N[rivals], *self._losses_ND[rivals].T[::-1]))]
        extent_D = np.ptp(self._losses_ND[finite_N], axis=0)
        scaled_ND = self._losses_ND[rivals] / np.where(extent_D > 0, extent_D, 1.0)
        return _in_net(scaled_ND, int(np.flatnonzero(rivals == row)[0]), places)


def _in_net(points_ND: NDArray[np.float64], row: int, size: int) -> bool:
    """Whether farthest-point selection takes a row among its first `size`; it starts with the first row.

    Equally far ones come in the order of the rows.
    """
    points_DN = np.ascontiguousarray(points_ND.T)
    squares_N = np.full(len(points_ND), np.inf)  # of the distance to the nearest one taken
    taken = 0
    for _ in range(size):
        if taken == row:
            return True
        offsets_DN = points_DN - points_DN[:, taken, None]
        offsets_DN *= offsets_DN
        np.minimum(squares_N, offsets_DN.sum(axis=0), out=squares_N)
        squares_N[taken] = -1.0  # never again
        taken = int(squares_N.argmax())
    return False


def make_scheduler(
    spec: SchedulerSpec, objectives: Sequence[tuple[str, Direction]], epochs: int
) -> Scheduler:
    """Build what stops a job's trials early.

    latency_ms and peak_memory_mb are only known of finished networks, so macs stands in for them;
    train_device_seconds is not judged. Where that leaves nothing to judge by, nothing stops.

    Args:
        spec: Rungs are its `grace_epochs · eta^i`.
        objectives: Metric and direction of each.
        epochs: Of a trial; rungs come before its end.
    """
    judged = objectives
    if spec.name == "asha":
        metric = spec.metric or objectives[0][0]
        judged = [(metric, dict(objectives).get(metric) or _direction(metric))]
    criteria = _criteria(judged)
    rungs = []
    if spec.name != "none" and criteria:
        epoch = spec.grace_epochs
        while epoch < epochs:
            rungs.append(epoch)
            epoch *= spec.eta
    return Scheduler(criteria, rungs, spec.eta)


def _direction(metric: str) -> Direction:
    """That of a metric which is no objective."""
    if metric in METRICS:
        return METRICS[metric].direction
    return next(
        direction
        for metrics in KIND_METRICS.values()
        for name, direction in metrics.items()
        if metric.endswith(f".{name}")  # task.<name>.<metric>, and both names may hold dots
    )


def _criteria(objectives: Sequence[tuple[str, Direction]]) -> list[Criterion]:
    """What trials at a rung are judged by: each objective, or what stands in for it."""
    judged_for: dict[tuple[str, Direction], list[str]] = {}
    for metric, direction in objectives:
        if metric not in NOT_JUDGED:
            judged_for.setdefault((STAND_INS.get(metric, metric), direction), []).append(metric)
    return [
        Criterion(
            metric=metric,
            sign=-1.0 if direction is Direction.MAXIMIZE else 1.0,
            words=metric if metric in names else f"{metric} (for {' and '.join(names)})",
        )
        for (metric, direction), names in judged_for.items()
    ]
