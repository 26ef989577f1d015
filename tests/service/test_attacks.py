"""What someone may try who means harm, on a real socket: refused, and nothing leaks, hangs or breaks.

All tests share a server. What must hold after all of them is checked when it ends: it answers, its log has
no traceback, and an admin's token, sent along with all of it, is in no log and no file.
"""

import base64
import gzip
import hashlib
import json
import logging
import os
import pickle
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from sqlalchemy import func, select

from coterie.search.store import FolderArtifacts
from coterie.service import conversion
from coterie.service.protocol import Protocol
from coterie.service.storage.tables import Table
from tests.service.conftest import SPEC
from tests.service.live import LiveServer, finished_job, live_server, say

SECONDS = 1.5  # that the server waits for a client: more than any of ours needs
JSON = {"Content-Type": "application/json"}
SECRET = "what lies outside of the artifacts"
TRIAL = "trial_0000000000000000"
ENDLESS_BYTES = 200_000_000  # far more than sockets hold

Address = tuple[str, int]


class Impatient(Protocol):
    head_seconds = SECONDS
    body_seconds = SECONDS
    stall_seconds = SECONDS


@dataclass
class Target:
    """The server under attack, what is on it, and a file that it must never open."""

    server: LiveServer
    token: str
    job_id: str
    outside: Path
    opened: list[str] = field(default_factory=list)

    @property
    def client(self) -> httpx.Client:
        return self.server.client

    @property
    def address(self) -> Address:
        url = httpx.URL(self.server.url)
        assert url.port is not None
        return url.host, url.port

    @property
    def artifacts(self) -> Path:
        root = self.server.settings.artifacts_of(self.job_id)
        return FolderArtifacts(root).trial_folder(TRIAL)

    def counts(self) -> dict[str, int]:
        """Rows by table."""
        with self.server.database.read() as session:
            return {
                name: session.execute(select(func.count()).select_from(table)).scalar_one()
                for name, table in Table.metadata.tables.items()
            }

    def request(self, path: bytes, *headers: bytes, method: bytes = b"GET", body: bytes = b"") -> bytes:
        """A request with the token that no client library would send."""
        head = [
            b"%s %s HTTP/1.1" % (method, path),
            b"Host: 127.0.0.1",
            b"Authorization: Bearer " + self.token.encode(),
            b"Connection: close",
            *headers,
        ]
        return b"\r\n".join(head) + b"\r\n\r\n" + body


@contextmanager
def attacked(folder: Path, database_url: str | None = None) -> Iterator[Target]:
    outside = folder / "outside.json"
    outside.write_text(json.dumps({"secret": SECRET}))
    log = folder / "server.log"
    handler = logging.FileHandler(log)
    logging.getLogger().addHandler(handler)
    try:
        with live_server(folder / "data", protocol=Impatient, database_url=database_url) as server:
            token = str(server.client.post("/v1/tokens", json={"role": "admin"}).json()["token"])
            server.client.headers["Authorization"] = f"Bearer {token}"
            target = Target(server, token, finished_job(server), outside)
            _watch(target)
            yield target
            assert target.client.get("/healthz").status_code == 200
            assert target.client.get("/readyz").status_code == 200
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
    assert not target.opened
    assert "Traceback" not in log.read_text()
    secret = token.split("_", 2)[2].encode()
    assert len(secret) > 16
    files = [file for file in folder.rglob("*") if file.is_file() and file != outside]
    assert log in files
    assert [file for file in files if secret in file.read_bytes()] == []


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with attacked(tmp_path_factory.mktemp("attacked")) as target:
        yield target


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def on_either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """On each kind of database in turn."""
    if request.param == "sqlite":
        yield request.getfixturevalue("target")
    else:
        make: Callable[[], str] = request.getfixturevalue("postgres")
        with attacked(tmp_path_factory.mktemp("attacked"), make()) as target:
            yield target


def _watch(target: Target) -> None:
    """Note when this process opens what no request may name."""
    forbidden = {str(target.outside), "/etc/passwd", "/etc/hostname"}

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and os.path.realpath(arguments[0]) in forbidden:
            target.opened.append(arguments[0])

    sys.addaudithook(note)  # there is no way to take it back


@pytest.fixture(autouse=True)
def unchanged(request: pytest.FixtureRequest, target: Target) -> Iterator[None]:
    """No test changes a row, unless it says so."""
    before = target.counts()
    yield
    if request.node.get_closest_marker("usefixtures") is None:
        assert target.counts() == before


@pytest.fixture
def changes_rows() -> None:
    """Says that a test makes things, by rights."""


