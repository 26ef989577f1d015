"""What all answers have in common: ids, headers, tags, compression, HEAD, CORS; and clients that are slow."""

import asyncio
import io
import json
import logging
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import Request
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from coterie.service.app import create_app
from coterie.service.config import Settings
from coterie.service.middleware import LIMIT_URL, none_match
from coterie.service.protocol import Protocol
from coterie.service.request_id import RequestIdFilter
from coterie.service.serving import _listening, _Server, server_config
from tests.service.conftest import Problem, RecordingDispatcher, Server, open_server
from tests.service.live import live_server, say

ORIGIN = "https://dashboard.example.org"
SECONDS = 0.3  # that the hasty server waits for its clients


class Hasty(Protocol):
    head_seconds = SECONDS
    body_seconds = SECONDS
    stall_seconds = SECONDS


@contextmanager
def running(config: uvicorn.Config) -> Iterator[tuple[str, int]]:
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        try:
            yield listener.getsockname()
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def listening(data_dir: Path, **settings: int) -> Iterator[tuple[str, int]]:
    """A server that loses patience soon."""
    with live_server(data_dir, protocol=Hasty, **settings) as server:
        url = httpx.URL(server.url)
        assert url.port is not None
        yield url.host, url.port


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    with listening(tmp_path_factory.mktemp("data")) as address:
        yield address


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Of a server that no test writes to."""
    with open_server(tmp_path_factory.mktemp("data")) as server:
        yield server.client


def test_an_answer_has_the_id_that_its_client_gave(client: httpx.Client) -> None:
    answer = client.get("/healthz", headers={"X-Request-ID": "trace-1:2.3_4="})
    assert answer.headers["x-request-id"] == "trace-1:2.3_4="


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 101, "a\tb", "<b>", "ü"])
def test_an_answer_has_an_id_of_its_own_where_the_client_gave_no_sane_one(
    client: httpx.Client, given: str | None
) -> None:
    headers = {} if given is None else {"X-Request-ID": given.encode()}
    ids = {client.get("/healthz", headers=headers).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    assert all(re.fullmatch("req_[0-9a-f]{16}", name) for name in ids)


def test_a_fault_of_ours_is_found_in_the_log_by_the_requests_id(
    server: Server, problem: Problem, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.handler.addFilter(RequestIdFilter())
    server.dispatcher.node_resources = None  # type: ignore[assignment]
    job = {"dataset": {"source": "digits"}, "budget": {"trials": 1}}
    answer = server.client.post("/v1/jobs", json=job, headers={"X-Request-ID": "mine"})
    assert problem(answer, 500)["request_id"] == "mine"
    assert "Traceback" not in answer.text
    [record] = [record for record in caplog.records if record.exc_info]
    assert (record.request_id, record.getMessage()) == ("mine", "unexpected error in POST /v1/jobs")  # type: ignore[attr-defined]


def test_log_records_outside_of_a_request_have_no_id() -> None:
    record = logging.makeLogRecord({})
    assert RequestIdFilter().filter(record)
    assert record.__dict__["request_id"] == "-"


@pytest.mark.parametrize("path", ["/healthz", "/v1/jobs", "/v1/jobs/job_0", "/nothing", "/", "/docs"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "OPTIONS"])
def test_every_answer_has_the_headers_that_keep_browsers_safe(
    client: httpx.Client, method: str, path: str
) -> None:
    headers = client.request(method, path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert "default-src" in headers["content-security-policy"]
    assert headers["cache-control"] in {"no-store", "private, no-cache"}
    assert headers["x-request-id"]
    assert "access-control-allow-origin" not in headers
    assert "server" not in headers


def test_the_page_of_the_documents_may_load_what_it_needs(client: httpx.Client) -> None:
    policy = client.get("/docs").headers["content-security-policy"]
    assert "script-src 'self' 'unsafe-inline'" in policy
    assert "http" not in policy


def test_json_has_a_tag_and_is_not_sent_twice(client: httpx.Client) -> None:
    first = client.get("/v1/families")
    assert re.fullmatch('W/"[0-9a-f]{32}"', first.headers["etag"])
    assert first.headers["cache-control"] == "private, no-cache"
    for tags in (
        first.headers["etag"],
        first.headers["etag"].removeprefix("W/"),
        "*",
        f'"x", {first.headers["etag"]}',
    ):
        again = client.get("/v1/families", headers={"If-None-Match": tags})
        assert (again.status_code, again.content) == (304, b"")
        for name in ("etag", "cache-control", "vary", "x-request-id"):
            assert name in again.headers
        assert again.headers["etag"] == first.headers["etag"]
        assert not {"content-type", "content-encoding"} & set(again.headers)
    assert client.get("/v1/families", headers={"If-None-Match": '"x", W/"y"'}).content == first.content


def test_the_tag_of_what_changed_is_another_one(server: Server) -> None:
    before = server.client.get("/v1/jobs").headers["etag"]
    server.submit()
    answer = server.client.get("/v1/jobs", headers={"If-None-Match": before})
    assert (answer.status_code, len(answer.json()["items"])) == (200, 1)


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/jobs/job_0"), ("GET", "/"), ("PUT", "/v1/jobs")])
def test_what_is_no_json_of_ours_has_no_tag(client: httpx.Client, method: str, path: str) -> None:
    answer = client.request(method, path, headers={"If-None-Match": "*"})
    assert answer.status_code != 304
    assert "etag" not in answer.headers


def _asks(header: str) -> Request:
    return Request({"type": "http", "headers": [(b"if-none-match", header.encode("latin-1"))]})


_TAGS = st.from_regex(r'\A(W/)?"[!#-~]{0,8}"\Z')


@given(st.lists(_TAGS), _TAGS, st.sampled_from([",", ", ", " ,\t"]))
def test_a_tag_is_found_among_others_weak_or_not(tags: list[str], tag: str, between: str) -> None:
    strong = {other.removeprefix("W/") for other in tags}
    header = between.join(tags)
    assert none_match(_asks(header), tag) == (tag.removeprefix("W/") not in strong)
    assert not none_match(_asks(between.join([*tags, tag])), tag)


def test_a_large_answer_is_compressed_for_who_takes_it(client: httpx.Client) -> None:
    plain = client.get("/v1/families", headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers
    packed = client.get("/v1/families", headers={"Accept-Encoding": "gzip"})
    assert packed.headers["content-encoding"] == "gzip"
    assert int(packed.headers["content-length"]) < len(plain.content) / 3
    assert packed.content == plain.content
    assert packed.headers["etag"] == plain.headers["etag"]
    for answer in (plain, packed):
        assert answer.headers["vary"] == "Accept-Encoding"


def test_a_small_answer_is_not_compressed(client: httpx.Client) -> None:
    assert "content-encoding" not in client.get("/healthz").headers


def test_a_compressed_file_is_not_the_file_itself(searched: tuple[Server, str]) -> None:
    """Ranges and a strong tag are of the file as it is."""
    server, _ = searched
    content = json.dumps({"family": "shared", "padding": " " * 5000})
    server.write_file("trial_0", "architecture.json", content.encode())
    path = "/v1/trials/trial_0/architecture"
    plain = server.client.get(path, headers={"Accept-Encoding": "identity"})
    packed = server.client.get(path)
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.headers["etag"] == f"W/{plain.headers['etag']}"
    assert "accept-ranges" not in packed.headers
    assert packed.content == plain.content
    again = server.client.get(path, headers={"If-None-Match": packed.headers["etag"]})
    assert again.status_code == 304


def test_weights_are_sent_as_they_are(searched: tuple[Server, str]) -> None:
    server, _ = searched
    server.write_file("trial_0", "weights.safetensors", bytes(10_000))
    answer = server.client.get("/v1/trials/trial_0/model")
    assert "content-encoding" not in answer.headers
    assert answer.headers["content-length"] == "10000"


@pytest.mark.parametrize(
    "path", ["/healthz", "/v1/jobs", "/v1/families", "/", "/docs", "/openapi.json", "/v1/jobs/job_0"]
)
def test_head_is_get_without_its_body(client: httpx.Client, path: str) -> None:
    get, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    for headers in (get.headers, head.headers):
        del headers["x-request-id"]
    if get.is_error:  # the document holds the id
        assert abs(int(get.headers.pop("content-length")) - int(head.headers.pop("content-length"))) < 100
    assert head.headers == get.headers


def test_options_names_what_a_path_takes(client: httpx.Client, problem: Problem) -> None:
    answer = client.options("/v1/jobs")
    assert (answer.status_code, answer.content) == (204, b"")
    assert answer.headers["allow"] == "GET, HEAD, OPTIONS, POST"
    problem(client.options("/nothing"), 404)


def _preflight(client: httpx.Client, origin: str, method: str = "POST") -> httpx.Response:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization, content-type, idempotency-key",
    }
    return client.options("/v1/jobs", headers=headers)


def test_pages_of_named_origins_may_call_and_no_others(tmp_path: Path) -> None:
    with open_server(tmp_path, cors_origins=f"{ORIGIN}, http://localhost:3000") as server:
        allowed = _preflight(server.client, ORIGIN)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == ORIGIN
        assert "Authorization" in allowed.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in allowed.headers
        for refused in (
            _preflight(server.client, "https://example.org"),
            _preflight(server.client, ORIGIN, "TRACE"),
        ):
            assert refused.status_code == 403
            assert refused.headers["content-type"] == "application/problem+json"
        assert "access-control-allow-origin" not in _preflight(server.client, "https://example.org").headers
        for origin in (ORIGIN, "https://example.org"):
            answer = server.client.get("/v1/families", headers={"Origin": origin})
            assert answer.headers.get("access-control-allow-origin") == (origin if origin == ORIGIN else None)
            assert set(answer.headers["vary"].split(", ")) == {"Accept-Encoding", "Origin"}


def test_without_named_origins_no_page_may_call(client: httpx.Client) -> None:
    assert not [name for name in _preflight(client, ORIGIN).headers if name.startswith("access-control")]


@pytest.mark.parametrize("origins", ["*", "https://*.org", "example.org", "https://example.org/path"])
def test_an_origin_is_a_scheme_and_a_host(tmp_path: Path, origins: str) -> None:
    with pytest.raises(ValueError, match="cors_origins"):
        Settings(data_dir=tmp_path, _env_file=None, cors_origins=origins)  # type: ignore[arg-type]


def test_a_url_or_headers_beyond_all_measure_are_refused(client: httpx.Client, problem: Problem) -> None:
    problem(client.get("/v1/jobs", params={"name": "x" * LIMIT_URL}), 414)
    problem(client.get("/v1/jobs", headers={"X": "x" * 20_000}), 431)
    problem(client.get("/v1/jobs", headers={f"X-{number}": "x" for number in range(120)}), 431)
    assert client.get("/v1/jobs", params={"name": "x" * 200}).status_code == 200


def test_what_is_no_http_is_answered_with_a_problem(address: tuple[str, int]) -> None:
    status, headers, body = say(address, b"HELLO\r\n\r\n")
    assert (status, headers["content-type"]) == (400, "application/problem+json")
    assert headers["connection"] == "close"
    document = json.loads(body)
    assert (document["status"], document["type"]) == (400, "urn:coterie:problem:malformed-request")
    assert document["request_id"] == headers["x-request-id"]


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([b"GET /healthz HTTP/1.1\r\n", *[b"X: y\r\n"] * 20], id="headers"),
        pytest.param([b"G", b"E", b"T", *[b" "] * 20], id="the first line"),
    ],
)
def test_a_head_that_trickles_is_given_up(address: tuple[str, int], parts: list[bytes]) -> None:
    began = time.monotonic()
    status, _, body = say(address, *parts, pause=SECONDS / 5)
    assert status in {408, 0}  # who goes on to send after the end may not get to read
    assert status == 0 or "headers" in json.loads(body)["detail"]
    assert time.monotonic() - began < 20 * SECONDS


@pytest.mark.parametrize("path", [b"/v1/jobs", b"/v1/jobs/job_0/cancel"])
def test_a_body_that_does_not_come_is_given_up(address: tuple[str, int], path: bytes) -> None:
    """Read by the app or not, it holds the connection no longer."""
    began = time.monotonic()
    head = (
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100\r\n\r\n" % path
    )
    status, headers, _ = say(address, head, b"{")
    assert status == (408 if path == b"/v1/jobs" else 404)
    assert headers["content-type"] == "application/problem+json"
    assert time.monotonic() - began < 10 * SECONDS


def test_a_connection_that_says_nothing_is_closed(address: tuple[str, int]) -> None:
    assert say(address)[0] in {0, 408}


def test_a_client_that_is_not_slow_is_not_given_up(address: tuple[str, int]) -> None:
    request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(address, timeout=10) as connection:
        for _ in range(4):
            connection.sendall(request[:20])
            time.sleep(SECONDS * 0.6)  # together longer than one head may take
            connection.sendall(request[20:])
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200 OK")


def test_a_client_that_reads_nothing_is_given_up() -> None:
    ended = threading.Event()

    async def endless() -> AsyncIterator[bytes]:
        try:
            while True:
                yield bytes(65536)
                await asyncio.sleep(0)  # where it can be cancelled
        finally:
            ended.set()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await StreamingResponse(endless())(scope, receive, send)

    config = uvicorn.Config(app, http=Hasty, lifespan="off", log_config=None)
    with running(config) as address, socket.create_connection(address) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert ended.wait(20 * SECONDS)


def test_a_connection_that_is_kept_waits_for_no_acknowledgement(tmp_path: Path) -> None:
    """Nagle's algorithm and a delayed acknowledgement together cost 40 ms an answer."""
    with listening(tmp_path) as address, httpx.Client() as client:
        seconds = []
        for _ in range(20):
            began = time.perf_counter()
            client.get(f"http://{address[0]}:{address[1]}/healthz").raise_for_status()
            seconds.append(time.perf_counter() - began)
    assert statistics.median(seconds) < 0.03


