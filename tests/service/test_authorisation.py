"""Who may do what: every route, for each role, on what is their tenant's and on what is another's."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count, product
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from coterie.search.store import FolderArtifacts
from coterie.service import access
from coterie.service.app import create_app
from coterie.service.auth import Role
from coterie.service.config import Settings
from coterie.service.storage.tables import DeliveryRow
from tests.service.conftest import SPEC, RecordingDispatcher, Server, complete, on_front, open_server
from tests.service.side_runs import measure_affinities, use_references

OURS, THEIRS = "ours", "theirs"
TENANTS = (OURS, THEIRS)
PATHS_OF_DOCUMENTS = ("/openapi.json", "/docs", "/docs/assets", "/docs/oauth2-redirect")


@dataclass(frozen=True)
class Row:
    """What a route wants and gives.

    Attributes:
        needs: The least role; None where anyone may.
        status: What who may gets, on what is their own; what is another tenant's is always a 404.
        body: What is sent.
        state: That a job has to be in.
    """

    needs: Role | None
    status: int = 200
    body: Mapping[str, Any] | None = None
    state: str = "queued"


READS = Row(Role.READER)
ADMIN_READS = Row(Role.ADMIN)
TABLE = {
    "GET /": READS,
    "GET /healthz": Row(None),
    "GET /readyz": Row(None),
    "GET /v1/jobs": READS,
    "POST /v1/jobs": Row(Role.SUBMITTER, 201, SPEC),
    "GET /v1/jobs/{job_id}": READS,
    "PATCH /v1/jobs/{job_id}": Row(Role.SUBMITTER, 200, {"priority": 3}),
    "DELETE /v1/jobs/{job_id}": Row(Role.SUBMITTER, 204, state="cancelled"),
    "POST /v1/jobs/{job_id}/cancel": Row(Role.SUBMITTER),
    "POST /v1/jobs/{job_id}/pause": Row(Role.SUBMITTER),
    "POST /v1/jobs/{job_id}/resume": Row(Role.SUBMITTER, state="paused"),
    "GET /v1/jobs/{job_id}/affinity": READS,
    "GET /v1/jobs/{job_id}/references": READS,
    "GET /v1/jobs/{job_id}/logs": READS,
    "GET /v1/jobs/{job_id}/trials": READS,
    "GET /v1/jobs/{job_id}/front": READS,
    "GET /v1/jobs/{job_id}/front/history": READS,
    "GET /v1/jobs/{job_id}/best": READS,
    "GET /v1/jobs/{job_id}/events": READS,
    "GET /v1/trials/{trial_id}": READS,
    "GET /v1/trials/{trial_id}/measurements": READS,
    "GET /v1/trials/{trial_id}/architecture": READS,
    "GET /v1/trials/{trial_id}/model": READS,
    "GET /v1/datasets": READS,
    "GET /v1/families": READS,
    "GET /v1/backbones": READS,
    "GET /v1/metrics": READS,
    "GET /v1/tenant": READS,
    "GET /v1/tokens": ADMIN_READS,
    "POST /v1/tokens": Row(Role.ADMIN, 201, {"role": "reader"}),
    "DELETE /v1/tokens/{token_id}": Row(Role.ADMIN, 204),
    "GET /v1/audit": ADMIN_READS,
    "GET /v1/webhooks": ADMIN_READS,
    "POST /v1/webhooks": Row(Role.ADMIN, 201, {"url": "http://127.0.0.1:9/new", "kinds": ["front"]}),
    "GET /v1/webhooks/{webhook_id}": ADMIN_READS,
    "DELETE /v1/webhooks/{webhook_id}": Row(Role.ADMIN, 204),
    "GET /v1/webhooks/{webhook_id}/deliveries": ADMIN_READS,
    "POST /v1/webhooks/{webhook_id}/deliveries/{delivery_id}/retry": Row(Role.ADMIN),
}
QUERIES = {"GET /v1/jobs/{job_id}/events": {"timeout_seconds": 0}}  # or it would not end


@dataclass
class World:
    """A server with two tenants that have the same, and each role's token."""

    server: Server
    tokens: dict[tuple[str, Role], str]
    jobs: dict[str, str] = field(default_factory=dict)
    trials: dict[str, str] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=count)

    def ask(self, method: str, path: str, tenant: str, role: Role | None, **request: Any) -> httpx.Response:
        headers = {} if role is None else {"Authorization": f"Bearer {self.tokens[tenant, role]}"}
        return self.server.client.request(method, path, headers=headers, **request)

    def read(self, path: str, tenant: str = OURS) -> Any:
        answer = self.ask("GET", path, tenant, Role.ADMIN)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def job(self, tenant: str, state: str) -> str:
        """A new job in a state."""
        answer = self.ask("POST", "/v1/jobs", tenant, Role.ADMIN, json=SPEC)
        job_id = str(answer.json()["id"])
        action = {"cancelled": "cancel", "paused": "pause"}.get(state)
        if action is not None:
            self.ask("POST", f"/v1/jobs/{job_id}/{action}", tenant, Role.ADMIN)
        return job_id

    def token(self, tenant: str) -> str:
        """The id of a new token."""
        made = access.create_token(
            self.server.database, access.operator(tenant), role=Role.READER, name="", expires_at=None
        )
        return made.id

    def webhook(self, tenant: str) -> tuple[str, str]:
        """A webhook that was made before, and a new delivery to it that failed for good."""
        webhook_id = self.read("/v1/webhooks", tenant)["items"][0]["id"]
        delivery_id = f"delivery_{next(self.numbers):016x}"
        with self.server.database.write() as session:
            session.add(
                DeliveryRow(
                    id=delivery_id,
                    webhook_id=webhook_id,
                    job_id=self.job(tenant, "queued"),
                    sequence=1,
                    state="dead",
                    attempts=9,
                    created_at=datetime.now(UTC),
                )
            )
        return webhook_id, delivery_id

    def fill(self, route: str, tenant: str) -> str:
        """A route's path, with ids of what is the tenant's."""
        method, path = route.split(" ")
        if "{webhook_id}" in path:
            webhook_id, delivery_id = self.webhook(tenant)
            return path.format(webhook_id=webhook_id, delivery_id=delivery_id)
        if "{token_id}" in path:
            return path.format(token_id=self.token(tenant))
        changed = method != "GET" and "{job_id}" in path
        job_id = self.job(tenant, TABLE[route].state) if changed else self.jobs[tenant]
        return path.format(job_id=job_id, trial_id=self.trials[tenant])

    def everything(self) -> str:
        """What a refused request leaves as it is."""
        with self.server.database.read() as session:
            return json.dumps(
                {
                    name: [list(map(str, row)) for row in session.execute(text(f"SELECT * FROM {name}"))]
                    for name in ("jobs", "tokens", "webhooks", "audit", "trials")
                }
            )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with open_server(tmp_path_factory.mktemp("world") / "data", webhook_allow_private=True) as server:
        tokens = {
            (tenant, role): access.create_token(
                server.database, access.operator(tenant), role=role, name="", expires_at=None
            ).token
            for tenant, role in product(TENANTS, Role)
        }
        world = World(server, tokens)
        for number, tenant in enumerate(TENANTS):
            world.jobs[tenant] = world.job(tenant, "queued")
            store = server.claim()
            store.set_reference_point({"delta_m": -10.0, "macs": 1000.0})
            artifacts = FolderArtifacts(server.settings.artifacts_of(world.jobs[tenant]))
            complete(store, number, 5.0, 500.0, on_front(7500.0, 1), artifacts=artifacts)
            world.trials[tenant] = f"trial_{number}"
            hook = {"url": f"http://127.0.0.1:9/{tenant}", "kinds": ["front"]}
            made = world.ask("POST", "/v1/webhooks", tenant, Role.ADMIN, json=hook)
            assert made.status_code == 201, made.text
            if tenant == THEIRS:
                measure_affinities(store)
                use_references(store)
        yield world


