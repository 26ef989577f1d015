"""Processes killed with SIGKILL at random moments of several jobs: nothing is lost, nothing comes twice."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest

from coterie.search.confirmed import summarise
from coterie.service.storage.database import Database
from coterie.service.storage.store import SqlTrialStore
from tests.e2e.faults.conftest import Server, alive, serving
from tests.e2e.faults.stories import story, without_times

# The first test that asks for them waits for all jobs, which takes some five minutes on two idle cores.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
LONGEST_JOB = 600.0

TRIALS, EPOCHS = 12, 20
CONFIRMING_SEEDS = 2
PARETO_ASHA = {"name": "pareto_asha", "eta": 2, "grace_epochs": 2}


def job_spec(seed: int, *, samples: int, concurrent: int = 1, **search: Any) -> dict[str, Any]:
    return {
        "name": "under fire",
        "dataset": {"source": "digits", "options": {"samples": samples}},
        "tasks": ["left_parity", "left_loop", "right_parity", "right_loop"],
        "search": {"families": ["single", "shared", "grouped", "affinity", "dmtg", "interrogate"]} | search,
        "budget": {"trials": TRIALS, "epochs": EPOCHS, "concurrent": concurrent},
        "confirm": {"top": 1, "seeds": CONFIRMING_SEEDS},
        "seed": seed,
    }


JOBS = {
    "with stacks": job_spec(1, samples=6000, scheduler=PARETO_ASHA),
    # Its networks can't be stacked, so it measures affinities.
    "with affinities": job_spec(2, samples=500, backbones=["cnn"]),
    # On the same data as the first one, whose subset networks and references it knows.
    "with a memory": job_spec(3, samples=6000, scheduler={"name": "asha", "eta": 2, "grace_epochs": 4}),
}
SIDE_BY_SIDE = "side by side"
OTHER = job_spec(5, samples=2000)
CONCURRENT = job_spec(4, samples=5000, concurrent=2, scheduler=PARETO_ASHA)

# What a kill ends: a process that trains, the node's raylet, the job's driver, or the whole server.
KINDS = ("trial", "raylet", "driver", "server")
ONCE_MORE = {
    "with stacks": "trial",
    "with affinities": "driver",
    "with a memory": "raylet",
    SIDE_BY_SIDE: "trial",
}
KILLS = 20
TRAINING = ("ray::TrialActor", "ray::ResourceTrainable", "ray::_train_reference")  # by process title
LAST_KILL = 0.8  # of a job's steps: behind that it could be over first
LONGEST_DELAY = 0.3  # s: several epochs, so that a kill does not follow on what it waits for

ROUNDING = 1e-6  # s, of sums
LONGEST_LAG = 0.5  # s, of what is recorded behind what happens


@dataclass(frozen=True)
class Kill:
    """One to come: its kind, at how many of its job's steps, and how many seconds later."""

    kind: str
    step: float
    delay: float


@dataclass(frozen=True)
class Jobs:
    """Jobs that ended on one server: by name what it says of each, its steps, and the kills that hit it."""

    server: Server
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    kills: dict[str, list[str]] = field(default_factory=dict)

    def run(self, name: str, spec: dict[str, Any], kills: list[Kill]) -> None:
        server = self.server
        job = server.submit(spec)
        before = steps_of(server)  # nothing is trained for some seconds
        self.kills[name] = []
        for kill in kills:
            server.wait_for(
                lambda kill=kill: is_over(server, job) or steps_of(server) >= before + kill.step, LONGEST_JOB
            )
            time.sleep(kill.delay)
            while not is_over(server, job):
                if strike(server, job, kill.kind):
                    self.kills[name].append(kill.kind)
                    break
                time.sleep(0.01)
        self.found[name] = server.wait_until_over(job, LONGEST_JOB)
        self.steps[name] = steps_of(server) - before


def story_of(jobs: Jobs, name: str) -> dict[str, Any]:
    return story(jobs.server, jobs.found[name]["id"])


def steps_of(server: Server) -> int:
    """Everything that was trained and recorded so far, about as much as it took."""
    [(steps,)] = server.sql(
        """
        SELECT (SELECT count(*) FROM reference_networks) + (SELECT count(*) FROM measurements)
            + (SELECT count(*) FROM subset_networks) + (SELECT count(*) FROM affinities)
            + ? * (SELECT count(*) FROM confirmations)
        """,
        EPOCHS,
    )
    return int(steps)


