"""How attempts end: with a result that is kept, in failure, or handed back for another attempt."""

import logging
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from datetime import timedelta
from typing import TypeVar
from uuid import UUID

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncConnection

from core import failpoints, notices
from core.errors import (
    DatabaseUnavailable,
    LeaseLost,
    OutOfMemory,
    Stopped,
    StorageUnavailable,
    UploadFailed,
    UpscaledError,
)
from core.options import OutputFormat
from core.queue import Hints
from core.settings import Settings
from core.storage import Storage, result_key
from db import jobs
from db.jobs import Attempt, Result
from db.models import JobStatus
from db.session import Database
from worker.drafts import Draft
from worker.lease import Held, Lease
from worker.puts import Putter

FINISH_PATIENCE_SECONDS = 60.0
"""How long a finished attempt waits for a storage or a database that is away: the work is done, and worth keeping."""

FINISH_RETRY_SECONDS = 1.0

RETRY_GROWTH = 5.0
"""How much longer a job waits after each further passing fault, give or take a fifth."""

LONGEST_RETRY_SECONDS = 300.0

Value = TypeVar("Value")

logger = logging.getLogger(__name__)


class Endings:
    """Ends attempts; lives in the worker's event loop. Whatever waits for a job is told."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        storage: Storage,
        redis: Redis,
        hints: Hints,
        lease: Lease,
        putter: Putter,
        tasks: TaskGroup,
    ) -> None:
        self._settings = settings
        self._database = database
        self._storage = storage
        self._redis = redis
        self._hints = hints
        self._lease = lease
        self._putter = putter
        self._tasks = tasks

    async def store(self, attempt: Attempt, draft: Draft, format: OutputFormat) -> str:
        """Store the finished picture, waiting for a storage that is away; return its key, which is the attempt's own.

        Raises:
            StorageUnavailable: it stayed away for longer than a finished picture can wait.
        """
        key = result_key(attempt.job_id, attempt.number, format)
        give_up_at = time.monotonic() + FINISH_PATIENCE_SECONDS
        while True:
            try:
                async with aclosing(draft.blocks()) as blocks:
                    await self._storage.write(key, blocks)
                break
            except StorageUnavailable as error:
                if time.monotonic() > give_up_at or self._lease.drained:
                    raise
                logger.warning("%s: %s", key, error)
                await anyio.sleep(FINISH_RETRY_SECONDS)
        failpoints.reach("after_upload")
        return key

    async def complete(self, held: Held, draft: Draft, result: Result, key: str) -> UploadFailed | None:
        """Put what was stored where the caller wants it, if anywhere; then complete the job, or take the object away.

        Return why the caller's URL did not take it: then the job has failed by that, and keeps its result.

        Raises:
            LeaseLost, Stopped: the job is not ours any more, or unwanted.
            DatabaseUnavailable: it stayed away for longer than a finished picture can wait.
        """
        attempt, failure = held.attempt, None
        ttl = timedelta(seconds=self._settings.result_ttl_seconds)

        async def require_wanted() -> None:
            await self._insist(lambda connection: jobs.require_wanted(connection, attempt))

        async def change(connection: AsyncConnection) -> None:
            await jobs.complete(connection, attempt, result, key, ttl, failure)

        try:
            if attempt.upload_url is not None:
                failure = await self._putter.put(held, draft, result.format.content_type, require_wanted)
            await self._finish(attempt, change)
        except (LeaseLost, Stopped):
            try:
                await self._storage.delete(key)
            except StorageUnavailable as error:  # which says nothing of the job: the sweep deletes it some day
                logger.warning("%s stays for now: %s", key, error)
            raise
        failpoints.reach("after_commit")
        return failure

    async def fail(self, attempt: Attempt, error: UpscaledError) -> None:
        """Let the job fail by `error`, whose sentence and code its caller will read."""
        logger.info("job %s attempt %d: failed, %s: %s", attempt.job_id, attempt.number, error.code, error)

        async def change(connection: AsyncConnection) -> None:
            await jobs.fail(connection, attempt, error)

        try:
            await self._finish(attempt, change)
        except LeaseLost as lost:
            logger.info("job %s attempt %d: dropped, %s", attempt.job_id, attempt.number, lost)

    async def hand_back(self, attempt: Attempt, fault: UpscaledError | None, why: str) -> None:
        """Let the job be claimed again: at once after a drain, after a pause when something has to pass."""
        reduce = isinstance(fault, OutOfMemory)
        pause = min(self._settings.retry_seconds * RETRY_GROWTH**attempt.strikes, LONGEST_RETRY_SECONDS)
        wait = 0.0 if fault is None or reduce else pause * random.uniform(0.8, 1.2)  # noqa: S311

        async def change(connection: AsyncConnection) -> JobStatus:
            strikes, due_in = self._settings.max_strikes, timedelta(seconds=wait)
            return await jobs.hand_back(connection, attempt, strikes, fault=fault, pause=due_in, small_tiles=reduce)

        try:
            status = await self._finish(attempt, change)
        except LeaseLost as lost:
            logger.info("job %s attempt %d: dropped, %s", attempt.job_id, attempt.number, lost)
            return
        logger.info("job %s attempt %d: handed back, now %s, %s", attempt.job_id, attempt.number, status, why)
        if status is JobStatus.QUEUED and not wait:
            await self.send_hint()  # this worker may be about to end: another one is to begin at once

    async def send_hint(self) -> None:
        """Say that there may be work that could not be claimed before."""
        await anyio.to_thread.run_sync(self._hints.send)

    async def _finish(self, attempt: Attempt, change: Callable[[AsyncConnection], Awaitable[Value]]) -> Value:
        """Change the attempt's state, waiting for a database that is away, and tell who waits for that."""
        changed = await self._insist(change)
        self.announce_soon(attempt.job_id)
        return changed

    async def _insist(self, ask: Callable[[AsyncConnection], Awaitable[Value]]) -> Value:
        """Ask the database, waiting for one that is away."""
        give_up_at = time.monotonic() + FINISH_PATIENCE_SECONDS
        while True:
            try:
                async with self._database.connection() as connection:
                    return await ask(connection)
            except DatabaseUnavailable:
                if time.monotonic() > give_up_at:
                    raise
                await anyio.sleep(FINISH_RETRY_SECONDS)

    def announce_soon(self, job_id: UUID) -> None:
        """Tell who waits for the job to look again; nobody waits for that."""
        self._tasks.start_soon(self._announce, job_id)

    async def _announce(self, job_id: UUID) -> None:
        try:
            await notices.announce(self._redis, notices.job_channel(job_id))
        except Exception:
            # It would end all that runs beside it, for a notice that nothing depends on.
            logger.exception("job %s: bug while announcing", job_id)
