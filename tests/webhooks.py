"""Deliveries that several tests make, and a dispatcher's senders inside the test's process."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from uuid import UUID

import anyio
from starlette.testclient import TestClient

from core import progress
from core.outbound import Outbound
from core.sealing import Sealer
from core.settings import Settings
from core.storage import open_storage
from db.session import Database
from tests.requests import body_of
from worker.posts import Poster
from worker.progress_events import ProgressSender
from worker.receivers import Receivers
from worker.webhooks import WebhookSender

Sql = Callable[..., Sequence[Any]]


def submit_with_webhook(client: TestClient, image: str, url: str, *events: str) -> str:
    body = body_of(image) | {"webhookUrl": url} | ({"webhookEvents": events} if events else {})
    response = client.post("/v2/images/upscale", json=body)
    assert response.status_code == 202, response.text
    return response.json()["jobId"]


def owe(sql: Sql, url: str, count: int = 1) -> list[UUID]:
    """Record deliveries that are due, each of a failed job of its own, all of one new key; return their ids."""
    (key,) = sql(
        "INSERT INTO api_keys (id, name, prefix, hash) VALUES (gen_random_uuid(), '', '', uuid_send(gen_random_uuid()))"
        " RETURNING id"
    )
    jobs = sql(
        "INSERT INTO jobs (id, api_key_id, status, model, input, options, image_key, webhook_url, error, error_code)"
        " SELECT gen_random_uuid(), $1, 'FAILED', 'clarity-upscale', '{}', '{}', '-', $2, 'No.', 'internal'"
        " FROM generate_series(1, $3::int) RETURNING id",
        *(key["id"], url, count),
    )
    rows = sql(
        "INSERT INTO deliveries (job_id, event, url, receiver)"
        " SELECT id, 'failed', $2::text, coalesce(substring($2::text from '^[a-z]+://[^/?#]+'), '')"
        " FROM unnest($1::uuid[]) AS id"
        " RETURNING id",
        *([job["id"] for job in jobs], url),
    )
    return [row["id"] for row in rows]


@asynccontextmanager
async def sending(settings: Settings) -> AsyncGenerator[Receivers]:
    """Run what a dispatcher runs for webhooks."""
    database, redis, receivers = Database(settings), progress.connect(settings), Receivers()
    async with Outbound(settings.outbound_allow) as outbound, anyio.create_task_group() as tasks:
        poster = Poster(settings, database, Sealer(settings), outbound)
        tasks.start_soon(WebhookSender(settings, database, open_storage(settings), poster, receivers).run)
        tasks.start_soon(ProgressSender(database, redis, poster, receivers).run)
        yield receivers
        tasks.cancel_scope.cancel()
    await redis.aclose()
    await database.close()


def deliver(settings: Settings, until: Callable[[], bool], seconds: float = 10, dispatchers: int = 1) -> None:
    """Run the senders of so many dispatchers until `until` holds."""

    async def run() -> None:
        async with AsyncExitStack() as running:
            for _ in range(dispatchers):
                await running.enter_async_context(sending(settings))
            give_up_at = time.monotonic() + seconds
            while not await asyncio.to_thread(until):
                assert time.monotonic() < give_up_at, "the delivery did not get there in time"
                await asyncio.sleep(0.05)

    asyncio.run(run())
