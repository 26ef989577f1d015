"""A real server whose artifacts are in S3: nothing of a job is on its disk, and nothing is lost."""

import hashlib
import os
import signal
from pathlib import Path

import pytest

from coterie.search.artifacts import list_files, location_of
from tests.e2e.faults.conftest import alive, serving

pytestmark = pytest.mark.slow

EPOCHS = 25
SPEC = {
    "name": "in S3",
    "dataset": {"source": "digits", "options": {"samples": 2000}},
    "tasks": ["left_parity", "right_parity"],
    "search": {"families": ["single", "shared"], "sampler": {"name": "random"}},
    "budget": {"trials": 2, "epochs": EPOCHS, "concurrent": 1},
    "confirm": {"top": 1, "seeds": 2},
}


def test_a_job_goes_on_from_its_checkpoint_in_s3_and_leaves_its_networks_there(
    s3: str, tmp_path: Path
) -> None:
    with serving(tmp_path, COTERIE_ARTIFACTS=s3) as server:
        job = server.submit(SPEC)
        hit = server.wait_for(lambda: server.running_trial(job))
        os.kill(int(hit["worker"].rpartition(":")[2]), signal.SIGKILL)
        server.wait_for(lambda: not alive(hit["worker"]))
        assert server.wait_until_over(job)["state"] == "succeeded"
        trials = server.trials(job)
        [crashed] = server.sql("SELECT worker, epochs FROM trials WHERE crashes = 1 AND id = ?", hit["id"])
        assert crashed[0] != hit["worker"]
        assert [trial["state"] for trial in trials] == ["completed", "completed"]
        for trial in trials:
            measured = server.measurements(trial["id"])
            assert [found["epoch"] for found in measured] == list(range(1, EPOCHS + 1))
            answer = server.http.get(f"/v1/trials/{trial['id']}/model")
            assert answer.headers["etag"] == f'"{hashlib.sha256(answer.content).hexdigest()}"'
        assert f"{job} succeeded" in server.http.get(f"/v1/jobs/{job}/logs").text
        place = location_of(s3)

        def kept() -> set[str]:
            return {str(file.location).removeprefix(f"{place}/{job}/") for file in list_files(place / job)}

        networks = {
            f"trials/{trial['id']}/{name}"
            for trial in trials
            for name in ("architecture.json", "weights.safetensors")
        }
        server.wait_for(lambda: kept() == {*networks, "worker.log/000001"})
        assert not (server.data_dir / "jobs").exists()
        assert server.http.delete(f"/v1/jobs/{job}").status_code == 204
        assert kept() == set()
