"""What the search costs beyond its training: whole trials, places on the front, reports of an epoch.

    python tests/benchmarks/overhead.py [SECTION ...] [--trials N] [--rounds N]

Sections (all by default):

- `trial`: seconds a trial beyond its training, the whole service beside plain Ray Tune. Both sides run trials
  one at a time on actors that are kept alive (`reuse_actors`), each on a Ray head of its own, in turns. Four
  kinds are timed, each as the mean time from the first trial's end to the last's:
  - `service`: a candidate that does next to nothing (30 samples, 8 neurons, 1 epoch), from HTTP to SQL:
    proposed by TPE, trained, checkpointed, measured, exported to files, placed on the front.
  - `tune with optuna, same work`: plain Ray Tune with its own Optuna search (TPE), the same training and
    export, and no database, no checkpoint, no front.
  - `tune, same work`: that without Optuna, random candidates drawn in advance.
  - `tune, nothing`: plain Ray Tune with a step that returns at once. Its result files are off, which favours
    it.
- `front`: one more trial beside 10,000 on a front of 3 objectives, with the new hypervolume, beside
  `study.best_trials` of Optuna after it was told the same trial, which yields no hypervolume.
- `report`: one more report beside 2,000 trials at the lowest rung: of the scheduler alone, and of the whole
  controller (ledger, scheduler, recorder), with what ends the trial where it is stopped.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import optuna

from coterie.models.tasks import KIND_METRICS, Direction
from coterie.search.budget import Ledger
from coterie.search.controller import SearchController
from coterie.search.front import Front
from coterie.search.objective import Yardstick
from coterie.search.plan import Plan, make_plan
from coterie.search.recorder import Recorder
from coterie.search.sampler import Proposal
from coterie.search.scheduler import make_scheduler
from coterie.search.spec import JobSpec, SchedulerSpec
from coterie.search.store import (
    AffinityResult,
    Candidate,
    FolderArtifacts,
    InMemoryStore,
    Measurement,
    SubsetResult,
    Trial,
)
from coterie.service.ray_head import start_head

SPEC: dict[str, Any] = {
    "dataset": {"source": "digits", "options": {"samples": 50}},
    "search": {"families": ["shared"], "space": {"shared": {"width": 8, "depth": 1, "batch_size": 64}}},
    "budget": {"epochs": 1, "concurrent": 1},
}
READY_SECONDS = 60
ON_THE_FRONT = 10_000
AT_THE_RUNG = 2_000
REPORTS = 200  # timed ones
QUESTIONS = 5  # to Optuna, at seconds each


def time_service(trials: int) -> float:
    """Seconds a trial through a server of its own."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        serve = ["serve", f"--port={port}", f"--data-dir={folder}"]
        server = subprocess.Popen(
            [sys.executable, "-m", "coterie.service.cli", *serve], stdout=subprocess.DEVNULL
        )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
                wait_until_ready(http)
                spec = SPEC | {"budget": SPEC["budget"] | {"trials": trials}}
                job = http.post("/v1/jobs", json=spec).raise_for_status().json()["id"]
                while (found := http.get(f"/v1/jobs/{job}").json())["state"] in ("queued", "running"):
                    time.sleep(0.5)  # rarely, so that the question costs the job little
                if found["state"] != "succeeded":
                    raise SystemExit(f"the job {found['state']}: {found['reason']}")
                ends = [
                    datetime.fromisoformat(trial["ended_at"])
                    for trial in http.get(f"/v1/jobs/{job}/trials", params={"limit": 1000}).json()["items"]
                ]
        finally:
            server.terminate()
            server.wait()
    return (max(ends) - min(ends)).total_seconds() / (len(ends) - 1)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_until_ready(http: httpx.Client) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        try:
            if http.get("/readyz").is_success:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.1)
    raise SystemExit("the server did not come up")


def time_tune(trials: int, work: str) -> float:
    """Seconds a trial of plain Ray Tune, in a process and on a head of its own."""
    with tempfile.TemporaryDirectory() as folder:
        head = start_head(Path(folder), num_cpus=2)
        try:
            answer = subprocess.run(
                [sys.executable, __file__, "--tune", str(trials), work, folder],
                env={**os.environ, **head.environment()},
                stdout=subprocess.PIPE,
                check=True,
                text=True,
            )
        finally:
            head.stop()
    return float(json.loads(answer.stdout.splitlines()[-1]))


