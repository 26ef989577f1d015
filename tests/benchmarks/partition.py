"""How long the exact solver for the best partition takes, beside SciPy's mixed-integer solver.

    python tests/benchmarks/partition.py [--tasks N] [--known N] [--groups K ...] [--tables N]

Tables of known groups, always with every single task and one partition into each number of groups:

- `independent`: 1 to 10 random tasks, values drawn independently of the group;
- `small`: 2 to 6 random tasks, values likewise;
- `by task`: 2 to 8 random tasks, each of which gains independently;
- `planted`, `noisy`: groups near those of a planted partition, or unions of two of them; a task gains the
  mean of what its partners do to it, with noise of a third of that, or as much: what a search sees.

Times are the processor's seconds on one thread: median and greatest over the tables. `milp` is HiGHS' branch
and cut with no gap allowed, asked for the value alone; of equally good partitions it gives any.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csc_array

from coterie.search.partition import best_partition
from coterie.search.work import Subset

Table = dict[Subset, float]
EFFECT = 0.1  # of one task on another, relative
PLANTED = 5  # groups


def members(has_T: NDArray[np.bool_]) -> Subset:
    return tuple(np.flatnonzero(has_T).tolist())


def feasible(rng: np.random.Generator, tasks: int, most_groups: int) -> set[Subset]:
    """Every single task, all together, and a partition into each number of groups."""
    known = {(t,) for t in range(tasks)}
    for groups in range(1, most_groups + 1):
        labels_T = rng.permutation(np.arange(tasks) % groups)
        known |= {members(labels_T == k) for k in range(groups)}
    return known


def random_groups(rng: np.random.Generator, tasks: int, known: int, sizes: tuple[int, int]) -> list[Subset]:
    found = feasible(rng, tasks, most_groups=8)
    while len(found) < known:
        size = int(rng.integers(sizes[0], sizes[1], endpoint=True))
        found.add(tuple(sorted(rng.choice(tasks, size, replace=False).tolist())))
    return sorted(found)


def independent(rng: np.random.Generator, tasks: int, known: int, sizes: tuple[int, int]) -> Table:
    return {group: float(rng.normal()) for group in random_groups(rng, tasks, known, sizes)}


def by_task(rng: np.random.Generator, tasks: int, known: int) -> Table:
    groups = random_groups(rng, tasks, known, (2, 8))
    return {group: float(rng.normal(size=len(group)).sum()) for group in groups}


def planted(rng: np.random.Generator, tasks: int, known: int, noise: float) -> Table:
    labels_T = rng.integers(PLANTED, size=tasks)
    found = feasible(rng, tasks, most_groups=8)
    while len(found) < known:
        has_T = labels_T == rng.integers(PLANTED)
        if rng.random() < 1 / 3:
            has_T |= labels_T == rng.integers(PLANTED)
        has_T[rng.choice(tasks, int(rng.integers(4)), replace=False)] ^= True
        if has_T.any():
            found.add(members(has_T))
    effect_TT = np.where(labels_T[:, None] == labels_T, EFFECT, -EFFECT)
    np.fill_diagonal(effect_TT, 0)

    def value(group: Subset) -> float:
        inside = effect_TT[np.ix_(group, group)].sum() / max(len(group) - 1, 1)
        return float(inside + rng.normal(0, noise, len(group)).sum())

    return {group: value(group) for group in sorted(found)}


KINDS: Mapping[str, Callable[[np.random.Generator, int, int], Table]] = {
    "independent": partial(independent, sizes=(1, 10)),
    "small": partial(independent, sizes=(2, 6)),
    "by task": by_task,
    "planted": partial(planted, noise=EFFECT / 3),
    "noisy": partial(planted, noise=EFFECT),
}


def ours(values: Table, tasks: int, groups: int) -> float:
    solution = best_partition(values, tasks, most_groups=groups)
    assert solution is not None
    return solution.value


def scipys(values: Table, tasks: int, groups: int) -> float:
    has_TS = np.zeros((tasks, len(values)))
    for s, group in enumerate(values):
        has_TS[list(group), s] = 1
    rows = csc_array(np.vstack([has_TS, np.ones(len(values))]))
    limits = LinearConstraint(rows, [*np.ones(tasks), 1], [*np.ones(tasks), groups])
    value_S = np.array(list(values.values()))
    found = milp(
        -value_S,
        constraints=limits,
        integrality=np.ones(len(values)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    return float(-found.fun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--known", type=int, default=2000)
    parser.add_argument("--groups", type=int, nargs="+", default=[2, 3, 5, 8])
    parser.add_argument("--tables", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{'':12} {'K':>2} {'ours, s':>15} {'milp, s':>15}  greatest difference of the values")
    for name, kind in KINDS.items():
        tables = [
            kind(np.random.default_rng(seed), arguments.tasks, arguments.known)
            for seed in range(arguments.tables)
        ]
        for groups in arguments.groups:
            columns, reached = [], []
            for solve in (ours, scipys):
                seconds, values = [], []
                for table in tables:
                    began = time.process_time()
                    values.append(solve(table, arguments.tasks, groups))
                    seconds.append(time.process_time() - began)
                columns.append(f"{median(seconds):7.3f} {max(seconds):7.3f}")
                reached.append(values)
            apart = max(abs(one - other) for one, other in zip(*reached, strict=True))
            print(f"{name:12} {groups:2} {columns[0]} {columns[1]}  {apart:.0e}", flush=True)


if __name__ == "__main__":
    main()
