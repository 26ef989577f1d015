"""The order in which jobs start: laws of the function, and what claims and places make of it in SQL."""

import math
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.search.spec import JobSpec
from coterie.search.store import JobState
from coterie.service.storage import migrate
from coterie.service.storage.database import Database
from coterie.service.storage.queue import (
    Hold,
    Place,
    QuotaExceeded,
    Share,
    Waiting,
    check_quota,
    places_of,
    spent_tenants,
    start_order,
)
from coterie.service.storage.repositories import JobRepository
from coterie.service.storage.store import SqlTrialStore
from coterie.service.storage.tables import TenantRow, TenantUsageRow
from coterie.service.storage.tenants import Limits

NOW = datetime(2026, 11, 30, 23, 59, tzinfo=UTC)
LEASE = timedelta(seconds=30)
TENANTS = ("a", "b", "c")


@st.composite
def shares(draw: st.DrawFn) -> dict[str, Share]:
    seconds = st.one_of(st.none(), st.integers(0, 3))
    return {
        tenant: Share(
            running=draw(st.integers(0, 3)),
            served_at=None if (ago := draw(seconds)) is None else NOW - timedelta(seconds=ago),
            device_seconds=draw(st.sampled_from([0.0, 10.0])),
            limits=Limits(
                max_running_jobs=draw(st.one_of(st.none(), st.integers(0, 5))),
                max_device_seconds=draw(st.sampled_from([None, 10.0, 20.0])),
            ),
        )
        for tenant in draw(st.sets(st.sampled_from(TENANTS)))
    }


@st.composite
def queues(draw: st.DrawFn) -> list[Waiting]:
    jobs = draw(st.lists(st.tuples(st.sampled_from(TENANTS), st.integers(-1, 1), st.booleans()), max_size=12))
    return [
        Waiting(job_id=f"job_{position}", tenant=tenant, priority=priority, position=position, new=new)
        for position, (tenant, priority, new) in enumerate(jobs)
    ]


def one_by_one(waiting: list[Waiting], known: dict[str, Share]) -> list[tuple[Waiting, Hold]]:
    """The rule as it reads: look at every job that waits, take the first, look again."""
    left, order = list(waiting), []
    found = {job.tenant: known.get(job.tenant, Share()) for job in waiting}
    running = {tenant: share.running for tenant, share in found.items()}
    turn = {
        tenant: -math.inf if share.served_at is None else share.served_at.timestamp()
        for tenant, share in found.items()
    }

    def at_limit(job: Waiting) -> bool:
        most = found[job.tenant].limits.max_running_jobs
        return most is not None and running[job.tenant] >= most

    def key(job: Waiting) -> tuple[float, ...]:
        return -job.priority, running[job.tenant], turn[job.tenant], job.position

    for hold in Hold:
        while able := [
            job
            for job in left
            if found[job.tenant].spent is (hold is Hold.DEVICE_SECONDS)
            and not (hold is Hold.PLACE and at_limit(job))
        ]:
            job = min(able, key=key)
            left.remove(job)
            order.append((job, hold))
            running[job.tenant] += 1
            if job.new:
                turn[job.tenant] = 1e12 + len(order)
    return order


@given(queues(), shares(), st.randoms(use_true_random=False))
def test_the_order_is_that_of_the_rule_applied_one_by_one(
    waiting: list[Waiting], known: dict[str, Share], shuffler: random.Random
) -> None:
    shuffled = list(waiting)
    shuffler.shuffle(shuffled)
    assert list(start_order(shuffled, known)) == one_by_one(waiting, known)


@given(queues(), shares())
def test_priority_is_never_inverted_and_a_tenants_equals_start_by_age(
    waiting: list[Waiting], known: dict[str, Share]
) -> None:
    order = list(start_order(waiting, known))
    assert sorted(job.position for job, _ in order) == [job.position for job in waiting]
    for hold in Hold:
        held = [job for job, why in order if why is hold]
        assert [job.priority for job in held] == sorted((job.priority for job in held), reverse=True)
        for tenant in TENANTS:
            own = [(-job.priority, job.position) for job in held if job.tenant == tenant]
            assert own == sorted(own)
    holds = [list(Hold).index(hold) for _, hold in order]
    assert holds == sorted(holds)


