"""Webhooks: made by admins, told of events at least once, and never a way into the server's network."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

import anyio
import httpcore
import pytest
from sqlalchemy import select, text
from standardwebhooks import Webhook, WebhookVerificationError

from coterie.service import delivery, webhooks
from coterie.service.public_network import AddressForbidden, PublicNetwork, is_public, parse_url, resolve
from coterie.service.storage.database import Database
from coterie.service.storage.events import EventKind, record_event
from coterie.service.storage.outbox import DeliveryState, OutboxRepository
from coterie.service.storage.tables import JobRow
from coterie.service.storage.webhooks import MOST_WEBHOOKS
from tests.service.conftest import Problem, Server, open_server
from tests.service.receiver import Receiver, cut, flood, hang, receiver, status, trickle
from tests.service.streams import begin, end, happen, wait_until

PAUSES = delivery.RETRY_SECONDS


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "RETRY_SECONDS", (0.02, 0.02))
    monkeypatch.setattr(delivery, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(delivery, "ATTEMPT_SECONDS", 0.5)
    monkeypatch.setattr(delivery, "LEFT_ALONE_SECONDS", 0.02)


@pytest.fixture(params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """A server on each kind of database in turn, which may call this machine."""
    given = {}
    if request.param == "postgresql":
        database: Database = request.getfixturevalue("postgres_database")
        given["database_url"] = database.engine.url.render_as_string(hide_password=False)
    with open_server(tmp_path / "data", webhook_allow_private=True, **given) as server:
        yield server


@pytest.fixture
def sqlite_server(tmp_path: Path) -> Iterator[Server]:
    with open_server(tmp_path / "data", webhook_allow_private=True) as server:
        yield server


@pytest.fixture
def target() -> Iterator[Receiver]:
    with receiver() as target:
        yield target


def make(server: Server, url: str, *kinds: str) -> dict[str, Any]:
    answer = server.client.post("/v1/webhooks", json={"url": url, "kinds": kinds or ["trial"]})
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == f"/v1/webhooks/{answer.json()['id']}"
    made: dict[str, Any] = answer.json()
    return made


def deliveries(server: Server, webhook: dict[str, Any], **query: Any) -> list[dict[str, Any]]:
    answer = server.client.get(f"/v1/webhooks/{webhook['id']}/deliveries", params=query)
    assert answer.status_code == 200, answer.text
    items: list[dict[str, Any]] = answer.json()["items"]
    return items


def settled(server: Server, webhook: dict[str, Any]) -> list[dict[str, Any]]:
    """The deliveries, once none is pending."""
    wait_until(lambda: not deliveries(server, webhook, state="pending"))
    return deliveries(server, webhook)


def test_a_webhook_is_told_of_the_kinds_that_it_wants(server: Server, target: Receiver) -> None:
    webhook = make(server, target.url, "trial", "job")
    job_id = begin(server.database)
    happen(server.database, job_id, "trial", number=0, name="ünïcode\u2028")
    happen(server.database, job_id, "measurement", epoch=1)
    happen(server.database, job_id, "front", size=1)
    end(server.database, job_id)
    found = settled(server, webhook)
    assert [(item["sequence"], item["kind"], item["state"]) for item in found] == [
        (5, "job", "delivered"),
        (2, "trial", "delivered"),
        (1, "job", "delivered"),
    ]
    assert {
        (item["attempts"], item["last_status"], item["last_error"], item["due_at"]) for item in found
    } == {(1, 204, None, None)}
    told = {}
    for path, headers, body in target.requests:
        message = Webhook(webhook["secret"]).verify(body, headers)
        assert (path, headers["content-type"]) == ("/hook", "application/json")
        told[headers["webhook-id"]] = message
    assert set(told) == {item["id"] for item in found}
    trial = told[found[1]["id"]]
    assert trial["type"] == "trial"
    assert trial["timestamp"] == trial["data"]["at"]
    assert trial["data"]["job_id"] == job_id
    assert (trial["data"]["sequence"], trial["data"]["data"]) == (2, {"number": 0, "name": "ünïcode\u2028"})


def test_a_signature_is_of_one_secret_and_one_body(sqlite_server: Server, target: Receiver) -> None:
    webhook = make(sqlite_server, target.url)
    happen(sqlite_server.database, begin(sqlite_server.database), "trial", number=0)
    settled(sqlite_server, webhook)
    _, headers, body = target.requests[0]
    with pytest.raises(WebhookVerificationError):
        Webhook(webhook["secret"]).verify(body.replace(b"trial", b"trail"), headers)
    other = make(sqlite_server, target.url)
    assert other["secret"] != webhook["secret"]
    with pytest.raises(WebhookVerificationError):
        Webhook(other["secret"]).verify(body, headers)


def test_a_failed_delivery_is_made_again_with_the_same_id(server: Server, target: Receiver) -> None:
    target.answers = [status(500), cut, status(200)]
    webhook = make(server, target.url)
    happen(server.database, begin(server.database), "trial", number=0)
    [item] = settled(server, webhook)
    assert (item["state"], item["attempts"], item["last_error"]) == ("delivered", 3, None)
    assert {headers["webhook-id"] for _, headers, _ in target.requests} == {item["id"]}
    assert len(target.requests) == 3


@pytest.mark.parametrize(
    ("answer", "code", "error"),
    [
        (status(500), 500, "answered 500"),
        (status(404), 404, "answered 404"),
        (status(302, Location="http://127.0.0.1:1/"), 302, "answered 302"),
        (hang(2), None, "no answer within 0.5 s"),
        (trickle(2), None, "no answer within 0.5 s"),
        (cut, None, "RemoteProtocolError"),
    ],
    ids=["500", "404", "redirect", "hang", "trickle", "cut"],
)
def test_a_delivery_that_never_succeeds_ends_in_the_dead_letter_list(
    sqlite_server: Server, target: Receiver, answer: Any, code: int | None, error: str
) -> None:
    target.answers = [answer]
    webhook = make(sqlite_server, target.url)
    happen(sqlite_server.database, begin(sqlite_server.database), "trial", number=0)
    settled(sqlite_server, webhook)
    [item] = deliveries(sqlite_server, webhook, state="dead")
    assert (item["attempts"], item["last_status"]) == (3, code)
    assert error in item["last_error"]
    assert len(target.requests) == 3  # none of them elsewhere


def test_the_body_of_an_answer_is_not_read(sqlite_server: Server, target: Receiver) -> None:
    target.answers = [flood]
    webhook = make(sqlite_server, target.url)
    happen(sqlite_server.database, begin(sqlite_server.database), "trial", number=0)
    [item] = settled(sqlite_server, webhook)
    assert (item["state"], item["last_status"]) == ("delivered", 200)


def test_a_dead_delivery_can_be_retried(server: Server, target: Receiver, problem: Problem) -> None:
    target.answers = [status(503)]
    webhook = make(server, target.url)
    happen(server.database, begin(server.database), "trial", number=0)
    [item] = settled(server, webhook)
    target.answers = [status(200)]
    path = f"/v1/webhooks/{webhook['id']}/deliveries"
    again = server.client.post(f"{path}/{item['id']}/retry").json()
    assert (again["state"], again["attempts"], again["id"]) == ("pending", 0, item["id"])
    [item] = settled(server, webhook)
    assert (item["state"], item["attempts"]) == ("delivered", 1)
    problem(server.client.post(f"{path}/{item['id']}/retry"), 409)
    problem(server.client.post(f"{path}/delivery_0/retry"), 404)


def test_a_receiver_that_is_gone_is_told_nothing_more(
    server: Server, target: Receiver, problem: Problem
) -> None:
    target.answers = [status(410)]
    webhook = make(server, target.url)
    job_id = begin(server.database)
    for number in range(3):
        happen(server.database, job_id, "trial", number=number)
    found = settled(server, webhook)
    shown = server.client.get(f"/v1/webhooks/{webhook['id']}").json()
    assert shown["disabled_at"] is not None
    happen(server.database, job_id, "trial", number=3)
    assert {item["state"] for item in deliveries(server, webhook)} == {"dead"}
    assert len(deliveries(server, webhook)) == len(found)
    assert len(target.requests) == 1
    path = f"/v1/webhooks/{webhook['id']}/deliveries/{found[0]['id']}/retry"
    problem(server.client.post(path), 409)


def test_a_slow_receiver_holds_up_only_itself(sqlite_server: Server, target: Receiver) -> None:
    target.answers = [hang(1)]
    with receiver() as quick:
        slow_one, quick_one = make(sqlite_server, target.url), make(sqlite_server, quick.url)
        job_id = begin(sqlite_server.database)
        for number in range(10):
            happen(sqlite_server.database, job_id, "trial", number=number)
        settled(sqlite_server, quick_one)
        assert len(quick.requests) == 10
        assert deliveries(sqlite_server, slow_one, state="pending")


def test_dead_receivers_with_much_to_be_told_hold_up_only_themselves(
    sqlite_server: Server, target: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are more of them than places."""
    monkeypatch.setattr(delivery, "MOST_UNDER_WAY", 2)
    monkeypatch.setattr(delivery, "ATTEMPT_SECONDS", 0.1)
    monkeypatch.setattr(delivery, "LEFT_ALONE_SECONDS", 60.0)
    target.answers = [hang(0.2)]
    for _ in range(3):
        make(sqlite_server, target.url)
    job_id = begin(sqlite_server.database)
    for number in range(20):
        happen(sqlite_server.database, job_id, "trial", number=number)
    with receiver() as quick:
        webhook = make(sqlite_server, quick.url, "front")
        happen(sqlite_server.database, job_id, "front", size=1)
        assert [item["state"] for item in settled(sqlite_server, webhook)] == ["delivered"]
    assert len(target.requests) < 20  # of 180 attempts that are still to be made


