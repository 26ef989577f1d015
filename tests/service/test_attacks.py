"""What someone may try who means harm, on a real socket: refused, and nothing leaks, hangs or breaks.

All tests share a server for each kind of database. Each checks afterwards that no row has changed and that
no fault was logged; in the end an admin's token, sent along with all of it, must be in no log, file or row.
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
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from sqlalchemy import select

from coterie.service import conversion
from coterie.service.protocol import Protocol
from coterie.service.storage.tables import Table
from tests.service.conftest import SPEC, Problem
from tests.service.live import LiveServer, exchange, finished_job, live_server, say

SECONDS = 1.5  # that the server waits for a client: more than any of ours needs
JSON = {"Content-Type": "application/json"}
SAYS_JSON = b"Content-Type: application/json"
SECRET = "what lies outside of the artifacts"
TRIAL = "trial_0000000000000000"
ENDLESS_BYTES = 200_000_000  # far more than sockets hold
ARCHITECTURE, WEIGHTS = "architecture.json", "weights.safetensors"

# --- The attacks that any text of a request may be ---

PATHS = [
    "../" * 8 + "etc/passwd",
    "..%2f..%2f..%2foutside.json",  # quoted once more as it is sent
    "..\\..\\..\\outside.json",
    *("/etc/passwd", "/etc/passwd\0.json", "file:///etc/passwd"),
    *("C:\\boot.ini", "~", "．．／etc／passwd"),
]
SQL = [
    *("' OR '1'='1", '" OR ""="', "1 OR 1=1", "1; DELETE FROM trials", "'; DROP TABLE jobs; --"),
    *("x';DROP/**/TABLE/**/jobs;--", "x') UNION SELECT digest FROM tokens --", "delta_m') --"),
    *("number DESC, (SELECT 1)", "(CASE WHEN 1=1 THEN number ELSE id END)"),
    *("randomblob(1000000000)", "pg_sleep(10)"),
    *("number--", "sqlite_master.name", "-rowid"),  # what the patterns of names let through
    *("%", "_", "\\", "$1", ":name", "%s", "?"),
]
LINE_BREAKS = [
    *(f"{end}X-Injected: 1" for end in ("\r\n", "\n", "\r", "\x0b", "\x85", "\u2028")),
    "\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
]
ODD: list[str | bytes] = [
    *("\0", "a\0b", "\x1b[31m", "\u202e", "\x85X-Injected: 1", "a" * 4000),
    "\u010d\u010aX-Injected: 1",  # a line break where only the last byte is kept
    b"\xed\xa0\x80",  # half a character
    b"\xff\xfe",
    b"\xc0\xae\xc0\xae\xc0\xafetc",  # dots and a slash, longer than need be
]
ATTACKS = [*PATHS, *SQL, *LINE_BREAKS, *ODD]

# --- The server ---


class Impatient(Protocol):
    head_seconds = SECONDS
    body_seconds = SECONDS
    stall_seconds = SECONDS


@dataclass
class Target:
    """A server under attack, whose client sends an admin's token, with a finished job."""

    server: LiveServer
    client: httpx.Client
    token: str
    job_id: str
    log: Path

    @property
    def address(self) -> tuple[str, int]:
        url = httpx.URL(self.server.url)
        assert url.port is not None
        return url.host, url.port

    @property
    def artifacts(self) -> Path:
        return self.server.settings.data_dir / "jobs" / self.job_id / "trials" / TRIAL

    @property
    def ids(self) -> dict[str, str]:
        """What paths may ask for; there are no webhooks."""
        unknown = {f"{kind}_id": f"{kind}_0000000000000000" for kind in ("webhook", "delivery", "token")}
        return {**unknown, "job_id": self.job_id, "trial_id": TRIAL}

    def rows(self) -> dict[str, list[tuple[Any, ...]]]:
        with self.server.database.read() as session:
            return {
                name: [tuple(row) for row in session.execute(select(table).order_by(*table.primary_key))]
                for name, table in Table.metadata.tables.items()
            }

    def operations(self) -> list[tuple[str, str, dict[str, Any]]]:
        paths = self.client.get("/openapi.json").json()["paths"]
        return [(method, path, one) for path, item in paths.items() for method, one in item.items()]

    def bodies(self) -> Iterator[tuple[str, str, list[str]]]:
        """The operations that take a body, and the names of its fields."""
        schemas = self.client.get("/openapi.json").json()["components"]["schemas"]
        for method, path, operation in self.operations():
            if "requestBody" in operation:
                schema = operation["requestBody"]["content"]["application/json"]["schema"]
                if "$ref" in schema:
                    schema = schemas[schema["$ref"].rpartition("/")[2]]
                yield method, path.format(**self.ids), list(schema["properties"])

    def message(self, line: str, *headers: bytes, body: bytes = b"", host: bytes = b"a") -> bytes:
        """A request with the token, which may be one that no client library would send."""
        own = [b"Host: " + host, b"Authorization: Bearer " + self.token.encode(), b"Connection: close"]
        return b"\r\n".join([line.encode() + b" HTTP/1.1", *own, *headers, b"", body])

    def ask(self, line: str, *headers: bytes, **parts: bytes) -> httpx.Response:
        """The answer to that request; of status 0 where there is none."""
        status, found, content = say(self.address, self.message(line, *headers, **parts))
        return httpx.Response(status, headers=found, content=content)


