"""The queue as tests drive it, past the API and the workers."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from uuid import UUID, uuid4

from sqlalchemy import insert

from core.options import OutputFormat, UpscaleOptions
from core.settings import Settings
from db import queue, workers
from db.jobs import Attempt, Result
from db.models import ApiKey, WebhookEvent
from db.queue import NewJob, Submitted
from db.session import Database

Value = TypeVar("Value")

RESULT = Result(engine="none", format=OutputFormat.PNG, width=2, height=2, size_bytes=9, sha256="00", seed=1)


class Queue:
    """Short words for what API and workers do."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._worker: UUID | None = None

    async def do(self, change: Callable[..., Awaitable[Value]], *arguments: Any, **named: Any) -> Value:
        """Call a function of `db` on a connection of its own."""
        async with self._database.connection() as connection:
            return await change(connection, *arguments, **named)

    async def add_key(self, **limits: float) -> UUID:
        owner = uuid4()
        values = {"id": owner, "name": "tests", "prefix": "upk_", "hash": owner.bytes} | limits
        async with self._database.connection() as connection:
            await connection.execute(insert(ApiKey), values)
        return owner

    async def ask(self, owner: UUID, *events: WebhookEvent, max_queued: int = 10_000, **values: Any) -> Submitted:
        """Submit a job; it wants to report events when some are given."""
        defaults: dict[str, Any] = {
            "id": uuid4(),
            "api_key_id": owner,
            "model": "m",
            "input": {},
            "options": UpscaleOptions(),
            "image_url": "https://example.com/a.png",
            "webhook_url": "https://example.com/hook" if events else None,
            "webhook_events": events,
        }
        return await self.do(queue.submit, NewJob(**defaults | values), max_queued)

    async def submit(self, owner: UUID, *events: WebhookEvent, **values: Any) -> UUID:
        return (await self.ask(owner, *events, **values)).id

    async def register(self) -> UUID:
        worker_id = uuid4()
        await self.do(workers.register, worker_id, "tests", "none")
        return worker_id

    async def claim(self, worker_id: UUID | None = None) -> Attempt | None:
        """Claim the next job, by default always by the same worker."""
        if worker_id is None:
            worker_id = self._worker = self._worker or await self.register()
        return await self.do(queue.claim, worker_id, "tests")

    async def take(self, worker_id: UUID | None = None) -> Attempt:
        """Claim the next job, of which there must be one."""
        attempt = await self.claim(worker_id)
        assert attempt is not None
        return attempt

    async def drain(self) -> list[UUID]:
        """Claim until nothing is left, and return the jobs in that order."""
        taken: list[UUID] = []
        while (attempt := await self.claim()) is not None:
            taken.append(attempt.job_id)
        return taken


@asynccontextmanager
async def open_queue(settings: Settings) -> AsyncGenerator[Queue]:
    database = Database(settings)
    yield Queue(database)
    await database.close()
