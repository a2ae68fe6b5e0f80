"""create_app(settings): the API process, wired."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI

from api import errors, files, health, metrics
from api.apiframe import account, deliveries, events, images, jobs, uploads, webhooks
from api.dependencies import KeyRing, Parts
from api.intake import Intake
from api.middleware import BodyLimit, RequestId
from api.waiting import open_watch
from core import progress
from core.queue import Hints
from core.settings import Settings
from core.storage import open_storage
from db.session import Database

_OVERHEAD_BYTES = 1024 * 1024


def create_app(settings: Settings) -> FastAPI:
    """Wire an API process; connections are opened when it starts and closed when it stops."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        database, storage, hints = Database(settings), open_storage(settings), Hints(settings)
        redis = progress.connect(settings)
        intake = Intake(settings, database, storage, hints)
        key_ring = KeyRing(database, store_digests=settings.webhook_apiframe_signature != "off")
        try:
            async with open_watch(redis) as watch:
                app.state.parts = Parts(settings, database, storage, redis, intake, key_ring, watch)
                yield
        finally:
            hints.close()
            await redis.aclose()
            await database.close()

    app = FastAPI(
        title="upscaled",
        version=version("upscaled"),
        summary="Upscale images on your own machines.",
        lifespan=lifespan,
        openapi_tags=[
            {"name": name} for name in ("images", "jobs", "webhooks", "uploads", "account", "files", "health")
        ],
    )
    for module in (images, jobs, events, deliveries, webhooks, uploads, account, files, health, metrics):
        app.include_router(module.router)
    errors.install(app)
    # base64 needs four characters for three bytes; the rest of a request is small.
    app.add_middleware(BodyLimit, max_bytes=settings.max_input_bytes * 4 // 3 + _OVERHEAD_BYTES)
    app.add_middleware(RequestId)
    _describe_only_real_answers(app)
    return app


def _describe_only_real_answers(app: FastAPI) -> None:
    """Take FastAPI's 422 out of the OpenAPI document: we answer 400 in its place."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document.get("components", {}).get("schemas", {}).pop(name, None)
        return document

    app.openapi = openapi