def refused(answer: httpx.Response, *statuses: int) -> None:
    """Check that an answer is a problem document that is the client's fault."""
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:300])
    assert not statuses or answer.status_code in statuses, (answer.status_code, answer.text[:300])
    assert answer.headers["content-type"] == "application/problem+json"
    if answer.request.method != "HEAD":
        assert answer.json()["status"] == answer.status_code
    assert SECRET not in answer.text
    assert "Traceback" not in answer.text
    assert "x-injected" not in answer.headers


def operations(target: Target) -> list[tuple[str, str, dict[str, Any]]]:
    document = target.client.get("/openapi.json").json()
    return [
        (method, path, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
    ]


def ids(target: Target) -> dict[str, str]:
    return {
        "job_id": target.job_id,
        "trial_id": TRIAL,
        "webhook_id": "webhook_0000000000000000",
        "delivery_id": "delivery_0000000000000000",
        "token_id": "token_0000000000000000",
    }


def _parameters(operation: dict[str, Any], *places: str) -> list[str]:
    return [entry["name"] for entry in operation.get("parameters", []) if entry["in"] in places]


def _body(operation: dict[str, Any]) -> dict[str, Any]:
    """What makes the path the only fault of a request."""
    return {"content": b"{}", "headers": JSON} if "requestBody" in operation else {}


# --- Paths ---

_UP = "../" * 8 + "etc/passwd"
TRAVERSALS = [
    "..",
    "%2e%2e",
    "..%2f..%2f..%2f..%2foutside.json",
    quote(_UP, safe=""),
    quote(quote(_UP, safe=""), safe=""),
    "%2e%2e%2f" * 6 + "etc%2fpasswd",
    "%252e%252e%252f" * 6 + "etc%252fpasswd",
    "..%5c..%5c..%5coutside.json",
    "%c0%ae%c0%ae%c0%afetc%c0%afpasswd",
    "%ff%fe",
    "{id}%00",
    "{id}%00.json",
    "{id}%2f..%2f..%2foutside.json",
    "{id}%0a",
    "{id};..",
    "{id}%20",
    "%2fetc%2fpasswd",
    "file:%2f%2f%2fetc%2fpasswd",
    "C:%5cboot.ini",
    "~",
    "%EF%BC%8E%EF%BC%8E%EF%BC%8F",
    "a" * 4000,
    "{id}" + "a" * 4000,
]


def test_no_id_in_a_path_leads_to_a_file(target: Target) -> None:
    """Raw, as clients would tidy the paths."""
    sent = 0
    known = ids(target)
    for method, path, operation in operations(target):
        for name in _parameters(operation, "path"):
            others = {other: known[other] for other in _parameters(operation, "path") if other != name}
            for attack in TRAVERSALS:
                raw = path.format(**others, **{name: attack.replace("{id}", known[name])})
                answer = target.client.request(
                    method, httpx.URL(target.server.url, raw_path=raw.encode()), **_body(operation)
                )
                refused(answer, 400, 401, 404, 405)
                sent += 1
    assert sent > 400


@pytest.mark.parametrize(
    "path",
    [b"/../../../etc/passwd", b"/docs/assets/../../../../../etc/passwd", b"/docs/assets/..%2f..%2fapp.py"],
)
def test_no_path_at_all_leads_to_a_file(target: Target, path: bytes) -> None:
    status, headers, _ = say(target.address, target.request(path))
    assert (status, headers["content-type"]) == (404, "application/problem+json")


def test_no_header_or_query_leads_to_a_file(target: Target) -> None:
    for method, path, operation in operations(target):
        url = path.format(**ids(target))
        for attack in [
            _UP,
            "..\\..\\outside.json",
            str(target.outside),
            "/etc/passwd\0",
            "file:///etc/passwd",
        ]:
            for name in _parameters(operation, "query"):
                answer = target.client.request(method, url, params={name: attack})
                if answer.status_code != 200:
                    refused(answer, 400, 404)
                else:
                    assert answer.json()["items"] == []
    for attack in [_UP, str(target.outside), "file:///etc/passwd", "1/../2", "0x10", "-1", "1" * 200]:
        answer = target.client.get(f"/v1/jobs/{target.job_id}/events", headers={"Last-Event-ID": attack})
        refused(answer, 400)


@pytest.mark.parametrize("attack", [_UP, "..", "/etc/passwd", "..\\..\\x", "%2e%2e%2f", "a\0b", "a" * 5000])
def test_no_name_in_a_spec_leads_to_a_file(target: Target, attack: str) -> None:
    for fields in (
        {"tasks": [attack]},
        {"tasks": [{"name": attack}]},
        {"dataset": {"source": attack}},
        {"dataset": {"source": "digits", "options": {"path": attack}}},
        {"dataset": {"source": "digits", "options": {attack: 1}}},
        {"dataset": {"source": "digits", "options": {"samples": attack, "seed": attack}}},
        {"search": {"families": [attack]}},
        {"search": {"backbones": [attack]}},
        {"objectives": [{"metric": attack}]},
    ):
        refused(target.client.post("/v1/jobs", json={**SPEC, **fields}), 422)


# --- SQL ---

SQL = [
    "' OR '1'='1",
    "'; DROP TABLE jobs; --",
    '" OR ""="',
    "1; DELETE FROM trials",
    "1 OR 1=1",
    "0 UNION SELECT secret FROM tokens",
    "number DESC, (SELECT 1)",
    "(CASE WHEN 1=1 THEN number ELSE id END)",
    "delta_m') --",
    "randomblob(1000000000)",
    "pg_sleep(10)",
    "number--",  # what the patterns of names let through
    "sqlite_master.name",
    "-rowid",
    "%",
    "_",
    "\\",
    "$1",
    ":name",
    "%s",
    "?",
]


def _within(cursor: str, attack: str) -> str:
    """A real cursor with an attack in place of its last part."""
    text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
    return _encoded(f"{text.rpartition(':')[0]}:{attack}")


def _encoded(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def test_sql_in_a_parameter_is_refused_or_finds_nothing(on_either: Target) -> None:
    began = time.monotonic()
    sent = 0
    known = ids(on_either)
    for method, path, operation in operations(on_either):
        url = path.format(**known)
        for name in _parameters(operation, "query", "header"):
            if name == "idempotency-key":
                continue  # takes any text: see below
            attacks = list(SQL)
            if name == "cursor":
                page = on_either.client.get(url, params={"limit": 1})
                cursor = page.json().get("next_cursor") if page.status_code == 200 else None
                attacks += [_encoded(attack) for attack in SQL]
                attacks += [_within(cursor, attack) for attack in SQL] if cursor else []
            for attack in attacks:
                place = "params" if name in _parameters(operation, "query") else "headers"
                answer = on_either.client.request(method, url, **{place: {name: attack}})  # type: ignore[arg-type] # either
                sent += 1
                if answer.status_code != 200:
                    refused(answer, 400, 404)
                else:
                    assert answer.json()["items"] == [], (path, name, attack)
        for name in _parameters(operation, "path"):
            for attack in SQL:
                url = path.format(**{**known, name: quote(attack, safe="")})
                refused(on_either.client.request(method, url, **_body(operation)), 404)
                sent += 1
    assert sent > 500
    assert time.monotonic() - began < 60  # none slept


def test_a_forged_cursor_is_refused_or_finds_nothing(on_either: Target) -> None:
    """It has the form of ours, of each list, and a place in it that no row has."""
    client, job = on_either.client, f"/v1/jobs/{on_either.job_id}"
    places = ("-1", "0", "9" * 10, "9" * 18, "9" * 30, "1e9", "nan", "", "\0", "1:1", "['x']", "null", *SQL)
    lists = {
        f"{job}/trials?sort=number&": "trials.number",
        f"{job}/trials?sort=-number&": "trials.-number",
        f"{job}/trials?sort=-delta_m&": "trials.-delta_m:1.5",
        f"{job}/front/history?": "history",
        f"{job}/references?": "references",
        f"/v1/trials/{TRIAL}/measurements?": "measurements",
        "/v1/jobs?": "jobs.-created_at",
        "/v1/tokens?": "tokens",
        "/v1/audit?": "audit",
    }
    for path, order in lists.items():
        for place in places:
            answer = client.get(f"{path}cursor={_encoded(f'{order}:{place}')}")
            if re.fullmatch("0|[1-9][0-9]{0,17}", place):
                assert answer.status_code == 200, (path, place, answer.text)
            else:
                refused(answer, 400)


@pytest.mark.parametrize("attack", SQL)
def test_sql_in_a_token_opens_nothing(target: Target, attack: str) -> None:
    token_id = "_".join(target.token.split("_", 2)[:2])
    for token in (attack, f"{token_id}_{attack}", f"coterie_{attack}_{attack}"):
        answer = target.client.get("/v1/jobs", headers={"Authorization": f"Bearer {token}"})
        refused(answer, 401)


@pytest.mark.usefixtures("changes_rows")
def test_sql_in_a_name_or_a_key_is_kept_as_it_is(target: Target) -> None:
    attacks = [attack for attack in SQL if " " not in attack] + ["x';DROP/**/TABLE/**/jobs;--", "'OR'1'='1"]
    before = target.counts()
    made = {}
    for attack in attacks:
        headers = {"Idempotency-Key": attack}
        for status in (201, 200):
            answer = target.client.post("/v1/jobs", json={**SPEC, "name": attack}, headers=headers)
            assert answer.status_code == status, (attack, answer.text)
            assert made.setdefault(attack, answer.json()["id"]) == answer.json()["id"]
    assert len(set(made.values())) == len(attacks)
    for attack in attacks:
        items = target.client.get("/v1/jobs", params={"name": attack}).json()["items"]
        assert [(item["id"], item["name"]) for item in items] == [(made[attack], attack)]
    after = target.counts()
    assert after["jobs"] == before["jobs"] + len(attacks)
    for name in ("trials", "tokens", "measurements"):
        assert after[name] == before[name]


# --- Files that a worker, or whoever broke into one, left ---


class _Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.path), "w")