@given(queues(), shares())
def test_no_tenant_starts_while_another_of_smaller_share_could(
    waiting: list[Waiting], known: dict[str, Share]
) -> None:
    tenants = {tenant: known.get(tenant, Share()) for tenant in TENANTS}
    running = {tenant: share.running for tenant, share in tenants.items()}
    starting = [job for job, hold in start_order(waiting, known) if hold is Hold.PLACE]
    for index, job in enumerate(starting):
        rivals = {other.tenant for other in starting[index:] if other.priority == job.priority}
        assert running[job.tenant] == min(running[tenant] for tenant in rivals)
        running[job.tenant] += 1
    for job, hold in start_order(waiting, known):
        most = tenants[job.tenant].limits.max_running_jobs
        assert (hold is Hold.DEVICE_SECONDS) is tenants[job.tenant].spent
        if hold is Hold.PLACE and most is not None:
            assert running[job.tenant] <= most
        if hold is Hold.RUNNING_LIMIT:
            assert most is not None
            assert running[job.tenant] >= most


@given(st.lists(st.sampled_from(TENANTS), max_size=20))
def test_where_one_job_runs_at_a_time_the_tenants_take_turns_as_shown(tenants: list[str]) -> None:
    waiting = [
        Waiting(job_id=f"job_{position}", tenant=tenant, priority=0, position=position)
        for position, tenant in enumerate(tenants)
    ]
    shown = [job for job, _ in start_order(waiting, {})]
    known: dict[str, Share] = {}
    for number, expected in enumerate(shown):
        job, _ = next(start_order(waiting, known))
        assert job == expected
        waiting.remove(job)  # it starts, and ends before the next one is chosen
        known[job.tenant] = Share(served_at=NOW + timedelta(seconds=number))


@given(
    queues(),
    shares(),
    st.lists(st.one_of(st.just(math.inf), st.floats(-1e6, 1e6)), max_size=3),
    st.one_of(st.just(math.inf), st.floats(0, 1e300)),
)
def test_expected_starts_follow_the_order_and_never_claim_to_know_what_is_unknown(
    waiting: list[Waiting], known: dict[str, Share], running: list[float], seconds: float
) -> None:
    order = list(start_order([replace(job, seconds_left=seconds) for job in waiting], known))
    until = [NOW.timestamp() + left for left in running]
    found = [places_of(order, until, NOW)[job.job_id] for job, _ in order]
    assert [place.position for place in found] == list(range(1, len(order) + 1))
    starts = [place.starts_at for place in found if place.starts_at is not None]
    assert starts == sorted(starts)
    assert all(start >= NOW for start in starts)
    assert all(place.hold is Hold.PLACE for place in found if place.starts_at is not None)
    unknown = [place.starts_at is None for place in found]
    assert unknown == sorted(unknown)
    if seconds == math.inf:
        known_ends = sum(NOW.timestamp() <= end < math.inf for end in until)
        assert len(starts) == min(known_ends, sum(hold is Hold.PLACE for _, hold in order))


def test_a_job_starts_when_the_first_running_one_is_expected_to_end() -> None:
    jobs = [
        Waiting(job_id=name, tenant="a", priority=0, position=position, seconds_left=60.0)
        for position, name in enumerate(("first", "second", "third"))
    ]
    found = places_of(start_order(jobs, {}), [NOW.timestamp() + left for left in (300, 100)], NOW)
    assert {
        name: (place.starts_at - NOW).total_seconds() for name, place in found.items() if place.starts_at
    } == {
        "first": 100.0,
        "second": 160.0,
        "third": 220.0,
    }


def submit(database: Database, tenant: str = "a", priority: int = 0, **budget: float) -> str:
    spec = JobSpec.model_validate(
        {"dataset": {"source": "digits"}, "budget": {"trials": 2, **budget}, "priority": priority}
    )
    with database.write() as session:
        return JobRepository(session, tenant).create(spec, {}, NOW)[0].id


