"""The document that clients are generated from."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from coterie.search.spec import JobSpec
from coterie.search.store import Role, Verdict, VerdictKind
from coterie.service.storage.store import SqlTrialStore
from tests.service.conftest import SPEC, Server, confirm
from tests.service.side_runs import measure_affinities, use_references


@pytest.fixture
def document(client: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield f"{method.upper()} {path}", operation


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for item in value.values():
            yield from _references(item)
    elif isinstance(value, list):
        for item in value:
            yield from _references(item)


def test_every_reference_leads_somewhere_and_every_schema_is_one(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for reference in set(_references(document)):
        assert reference.removeprefix("#/components/schemas/") in schemas, reference
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    assert document["openapi"].startswith("3.1")


def test_every_endpoint_says_what_it_does_and_how_it_fails(document: dict[str, Any]) -> None:
    names = [operation["operationId"] for _, operation in _operations(document)]
    assert len(set(names)) == len(names)
    for name, operation in _operations(document):
        assert operation["summary"], name
        assert operation["description"], name
        assert "default" in operation["responses"], name
        for status, response in operation["responses"].items():
            if status == "default" or (status.startswith("4") and status != "404") or status == "404":
                assert list(response["content"]) == ["application/problem+json"], (name, status)
        if "{" in name:
            assert "404" in operation["responses"], name
        if any(parameter["in"] == "query" for parameter in operation.get("parameters", [])):
            assert "400" in operation["responses"], name


def test_the_contracts_routes_are_there(document: dict[str, Any]) -> None:
    assert {name for name, _ in _operations(document)} == {
        *("POST /v1/jobs", "GET /v1/jobs", "GET /v1/jobs/{job_id}", "POST /v1/jobs/{job_id}/cancel"),
        *(
            "GET /v1/jobs/{job_id}/trials",
            "GET /v1/jobs/{job_id}/front",
            "GET /v1/jobs/{job_id}/front/history",
        ),
        *("GET /v1/jobs/{job_id}/best", "GET /v1/jobs/{job_id}/logs"),
        *("POST /v1/jobs/{job_id}/pause", "POST /v1/jobs/{job_id}/resume"),
        *("GET /v1/jobs/{job_id}/affinity", "GET /v1/jobs/{job_id}/references"),
        *("GET /v1/trials/{trial_id}", "GET /v1/trials/{trial_id}/measurements"),
        *("GET /v1/trials/{trial_id}/architecture", "GET /v1/trials/{trial_id}/model"),
        *("GET /v1/datasets", "GET /v1/families", "GET /v1/backbones", "GET /v1/metrics"),
        *("GET /v1/jobs/{job_id}/events", "POST /v1/webhooks", "GET /v1/webhooks"),
        *("GET /v1/webhooks/{webhook_id}", "DELETE /v1/webhooks/{webhook_id}"),
        "GET /v1/webhooks/{webhook_id}/deliveries",
        "POST /v1/webhooks/{webhook_id}/deliveries/{delivery_id}/retry",
        *(
            "GET /v1/tokens",
            "POST /v1/tokens",
            "DELETE /v1/tokens/{token_id}",
            "GET /v1/tenant",
            "GET /v1/audit",
        ),
        *("PATCH /v1/jobs/{job_id}", "DELETE /v1/jobs/{job_id}"),
        *("GET /healthz", "GET /readyz"),
    }


def test_every_field_and_parameter_is_described(document: dict[str, Any]) -> None:
    for name, schema in document["components"]["schemas"].items():
        for field, found in schema.get("properties", {}).items():
            assert "description" in found or "$ref" in found, f"{name}.{field}"
    for name, operation in _operations(document):
        for parameter in operation.get("parameters", []):
            assert parameter.get("description"), (name, parameter["name"])


def test_the_body_of_a_submission_is_a_job_spec(document: dict[str, Any]) -> None:
    body = document["paths"]["/v1/jobs"]["post"]["requestBody"]
    assert body["required"]
    assert body["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/JobSpec"}
    schema = {"$ref": "#/components/schemas/JobSpec", "components": document["components"]}
    validator = Draft202012Validator(schema)
    validator.validate(SPEC)
    validator.validate(JobSpec.model_validate(SPEC).model_dump(mode="json"))
    assert not validator.is_valid({**SPEC, "tasks": ["a", "a"]})
    assert not validator.is_valid({**SPEC, "colour": "red"})
    assert not validator.is_valid({**SPEC, "budget": {"trials": 0}})


def test_answers_are_as_the_document_says(searched: tuple[Server, str]) -> None:
    server, job_id = searched
    store = SqlTrialStore(server.database, job_id, 1)
    store.set_verdict(Verdict(kind=VerdictKind.APART, words="Learn them apart."))
    for role in Role:
        confirm(store, "trial_0", role, 1.0, 2.0, seed=0)
    measure_affinities(store)
    use_references(store)
    document = server.client.get("/openapi.json").json()
    for path in (
        *("/v1/jobs", f"/v1/jobs/{job_id}", f"/v1/jobs/{job_id}/trials", f"/v1/jobs/{job_id}/front"),
        *(f"/v1/jobs/{job_id}/front/history", f"/v1/jobs/{job_id}/best"),
        *(f"/v1/jobs/{job_id}/affinity", f"/v1/jobs/{job_id}/references"),
        *("/v1/trials/trial_0", "/v1/trials/trial_3", "/v1/trials/trial_0/measurements"),
        *("/v1/datasets", "/v1/families", "/v1/backbones", "/v1/metrics", "/healthz", "/readyz"),
    ):
        template = (
            path.replace(job_id, "{job_id}").replace("trial_0", "{trial_id}").replace("trial_3", "{trial_id}")
        )
        content = document["paths"][template]["get"]["responses"]["200"]["content"]
        schema = {**content["application/json"]["schema"], "components": document["components"]}
        Draft202012Validator(schema).validate(server.client.get(path).json())


def test_problems_are_as_the_document_says(client: httpx.Client, document: dict[str, Any]) -> None:
    schema = {"$ref": "#/components/schemas/Problem", "components": document["components"]}
    for answer in (
        client.get("/v1/jobs/job_0"),
        client.get("/v1/jobs?limit=0"),
        client.post("/v1/jobs", json={}),
        client.put("/v1/jobs"),
    ):
        Draft202012Validator(schema).validate(answer.json())


def test_the_documents_page_needs_nothing_from_outside(client: httpx.Client) -> None:
    page = client.get("/docs").text
    needed = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert any(path.endswith(".js") for path in needed)
    for path in needed:
        assert path.startswith("/")
        assert client.get(path).status_code == 200, path
    assert "http" not in page.replace("http-equiv", "")