def _safetensors(header: dict[str, Any], size: int = 0, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(size)


def _overlapping() -> bytes:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return _safetensors({"a": entry, "b": entry}, size=8)


HOSTILE_WEIGHTS = {
    "a header of 2^63 bytes": _safetensors({}, length=2**63),
    "a header of a terabyte": _safetensors({}, length=2**40),
    "overlapping offsets": _overlapping(),
    "offsets beyond the end": _safetensors(
        {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    ),
    "nothing": b"",
}
HOSTILE_DOCUMENTS = {
    "not JSON": b"\x80\x04K\x01.",
    "a hundred thousand levels": b"[" * 100_000,
    "files elsewhere": json.dumps({"weights": {"file": "../../../../outside.json"}}).encode(),
    "20 MB": b'{"a": "' + b"a" * 20_000_000 + b'"}',
    "nothing": b"",
}


@pytest.fixture
def restored(target: Target) -> Iterator[Path]:
    """The folder of a trial's files, which is put right afterwards."""
    folder = target.artifacts
    kept = {file: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    yield folder
    for file in folder.iterdir():
        file.unlink()
    for file, content in kept.items():
        file.write_bytes(content)


def _ask_for_files(target: Target, *paths: str) -> None:
    for path in paths:
        answer = target.client.get(f"/v1/trials/{TRIAL}/{path}", timeout=60)
        refused(answer, 404, 409)
        assert str(target.server.settings.data_dir) not in answer.text


@pytest.mark.parametrize("kind", HOSTILE_WEIGHTS)
def test_weights_that_are_not_those_of_the_trial_are_not_sent(
    target: Target, restored: Path, kind: str
) -> None:
    (restored / "weights.safetensors").write_bytes(HOSTILE_WEIGHTS[kind])
    _ask_for_files(target, "model")


@pytest.mark.parametrize("kind", HOSTILE_DOCUMENTS)
def test_a_document_that_is_not_that_of_the_trial_is_not_sent(
    target: Target, restored: Path, kind: str
) -> None:
    (restored / "architecture.json").write_bytes(HOSTILE_DOCUMENTS[kind])
    _ask_for_files(target, "architecture")


def test_a_pickle_for_weights_is_not_unpickled(target: Target, restored: Path, tmp_path: Path) -> None:
    """As long as the weights, and named by the document as if it were them."""
    weights, document = restored / "weights.safetensors", restored / "architecture.json"
    before = weights.read_bytes()
    canary = tmp_path / "canary"
    pickled = pickle.dumps(_Canary(canary)).ljust(len(before), b"\0")
    weights.write_bytes(pickled)
    text = document.read_text()
    old, new = (hashlib.sha256(content).hexdigest() for content in (before, pickled))
    assert old in text
    document.write_text(text.replace(old, new))
    _ask_for_files(target, "model?format=onnx")
    target.client.get(f"/v1/trials/{TRIAL}/model")
    assert not canary.exists()
    pickle.loads(pickled).close()  # the proof that it would have
    assert canary.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["a header without end", "tensors beyond the file", "a layer of a petabyte", "nested"]
)
def test_a_file_that_sql_knows_and_that_means_harm_is_not_converted(
    target: Target, restored: Path, kind: str
) -> None:
    """Its size agrees with SQL, as if the worker that wrote both had been taken over."""
    document = (restored / "architecture.json").read_bytes()
    name, content = {
        "a header without end": ("weights.safetensors", _safetensors({}, length=2**62)),
        "tensors beyond the file": ("weights.safetensors", HOSTILE_WEIGHTS["offsets beyond the end"]),
        "a layer of a petabyte": ("architecture.json", document.replace(b": 8", b": 1000000000000000")),
        "nested": ("architecture.json", b"[" * 200_000),
    }[kind]
    kept = (restored / name).read_bytes()
    assert content != kept
    target.server.write_file(TRIAL, name, content)
    try:
        _ask_for_files(target, "model?format=onnx")
    finally:
        target.server.write_file(TRIAL, name, kept)


@pytest.mark.parametrize("kind", ["a file", "a folder", "a loop", "a device", "nothing"])
def test_a_link_is_not_followed_out_of_the_artifacts(target: Target, restored: Path, kind: str) -> None:
    ends = {
        "a file": str(target.outside),
        "a folder": str(target.outside.parent),
        "a loop": "architecture.json",
        "a device": "/dev/zero",
        "nothing": "/nothing",
    }
    for name in ("architecture.json", "weights.safetensors"):
        (restored / name).unlink()
        (restored / name).symlink_to(ends[kind])
    _ask_for_files(target, "architecture", "model", "model?format=onnx")


def test_a_linked_folder_is_not_followed_out_of_the_artifacts(target: Target, tmp_path: Path) -> None:
    folder = target.artifacts
    moved = tmp_path / "moved"
    folder.rename(moved)
    folder.symlink_to(moved)
    try:
        _ask_for_files(target, "architecture", "model", "model?format=onnx")
    finally:
        folder.unlink()
        moved.rename(folder)
    assert target.client.get(f"/v1/trials/{TRIAL}/architecture").status_code == 200


def test_a_pipe_for_a_file_does_not_hang(target: Target, restored: Path) -> None:
    for name in ("architecture.json", "weights.safetensors"):
        (restored / name).unlink()
        os.mkfifo(restored / name)
    _ask_for_files(target, "architecture", "model", "model?format=onnx")


# --- Bodies ---


def _nested(levels: int) -> object:
    value: object = 1
    for _ in range(levels):
        value = [value]
    return value


# Literals, as json would not write all of them. No field of any schema takes one.
BAD_VALUES = {
    "a lone surrogate": '"\\ud800"',
    "NUL": '"a\\u0000b"',
    "CRLF": '"a\\r\\nX-Injected: 1"',
    "10^400": "1" + "0" * 400,
    "-10^5000": "-1" + "0" * 5000,
    "1e400": "1e400",
    "NaN": "NaN",
    "60 levels": json.dumps(_nested(60)),
    "500 levels": json.dumps(_nested(500)),
    "a constructor": '{"__class__": "os.system", "__proto__": {"admin": true}}',
    "half a megabyte": '"' + "a" * 500_000 + '"',
}


def _bodies(target: Target) -> Iterator[tuple[str, str, list[str]]]:
    """The operations that take a body, and the names of its fields."""
    schemas = target.client.get("/openapi.json").json()["components"]["schemas"]
    for method, path, operation in operations(target):
        if "requestBody" in operation:
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            if "$ref" in schema:
                schema = schemas[schema["$ref"].rpartition("/")[2]]
            yield method, path.format(**ids(target)), list(schema["properties"])


def test_no_field_of_any_body_takes_what_is_no_value(target: Target) -> None:
    sent = 0
    for method, path, names in _bodies(target):
        for name in names:
            for value in BAD_VALUES.values():
                body = f"{{{json.dumps(name)}: {value}}}"
                refused(target.client.request(method, path, content=body, headers=JSON), 400, 422)
                sent += 1
    assert sent > 150


@pytest.mark.parametrize(
    ("body", "headers", "statuses"),
    [
        pytest.param(b"[" * 900_000, JSON, {400}, id="deep"),
        pytest.param(b'{"a":' * 150_000, JSON, {400}, id="deep objects"),
        pytest.param(b'{"role": "reader", "role": "admin"}', JSON, {400}, id="a field twice"),
        pytest.param(b'{"a": [{"b": 1, "b": 2}]}', JSON, {400}, id="an inner field twice"),
        pytest.param(b'{"a": 1, "\\u0061": 2}', JSON, {400}, id="a field twice, once escaped"),
        pytest.param(b'{"a": "\0"}', JSON, {400}, id="NUL"),
        pytest.param(b'\xef\xbb\xbf{"a": 1}', JSON, {400}, id="a byte order mark"),
        pytest.param('{"a": 1}'.encode("utf-16"), JSON, {400}, id="UTF-16"),
        pytest.param('{"a": 1}'.encode("utf-32-le"), JSON, {400}, id="UTF-32"),
        pytest.param(b'{"a": "\xc0\xaf"}', JSON, {400}, id="overlong UTF-8"),
        pytest.param(
            '{"a": 1}'.encode("utf-16"),
            {"Content-Type": "application/json; charset=utf-16"},
            {400},
            id="charset",
        ),
        pytest.param(b"a=1", {"Content-Type": "application/x-www-form-urlencoded"}, {415}, id="a form"),
        pytest.param(b"--x--", {"Content-Type": "multipart/form-data; boundary=x"}, {415}, id="multipart"),
        pytest.param(b"\x80\x04K\x01.", {"Content-Type": "application/x-pickle"}, {415}, id="a pickle"),
        pytest.param(
            b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>',
            {"Content-Type": "application/xml"},
            {415},
            id="XML entities",
        ),
        pytest.param(b"x" * 1_000_001, JSON, {413}, id="over a megabyte"),
    ],
)
def test_a_body_that_is_no_document_is_refused_everywhere(
    target: Target, body: bytes, headers: dict[str, str], statuses: set[int]
) -> None:
    for method, path, _ in _bodies(target):
        refused(target.client.request(method, path, content=body, headers=headers), *statuses)


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip", "deflate", "br", "zstd", "identity, gzip"])
def test_a_packed_body_is_not_unpacked(target: Target, encoding: str) -> None:
    bomb = gzip.compress(bytes(50_000_000), 1)
    assert len(bomb) < 1_000_000
    for method, path, _ in _bodies(target):
        headers = {**JSON, "Content-Encoding": encoding}
        refused(target.client.request(method, path, content=bomb, headers=headers), 415)


def test_20_megabytes_are_not_read_to_their_end(target: Target) -> None:
    head = target.request(
        b"/v1/jobs", b"Content-Type: application/json", b"Content-Length: 20000000", method=b"POST"
    )
    status, _, _ = say(target.address, head, *[bytes(1_000_000)] * 20)
    assert status in {413, 0}  # who goes on to send after the end may not get to read


# --- HTTP itself ---

CRLF = [
    "\r\nX-Injected: 1",
    "\nX-Injected: 1",
    "\rX-Injected: 1",
    "\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
    "\u010d\u010aX-Injected: 1",
]


@pytest.mark.parametrize("attack", CRLF)
def test_a_line_break_makes_no_header(target: Target, attack: str) -> None:
    known = ids(target)
    for method, path, operation in operations(target):
        for name in _parameters(operation, "path"):
            url = path.format(**{**known, name: quote(known[name] + attack, safe="")})
            refused(target.client.request(method, url, **_body(operation)), 404)
        for name in _parameters(operation, "query"):
            url = path.format(**known)
            answer = target.client.request(method, url, params={name: attack})
            assert "x-injected" not in answer.headers
            assert answer.status_code == 200 or answer.status_code in {400, 404}
    for method in ("GET", "OPTIONS", "PUT"):
        answer = target.client.request(method, f"/{quote(attack, safe='')}")
        refused(answer, 404)
    if attack.isascii():  # others are letters, which a latin-1 header would cut down to these
        refused(target.client.post("/v1/jobs", json={**SPEC, "name": f"x{attack}"}), 422)


@pytest.mark.parametrize("name", [b"X-Request-ID", b"Idempotency-Key", b"Last-Event-ID", b"If-None-Match"])
@pytest.mark.parametrize(
    "value", [b"a\rX-Injected: 1", b"a\0b", b"a\x7fb", b"a%0d%0aX-Injected:%201", b"\xc4\x8d\xc4\x8a"]
)
def test_what_breaks_lines_in_a_header_does_not_come_back(target: Target, name: bytes, value: bytes) -> None:
    header = name + b": " + value
    body = [b"Content-Type: application/json", b"Content-Length: 2"]
    for request in (
        target.request(b"/v1/jobs", header, *body, method=b"POST", body=b"{}"),
        target.request(f"/v1/jobs/{target.job_id}/events?timeout_seconds=0".encode(), header),
        target.request(f"/v1/trials/{TRIAL}/model".encode(), header),
    ):
        status, headers, _ = say(target.address, request)
        assert 200 <= status < 500
        assert "x-injected" not in headers
        assert value.decode("latin-1").lower() not in headers.values()


AMBIGUOUS = {
    "two lengths": [b"Content-Length: 2", b"Content-Length: 3"],
    "two lengths in one": [b"Content-Length: 2, 3"],
    "a length and chunks": [b"Content-Length: 2", b"Transfer-Encoding: chunked"],
    "chunks and a length": [b"Transfer-Encoding: chunked", b"Content-Length: 2"],
    "a negative length": [b"Content-Length: -2"],
    "a length with a sign": [b"Content-Length: +2"],
    "a length in hex": [b"Content-Length: 0x2"],
    "an endless length": [b"Content-Length: " + b"9" * 400],
    "a blank before the colon": [b"Content-Length : 2"],
    "a blank in a name": [b"Content Length: 2"],
    "no colon": [b"Content-Length"],
    "no name": [b": 2"],
    "two hosts": [b"Host: example.org"],
    "NUL in a name": [b"X\0: 2"],
}
# RFC 9112, 6.1, asks for 501 where a transfer coding is not known.
UNKNOWN_CODINGS = [
    b"identity",
    b"gzip, chunked",
    b"xchunked",
    b"chunked, chunked",
    b'"chunked"',
    b"\x0bchunked",
]


def _lives(target: Target) -> None:
    with closing(httpx.Client(base_url=target.server.url)) as client:
        assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_a_request_that_two_readers_may_cut_differently_is_refused(target: Target, kind: str) -> None:
    """And what follows it is not answered: the one answer ends the connection."""
    hidden = target.request(b"/v1/tenant")
    request = target.request(b"/v1/jobs", b"Content-Type: application/json", *AMBIGUOUS[kind], method=b"POST")
    status, headers, body = say(
        target.address, request.replace(b"Connection: close\r\n", b""), b"0\r\n\r\n", hidden
    )
    assert (status, headers["connection"]) == (400, "close")
    assert json.loads(body)["type"] == "urn:coterie:problem:malformed-request"
    _lives(target)


@pytest.mark.parametrize("coding", UNKNOWN_CODINGS)
def test_a_body_in_an_unknown_coding_is_refused(target: Target, coding: bytes) -> None:
    request = target.request(b"/v1/jobs", b"Transfer-Encoding: " + coding, method=b"POST")
    status, headers, body = say(target.address, request, b"0\r\n\r\n", target.request(b"/v1/tenant"))
    assert status in {400, 501}
    assert headers["connection"] == "close"
    assert json.loads(body)["status"] == status
    _lives(target)


@pytest.mark.parametrize(
    "chunks",
    [
        b"zz\r\nab\r\n0\r\n\r\n",
        b"-2\r\n{}\r\n0\r\n\r\n",
        b"0x2\r\n{}\r\n0\r\n\r\n",
        b"f" * 30 + b"\r\n",
        b"2\r\n{}XX0\r\n\r\n",
        b"2;" + b"a" * 50_000,
    ],
)
def test_a_chunk_that_is_none_is_refused(target: Target, chunks: bytes) -> None:
    head = target.request(
        b"/v1/jobs", b"Content-Type: application/json", b"Transfer-Encoding: chunked", method=b"POST"
    )
    status, headers, body = say(target.address, head, chunks, target.request(b"/v1/tenant"))
    assert status in {400, 431}  # an extension without end counts as headers
    assert headers["connection"] == "close"
    assert json.loads(body)["status"] == status
    _lives(target)


@pytest.mark.parametrize(
    "request_line",
    [
        b"GET /\r\n\r\n",  # HTTP/0.9
        b"GET /healthz HTTP/0.9\r\nHost: a\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n\r\n",  # no host
        b"GET /healthz HTTP/11.1\r\nHost: a\r\n\r\n",
        b"GET  /healthz HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /health z HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /healthz\0 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS
        b"\0" * 100 + b"\r\n\r\n",
        b"A" * 100_000,
    ],
)
def test_what_is_no_request_of_http_1_1_is_refused(target: Target, request_line: bytes) -> None:
    status, headers, body = say(target.address, request_line)
    assert (400 <= status < 500, headers["connection"]) == (True, "close")
    assert json.loads(body)["status"] == status
    _lives(target)


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"GET /" + b"a" * 60_000, id="URL"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 60_000, id="header"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 5000, id="headers"),
        pytest.param(b"A" * 60_000, id="method"),
    ],
)
def test_a_head_without_end_is_refused(target: Target, head: bytes) -> None:
    status, headers, body = say(target.address, head)
    assert (status, headers["connection"]) == (431, "close")
    assert json.loads(body)["status"] == 431
    _lives(target)