def claim(
    database: Database,
    now: datetime = NOW,
    owner: str = "server_1",
    *,
    places: int | None = None,
    defaults: Limits | None = None,
    busy: set[str] | None = None,
) -> str | None:
    with database.write() as session:
        claimed = JobRepository(session).claim_next(
            now, LEASE, owner, places=places, defaults=defaults or Limits(), busy=busy or set()
        )
    return None if claimed is None else claimed.job_id


def places(database: Database, defaults: Limits | None = None, now: datetime = NOW) -> dict[str, Place]:
    with database.read() as session:
        return JobRepository(session).places(defaults or Limits(), now)


def limit(database: Database, tenant: str, **limits: float) -> None:
    row = dict.fromkeys(vars(Limits())) | limits
    with database.write() as session:
        session.add(TenantRow(name=tenant, created_at=NOW, **row))


def charge(database: Database, tenant: str, device_seconds: float) -> None:
    with database.write() as session:
        session.add(TenantUsageRow(tenant=tenant, month="2026-11", device_seconds=device_seconds))


@pytest.mark.parametrize("seed", range(3))
def test_jobs_are_claimed_in_the_order_that_is_shown(database: Database, seed: int) -> None:
    chosen = random.Random(seed)
    for _ in range(20):
        submit(database, chosen.choice(TENANTS), chosen.randint(0, 2))
    limit(database, "a", max_running_jobs=3)
    shown = places(database)
    order = sorted(shown, key=lambda job_id: shown[job_id].position)
    able = [job_id for job_id in order if shown[job_id].hold is Hold.PLACE]
    assert 0 < len(able) < len(order)
    for number, expected in enumerate(able):
        assert claim(database, NOW + timedelta(seconds=number)) == expected
    assert claim(database) is None
    assert {place.hold for place in places(database).values()} == {Hold.RUNNING_LIMIT}


def test_a_claimed_job_has_an_owner(database: Database) -> None:
    job_id = submit(database)
    assert claim(database, owner="server_1") == job_id
    with database.read() as session:
        [running] = JobRepository(session).running()
    assert (running.owner, running.tenant, running.beats) == ("server_1", "a", 0)


def test_an_owner_has_so_many_places_whoever_claims_for_it(database: Database) -> None:
    for _ in range(4):
        submit(database)
    assert claim(database, owner="ray_1", places=1) is not None
    assert claim(database, owner="ray_1", places=1) is None
    assert claim(database, owner="ray_1", places=2) is not None
    assert claim(database, owner="server_1", places=1) is not None


def test_a_busy_job_counts_for_nothing_in_its_tenants_limit(database: Database) -> None:
    first, second = submit(database, "a"), submit(database, "a")
    limits = Limits(max_running_jobs=1)
    assert claim(database, busy={first}, defaults=limits) == second


def test_a_busy_job_is_passed_over(database: Database) -> None:
    first, second = submit(database), submit(database)
    assert claim(database, busy={first}) == second
    assert claim(database, busy={first}) is None
    assert claim(database) == first


def test_a_tenants_own_limit_goes_before_the_servers(database: Database) -> None:
    for tenant in ("a", "a", "b", "b"):
        submit(database, tenant)
    limit(database, "a", max_running_jobs=2)
    defaults = Limits(max_running_jobs=1)
    assert [claim(database, defaults=defaults) is None for _ in range(4)] == [False, False, False, True]
    assert [place.hold for place in places(database, defaults).values()] == [Hold.RUNNING_LIMIT]


def test_device_seconds_that_are_spent_hold_a_tenant_back_until_the_next_month(database: Database) -> None:
    spent, other = submit(database, "a", priority=5), submit(database, "b")
    limit(database, "a", max_device_seconds=10.0)
    charge(database, "a", 10.0)
    shown = places(database)
    assert (shown[other].position, shown[spent].position) == (1, 2)
    assert (shown[spent].hold, shown[spent].starts_at) == (Hold.DEVICE_SECONDS, None)
    with database.read() as session:
        assert spent_tenants(session, {"a", "b"}, Limits(), NOW) == {"a"}
    assert claim(database) == other
    assert claim(database) is None
    assert claim(database, NOW + timedelta(minutes=1)) == spent