def test_while_names_are_looked_up_others_wait_for_their_turn(
    sqlite_server: Server, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "_LOOK_UPS", BoundedSemaphore(1))
    with webhooks._LOOK_UPS:
        answer = sqlite_server.client.post(
            "/v1/webhooks", json={"url": "http://127.0.0.1/", "kinds": ["job"]}
        )
    problem(answer, 503)
    make(sqlite_server, "http://127.0.0.1:1/")


def test_what_a_dead_server_was_sending_is_sent_by_another(database: Database) -> None:
    _insert(database, "http://127.0.0.1:1/")
    now = datetime.now(UTC)
    with database.write() as session:
        [claimed] = OutboxRepository(session).claim(now, now + timedelta(seconds=60), 5, ())
    with database.write() as session:
        outbox = OutboxRepository(session)
        assert outbox.claim(now + timedelta(seconds=59), now, 5, ()) == []
        [again] = outbox.claim(now + timedelta(seconds=61), now + timedelta(seconds=120), 5, ())
    assert (again.id, claimed.attempt, again.attempt) == (claimed.id, 1, 2)
    with database.write() as session:  # the first one was not dead after all: what it says counts no more
        OutboxRepository(session).settle(claimed, DeliveryState.DEAD, now)
    with database.read() as session:
        assert session.scalar(text("SELECT state FROM deliveries")) == "pending"


