"""The families by name, and the one door to build them."""

import inspect
from collections.abc import Mapping
from typing import Any

from coterie.models.backbones import Backbone
from coterie.models.families.affinity import AffinityGrouped
from coterie.models.families.base import MultiTaskNetwork
from coterie.models.families.composed import DMTGInterroGate
from coterie.models.families.dmtg import DMTG
from coterie.models.families.etr_nlp import ETRNLP
from coterie.models.families.grouped import Grouped
from coterie.models.families.interrogate import InterroGate
from coterie.models.families.shared import Shared
from coterie.models.families.single import Single
from coterie.models.tasks import TaskSet

__all__ = [
    "DMTG",
    "ETRNLP",
    "FAMILIES",
    "AffinityGrouped",
    "DMTGInterroGate",
    "Grouped",
    "InterroGate",
    "MultiTaskNetwork",
    "Shared",
    "Single",
    "build_network",
]

FAMILIES: dict[str, type[MultiTaskNetwork]] = {
    "single": Single,
    "shared": Shared,
    "grouped": Grouped,
    "dmtg": DMTG,
    "interrogate": InterroGate,
    "etr_nlp": ETRNLP,
    "affinity": AffinityGrouped,
    "dmtg+interrogate": DMTGInterroGate,
}


def build_network(
    family: str, *, backbone: Backbone, tasks: TaskSet, parameters: Mapping[str, Any]
) -> MultiTaskNetwork:
    """Build a family's network, its weights drawn from torch's global generator: the caller seeds it.

    Args:
        family: A key of `FAMILIES`.
        backbone: What its units are.
        tasks: The job's tasks.
        parameters: The family's own keyword arguments, as its class documents them.

    Raises:
        ValueError: If the family or a parameter is unknown, one is missing, or a value is out of range.

    Example:
        >>> from coterie.models.backbones import MLP
        >>> from coterie.models.tasks import Task, TaskKind
        >>> tasks = TaskSet(Task(name=name, kind=TaskKind.BINARY) for name in ("even", "round"))
        >>> backbone = MLP(input_shape=(64,), width=24, depth=2)
        >>> network = build_network("dmtg", backbone=backbone, tasks=tasks, parameters={"groups": 2})
        >>> network.grouping.names(tasks)  # a draw, until trained
        [['even', 'round']]
    """
    if family not in FAMILIES:
        raise ValueError(f"family: must be one of {sorted(FAMILIES)}, found {family!r}")
    network = FAMILIES[family]
    accepted = {
        name: parameter
        for name, parameter in inspect.signature(network).parameters.items()
        if name not in {"backbone", "tasks"}
    }
    required = {name for name, parameter in accepted.items() if parameter.default is parameter.empty}
    if not required <= parameters.keys() <= accepted.keys():
        raise ValueError(
            f"parameters: {family!r} must have {sorted(required)} and may have "
            f"{sorted(accepted.keys() - required)}, found {sorted(parameters)}"
        )
    return network(**{"backbone": backbone, "tasks": tasks, **parameters})
