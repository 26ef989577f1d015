"""What a driver stores of the trainings beside its trials, for a job on all tasks of `digits`."""

from coterie.search.data.digits import Digits
from coterie.search.store import AffinityResult, Reference, ReferenceKey, Setting, SubsetResult
from coterie.service.storage.store import SqlTrialStore

TASKS = Digits.tasks().names
BACKBONE = '["mlp", {"depth": 2, "width": 24}]'
RECIPE = '{"batch_size": 64, "lr": 0.005}'
SETTING = Setting(data="0123456789abcdef", backbone=BACKBONE, recipe=RECIPE, epochs=20)
ALONE = 0.2  # error of each task alone


def measure_affinities(store: SqlTrialStore) -> None:
    """Two seeds of each method; pairwise, every task alone and the first two together."""
    store.use_setting(SETTING)
    size = len(TASKS)
    for seed in (0, 1):
        matrix = [[1e-4 * (i - j) * (1 + seed) for j in range(size)] for i in range(size)]
        store.add_affinity(SETTING, _one_step(seed, matrix), 1.0)
        pair = {TASKS[0]: ALONE * (0.9 - 0.2 * seed), TASKS[1]: 1.5 * ALONE}
        singles = [{name: ALONE} for name in TASKS]
        store.add_subsets(SETTING, seed, [_subset(seed, errors) for errors in (*singles, pair)], 2.0)


def use_references(store: SqlTrialStore, seeds: int = 3) -> None:
    """A reference for each task and seed."""
    keys = [
        ReferenceKey(data=SETTING.data, task=task, backbone=BACKBONE, recipe=RECIPE, epochs=20, seed=seed)
        for seed in range(seeds)
        for task in TASKS
    ]
    for key in keys:
        store.add_reference(
            key,
            Reference(
                validation={"error": 0.25, "auc": float("nan")},
                test={"error": 0.5},
                device_seconds=1.5,
                latency_ms=0.1,
            ),
        )
    store.use_references(keys)


def _one_step(seed: int, matrix: list[list[float]]) -> AffinityResult:
    return AffinityResult(
        method="one_step", tasks=TASKS, weights=(1.0,) * len(TASKS), seed=seed, matrix=matrix
    )


def _subset(seed: int, errors: dict[str, float]) -> SubsetResult:
    return SubsetResult(
        tasks=tuple(errors),
        weights=(1.0,) * len(errors),
        seed=seed,
        validation={name: {"error": error} for name, error in errors.items()},
        test={},
    )
