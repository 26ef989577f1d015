"""Documents are not validated as they are sent, so that is done here: they are what the schemas say."""

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from pydantic import BaseModel

from coterie.search.store import Role, TrialState, Verdict, VerdictKind
from coterie.service import schemas
from coterie.service.documents import encode, parse, verbatim
from coterie.service.storage.store import SqlTrialStore
from tests.service.conftest import Server, confirm


@pytest.fixture
def confirmed(searched: tuple[Server, str]) -> tuple[Server, str]:
    """With a verdict, a confirmed point, and a second job that waits."""
    server, job_id = searched
    store = SqlTrialStore(server.database, job_id, 1)
    for seed in range(2):
        confirm(store, "trial_0", Role.POINT, 4.0 + seed, 500.0, seed)
        confirm(store, "trial_0", Role.SHARED, 1.0 + seed, 510.0, seed)
    store.set_verdict(
        Verdict(kind=VerdictKind.GROUPS, words="é", trial_id="trial_0", grouping=[["a"], ["b"]])
    )
    store.set_estimate(60.0)
    server.submit(name="another")
    return server, job_id


ANSWERS: dict[str, type[BaseModel]] = {
    "/v1/jobs": schemas.Page[schemas.Job],
    "/v1/jobs/{job}": schemas.Job,
    "/v1/jobs/{job}/trials": schemas.Page[schemas.Trial],
    "/v1/jobs/{job}/trials?sort=-delta_m": schemas.Page[schemas.Trial],
    "/v1/jobs/{job}/front": schemas.Front,
    "/v1/jobs/{job}/front?objectives=macs,params": schemas.Front,
    "/v1/jobs/{job}/front/history": schemas.Page[schemas.FrontStep],
    "/v1/jobs/{job}/best": schemas.Trial,
    "/v1/trials/trial_0": schemas.Trial,
    "/v1/trials/trial_3": schemas.Trial,
    "/v1/trials/trial_0/measurements": schemas.Page[schemas.Measurement],
}


def test_answers_are_what_their_schemas_say(confirmed: tuple[Server, str]) -> None:
    server, job_id = confirmed
    for path, schema in ANSWERS.items():
        answer = server.client.get(path.format(job=job_id))
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json"), path
        found = schema.model_validate_json(answer.content)
        assert json.loads(found.model_dump_json(by_alias=True)) == answer.json(), path


def test_json_passes_as_it_is_stored() -> None:
    document = {"spec": verbatim('{"a": [1.0, 1e-7, "é\\u00e9"]}'), "none": verbatim(None)}
    assert encode(document) == '{"spec":{"a": [1.0, 1e-7, "é\\u00e9"]},"none":null}'.encode()
    assert parse('{"a": 0.1}') == {"a": 0.1}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC), "2026-01-02T03:04:05.000006Z"),
        (datetime(2026, 1, 2, tzinfo=UTC), "2026-01-02T00:00:00Z"),
        (datetime(2026, 1, 2, tzinfo=timezone(timedelta(0))), "2026-01-02T00:00:00Z"),
        (TrialState.COMPLETED, "completed"),
        (float("nan"), None),
        (float("inf"), None),
        (1 << 53, 1 << 53),
    ],
)
def test_values_are_sent_as_the_schemas_send_them(value: Any, shown: object) -> None:
    assert json.loads(encode({"value": value})) == {"value": shown}
