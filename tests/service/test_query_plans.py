"""Every read of the API finds its rows by an index, in the order in which it shows them."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text

from coterie.search.spec import ConstraintSpec
from coterie.search.store import JobState, TrialState
from coterie.service import fronts, jobs, trials
from coterie.service.config import Settings
from coterie.service.context import Context
from coterie.service.documents import Document
from coterie.service.hub import Hub
from coterie.service.storage.database import Database
from tests.service.conftest import RecordingDispatcher
from tests.service.rows import add_job, add_trials

JOBS = 300
TRIALS = 1500  # of each of two jobs: so many that PostgreSQL, too, finds an index worth it
FAMILIES = ("single", "shared", "dmtg")
LIMITS = [ConstraintSpec(metric="macs", max=1e5), ConstraintSpec(metric="params", max=1e5)]
Read = Callable[[Context, str], Document]


def _filled(database: Database) -> str:
    """Fill a database; gives a job that has trials."""
    chance = random.Random(0)
    with database.write() as session:
        ids = [add_job(session) for _ in range(JOBS)]
        session.execute(text("UPDATE jobs SET state = 'succeeded'"))
        for job_id in ids[:2]:
            for kind, family in enumerate(FAMILIES):
                numbers = range(kind, TRIALS, len(FAMILIES))
                values = {
                    number: {name: chance.uniform(1e3, 1e6) for name in ("delta_m", "macs", "params")}
                    for number in numbers
                }
                add_trials(session, job_id, values, family=family, on_front=list(numbers)[:5])
    if database.engine.dialect.name == "postgresql":
        with database.write() as session:
            session.execute(text("ANALYZE"))  # as its daemon does; SQLite has to do without
    return ids[0]


@contextmanager
def _recorded(database: Database) -> Iterator[list[tuple[str, Any]]]:
    """The statements that are executed, with their parameters."""
    found: list[tuple[str, Any]] = []

    def note(_: object, __: object, statement: str, parameters: Any, *___: object) -> None:
        found.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", note)
    yield found
    event.remove(database.engine, "before_cursor_execute", note)


def _plan(database: Database, statement: str, parameters: Any) -> str:
    explain = "EXPLAIN QUERY PLAN" if database.engine.dialect.name == "sqlite" else "EXPLAIN (COSTS OFF)"
    with database.engine.connect() as connection:
        rows = connection.exec_driver_sql(f"{explain} {statement}", parameters)
        return "\n".join(str(row[-1]) for row in rows)


def _scans(plan: str) -> list[str]:
    """Where a whole table is read; on SQLite, also a whole index."""
    lines = (line.strip().removeprefix("->").strip() for line in plan.splitlines())
    return [line for line in lines if line.startswith(("SCAN", "Seq Scan", "Parallel Seq Scan"))]


def _sorts(plan: str) -> bool:
    return "TEMP B-TREE" in plan or "Sort" in plan


def _trials(**query: Any) -> Read:
    asked = {"state": None, "family": None, "sort": "number", "limit": 50, "cursor": None} | query

    def read(context: Context, job_id: str) -> Document:
        return trials.list_trials(context, job_id, **asked)

    return read


def _onward(first: Read, **query: Any) -> Read:
    """The page after a list's first one."""

    def read(context: Context, job_id: str) -> Document:
        cursor = first(context, job_id)["next_cursor"]
        return _trials(**query, cursor=cursor)(context, job_id)

    return read


def _first_trial(context: Context, job_id: str) -> str:
    trial_id: str = _trials(limit=1)(context, job_id)["items"][0]["id"]
    return trial_id


READS: dict[str, Read] = {
    "jobs": lambda context, _: jobs.list_jobs(context, limit=50),
    "jobs, oldest first": lambda context, _: jobs.list_jobs(context, sort="created_at", limit=50),
    "jobs by state": lambda context, _: jobs.list_jobs(context, state=JobState.SUCCEEDED, limit=50),
    "jobs by name": lambda context, _: jobs.list_jobs(context, name="search", limit=50),
    "jobs, deep": lambda context, _: jobs.list_jobs(
        context, limit=50, cursor=jobs.list_jobs(context, limit=100)["next_cursor"]
    ),
    "job": jobs.show_job,
    "trials": _trials(),
    "trials backwards": _trials(sort="-number"),
    "trials, deep": _onward(_trials(limit=500)),
    "trials by state": _trials(state=TrialState.COMPLETED),
    "trials by family": _trials(family="dmtg"),
    "trials by state and family": _trials(state=TrialState.COMPLETED, family="dmtg"),
    "trials sorted": _trials(sort="macs"),
    "trials sorted backwards": _trials(sort="-macs"),
    "trials sorted, deep": _onward(_trials(sort="macs", limit=500), sort="macs"),
    "trials sorted backwards, deep": _onward(_trials(sort="-macs", limit=500), sort="-macs"),
    "trial": lambda context, job: trials.show_trial(context, _first_trial(context, job)),
    "measurements": lambda context, job: trials.list_measurements(
        context, _first_trial(context, job), limit=50, cursor=None
    ),
    "front history": lambda context, job: fronts.read_history(context, job, limit=50, cursor=None),
}
# These may sort a part of one job: its confirming runs, trials of equal value, trials that match a filter.
WITHIN_A_JOB: dict[str, Read] = {
    "front": lambda context, job: fronts.read_front(
        context, job, metrics=None, limits=[], within_constraints=True
    ),
    "front under limits": lambda context, job: fronts.read_front(
        context, job, metrics=["macs"], limits=LIMITS, within_constraints=True
    ),
    "best": lambda context, job: fronts.find_best(context, job, metric=None, limits=[]),
    "best under limits": lambda context, job: fronts.find_best(context, job, metric="delta_m", limits=LIMITS),
    "trials sorted, by family": _trials(sort="macs", family="dmtg"),
    "trials sorted, by state": _trials(sort="-macs", state=TrialState.STOPPED),
}


def test_every_read_is_by_index(database: Database, tmp_path: Path) -> None:
    """All in one test: to fill the database takes longer than to ask."""
    job_id = _filled(database)
    context = Context(
        Settings(data_dir=tmp_path, _env_file=None), database, RecordingDispatcher(), Hub(database, 1)
    )
    for name, read in (READS | WITHIN_A_JOB).items():
        with _recorded(database) as statements:
            read(context, job_id)
        selects = [(text, values) for text, values in statements if text.lstrip().startswith("SELECT")]
        assert selects, name
        for statement, parameters in selects:
            plan = _plan(database, statement, parameters)
            assert not _scans(plan), f"{name}:\n{statement}\n{plan}"
            assert name in WITHIN_A_JOB or not _sorts(plan), f"{name}:\n{statement}\n{plan}"


@pytest.mark.parametrize(
    ("plan", "scans", "sorts"),
    [
        ("SCAN trials", 1, False),
        ("SEARCH trials USING INDEX uq (job_id=?)\nUSE TEMP B-TREE FOR ORDER BY", 0, True),
        ("Limit\n  ->  Sort\n        ->  Seq Scan on trials", 1, True),
        ("Limit\n  ->  Index Scan Backward using uq on trials", 0, False),
    ],
)
def test_the_check_sees_a_scan_and_a_sort(plan: str, scans: int, sorts: bool) -> None:
    assert (len(_scans(plan)), _sorts(plan)) == (scans, sorts)