def _routes(routes: Any) -> Iterator[tuple[str, Any]]:
    for route in routes:
        if hasattr(route, "original_router"):  # FastAPI's, of a router that was included
            yield from _routes(route.original_router.routes)
        else:
            yield route.path, route


def test_every_route_has_a_row(tmp_path_factory: pytest.TempPathFactory) -> None:
    settings = Settings(data_dir=tmp_path_factory.mktemp("app"), _env_file=None)
    app = create_app(settings, RecordingDispatcher())
    found = {
        f"{method} {path}"
        for path, route in _routes(app.routes)
        if path not in PATHS_OF_DOCUMENTS
        for method in route.methods
    }
    assert found == set(TABLE)
    document = app.openapi()["paths"]
    told = {
        f"{method.upper()} {path}": found for path, item in document.items() for method, found in item.items()
    }
    assert set(told) == set(TABLE) - {"GET /"}
    for route, operation in told.items():
        protected = TABLE[route].needs is not None
        assert ("security" in operation) == protected, route
        assert ({"401", "403", "429"} <= set(operation["responses"])) == protected, route


@pytest.mark.parametrize("role", [None, *Role])
@pytest.mark.parametrize(
    ("route", "tenant"),
    # Without an id a route names nothing that could be another tenant's.
    [(route, tenant) for route, tenant in product(TABLE, TENANTS) if tenant == OURS or "{" in route],
)
def test_who_may_do_what(world: World, route: str, role: Role | None, tenant: str) -> None:
    row = TABLE[route]
    path = world.fill(route, tenant)
    if row.needs is None:
        expected = row.status
    elif role is None:
        expected = 401
    elif not role.includes(row.needs):
        expected = 403
    else:
        expected = row.status if tenant == OURS else 404
    before = world.everything()
    answer = world.ask(route.split(" ")[0], path, OURS, role, json=row.body, params=QUERIES.get(route))
    assert answer.status_code == expected, answer.text
    if expected >= 400:
        assert world.everything() == before
        assert THEIRS not in answer.text