def test_a_folded_line_stays_part_of_its_header(target: Target) -> None:
    """RFC 9112, 5.2: refused, or read as one line."""
    status, headers, _ = say(
        target.address, target.request(b"/healthz", b"X-Request-ID: a\r\n X-Injected: 1")
    )
    assert status in {200, 400}
    assert headers["x-request-id"].startswith("req_")
    assert "x-injected" not in headers


@pytest.mark.parametrize(
    "header",
    [
        b"X-Forwarded-For: 10.0.0.1",
        b"X-Forwarded-Proto: gopher",
        b"X-Forwarded-Host: example.org",
        b"X-Forwarded-Prefix: //example.org",
        b"Forwarded: for=10.0.0.1;host=example.org;proto=gopher",
        b"X-Original-URL: /v1/tokens",
        b"X-Rewrite-URL: /v1/tokens",
        b"X-HTTP-Method-Override: DELETE",
        b"X-HTTP-Method: DELETE",
        b"X-Method-Override: DELETE",
    ],
)
def test_what_a_proxy_might_say_changes_nothing(target: Target, header: bytes) -> None:
    for path in (b"/v1/families", b"/v1/jobs?limit=1", b"/v1/nothing"):
        plain, other = (say(target.address, target.request(path, *extra)) for extra in ([], [header]))
        for _, headers, _ in (plain, other):
            del headers["x-request-id"], headers["date"]
        assert other[:2] == plain[:2]
        assert b"example.org" not in other[2]
        assert b"gopher" not in other[2]


