"""A search on a real Ray: whole, resumed, and with processes killed on the way."""

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coterie.models.export import load_architecture
from coterie.search.store import Ending, JobState, Trial, TrialState
from coterie.service.ray_head import RayHead, start_head

DRIVER = Path(__file__).with_name("ray_driver.py")
TIMES = ("latency_ms", "train_device_seconds")

pytestmark = pytest.mark.timeout(120)

Outcome = dict[str, Any]
Drive = Callable[..., list[Outcome]]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    head = start_head(tmp_path_factory.mktemp("head"), num_cpus=2, object_store_bytes=80_000_000)
    yield head
    head.stop()


@pytest.fixture(scope="module")
def driver(head: RayHead, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    log = tmp_path_factory.mktemp("driver") / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-P", str(DRIVER)],
            env=os.environ | head.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        yield process
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def drive(driver: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory) -> Drive:
    """Run one of the driver's scenarios."""
    folder = tmp_path_factory.mktemp("jobs")

    def drive(scenario: str) -> list[Outcome]:
        assert driver.stdin is not None
        assert driver.stdout is not None
        driver.stdin.write(f"{scenario} {folder}\n")
        driver.stdin.flush()
        for line in driver.stdout:
            if line.startswith(str(folder)):  # Ray may have things to say too
                results: list[Outcome] = pickle.loads(Path(line.strip()).read_bytes())
                return results
        raise AssertionError("the driver ended")

    return drive


def what_happened(outcome: Outcome) -> list[Any]:
    """All of the trials but their ids, and what depends on the clock."""
    trials: list[Trial] = outcome["trials"]
    return [
        (
            trial.number,
            trial.candidate,
            trial.seed,
            trial.state,
            trial.epochs,
            ending_of(trial).reason,
            timeless(ending_of(trial).values),
            timeless(ending_of(trial).test),
            ending_of(trial).tasks,
            ending_of(trial).grouping,
            ending_of(trial).files.get("weights.safetensors"),
            [
                (replace(found, device_seconds=0.0, worker=""))
                for (trial_id, _), found in sorted(outcome["measurements"].items())
                if trial_id == trial.id
            ],
        )
        for trial in trials
    ]


def ending_of(trial: Trial) -> Ending:
    assert trial.ending is not None
    return trial.ending


def timeless(values: dict[str, float | None]) -> dict[str, float | None]:
    return {name: value for name, value in values.items() if name not in TIMES}


def numbers_on_front(outcome: Outcome) -> set[int]:
    return {trial.number for trial in outcome["trials"] if trial.id in outcome["front"]}


def workers_of(outcome: Outcome, number: int) -> set[str]:
    trial_id = outcome["trials"][number].id
    return {found.worker for (owner, _), found in outcome["measurements"].items() if owner == trial_id}


def assert_every_epoch_was_measured_once(outcome: Outcome) -> None:
    for trial in outcome["trials"]:
        epochs = sorted(epoch for trial_id, epoch in outcome["measurements"] if trial_id == trial.id)
        assert epochs == list(range(1, trial.epochs + 1))


@pytest.mark.slow
def test_the_same_job_with_the_same_seed_gives_the_same_trials_and_values(drive: Drive) -> None:
    one, other = drive("twice")
    assert one["state"] == other["state"] == (JobState.SUCCEEDED, None)
    assert [trial.state for trial in one["trials"]] == [TrialState.COMPLETED] * 5
    assert what_happened(one) == what_happened(other)
    assert one["most_unfinished"] == other["most_unfinished"] == 1
    assert numbers_on_front(one) == numbers_on_front(other) != set()
    assert [volume for _, volume in one["history"]] == [volume for _, volume in other["history"]]
    assert one["reference_point"] == other["reference_point"]
    assert one["references_trained"] == other["references_trained"] == 9  # three seeds of three tasks
    assert_every_epoch_was_measured_once(one)
    assert [trial.candidate.family for trial in one["trials"]][:3] == ["single", "shared", "dmtg"]


@pytest.mark.slow
def test_a_trial_whose_process_is_killed_goes_on_from_its_checkpoint_to_the_same_end(drive: Drive) -> None:
    expected, killed = drive("killed")
    assert killed["state"] == (JobState.SUCCEEDED, None)
    assert killed["references_trained"] == 0  # they were there
    assert [trial.crashes for trial in killed["trials"]] == [0, 1, 0, 0, 0]
    assert_every_epoch_was_measured_once(killed)
    assert what_happened(killed) == what_happened(expected)
    assert len(workers_of(killed, number=1)) == 2


@pytest.mark.slow
def test_a_trial_whose_process_is_stopped_goes_on_in_another_as_if_it_had_been_killed(drive: Drive) -> None:
    expected, stopped = drive("stopped")
    assert stopped["state"] == (JobState.SUCCEEDED, None)
    assert [trial.crashes for trial in stopped["trials"]] == [0, 1, 0, 0, 0]
    assert_every_epoch_was_measured_once(stopped)
    assert what_happened(stopped) == what_happened(expected)
    assert len(workers_of(stopped, number=1)) == 2


@pytest.mark.slow
def test_no_trial_fails_for_a_full_disk_and_the_next_attempt_goes_on(drive: Drive) -> None:
    expected, left, following = drive("full_disk")
    assert left["error"] == "DiskFull"
    assert left["state"] == (JobState.RUNNING, None)
    assert [(trial.state, trial.epochs, trial.crashes) for trial in left["trials"]] == [
        (TrialState.COMPLETED, 20, 0),
        (TrialState.RUNNING, 4, 0),
    ]
    assert following["state"] == (JobState.SUCCEEDED, None)
    assert_every_epoch_was_measured_once(following)
    assert what_happened(following) == what_happened(expected)
    assert len(workers_of(following, number=1)) == 2


@pytest.mark.slow
def test_a_trial_whose_process_is_killed_in_the_middle_of_a_reset_still_runs_once(drive: Drive) -> None:
    expected, killed = drive("killed_in_reset")
    assert killed["state"] == (JobState.SUCCEEDED, None)
    assert [trial.crashes for trial in killed["trials"]] == [0, 1, 0, 0, 0]
    assert_every_epoch_was_measured_once(killed)
    assert what_happened(killed) == what_happened(expected)


@pytest.mark.slow
def test_a_driver_that_was_replaced_stops_and_its_successor_goes_on(drive: Drive) -> None:
    expected, replaced, successor = drive("replaced")
    assert replaced["error"] == "Fenced"
    assert successor["error"] is None
    assert successor["state"] == (JobState.SUCCEEDED, None)
    assert_every_epoch_was_measured_once(successor)
    assert what_happened(successor) == what_happened(expected)


def test_a_candidate_that_raises_fails_alone_with_a_short_reason(drive: Drive) -> None:
    [outcome] = drive("broken")
    assert outcome["state"] == (JobState.SUCCEEDED, None)
    by_family = {
        family: [trial for trial in outcome["trials"] if trial.candidate.family == family]
        for family in ("dmtg", "shared", "single")
    }
    assert [trial.state for trial in by_family["shared"]] == [TrialState.COMPLETED] * 5
    for family, reason in (
        ("dmtg", "ValueError: tau: must be a number from 0.001 to 1000, found -1.0"),
        ("single", "Diverged: the training loss is (nan|inf) in epoch [12]"),
    ):
        assert by_family[family]
        for trial in by_family[family]:
            assert (trial.state, trial.crashes) == (TrialState.FAILED, 0)
            assert re.fullmatch(reason, ending_of(trial).reason or "")
    assert_every_epoch_was_measured_once(outcome)
    assert {trial.candidate.family for trial in outcome["trials"] if trial.id in outcome["front"]} == {
        "shared"
    }
    assert (
        len({found.worker for found in outcome["measurements"].values()}) == 1
    )  # none of it ended a process
    for trial in by_family["shared"]:
        files = outcome["folder"] / "trials" / trial.id
        assert {path.name for path in files.iterdir()} == set(ending_of(trial).files)
        load_architecture(files)
    assert {path.name for path in outcome["folder"].iterdir()} == {"trials"}


@pytest.mark.slow
def test_what_still_trains_when_the_time_is_up_is_stopped(drive: Drive) -> None:
    [outcome] = drive("out_of_time")
    reason = "the budget of 5 seconds is spent"
    assert outcome["state"] == (JobState.FAILED, reason)
    assert [trial.state for trial in outcome["trials"]] == [TrialState.STOPPED]
    assert ending_of(outcome["trials"][0]).reason == reason
    assert outcome["trials"][0].epochs < 10_000
    assert_every_epoch_was_measured_once(outcome)
    assert outcome["front"] == set()


@pytest.mark.slow
def test_a_trial_that_never_reports_is_ended_once_the_time_is_up(drive: Drive) -> None:
    [outcome] = drive("silent")
    assert outcome["state"] == (JobState.FAILED, "the budget of 4 seconds is spent")
    assert [trial.state for trial in outcome["trials"]] == [TrialState.STOPPED]


def test_side_runs_and_confirming_runs_go_on_beside_the_trials(drive: Drive) -> None:
    [outcome] = drive("learning")
    assert outcome["state"] == (JobState.SUCCEEDED, None)
    assert len(outcome["trials"]) == 10
    assert {len(result.tasks) for _, result in outcome["subsets"]} == {1, 2, 3, 4, 5, 6}
    assert {run.ending.state for run in outcome["confirmations"]} == {TrialState.COMPLETED}
    assert {run.ending.files for run in outcome["confirmations"] if run.ending.files} == set()
    assert outcome["verdict"] is not None
    assert outcome["side_device_seconds"] > sum(run.ending.device_seconds for run in outcome["confirmations"])
    assert {path.name for path in outcome["folder"].iterdir()} == {"trials"}
    assert {path.name for path in (outcome["folder"] / "trials").iterdir()} == {
        trial.id for trial in outcome["trials"] if trial.state is TrialState.COMPLETED
    }


def test_a_job_without_time_for_its_yardstick_says_so(drive: Drive) -> None:
    [outcome] = drive("out_of_time_for_references")
    reason = "the budget of 1 seconds is spent, before the yardstick was trained"
    assert outcome["state"] == (JobState.FAILED, reason)
    assert outcome["trials"] == []


@pytest.mark.slow
def test_as_many_trials_run_side_by_side_as_fit(drive: Drive) -> None:
    [outcome] = drive("side_by_side")
    assert outcome["state"] == (JobState.SUCCEEDED, None)
    assert [trial.state for trial in outcome["trials"]] == [TrialState.COMPLETED] * 6
    assert_every_epoch_was_measured_once(outcome)
    assert outcome["most_unfinished"] == 2  # of one CPU each, on two
