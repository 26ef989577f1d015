"""Schemathesis over the whole contract, against a real server with rows in its database.

    python -m tests.service.contract --cases 5000 --database postgres

All checks, all phases: examples, coverage (each bound and each broken rule of the schema), fuzzing, and
sequences of calls that use each other's answers. New endpoints are covered by being in the document.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import postgres_server
from tests.service.conftest import trial
from tests.service.live import LiveServer, finished_job, live_server

SEED = 20261125
STREAM_SECONDS = 0.2  # an event stream ends by itself when it is asked to
CONVERSION_SECONDS = 120  # a network is converted at the first request
PHASES = ("examples", "coverage", "fuzzing", "stateful")
# By default these count as "accepted" where the data keeps the schema.
ACCEPTED = ("2xx", "3xx", "401", "403", "404", "409", "429", "5xx")
# By default these count as "rejected" where it does not, but for 413, 414 and 431: so large may it be.
REJECTED = ("400", "401", "403", "404", "405", "406", "409", "413", "414", "415", "422", "429", "431")


@dataclass(frozen=True)
class Findings:
    """What a run found: requests that were judged, whether all were right, and the whole report."""

    cases: int
    passed: bool
    text: str


def fill(server: LiveServer) -> tuple[str, dict[str, list[str]]]:
    """Give the server rows of every kind.

    Returns:
        An admin's token, and ids that exist by the name of the parameter that takes them.
    """
    client = server.client
    token = str(client.post("/v1/tokens", json={"role": "admin"}).json()["token"])
    client.headers["Authorization"] = f"Bearer {token}"
    spare = client.post("/v1/tokens", json={"role": "reader"}).json()["id"]
    hook = client.post("/v1/webhooks", json={"url": "http://127.0.0.1:9/"}).json()["id"]
    succeeded = finished_job(server)
    running = server.submit(name="runs")
    store = server.claim()
    store.add_trial(trial(9))
    store.start_trial("trial_9")
    paused = server.submit(name="paused")
    client.post(f"/v1/jobs/{paused}/pause").raise_for_status()
    queued = server.submit(name="waits")
    trials = client.get(f"/v1/jobs/{succeeded}/trials").json()["items"]
    deliveries = client.get(f"/v1/webhooks/{hook}/deliveries").json()["items"]
    return token, {
        "job_id": [succeeded, running, paused, queued],
        "trial_id": [*(item["id"] for item in trials), "trial_9"],
        "token_id": [spare, "token_0000000000000000"],
        "webhook_id": [hook],
        "delivery_id": [item["id"] for item in deliveries],
    }


def configuration(document: dict[str, Any], ids: dict[str, list[str]]) -> str:
    """What Schemathesis cannot know, as its TOML file."""
    parts = [f"[dictionaries.{name}]\nvalues = {json.dumps(values)}" for name, values in ids.items()]
    parts += [f"[checks]\nnegative_data_rejection.expected-statuses = {json.dumps(REJECTED)}", "[parameters]"]
    # Half of the time what exists is asked for, else what the schema allows.
    parts += [f'"path.{name}" = {{ dictionary = "{name}", probability = 0.5 }}' for name in ids]
    for path, item in document["paths"].items():
        for method, operation in item.items():
            rules = list(_rules(operation))
            if (method, path) == ("delete", "/v1/tokens/{token_id}"):  # the run's own must live
                rules += ["phases.stateful.enabled = false"]
                rules += ['parameters."path.token_id" = { dictionary = "token_id", probability = 1.0 }']
            if rules:
                parts += ["[[operations]]", f'include-name = "{method.upper()} {path}"', *rules]
    return "\n".join(parts) + "\n"


def _rules(operation: dict[str, Any]) -> Iterator[str]:
    """The one check that is relaxed is that all that keeps the schema is accepted.

    Whether the tasks, families, dimensions and metrics of a job exist and fit each other, whether a time is
    to come and a host is public, no schema can say: there a 422 is right. Whether a cursor is one that this
    list gave, and whether a job has the metric or the event that a query names, neither: there a 400 is.
    """
    names = {parameter["name"] for parameter in operation.get("parameters", [])}
    refusals = ["422"] if "requestBody" in operation else []
    refusals += ["400"] if names & {"after", "cursor", "metric", "objectives", "sort"} else []
    if refusals:
        yield f"checks.positive_data_acceptance.expected-statuses = {json.dumps([*ACCEPTED, *refusals])}"
    if "timeout_seconds" in names:
        yield f'parameters."query.timeout_seconds" = {STREAM_SECONDS}'
    if "format" in names:
        yield f"request-timeout = {CONVERSION_SECONDS}"
        yield f"checks.max_response_time = {CONVERSION_SECONDS}"
        yield 'parameters."path.trial_id" = { dictionary = "converted", probability = 0.5 }'


def check(server: LiveServer, folder: Path, *, examples: int, phases: tuple[str, ...] = PHASES) -> Findings:
    """Run Schemathesis, with so many fuzzed examples for each operation."""
    token, ids = fill(server)
    document = server.client.get("/openapi.json").json()
    # A conversion takes seconds, so only one network is asked for in other forms.
    file, report = folder / "schemathesis.toml", folder / "report.json"
    file.write_text(configuration(document, ids | {"converted": ids["trial_id"][:1]}))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(file)),
            *("run", f"{server.url}/openapi.json", "--checks", "all", "--phases", ",".join(phases)),
            *("--max-examples", str(examples), "--seed", str(SEED), "--continue-on-failure"),
            *("--header", f"Authorization: Bearer {token}", "--generation-database", "none"),
            *("--report", "json", "--report-json-path", str(report), "--no-color"),
        ],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if not report.exists():
        return Findings(cases=0, passed=False, text=done.stdout)
    found = json.loads(report.read_text())
    return Findings(
        cases=found["test_cases"]["generated"],
        passed=done.returncode == 0 and found["complete"],
        text=done.stdout,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Schemathesis over the whole contract.")
    parser.add_argument("--cases", type=int, default=5000, help="at least so many")
    parser.add_argument("--database", choices=["sqlite", "postgres"], default="sqlite")
    arguments = parser.parse_args()
    began, cases, examples = time.monotonic(), 0, 120
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(postgres_server(folder))() if arguments.database == "postgres" else None
        while cases < arguments.cases:
            data = Path(tempfile.mkdtemp(dir=folder))
            with live_server(data / "data", database_url=url, webhook_allow_private=True) as server:
                findings = check(server, data, examples=examples)
            print(findings.text)
            if not findings.passed:
                sys.exit(1)
            cases, examples = findings.cases, examples * 2
    print(f"{cases:,} cases on {arguments.database} in {time.monotonic() - began:.0f} s: nothing found")


if __name__ == "__main__":
    main()
