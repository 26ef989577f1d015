"""What the world may send: each is a 4xx problem with a pointer, and nothing is written. Real sockets."""

import json
import math
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
import uvicorn

from coterie.search.faults import SpecError
from coterie.service.app import create_app
from coterie.service.body import LIMIT_FAULTS, parse_json
from coterie.service.config import Settings
from tests.service.conftest import SPEC, Problem, RecordingDispatcher

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    app = create_app(
        Settings(data_dir=tmp_path_factory.mktemp("data"), _env_file=None), RecordingDispatcher()
    )
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, http="h11", ws="none"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    listener.close()


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    """Checks afterwards that nothing was written."""
    with httpx.Client(base_url=url, trust_env=False) as client:
        before = client.get("/v1/jobs").json()
        yield client
        assert client.get("/v1/jobs").json() == before


def _spec(**fields: Any) -> bytes:
    return json.dumps({**SPEC, **fields}).encode()


def _budget(text: str) -> bytes:
    return b'{"dataset": {"source": "digits"}, "budget": {%s}}' % text.encode()


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        pytest.param(_spec(tasks=["left_parity", "beauty"]), "/tasks/1", id="unknown task"),
        pytest.param(_spec(dataset={"source": "nowhere"}), "/dataset/source", id="unknown source"),
        pytest.param(_spec(dataset={"source": "../../etc"}), "/dataset/source", id="a path for a source"),
        pytest.param(
            _spec(dataset={"source": "digits", "options": {"size": 1}}),
            "/dataset/options/size",
            id="unknown option",
        ),
        pytest.param(
            _spec(search={"families": ["shared", "clan"]}), "/search/families/1", id="unknown family"
        ),
        pytest.param(_spec(search={"families": []}), "/search/families", id="no family"),
        pytest.param(
            _spec(search={"backbones": ["mlp", "cnn2"]}), "/search/backbones/1", id="unknown backbone"
        ),
        pytest.param(_spec(colour="red"), "/colour", id="unknown field"),
        pytest.param(_spec(**{"a/b~c": 1}), "/a~1b~0c", id="unknown field to escape"),
        pytest.param(
            _spec(search={"sampler": {"name": "tpe", "x": 1}}), "/search/sampler/x", id="unknown inner field"
        ),
        pytest.param(
            _spec(search={"space": {"dmtg": {"legs": [4]}}}),
            "/search/space/dmtg/legs",
            id="unknown dimension",
        ),
        pytest.param(_spec(objectives=[{"metric": "beauty"}]), "/objectives/0/metric", id="unknown metric"),
        pytest.param(
            _spec(objectives=[{"metric": "macs", "direction": "maximize"}]),
            "/objectives/0/direction",
            id="wrong way",
        ),
        pytest.param(
            _spec(constraints=[{"metric": "macs"}]), "/constraints/0", id="constraint without bound"
        ),
        pytest.param(_spec(budget={}), "/budget", id="budget of nothing"),
        pytest.param(_spec(budget={"trials": 0}), "/budget/trials", id="no trials"),
        pytest.param(_spec(budget={"trials": -1}), "/budget/trials", id="negative trials"),
        pytest.param(_spec(budget={"seconds": -0.5}), "/budget/seconds", id="negative seconds"),
        pytest.param(_spec(seed=-1), "/seed", id="negative seed"),
        pytest.param(_spec(seed=2**63), "/seed", id="seed beyond its bound"),
        pytest.param(_budget('"trials": 1' + "0" * 30), "/budget/trials", id="10^30 as an integer"),
        pytest.param(_budget('"trials": 1e30'), "/budget/trials", id="10^30"),
        pytest.param(_budget('"seconds": 1e30'), "/budget/seconds", id="10^30 seconds"),
        pytest.param(_budget('"seconds": 1e999'), "/budget/seconds", id="beyond a double"),
        pytest.param(_budget('"trials": ' + "9" * 5000), "/budget/trials", id="5000 digits"),
        pytest.param(_budget('"seconds": NaN'), "/budget/seconds", id="NaN"),
        pytest.param(_budget('"seconds": -Infinity'), "/budget/seconds", id="-Infinity"),
        pytest.param(_spec(budget={"trials": "3.5"}), "/budget/trials", id="text for a number"),
        pytest.param(_spec(tasks=["left_parity", "left_parity"]), "/tasks", id="duplicate tasks"),
        pytest.param(
            _spec(tasks=["left_parity", {"name": "left_parity"}]), "/tasks", id="duplicate in two forms"
        ),
        pytest.param(_spec(tasks=[{"weight": 1}]), "/tasks/0/name", id="task without a name"),
        pytest.param(_spec(tasks=["t"] * 100_000), "/tasks", id="100,000 tasks"),
        pytest.param(_spec(name="half \ud800"), "/name", id="lone surrogate"),
        pytest.param(_spec(**{"\udfff": 1}), "", id="lone surrogate in a field's name"),
        pytest.param(_spec(dataset={"source": "a\0"}), "/dataset/source", id="NUL"),
        pytest.param(_spec(name="line\nbreak"), "/name", id="control character"),
        pytest.param(_spec(name=""), "/name", id="empty name"),
        pytest.param(_spec(resources={"cpus": 5}), "/resources/cpus", id="more CPUs than the node has"),
        pytest.param(_spec(resources={"gpus": 2}), "/resources/gpus", id="more GPUs than the node has"),
        pytest.param(b'{"budget": {"trials": 1}}', "/dataset", id="no data"),
        pytest.param(b"[]", "", id="a list"),
        pytest.param(b"null", "", id="null"),
    ],
)
def test_a_body_that_breaks_the_schema_is_refused_with_a_pointer(
    client: httpx.Client, problem: Problem, body: bytes, pointer: str
) -> None:
    answer = client.post("/v1/jobs", content=body, headers=JSON)
    problem(answer, 422, pointer)
    assert len(answer.content) < 4000


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"  \n", id="blanks"),
        pytest.param(b"name: digits", id="YAML"),
        pytest.param(b'{"name": "digits",}', id="a comma too many"),
        pytest.param(b'{"name": "dig', id="cut off"),
        pytest.param(b'{"name": "\xff"}', id="no UTF-8"),
        pytest.param(b'{"name": "\xed\xa0\x80"}', id="a surrogate in UTF-8"),
        pytest.param('{"name": "digits"}'.encode("utf-16"), id="UTF-16"),
        pytest.param(b"[" * 100_000, id="100,000 open brackets"),
        pytest.param(b"[" * 100_000 + b"]" * 100_000, id="100,000 nested brackets"),
        pytest.param(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, id="100,000 nested objects"),
        pytest.param(b"[" * 65 + b"]" * 65, id="65 nested brackets"),
    ],
)
def test_a_body_that_is_no_json_is_refused(client: httpx.Client, problem: Problem, body: bytes) -> None:
    problem(client.post("/v1/jobs", content=body, headers=JSON), 400)


