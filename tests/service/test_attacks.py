"""What those may send who mean harm, on a real socket: a problem answers it, and the server goes on."""

import base64
import gzip
import io
import json
import logging
import pickle
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from coterie.service import conversion
from tests.service.conftest import SPEC, Problem
from tests.service.live import LiveServer, exchange, finished_job, live_server

TRIAL = "trial_0000000000000000"
SECRET = "the operator's own file"
INJECTIONS = [
    "' OR '1'='1",
    "'; DROP TABLE jobs; --",
    "x') UNION SELECT digest FROM tokens --",
    "%",
    "\\",
]


@contextmanager
def attacked(folder: Path, database_url: str | None = None) -> Iterator[LiveServer]:
    """A server with a finished job, whose client sends a token; it logs neither that nor a fault."""
    (folder / "secret").write_text(SECRET)
    logged = io.StringIO()
    handler = logging.StreamHandler(logged)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        with live_server(folder / "data", database_url=database_url) as server:
            token = server.client.post("/v1/tokens", json={"role": "admin"}).json()["token"]
            server.client.headers["Authorization"] = f"Bearer {token}"
            finished_job(server)
            yield server
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    text = logged.getvalue()
    assert "/v1/jobs" in text
    assert token not in text
    assert "Traceback" not in text


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with attacked(tmp_path_factory.mktemp("attacked")) as server:
        yield server


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def on_either(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """On each kind of database in turn."""
    if request.param == "sqlite":
        yield request.getfixturevalue("server")
    else:
        make: Callable[[], str] = request.getfixturevalue("postgres")
        with attacked(tmp_path_factory.mktemp("attacked"), make()) as server:
            yield server


@pytest.fixture
def client(server: LiveServer) -> Iterator[httpx.Client]:
    """Checks afterwards that all is as it was."""
    with unchanged(server) as client:
        yield client


@contextmanager
def unchanged(server: LiveServer) -> Iterator[httpx.Client]:
    before = server.client.get("/v1/jobs").json()
    yield server.client
    assert server.client.get("/v1/jobs").json() == before


def token_of(client: httpx.Client) -> str:
    return client.headers["Authorization"].removeprefix("Bearer ")


def say(server: LiveServer, message: bytes) -> bytes:
    """Send this as it is, and read until the server closes, as it must."""
    url = httpx.URL(server.url)
    return exchange((url.host, url.port or 0), message)


def statuses(answer: bytes) -> list[int]:
    return [int(found) for found in re.findall(rb"HTTP/1.1 (\d{3}) ", answer)]


def refused(answer: httpx.Response) -> None:
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text)
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/jobs/../../secret",
        "/v1/jobs/..%2f..%2f..%2fsecret",
        "/v1/jobs/%2e%2e/%2e%2e/secret",
        "/v1/jobs/..%5c..%5csecret",
        "/v1/jobs/%252e%252e%252fsecret",
        "/v1/jobs/%c0%ae%c0%ae%c0%afsecret",
        "/v1/jobs/job_..%2f..%2fsecret/logs",
        "/v1/jobs/job_0%00.txt/logs",
        "/v1/jobs//etc/passwd/logs",
        f"/v1/trials/{TRIAL}%2f..%2f..%2f..%2f..%2fsecret/model",
        f"/v1/trials/{TRIAL}/../../../../secret",
        f"/v1/trials/{TRIAL}/model%2f..%2f..%2fsecret",
        "/docs/assets/../../secret",
        "/docs/assets/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/docs/assets/%2e%2e/%2e%2e/__init__.py",
        "/docs/assets//etc/passwd",
    ],
)
def test_a_path_leads_to_no_file_outside(server: LiveServer, path: str) -> None:
    """Sent as it is: a client would tidy it up."""
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token_of(server.client)}\r\n"
    answer = say(server, f"{head}Connection: close\r\n\r\n".encode())
    assert statuses(answer) in ([404], [400]), answer
    assert b"application/problem+json" in answer
    assert SECRET.encode() not in answer
    assert b"root:" not in answer


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "..\\secret", "file:///etc/passwd", "a\x00b"])
def test_a_job_names_no_files(client: httpx.Client, problem: Problem, path: str) -> None:
    for fields in (
        {"dataset": {"source": path}},
        {"dataset": {"source": "digits", "options": {"path": path}}},
        {"dataset": {"source": "digits", "options": {path: 1}}},
        {"tasks": [path]},
        {"tasks": [{"name": path}]},
        {"objectives": [{"metric": f"task.{path}.error"}]},
        {"search": {"space": {path: {"width": 1}}}},
        {"search": {"backbones": [path]}},
    ):
        answer = client.post("/v1/jobs", json={**SPEC, **fields})
        assert len(problem(answer, 422)["errors"]) >= 1