def test_two_servers_deliver_once_each(postgres_database: Database, tmp_path: Path, target: Receiver) -> None:
    url = postgres_database.engine.url.render_as_string(hide_password=False)
    with ExitStack() as stack:
        first, _ = (
            stack.enter_context(open_server(tmp_path / name, webhook_allow_private=True, database_url=url))
            for name in ("a", "b")
        )
        webhook = make(first, target.url)
        job_id = begin(postgres_database)
        for number in range(30):
            happen(postgres_database, job_id, "trial", number=number)
        assert {item["state"] for item in settled(first, webhook)} == {"delivered"}
    assert len(target.requests) == 30


def test_an_event_that_is_rolled_back_is_told_to_nobody(database: Database) -> None:
    job_id = _insert(database, "http://127.0.0.1:1/")

    def fail() -> None:
        with database.write() as session:
            row = session.scalars(select(JobRow).where(JobRow.id == job_id)).one()
            record_event(session, row, EventKind.TRIAL, {}, datetime.now(UTC))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with database.read() as session:
        assert session.scalar(text("SELECT count(*) FROM deliveries")) == 1


def test_other_tenants_are_told_nothing(database: Database) -> None:
    _insert(database, "http://127.0.0.1:1/")
    happen(database, begin(database, tenant="others"), "trial", number=0)
    with database.read() as session:
        assert session.scalar(text("SELECT count(*) FROM deliveries")) == 1


def test_a_webhook_that_is_deleted_meanwhile_undoes_no_event(postgres_database: Database) -> None:
    job_id = _insert(postgres_database, "http://127.0.0.1:1/")
    with postgres_database.write() as session:
        session.execute(text("DELETE FROM webhooks"))
        writer = threading.Thread(target=happen, args=(postgres_database, job_id, "trial"))
        writer.start()
        time.sleep(0.2)
        assert writer.is_alive()  # it waits to see whether the webhook stays
    writer.join()
    with postgres_database.read() as session:
        assert session.scalar(text("SELECT count(*) FROM events")) == 3
        assert session.scalar(text("SELECT count(*) FROM deliveries")) == 0


