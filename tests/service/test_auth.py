"""Tokens: made, looked up, refused; what an open server answers; how often a token may come."""

import base64
import json
import logging
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event, inspect, text

from coterie.service import access, gate
from coterie.service.auth import ANYONE, Caller, Role
from coterie.service.gate import BURST_SECONDS, CACHE_SECONDS, Gate, TooManyRequests
from coterie.service.storage.database import Database
from coterie.service.storage.tables import TokenRow
from coterie.service.storage.tokens import TokenRepository, digest_of, id_in
from tests.service.conftest import SPEC, Problem, Server, open_server

READ_BY_ANYONE = ("/healthz", "/readyz", "/openapi.json", "/docs")


@pytest.fixture(params=["sqlite_database", "postgres_database"])
def stored(request: pytest.FixtureRequest) -> Database:
    """Each kind of database in turn."""
    database: Database = request.getfixturevalue(request.param)
    return database


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(
    database: Database, role: Role = Role.READER, tenant: str = "ours", expires_at: datetime | None = None
) -> tuple[str, str]:
    """Id and text of a new token."""
    made = access.create_token(
        database, access.operator(tenant), role=role, name="test", expires_at=expires_at
    )
    return made.id, made.token


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def basic(password: str, user: str = "anyone") -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}


@pytest.fixture
def closed(server: Server, monkeypatch: pytest.MonkeyPatch) -> tuple[Server, str]:
    """A server that looks at every token anew, and an admin's."""
    monkeypatch.setattr(gate, "CACHE_SECONDS", 0.0)
    return server, make(server.database, Role.ADMIN)[1]


