"""What a search says holds up: no decision reads the test split, and noise is called noise."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import coterie.search.plan as plan_module
from coterie.search.data.base import Dataset, Split
from coterie.search.data.digits import Digits, DigitsOptions
from coterie.search.store import Ending, InMemoryStore, JobState, VerdictKind
from tests.search.control import Control
from tests.search.in_process import Search

JOB: dict[str, Any] = {
    "dataset": {"source": "digits", "options": {"samples": 400}},
    "search": {
        "families": ["single", "shared", "grouped", "affinity", "dmtg", "interrogate"],
        "scheduler": {"name": "pareto_asha", "eta": 2, "grace_epochs": 2},
    },
    "budget": {"trials": 16, "epochs": 5},
    "confirm": {"top": 2, "seeds": 2},
}
CONTROL: dict[str, Any] = {
    "search": {"families": ["single", "shared", "grouped"]},
    "budget": {"trials": 12, "epochs": 6},
    "confirm": {"top": 2, "seeds": 3},
}
TIMES = frozenset({"latency_ms", "train_device_seconds"})

Register = Callable[[type[Any]], None]


class Poisoned(Digits):
    """Every test label says the opposite."""

    @classmethod
    def load(cls, options: DigitsOptions) -> Dataset:
        data = super().load(options)
        targets = {name: 1 - labels for name, labels in data.test.targets.items()}
        return replace(data, test=Split(inputs=data.test.inputs, targets=targets))


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    def register(source: type[Any]) -> None:
        monkeypatch.setattr(plan_module, "sources", lambda: {source.name: source})

    return register


def decisions(store: InMemoryStore) -> list[object]:
    """All that was decided, and the validation values that it was decided by."""

    def decided(ending: Ending | None) -> tuple[object, ...]:
        assert ending is not None
        values = {name: value for name, value in ending.values.items() if name not in TIMES}
        return ending.state, ending.reason, ending.epochs, ending.grouping, values

    numbers = {trial.id: trial.number for trial in store.trials}
    assert store.verdict is not None
    return [
        [
            (trial.number, trial.origin, trial.candidate, trial.seed, decided(trial.ending))
            for trial in store.trials
        ],
        {numbers[name] for name in store.front},
        [volume for _, volume in store.history],
        [(setting, run.run, run.tasks, run.seed, run.validation) for setting, run in store.subsets],
        store.affinities,
        [
            (numbers[run.trial_id], run.role, run.candidate, run.seed, decided(run.ending))
            for run in store.confirmations
        ],
        (store.verdict.kind, store.verdict.words),
    ]


def test_poisoned_test_labels_change_what_is_reported_and_nothing_that_is_decided(register: Register) -> None:
    stores = []
    for source in (Digits, Poisoned):
        register(source)
        search = Search(JOB, laboratory_of=source)
        assert search.run() == (JobState.SUCCEEDED, None)
        stores.append(search.store)
    honest, poisoned = stores
    assert decisions(honest) == decisions(poisoned)
    assert honest.subsets  # so it was learned from
    assert {trial.state for trial in honest.trials} == {"completed", "stopped"}
    errors = [
        [trial.ending.test["total_error"] for trial in store.trials if trial.ending and trial.ending.test]
        for store in stores
    ]
    assert errors[0]
    assert all(a != b for a, b in zip(*errors, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tasks_that_do_not_care_about_each_other_are_not_said_to(register: Register) -> None:
    register(Control)
    kinds = []
    for seed in range(10):
        dataset = {"source": Control.name, "options": {"seed": seed}}
        search = Search({**CONTROL, "dataset": dataset, "seed": seed})
        search.run()
        assert search.store.verdict is not None
        kinds.append(search.store.verdict.kind)
    assert Counter(kinds)[VerdictKind.NO_DIFFERENCE] >= 9, kinds