def test_old_deliveries_are_forgotten(database: Database) -> None:
    _insert(database, "http://127.0.0.1:1/")
    later = datetime.now(UTC) + timedelta(days=31)
    with database.write() as session:
        OutboxRepository(session).forget(later, delivery.KEPT)
        assert session.scalar(text("SELECT count(*) FROM deliveries")) == 1  # it is pending
        session.execute(text("UPDATE deliveries SET state = 'dead'"))
        OutboxRepository(session).forget(later, delivery.KEPT)
        assert session.scalar(text("SELECT count(*) FROM deliveries")) == 0


def test_attempts_go_on_for_about_a_day_ever_more_rarely() -> None:
    assert list(PAUSES) == sorted(PAUSES)
    assert timedelta(hours=20) < timedelta(seconds=sum(PAUSES)) < timedelta(hours=28)


def test_webhooks_are_listed_shown_and_deleted(server: Server, problem: Problem) -> None:
    first, second = (make(server, f"http://127.0.0.1:1/{name}", "job", "front") for name in "ab")
    listed = server.client.get("/v1/webhooks")
    assert [item["id"] for item in listed.json()["items"]] == [first["id"], second["id"]]
    shown = server.client.get(f"/v1/webhooks/{first['id']}")
    assert shown.json() == {name: value for name, value in first.items() if name != "secret"}
    assert "whsec_" not in listed.text + shown.text
    assert server.client.delete(f"/v1/webhooks/{first['id']}").status_code == 204
    for answer in (
        server.client.get(f"/v1/webhooks/{first['id']}"),
        server.client.delete(f"/v1/webhooks/{first['id']}"),
        server.client.get(f"/v1/webhooks/{first['id']}/deliveries"),
    ):
        problem(answer, 404)
    with server.database.read() as session:
        actions = session.execute(text("SELECT action, target FROM audit ORDER BY position")).all()
    assert [tuple(row) for row in actions][-3:] == [
        ("webhook.create", first["id"]),
        ("webhook.create", second["id"]),
        ("webhook.delete", first["id"]),
    ]


def test_deliveries_come_in_pages(sqlite_server: Server, problem: Problem) -> None:
    webhook = make(sqlite_server, "http://127.0.0.1:1/")
    job_id = begin(sqlite_server.database)
    for number in range(5):
        happen(sqlite_server.database, job_id, "trial", number=number)
    path = f"/v1/webhooks/{webhook['id']}/deliveries"
    seen: list[int] = []
    cursor = None
    while True:
        page = sqlite_server.client.get(path, params={"limit": 2, **({"cursor": cursor} if cursor else {})})
        seen += [item["sequence"] for item in page.json()["items"]]
        cursor = page.json()["next_cursor"]
        if cursor is None:
            break
    assert seen == [6, 5, 4, 3, 2]
    problem(sqlite_server.client.get(path, params={"cursor": "x"}), 400, "/query/cursor")


def test_there_is_an_end_to_how_many_there_are(sqlite_server: Server, problem: Problem) -> None:
    for number in range(MOST_WEBHOOKS):
        make(sqlite_server, f"http://127.0.0.1:1/{number}")
    problem(
        sqlite_server.client.post("/v1/webhooks", json={"url": "http://127.0.0.1:1/", "kinds": ["job"]}), 409
    )


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"url": "http://127.0.0.1/", "kinds": []}, "/kinds"),
        ({"url": "http://127.0.0.1/", "kinds": ["measurement"]}, "/kinds/0"),
        ({"url": "http://127.0.0.1/", "kinds": ["job", "job"]}, "/kinds"),
        ({"url": "ftp://127.0.0.1/", "kinds": ["job"]}, "/url"),
        ({"url": "http://u:p@127.0.0.1/", "kinds": ["job"]}, "/url"),
        ({"url": "http://127.0.0.1:99999/", "kinds": ["job"]}, "/url"),
        ({"url": "http://127.0.0.1/\r\nX-Evil: 1", "kinds": ["job"]}, "/url"),
        ({"url": f"http://127.0.0.1/{'x' * 2000}", "kinds": ["job"]}, "/url"),
        ({"url": "http://nowhere.invalid/", "kinds": ["job"]}, "/url"),
        ({"url": "http:///x", "kinds": ["job"]}, "/url"),
        ({"url": "http://xn--/", "kinds": ["job"]}, "/url"),
        ({"url": 7, "kinds": ["job"]}, "/url"),
        ({"url": "http://127.0.0.1/", "kinds": ["job"], "secret": "mine"}, "/secret"),
    ],
)
def test_a_bad_webhook_is_refused(
    one_server: Server, problem: Problem, body: dict[str, Any], pointer: str
) -> None:
    problem(one_server.client.post("/v1/webhooks", json=body), 422, pointer)


