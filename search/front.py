"""The non-dominated set of a job and its hypervolume, kept up by insertion.

Inside, lower is better: maximised objectives are negated where values come in. D objectives, N points.
"""

import math
from collections.abc import Mapping, Sequence

import moocore
import numpy as np
from numpy.typing import NDArray

from coterie.models.tasks import Direction
from coterie.search.spec import ConstraintSpec
from coterie.search.store import FrontUpdate, Values

FIRST_ROOM = 64  # points; doubled each time it is full


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
        self._room_DN: NDArray[np.float64] = np.empty((len(self._metrics), FIRST_ROOM))
        self._hypervolume = 0.0

    def insert(self, trial_id: str, values: Mapping[str, float | None]) -> FrontUpdate:
        """Add a completed trial, in time linear in the front's size.

        Raises:
            ValueError: If an objective has no finite value.
        """
        point_D = self._losses(values)
        no_worse_DN = self._points_DN <= point_D[:, None]
        no_worse_N = np.all(no_worse_DN, axis=0)
        no_better_N = np.all(self._points_DN >= point_D[:, None], axis=0)
        if np.any(no_worse_N & ~no_better_N):
            return self._update(False, [])
        if self._reference is not None:
            self._hypervolume += _volume_gained(self._points_DN, point_D, no_worse_DN, self._reference)
        displaced = self._drop(no_better_N & ~no_worse_N)
        self._append(trial_id, point_D)
        return self._update(True, displaced)

    def leave_out(self) -> FrontUpdate:
        """Say where the front stands after a completed trial that is infeasible."""
        return self._update(False, [])

    @property
    def points(self) -> dict[str, dict[str, float]]:
        """Trial id -> its objectives' values, in the order of their insertion."""
        values = self._points_DN.T * self._signs
        return {
            name: dict(zip(self._metrics, map(float, row), strict=True))
            for name, row in zip(self._ids, values, strict=True)
        }

    @property
    def hypervolume(self) -> float | None:
        """Volume between front and reference point; None without one.

        It is the sum of what each point added when it came: terms that are never negative, each computed
        within a box that lies in the volume, so that rounding errors don't build up.
        """
        return None if self._reference is None else self._hypervolume

    @property
    def _points_DN(self) -> NDArray[np.float64]:
        return self._room_DN[:, : len(self._ids)]

    def _drop(self, dropped_N: NDArray[np.bool_]) -> list[str]:
        rows = np.flatnonzero(dropped_N)
        if not rows.size:
            return []
        kept_DN = self._points_DN[:, ~dropped_N]
        dropped = [self._ids.pop(row) for row in reversed(rows)][::-1]
        self._points_DN[:] = kept_DN
        return dropped

    def _append(self, trial_id: str, point_D: NDArray[np.float64]) -> None:
        if len(self._ids) == self._room_DN.shape[1]:
            self._room_DN = np.hstack([self._room_DN, np.empty_like(self._room_DN)])
        self._ids.append(trial_id)
        self._points_DN[:, -1] = point_D

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


def _volume_gained(
    points_DN: NDArray[np.float64],
    point_D: NDArray[np.float64],
    no_worse_DN: NDArray[np.bool_],
    reference_D: NDArray[np.float64],
) -> float:
    """Volume of what a point dominates and no other does, up to the reference point.

    It lies in a box from the point to a corner that is cut back from the reference point: where another point
    is worse in one objective only, nothing beyond its value there is gained. Few others reach into that box,
    and so their volume within it is cheap.

    Args:
        points_DN: The others, none of which dominates it.
        point_D: The point.
        no_worse_DN: Where they are no worse than it.
        reference_D: Worst value that counts.
    """
    if (point_D >= reference_D).any():
        return 0.0
    worse_in_one_DN = ~no_worse_DN & (no_worse_DN.sum(axis=0, dtype=np.uint8) == len(point_D) - 1)
    cuts_D = np.where(worse_in_one_DN, points_DN, np.inf).min(axis=1, initial=np.inf)
    corner_D = np.minimum(cuts_D, reference_D)
    within_DN = points_DN[:, (points_DN < corner_D[:, None]).all(axis=0)]
    volume = float(np.prod(corner_D - point_D))
    if within_DN.size:
        clipped_ND = np.maximum(within_DN, point_D[:, None]).T
        volume -= moocore.hypervolume(clipped_ND, ref=corner_D)
    return max(0.0, volume)


def non_dominated(
    values_ND: NDArray[np.float64],
    directions: Sequence[Direction],
    reference_D: Sequence[float] | None = None,
) -> tuple[NDArray[np.intp], float | None]:
    """The front of many trials at once, as their insertion one after another makes it, but much faster.

    Args:
        values_ND: Finite values of the objectives.
        directions: Which way each is better.
        reference_D: Worst values that count.

    Returns:
        Indices of the trials on the front, and its hypervolume; None without a reference point.
    """
    signs_D = np.array([-1.0 if direction is Direction.MAXIMIZE else 1.0 for direction in directions])
    losses_ND = values_ND * signs_D
    front_F = np.flatnonzero(moocore.is_nondominated(losses_ND, keep_weakly=True))
    if reference_D is None:
        return front_F, None
    return front_F, float(moocore.hypervolume(losses_ND[front_F], ref=signs_D * reference_D))


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
