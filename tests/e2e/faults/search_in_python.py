"""A search without a server for `test_kills.py`: `python search_in_python.py FOLDER RESULT`.

It reads the spec on stdin, and is a process of its own because Ray reads its settings when it is imported.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coterie.search.result import SearchResult
from coterie.search.runner import run_search
from coterie.search.store import Trial


def told(result: SearchResult) -> dict[str, Any]:
    """What a result says, under the names of the server's tables; trials by their numbers."""
    numbers = {trial.id: trial.number for trial in result.trials}
    verdict = None if result.verdict is None else asdict(result.verdict)
    if verdict is not None and verdict["trial_id"] is not None:
        verdict["trial_id"] = numbers[verdict["trial_id"]]
    front = {trial.number for trial in result.front}
    return {
        "job": {
            "state": result.state,
            "reason": result.reason,
            "hypervolume": result.hypervolume,
            "verdict": verdict,
        },
        "trials": [told_of(trial) | {"on_front": int(trial.number in front)} for trial in result.trials],
        "history": [
            {"number": numbers[trial_id], "hypervolume": hypervolume}
            for trial_id, hypervolume in result.history
        ],
        "confirmed": {numbers[trial_id]: asdict(summary) for trial_id, summary in result.confirmed.items()},
    }


def told_of(trial: Trial) -> dict[str, Any]:
    assert trial.ending is not None
    of_trial = ("number", "choices", "seed", "origin")
    of_ending = ("state", "reason", "grouping", "values", "test", "tasks", "epochs", "files")
    return (
        {name: getattr(trial, name) for name in of_trial}
        | {name: asdict(trial.ending)[name] for name in of_ending}
        | asdict(trial.candidate)
    )


def main() -> None:
    folder, found = map(Path, sys.argv[1:])
    found.write_text(json.dumps(told(run_search(json.load(sys.stdin), folder))))


if __name__ == "__main__":
    main()