def is_over(server: Server, job: str) -> bool:
    return server.sql("SELECT 1 FROM jobs WHERE id = ? AND ended_at IS NOT NULL", job) == [(1,)]


def draw_kills(name: str, steps: float) -> list[Kill]:
    """Each kind once, and one of them once more, spread over the job.

    A killed server's driver goes on until the next server ends it, and may end a job that was nearly over: so
    the server is killed in its first half, or last.
    """
    rng = Random(name)
    kinds = [*KINDS, ONCE_MORE[name]]
    rng.shuffle(kinds)
    while kinds.index("server") == len(kinds) - 2:
        rng.shuffle(kinds)
    shares = [LAST_KILL * (place + rng.random()) / len(kinds) for place in range(len(kinds))]
    return [
        Kill(kind, share * steps, rng.uniform(0, LONGEST_DELAY))
        for kind, share in zip(kinds, shares, strict=True)
    ]


def strike(server: Server, job: str, kind: str) -> bool:
    """Kill a process of that kind if the job runs and has one."""
    if server.sql("SELECT 1 FROM jobs WHERE id = ? AND state = 'running'", job) != [(1,)]:
        return False
    if kind == "server":
        orphans = server.ray_marker()
        server.kill()
        server.start()
        server.wait_for(lambda: server.ray_marker() not in (orphans, None))
        return True
    victims = [process for process in server.ray_processes() if is_kind(server, job, process, kind)]
    if not victims:
        return False
    victims[0].kill()
    server.wait_for(lambda: not alive(f":{victims[0].pid}"), 10)
    return True


