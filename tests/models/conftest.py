from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings

from coterie.models.tasks import Task, TaskKind, TaskSet

settings.register_profile("models", deadline=None, max_examples=50)
settings.load_profile("models")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make_tasks() -> Callable[..., TaskSet]:
    """Binary tasks a, b, c, ... of the given weights."""

    def make(*weights: float) -> TaskSet:
        return TaskSet(
            Task(name=name, kind=TaskKind.BINARY, weight=weight)
            for name, weight in zip("abcdefgh"[: len(weights)], weights, strict=True)
        )

    return make
