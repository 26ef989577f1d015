"""The job's yardstick: single-task networks of the default width and recipe, three fixed seeds.

They are shared by every job that needs the same, so a job trains only those that no other has trained.
"""

import json
from collections.abc import Mapping
from statistics import fmean

from coterie.models.metrics import YARDSTICK_FLOOR
from coterie.models.tasks import CLASSIFICATION, KIND_METRICS, Direction
from coterie.search.objective import COSTS, METRICS, Yardstick
from coterie.search.plan import Plan, measure_size
from coterie.search.space import RECIPE, backbone_dimensions, recipe_of, sizes_of
from coterie.search.store import Candidate, Reference, ReferenceKey

YARDSTICK_SEEDS = (0, 1, 2)

# What is worse than this adds nothing to the hypervolume; costs are in multiples of the yardstick's.
WORST_MEASURED_COST = 10.0
WORST_SIZE = 1.1  # in multiples of the largest network, so that it adds some volume itself
WORST_GAIN = -300.0  # errors four times those of the yardstick
WORST_DISTANCE = 4.0  # so in multiples of the yardstick's
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
    sizes, recipe = sizes_of(candidate), recipe_of(candidate)
    return [
        ReferenceKey(
            data=plan.data_fingerprint,
            task=task.name,
            backbone=json.dumps([candidate.backbone, sizes], sort_keys=True),
            # On a GPU networks are trained in another precision, and answer in another time.
            recipe=json.dumps({**recipe, "gpu": plan.spec.resources.gpus > 0}, sort_keys=True),
            epochs=plan.spec.budget.epochs,
            seed=seed,
        )
        for seed in YARDSTICK_SEEDS
        for task in plan.tasks
    ]


def make_yardstick(plan: Plan, references: Mapping[ReferenceKey, Reference]) -> Yardstick:
    """Average the references over their seeds."""

    def mean(split: str) -> dict[str, dict[str, float]]:
        return {
            task.name: {
                metric: fmean(
                    getattr(reference, split)[metric]
                    for key, reference in references.items()
                    if key.task == task.name
                )
                for metric in KIND_METRICS[task.kind]
            }
            for task in plan.tasks
        }

    seeds = len(YARDSTICK_SEEDS)
    return Yardstick(
        validation=mean("validation"),
        test=mean("test"),
        costs={
            **measure_size(yardstick_candidate(plan), plan.input_shape, plan.tasks),
            "latency_ms": sum(reference.latency_ms for reference in references.values()) / seeds,
            "train_device_seconds": sum(reference.device_seconds for reference in references.values())
            / seeds,
        },
    )


def make_reference_point(plan: Plan, yardstick: Yardstick) -> dict[str, float]:
    """The worst values that count in the hypervolume, fixed for the job before its first trial.

    macs, params and peak memory: a little above the largest network in the space, so every candidate counts.
    Times: ten times the yardstick's. Gains: -300 %. A task's own metrics: 0 where more is better, else every
    answer wrong, or four times the yardstick's distance.
    """
    largest = plan.largest_cost()
    own = {
        f"task.{task.name}.{metric}": _worst(metric, direction, yardstick.validation[task.name][metric])
        for task in plan.tasks
        for metric, direction in KIND_METRICS[task.kind].items()
    }
    point = {}
    for metric, _ in plan.objectives:
        if metric in largest:
            point[metric] = WORST_SIZE * largest[metric]
        elif metric in COSTS:
            point[metric] = WORST_MEASURED_COST * yardstick.costs[metric]
        elif metric == "total_error":
            point[metric] = 100 * WORST_ERROR * sum(task.kind in CLASSIFICATION for task in plan.tasks)
        else:
            point[metric] = WORST_GAIN if metric in METRICS else own[metric]
    return point


def _worst(metric: str, direction: Direction, reference: float) -> float:
    if direction is Direction.MAXIMIZE:
        return 0.0
    return WORST_ERROR if metric == "error" else WORST_DISTANCE * max(reference, YARDSTICK_FLOOR)