def run_tune(trials: int, work: str, folder: str) -> None:
    """The process of `time_tune`."""
    import logging

    import ray
    from optuna.distributions import FloatDistribution
    from ray import tune
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    from coterie.search.trial import Assignment, Training, make_bench

    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    ends: list[float] = []

    class Ends(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            ends.append(time.perf_counter())

    class Nothing(tune.Trainable):
        def reset_config(self, new_config: dict[str, Any]) -> bool:
            return True

        def step(self) -> dict[str, Any]:
            return {"value": self.config["lr"], "done": True}

    class SameWork(Nothing):
        def setup(self, config: dict[str, Any]) -> None:
            plan = make_plan(JobSpec.model_validate(SPEC | {"budget": {"trials": 1, "epochs": 1}}))
            self.bench = make_bench(plan.tasks, plan.source.load(plan.options), cpus=1, gpus=0)
            self.yardstick = even_yardstick(plan)

        def step(self) -> dict[str, Any]:
            recipe = {"width": 8, "depth": 1, "batch_size": 64, **self.config}
            candidate = Candidate(family="shared", backbone="mlp", parameters=recipe)
            assignment = Assignment(trial_id=self.trial_id, candidate=candidate, seed=0, epochs=1)
            training = Training(assignment, self.bench, self.yardstick)
            training.run_epoch()
            kept = Path(folder, "kept", self.trial_id)
            kept.mkdir(parents=True)
            return {"value": training.finish(kept).values["delta_m"], "done": True}

    choice: dict[str, Any] = {"max_concurrent_trials": 1}
    space: dict[str, Any] = {"lr": tune.loguniform(1e-4, 3e-2), "weight_decay": tune.loguniform(1e-7, 1e-2)}
    if work == "optuna":
        ranges = {"lr": (1e-4, 3e-2), "weight_decay": (1e-7, 1e-2)}
        optuna_space = {name: FloatDistribution(*ends, log=True) for name, ends in ranges.items()}
        search = OptunaSearch(optuna_space, metric="value", mode="max")
        choice, space = {"search_alg": ConcurrencyLimiter(search, max_concurrent=1)}, {}
    ray.init(address=os.environ["RAY_ADDRESS"], logging_level="WARNING")
    tune.Tuner(
        tune.with_resources(Nothing if work == "nothing" else SameWork, {"cpu": 1}),
        param_space=space,
        tune_config=tune.TuneConfig(num_samples=trials, reuse_actors=True, **choice),
        run_config=tune.RunConfig(
            storage_path=str(Path(folder, "results")),
            verbose=0,
            callbacks=[Ends()],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    ).fit()
    print(json.dumps((ends[-1] - ends[0]) / (len(ends) - 1)))


def even_yardstick(plan: Plan) -> Yardstick:
    """One that nothing was trained for."""
    ones = {task.name: dict.fromkeys(KIND_METRICS[task.kind], 1.0) for task in plan.tasks}
    return Yardstick(validation=ones, test=ones, costs={})


def compare_trials(trials: int, rounds: int) -> None:
    kinds = {
        "service": lambda: time_service(trials),
        "tune with optuna, same work": lambda: time_tune(trials, "optuna"),
        "tune, same work": lambda: time_tune(trials, "same"),
        "tune, nothing": lambda: time_tune(trials, "nothing"),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds):
        for kind, measure in kinds.items():
            seconds[kind].append(measure())
            print(f"round {number + 1}, {kind}: {1000 * seconds[kind][-1]:.1f} ms a trial", flush=True)
    for other in list(kinds)[1:]:
        ratios = [ours / theirs for ours, theirs in zip(seconds["service"], seconds[other], strict=True)]
        print(f"service / {other}: {median(ratios):.2f} (median of {rounds} pairs)")


def timed(action: Callable[[], object]) -> float:
    """Its milliseconds."""
    began = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - began)


def in_words(milliseconds: Sequence[float]) -> str:
    return f"median {median(milliseconds):8.3f} ms, p95 {np.percentile(milliseconds, 95):8.3f} ms"


def random_values(objectives: int, number: int, *, one_front: bool) -> Iterator[dict[str, float]]:
    """Values to minimise: anywhere in the unit cube, or all of them on one front."""
    found_ND = np.random.default_rng(0).random((number, objectives))
    if one_front:
        found_ND = 1 - found_ND / np.linalg.norm(found_ND, axis=1, keepdims=True)
    for found_D in found_ND.tolist():
        yield {f"metric_{index}": value for index, value in enumerate(found_D)}


def named_objectives(number: int) -> list[tuple[str, Direction]]:
    return [(f"metric_{index}", Direction.MINIMIZE) for index in range(number)]


def compare_fronts() -> None:
    objectives = named_objectives(3)
    for one_front in (True, False):
        front = Front(objectives, {metric: 1.1 for metric, _ in objectives})
        study = optuna.create_study(directions=["minimize"] * len(objectives))
        ours: list[float] = []
        theirs: list[float] = []
        trials = random_values(len(objectives), ON_THE_FRONT + REPORTS, one_front=one_front)
        for number, values in enumerate(trials):
            insert = partial(front.insert, str(number), values)
            if number < ON_THE_FRONT:
                insert()
            else:
                ours.append(timed(insert))
            if len(theirs) < QUESTIONS:
                study.add_trial(optuna.trial.create_trial(values=[*values.values()]))
            if number >= ON_THE_FRONT and len(theirs) < QUESTIONS:
                theirs.append(timed(lambda study=study: study.best_trials))
        print(f"one more of {ON_THE_FRONT} trials, {len(front.points)} on the front in the end")
        print(f"  insertion with hypervolume  {in_words(ours)}")
        print(f"  study.best_trials           {in_words(theirs)}")
        print(f"  ratio of the medians        {median(theirs) / median(ours):.0f}", flush=True)


def time_reports() -> None:
    print(f"one more report beside {AT_THE_RUNG} at the lowest rung")
    for number in (1, 2, 3, 5):
        for one_front in (False, True) if number > 1 else (False,):
            objectives = named_objectives(number)
            scheduler = make_scheduler(SchedulerSpec(name="pareto_asha"), objectives, epochs=20)
            rung = scheduler.rungs[0]
            reports: list[float] = []
            trials = random_values(number, AT_THE_RUNG + REPORTS, one_front=one_front)
            for trial, values in enumerate(trials):
                report = partial(scheduler.report, trial, rung, values)
                if trial < AT_THE_RUNG:
                    scheduler.recall(trial, rung, values)
                else:
                    reports.append(timed(report))
            where = "all on one front" if one_front else "anywhere"
            print(f"  scheduler, {number} objectives, {where:16}  {in_words(reports)}", flush=True)
    at_rungs, others = time_controller()
    print(f"  controller, at the rung, 2 objectives      {in_words(at_rungs)}")
    print(f"  controller, between rungs, 2 objectives    {in_words(others)}")


class Numbered:
    """A sampler that thinks of nothing: what it would take is no part of a report."""

    def ask(self, number: int) -> Proposal:
        candidate = Candidate(family="shared", backbone="mlp", parameters={"number": number})
        return Proposal(candidate=candidate, choices={}, origin="numbered")

    def tell(self, trial: Trial) -> None: ...

    def wanted(self, number: int) -> None: ...

    def learn(self, results: Sequence[SubsetResult]) -> None: ...

    def learn_affinity(self, result: AffinityResult) -> None: ...


def time_controller() -> tuple[list[float], list[float]]:
    """Milliseconds a report at a rung, the stop that may follow included, and a report after it."""
    search = SPEC["search"] | {"scheduler": {"name": "pareto_asha"}}
    budget = {"trials": 100_000, "epochs": 20}
    plan = make_plan(JobSpec.model_validate(SPEC | {"search": search, "budget": budget}))
    store = InMemoryStore()
    at_rungs, others = [], []
    with tempfile.TemporaryDirectory() as folder, Recorder(store) as recorder:
        resumed = store.resume()
        controller = SearchController(
            plan,
            resumed,
            {},
            recorder,
            FolderArtifacts(Path(folder)),
            Ledger(plan.spec.budget, resumed),
            Numbered(),
            make_scheduler(plan.spec.search.scheduler, plan.objectives, plan.spec.budget.epochs),
            {"delta_m": -100.0, "macs": 1e6},
            concurrent=1,
        )

        def report(run_id: str, epoch: int, values: Mapping[str, float]) -> None:
            measurement = Measurement(
                epoch=epoch,
                values={"delta_m": -values["metric_0"], "macs": values["metric_1"]},
                tasks={},
                device_seconds=float(epoch),
                worker="here:1",
            )
            if not controller.measured(run_id, measurement):
                controller.stopped(run_id)
                running.discard(run_id)

        running: set[str] = set()
        for number, values in enumerate(random_values(2, AT_THE_RUNG + REPORTS, one_front=False)):
            order = controller.suggest()
            assert order is not None
            controller.started(order.id)
            running.add(order.id)
            counts = number >= AT_THE_RUNG
            if counts:
                recorder.flush()  # so that its thread takes no part of what is timed
            at_rung = timed(partial(report, order.id, 1, values))
            if order.id in running:
                between = timed(partial(report, order.id, 2, values))
                controller.stopped(order.id)
                if counts:
                    others.append(between)
            if counts:
                at_rungs.append(at_rung)
    return at_rungs, others


def main() -> None:
    if sys.argv[1:2] == ["--tune"]:
        run_tune(int(sys.argv[2]), sys.argv[3], sys.argv[4])
        return
    sections: dict[str, Callable[[], None]] = {
        "trial": lambda: compare_trials(arguments.trials, arguments.rounds),
        "front": compare_fronts,
        "report": time_reports,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sections", nargs="*", default=[*sections], metavar="SECTION", choices=[*sections])
    parser.add_argument("--trials", type=int, default=100, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for section in arguments.sections:
        sections[section]()


if __name__ == "__main__":
    main()
