"""The sweep: finds what processes and messages have lost, and what is over. It compares the truth with the world."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta

import anyio
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from core import notices
from core.errors import DatabaseUnavailable, StorageUnavailable
from core.queue import ENOUGH_HINTS, MAX_HINTS, Hints, count_hints
from core.settings import Settings
from core.storage import Storage
from db import estimates, jobs, queue, retention, uploads, usage
from db.jobs import Changed
from db.models import JobStatus
from db.session import Database

ADVISORY_LOCK = 0x7377656570  # "sweep": whoever holds it sweeps

PURGED_AT_ONCE = 100
"""Of how many jobs, and how many uploads, one sweep deletes the objects."""

FORGET_SECONDS = 3600.0
"""How often usage that is too old is looked for: that reads the whole table, and only a new day makes more of it."""

SETTLE_BEATS = 2
"""For how many beats the sweep watches before it declares anyone dead: after an outage of the database, in which nobody
could beat, all would be. The same goes for a database that stood still."""

logger = logging.getLogger(__name__)


class Sweeper:
    """Sweeps every few seconds, in one dispatcher at a time."""

    def __init__(self, settings: Settings, database: Database, redis: Redis, hints: Hints, storage: Storage) -> None:
        self._settings = settings
        self._database = database
        self._redis = redis
        self._hints = hints
        self._storage = storage
        self._lease = timedelta(seconds=settings.lease_seconds)
        self._silence = max(self._lease, timedelta(seconds=5 * settings.sweep_seconds))
        self._forget_at = 0.0

    async def run(self) -> None:
        """Sweep until cancelled; a server that is away is waited for."""
        while True:
            try:
                # The lock belongs to this connection: should either die, another dispatcher takes over.
                async with self._database.connection() as connection, leading(connection, self._silence) as leads:
                    if leads:
                        await self._lead(connection)
            except DatabaseUnavailable as error:
                logger.warning("sweep put off: %s", error)
            await anyio.sleep(self._settings.sweep_seconds)

    async def _lead(self, connection: AsyncConnection) -> None:
        purging = asyncio.create_task(self._purge_for_ever())
        try:
            await self._sweep_for_ever(connection)
        finally:
            purging.cancel()
            await asyncio.wait([purging])

    async def _sweep_for_ever(self, connection: AsyncConnection) -> None:
        settle = SETTLE_BEATS * self._settings.beat_seconds
        settled_at = time.monotonic() + settle
        while True:
            began = time.monotonic()
            await connection.execute(text("SELECT 1"))
            now = time.monotonic()
            if now - began > self._settings.beat_seconds:  # it stood still, for the beats as well
                settled_at = now + settle
            if now >= settled_at:
                await self.bury(connection)
            await self.sweep(connection)
            await anyio.sleep(self._settings.sweep_seconds)

    async def sweep(self, connection: AsyncConnection) -> None:
        """Do everything once, but for declaring workers dead and deleting objects."""
        await self._announce(await jobs.expire(connection))
        await estimates.measure(connection, self._lease)
        try:
            await self.resend_hints(connection)
        except RedisError as error:
            logger.warning("hints put off, Redis is away: %s", error)
        await queue.free_idempotency_keys(connection)

    async def bury(self, connection: AsyncConnection) -> None:
        """Give the jobs of dead workers to others."""
        changed = await jobs.bury(connection, self._lease, self._settings.max_strikes)
        for job in changed:
            logger.warning("job %s: its worker is dead, now %s", job.id, job.status)
        self._hints.send(sum(job.status is JobStatus.QUEUED for job in changed))
        await self._announce(changed)

    async def resend_hints(self, connection: AsyncConnection) -> int:
        """Send a hint for each claimable job that lacks one; return how many were sent.

        A job that is younger than a sweep's pause is left out: its hint may be under way.
        """
        pause = timedelta(seconds=self._settings.sweep_seconds)
        queued = await queue.count_claimable(connection, pause, MAX_HINTS)
        hints = await count_hints(self._redis) if queued else 0
        missing = queued - hints
        if missing <= 0 or hints >= ENOUGH_HINTS:
            return 0
        logger.info("%d jobs queued without a hint: sending", missing)
        self._hints.send(missing)
        return missing

    async def _purge_for_ever(self) -> None:
        """Delete what is over, beside the sweep: a storage that is slow must not keep it from finding dead workers."""
        while True:
            try:
                while await self.purge() >= PURGED_AT_ONCE:
                    pass
                await self.forget_usage()
            except DatabaseUnavailable as error:
                logger.warning("expired objects stay for now: %s", error)
            await anyio.sleep(self._settings.sweep_seconds)

    async def purge(self) -> int:
        """Delete objects whose time is over, then mark their rows; return how many rows were marked.

        What cannot be deleted is met again later, and stands in nobody's way.
        """
        async with self._database.connection() as connection:
            leavings = await retention.find_leavings(connection, PURGED_AT_ONCE)
            expired = await uploads.find_expired(connection, PURGED_AT_ONCE)
        gone = [left.job_id for left in leavings if await self._delete(left.keys)]
        gone_uploads = [key for key in expired if await self._delete([key])]
        async with self._database.connection() as connection:
            if kept := {left.job_id for left in leavings}.difference(gone):
                await retention.put_off(connection, list(kept))
            await retention.mark_purged(connection, gone)
            await uploads.mark_purged(connection, gone_uploads)
        return len(gone) + len(gone_uploads)

    async def forget_usage(self) -> None:
        """Delete usage of long ago, unless that was done lately."""
        if time.monotonic() >= self._forget_at:
            async with self._database.connection() as connection:
                await usage.forget(connection)
            self._forget_at = time.monotonic() + FORGET_SECONDS

    async def _delete(self, keys: Sequence[str]) -> bool:
        try:
            for key in keys:
                await self._storage.delete(key)
        except StorageUnavailable as error:
            logger.warning("expired objects %s stay for now: %s", ", ".join(keys), error)
            return False
        return True

    async def _announce(self, changed: Sequence[Changed]) -> None:
        if changed:
            await notices.announce(self._redis, *(notices.job_channel(job.id) for job in changed))


@asynccontextmanager
async def leading(connection: AsyncConnection, silence: timedelta = timedelta(0)) -> AsyncGenerator[bool]:
    """Tell whether this connection is the one that sweeps; it leads until the block is left, or it dies.

    When a leader says nothing for as long as `silence`, Postgres ends its connection: a process that sleeps, or a
    machine that vanished, would otherwise keep everyone else from sweeping. Zero lets it be silent for ever.
    """
    lock = text("SELECT pg_try_advisory_lock(:lock)")
    leads = bool((await connection.execute(lock, {"lock": ADVISORY_LOCK})).scalar_one())
    try:
        if leads:
            await _end_when_silent(connection, silence)
        yield leads
    finally:
        # The connection goes back to the pool, and would keep the lock there; one that died has let go of it.
        if leads and not connection.invalidated:
            await connection.execute(text("SELECT pg_advisory_unlock(:lock)"), {"lock": ADVISORY_LOCK})
            await _end_when_silent(connection, timedelta(0))


async def _end_when_silent(connection: AsyncConnection, silence: timedelta) -> None:
    limit = f"{silence // timedelta(milliseconds=1)}ms"
    await connection.execute(text("SELECT set_config('idle_session_timeout', :limit, false)"), {"limit": limit})
