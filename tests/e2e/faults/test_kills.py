"""Trial, driver and server killed with SIGKILL while a job runs: nothing is lost, nothing comes twice."""

import os
import signal
import time
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

TRIALS, EPOCHS = 20, 20
SPEC: dict[str, Any] = {
    "name": "under fire",
    "dataset": {"source": "digits", "options": {"samples": 2000}},
    "search": {"families": ["single", "shared", "grouped", "dmtg"]},
    "budget": {"trials": TRIALS, "epochs": EPOCHS, "concurrent": 1},
    "seed": 7,
}
TIMES = {"latency_ms", "train_device_seconds"}


def kill(worker: str) -> None:
    os.kill(int(worker.rsplit(":", 1)[1]), signal.SIGKILL)


def outcome(trial: dict[str, Any]) -> dict[str, Any]:
    """All of a trial that the same job must give again."""
    values = {
        split: {name: value for name, value in trial[split].items() if name not in TIMES}
        for split in ("values", "test")
    }
    kept = ("number", "state", "family", "candidate", "seed", "grouping", "epochs", "on_front")
    return {name: trial[name] for name in kept} | values


def running_trial(server: Any, job: str) -> dict[str, Any] | None:
    """A trial in the middle of its training, with the process that trains it."""
    for trial in server.trials(job):
        if trial["state"] == "running" and trial["worker"] and 0 < trial["epochs"] < EPOCHS - 2:
            return dict(trial)
    return None


def test_a_job_outlives_the_death_of_each_of_its_processes(server: Any) -> None:
    job = server.submit(SPEC)

    server.wait_for(lambda: len(server.ended(job)) >= 2)
    trial = server.wait_for(lambda: running_trial(server, job))
    kill(trial["worker"])
    server.wait_for(lambda: len(server.ended(job)) >= 4)

    before_driver = {trial["id"]: trial for trial in server.ended(job)}
    [(driver,)] = server.sql("SELECT driver FROM attempts WHERE job_id = ? AND attempt = 1", job)
    kill(driver)
    server.wait_for(lambda: len(server.ended(job)) >= len(before_driver) + 2)

    server.wait_for(lambda: running_trial(server, job))
    before_server = {trial["id"]: trial for trial in server.ended(job)}
    server.kill()
    time.sleep(2)
    server.start()
    restarted = time.monotonic()
    gone_on = """
        SELECT 1 FROM measurements JOIN trials ON trials.id = trial_id
        JOIN attempts ON attempts.job_id = trials.job_id
        WHERE attempts.attempt = 3 AND at > attempts.started_at
    """
    server.wait_for(lambda: server.sql(gone_on), 60)
    print(f"the job went on {time.monotonic() - restarted:.1f} s after the server's restart")

    found = server.wait_until_over(job)
    assert (found["state"], found["reason"]) == ("succeeded", None)
    trials = server.trials(job)
    assert [trial["number"] for trial in trials] == list(range(TRIALS))
    assert all(trial["state"] == "completed" for trial in trials)
    after = {trial["id"]: trial for trial in trials}
    for before in (before_driver, before_server):
        assert {name: after[name] | {"on_front": None} for name in before} == {
            name: trial | {"on_front": None} for name, trial in before.items()
        }
    for trial in trials:
        epochs = [measurement["epoch"] for measurement in server.measurements(trial["id"])]
        assert epochs == list(range(1, EPOCHS + 1))
    history = server.get(f"/v1/jobs/{job}/front/history")["items"]
    assert sorted(entry["trial_id"] for entry in history) == sorted(after)

    # Without faults the same job gives the same trials.
    undisturbed = server.submit(SPEC)
    server.wait_until_over(undisturbed)
    assert [outcome(trial) for trial in server.trials(undisturbed)] == [outcome(trial) for trial in trials]
    assert server.sql("SELECT count(*) FROM attempts WHERE job_id = ?", undisturbed) == [(1,)]


def test_the_front_that_is_stored_is_the_front_of_the_trials(server: Any) -> None:
    job = server.submit(SPEC | {"budget": {"trials": 8, "epochs": 3, "concurrent": 2}})
    server.wait_until_over(job)
    trials = {trial["id"]: trial for trial in server.trials(job)}

    def dominates(a: dict[str, Any], b: dict[str, Any]) -> bool:
        pairs = [
            (-a["values"]["delta_m"], -b["values"]["delta_m"]),
            (a["values"]["macs"], b["values"]["macs"]),
        ]
        return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)

    expected = {
        name
        for name, trial in trials.items()
        if not any(dominates(other, trial) for other in trials.values())
    }
    front = server.get(f"/v1/jobs/{job}/front")
    assert {point["trial_id"] for point in front["points"]} == expected
    assert {name for name, trial in trials.items() if trial["on_front"]} == expected
    assert front["hypervolume"] == server.get(f"/v1/jobs/{job}")["hypervolume"]


def test_a_cancelled_job_ends_within_seconds_and_leaves_no_process(server: Any) -> None:
    long = server.submit(SPEC | {"budget": {"trials": 1000, "epochs": 50}})
    queued = server.submit(SPEC)
    trial = server.wait_for(lambda: running_trial(server, long))
    [(driver,)] = server.sql("SELECT driver FROM attempts WHERE job_id = ?", long)

    began = time.monotonic()
    assert server.http.post(f"/v1/jobs/{queued}/cancel").json()["state"] == "cancelled"
    assert server.http.post(f"/v1/jobs/{long}/cancel").json()["state"] == "cancelled"
    server.wait_for(lambda: not any(alive(worker) for worker in (trial["worker"], driver)), 10)
    print(f"all processes of the cancelled job were gone after {time.monotonic() - began:.1f} s")

    assert {trial["state"] for trial in server.trials(long)} <= {"completed", "cancelled"}
    assert server.trials(queued) == []
    folder = server.data_dir / "jobs" / long
    server.wait_for(lambda: not (folder / "checkpoints").exists() and not (folder / "scratch").exists(), 10)
    following = server.submit(SPEC | {"budget": {"trials": 1, "epochs": 1}})
    assert server.wait_until_over(following)["state"] == "succeeded"


def alive(worker: str) -> bool:
    """Whether a process runs; one that has ended may wait a while for whoever adopted it to notice."""
    try:
        return psutil.Process(int(worker.rsplit(":", 1)[1])).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_stopped_server_leaves_no_process_and_the_next_one_goes_on(server: Any) -> None:
    job = server.submit(SPEC)
    trial = server.wait_for(lambda: running_trial(server, job))
    server.stop()
    assert not alive(trial["worker"])
    assert not (server.data_dir / "ray.json").exists()
    assert server.sql("SELECT state, attempt FROM jobs") == [("queued", 1)]
    server.start()
    assert server.wait_until_over(job)["state"] == "succeeded"
    assert len(server.trials(job)) == TRIALS