def test_a_start_is_expected_from_what_is_known(database: Database) -> None:
    running, waiting, after = submit(database), submit(database, seconds=60), submit(database)
    assert claim(database) == running
    assert [place.starts_at for place in places(database).values()] == [None, None]
    SqlTrialStore(database, running, 1).set_estimate(120.0)
    with database.read() as session:
        estimated_at = JobRepository(session).get(running).eta_at
    assert estimated_at is not None
    shown = places(database, now=estimated_at + timedelta(seconds=30))
    assert shown[waiting].starts_at == estimated_at + timedelta(seconds=120)
    assert shown[after].starts_at == estimated_at + timedelta(seconds=180)
    late = estimated_at + timedelta(seconds=150)
    assert places(database, now=late)[waiting].starts_at is None


def test_jobs_that_succeeded_tell_how_long_the_next_ones_run(database: Database) -> None:
    for seconds in (10.0, 20.0, 90.0):
        job_id = submit(database)
        assert claim(database) == job_id
        SqlTrialStore(database, job_id, 1).finish(JobState.SUCCEEDED, None)
        with database.write() as session:
            JobRepository(session).get(job_id).seconds = seconds
    running, first, second = (submit(database) for _ in range(3))
    assert places(database)[running].starts_at is None  # something is free, and yet it waits
    assert claim(database) == running
    shown = places(database)
    assert shown[first].starts_at == NOW + timedelta(seconds=20)
    assert shown[second].starts_at == NOW + timedelta(seconds=40)


def test_a_quota_counts_what_waits_and_says_what_it_found(database: Database) -> None:
    defaults = Limits(max_queued_jobs=2)
    for _ in range(2):
        submit(database)
    submit(database, "b")
    with database.read() as session:
        check_quota(session, "a", defaults, NOW)
    submit(database)
    with database.read() as session, pytest.raises(QuotaExceeded, match="at most 2, found 2"):
        check_quota(session, "a", defaults, NOW)
    claim(database)
    with database.read() as session:
        check_quota(session, "a", defaults, NOW)


def test_a_quota_of_files_is_told_in_bytes(database: Database) -> None:
    job_id = submit(database)
    defaults = Limits(max_stored_bytes=1000)
    with database.write() as session:
        check_quota(session, "a", defaults, NOW)
        JobRepository(session).get(job_id).stored_bytes = 1500
    with database.read() as session, pytest.raises(QuotaExceeded, match="below 1,000, found 1,500"):
        check_quota(session, "a", defaults, NOW)


@pytest.fixture
def crowd(postgres: Callable[[], str]) -> Database:
    url = postgres()
    migrate.prepare(url)
    return Database(url)


def test_servers_that_claim_at_once_neither_share_a_job_nor_exceed_a_limit(crowd: Database) -> None:
    for _ in range(20):
        submit(crowd)
    limit(crowd, "a", max_running_jobs=12)

    def claim_all(owner: str) -> list[str]:
        found = []
        while (job_id := claim(crowd, owner=owner, places=7)) is not None:
            found.append(job_id)
        return found

    with ThreadPoolExecutor(4) as pool:  # two servers on a cluster, two with a Ray of their own
        owners = ["ray_1", "ray_1", "server_1", "server_2"]
        claimed = dict(zip(range(4), pool.map(claim_all, owners), strict=True))
    taken = [job_id for found in claimed.values() for job_id in found]
    assert len(taken) == len(set(taken)) == 12
    assert len(claimed[0]) + len(claimed[1]) <= 7
    crowd.close()


def test_submissions_at_once_do_not_slip_past_a_quota(crowd: Database) -> None:
    spec = JobSpec.model_validate({"dataset": {"source": "digits"}, "budget": {"trials": 2}})

    def try_to_submit(_: int) -> bool:
        try:
            with crowd.write() as session:
                row, _ = JobRepository(session, "a").create(spec, {}, NOW)
                check_quota(session, row.tenant, Limits(max_queued_jobs=3), NOW)
        except QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(try_to_submit, range(16))) == 3
    assert len(places(crowd)) == 3
    crowd.close()