def texts(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Every query parameter of every GET that takes a text, as path and name."""
    return [
        (path, parameter["name"])
        for path, item in document["paths"].items()
        for parameter in item.get("get", {}).get("parameters", [])
        if parameter["in"] == "query" and parameter["schema"].get("type", "string") in {"string", "array"}
    ]


def test_no_query_reaches_the_database_as_sql(on_either: LiveServer) -> None:
    with unchanged(on_either) as client:
        _inject(client)


def _inject(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    job_id = client.get("/v1/jobs").json()["items"][0]["id"]
    asked = texts(document)
    assert {name for _, name in asked} >= {
        "cursor",
        "family",
        "metric",
        "name",
        "objectives",
        "sort",
        "state",
    }
    for path, name in asked:
        place = (
            path.replace("{job_id}", job_id).replace("{trial_id}", TRIAL).replace("{webhook_id}", "webhook_0")
        )
        for text in INJECTIONS:
            answer = client.get(place, params={name: text})
            if answer.status_code == 200:  # a text that is looked for, and is nowhere
                assert answer.json()["items"] == [], (path, name, text)
            else:
                refused(answer)


def test_no_cursor_reaches_the_database_as_sql(on_either: LiveServer) -> None:
    """A forged one has the form of ours."""
    client = on_either.client
    job_id = client.get("/v1/jobs").json()["items"][0]["id"]
    path = f"/v1/jobs/{job_id}/trials"
    for sort in ("number", "-number", "-delta_m"):
        cursor = client.get(path, params={"limit": 1, "sort": sort}).json()["next_cursor"]
        order, _, position = base64.urlsafe_b64decode(cursor + "==").decode().partition(":")
        for text in (*INJECTIONS, "-1", "9" * 30, "1e9", "nan", "", "\x00", position + ":1", "['x']", "null"):
            forged = base64.urlsafe_b64encode(f"{order}:{text}".encode()).decode().rstrip("=")
            refused(client.get(path, params={"cursor": forged, "sort": sort}))


@pytest.mark.parametrize("text", ["%00", "a%00b", "%ed%a0%80", "%ff%fe", "%0d%0a", "%1b[31m", "%e2%80%ae"])
def test_texts_that_no_database_holds_are_refused_or_found_nowhere(client: httpx.Client, text: str) -> None:
    for path in ("/v1/jobs?name=", "/v1/jobs?cursor=", "/v1/jobs?state=", "/v1/jobs/job_"):
        answer = client.get(path + text)
        if answer.status_code == 200:
            assert answer.json()["items"] == []
        else:
            refused(answer)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "gzip, gzip", "x"])
def test_a_compressed_body_is_not_unpacked(client: httpx.Client, problem: Problem, encoding: str) -> None:
    bomb = gzip.compress(bytes(50_000_000))
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    problem(client.post("/v1/jobs", content=bomb, headers=headers), 415)


@pytest.mark.parametrize("name", ["a\r\nSet-Cookie: a=b", "a\nb", "a\rb", "\x85", "a\x0bb"])
def test_a_name_makes_no_header(client: httpx.Client, name: str) -> None:
    answer = client.post("/v1/jobs", json={**SPEC, "name": name, "budget": {}})
    refused(answer)
    for path in (f"/v1/jobs/job_{quote(name)}", f"/v1/trials/{TRIAL}{quote(name)}/model", f"/{quote(name)}"):
        answer = client.get(path)
        refused(answer)
        assert "set-cookie" not in answer.headers


def _post(*headers: str, body: str = "", version: str = "1.1") -> bytes:
    return "\r\n".join([f"POST /v1/jobs HTTP/{version}", "Host: localhost", *headers, "", body]).encode()


CLOSING = b"Host: localhost\r\nConnection: close\r\n"
HIDDEN = "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(
            _post("Content-Length: 0", f"Content-Length: {len(HIDDEN)}", body=HIDDEN), id="two lengths"
        ),
        pytest.param(_post(f"Content-Length: 0, {len(HIDDEN)}", body=HIDDEN), id="two lengths in one"),
        pytest.param(
            _post(
                f"Content-Length: {len(HIDDEN) + 5}", "Transfer-Encoding: chunked", body=f"0\r\n\r\n{HIDDEN}"
            ),
            id="length and chunks",
        ),
        pytest.param(_post("Transfer-Encoding: xchunked", body=f"0\r\n\r\n{HIDDEN}"), id="unknown encoding"),
        pytest.param(
            _post("Transfer-Encoding: chunked", "Transfer-Encoding: identity", body=f"0\r\n\r\n{HIDDEN}"),
            id="two encodings",
        ),
        pytest.param(
            _post("Transfer-Encoding : chunked", body=f"0\r\n\r\n{HIDDEN}"), id="blank before colon"
        ),
        pytest.param(_post("Transfer-Encoding: chunked", body=f"-1\r\n\r\n{HIDDEN}"), id="negative chunk"),
        pytest.param(
            _post("Transfer-Encoding: chunked", body=f"{'F' * 40}\r\n\r\n{HIDDEN}"), id="endless chunk"
        ),
        pytest.param(
            _post("Transfer-Encoding: chunked", body=f"0\r\n\r\n{HIDDEN}", version="1.0"), id="chunks in 1.0"
        ),
        pytest.param(_post("Content-Length: -1", body=HIDDEN), id="negative length"),
        pytest.param(_post("Content-Length: +0", body=HIDDEN), id="signed length"),
        pytest.param(_post("Content-Length: 0x0", body=HIDDEN), id="hexadecimal length"),
        pytest.param(_post("X: y\x00z", "Content-Length: 0", body=HIDDEN), id="NUL in a header"),
        pytest.param(_post("X: y", "Host: evil", "Content-Length: 0", body=HIDDEN), id="two hosts"),
        pytest.param(b"GET /healthz HTTP/1.1\r\n\r\n" + HIDDEN.encode(), id="no host"),
        pytest.param(
            b"GET /healthz HTTP/3.7\r\nHost: localhost\r\n\r\n" + HIDDEN.encode(), id="unknown version"
        ),
    ],
)
def test_no_request_hides_in_another(server: LiveServer, message: bytes) -> None:
    answer = say(server, message)
    found = statuses(answer)
    assert len(found) == 1, answer
    assert 400 <= found[0] < 500 or found[0] == 501, answer
    assert b"application/problem+json" in answer
    assert b"connection: close" in answer.lower()


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n" + CLOSING + b"\r\n", id="URL"),
        pytest.param(b"GET / HTTP/1.1\r\n" + CLOSING + b"X: " + b"a" * 100_000 + b"\r\n\r\n", id="header"),
        pytest.param(b"GET / HTTP/1.1\r\n" + CLOSING + b"X: y\r\n" * 10_000 + b"\r\n", id="headers"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000, id="header without end"),
        pytest.param(b"A" * 100_000, id="method"),
    ],
)
def test_a_head_beyond_all_measure_is_refused(server: LiveServer, message: bytes) -> None:
    found = statuses(say(server, message))
    assert found in ([414], [431], [400], [])  # none where the server closed while the rest was on its way


def test_many_slow_clients_hold_up_nobody(server: LiveServer) -> None:
    url = httpx.URL(server.url)
    slow = [socket.create_connection((url.host, url.port or 0)) for _ in range(200)]
    try:
        for connection in slow:
            connection.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
        began = time.monotonic()
        assert server.client.get("/v1/jobs").status_code == 200
        assert time.monotonic() - began < 1
    finally:
        for connection in slow:
            connection.close()


def test_who_asks_for_conversions_holds_up_nobody_else(server: LiveServer, problem: Problem) -> None:
    """Each that waits for its turn would hold one of the server's threads."""
    path, asked = f"/v1/trials/{TRIAL}/model?format=pt2", 60
    [weights] = server.settings.data_dir.glob(f"jobs/*/**/{TRIAL}/weights.safetensors")
    converted = weights.with_name("network.pt2")
    with ThreadPoolExecutor(asked) as threads, conversion._ONE_AT_A_TIME:
        answers = [threads.submit(server.client.get, path, timeout=60) for _ in range(asked)]
        done, waiting = wait(answers, timeout=2)
        assert len(waiting) == conversion.MOST_WAITING
        for answer in done:
            problem(answer.result(), 503)
        began = time.monotonic()
        assert server.client.get("/v1/jobs").status_code == 200
        assert time.monotonic() - began < 1
        converted.write_bytes(b"converted by another")
    assert {answer.result().status_code for answer in waiting} == {200}
    converted.unlink()


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def _safetensors(header: dict[str, Any], size: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text


HUGE = {"w": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}
FILES = {
    "a pickle": ("weights.safetensors", b""),
    "a header without end": ("weights.safetensors", _safetensors({}, 2**62)),
    "tensors beyond the file": ("weights.safetensors", _safetensors(HUGE)),
    "no JSON": ("architecture.json", b"\x80\x04"),
    "nested without end": ("architecture.json", b"[" * 200_000),
    "a layer of a petabyte": ("architecture.json", b"petabyte"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", FILES)
def test_a_file_that_means_harm_is_not_converted(
    server: LiveServer, problem: Problem, tmp_path: Path, what: str
) -> None:
    """Its size agrees with SQL, as if the worker that wrote both had been taken over."""
    name, content = FILES[what]
    [file] = server.settings.data_dir.glob(f"jobs/*/**/{TRIAL}/{name}")
    kept, mark = file.read_bytes(), tmp_path / "mark"
    if what == "a pickle":
        content = pickle.dumps(Planted(mark))
    if what == "a layer of a petabyte":
        content = kept.replace(b": 8", b": 1000000000000000")
        assert content != kept
    server.write_file(TRIAL, name, content)
    try:
        answer = server.client.get(f"/v1/trials/{TRIAL}/model", params={"format": "onnx"})
    finally:
        server.write_file(TRIAL, name, kept)
    detail = problem(answer, 409)["detail"]
    assert str(server.settings.data_dir) not in detail
    assert len(detail) < 1000
    assert not mark.exists()


def test_a_file_that_was_put_in_anothers_place_is_not_sent(
    server: LiveServer, problem: Problem, tmp_path: Path
) -> None:
    [file] = server.settings.data_dir.glob(f"jobs/*/**/{TRIAL}/weights.safetensors")
    kept = file.read_bytes()
    outside = tmp_path / "outside"
    outside.write_bytes(bytes(len(kept)))
    try:
        file.write_bytes(b"another")
        for form in ("safetensors", "onnx"):
            problem(server.client.get(f"/v1/trials/{TRIAL}/model", params={"format": form}), 404)
        file.unlink()
        file.symlink_to(outside)
        problem(server.client.get(f"/v1/trials/{TRIAL}/model"), 404)
    finally:
        file.unlink()
        file.write_bytes(kept)