def test_64_levels_are_not_too_deep(client: httpx.Client, problem: Problem) -> None:
    problem(client.post("/v1/jobs", content=b"[" * 64 + b"]" * 64, headers=JSON), 422)


@pytest.mark.parametrize("size", [1_000_001, 2_000_000, 9_000_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_a_megabyte_is_refused_and_the_answer_arrives(
    client: httpx.Client, problem: Problem, size: int, chunked: bool
) -> None:
    body = b'{"name": "' + b"a" * (size - 12) + b'"}'
    content = (body[start : start + 65536] for start in range(0, size, 65536)) if chunked else body
    problem(client.post("/v1/jobs", content=content, headers=JSON), 413)
    assert client.get("/healthz").status_code == 200


def test_a_body_of_a_megabyte_is_read(client: httpx.Client, problem: Problem) -> None:
    body = _spec(name="a" * (1_000_000 - len(_spec(name=""))))
    assert len(body) == 1_000_000
    document = problem(client.post("/v1/jobs", content=body, headers=JSON), 422, "/name")
    assert len(json.dumps(document)) < 1000


def test_a_body_full_of_faults_takes_no_memory_for_each() -> None:
    """Each has a long pointer."""
    body = json.dumps([[math.nan] * 1000] * 50)
    for level in range(40):
        body = f'{{"{level}{"ä" * 200}": {body}}}'
    tracemalloc.start()
    with pytest.raises(SpecError) as refused:
        parse_json(body.encode())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(refused.value.faults) == LIMIT_FAULTS
    assert peak < 20_000_000


def test_a_body_that_never_ends_is_not_read_to_its_end(url: str) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 65536
            yield b"a" * 65536

    # The server hangs up, so that the client may see its answer or not.
    with suppress(httpx.TransportError):
        answer = httpx.post(f"{url}/v1/jobs", content=endless(), headers=JSON, trust_env=False)
        assert answer.status_code == 413
    assert sent < 30_000_000


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/yaml"]
)
def test_what_does_not_say_that_it_is_json_is_refused(
    client: httpx.Client, problem: Problem, content_type: str | None
) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    problem(client.post("/v1/jobs", content=_spec(), headers=headers), 415)


def test_all_faults_are_named_at_once_but_not_without_end(client: httpx.Client, problem: Problem) -> None:
    answer = client.post("/v1/jobs", content=_spec(seed=-1, priority="high", colour="red"), headers=JSON)
    faults = problem(answer, 422)["errors"]
    assert {fault["pointer"] for fault in faults} == {"/seed", "/priority", "/colour"}
    answer = client.post("/v1/jobs", content=_spec(**{"x" * n: 1 for n in range(2, 900)}), headers=JSON)
    assert len(problem(answer, 422)["errors"]) == 50
    assert len(answer.content) < 20_000


def test_the_input_does_not_come_back(client: httpx.Client, problem: Problem) -> None:
    secret = "hunter2" * 1000
    for body in (_spec(**{secret: 1}), _spec(name=secret), _spec(search={"sampler": {"name": secret}})):
        answer = client.post("/v1/jobs", content=body, headers=JSON)
        problem(answer, 422)
        assert len(answer.content) < 1500


def test_a_good_body_is_taken(url: str) -> None:
    """The proof that the bodies above are refused for their faults."""
    headers = {"Content-Type": "application/json; charset=utf-8"}
    answer = httpx.post(f"{url}/v1/jobs", content=_spec(), headers=headers, trust_env=False)
    assert answer.status_code == 201
