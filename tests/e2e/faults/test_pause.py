"""A job that is paused while it runs frees its devices and loses nothing."""

import time
from typing import Any

import pytest

from tests.e2e.faults.conftest import alive

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

TRIALS, EPOCHS = 2, 40
SPEC: dict[str, Any] = {
    "name": "paused",
    "dataset": {"source": "digits", "options": {"samples": 4000}},
    "search": {"families": ["shared"], "sampler": {"name": "random"}},
    "budget": {"trials": TRIALS, "epochs": EPOCHS, "concurrent": 1},
}


def test_a_paused_job_frees_its_devices_within_seconds_and_goes_on_from_its_checkpoint(server: Any) -> None:
    job = server.submit(SPEC)
    trial = server.wait_for(lambda: server.running_trial(job))
    [(driver,)] = server.sql("SELECT driver FROM attempts WHERE job_id = ?", job)

    began = time.monotonic()
    assert server.http.post(f"/v1/jobs/{job}/pause").json()["state"] == "paused"
    server.wait_for(lambda: not any(alive(worker) for worker in (trial["worker"], driver)), 10)
    print(f"all processes of the paused job were gone after {time.monotonic() - began:.1f} s")
    assert (server.data_dir / "jobs" / job / "checkpoints").exists()
    before = server.get(f"/v1/jobs/{job}")
    reached = server.get(f"/v1/trials/{trial['id']}")
    assert (reached["state"], before["progress"]["trials"]["running"]) == ("pending", 0)
    kept = server.measurements(trial["id"])

    # What it gave up is another job's to use.
    other = server.submit(SPEC | {"name": "meanwhile", "budget": {"trials": 1, "epochs": 1}})
    assert server.wait_until_over(other)["state"] == "succeeded"
    # Time in which it was paused is not charged.
    assert server.get(f"/v1/jobs/{job}") == before

    assert server.http.post(f"/v1/jobs/{job}/resume").json()["state"] == "queued"
    assert server.wait_until_over(job)["state"] == "succeeded"
    assert [found["state"] for found in server.trials(job)] == ["completed"] * TRIALS
    measured = server.measurements(trial["id"])
    assert [found["epoch"] for found in measured] == list(range(1, EPOCHS + 1))
    assert measured[: len(kept) - 1] == kept[:-1]  # the last one may have come before its checkpoint
    [(attempts,)] = server.sql("SELECT count(*) FROM attempts WHERE job_id = ?", job)
    assert attempts == 2
