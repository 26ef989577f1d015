"""What a search in Python comes to: its trials, its front, and the networks on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from coterie.models.export import load_architecture
from coterie.models.tasks import Direction
from coterie.search.confirmed import PointSummary, summarise
from coterie.search.front import feasible
from coterie.search.objective import metric_directions
from coterie.search.plan import Plan
from coterie.search.spec import ConstraintSpec
from coterie.search.store import FolderArtifacts, InMemoryStore, JobState, Trial, TrialState, Verdict


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """How a search ended.

    Attributes:
        plan: What was searched.
        state: `succeeded` or `failed`.
        reason: Why, where that is not plain.
        trials: By number.
        front: Those on the front, by number.
        history: Trial id and hypervolume after each completed trial.
        verdict: What was confirmed about the tasks; None where the job does not confirm.
        confirmed: Trial id -> what fresh seeds gave for a point of the front.
        artifacts: Where the networks are.
    """

    plan: Plan
    state: JobState
    reason: str | None
    trials: Sequence[Trial]
    front: Sequence[Trial]
    history: Sequence[tuple[str, float | None]]
    verdict: Verdict | None
    confirmed: dict[str, PointSummary]
    artifacts: FolderArtifacts

    @classmethod
    def read(cls, plan: Plan, store: InMemoryStore, artifacts: FolderArtifacts) -> "SearchResult":
        """Read what a search has left in its store."""
        trials, front = store.trials, store.front
        state, reason = store.state
        return cls(
            plan=plan,
            state=state,
            reason=reason,
            trials=trials,
            front=[trial for trial in trials if trial.id in front],
            history=store.history,
            verdict=store.verdict,
            confirmed=summarise(store.confirmations),
            artifacts=artifacts,
        )

    @property
    def hypervolume(self) -> float | None:
        """Of the front; None before a trial has completed."""
        return self.history[-1][1] if self.history else None

    def best(self, metric: str | None = None, **limits: float) -> Trial:
        """Give the completed trial that is best in a metric within limits and the job's constraints.

        Args:
            metric: By default the first objective.
            limits: Greatest values by metric, as `max_macs=10_000`.

        Raises:
            ValueError: If a name is no metric of the job, or a limit is not called `max_<metric>`.
            LookupError: If no trial keeps the limits.
        """
        directions = metric_directions(self.plan.tasks)
        wanted = metric or self.plan.objectives[0][0]
        bounds = [
            ConstraintSpec(metric=name.removeprefix("max_"), max=float(value))
            for name, value in limits.items()
            if name.startswith("max_")
        ]
        unknown = {wanted, *(bound.metric for bound in bounds)} - directions.keys()
        if unknown or len(bounds) < len(limits):
            raise ValueError(
                f"best: must be given metrics of the job and limits as max_<metric>, found {wanted!r}, "
                f"{sorted(limits)}; there are {', '.join(directions)}"
            )
        constraints = [*bounds, *self.plan.spec.constraints]
        fitting = [
            (value, trial)
            for trial in self.trials
            if trial.ending is not None
            and trial.state is TrialState.COMPLETED
            and (value := trial.ending.values.get(wanted)) is not None
            and feasible(trial.ending.values, constraints)
        ]
        if not fitting:
            raise LookupError(
                f"no completed trial keeps {', '.join(f'{k}={v:g}' for k, v in limits.items())}"
            )
        sign = -1.0 if directions[wanted] is Direction.MAXIMIZE else 1.0
        return min(fitting, key=lambda found: (sign * found[0], found[1].number))[1]

    def load(self, trial: Trial) -> nn.Module:
        """Give a completed trial's network: static, in eval mode, raw inputs to {task: output}."""
        return load_architecture(self.folder(trial))

    def folder(self, trial: Trial) -> Path:
        """Where a completed trial's architecture.json and weights.safetensors are."""
        return self.artifacts.trial_folder(trial.id)
