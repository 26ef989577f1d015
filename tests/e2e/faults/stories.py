"""What a job leaves in SQL, to be compared with what the same job leaves elsewhere."""

from typing import Any

from tests.e2e.faults.conftest import Server

TIMES = frozenset({"latency_ms", "train_device_seconds"})


def story(server: Server, job: str) -> dict[str, Any]:
    """All that a job has left which the same job must leave again; trials by their numbers."""

    def read(columns: str, rest: str) -> list[dict[str, Any]]:
        rows = server.rows(f"SELECT {columns} {rest}", job)
        return [{column: without_times(value) for column, value in row.items()} for row in rows]

    numbers = {row["id"]: row["number"] for row in read("id, number", "FROM trials WHERE job_id = ?")}
    [ended] = read("state, reason, hypervolume, reference_point, verdict", "FROM jobs WHERE id = ?")
    if ended["verdict"] and ended["verdict"]["trial_id"]:
        ended["verdict"]["trial_id"] = numbers[ended["verdict"]["trial_id"]]
    trials = read(
        "number, state, reason, family, backbone, parameters, choices, seed, origin, grouping, "
        '"values", test, tasks, epochs, on_front, files',
        "FROM trials WHERE job_id = ? ORDER BY number",
    )
    for trial in trials:
        trial["files"] = trial["files"].get("weights.safetensors")  # architecture.json holds times
    of_trials = "JOIN trials ON trials.id = trial_id WHERE trials.job_id = ?"
    return {
        "trials": trials,
        "measurements": read(
            'number, epoch, measurements."values", measurements.tasks',
            f"FROM measurements {of_trials} ORDER BY number, epoch",
        ),
        "history": read("number, hypervolume, size", f"FROM front_history {of_trials} ORDER BY sequence"),
        "references": read(
            "task, backbone, recipe, epochs, seed, validation, test",
            "FROM reference_networks JOIN job_references ON reference = position WHERE job_id = ? "
            "ORDER BY task, seed",
        ),
        "subsets": read(
            "run, subset, epochs, seed, validation, test",
            "FROM subset_networks WHERE job_id = ? ORDER BY position",
        ),
        "affinities": read(
            "method, tasks, epochs, seed, matrix", "FROM affinities WHERE job_id = ? ORDER BY position"
        ),
        "confirmations": read(
            "number, role, confirmations.seed, sequence, confirmations.state, confirmations.parameters, "
            'confirmations.grouping, confirmations."values", confirmations.test, confirmations.epochs',
            f"FROM confirmations {of_trials} ORDER BY sequence",
        ),
        "job": ended,
    }


def without_times(value: Any) -> Any:
    return {k: v for k, v in value.items() if k not in TIMES} if isinstance(value, dict) else value
