"""The job's yardstick: single-task networks of the default width and recipe, three fixed seeds.

They are shared by every job that needs the same, so a job trains only those that no other has trained.
"""

import json
from collections.abc import Mapping
from statistics import fmean

from coterie.models.backbones import BACKBONES
from coterie.models.cost import count_cost
from coterie.models.families import build_network
from coterie.search.objective import COSTS, METRICS, Yardstick
from coterie.search.plan import Plan
from coterie.search.space import RECIPE, backbone_dimensions
from coterie.search.store import Candidate, Reference, ReferenceKey

YARDSTICK_SEEDS = (0, 1, 2)

# What is worse than this adds nothing to the hypervolume; costs are in multiples of the yardstick's.
WORST_MEASURED_COST = 10.0
WORST_SIZE = 1.1  # in multiples of the largest single-task set, so that it adds some volume itself
WORST_GAIN = -300.0  # errors four times those of the yardstick
WORST_ERROR = 1.0


def yardstick_candidate(plan: Plan) -> Candidate:
    """Single-task networks of the default width, depth and recipe, on the job's first backbone."""
    backbone = plan.space.backbones[0]
    return Candidate(
        family="single",
        backbone=backbone,
        parameters={dim.name: dim.default for dim in (*backbone_dimensions(backbone), *RECIPE)},
    )


def yardstick_keys(plan: Plan) -> list[ReferenceKey]:
    """The networks that make up the yardstick: one a task and seed."""
    candidate = yardstick_candidate(plan)
    shape = {dim.name: candidate.parameters[dim.name] for dim in backbone_dimensions(candidate.backbone)}
    recipe = {dim.name: candidate.parameters[dim.name] for dim in RECIPE}
    return [
        ReferenceKey(
            data=plan.data_fingerprint,
            task=task.name,
            backbone=json.dumps([candidate.backbone, shape], sort_keys=True),
            recipe=json.dumps(recipe, sort_keys=True),
            epochs=plan.spec.budget.epochs,
            seed=seed,
        )
        for seed in YARDSTICK_SEEDS
        for task in plan.tasks
    ]


def make_yardstick(plan: Plan, references: Mapping[ReferenceKey, Reference]) -> Yardstick:
    """Average the references over their seeds."""

    def mean(split: str) -> dict[str, float]:
        return {
            task.name: fmean(
                getattr(reference, split)[task.metric]
                for key, reference in references.items()
                if key.task == task.name
            )
            for task in plan.tasks
        }

    candidate = yardstick_candidate(plan)
    shape = {dim.name: candidate.parameters[dim.name] for dim in backbone_dimensions(candidate.backbone)}
    network = build_network(
        "single",
        backbone=BACKBONES[candidate.backbone](input_shape=plan.input_shape, **shape),
        tasks=plan.tasks,
        parameters={},
    )
    cost = count_cost(network.prune(), plan.input_shape)
    seeds = len(YARDSTICK_SEEDS)
    return Yardstick(
        validation=mean("validation"),
        test=mean("test"),
        costs={
            "macs": cost.macs,
            "params": cost.params,
            "latency_ms": sum(reference.latency_ms for reference in references.values()) / seeds,
            "train_device_seconds": sum(reference.device_seconds for reference in references.values())
            / seeds,
        },
    )


def make_reference_point(plan: Plan, yardstick: Yardstick) -> dict[str, float]:
    """The worst values that count in the hypervolume, fixed for the job before its first trial.

    macs and params: a little above the largest single-task set in the space, so every candidate counts.
    Measured costs: ten times the yardstick's. Gains: -300 %. Errors: every answer wrong.
    """
    largest = plan.largest_cost()
    point = {}
    for metric, _ in plan.objectives:
        if metric in largest:
            point[metric] = WORST_SIZE * largest[metric]
        elif metric in COSTS:
            point[metric] = WORST_MEASURED_COST * yardstick.costs[metric]
        elif metric == "total_error":
            point[metric] = 100 * WORST_ERROR * len(plan.tasks)
        else:
            point[metric] = WORST_GAIN if metric in METRICS else WORST_ERROR
    return point
