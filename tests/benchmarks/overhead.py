"""Seconds a trial beyond its training: the whole service beside plain Ray Tune, in one run.

    python tests/benchmarks/overhead.py [TRIALS] [ROUNDS]

Both sides run trials one at a time on actors that are kept alive (`reuse_actors`), each on a Ray head of its
own, in turns. Four kinds of trial are timed, each as the mean time from the first trial's end to the last's:

- `service`: a candidate that does next to nothing (30 samples, 8 neurons, 1 epoch), from HTTP to SQL:
  proposed by TPE, trained, checkpointed, measured, exported to files, placed on the front.
- `tune with optuna, same work`: plain Ray Tune with its own Optuna search (TPE), the same training and
  export, and no database, no checkpoint, no front.
- `tune, same work`: that without Optuna, random candidates drawn in advance.
- `tune, nothing`: plain Ray Tune with a step that returns at once. Its result files are off, which favours
  it.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from coterie.service.ray_head import start_head

SPEC: dict[str, Any] = {
    "dataset": {"source": "digits", "options": {"samples": 50}},
    "search": {"families": ["shared"], "space": {"shared": {"width": 8, "depth": 1, "batch_size": 64}}},
    "budget": {"epochs": 1, "concurrent": 1},
}
READY_SECONDS = 60


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

    from coterie.models.tasks import KIND_METRICS
    from coterie.search.objective import Yardstick
    from coterie.search.plan import make_plan
    from coterie.search.spec import JobSpec
    from coterie.search.store import Candidate
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
            ones = {task.name: dict.fromkeys(KIND_METRICS[task.kind], 1.0) for task in plan.tasks}
            self.yardstick = Yardstick(validation=ones, test=ones, costs={})

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


def main() -> None:
    if sys.argv[1:2] == ["--tune"]:
        run_tune(int(sys.argv[2]), sys.argv[3], sys.argv[4])
        return
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
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


if __name__ == "__main__":
    main()
