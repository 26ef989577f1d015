"""The demo's judgement, and the job that it runs. The whole of it is in tests/e2e."""

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from coterie.models.backbones import MLP
from coterie.search.spec import JobSpec
from coterie.service import demo
from coterie.service.client import Client, Job, Trial
from tests.service.live import ALL, LEFT, RIGHT, LiveServer, add_trial, live_server

MIXED = [["left_parity", "right_large"], ["left_large", "left_loop", "right_parity", "right_loop"]]


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveServer]:
    with live_server(tmp_path / "data") as server:
        yield server


@pytest.fixture
def nobody() -> Iterator[Client]:
    with Client("http://127.0.0.1:9") as client:
        yield client


def trial(client: Client, name: str, delta_m: float) -> Trial:
    values = {"delta_m": delta_m, "macs": 1000.0}
    document = {
        "id": name,
        "family": "grouped",
        "grouping": [LEFT, RIGHT],
        "values": values,
        "test": {"total_error": 30.0, **{f"task.{name}.error": 0.05 for name in ALL}},
    }
    return Trial(client, document)


def runs(client: Client, name: str, *gains: float) -> demo.Runs:
    return demo.Runs([trial(client, f"{name}{number}", gain) for number, gain in enumerate(gains)])


@pytest.mark.parametrize(
    ("grouped", "shared", "begins", "chosen"),
    [
        ((5.0, 7.0, 6.0), (4.9, 1.0, 2.0), "Recommended: the grouping {left_parity, ", "grouped1"),
        ((1.0, 2.0, 3.0), (4.0, 9.0, 3.1), "No grouping is recommended", "shared1"),
        ((5.0, 7.0, 6.0), (5.1, 1.0, 2.0), "Whether the grouping pays can't be told", "found"),
        ((5.0, 5.0, 5.0), (5.0, 5.0, 5.0), "Whether the grouping pays can't be told", "found"),
    ],
)
def test_a_side_is_recommended_only_if_each_of_its_runs_beats_all_of_the_others(
    nobody: Client,
    grouped: tuple[float, ...],
    shared: tuple[float, ...],
    begins: str,
    chosen: str,
) -> None:
    conclusion = demo.judge(
        trial(nobody, "candidate", 9.0),
        runs(nobody, "grouped", *grouped),
        runs(nobody, "shared", *shared),
        trial(nobody, "found", 9.0),
    )
    assert conclusion.sentence.startswith(begins)
    assert conclusion.trial.id == chosen


def test_the_figures_are_means_with_their_spread(nobody: Client) -> None:
    words = runs(nobody, "x", 1.0, 2.0, 3.0).describe()
    assert words == "delta_m +2.00 ± 1.00, 1,000 macs, test error 5.00%"


def test_the_best_grouping_is_a_real_one_and_on_the_front_where_one_is(live: LiveServer) -> None:
    job_id = live.submit()
    store = live.claim()
    store.set_reference_point({"delta_m": -300.0, "macs": 1e6})
    apart = [[name] for name in ALL]
    with Client(live.url) as client:
        job = client.job(job_id)
        add_trial(live, store, job_id, 0, family="single", groups=apart, delta_m=9.0)
        add_trial(live, store, job_id, 1, family="dmtg", groups=[ALL], delta_m=8.0)
        assert demo.best_grouping(job) is None
        behind = add_trial(
            live, store, job_id, 2, family="grouped", groups=MIXED, delta_m=7.0, on_front=False
        )
        assert demo.best_grouping(job).id == behind  # type: ignore[union-attr]
        front = add_trial(live, store, job_id, 3, family="dmtg", groups=[LEFT, RIGHT], delta_m=1.0)
        assert demo.best_grouping(job).id == front  # type: ignore[union-attr]


@pytest.mark.parametrize(("width", "matching"), [(8, 16), (24, 48), (48, 96), (96, None)])
def test_the_other_side_is_the_narrowest_shared_network_of_no_fewer_macs(
    live: LiveServer, width: int, matching: int | None
) -> None:
    job_id = live.submit()
    store = live.claim()
    name = add_trial(live, store, job_id, 0, family="grouped", groups=[LEFT, RIGHT], delta_m=1.0, width=width)
    with Client(live.url) as client:
        assert demo.matching_width(client.trial(name)) == matching
    assert matching is None or matching in MLP.choices["width"]


def test_the_jobs_of_the_test_train_one_candidate_each_on_fresh_seeds(live: LiveServer) -> None:
    job_id = live.submit(**built_in())
    with Client(live.url) as client:
        job = client.job(job_id)
        recipe = {"width": 24, "depth": 2, "lr": 0.0123, "weight_decay": 1e-6, "batch_size": 64}
        parameters = {**recipe, "split": 0, "grouping": [[LEFT, RIGHT]]}
        submitted = client.submit(demo.test_spec(job, "grouped", parameters)).document["spec"]
        spec = job.document["spec"]
    assert submitted["seed"] != spec["seed"]
    assert submitted["dataset"] == spec["dataset"]
    assert submitted["budget"]["epochs"] == spec["budget"]["epochs"]
    assert submitted["search"]["space"]["grouped"] == parameters


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
