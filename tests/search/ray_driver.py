"""A driver on a real Ray for `test_runner.py`: runs the scenario of each line that it reads.

For each it pickles what the store holds then, and prints the pickle's path. It is a process of its own
because Ray reads its settings when it is imported.
"""

import logging
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import ray

from coterie.models.tasks import KIND_METRICS, TaskKind
from coterie.search import runner
from coterie.search.baselines import yardstick_keys
from coterie.search.plan import Plan, make_plan
from coterie.search.runner import TrialActor, drive
from coterie.search.space import Choices
from coterie.search.spec import JobSpec
from coterie.search.store import FolderArtifacts, InMemoryStore, Measurement, Reference, ReferenceKey
from coterie.search.watchdog import SILENCE_SECONDS

Outcome = dict[str, Any]


class Witness(InMemoryStore):
    """A store that counts the references that are added, and lets something happen after each measurement."""

    def __init__(
        self, shared: Any = None, after: Callable[["Witness", str, Measurement], None] | None = None
    ) -> None:
        super().__init__(shared)
        self.references_trained = 0
        self.most_unfinished = 0
        self._after = after

    def add_reference(self, key: ReferenceKey, reference: Reference) -> None:
        super().add_reference(key, reference)
        self.references_trained += 1

    def measure(self, trial_id: str, measurement: Measurement) -> None:
        super().measure(trial_id, measurement)
        unfinished = [trial for trial in self.trials if trial.ending is None]
        self.most_unfinished = max(self.most_unfinished, len(unfinished))
        if self._after is not None:
            self._after(self, trial_id, measurement)

    def with_references_of(self, other: InMemoryStore) -> "Witness":
        self._memory.references.update(other._memory.references)
        return self


def plan_of(**fields: Any) -> Plan:
    document: dict[str, Any] = {
        "dataset": {"source": "digits", "options": {"samples": 300}},
        "tasks": ["left_parity", "left_loop", "right_loop"],
        "budget": {"trials": 5, "epochs": 20, "concurrent": 1},
    }
    return make_plan(JobSpec.model_validate(document | fields))


def referenced(plan: Plan) -> Witness:
    """A store with references that nothing was trained for."""
    metrics = dict.fromkeys(KIND_METRICS[TaskKind.BINARY], 0.2)
    reference = Reference(validation=metrics, test=metrics, device_seconds=0.0, latency_ms=0.1)
    store = Witness()
    store._memory.references.update(dict.fromkeys(yardstick_keys(plan), reference))
    return store


def run(plan: Plan, store: Witness, folder: Path, silence: float = SILENCE_SECONDS) -> Outcome:
    error = None
    try:
        drive(plan, store, FolderArtifacts(folder), silence)
    except Exception as found:
        error = type(found).__name__
    return {
        "error": error,
        "folder": folder,
        "trials": store.trials,
        "measurements": store.measurements,
        "front": store.front,
        "history": store.history,
        "state": store.state,
        "references_trained": store.references_trained,
        "most_unfinished": store.most_unfinished,
        "reference_point": store.resume().reference_point,
        "side_device_seconds": store.resume().side_device_seconds,
        "subsets": store.subsets,
        "affinities": store.affinities,
        "confirmations": store.confirmations,
        "verdict": store.verdict,
        "estimate": store.estimate,
    }


@cache
def undisturbed(folder: Path) -> tuple[Outcome, Witness]:
    """What the others are compared with."""
    store = Witness()
    return run(plan_of(), store, folder / "undisturbed"), store


def twice(folder: Path) -> list[Outcome]:
    """The same job on two empty stores."""
    return [undisturbed(folder)[0], run(plan_of(), Witness(), folder / "again")]


def killed(folder: Path) -> list[Outcome]:
    """The same job, its actor killed in the fifth epoch of its second trial."""
    expected, references = undisturbed(folder)

    def kill(store: Witness, trial_id: str, measurement: Measurement) -> None:
        trial = next(trial for trial in store.trials if trial.id == trial_id)
        if trial.number == 1 and trial.crashes == 0 and measurement.epoch == 5:
            os.kill(int(measurement.worker.rpartition(":")[2]), signal.SIGKILL)

    return [expected, run(plan_of(), Witness(after=kill).with_references_of(references), folder / "killed")]


def stopped(folder: Path) -> list[Outcome]:
    """The same job, its actor stopped for good in the fifth epoch of its second trial."""
    expected, references = undisturbed(folder)
    stopped = []

    def stop(store: Witness, trial_id: str, measurement: Measurement) -> None:
        trial = next(trial for trial in store.trials if trial.id == trial_id)
        if trial.number == 1 and measurement.epoch == 5 and not stopped:
            stopped.append(measurement.worker)
            os.kill(int(measurement.worker.rpartition(":")[2]), signal.SIGSTOP)

    store = Witness(after=stop).with_references_of(references)
    return [expected, run(plan_of(), store, folder / "stopped", silence=3.0)]


class MeetsFullDisk(TrialActor):
    """A trial's process that can't write in the fifth epoch of the job's second trial, once."""

    def _advance(self, assignment: Any) -> dict[str, Any]:
        met = self._artifacts.root / "met"
        in_fifth = self._training is not None and self._training.epoch == 4
        if assignment.candidate.family == "shared" and in_fifth and not met.exists():
            met.touch()
            Path("/dev/full").write_text("a checkpoint")
        return super()._advance(assignment)


