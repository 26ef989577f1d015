"""What the job's row counts and what its events tell is what the rows say, whatever was written."""

import itertools
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from coterie.search.spec import JobSpec
from coterie.search.store import (
    JOB_ENDED,
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
    SubsetResult,
    Trial,
    TrialEnded,
    TrialState,
)
from coterie.service.storage.database import Database
from coterie.service.storage.repositories import Conflict, JobRepository
from coterie.service.storage.store import SqlTrialStore
from coterie.service.storage.tables import EventRow, JobRow, TenantUsageRow, TrialRow
from coterie.service.storage.tenants import month_of
from tests.service.counted import check_counted

SPEC = JobSpec.model_validate({"dataset": {"source": "digits"}, "budget": {"trials": 5}})
LEASE = timedelta(seconds=30)
KEY = ReferenceKey(data="d", task="left", backbone="b", recipe="r", epochs=1, seed=0)
SETTING = Setting(data="d", backbone="b", recipe="r", epochs=1)
CANDIDATE = Candidate(family="shared", backbone="mlp", parameters={})


class Story:
    """A job of a tenant, and all that can happen to it; what is forbidden just does not happen."""

    def __init__(self, database: Database, tenant: str) -> None:
        self.database = database
        self.tenant = tenant
        self.runs = 0
        with database.write() as session:
            self.id = JobRepository(session, tenant).create(SPEC, {}, _now())[0].id
        self.store = SqlTrialStore(database, self.id, 0)

    def do(self, what: str, number: int, amount: int) -> None:
        with suppress(Fenced, TrialEnded, Conflict, KeyError, ValueError):
            if what in SERVER:
                with self.database.write() as session:
                    SERVER[what](self, JobRepository(session))
            else:
                DRIVER[what](self, f"{self.id}_{number}", amount)

    def claim(self, jobs: JobRepository) -> None:
        """Begin an attempt, as the dispatcher and a driver do, whatever else waits."""
        row = jobs.get(self.id)
        if row.state == JobState.QUEUED:
            claimed = jobs._begin(row, None, _now(), LEASE)
            self.store = SqlTrialStore(self.database, self.id, claimed.attempt)

    def new_run(self) -> int:
        self.runs += 1
        return self.runs


SERVER: dict[str, Callable[[Story, JobRepository], object]] = {
    "claim": Story.claim,
    "requeue": lambda job, jobs: jobs.requeue(job.id, jobs.get(job.id).attempt, "gone", _now()),
    "pause": lambda job, jobs: jobs.pause(job.id, _now()),
    "resume": lambda job, jobs: jobs.resume(job.id, _now()),
    "cancel": lambda job, jobs: jobs.cancel(job.id, _now()),
    "fail": lambda job, jobs: jobs.fail_queued(job.id, "too often", _now()),
}


def _end(job: Story, trial_id: str, state: TrialState, amount: int) -> None:
    front = FrontUpdate(on_front=amount > 1, displaced=(), hypervolume=1.0, size=1)
    ending = Ending(
        state=state,
        values={"delta_m": amount / 2, "macs": None, "params": float("inf")},
        epochs=amount,
        device_seconds=float(amount),
        files={"weights.safetensors": StoredFile(size=amount, sha256="ab" * 32)},
    )
    job.store.end_trial(trial_id, ending, front if state is TrialState.COMPLETED else None)


DRIVER: dict[str, Callable[[Story, str, int], None]] = {
    "add": lambda job, trial_id, _: job.store.add_trial(
        Trial(id=trial_id, number=int(trial_id[-1]), candidate=CANDIDATE, choices={}, seed=1)
    ),
    "start": lambda job, trial_id, _: job.store.start_trial(trial_id),
    "measure": lambda job, trial_id, amount: job.store.measure(
        trial_id, Measurement(epoch=amount, values={}, tasks={}, device_seconds=float(amount), worker="w")
    ),
    "preempt": lambda job, trial_id, _: job.store.preempt(trial_id),
    "complete": lambda job, trial_id, amount: _end(job, trial_id, TrialState.COMPLETED, amount),
    "stop": lambda job, trial_id, amount: _end(job, trial_id, TrialState.STOPPED, amount),
    "break": lambda job, trial_id, amount: _end(job, trial_id, TrialState.FAILED, amount),
    "reference": lambda job, _, amount: job.store.add_reference(
        KEY, Reference(validation={}, test={}, device_seconds=float(amount), latency_ms=1.0)
    ),
    "subsets": lambda job, _, amount: job.store.add_subsets(
        SETTING,
        job.new_run(),
        [SubsetResult(tasks=("left",), weights=(1.0,), seed=1, validation={}, test={})],
        float(amount),
    ),
    "affinity": lambda job, _, amount: job.store.add_affinity(
        SETTING,
        AffinityResult(method="one_step", tasks=("left",), weights=(1.0,), seed=amount, matrix=[[None]]),
        float(amount),
    ),
    "side": lambda job, _, amount: job.store.charge_side(float(amount)),
    "confirm": lambda job, trial_id, amount: job.store.add_confirmation(
        Confirmation(
            trial_id=trial_id,
            role=Role.POINT,
            candidate=CANDIDATE,
            seed=amount,
            ending=Ending(state=TrialState.COMPLETED, device_seconds=float(amount)),
        )
    ),
    "beat": lambda job, *_: job.store.beat(),
    "finish": lambda job, *_: job.store.finish(JobState.SUCCEEDED, "budget used"),
}
STEPS = st.tuples(
    st.integers(0, 2),  # the job
    # What ends a job is drawn more rarely, so that more happens before.
    st.sampled_from([*DRIVER, *DRIVER, *SERVER, "add", "add", "claim", "claim", "measure", "complete"]),
    st.integers(0, 2),  # the trial
    st.integers(1, 3),
)