@contextmanager
def logged(log: Path) -> Iterator[None]:
    """Write to a file whatever anything in this process logs."""
    handler = logging.FileHandler(log)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)  # nothing of ours logs below it
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()


@contextmanager
def watched(*forbidden: Path) -> Iterator[None]:
    """Check that this process opens none of these."""
    watching, opened = {str(path) for path in forbidden}, []

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and watching and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if path in watching:
                opened.append(path)

    sys.addaudithook(note)  # there is no way to take it back
    yield
    watching.clear()
    assert opened == []


@contextmanager
def attacked(folder: Path, database_url: str | None = None) -> Iterator[Target]:
    outside, log = folder / "outside.json", folder / "server.log"
    outside.write_text(json.dumps({"secret": SECRET}))
    with (
        logged(log),
        live_server(folder / "data", protocol=Impatient, database_url=database_url) as server,
        watched(outside, Path("/etc/passwd"), Path("/etc/hostname")),
    ):
        token = str(server.client.post("/v1/tokens", json={"role": "admin"}).json()["token"])
        server.client.headers["Authorization"] = f"Bearer {token}"
        target = Target(server, server.client, token, finished_job(server), log)
        yield target
        assert server.client.get("/healthz").status_code == 200
        assert server.client.get("/readyz").status_code == 200
        rows = target.rows()
    secret = token.split("_", 2)[2]
    assert len(secret) > 16
    assert secret not in str(rows)
    assert "/v1/jobs" in log.read_text()  # the proof that it holds what was logged
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert [file for file in files if secret.encode() in file.read_bytes()] == []


@pytest.fixture(scope="module")
def on_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with attacked(tmp_path_factory.mktemp("attacked")) as target:
        yield target


@pytest.fixture(scope="module")
def on_postgres(tmp_path_factory: pytest.TempPathFactory, postgres: Callable[[], str]) -> Iterator[Target]:
    with attacked(tmp_path_factory.mktemp("attacked"), postgres()) as target:
        yield target


@contextmanager
def no_fault_logged(target: Target) -> Iterator[None]:
    before = len(target.log.read_text())
    yield
    assert "Traceback" not in target.log.read_text()[before:]


@contextmanager
def unchanged(target: Target) -> Iterator[None]:
    before = target.rows()
    yield
    assert target.rows() == before


@pytest.fixture
def target(on_sqlite: Target) -> Iterator[Target]:
    with unchanged(on_sqlite), no_fault_logged(on_sqlite):
        yield on_sqlite


@pytest.fixture(params=["on_sqlite", "on_postgres"])
def changing(request: pytest.FixtureRequest) -> Iterator[Target]:
    """On each kind of database in turn, for a test that adds rows by rights."""
    target: Target = request.getfixturevalue(request.param)
    with no_fault_logged(target):
        yield target


@pytest.fixture
def either(changing: Target) -> Iterator[Target]:
    """On each kind of database in turn."""
    with unchanged(changing):
        yield changing


