"""The job's yardstick: single-task networks of the default width and recipe, three fixed seeds.

They are shared by every job that needs the same, so a job trains only those that no other has trained.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Literal

from coterie.models.metrics import YARDSTICK_FLOOR
from coterie.models.tasks import CLASSIFICATION, KIND_METRICS, Direction
from coterie.search.objective import (
    METRICS,
    YARDSTICK_SEEDS,
    SplitName,
    TaskValues,
    Yardstick,
)
from coterie.search.plan import MOST_REFERENCES, Plan, measure_size
from coterie.search.recipe import recipe_of
from coterie.search.space import RECIPE, backbone_dimensions, sizes_of
from coterie.search.store import COSTS, Candidate, Reference, ReferenceKey, Setting

# What is worse than this adds nothing to the hypervolume; costs are in multiples of the yardstick's.
WORST_MEASURED_COST = 10.0
WORST_SIZE = 1.1  # in multiples of the largest network, so that it adds some volume itself
WORST_GAIN = -300.0  # errors four times those of the yardstick
WORST_DISTANCE = 4.0  # so in multiples of the yardstick's
WORST_ERROR = 1.0


def sizes_key(candidate: Candidate) -> str:
    """Name a candidate's backbone and its sizes, in canonical JSON."""
    return json.dumps([candidate.backbone, sizes_of(candidate)], sort_keys=True)


def default_candidate(plan: Plan, family: Literal["single", "shared"]) -> Candidate:
    """Give the family's network of the default sizes and recipe, on the job's first backbone."""
    backbone = plan.space.backbones[0]
    return Candidate(
        family=family,
        backbone=backbone,
        parameters={dim.name: dim.default for dim in (*backbone_dimensions(backbone), *RECIPE)},
    )


def side_setting(plan: Plan) -> Setting:
    """Give the setting of what is trained beside the trials: data, and the default sizes and recipe."""
    return _setting(plan, default_candidate(plan, "shared"))


def yardstick_candidate(plan: Plan) -> Candidate:
    """Single-task networks of the default width, depth and recipe, on the job's first backbone."""
    return default_candidate(plan, "single")


def yardstick_keys(plan: Plan) -> list[ReferenceKey]:
    """The networks that make up the yardstick: one a task and seed."""
    return _reference_keys(plan, yardstick_candidate(plan))


def own_width_keys(plan: Plan) -> dict[str, list[ReferenceKey]]:
    """Give the networks that `delta_m_own_width` needs, by `sizes_key` of every size in the space.

    They are trained by the default recipe, so those of the default size are the yardstick's. Where all would
    be more than `MOST_REFERENCES`, those alone are given.
    """
    if plan.own_width_references > MOST_REFERENCES:
        return {sizes_key(yardstick_candidate(plan)): yardstick_keys(plan)}
    recipe = {dimension.name: dimension.default for dimension in RECIPE}
    candidates = [
        Candidate(family="single", backbone=backbone, parameters={**sizes, **recipe})
        for backbone, sizes in plan.sizes()
    ]
    return {sizes_key(candidate): _reference_keys(plan, candidate) for candidate in candidates}


def needed_references(plan: Plan) -> list[ReferenceKey]:
    """The references that must be trained before the search; others of `own_width_keys` only if stored."""
    own_width = own_width_keys(plan).values() if plan.judges("delta_m_own_width") else []
    return list(dict.fromkeys(itertools.chain(yardstick_keys(plan), *own_width)))


def reference_candidate(key: ReferenceKey) -> Candidate:
    """What a reference is a network of: its sizes, and its recipe."""
    backbone, sizes = json.loads(key.backbone)
    recipe = json.loads(key.recipe)
    del recipe["gpu"]
    return Candidate(family="single", backbone=backbone, parameters={**sizes, **recipe})


def make_yardstick(plan: Plan, references: Mapping[ReferenceKey, Reference]) -> Yardstick:
    """Average references over their seeds.

    Args:
        plan: The job.
        references: All of `needed_references`, and what there is of `own_width_keys`.
    """

    def mean(keys: Sequence[ReferenceKey], split: SplitName) -> TaskValues:
        return {
            task.name: {
                metric: fmean(
                    getattr(references[key], split)[metric] for key in keys if key.task == task.name
                )
                for metric in KIND_METRICS[task.kind]
            }
            for task in plan.tasks
        }

    keys = yardstick_keys(plan)
    seeds = len(YARDSTICK_SEEDS)
    return Yardstick(
        validation=mean(keys, "validation"),
        test=mean(keys, "test"),
        costs={
            **measure_size(yardstick_candidate(plan), plan.input_shape, plan.tasks),
            "latency_ms": sum(references[key].latency_ms for key in keys) / seeds,
            "train_device_seconds": sum(references[key].device_seconds for key in keys) / seeds,
        },
        own_width={
            sizes: {"validation": mean(of_size, "validation"), "test": mean(of_size, "test")}
            for sizes, of_size in own_width_keys(plan).items()
            if references.keys() >= set(of_size)
        },
    )


def _reference_keys(plan: Plan, candidate: Candidate) -> list[ReferenceKey]:
    setting = _setting(plan, candidate)
    return [
        ReferenceKey(
            data=setting.data,
            task=task.name,
            backbone=setting.backbone,
            recipe=setting.recipe,
            epochs=setting.epochs,
            seed=seed,
        )
        for seed in YARDSTICK_SEEDS
        for task in plan.tasks
    ]


def _setting(plan: Plan, candidate: Candidate) -> Setting:
    return Setting(
        data=plan.data_fingerprint,
        backbone=sizes_key(candidate),
        # On a GPU networks are trained in another precision, and answer in another time.
        recipe=json.dumps({**recipe_of(candidate), "gpu": plan.spec.resources.gpus > 0}, sort_keys=True),
        epochs=plan.spec.budget.epochs,
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