def is_kind(server: Server, job: str, process: psutil.Process, kind: str) -> bool:
    try:
        if kind == "raylet":
            return process.name() == "raylet"
        if kind == "trial":
            return " ".join(process.cmdline()).startswith(TRAINING)
    except psutil.NoSuchProcess:
        return False
    query = "SELECT driver FROM attempts WHERE job_id = ? ORDER BY attempt DESC LIMIT 1"
    [(driver,)] = server.sql(query, job)
    return str(driver).endswith(f":{process.pid}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """The jobs on a server without faults."""
    with serving(tmp_path_factory.mktemp("undisturbed")) as server:
        jobs = Jobs(server)
        for name, spec in JOBS.items():
            jobs.run(name, spec, kills=[])
    return jobs


@pytest.fixture(scope="module")
def under_fire(undisturbed: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """The same jobs in the same order on another server, and one whose trials run side by side."""
    with serving(tmp_path_factory.mktemp("under_fire")) as server:
        jobs = Jobs(server)
        for name, spec in JOBS.items():
            jobs.run(name, spec, draw_kills(name, undisturbed.steps[name]))
        # About as many steps as its like, but its trials may stop earlier.
        jobs.run(SIDE_BY_SIDE, CONCURRENT, draw_kills(SIDE_BY_SIDE, 0.8 * undisturbed.steps["with stacks"]))
        yield jobs


def test_processes_of_each_kind_were_killed_while_their_jobs_ran(under_fire: Jobs) -> None:
    print(f"kills: {under_fire.kills}")
    for name, kinds in under_fire.kills.items():
        assert Counter(kinds) == Counter([*KINDS, ONCE_MORE[name]])
    assert sum(map(len, under_fire.kills.values())) == KILLS
    given_up = {row["reason"] for row in under_fire.server.rows("SELECT reason FROM attempts")}
    assert given_up >= {
        "the server was restarted",
        "Ray ended",
        "its driver ended early (Ray says FAILED)",
        None,
    }
    assert under_fire.server.sql("SELECT sum(crashes) FROM trials") > [(0,)]


@pytest.mark.parametrize("name", JOBS)
def test_a_job_under_fire_finds_what_it_finds_undisturbed(
    undisturbed: Jobs, under_fire: Jobs, name: str
) -> None:
    expected, found = (story_of(jobs, name) for jobs in (undisturbed, under_fire))
    assert found["job"]["state"] == "succeeded"
    for part in expected:
        assert found[part] == expected[part], part


def test_the_jobs_do_all_that_a_kill_could_disturb(undisturbed: Jobs) -> None:
    """What the test above compares is there to be compared."""
    stories = {name: story_of(undisturbed, name) for name in JOBS}
    states = {trial["state"] for found in stories.values() for trial in found["trials"]}
    assert states == {"completed", "stopped"}
    origins = {trial["origin"] for found in stories.values() for trial in found["trials"]}
    assert origins > {"baseline", "grouping"}
    assert all(found["confirmations"] and found["job"]["verdict"] for found in stories.values())
    assert stories["with stacks"]["subsets"]
    assert stories["with affinities"]["affinities"]
    assert undisturbed.server.sql("SELECT DISTINCT attempt FROM attempts") == [(1,)]


@pytest.mark.parametrize("name", [*JOBS, SIDE_BY_SIDE])
def test_no_trial_and_no_epoch_is_lost_or_comes_twice(under_fire: Jobs, name: str) -> None:
    job, server = under_fire.found[name]["id"], under_fire.server
    found = story_of(under_fire, name)
    trials = found["trials"]
    assert [trial["number"] for trial in trials] == list(range(TRIALS))
    assert {trial["state"] for trial in trials} <= {"completed", "stopped"}
    for trial in trials:
        measured = [row["epoch"] for row in found["measurements"] if row["number"] == trial["number"]]
        assert measured == list(range(1, trial["epochs"] + 1))
        assert (trial["state"] == "completed") == (trial["epochs"] == EPOCHS)
    completed = {trial["number"]: trial["values"] for trial in trials if trial["state"] == "completed"}
    assert {row["number"] for row in found["history"]} == completed.keys()
    assert len(found["history"]) == len(completed)
    assert {trial["number"] for trial in trials if trial["on_front"]} == naive_front(completed)
    assert found["history"][-1]["size"] == len(naive_front(completed))
    assert found["history"][-1]["hypervolume"] == under_fire.found[name]["hypervolume"]
    confirmed = Counter((row["number"], row["role"]) for row in found["confirmations"])
    assert set(confirmed.values()) == {CONFIRMING_SEEDS}

    kept = server.rows("SELECT id, files FROM trials WHERE job_id = ? AND state = 'completed'", job)
    folder = server.data_dir / "jobs" / job
    for row in kept:
        for file, about in row["files"].items():
            content = (folder / "trials" / row["id"] / file).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (about["size"], about["sha256"])
    assert not (folder / "checkpoints").exists()


def naive_front(values: dict[int, dict[str, float]]) -> set[int]:
    losses = {number: (-found["delta_m"], found["macs"]) for number, found in values.items()}

    def dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    return {
        number
        for number, loss in losses.items()
        if not any(dominates(other, loss) for other in losses.values())
    }


@pytest.mark.parametrize("name", [*JOBS, SIDE_BY_SIDE])
def test_the_ledger_charges_each_second_once(under_fire: Jobs, name: str) -> None:
    server, found = under_fire.server, under_fire.found[name]
    job, used = found["id"], found["progress"]["budget"]
    trials = server.rows("SELECT id, state, device_seconds FROM trials WHERE job_id = ?", job)
    attempts = server.rows("SELECT * FROM attempts WHERE job_id = ? ORDER BY attempt", job)

    # Attempts don't overlap, and time between them is not charged.
    times = [[datetime.fromisoformat(row[end]) for end in ("started_at", "last_seen_at")] for row in attempts]
    assert all(last_seen <= started for (_, last_seen), (started, _) in pairwise(times))
    seconds = [row["seconds"] for row in attempts]
    for (started, last_seen), charged in zip(times, seconds, strict=True):
        assert 0 <= charged == pytest.approx((last_seen - started).total_seconds(), abs=LONGEST_LAG)
    assert used["seconds"]["used"] == pytest.approx(sum(seconds))

    # A trial costs what its epochs cost, plus the export of what has completed.
    for trial in trials:
        costs = [
            row["device_seconds"]
            for row in server.rows(
                "SELECT device_seconds FROM measurements WHERE trial_id = ? ORDER BY epoch", trial["id"]
            )
        ]
        assert all(0 < before < after for before, after in pairwise(costs))
        assert costs[-1] < trial["device_seconds"] or trial["state"] == "stopped"
        assert costs[-1] == trial["device_seconds"] or trial["state"] == "completed"

    # Beside the trials an attempt is charged what it has recorded, each thing once.
    for charged, itemised, most_others in side_charges(under_fire, name):
        assert itemised - ROUNDING <= charged <= itemised + most_others + ROUNDING

    side = sum(attempt["side_device_seconds"] for attempt in attempts)
    total = sum(trial["device_seconds"] for trial in trials) + side
    assert used["device_seconds"]["used"] == pytest.approx(total)
    assert total <= (os.cpu_count() or 1) * sum(seconds)  # no more than what could be reserved
    assert used["trials"]["used"] == TRIALS
    assert used["failures"]["used"] == 0


def side_charges(jobs: Jobs, name: str) -> list[tuple[float, float, float]]:
    """By attempt: what it was charged, what its references and confirming runs cost, and others at the most.

    Subset networks and affinities don't say what they cost: at the most the time since something else was
    recorded that did not run beside them.
    """
    server, job = jobs.server, jobs.found[name]["id"]
    attempts = server.rows("SELECT * FROM attempts WHERE job_id = ? ORDER BY attempt", job)
    itemised = server.rows(
        """
        SELECT at, device_seconds FROM confirmations WHERE job_id = ?
        UNION ALL SELECT at, device_seconds FROM reference_networks
        """,
        job,
    )
    others = server.rows(
        """
        SELECT min(at) AS at FROM subset_networks WHERE job_id = ? GROUP BY run
        UNION ALL SELECT at FROM affinities WHERE job_id = ?
        """,
        job,
        job,
    )
    measured = [] if name == SIDE_BY_SIDE else server.rows("SELECT at FROM measurements")
    moments = [row["at"] for row in (*itemised, *others, *measured)]
    moments += [row["started_at"] for row in attempts]

    def longest(at: str) -> float:
        before = max(moment for moment in moments if moment < at)
        return (datetime.fromisoformat(at) - datetime.fromisoformat(before)).total_seconds() + LONGEST_LAG

    return [
        (
            row["side_device_seconds"],
            sum(item["device_seconds"] for item in itemised if began <= item["at"] <= ended),
            sum(longest(other["at"]) for other in others if began <= other["at"] <= ended),
        )
        for row in attempts
        for began, ended in [(row["started_at"], row["ended_at"])]
    ]


def test_a_search_in_python_finds_what_a_server_finds(undisturbed: Jobs, tmp_path: Path) -> None:
    name = "with stacks"
    program, found = Path(__file__).with_name("search_in_python.py"), tmp_path / "found.json"
    subprocess.run(
        [sys.executable, program, tmp_path / "networks", found],
        input=json.dumps(JOBS[name]),
        text=True,
        check=True,
    )
    told, expected = json.loads(found.read_text()), story_of(undisturbed, name)
    for trial in told["trials"]:
        trial |= {column: without_times(value) for column, value in trial.items()}
        trial["files"] = trial["files"].get("weights.safetensors")
    assert told["trials"] == expected["trials"]
    assert told["history"] == [
        {column: row[column] for column in ("number", "hypervolume")} for row in expected["history"]
    ]
    assert told["job"] == {column: expected["job"][column] for column in told["job"]}
    for summary in told["confirmed"].values():
        summary |= {split: without_times(summary[split]) for split in ("validation", "test")}
    assert told["confirmed"] == summaries(undisturbed, name)


def summaries(jobs: Jobs, name: str) -> dict[str, Any]:
    """What the server makes of a job's confirming runs, as JSON; trials by their numbers."""
    database = Database(f"sqlite:///{jobs.server.data_dir / 'coterie.db'}")
    stored = SqlTrialStore(database, jobs.found[name]["id"], attempt=1).resume()
    database.close()
    numbers = {trial.id: trial.number for trial in stored.trials}
    return {
        str(numbers[trial_id]): asdict(summary)
        | {split: without_times(asdict(summary)[split]) for split in ("validation", "test")}
        for trial_id, summary in summarise(stored.confirmations).items()
    }


def test_a_cancelled_job_ends_within_seconds_and_leaves_no_process(server: Any) -> None:
    long = server.submit(OTHER | {"budget": {"trials": 1000, "epochs": 50}})
    queued = server.submit(OTHER)
    trial = server.wait_for(lambda: server.running_trial(long))
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
    following = server.submit(OTHER | {"budget": {"trials": 1, "epochs": 1}})
    assert server.wait_until_over(following)["state"] == "succeeded"


def test_a_stopped_server_leaves_no_process_and_the_next_one_goes_on(server: Any) -> None:
    job = server.submit(OTHER)
    trial = server.wait_for(lambda: server.running_trial(job))
    server.stop()
    assert not alive(trial["worker"])
    assert not (server.data_dir / "ray.json").exists()
    assert server.sql("SELECT state, attempt FROM jobs") == [("queued", 1)]
    server.start()
    assert server.wait_until_over(job)["state"] == "succeeded"
    assert len(server.trials(job)) == TRIALS