@pytest.mark.parametrize(
    "host", [b"example.org", b"example.org:80@127.0.0.1", b"127.0.0.1\\@example.org", b"a/../b", b"", b"[::1"]
)
def test_the_host_that_a_client_names_is_in_no_answer(target: Target, host: bytes) -> None:
    for path in (b"/v1/jobs?limit=1", b"/v1/jobs/", b"/docs", b"/nothing", b"/"):
        request = target.request(path).replace(b"Host: 127.0.0.1", b"Host: " + host)
        status, headers, body = say(target.address, request)
        assert 200 <= status < 500
        assert b"example.org" not in body
        assert "example.org" not in str(headers)


@pytest.mark.parametrize(
    "line",
    [
        b"GET http://example.org/v1/tokens",
        b"GET //example.org/v1/tokens",
        b"CONNECT example.org:443",
        b"TRACE /healthz",
        b"GET *",
        b"DEBUG /healthz",
        b"get /healthz",
    ],
)
def test_the_server_is_no_proxy_and_no_mirror(target: Target, line: bytes) -> None:
    method, path = line.split()
    status, headers, body = say(target.address, target.request(path, b"X-Mine: hunter2", method=method))
    assert 400 <= status < 500
    assert headers["content-type"] == "application/problem+json"
    assert b"hunter2" not in body
    assert target.token.encode() not in body