def refused(answer: httpx.Response, *statuses: int) -> None:
    """Check that an answer is a problem document that is the client's fault, and gives nothing away."""
    shown = (answer.status_code, answer.text[:300])
    assert 400 <= answer.status_code < 500, shown
    assert not statuses or answer.status_code in statuses, shown
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == answer.status_code
    assert "x-injected" not in answer.headers
    for text in (SECRET, "root:", "Traceback"):
        assert text not in answer.text


def parameters(operation: dict[str, Any], place: str) -> list[str]:
    return [entry["name"] for entry in operation.get("parameters", []) if entry["in"] == place]


# --- Paths, queries, headers: no file, no SQL, no header of their own ---


def test_an_id_leads_to_no_file_and_no_sql(either: Target) -> None:
    sent = 0
    for method, path, operation in either.operations():
        for name in parameters(operation, "path"):
            known = either.ids
            for attack in ATTACKS:
                for raw in (quote(attack, safe=""), known[name] + quote(attack, safe="")):
                    url = path.format(**{**known, name: raw})
                    content = b"{}" if "requestBody" in operation else None
                    answer = either.client.request(method, url, content=content, headers=JSON)
                    refused(answer, 404, 405, 422)
                    sent += 1
    assert sent > 2000


RAW_IDS = [
    *("..", ".", "%2e%2e", "%252e%252e%252foutside.json"),
    *("../{id}/../..", "{id}/..", "{id};..", "{id}%00", "{id}%"),
]
RAW_PATHS = [
    *("/../../../etc/passwd", "/etc/passwd", "//etc/passwd", "/v1/jobs/../../outside.json"),
    *("/v1/jobs//etc/passwd/logs", "/docs/assets//etc/passwd", "/docs/assets/../../../../../etc/passwd"),
    *("/docs/assets/..%2f..%2fapp.py", "/docs/assets/%2e%2e/%2e%2e/__init__.py"),
]


def test_a_path_that_no_client_would_send_leads_to_no_file(target: Target) -> None:
    """Clients would tidy them up."""
    for method, path, operation in target.operations():
        for name in parameters(operation, "path"):
            for attack in RAW_IDS:
                url = path.format(**{**target.ids, name: attack.format(id=target.ids[name])})
                answer = target.ask(f"{method.upper()} {url}", SAYS_JSON, b"Content-Length: 2", body=b"{}")
                refused(answer, 400, 404, 405)
    for path in RAW_PATHS:
        refused(target.ask(f"GET {path}"), 404)


def test_a_query_leads_to_no_file_and_no_sql(either: Target) -> None:
    names = set()
    for method, path, operation in either.operations():
        for name in parameters(operation, "query"):
            names.add(name)
            for attack in ATTACKS:
                url = f"{path.format(**either.ids)}?{name}={quote(attack, safe='')}"
                answer = either.client.request(method, url)
                if answer.status_code != 200:
                    refused(answer, 400, 404)
                else:  # what is looked for is nowhere
                    assert answer.json()["items"] == [], url
                    assert "x-injected" not in answer.headers
    assert names >= {"cursor", "family", "metric", "name", "objectives", "sort", "state", "action", "kinds"}


def test_the_id_of_an_event_leads_to_no_file_and_no_sql(either: Target) -> None:
    path = f"/v1/jobs/{either.job_id}/events?timeout_seconds=0"
    sendable = [text for text in (*PATHS, *SQL) if text.isascii() and text.isprintable()]
    for attack in (*sendable, "-1", "0x10", "9" * 200):
        refused(either.client.get(path, headers={"Last-Event-ID": attack}), 400)