def full_disk(folder: Path) -> list[Outcome]:
    """The same job, its disk full in the middle of its second trial; and the attempt that follows."""
    expected, references = undisturbed(folder)
    store = Witness().with_references_of(references)
    runner.TrialActor, whole = MeetsFullDisk, runner.TrialActor  # type: ignore[misc]
    try:
        left = run(plan_of(), store, folder / "full_disk")
    finally:
        runner.TrialActor = whole  # type: ignore[misc]
    return [expected, left, run(plan_of(), Witness(store._memory), folder / "full_disk")]


class DiesInReset(TrialActor):
    """A trial's process that is killed while it takes up its second trial, once."""

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        is_reset = hasattr(self, "_order")  # and not the first assignment, which setup takes
        taken = super().reset_config(new_config)
        died = self._artifacts.root / "died"
        if is_reset and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return taken


def killed_in_reset(folder: Path) -> list[Outcome]:
    """The same job, its actor killed in the middle of a reset."""
    expected, references = undisturbed(folder)
    runner.TrialActor, whole = DiesInReset, runner.TrialActor  # type: ignore[misc]
    try:
        outcome = run(plan_of(), Witness().with_references_of(references), folder / "killed_in_reset")
    finally:
        runner.TrialActor = whole  # type: ignore[misc]
    assert (folder / "killed_in_reset" / "died").exists()
    return [expected, outcome]


def replaced(folder: Path) -> list[Outcome]:
    """The same job, its driver replaced by another one in the middle of its second trial."""
    expected, references = undisturbed(folder)
    successors: list[Witness] = []

    def replace_driver(store: Witness, trial_id: str, measurement: Measurement) -> None:
        trial = next(trial for trial in store.trials if trial.id == trial_id)
        if trial.number == 1 and measurement.epoch == 4 and not successors:
            successors.append(Witness(store._memory))

    old = Witness(after=replace_driver).with_references_of(references)
    left = run(plan_of(), old, folder / "replaced")
    return [expected, left, run(plan_of(), successors[0], folder / "replaced")]


def broken(folder: Path) -> list[Outcome]:
    """One family's networks explode, and another's cannot even be built."""
    budget = {"trials": 5, "epochs": 2, "failures": 50, "concurrent": 1}
    plan = plan_of(search={"families": ["dmtg", "shared", "single"]}, budget=budget)
    table = {key: dict(dimensions) for key, dimensions in plan.space.table.items()}
    for family, name, value in (("single", "lr", 1e18), ("dmtg", "tau", -1.0)):
        dimensions = table[family, "mlp"]
        dimensions[name] = replace(dimensions[name], domain=Choices((value,)))
    plan = replace(plan, space=replace(plan.space, table=table))
    return [run(plan, referenced(plan), folder / "broken")]


def out_of_time(folder: Path) -> list[Outcome]:
    """More epochs than fit into the job's seconds."""
    plan = plan_of(budget={"seconds": 5, "epochs": 10_000, "concurrent": 1})
    return [run(plan, referenced(plan), folder / "out_of_time")]


class Silent(TrialActor):
    """A trial's process that never reports its third epoch."""

    def step(self) -> dict[str, Any]:
        if self._training is not None and self._training.epoch == 2:
            time.sleep(600)
        return super().step()


def silent(folder: Path) -> list[Outcome]:
    """A trial hangs, and the job's seconds pass."""
    plan = plan_of(budget={"seconds": 4, "epochs": 10_000, "concurrent": 1})
    runner.TrialActor, whole = Silent, runner.TrialActor  # type: ignore[misc]
    runner.LONGEST_SILENCE, before = 2.0, runner.LONGEST_SILENCE
    try:
        return [run(plan, referenced(plan), folder / "silent")]
    finally:
        runner.TrialActor = whole  # type: ignore[misc]
        runner.LONGEST_SILENCE = before


def learning(folder: Path) -> list[Outcome]:
    """With side runs, rungs and confirming runs."""
    plan = plan_of(
        tasks=[],
        budget={"trials": 10, "epochs": 6, "concurrent": 2},
        search={
            "families": ["single", "shared", "grouped"],
            "scheduler": {"name": "pareto_asha", "grace_epochs": 2},
        },
        confirm={"top": 1, "seeds": 2},
    )
    return [run(plan, referenced(plan), folder / "learning")]


def out_of_time_for_references(folder: Path) -> list[Outcome]:
    """Not even the yardstick fits."""
    return [run(plan_of(budget={"seconds": 1, "epochs": 10_000}), Witness(), folder / "no_time")]


def side_by_side(folder: Path) -> list[Outcome]:
    """As many trials at a time as fit."""
    plan = plan_of(budget={"trials": 6, "epochs": 5})
    return [run(plan, referenced(plan), folder / "side_by_side")]


def main() -> None:
    ray.init(address=os.environ["RAY_ADDRESS"], logging_level=logging.WARNING, log_to_driver=False)
    for line in sys.stdin:
        scenario, folder = line.split()
        results = globals()[scenario](Path(folder))
        path = Path(folder, f"{scenario}.pickle")
        path.write_bytes(pickle.dumps(results))
        print(path, flush=True)


if __name__ == "__main__":
    main()