@given(st.lists(STEPS, max_size=30))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_counters_and_events_are_what_the_rows_say(
    database: Database, steps: list[tuple[int, str, int, int]]
) -> None:
    jobs = [Story(database, tenant) for tenant in ("default", "other", "other")]
    for job in jobs:
        job.do("claim", 0, 0)
    for which, what, number, amount in steps:
        jobs[which].do(what, number, amount)
    with database.read() as session:
        for job in jobs:
            check_counted(session, job.id)
            _check_events(session, job.id)
        _check_tenants(session)


def _check_events(session: Session, job_id: str) -> None:
    job = JobRepository(session).get(job_id)
    events = session.scalars(
        select(EventRow).where(EventRow.job_id == job_id).order_by(EventRow.sequence)
    ).all()
    assert [event.sequence for event in events] == list(range(1, job.last_event + 1))
    told = [event.data for event in events if event.kind == "job"]
    assert told[0]["state"] == "queued"
    assert all(before != after for before, after in itertools.pairwise(told))
    assert (told[-1]["state"], told[-1]["reason"]) == (job.state, job.reason)
    if job.state in JOB_ENDED:
        assert events[-1].kind == "job"
    last = {event.data["id"]: event.data for event in events if event.kind == "trial"}
    rows = session.scalars(select(TrialRow).where(TrialRow.job_id == job_id)).all()
    assert {trial_id: data["state"] for trial_id, data in last.items()} == {row.id: row.state for row in rows}
    for row in rows:
        if row.state in ("completed", "stopped", "failed"):
            assert (last[row.id]["values"], last[row.id]["epochs"]) == (row.values, row.epochs)
    on_front = {event.data["trial_id"] for event in events if event.kind == "front"}
    assert on_front == {row.id for row in rows if row.on_front}


def _check_tenants(session: Session) -> None:
    """In one month, as far as a test does not run through midnight of its last day."""
    charged = session.execute(select(JobRow.tenant, func.sum(JobRow.device_seconds)).group_by(JobRow.tenant))
    rows = session.scalars(select(TenantUsageRow)).all()
    usage = {row.tenant: row.device_seconds for row in rows}
    assert {row.month for row in rows} <= {month_of(_now())}
    for tenant, seconds in charged:
        assert usage.get(tenant, 0.0) == pytest.approx(seconds)


def test_device_seconds_stay_charged_to_the_tenant_when_the_job_is_gone(database: Database) -> None:
    job = Story(database, "other")
    job.do("claim", 0, 0)
    job.do("side", 0, 3)
    with database.write() as session:
        session.delete(JobRepository(session).get(job.id))
    with database.read() as session:
        [row] = session.scalars(select(TenantUsageRow))
    assert (row.tenant, row.month, row.device_seconds) == ("other", month_of(_now()), 3.0)


def test_the_events_of_a_job_tell_its_life_in_order(database: Database) -> None:
    job = Story(database, "default")
    for what in ("claim", "add", "measure", "preempt", "complete", "pause", "resume", "cancel"):
        job.do(what, 0, 2)
    with database.read() as session:
        events = session.scalars(select(EventRow).order_by(EventRow.sequence)).all()
    assert [(event.kind, event.data.get("state")) for event in events] == [
        ("job", "queued"),
        ("job", "running"),
        ("trial", "pending"),
        ("trial", "running"),
        ("measurement", None),
        ("trial", "pending"),
        ("trial", "completed"),
        ("front", None),
        ("job", "paused"),
        ("job", "queued"),
        ("job", "cancelled"),
    ]
    assert events[4].data == {
        "trial_id": f"{job.id}_0",
        "number": 0,
        "epoch": 2,
        "values": {},
        "device_seconds": 2.0,
    }
    assert events[7].data == {"trial_id": f"{job.id}_0", "hypervolume": 1.0, "size": 1, "displaced": []}


def _now() -> datetime:
    return datetime.now(UTC)