def test_connections_beyond_the_limit_are_refused_and_those_within_go_on(tmp_path: Path) -> None:
    with listening(tmp_path, max_connections=2) as address, closing(httpx.Client()) as client:
        url = f"http://{address[0]}:{address[1]}/healthz"
        assert client.get(url).status_code == 200
        with socket.create_connection(address):
            refused = httpx.get(url)
            assert refused.status_code == 503
            assert refused.json()["type"] == "urn:coterie:problem:overloaded"
            assert int(refused.headers["retry-after"]) > 0
            assert refused.headers["x-request-id"] == refused.json()["request_id"]
            assert client.get(url).status_code == 200
        time.sleep(0.05)
        assert httpx.get(url).status_code == 200


def test_the_server_starts_without_what_trains_networks() -> None:
    """Torch takes a second and 200 MiB; what needs it imports it then."""
    program = (
        "import sys, coterie.service.app, coterie.service.dispatcher, coterie.service.protocol\n"
        "print(sorted({'torch', 'scipy', 'optuna', 'sklearn', 'torchjd', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@contextmanager
def serving_on(port: int, data_dir: Path, dispatcher: RecordingDispatcher) -> Iterator[tuple[_Server, int]]:
    """As `serve` does it, without Ray and signals."""
    settings = Settings(data_dir=data_dir, _env_file=None)
    app = create_app(settings, dispatcher)
    server = _Server(server_config(app, settings), app, [], Console(file=io.StringIO()))
    with _listening("127.0.0.1", port) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        try:
            yield server, listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def test_a_server_that_is_told_to_stop_finishes_what_it_answers_and_frees_its_port(tmp_path: Path) -> None:
    asked, may_answer = threading.Event(), threading.Event()

    class Slow(RecordingDispatcher):
        def ready(self) -> tuple[bool, str]:
            asked.set()
            assert may_answer.wait(10)
            return super().ready()

    with ThreadPoolExecutor(1) as threads:
        with serving_on(0, tmp_path, Slow()) as (server, port):
            answer = threads.submit(httpx.get, f"http://127.0.0.1:{port}/readyz", timeout=10)
            assert asked.wait(10)
            server.should_exit = True
            while True:  # it takes no more
                try:
                    httpx.get(f"http://127.0.0.1:{port}/healthz")
                except httpx.ConnectError:
                    break
            may_answer.set()
            assert answer.result().json()["status"] == "ready"
        with serving_on(port, tmp_path, RecordingDispatcher()) as (_, again):
            assert again == port
            assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
