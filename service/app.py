"""The server: `create_app(settings)` builds it, its lifespan opens and closes what it needs."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from anyio.to_thread import run_sync
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from coterie.service import VERSION, schemas
from coterie.service.config import Settings
from coterie.service.context import Context, Dispatcher
from coterie.service.delivery import Deliverer
from coterie.service.errors import install_handlers, problem_responses
from coterie.service.gate import Gate
from coterie.service.hub import Hub
from coterie.service.middleware import install_middleware
from coterie.service.routes import (
    admin,
    architectures,
    catalogue,
    events,
    fronts,
    health,
    jobs,
    page,
    trials,
    webhooks,
)
from coterie.service.routes.authentication import ACCESS_ERRORS, AUTHENTICATED
from coterie.service.storage import migrate
from coterie.service.storage.database import Database

_ROUTERS = (
    jobs.router,
    trials.router,
    fronts.router,
    events.router,
    webhooks.router,
    architectures.router,
    catalogue.router,
    admin.router,
    page.router,
)
_COMPONENT = "#/components/schemas/{model}"
# Of what endpoints read or answer by themselves, past FastAPI.
_UNSEEN = (schemas.Problem, schemas.TokenRequest, schemas.WebhookSpec, schemas.Event)


def create_app(settings: Settings, dispatcher: Dispatcher | None = None) -> FastAPI:
    """Build the server; nothing is opened before its lifespan begins.

    Args:
        settings: The operator's.
        dispatcher: What runs the jobs; by default Ray does.
    """
    app = FastAPIOffline(
        title="Coterie",
        version=VERSION,
        description="Search for multi-task learning: which tasks to learn together, and in which network.",
        lifespan=_lifespan(settings, dispatcher),
        redirect_slashes=False,
        redoc_url=None,
        static_url="/docs/assets",
        # One JobSpec in the document: what may be left out going in, though it always comes out.
        separate_input_output_schemas=False,
    )
    plain_document = app.openapi

    def document_with_problems() -> dict[str, Any]:
        document = plain_document()
        for operation in (op for item in document["paths"].values() for op in item.values()):
            for parameter in operation.get("parameters", []):
                parameter["schema"] = _without_null(parameter["schema"])
        for model in _UNSEEN:
            schema = model.model_json_schema(ref_template=_COMPONENT)
            document["components"]["schemas"] |= {**schema.pop("$defs", {}), model.__name__: schema}
        return document

    app.openapi = document_with_problems  # type: ignore[method-assign] # as FastAPI's manual has it
    install_handlers(app)
    install_middleware(app, settings.cors_origins)
    app.include_router(health.router)
    for router in _ROUTERS:
        app.include_router(router, dependencies=[AUTHENTICATED], responses=problem_responses(*ACCESS_ERRORS))
    return app


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A parameter may be left out, but no URL or header holds a null."""
    rest = [choice for choice in schema.get("anyOf", []) if choice != {"type": "null"}]
    if len(rest) != 1:
        return schema
    named = {name: value for name, value in schema.items() if name not in {"anyOf", "default"}}
    return {**named, **rest[0]}


def _lifespan(
    settings: Settings, given: Dispatcher | None
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        database = await run_sync(_open_database, settings)
        try:
            dispatcher = given if given is not None else await run_sync(_ray_dispatcher, settings, database)
            hub = Hub(database, most_streams=settings.max_connections // 2)
            app.state.gate = Gate(database, settings.requests_per_second)
            app.state.context = Context(settings, database, dispatcher, hub)
            await run_sync(dispatcher.start)
            try:
                deliverer = Deliverer(database, allow_private=settings.webhook_allow_private)
                async with hub.running(), deliverer.running():
                    yield
            finally:
                await run_sync(dispatcher.stop)
        finally:
            database.close()

    return lifespan


def _open_database(settings: Settings) -> Database:
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    migrate.prepare(settings.url)
    return Database(settings.url)


def _ray_dispatcher(settings: Settings, database: Database) -> Dispatcher:
    from coterie.service.dispatcher import Dispatcher as RayDispatcher  # slow to import: it brings Ray

    return RayDispatcher(settings, database)