def encoded(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def test_a_forged_cursor_is_refused_or_finds_nothing(either: Target) -> None:
    """It has the form of ours, of each list, and a place in it that no row has."""
    job = f"/v1/jobs/{either.job_id}"
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
        for place in ("0", "9" * 18, "-1", "9" * 30, "1e9", "nan", "", "\0", "1:1", "['x']", "null", *SQL):
            answer = either.client.get(f"{path}cursor={encoded(f'{order}:{place}')}")
            if re.fullmatch("0|[1-9][0-9]{0,17}", place):
                assert answer.status_code == 200, (path, place, answer.text)
            else:
                refused(answer, 400)
    for attack in SQL:
        refused(either.client.get("/v1/jobs", params={"cursor": encoded(attack)}), 400)


def test_sql_in_a_token_opens_nothing(either: Target) -> None:
    known = "_".join(either.token.split("_", 2)[:2])
    for attack in SQL:
        for token in (attack, f"{known}_{attack}", f"coterie_{attack}_{attack}"):
            refused(either.client.get("/v1/jobs", headers={"Authorization": f"Bearer {token}"}), 401)


def test_sql_in_a_name_or_a_key_is_kept_as_it_is(changing: Target) -> None:
    names = [text for text in SQL if " " not in text]
    before = changing.rows()
    made: dict[str, str] = {}
    for name in names:
        for status in (201, 200):
            spec, headers = {**SPEC, "name": name}, {"Idempotency-Key": name}
            answer = changing.client.post("/v1/jobs", json=spec, headers=headers)
            assert answer.status_code == status, (name, answer.text)
            assert made.setdefault(name, answer.json()["id"]) == answer.json()["id"]
    for name in names:
        items = changing.client.get("/v1/jobs", params={"name": name}).json()["items"]
        assert [(item["id"], item["name"]) for item in items] == [(made[name], name)]
    after = changing.rows()
    assert len(after["jobs"]) == len(before["jobs"]) + len(names)
    for table in ("trials", "tokens", "measurements"):
        assert after[table] == before[table]


@pytest.mark.parametrize("text", [*PATHS, "..", "a\0b", "a" * 5000])
def test_a_job_names_no_files(target: Target, problem: Problem, text: str) -> None:
    for fields in (
        {"tasks": [text]},
        {"tasks": [{"name": text}]},
        {"dataset": {"source": text}},
        {"dataset": {"source": "digits", "options": {"path": text}}},
        {"dataset": {"source": "digits", "options": {text: 1}}},
        {"dataset": {"source": "digits", "options": {"samples": text, "seed": text}}},
        {"search": {"families": [text]}},
        {"search": {"backbones": [text]}},
        {"search": {"space": {text: {"width": 1}}}},
        {"objectives": [{"metric": text}]},
        {"objectives": [{"metric": f"task.{text}.error"}]},
    ):
        answer = target.client.post("/v1/jobs", json={**SPEC, **fields})
        [section] = fields
        assert {fault["pointer"].split("/")[1] for fault in problem(answer, 422)["errors"]} == {section}


def test_a_line_break_makes_no_header(target: Target, problem: Problem) -> None:
    """In an id and a query it makes none either: see above."""
    for text in LINE_BREAKS:
        problem(target.client.post("/v1/jobs", json={**SPEC, "name": f"x{text}"}), 422, "/name")
        for method in ("GET", "OPTIONS", "PUT"):
            refused(target.client.request(method, f"/{quote(text, safe='')}"), 404)


@pytest.mark.parametrize("name", [b"X-Request-ID", b"Idempotency-Key", b"Last-Event-ID", b"If-None-Match"])
def test_what_breaks_lines_in_a_header_does_not_come_back(target: Target, name: bytes) -> None:
    for end in (b"\r", b"\r\n ", b"\0", b"\x7f", b"%0d%0a", b"\xc4\x8d\xc4\x8a"):
        header = b"%s: a%sX-Injected: 1" % (name, end)
        events = f"GET /v1/jobs/{target.job_id}/events?timeout_seconds=0"
        for line in ("POST /v1/jobs", f"GET /v1/trials/{TRIAL}/model", events):
            answer = target.ask(line, header, SAYS_JSON, b"Content-Length: 2", body=b"{}")
            assert 200 <= answer.status_code < 500
            assert "x-injected" not in answer.headers
            assert re.fullmatch(r"req_[0-9a-f]{16}", answer.headers["x-request-id"])


# --- Files that a worker, or whoever broke into one, left ---


@pytest.fixture
def restored(target: Target) -> Iterator[Path]:
    """The folder of a trial's files, which is put right afterwards, as are their sizes in SQL."""
    folder = target.artifacts
    kept = {file.name: file.read_bytes() for file in folder.iterdir()}
    yield folder
    for file in folder.iterdir():
        file.unlink()
    for name, content in kept.items():
        (folder / name).write_bytes(content)
        target.server.write_file(TRIAL, name, content)


def no_file_sent(target: Target) -> None:
    for path in ("architecture", "model", "model?format=onnx"):
        answer = target.client.get(f"/v1/trials/{TRIAL}/{path}")
        refused(answer, 404)
        assert str(target.server.settings.data_dir) not in answer.text


@pytest.mark.parametrize("content", [b"", b"another"])
def test_a_file_of_another_size_is_not_sent(target: Target, restored: Path, content: bytes) -> None:
    for name in (ARCHITECTURE, WEIGHTS):
        (restored / name).write_bytes(content)
    no_file_sent(target)


PIPE = "a pipe"


@pytest.mark.parametrize("end", ["{folder}/{name}", "{folder}", "{name}", "/dev/zero", "/nothing", PIPE])
def test_what_is_no_file_is_not_read(target: Target, restored: Path, tmp_path: Path, end: str) -> None:
    """A link to a file of the same size, a folder, itself, a device or nothing; a pipe."""
    for name in (ARCHITECTURE, WEIGHTS):
        file = restored / name
        (tmp_path / name).write_bytes(SECRET.encode().ljust(file.stat().st_size))
        file.unlink()
        if end == PIPE:
            os.mkfifo(file)
        else:
            file.symlink_to(end.format(folder=tmp_path, name=name))
    no_file_sent(target)


def test_a_linked_folder_is_not_followed(target: Target, tmp_path: Path) -> None:
    folder, moved = target.artifacts, tmp_path / "moved"
    folder.rename(moved)
    folder.symlink_to(moved)
    try:
        no_file_sent(target)
    finally:
        folder.unlink()
        moved.rename(folder)
    assert target.client.get(f"/v1/trials/{TRIAL}/architecture").status_code == 200


def safetensors(header: dict[str, Any], size: int = 0, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(size)


OVER_EACH_OTHER = {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in "ab"}
BEYOND_THE_END = {"w": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}
HOSTILE_WEIGHTS = {
    "nothing": b"",
    "a header of 2^63 bytes": safetensors({}, length=2**63),
    "a header of a terabyte": safetensors({}, length=2**40),
    "tensors over each other": safetensors(OVER_EACH_OTHER, size=8),
    "tensors beyond the end": safetensors(BEYOND_THE_END),
}
# What takes the place of what.
HOSTILE_DOCUMENTS = {
    "nothing": (rb"(?s).+", b""),
    "no JSON": (rb"(?s).+", b"\x80\x04K\x01."),
    "nested without end": (rb"(?s).+", b"[" * 200_000),
    "20 MB": (rb"(?s).+", b'{"a": "' + b"a" * 20_000_000 + b'"}'),
    "weights elsewhere": (rb'"weights\.safetensors"', b'"../../../../../outside.json"'),
    "a layer of a petabyte": (rb": 8\b", b": 1000000000000000"),
}


def write_weights(target: Target, content: bytes) -> None:
    """Have SQL and the document agree with them, as if the worker that wrote all had been taken over."""
    weights, document = target.artifacts / WEIGHTS, (target.artifacts / ARCHITECTURE).read_bytes()
    old, new = (hashlib.sha256(content).hexdigest().encode() for content in (weights.read_bytes(), content))
    assert old in document
    target.server.write_file(TRIAL, WEIGHTS, content)
    target.server.write_file(TRIAL, ARCHITECTURE, document.replace(old, new))


def not_converted(target: Target) -> None:
    answer = target.client.get(f"/v1/trials/{TRIAL}/model?format=onnx")
    refused(answer, 409)
    assert str(target.server.settings.data_dir) not in answer.text
    assert len(answer.text) < 1500


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOSTILE_WEIGHTS)
def test_weights_that_mean_harm_are_not_converted(target: Target, restored: Path, kind: str) -> None:
    write_weights(target, HOSTILE_WEIGHTS[kind])
    not_converted(target)


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOSTILE_DOCUMENTS)
def test_a_document_that_means_harm_is_not_converted(target: Target, restored: Path, kind: str) -> None:
    pattern, content = HOSTILE_DOCUMENTS[kind]
    changed, changes = re.subn(pattern, content, (restored / ARCHITECTURE).read_bytes())
    assert changes > 0
    target.server.write_file(TRIAL, ARCHITECTURE, changed)
    not_converted(target)