@pytest.fixture(scope="module")
def unchanging(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """As `closed`, for all tests that change nothing."""
    with (
        pytest.MonkeyPatch.context() as patch,
        open_server(tmp_path_factory.mktemp("closed") / "data") as server,
    ):
        patch.setattr(gate, "CACHE_SECONDS", 0.0)
        yield server, make(server.database, Role.ADMIN)[1]


@pytest.fixture(scope="module")
def open_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Of a server without tokens, for all tests that change nothing."""
    with open_server(tmp_path_factory.mktemp("open") / "data") as server:
        yield server.client


# Tokens


def test_a_token_names_its_id_and_only_its_digest_is_kept(stored: Database) -> None:
    token_id, token = make(stored)
    assert re.fullmatch(r"coterie_[0-9a-f]{16}_[0-9A-Za-z_-]{43}", token)
    assert id_in(token) == token_id
    with stored.read() as session:
        rows = session.execute(text("SELECT * FROM tokens")).mappings().all()
        found = TokenRepository(session).find(token)
    assert found is not None
    assert found.id == token_id
    assert rows[0]["digest"] == digest_of(token)
    assert token.rpartition("_")[2] not in str(rows)


def test_the_right_id_with_another_secret_finds_nothing(stored: Database) -> None:
    _, token = make(stored)
    _, other = make(stored)
    swapped = token[: len("coterie_") + 17] + other[len("coterie_") + 17 :]
    assert id_in(swapped) == id_in(token)
    assert Gate(stored).look_up(swapped) is None


def test_a_token_is_usable_until_it_is_revoked_or_expires(stored: Database) -> None:
    now = datetime.now(UTC)

    def usable(at: datetime) -> bool:
        with stored.read() as session:
            return TokenRepository(session).any_usable(at)

    assert not usable(now)
    token_id, _ = make(stored, expires_at=now + timedelta(hours=1))
    assert usable(now)
    assert not usable(now + timedelta(hours=2))
    access.revoke_token(stored, None, token_id)
    assert not usable(now)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("30d", datetime(2026, 12, 25, 12, tzinfo=UTC)),
        ("12h", datetime(2026, 11, 26, 0, tzinfo=UTC)),
        ("2w", datetime(2026, 12, 9, 12, tzinfo=UTC)),
        ("2027-01-01", datetime(2027, 1, 1, tzinfo=UTC)),
        ("2027-01-01T01:00:00+01:00", datetime(2027, 1, 1, tzinfo=UTC)),
    ],
)
def test_an_expiry_is_a_span_or_a_date(words: str, expected: datetime) -> None:
    assert access.parse_expiry(words, datetime(2026, 11, 25, 12, tzinfo=UTC)) == expected


@pytest.mark.parametrize("words", ["soon", "0d", "-1d", "2020-01-01", "30", "", "2026-13-01"])
def test_an_expiry_that_is_none_is_refused(words: str) -> None:
    with pytest.raises(ValueError, match="expires: must be"):
        access.parse_expiry(words, datetime(2026, 11, 25, 12, tzinfo=UTC))


# The gate


def test_the_server_is_open_until_the_first_token_is_made_and_never_again(stored: Database) -> None:
    clock = Clock()
    doors = Gate(stored, clock=clock)
    assert doors.look_up(None) is ANYONE
    token_id, token = make(stored, Role.SUBMITTER)
    assert doors.recall(None) is ANYONE
    clock.now += CACHE_SECONDS
    assert doors.recall(None) is None
    assert doors.look_up(None) is None
    assert doors.look_up(token) == Caller("ours", Role.SUBMITTER, token_id)
    access.revoke_token(stored, None, token_id)
    assert Gate(stored).look_up(None) is None


def test_a_token_is_looked_up_once_in_a_while_and_its_end_counts_then(stored: Database) -> None:
    token_id, token = make(stored)
    clock = Clock()
    doors = Gate(stored, clock=clock)
    asked: list[str] = []
    event.listen(stored.engine, "before_cursor_execute", lambda *found: asked.append(found[2]))
    assert doors.recall(token) is None
    assert doors.look_up(token) is not None
    asked.clear()
    for _ in range(10):
        assert doors.recall(token) == Caller("ours", Role.READER, token_id)
    assert asked == []
    access.revoke_token(stored, None, token_id)
    clock.now += CACHE_SECONDS
    assert doors.recall(token) is None
    assert doors.look_up(token) is None


def test_a_token_that_is_revoked_while_it_is_looked_up_is_not_remembered(
    stored: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_id, token = make(stored)
    doors, find = Gate(stored), TokenRepository.find

    def find_and_revoke(tokens: TokenRepository, asked: str) -> TokenRow | None:
        found = find(tokens, asked)
        access.revoke_token(stored, None, token_id)
        doors.forget()
        return found

    monkeypatch.setattr(TokenRepository, "find", find_and_revoke)
    doors.look_up(token)
    assert doors.recall(token) is None


def test_a_remembered_token_is_no_good_from_the_moment_in_which_it_expires(stored: Database) -> None:
    _, token = make(stored, expires_at=datetime.now(UTC) + timedelta(seconds=0.5))
    doors = Gate(stored)
    assert doors.look_up(token) is not None
    time.sleep(0.5)
    assert doors.recall(token) is None
    assert doors.look_up(token) is None


def test_the_log_says_which_token_was_refused_and_why(
    stored: Database, caplog: pytest.LogCaptureFixture
) -> None:
    token_id, token = make(stored)
    access.revoke_token(stored, None, token_id)
    unknown = f"coterie_{'0' * 16}_{'x' * 43}"
    doors = Gate(stored)
    doors.look_up(token)
    doors.look_up(unknown)
    doors.look_up("garbage")
    assert [record.getMessage() for record in caplog.records] == [
        f"{token_id} was refused: it is revoked",
        "token_0000000000000000 was refused: it is not known",
    ]
    assert token not in caplog.text


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(garbage=st.text(max_size=200))
def test_garbage_opens_nothing(sqlite_database: Database, garbage: str) -> None:
    with sqlite_database.read() as session:
        exists = TokenRepository(session).exist()
    if not exists:
        make(sqlite_database)
    doors = Gate(sqlite_database)
    assert doors.recall(garbage) is None
    assert doors.look_up(garbage) is None


# Rates

SOMEBODY = Caller("ours", Role.READER, "token_1")
RATES = st.floats(min_value=0.1, max_value=1000)


@settings(max_examples=100, deadline=None)
@given(rate=RATES, waits=st.lists(st.floats(min_value=0, max_value=3), max_size=100))
def test_in_no_time_are_more_let_through_than_the_burst_and_the_rate(rate: float, waits: list[float]) -> None:
    clock = Clock()
    doors = Gate(Database("sqlite:////dev/null"), rate, clock)
    burst = max(1, int(rate * BURST_SECONDS))
    passed: list[float] = []
    for wait in waits:
        clock.now += wait
        try:
            doors.count(SOMEBODY)
        except TooManyRequests as refused:
            clock_then = clock.now
            clock.now += refused.retry_seconds + 1e-6
            doors.count(SOMEBODY)  # what it was told is right
            assert clock.now > clock_then
        passed.append(clock.now)
    for first in range(len(passed)):
        for last in range(first, len(passed)):
            assert last - first + 1 <= burst + rate * (passed[last] - passed[first]) + 1e-3


@given(rate=RATES, slower=st.floats(min_value=1.0, max_value=10), count=st.integers(1, 50))
def test_who_keeps_to_the_rate_is_never_refused(rate: float, slower: float, count: int) -> None:
    clock = Clock()
    doors = Gate(Database("sqlite:////dev/null"), rate, clock)
    for _ in range(count):
        doors.count(SOMEBODY)
        clock.now += slower / rate + 1e-9


def test_one_tokens_requests_are_not_anothers() -> None:
    doors = Gate(Database("sqlite:////dev/null"), 0.1, Clock())
    doors.count(SOMEBODY)
    with pytest.raises(TooManyRequests):
        doors.count(SOMEBODY)
    doors.count(Caller("ours", Role.READER, "token_2"))


def test_too_many_requests_are_told_when_to_come_back(tmp_path: Path, problem: Problem) -> None:
    with open_server(tmp_path / "data", requests_per_second=0.4) as server:
        _, token = make(server.database)
        _, other = make(server.database)
        answers = [server.client.get("/v1/tenant", headers=bearer(token)) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert "0.4 requests a second" in problem(answers[2], 429)["detail"]
        assert answers[2].headers["retry-after"] in ("2", "3")
        assert answers[2].headers["ratelimit-policy"] == '"token";q=2;w=5'
        assert re.fullmatch(r'"token";r=0;t=[23]', answers[2].headers["ratelimit"])
        assert server.client.get("/v1/tenant", headers=bearer(other)).status_code == 200
        for _ in range(5):
            assert server.client.get("/healthz", headers=bearer(token)).status_code == 200


# What is answered


def test_without_a_token_the_server_says_how_to_send_one(
    unchanging: tuple[Server, str], problem: Problem
) -> None:
    server, token = unchanging
    answer = server.client.get("/v1/jobs")
    assert "Authorization: Bearer" in problem(answer, 401)["detail"]
    assert answer.headers["www-authenticate"] == 'Bearer realm="coterie"'
    assert server.client.get("/v1/jobs", headers=bearer(token)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        [(b"Authorization", b"Bearer")],
        [(b"Authorization", b"Bearer ")],
        [(b"Authorization", b"")],
        [(b"Authorization", b"Bearer \xff\xfe\x80")],
        [(b"Authorization", "Bearer \N{PILE OF POO}".encode())],
        [(b"Authorization", b"Bearer " + b"x" * 10_000)],
        [(b"Authorization", b"Bearer coterie_" + b"0" * 16 + b"_" + b"x" * 43)],
        [(b"Authorization", b"Bearer {token} {token}")],
        [(b"Authorization", b"Bearer {token}x")],
        [(b"Authorization", b"Bearer {token}, Bearer {token}")],
        [(b"Authorization", b"Digest {token}")],
        [(b"Authorization", b"{token}")],
        [(b"Authorization", b"Basic {token}")],
        [(b"Authorization", b"Basic \xff")],
        [(b"Authorization", b"Basic Y290ZXJpZQ==")],
        [(b"Authorization", b"Bearer {token}"), (b"Authorization", b"Bearer {token}")],
        [(b"Authorization", b"Bearer {token}"), (b"authorization", b"Basic x")],
    ],
)
def test_whatever_is_no_token_is_refused_in_the_same_words(
    unchanging: tuple[Server, str], problem: Problem, headers: list[tuple[bytes, bytes]]
) -> None:
    server, token = unchanging
    sent = [(name, value.replace(b"{token}", token.encode())) for name, value in headers]
    answer = server.client.get("/v1/jobs", headers=sent)
    found = problem(answer, 401)
    assert found["detail"] == "the access token is not known, has expired or was revoked"
    assert answer.headers["www-authenticate"] == 'Bearer realm="coterie", error="invalid_token"'


def test_expired_and_revoked_tokens_are_refused_in_the_same_words(
    unchanging: tuple[Server, str], problem: Problem
) -> None:
    server, _ = unchanging
    _, expired = make(server.database, expires_at=datetime.now(UTC) + timedelta(milliseconds=1))
    revoked_id, revoked = make(server.database)
    access.revoke_token(server.database, None, revoked_id)
    time.sleep(0.002)
    details = {
        problem(server.client.get("/v1/jobs", headers=bearer(token)), 401)["detail"]
        for token in (expired, revoked, f"coterie_{'0' * 16}_{'x' * 43}")
    }
    assert len(details) == 1


def test_a_browser_is_asked_on_the_page_and_may_read_on_from_there(unchanging: tuple[Server, str]) -> None:
    server, token = unchanging
    for sent in ({}, basic("wrong"), bearer("wrong")):
        answer = server.client.get("/", headers=sent)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == 'Basic realm="coterie", charset="UTF-8"'
    for sent in (basic(token), basic(token, user=""), bearer(token)):
        assert server.client.get("/", headers=sent).status_code == 200
        assert server.client.get("/v1/jobs", headers=sent).status_code == 200


def test_what_a_browser_adds_by_itself_changes_nothing(
    unchanging: tuple[Server, str], problem: Problem
) -> None:
    server, token = unchanging
    problem(server.client.post("/v1/jobs/job_0/cancel", headers=basic(token)), 401)
    problem(server.client.post("/v1/jobs/job_0/cancel", headers=bearer(token)), 404)


def test_who_watches_the_server_needs_no_token(unchanging: tuple[Server, str]) -> None:
    server, _ = unchanging
    for path in READ_BY_ANYONE:
        assert server.client.get(path).status_code == 200, path


def test_a_role_that_is_too_small_is_told_which_it_takes(
    unchanging: tuple[Server, str], problem: Problem
) -> None:
    server, _ = unchanging
    _, token = make(server.database, Role.READER)
    answer = server.client.post("/v1/jobs", headers=bearer(token), json=SPEC)
    assert problem(answer, 403)["detail"] == "this takes a token of role submitter, and yours has reader"
    assert "admin" in problem(server.client.get("/v1/audit", headers=bearer(token)), 403)["detail"]


def test_who_asks_is_known_before_what_they_ask_is_looked_at(
    unchanging: tuple[Server, str], problem: Problem
) -> None:
    server, _ = unchanging
    _, reader = make(server.database, Role.READER)
    for sent, status in (({}, 401), (bearer(reader), 403)):
        for body in (b"{", b"x" * 2_000_000):
            problem(server.client.post("/v1/tokens", headers=sent, content=body), status)
    problem(server.client.get("/v1/jobs/job_0?surprise=1"), 401)
    problem(server.client.get("/v1/jobs?limit=0"), 401)
    problem(server.client.get("/v1/jobs/nonsense"), 401)


# The open server


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:8000", "127.1.2.3"]
)
def test_an_open_server_goes_by_this_machines_names(open_client: httpx.Client, host: str) -> None:
    assert open_client.get("/v1/jobs", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", ""),
        *("0.0.0.0", "10.0.0.1", "[::ffff:10.0.0.1]", "[", "[::1", "localhost@evil.example", "evil\xff"),
    ],
)
def test_an_open_server_goes_by_no_other_name(open_client: httpx.Client, problem: Problem, host: str) -> None:
    sent = {b"Host": host.encode("latin-1")}
    assert "coterie token create" in problem(open_client.get("/v1/jobs", headers=sent), 421)["detail"]
    assert open_client.get("/healthz", headers=sent).status_code == 200


def test_with_tokens_any_name_is_good(unchanging: tuple[Server, str]) -> None:
    server, token = unchanging
    sent = {**bearer(token), "Host": "coterie.example"}
    assert server.client.get("/v1/jobs", headers=sent).status_code == 200


def test_an_open_server_that_others_reach_is_open_to_nobody(client: httpx.Client) -> None:
    client.base_url = httpx.URL("http://10.1.2.3")
    assert client.get("/v1/jobs", headers={"Host": "127.0.0.1"}).status_code == 421


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:3000", "garbage", "http://["]
)
def test_a_page_of_another_origin_changes_nothing_on_an_open_server(
    server: Server, problem: Problem, origin: str
) -> None:
    job_id = server.submit()
    path = f"/v1/jobs/{job_id}/cancel"
    problem(server.client.post(path, headers={"Origin": origin}), 403)
    assert server.client.get(f"/v1/jobs/{job_id}", headers={"Origin": origin}).json()["state"] == "queued"
    assert server.client.post(path, headers={"Origin": "http://127.0.0.1"}).status_code == 200


def test_a_page_whose_origin_the_operator_named_may_change_something(tmp_path: Path) -> None:
    with open_server(tmp_path / "data", cors_origins="https://board.example") as server:
        path = f"/v1/jobs/{server.submit()}/cancel"
        assert server.client.post(path, headers={"Origin": "https://board.example"}).status_code == 200


# Tokens by the API


def test_an_admin_makes_lists_and_revokes_tokens_of_their_tenant(
    closed: tuple[Server, str], problem: Problem
) -> None:
    server, admin = closed
    make(server.database, tenant="theirs")
    asked = {"role": "submitter", "name": "ci", "expires_at": "2100-01-01T00:00:00+02:00"}
    answer = server.client.post("/v1/tokens", headers=bearer(admin), json=asked)
    made = answer.json()
    assert answer.status_code == 201
    assert answer.headers["cache-control"] == "no-store"
    assert {**made, "token": "", "id": "", "created_at": ""} == {
        "id": "",
        "tenant": "ours",
        "role": "submitter",
        "name": "ci",
        "created_at": "",
        "expires_at": "2099-12-31T22:00:00Z",
        "revoked_at": None,
        "token": "",
    }
    assert server.client.post("/v1/jobs", headers=bearer(made["token"]), json=SPEC).status_code == 201
    listed = server.client.get("/v1/tokens?limit=1", headers=bearer(admin)).json()
    assert listed["items"] == [{name: value for name, value in made.items() if name != "token"}]
    rest = server.client.get(f"/v1/tokens?cursor={listed['next_cursor']}", headers=bearer(admin)).json()
    assert [(token["role"], token["tenant"]) for token in rest["items"]] == [("admin", "ours")]
    for _ in range(2):
        answer = server.client.delete(f"/v1/tokens/{made['id']}", headers=bearer(admin))
        assert (answer.status_code, answer.content) == (204, b"")
    problem(server.client.get("/v1/jobs", headers=bearer(made["token"])), 401)


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/role"),
        ({"role": "king"}, "/role"),
        ({"role": "reader", "tenant": "theirs"}, "/tenant"),
        ({"role": "reader", "name": "x" * 201}, "/name"),
        ({"role": "reader", "name": "a\nb"}, "/name"),
        ({"role": "admin", "expires_at": "2020-01-01T00:00:00Z"}, "/expires_at"),
        ({"role": "admin", "expires_at": "2100-01-01T00:00:00"}, "/expires_at"),
        ({"role": "admin", "expires_at": "soon"}, "/expires_at"),
        ({"role": "admin", "expires_at": "9999-12-31T23:59:59-01:00"}, "/expires_at"),
        ({"role": "reader"}, "/role"),  # nobody could make another
        ({"role": "submitter"}, "/role"),
    ],
)
def test_a_token_that_can_not_be_is_refused_with_a_pointer(
    open_client: httpx.Client, problem: Problem, body: dict[str, Any], pointer: str
) -> None:
    problem(open_client.post("/v1/tokens", json=body), 422, pointer)


def test_the_first_token_closes_the_server(
    server: Server, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "CACHE_SECONDS", 0.0)
    made = server.client.post("/v1/tokens", json={"role": "admin"}).json()
    assert made["tenant"] == "default"
    problem(server.client.get("/v1/jobs"), 401)
    assert server.client.get("/v1/jobs", headers=bearer(made["token"])).status_code == 200


def test_a_tenant_sees_its_limits_and_what_it_uses(closed: tuple[Server, str]) -> None:
    server, token = closed
    server.client.headers.update(bearer(token))
    server.submit()
    access.set_limits(server.database, "ours", {"max_queued_jobs": "7", "max_device_seconds": "1.5"})
    access.set_limits(server.database, "ours", {"max_running_jobs": "3", "max_device_seconds": "none"})
    found = server.client.get("/v1/tenant").json()
    assert found["limits"] == {
        "max_queued_jobs": 7,
        "max_running_jobs": 3,
        "max_device_seconds": None,
        "max_stored_bytes": None,
    }
    assert found["usage"] == {
        "month": f"{datetime.now(UTC):%Y-%m}",
        "queued_jobs": 1,
        "running_jobs": 0,
        "device_seconds": 0.0,
        "stored_bytes": 0,
    }


def test_a_tenant_for_which_nothing_was_set_has_the_servers_limits(tmp_path: Path) -> None:
    with open_server(tmp_path / "data", tenant_max_queued_jobs=5, tenant_max_running_jobs=2) as server:
        access.set_limits(server.database, "default", {"max_running_jobs": "3"})
        found = server.client.get("/v1/tenant").json()["limits"]
    assert (found["max_queued_jobs"], found["max_running_jobs"]) == (5, 3)


# The log of changes


def changes(server: Server, **query: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.client.get("/v1/audit", params=query).json()["items"]
    return found


def test_every_change_is_logged_with_who_made_it_in_which_request(closed: tuple[Server, str]) -> None:
    server, token = closed
    server.client.headers.update(bearer(token))
    job_id = server.submit(name="faces")
    for action in ("pause", "resume", "cancel"):
        answer = server.client.post(f"/v1/jobs/{job_id}/{action}", headers={"X-Request-ID": f"my-{action}"})
        assert answer.status_code == 200
    found = changes(server)
    assert [(row["action"], row["target"], row["request_id"]) for row in found[:3]] == [
        ("job.cancel", job_id, "my-cancel"),
        ("job.resume", job_id, "my-resume"),
        ("job.pause", job_id, "my-pause"),
    ]
    assert {row["token_id"] for row in found[:4]} == {id_in(token)}
    assert found[3]["detail"] == {"name": "faces"}
    assert (found[4]["action"], found[4]["token_id"], found[4]["request_id"]) == ("token.create", None, None)
    assert changes(server, action="job.pause") == found[2:3]
    first = server.client.get("/v1/audit", params={"limit": 2}).json()
    assert first["items"] == found[:2]
    assert changes(server, limit=2, cursor=first["next_cursor"]) == found[2:4]


def test_what_did_not_happen_is_not_logged(closed: tuple[Server, str]) -> None:
    server, token = closed
    server.client.headers.update(bearer(token))
    key = {"Idempotency-Key": "once"}
    job_id = server.client.post("/v1/jobs", json=SPEC, headers=key).json()["id"]
    before = changes(server)
    assert server.client.post("/v1/jobs", json=SPEC, headers=key).status_code == 200
    assert server.client.post(f"/v1/jobs/{job_id}/resume").status_code == 409
    assert server.client.post("/v1/jobs/job_0/cancel").status_code == 404
    assert server.client.post("/v1/jobs", json={}).status_code == 422
    assert server.client.delete("/v1/tokens/token_0000000000000000").status_code == 404
    assert changes(server) == before


def test_a_tenant_sees_no_changes_of_others(closed: tuple[Server, str]) -> None:
    server, token = closed
    _, other = make(server.database, Role.ADMIN, "theirs")
    server.client.post("/v1/jobs", json=SPEC, headers=bearer(token))
    found = server.client.get("/v1/audit", headers=bearer(other)).json()["items"]
    assert [row["action"] for row in found] == ["token.create"]


# Secrets


@pytest.fixture
def everything_logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG):
        yield caplog


def test_tokens_are_in_no_log_no_table_no_file_and_no_answer(
    closed: tuple[Server, str], everything_logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, token = closed
    revoked_id, revoked = make(server.database)
    access.revoke_token(server.database, None, revoked_id)
    made = server.client.post("/v1/tokens", json={"role": "reader"}, headers=bearer(token)).json()["token"]
    answers = [
        server.client.request(method, path, headers=sent, json=body)
        for secret in (token, revoked, made)
        for sent in (bearer(secret), basic(secret), {"Authorization": secret}, bearer(f"{secret}x"))
        for method, path, body in (
            ("GET", "/", None),
            ("GET", "/v1/jobs", None),
            ("GET", "/v1/jobs/job_0", None),
            ("GET", "/v1/audit", None),
            ("GET", "/v1/tokens", None),
            ("POST", "/v1/jobs", SPEC),
            ("POST", "/v1/jobs", {}),
        )
    ]
    server.dispatcher.node_resources = None  # type: ignore[assignment] # a fault of ours
    answers.append(server.client.post("/v1/jobs", json=SPEC, headers=bearer(token)))
    assert answers[-1].status_code == 500
    secrets = [secret.split("_", 2)[2] for secret in (token, revoked, made)]
    texts = {
        "log": everything_logged.text + "".join(str(vars(record)) for record in everything_logged.records),
        "answers": "".join(f"{answer.headers} {answer.text}" for answer in answers),
        "tables": _dump(server.database),
        "files": "".join(
            file.read_bytes().decode("latin-1")
            for file in server.settings.data_dir.rglob("*")
            if file.is_file()
        ),
    }
    for place, content in texts.items():
        assert content, place
        for secret in secrets:
            assert secret not in content, place


def _dump(database: Database) -> str:
    with database.read() as session:
        names = inspect(session.connection()).get_table_names()
        return json.dumps(
            {
                name: [list(map(str, row)) for row in session.execute(text(f"SELECT * FROM {name}"))]
                for name in names
            }
        )
