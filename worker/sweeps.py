"""The sweep: finds what messages have lost. It compares the truth with the hints and sends what is missing."""

import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta

import anyio
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from core.errors import DatabaseUnavailable
from core.queue import ENOUGH_HINTS, MAX_HINTS, Hints, count_hints
from core.settings import Settings
from db import jobs
from db.session import Database

ADVISORY_LOCK = 0x7377656570  # "sweep": whoever holds it sweeps

logger = logging.getLogger(__name__)


class Sweeper:
    """Sweeps every few seconds, in one dispatcher at a time."""

    def __init__(self, settings: Settings, database: Database, redis: Redis, hints: Hints) -> None:
        self._settings = settings
        self._database = database
        self._redis = redis
        self._hints = hints

    async def run(self) -> None:
        """Sweep until cancelled; a server that is away is waited for."""
        while True:
            try:
                # The lock belongs to this connection: should either die, another dispatcher takes over.
                async with self._database.connection() as connection, leading(connection) as leads:
                    if leads:
                        await self._sweep_for_ever(connection)
            except DatabaseUnavailable as error:
                logger.warning("sweep put off: %s", error)
            await anyio.sleep(self._settings.sweep_seconds)

    async def _sweep_for_ever(self, connection: AsyncConnection) -> None:
        while True:
            try:
                await self.sweep(connection)
            except RedisError as error:
                logger.warning("sweep put off, Redis is away: %s", error)
            await anyio.sleep(self._settings.sweep_seconds)

    async def sweep(self, connection: AsyncConnection) -> int:
        """Send a hint for each queued job that lacks one; return how many were sent.

        A job that is younger than a sweep's pause is left out: its hint may be under way.
        """
        pause = timedelta(seconds=self._settings.sweep_seconds)
        queued = await jobs.count_queued(connection, pause, MAX_HINTS)
        hints = await count_hints(self._redis) if queued else 0
        missing = queued - hints
        if missing <= 0 or hints >= ENOUGH_HINTS:
            return 0
        logger.info("%d jobs queued without a hint: sending", missing)
        self._hints.send(missing)
        return missing


@asynccontextmanager
async def leading(connection: AsyncConnection) -> AsyncGenerator[bool]:
    """Tell whether this connection is the one that sweeps; it leads until the block is left, or it dies."""
    lock = text("SELECT pg_try_advisory_lock(:lock)")
    leads = bool((await connection.execute(lock, {"lock": ADVISORY_LOCK})).scalar_one())
    try:
        yield leads
    finally:
        # The connection goes back to the pool, and would keep the lock there; one that died has let go of it.
        if leads and not connection.invalidated:
            await connection.execute(text("SELECT pg_advisory_unlock(:lock)"), {"lock": ADVISORY_LOCK})