# --- Slow clients ---


def test_slow_clients_hold_up_nobody(target: Target) -> None:
    """Many at once, each in its own way, while others are answered; all are given up in the end."""
    body = [b"Content-Type: application/json", b"Content-Length: 100000000"]
    trickles = {
        "head": [target.request(b"/v1/jobs")[:40], *[b"a"] * 100],
        "announced body": [target.request(b"/v1/jobs", *body, method=b"POST"), b"{"],
        "body": [target.request(b"/v1/jobs", *body, method=b"POST"), *[b" "] * 100],
        "chunks": [
            target.request(
                b"/v1/jobs", b"Content-Type: application/json", b"Transfer-Encoding: chunked", method=b"POST"
            ),
            *[b"1\r\n \r\n"] * 100,
        ],
    }
    found: list[tuple[str, int]] = []

    def attack(kind: str, parts: list[bytes]) -> None:
        found.append((kind, say(target.address, *parts, pause=0.05)[0]))

    threads = [
        threading.Thread(target=attack, args=(kind, parts))
        for kind, parts in trickles.items()
        for _ in range(10)
    ]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    with ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(socket.create_connection(target.address))  # and these say nothing at all
        answered = 0
        while time.monotonic() - began < SECONDS:
            assert target.client.get("/v1/jobs", timeout=5).status_code == 200
            answered += 1
    assert answered > 5
    for thread in threads:
        thread.join()
    assert time.monotonic() - began < 10 * SECONDS
    assert len(found) == 40
    assert {status for _, status in found} <= {408, 0}
    assert 408 in {status for _, status in found}
    assert {status for kind, status in found if kind == "announced body"} == {408}


