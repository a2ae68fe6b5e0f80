"""create_app(settings): the API process, wired."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from api import docs, errors, files, health, metrics
from api.apiframe import account, deliveries, events, images, jobs, uploads, webhooks
from api.dependencies import Parts
from api.intake import Intake
from api.keyring import open_key_ring
from api.middleware import BodyLimit, Envelope, LastResort
from api.rates import Rates
from api.room import Room
from api.waiting import open_watch
from core import progress
from core.queue import Hints
from core.sealing import Sealer
from core.settings import Settings
from core.storage import FILES_PATH, open_storage
from db.session import Database

_OVERHEAD_BYTES = 1024 * 1024

_CORS: Mapping[str, Any] = {
    "allow_methods": ("GET", "HEAD", "POST", "PUT"),
    "allow_headers": (
        *("X-API-Key", "Authorization", "Content-Type", "X-Request-Id"),
        *("Idempotency-Key", "Cancel-After", "Prefer", "If-None-Match", "Last-Event-ID"),
    ),
    "expose_headers": (
        *("Location", "Retry-After", "ETag", "X-Request-Id", "RateLimit", "RateLimit-Policy"),
        *("Idempotent-Replayed", "Preference-Applied"),
    ),
    "max_age": 3600,
}
"""What pages of the origins in the settings may do: a key goes in a header, so there are no credentials to allow."""

LONG_BODIES = (("POST", "/v2/images/upscale"), ("POST", "/v2/uploads"), ("PUT", f"{FILES_PATH}/"))
"""Where images come in bodies."""


def create_app(settings: Settings) -> FastAPI:
    """Wire an API process; connections are opened when it starts and closed when it stops."""

    # base64 needs four characters for three bytes; the rest of a request is small.
    max_bytes = settings.max_input_bytes * 4 // 3 + _OVERHEAD_BYTES

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        database, storage, hints = Database(settings), open_storage(settings), Hints(settings)
        redis, sealer = progress.connect(settings), Sealer(settings)
        intake = Intake(settings, database, storage, hints)
        rates, room = Rates(settings), Room(max_bytes)
        keep_digests = settings.webhook_apiframe_signature != "off"
        try:
            async with (
                open_watch(redis) as watch,
                open_key_ring(database, sealer, store_digests=keep_digests) as key_ring,
            ):
                app.state.parts = Parts(
                    *(settings, database, storage, redis, intake),
                    *(key_ring, watch, sealer, rates, room),
                )
                yield
        finally:
            hints.close()
            await rates.aclose()
            await redis.aclose()
            await database.close()

    app = FastAPI(
        title="upscaled",
        version=version("upscaled"),
        summary="Upscale images on your own machines.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_tags=[
            {"name": name} for name in ("images", "jobs", "webhooks", "uploads", "account", "files", "health")
        ],
    )
    for module in (images, jobs, events, deliveries, webhooks, uploads, account, files, health, metrics, docs):
        app.include_router(module.router)
    errors.install(app)
    app.add_middleware(BodyLimit, max_bytes=max_bytes, long_bodies=LONG_BODIES)
    app.add_middleware(LastResort)
    if settings.cors_origins:  # outside of what answers errors: a page may read those as well
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors_origins, **_CORS)
    app.add_middleware(Envelope, https=settings.public_url.startswith("https://"))
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