@pytest.fixture(scope="module")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with open_server(tmp_path_factory.mktemp("data"), webhook_allow_private=True) as server:
        yield server


PRIVATE = [
    *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
    *("100.64.0.1", "100.100.100.200", "192.0.0.192", "168.63.129.16", "198.18.0.1", "192.0.2.1"),
    *("224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1"),
    *("64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::", "2001:0:4136:e378::1", "fe80::1", "fe80::1%eth0"),
    *("fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1"),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_an_address_that_is_not_public_is_known(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_a_public_address_is_known(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0"),
        *("[::1]", "[::ffff:127.0.0.1]", "[::]", "LOCALHOST", "localhost.", "169.254.169.254"),
    ],
)
def test_without_leave_no_webhook_is_made_to_this_machine(
    closed_server: Server, problem: Problem, host: str
) -> None:
    answer = closed_server.client.post("/v1/webhooks", json={"url": f"http://{host}/", "kinds": ["job"]})
    problem(answer, 422, "/url")


@pytest.fixture(scope="module")
def closed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with open_server(tmp_path_factory.mktemp("data")) as server:
        yield server


def test_a_name_that_turns_private_later_is_not_connected_to(
    tmp_path: Path, target: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: public when the webhook is made, this machine when it is told."""
    asked: list[str] = []
    true_answer = socket.getaddrinfo

    def rebinding(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host != "rebinding.example":
            return true_answer(host, *args, **kwargs)
        asked.append(host)
        return true_answer("8.8.8.8" if len(asked) == 1 else "127.0.0.1", *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    with open_server(tmp_path / "data") as server:
        webhook = make(server, target.url.replace("127.0.0.1", "rebinding.example"))
        happen(server.database, begin(server.database), "trial", number=0)
        [item] = settled(server, webhook)
    assert item["state"] == "dead"
    assert "not public" in item["last_error"]
    assert target.requests == []


def test_a_connection_goes_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second look at the name, which could tell another one, is never taken."""
    connected: list[str] = []

    class Recorder(httpcore.AnyIOBackend):
        async def connect_tcp(self, host: str, *_: Any, **__: Any) -> httpcore.AsyncNetworkStream:
            connected.append(host)
            raise httpcore.ConnectError

    network = PublicNetwork(allow_private=False)
    monkeypatch.setattr(network, "_network", Recorder())
    addresses = [(2, 1, 6, "", (address, 0)) for address in ("8.8.8.8", "1.1.1.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)

    async def connect() -> None:
        await network.connect_tcp("public.example", 443)

    with pytest.raises(httpcore.ConnectError):
        anyio.run(connect)
    assert connected == ["8.8.8.8", "1.1.1.1"]
    addresses.append((2, 1, 6, "", ("10.0.0.1", 0)))  # one is enough to distrust the name
    with pytest.raises(AddressForbidden, match="not public"):
        anyio.run(connect)
    assert len(connected) == 2


def test_no_proxy_of_the_environment_is_asked(
    sqlite_server: Server, target: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    webhook = make(sqlite_server, target.url)
    happen(sqlite_server.database, begin(sqlite_server.database), "trial", number=0)
    assert settled(sqlite_server, webhook)[0]["state"] == "delivered"


@pytest.mark.parametrize(
    "url", ["http://a b/", "http://\x00/", "//x", "x", "http://[::1", "mailto:a@b", "http://xn--/"]
)
def test_what_is_no_url_is_no_place_to_call(url: str) -> None:
    with pytest.raises(AddressForbidden):
        resolve(parse_url(url).raw_host.decode(), allow_private=True)


def _insert(database: Database, url: str) -> str:
    """A job with an event that a webhook is to be told, and another event before it."""
    job_id = begin(database)
    with database.write() as session:
        session.execute(
            text(
                "INSERT INTO webhooks (id, tenant, url, secret, kinds, created_at) VALUES "
                "('webhook_0', 'default', :url, 'whsec_c2VjcmV0', :kinds, '2026-11-25 00:00:00')"
            ),
            {"url": url, "kinds": json.dumps(["trial"])},
        )
    happen(database, job_id, "trial", number=0)
    return job_id