def test_a_client_that_asks_on_and_reads_nothing_is_given_up(target: Target) -> None:
    request = target.request(b"/docs/assets/swagger-ui-bundle.js").replace(b"Connection: close\r\n", b"")
    sent, closed = 0, False
    began = time.monotonic()
    with socket.create_connection(target.address, timeout=20 * SECONDS) as connection:
        while not closed and sent < ENDLESS_BYTES:  # its requests are not read without end either
            try:
                connection.sendall(request * 100)
            except ConnectionError:
                closed = True
            sent += 100 * len(request)
    assert closed
    assert time.monotonic() - began < 10 * SECONDS


def test_who_asks_for_conversions_holds_up_nobody_else(target: Target) -> None:
    """Each that waits for its turn would hold one of the server's threads."""
    path, asked = f"/v1/trials/{TRIAL}/model?format=pt2", 60
    converted = target.artifacts / "network.pt2"
    with ThreadPoolExecutor(asked) as threads, conversion._ONE_AT_A_TIME:
        answers = [threads.submit(target.client.get, path, timeout=60) for _ in range(asked)]
        done, waiting = wait(answers, timeout=2)
        assert len(waiting) == conversion.MOST_WAITING
        assert {answer.result().status_code for answer in done} == {503}
        assert target.client.get("/v1/jobs", timeout=5).status_code == 200
        converted.write_bytes(b"converted by another")
    assert {answer.result().status_code for answer in waiting} == {200}
    converted.unlink()
