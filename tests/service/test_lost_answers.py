"""A write whose answer is lost: it was kept or not, and tried again it has happened once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select

from coterie.search.spec import JobSpec
from coterie.search.store import (
    AffinityResult,
    Candidate,
    Confirmation,
    Ending,
    Fenced,
    FrontUpdate,
    JobState,
    Measurement,
    Reference,
    ReferenceKey,
    Role,
    Setting,
    StoredFile,
    StoreUnavailable,
    SubsetResult,
    Trial,
    TrialEnded,
    TrialState,
    Verdict,
    VerdictKind,
)
from coterie.service.storage.database import Database
from coterie.service.storage.repositories import JobRepository
from coterie.service.storage.store import SqlTrialStore
from coterie.service.storage.tables import Table

SPEC = JobSpec.model_validate({"dataset": {"source": "digits"}, "budget": {"trials": 5}})
LEASE = timedelta(seconds=30)
CANDIDATE = Candidate(family="shared", backbone="mlp", parameters={"lr": 0.005})
TRIAL = Trial(id="trial_0", number=0, candidate=CANDIDATE, choices={"lr": 0.005}, seed=7)
KEY = ReferenceKey(data="d", task="left", backbone="b", recipe="r", epochs=1, seed=1)
REFERENCE = Reference(validation={"error": 0.25}, test={}, device_seconds=1.5, latency_ms=0.25)
SETTING = Setting(data="d", backbone="b", recipe="r", epochs=1)
SUBSET = SubsetResult(tasks=("left",), weights=(1.0,), seed=1, validation={}, test={})
AFFINITY = AffinityResult(method="one_step", tasks=("left",), weights=(1.0,), seed=1, matrix=[[None]])
MEASUREMENT = Measurement(epoch=3, values={"error": 0.5}, tasks={}, device_seconds=2.5, worker="host:1")
ENDING = Ending(
    state=TrialState.COMPLETED,
    values={"delta_m": 1.5},
    epochs=3,
    device_seconds=4.5,
    files={"weights.safetensors": StoredFile(size=10, sha256="ab" * 32)},
)
FRONT = FrontUpdate(on_front=True, displaced=(), hypervolume=2.5, size=1)
CONFIRMATION = Confirmation(
    trial_id="trial_0",
    role=Role.POINT,
    candidate=CANDIDATE,
    seed=1,
    ending=Ending(state=TrialState.COMPLETED, device_seconds=2.0),
)
Write = Callable[[SqlTrialStore], None]
WRITES: dict[str, Write] = {
    "beat": lambda store: store.beat(),
    "add_trial": lambda store: store.add_trial(replace(TRIAL, id="trial_1", number=1)),
    "start_trial": lambda store: store.start_trial("trial_0"),
    "measure": lambda store: store.measure("trial_0", MEASUREMENT),
    "preempt": lambda store: store.preempt("trial_0"),
    "end_trial": lambda store: store.end_trial("trial_0", ENDING, FRONT),
    "set_reference_point": lambda store: store.set_reference_point({"delta_m": -1.0}),
    "add_reference": lambda store: store.add_reference(KEY, REFERENCE),
    "use_references": lambda store: store.use_references([replace(KEY, seed=2)]),
    "add_subsets": lambda store: store.add_subsets(SETTING, 0, [SUBSET, replace(SUBSET, seed=2)], 2.0),
    "add_affinity": lambda store: store.add_affinity(SETTING, AFFINITY, 2.0),
    "charge_side": lambda store: store.charge_side(2.0),
    "use_setting": lambda store: store.use_setting(SETTING),
    "add_confirmation": lambda store: store.add_confirmation(CONFIRMATION),
    "set_verdict": lambda store: store.set_verdict(Verdict(kind=VerdictKind.UNKNOWN, words="Nothing.")),
    "set_estimate": lambda store: store.set_estimate(60.0),
    "finish": lambda store: store.finish(JobState.SUCCEEDED, "budget used"),
}


@pytest.fixture
def store(database: Database) -> SqlTrialStore:
    """Of a running job with a trial that waits and a reference."""
    with database.write() as session:
        jobs = JobRepository(session)
        jobs.create(SPEC, {}, _now())
    with database.write() as session:
        claimed = JobRepository(session).claim_next(_now(), LEASE)
        assert claimed is not None
    store = SqlTrialStore(database, claimed.job_id, claimed.attempt)
    store.add_trial(TRIAL)
    store.add_reference(replace(KEY, seed=2), REFERENCE)
    return store


@contextmanager
def connection_breaks(database: Database, *, after_commit: bool) -> Iterator[None]:
    """Every commit within breaks its connection: before the engine heard of it, or before it answered."""
    dialect: Any = database.engine.dialect
    commit = dialect.do_commit

    def commit_and_break(connection: Any) -> None:
        if after_commit:
            commit(connection)
        connection.driver_connection.close()
        raise dialect.dbapi.OperationalError("the connection was lost")

    dialect.do_commit = commit_and_break
    try:
        with pytest.raises(StoreUnavailable, match="connection was lost"):
            yield
    finally:
        dialect.do_commit = commit


def contents(database: Database) -> dict[str, list[Any]]:
    """Every row of every table."""
    with database.read() as session:
        return {
            name: session.execute(select(table).order_by(*table.primary_key.columns)).all()  # type: ignore[misc]
            for name, table in Table.metadata.tables.items()
        }


@pytest.mark.parametrize("name", WRITES)
def test_a_write_that_was_kept_changes_nothing_when_it_is_tried_again(
    database: Database, store: SqlTrialStore, name: str
) -> None:
    before = contents(database)
    with connection_breaks(database, after_commit=True):
        WRITES[name](store)
    kept = contents(database)
    assert kept != before
    with connection_breaks(database, after_commit=True):  # and the next answer is lost too
        WRITES[name](store)
    WRITES[name](store)
    assert contents(database) == kept


@pytest.mark.parametrize("name", WRITES)
def test_a_write_that_was_not_kept_happens_when_it_is_tried_again(
    database: Database, store: SqlTrialStore, name: str
) -> None:
    before = contents(database)
    with connection_breaks(database, after_commit=False):
        WRITES[name](store)
    assert contents(database) == before
    WRITES[name](store)
    after = contents(database)
    assert [row.beats for row in after["jobs"]] == [row.beats + 1 for row in before["jobs"]]


def test_an_equal_write_that_comes_later_is_another(database: Database, store: SqlTrialStore) -> None:
    with connection_breaks(database, after_commit=True):
        store.charge_side(2.0)
    store.charge_side(2.0)  # the one whose answer was lost
    store.charge_side(2.0)
    SqlTrialStore(database, store._job_id, 1).charge_side(2.0)
    assert store.resume().side_device_seconds == REFERENCE.device_seconds + 6.0


def test_what_was_refused_is_no_write_to_be_tried_again(database: Database, store: SqlTrialStore) -> None:
    with connection_breaks(database, after_commit=True):
        store.end_trial("trial_0", ENDING, FRONT)
    store.end_trial("trial_0", ENDING, FRONT)
    for _ in range(2):
        with pytest.raises(TrialEnded):
            store.end_trial("trial_0", ENDING, FRONT)


def test_the_end_of_the_job_is_heard_of_and_then_the_driver_is_fenced(
    database: Database, store: SqlTrialStore
) -> None:
    with connection_breaks(database, after_commit=True):
        store.finish(JobState.SUCCEEDED, None)
    store.finish(JobState.SUCCEEDED, None)
    with pytest.raises(Fenced):
        store.finish(JobState.SUCCEEDED, None)


def _now() -> datetime:
    return datetime.now(UTC)
