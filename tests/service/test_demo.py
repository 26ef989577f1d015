"""What the demo keeps, and the job that it runs. The whole of it is in tests/e2e."""

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from coterie.search.spec import JobSpec
from coterie.search.store import Verdict, VerdictKind
from coterie.service import demo
from coterie.service.client import Client, Job
from tests.service.live import ALL, LEFT, RIGHT, LiveServer, add_trial, live_server


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveServer]:
    with live_server(tmp_path / "data") as server:
        yield server


@pytest.mark.parametrize("named", [True, False])
def test_the_network_to_keep_is_the_verdicts_or_else_the_best(named: bool, live: LiveServer) -> None:
    job_id = live.submit()
    store = live.claim()
    store.set_reference_point({"delta_m": -300.0, "macs": 1e6})
    best = add_trial(live, store, job_id, 0, family="single", groups=[[name] for name in ALL], delta_m=9.0)
    grouped = add_trial(live, store, job_id, 1, family="grouped", groups=[LEFT, RIGHT], delta_m=1.0)
    kind = VerdictKind.GROUPS if named else VerdictKind.NO_DIFFERENCE
    store.set_verdict(Verdict(kind=kind, words="So it is.", trial_id=grouped if named else None))
    with Client(live.url) as client:
        assert demo.recommended(client, client.job(job_id)).id == (grouped if named else best)


def test_leftovers_of_a_killed_demo_are_cancelled_and_nothing_else(live: LiveServer) -> None:
    leftover, other = live.submit(**built_in()), live.submit(name="mine")
    with Client(live.url) as client, demo.jobs_cancelled(client):
        assert client.job(leftover).state == "cancelled"
        assert client.job(other).state == "queued"


def test_an_interrupted_demo_cancels_its_jobs(live: LiveServer) -> None:
    def interrupted() -> None:
        with demo.jobs_cancelled(client):
            jobs.append(client.submit(built_in()))
            live.claim()
            raise KeyboardInterrupt

    jobs: list[Job] = []
    with Client(live.url) as client:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert jobs[0].refresh().state == "cancelled"


def built_in() -> dict[str, object]:
    document: dict[str, object] = yaml.safe_load(
        files("coterie.service").joinpath("demo.yaml").read_text(encoding="utf-8")
    )
    return document


def test_the_built_in_job_is_what_it_says(live: LiveServer) -> None:
    spec = JobSpec.model_validate(built_in())
    assert spec.name == demo.NAME
    assert spec.dataset.options == {"samples": 4000}
    assert spec.search.families == ["single", "shared", "grouped", "affinity", "dmtg", "interrogate"]
    assert live.submit(**built_in())
