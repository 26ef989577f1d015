"""The non-dominated set of a job and its hypervolume, kept up by insertion.

Inside, lower is better: maximised objectives are negated in one place, `_losses`.
"""

import math
from collections.abc import Mapping, Sequence

import moocore
import numpy as np
from numpy.typing import NDArray

from coterie.models.tasks import Direction
from coterie.search.spec import ConstraintSpec
from coterie.search.store import FrontUpdate, Values


class Front:
    """Trials that no other trial dominates; equal ones stay side by side.

    Args:
        objectives: Metric and direction of each.
        reference_point: Worst value that counts, by metric; without one there is no hypervolume. Points
            beyond it are on the front all the same, and add nothing to the hypervolume.
    """

    def __init__(
        self,
        objectives: Sequence[tuple[str, Direction]],
        reference_point: Mapping[str, float] | None = None,
    ) -> None:
        self._metrics = [metric for metric, _ in objectives]
        self._signs = np.array([-1.0 if d is Direction.MAXIMIZE else 1.0 for _, d in objectives])
        self._reference = None if reference_point is None else self._losses(reference_point)
        self._ids: list[str] = []
        self._points: NDArray[np.float64] = np.empty((0, len(self._metrics)))

    def insert(self, trial_id: str, values: Mapping[str, float | None]) -> FrontUpdate:
        """Add a completed trial.

        Raises:
            ValueError: If an objective has no finite value.
        """
        point = self._losses(values)
        better = self._points <= point
        dominated = bool(np.any(better.all(axis=1) & (self._points < point).any(axis=1)))
        displaced: list[str] = []
        if not dominated:
            beaten = (point <= self._points).all(axis=1) & (point < self._points).any(axis=1)
            displaced = [self._ids[index] for index in np.flatnonzero(beaten)]
            self._ids = [*(self._ids[index] for index in np.flatnonzero(~beaten)), trial_id]
            self._points = np.vstack([self._points[~beaten], point])
        return self._update(not dominated, displaced)

    def leave_out(self) -> FrontUpdate:
        """Say where the front stands after a completed trial that is infeasible."""
        return self._update(False, [])

    @property
    def points(self) -> dict[str, dict[str, float]]:
        """Trial id -> its objectives' values, in the order of their insertion."""
        values = self._points * self._signs
        return {
            name: dict(zip(self._metrics, map(float, row), strict=True))
            for name, row in zip(self._ids, values, strict=True)
        }

    @property
    def hypervolume(self) -> float | None:
        """Volume between front and reference point; None without one."""
        if self._reference is None:
            return None
        return float(moocore.hypervolume(self._points, ref=self._reference)) if self._ids else 0.0

    def _update(self, on_front: bool, displaced: Sequence[str]) -> FrontUpdate:
        return FrontUpdate(
            on_front=on_front,
            displaced=tuple(displaced),
            hypervolume=self.hypervolume,
            size=len(self._ids),
        )

    def _losses(self, values: Mapping[str, float | None]) -> NDArray[np.float64]:
        found = [values.get(metric) for metric in self._metrics]
        missing = [
            metric
            for metric, value in zip(self._metrics, found, strict=True)
            if value is None or not math.isfinite(value)
        ]
        if missing:
            raise ValueError(f"values: each objective must be finite, found none for {missing}")
        losses: NDArray[np.float64] = np.array(found, dtype=np.float64) * self._signs
        return losses


def feasible(values: Values, constraints: Sequence[ConstraintSpec]) -> bool:
    """Whether every bound is kept; a metric without a value keeps none."""
    for constraint in constraints:
        value = values.get(constraint.metric)
        if value is None or math.isnan(value):
            return False
        if constraint.max is not None and value > constraint.max:
            return False
        if constraint.min is not None and value < constraint.min:
            return False
    return True
