"""What a server needs torch for: from JSON-like arguments to JSON-like results.

No server imports this: `coterie.service.planner` runs it in a process of its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from coterie.models.affinity import AFFINITY_LR
from coterie.search import catalogue as listed
from coterie.search.affinity import one_step_affinity, pairwise_affinity
from coterie.search.objective import metric_directions
from coterie.search.plan import make_plan
from coterie.search.spec import JobSpec
from coterie.search.store import AffinityResult, SubsetResult
from coterie.service.documents import Document

_CATALOGUE: Mapping[str, Callable[[], list[Document]]] = {
    "datasets": listed.datasets,
    "families": listed.families,
    "backbones": listed.backbones,
    "metrics": listed.metrics,
}


def plan_job(spec: Document) -> dict[str, str]:
    """Which way each metric of the job is better.

    Raises:
        SpecError: If the job can't be, with every fault.
    """
    return {**metric_directions(make_plan(JobSpec.model_validate(spec)).tasks)}


def tabulate_affinities(spec: Document, one_step: list[Document], subsets: list[Document]) -> Document:
    """How much a job's tasks help each other: an `AffinityTable` for each method that measured it.

    Args:
        spec: The job's.
        one_step: `AffinityResult`s.
        subsets: `SubsetResult`s.

    Raises:
        SpecError: If the job can't be any more.
    """
    tasks = make_plan(JobSpec.model_validate(spec)).tasks
    tables = {
        "one_step": one_step_affinity([AffinityResult(**result) for result in one_step], tasks),
        "pairwise": pairwise_affinity([SubsetResult(**result) for result in subsets], tasks),
    }
    return {
        "tasks": list(tasks.names),
        "step": AFFINITY_LR,
        "tables": {method: asdict(table) for method, table in tables.items() if table is not None},
    }


def catalogue(kind: str) -> list[Document]:
    """The `datasets`, `families`, `backbones` or `metrics` that a spec can name."""
    return _CATALOGUE[kind]()


def count_gpus() -> int:
    """The GPUs of this machine."""
    return torch.cuda.device_count()


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    function.__name__: function for function in (plan_job, tabulate_affinities, catalogue, count_gpus)
}