LISTS: Mapping[str, Callable[[World], str]] = {
    "/": lambda world: world.jobs[THEIRS],
    "/v1/jobs?limit=1000": lambda world: world.jobs[THEIRS],
    "/v1/tokens?limit=1000": lambda world: f'"{THEIRS}"',
    "/v1/audit?limit=1000": lambda world: world.jobs[THEIRS],
    "/v1/webhooks": lambda world: f"http://127.0.0.1:9/{THEIRS}",
}


@pytest.mark.parametrize("path", LISTS)
def test_lists_show_nothing_that_is_anothers(world: World, path: str) -> None:
    theirs = LISTS[path](world)
    assert theirs in world.ask("GET", path, THEIRS, Role.ADMIN).text
    assert theirs not in world.ask("GET", path, OURS, Role.ADMIN).text


def test_what_others_measured_on_the_same_data_is_not_seen(world: World) -> None:
    for name in ("references", "affinity"):
        assert world.read(f"/v1/jobs/{world.jobs[THEIRS]}/{name}", THEIRS)["items"]
        assert world.read(f"/v1/jobs/{world.jobs[OURS]}/{name}")["items"] == []


def test_two_tenants_may_use_the_same_idempotency_key(world: World) -> None:
    jobs = []
    for tenant in TENANTS:
        token = world.tokens[tenant, Role.SUBMITTER]
        headers = {"Authorization": f"Bearer {token}", "Idempotency-Key": "same"}
        answer = world.server.client.post("/v1/jobs", json=SPEC, headers=headers)
        assert answer.status_code == 201
        assert answer.json()["tenant"] == tenant
        jobs.append(answer.json()["id"])
    assert jobs[0] != jobs[1]


def test_a_cursor_of_another_tenants_list_shows_nothing_of_it(world: World) -> None:
    for path in ("/v1/jobs", "/v1/tokens", "/v1/audit"):
        cursor = world.read(f"{path}?limit=1", THEIRS)["next_cursor"]
        items = world.read(f"{path}?limit=1000&cursor={cursor}")["items"]
        assert items
        assert THEIRS not in json.dumps(items)