@dataclass
class Canary:
    """Makes a file when it is unpickled."""

    path: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.slow
def test_a_pickle_for_weights_is_not_unpickled(target: Target, restored: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    pickled = pickle.dumps(Canary(canary))
    write_weights(target, pickled)
    not_converted(target)
    assert target.client.get(f"/v1/trials/{TRIAL}/model").content == pickled  # as it was written, unread
    assert not canary.exists()
    pickle.loads(pickled)  # the proof that it would have
    assert canary.exists()


# --- Bodies ---


# Literals, as json would not write all of them. No field of any schema takes one.
BAD_VALUES = [
    *('"\\ud800"', '"a\\u0000b"', '"a\\r\\nX-Injected: 1"', '"' + "a" * 500_000 + '"'),
    *("1" + "0" * 400, "-1" + "0" * 5000, "1e400", "NaN"),
    *("[" * 60 + "]" * 60, "[" * 500 + "]" * 500),
    '{"__class__": "os.system", "__proto__": {"admin": true}}',
]


def test_no_field_of_any_body_takes_what_is_no_value(target: Target) -> None:
    sent = 0
    for method, path, names in target.bodies():
        for name in names:
            for value in BAD_VALUES:
                body = f"{{{json.dumps(name)}: {value}}}"
                refused(target.client.request(method, path, content=body, headers=JSON), 400, 422)
                sent += 1
    assert sent > 150


# What is no JSON in other ways: see test_bad_input.py.
BAD_BODIES = [
    ("application/json", 400, b"[" * 900_000),
    ("application/json", 400, b'{"a":' * 150_000),
    ("application/json", 400, b'{"role": "reader", "role": "admin"}'),
    ("application/json", 400, b'{"a": [{"b": 1, "b": 2}]}'),
    ("application/json", 400, b'{"a": 1, "\\u0061": 2}'),
    ("application/json", 400, b'{"a": "\0"}'),
    ("application/json", 400, b'\xef\xbb\xbf{"a": 1}'),
    ("application/json", 400, b'{"a": "\xc0\xaf"}'),
    ("application/json", 400, '{"a": 1}'.encode("utf-32-le")),
    ("application/json; charset=utf-16", 400, '{"a": 1}'.encode("utf-16")),
    ("application/json", 413, b"x" * 1_000_001),
    ("multipart/form-data; boundary=x", 415, b"--x--"),
    ("application/x-pickle", 415, b"\x80\x04K\x01."),
    ("application/xml", 415, b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>'),
]


@pytest.mark.parametrize(("content_type", "status", "body"), BAD_BODIES, ids=lambda value: repr(value)[:50])
def test_what_is_no_document_is_refused_everywhere(
    target: Target, content_type: str, status: int, body: bytes
) -> None:
    for method, path, _ in target.bodies():
        headers = {"Content-Type": content_type}
        refused(target.client.request(method, path, content=body, headers=headers), status)


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip", "deflate", "br", "zstd", "identity, gzip"])
def test_a_packed_body_is_not_unpacked(target: Target, encoding: str) -> None:
    bomb = gzip.compress(bytes(50_000_000), 1)
    assert len(bomb) < 1_000_000
    for method, path, _ in target.bodies():
        headers = {**JSON, "Content-Encoding": encoding}
        refused(target.client.request(method, path, content=bomb, headers=headers), 415)


# --- HTTP itself ---

HIDDEN = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
AMBIGUOUS = [
    b"Content-Length: 0\r\nContent-Length: %d" % len(HIDDEN),
    b"Content-Length: 0, %d" % len(HIDDEN),
    b"Content-Length: %d\r\nTransfer-Encoding: chunked" % (5 + len(HIDDEN)),
    b"Transfer-Encoding: chunked\r\nContent-Length: 2",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
    *(b"Content-Length: -1", b"Content-Length: +0", b"Content-Length: 0x0", b"Content-Length: " + b"9" * 400),
    *(b"Content-Length : 0", b"Content Length: 0", b"Content-Length", b": 0", b"X\0: 0", b"X: a\0b"),
    *(b"Transfer-Encoding: identity", b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: xchunked"),
    *(b"Transfer-Encoding: chunked, chunked", b'Transfer-Encoding: "chunked"'),
    *(b"Transfer-Encoding: \x0bchunked", b"Transfer-Encoding : chunked"),
    b"Host: example.org",  # the second
]
CHUNKS = [
    *(b"zz\r\nab\r\n0\r\n\r\n", b"-2\r\n{}\r\n0\r\n\r\n", b"0x2\r\n{}\r\n0\r\n\r\n", b"2\r\n{}XX0\r\n\r\n"),
    *(b"f" * 40 + b"\r\n", b"2;" + b"a" * 50_000),
]
LINES = [
    *(b"GET /", b"GET /healthz HTTP/0.9", b"GET /healthz HTTP/3.7", b"GET /healthz HTTP/11.1"),
    *(
        b"GET  /healthz HTTP/1.1",
        b"GET /health z HTTP/1.1",
        b"GET /healthz\0 HTTP/1.1",
        b"GET /\xff HTTP/1.1",
    ),
    *(b"PRI * HTTP/2.0\r\n\r\nSM", b"\0" * 100),
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    b"POST /v1/jobs HTTP/1.0\r\nTransfer-Encoding: chunked",
    b"GET /healthz HTTP/1.1\r\n\r\n",  # no host
]
POST = b"POST /v1/jobs HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
MESSAGES = {
    **{headers: b"%s%s\r\n\r\n0\r\n\r\n" % (POST, headers) for headers in AMBIGUOUS},
    **{chunks: b"%sTransfer-Encoding: chunked\r\n\r\n%s" % (POST, chunks) for chunks in CHUNKS},
    **{line: line + b"\r\nHost: a\r\n\r\n" for line in LINES},
}


@pytest.mark.parametrize("attack", MESSAGES, ids=lambda attack: repr(attack)[2:60])
def test_no_request_hides_behind_another(target: Target, attack: bytes) -> None:
    """Where two readers may cut them differently, the one answer ends the connection."""
    answer = exchange(target.address, MESSAGES[attack] + HIDDEN)
    [status] = re.findall(rb"HTTP/1.1 (\d{3}) ", answer)
    # 501 where a coding is not known (RFC 9112, 6.1), 431 as an extension without end counts as headers.
    assert int(status) in {400, 431, 501}, answer
    assert b"application/problem+json" in answer
    assert b"connection: close" in answer.lower()


ENDLESS_HEADS = [
    *(b"A" * 60_000, b"GET /" + b"a" * 60_000),
    b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 60_000,
    b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 5000,
]


@pytest.mark.parametrize("head", ENDLESS_HEADS, ids=["method", "URL", "header", "headers"])
def test_a_head_without_end_is_refused(target: Target, head: bytes) -> None:
    status, headers, body = say(target.address, head)
    assert (status, headers["connection"]) == (431, "close")
    assert json.loads(body)["status"] == 431


PROXYS_WORDS = [
    *(b"X-Forwarded-For: 10.0.0.1", b"X-Forwarded-Proto: gopher", b"X-Forwarded-Host: example.org"),
    *(b"X-Forwarded-Prefix: //example.org", b"Forwarded: for=10.0.0.1;host=example.org;proto=gopher"),
    *(b"X-Original-URL: /v1/tokens", b"X-Rewrite-URL: /v1/tokens"),
    *(b"X-HTTP-Method-Override: DELETE", b"X-HTTP-Method: DELETE", b"X-Method-Override: DELETE"),
]


@pytest.mark.parametrize("header", PROXYS_WORDS)
def test_what_a_proxy_might_say_changes_nothing(target: Target, header: bytes) -> None:
    for path in ("/v1/families", "/v1/jobs?limit=1", "/nothing"):
        plain, other = target.ask(f"GET {path}"), target.ask(f"GET {path}", header)
        assert other.status_code == plain.status_code
        for answer in (plain, other):
            for name in ("x-request-id", "date"):
                del answer.headers[name]
        assert other.headers == plain.headers
        if plain.is_success:  # a problem document holds the request's id
            assert other.content == plain.content
        for word in (b"example.org", b"gopher"):
            assert word not in other.content


HOSTS = [b"example.org", b"example.org:80@127.0.0.1", b"127.0.0.1\\@example.org", b"a/../b", b"", b"[::1"]


@pytest.mark.parametrize("host", HOSTS)
def test_the_host_that_a_client_names_is_in_no_answer(target: Target, host: bytes) -> None:
    for path in ("/v1/jobs?limit=1", "/v1/jobs/", "/docs", "/nothing", "/"):
        answer = target.ask(f"GET {path}", host=host)
        assert 200 <= answer.status_code < 500
        assert b"example.org" not in answer.content
        assert "example.org" not in str(answer.headers)


LINES_FOR_OTHERS = [
    *("GET http://example.org/v1/tokens", "GET //example.org/v1/tokens", "CONNECT example.org:443"),
    *("GET *", "TRACE /healthz", "DEBUG /healthz", "get /healthz"),
]


@pytest.mark.parametrize("line", LINES_FOR_OTHERS)
def test_the_server_is_no_proxy_and_no_mirror(target: Target, line: str) -> None:
    answer = target.ask(line, b"X-Mine: hunter2")
    refused(answer)
    assert "hunter2" not in answer.text
    assert target.token not in answer.text


# --- Clients that take their time, or the server's ---


def test_many_slow_clients_hold_up_nobody(target: Target) -> None:
    """Each is slow in its own way, while others are answered; all are given up in the end."""
    request = target.message("POST /v1/jobs", SAYS_JSON, b"Content-Length: 100000000")
    chunked = target.message("POST /v1/jobs", SAYS_JSON, b"Transfer-Encoding: chunked")
    trickles = {
        "a head": [request[:40], *[b"a"] * 100],
        "a body": [request, *[b" "] * 100],
        "chunks": [chunked, *[b"1\r\n \r\n"] * 100],
        "a body that does not come": [request, b"{"],
    }
    kinds = list(trickles) * 10
    began = time.monotonic()
    with ThreadPoolExecutor(len(kinds)) as threads, ExitStack() as silent:
        found = [threads.submit(say, target.address, *trickles[kind], pause=0.05) for kind in kinds]
        for said in [b"", request] * 100:
            silent.enter_context(socket.create_connection(target.address)).sendall(said)
        answered = 0
        while time.monotonic() - began < SECONDS:
            assert target.client.get("/v1/jobs", timeout=5).status_code == 200
            answered += 1
        assert answered > 5
        ends = [(kind, answer.result()[0]) for kind, answer in zip(kinds, found, strict=True)]
    assert time.monotonic() - began < 10 * SECONDS
    assert {status for _, status in ends} <= {408, 0}  # who goes on to send may not get to read
    assert {status for kind, status in ends if kind == "a body that does not come"} == {408}


def test_a_client_that_asks_on_and_reads_nothing_is_given_up(target: Target) -> None:
    request = b"GET /docs/assets/swagger-ui-bundle.js HTTP/1.1\r\nHost: a\r\n\r\n"
    sent, closed = 0, False
    began = time.monotonic()
    with socket.create_connection(target.address, timeout=20 * SECONDS) as connection:
        while not closed and sent < ENDLESS_BYTES:  # its requests are not read without end either
            try:
                connection.sendall(request * 100)
                sent += 100 * len(request)
            except ConnectionError:
                closed = True
    assert closed
    assert time.monotonic() - began < 10 * SECONDS


def test_conversions_hold_up_nobody(target: Target, problem: Problem, restored: Path) -> None:
    """Each that waits for its turn would hold one of the server's threads."""
    path, asked = f"/v1/trials/{TRIAL}/model?format=pt2", 60
    with ThreadPoolExecutor(asked) as threads, conversion._ONE_AT_A_TIME:
        answers = [threads.submit(target.client.get, path) for _ in range(asked)]
        done, waiting = wait(answers, timeout=2)
        assert len(waiting) == conversion.MOST_WAITING
        for answer in done:
            problem(answer.result(), 503)
        began = time.monotonic()
        assert target.client.get("/v1/jobs").status_code == 200
        assert time.monotonic() - began < 1
        (restored / "network.pt2").write_bytes(b"converted by another")
    assert {answer.result().status_code for answer in waiting} == {200}
