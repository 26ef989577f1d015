from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

from coterie.models.tasks import KIND_METRICS, Task, TaskKind, TaskSet
from coterie.search.data.base import Dataset
from coterie.search.data.digits import Digits, DigitsOptions
from coterie.search.objective import Yardstick
from coterie.search.spec import JobSpec

settings.register_profile("search", deadline=None, max_examples=50)
settings.load_profile("search")

SAMPLES = 300


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make_tasks() -> Callable[[int], TaskSet]:
    """That many binary tasks: a, b, c, ..."""

    def make(number: int) -> TaskSet:
        return TaskSet(Task(name=name, kind=TaskKind.BINARY) for name in "abcdefghij"[:number])

    return make


@pytest.fixture(scope="session")
def make_job() -> Callable[..., JobSpec]:
    """A job of three trials of two epochs on 300 samples, but for the fields that are given."""

    def make(**fields: Any) -> JobSpec:
        document = {
            "dataset": {"source": "digits", "options": {"samples": SAMPLES}},
            "budget": {"trials": 3, "epochs": 2},
        }
        return JobSpec.model_validate(document | fields)

    return make


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return Digits.load(DigitsOptions(samples=SAMPLES))


@pytest.fixture(scope="session")
def yardstick() -> Yardstick:
    """One that nothing was trained for."""

    def each(value: float) -> dict[str, dict[str, float]]:
        return {name: dict.fromkeys(KIND_METRICS[TaskKind.BINARY], value) for name in Digits.tasks().names}

    return Yardstick(
        validation=each(0.2),
        test=each(0.25),
        costs={"latency_ms": 0.1, "train_device_seconds": 1.0} | dict.fromkeys(("macs", "params"), 1000.0),
    )
