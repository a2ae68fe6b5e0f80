"""One job at a time: claim → read → upscale → write → complete."""

import hashlib
import logging
import os
import random
import socket
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar
from uuid import UUID

import anyio
from anyio.abc import TaskGroup
from anyio.from_thread import BlockingPortal, start_blocking_portal
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy.ext.asyncio import AsyncConnection

from core import failpoints, notices, progress
from core.errors import (
    DatabaseUnavailable,
    InputFetchFailed,
    LeaseLost,
    NotFound,
    OutOfMemory,
    Stopped,
    StorageUnavailable,
    TransientError,
    UpscaledError,
)
from core.options import UpscaleOptions
from core.outbound import Outbound
from core.queue import Hints
from core.settings import Settings
from core.storage import Storage, open_storage, result_key
from db import jobs, queue
from db.jobs import Attempt, Result
from db.models import JobStatus
from db.session import Database
from worker.lease import Held, Lease
from worker.upscaler import images
from worker.upscaler.engine import Engine
from worker.upscaler.plan import check_output

EMPTY_CLAIM_PAUSE_SECONDS = 0.005
"""A claim comes back empty when every queued row is locked by others: it is asked once more after this pause."""

FINISH_PATIENCE_SECONDS = 60.0
"""How long a finished attempt waits for a storage or a database that is away: the work is done, and worth keeping."""

FINISH_RETRY_SECONDS = 1.0
PROGRESS_INTERVAL_SECONDS = 0.2
PROGRESS_EVENT_INTERVAL_SECONDS = 1.0
"""How often the webhook of a job is told of its progress at most."""

RETRY_GROWTH = 5.0
"""How much longer a job waits after each further passing fault, give or take a fifth."""

LONGEST_RETRY_SECONDS = 300.0

Value = TypeVar("Value")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Parts:
    """What lives in the worker's event loop."""

    database: Database
    storage: Storage
    outbound: Outbound
    redis: Redis
    hints: Hints
    lease: Lease
    tasks: TaskGroup
    """For what nobody waits for."""


@contextmanager
def open_worker(settings: Settings, engine: Engine) -> Generator["Worker"]:
    """Start an event loop in a thread, connect there, and lend a Worker that reaches it through one portal."""
    with (
        start_blocking_portal(backend_options={"use_uvloop": sys.platform != "win32"}) as portal,
        portal.wrap_async_context_manager(_open_parts(settings, engine.name)) as parts,
    ):
        yield Worker(settings, engine, portal, parts)


@asynccontextmanager
async def _open_parts(settings: Settings, engine: str) -> AsyncGenerator[_Parts]:
    database, redis, hints = Database(settings), progress.connect(settings), Hints(settings)
    lease = Lease(settings, database, redis, f"{socket.gethostname()}:{os.getpid()}", engine)
    try:
        async with Outbound(settings.outbound_allow) as outbound, lease.open(), anyio.create_task_group() as tasks:
            yield _Parts(database, open_storage(settings), outbound, redis, hints, lease, tasks)
    finally:
        hints.close()
        await redis.aclose()
        await database.close()


class Worker:
    """Runs jobs with one engine, in the thread that calls it."""

    def __init__(self, settings: Settings, engine: Engine, portal: BlockingPortal, parts: _Parts) -> None:
        self._settings = settings
        self._engine = engine
        self._portal = portal
        self._parts = parts
        self._lease = parts.lease

    def drain(self) -> None:
        """Begin to end: a job that runs is finished if it can be within the settings' time, and handed back if not."""
        self._lease.drain()

    def run_next(self) -> bool:
        """Claim the next job and carry it to its end; return whether there was one.

        Whatever is wrong with a job ends that job. What could not be ended, because the database was away, is left to
        the sweep.
        """
        attempt = self._portal.call(self._claim)
        if attempt is None:
            return False
        failpoints.reach("after_claim")
        try:
            with self._lease.hold(attempt) as held:
                self._run(held)
        except DatabaseUnavailable as error:
            logger.warning("job %s attempt %d: left behind, %s", attempt.job_id, attempt.number, error)
            self._lease.forsake()
        except BaseException:
            self._lease.forsake()  # whatever it is, the job must not stay with a worker that has forgotten it
            raise
        return True

    def _run(self, held: Held) -> None:
        attempt, began = held.attempt, time.monotonic()
        try:
            result = self._upscale(held)
        except LeaseLost as error:
            logger.info("job %s attempt %d: dropped, %s", attempt.job_id, attempt.number, error)
            return
        except Stopped as error:
            self._hand_back(attempt, None, str(error))
            return
        except DatabaseUnavailable:
            raise
        except MemoryError as error:
            failure = OutOfMemory("The worker ran out of memory.").with_traceback(error.__traceback__)
        except UpscaledError as error:
            failure = error
        except Exception:
            # The boundary of a job: a bug met by one job must end that job, and not the worker or the jobs behind it.
            logger.exception("job %s attempt %d: bug", attempt.job_id, attempt.number)
            failure = UpscaledError("Something went wrong on our side.")
        else:
            seconds = time.monotonic() - began
            self._lease.learn(attempt.cost, seconds)
            logger.info(
                "job %s attempt %d: completed, %dx%d by %s in %.2f s",
                *(attempt.job_id, attempt.number, result.width, result.height, result.engine, seconds),
            )
            return
        if isinstance(failure, TransientError) and not (isinstance(failure, OutOfMemory) and _is_reduced(attempt)):
            self._hand_back(attempt, failure, f"{failure.code}: {failure}")
        else:
            self._fail(attempt, failure)

    def _upscale(self, held: Held) -> Result:
        attempt, limit = held.attempt, self._settings.max_output_pixels
        options = UpscaleOptions.model_validate(attempt.options)
        source = self._portal.call(self._read, attempt)
        with held.watched():
            picture = images.decode(source, limit)
            check_output(picture.width, picture.height, options, limit)
            upscaled = self._engine.upscale(picture, options, self._reporter(held), held.should_stop)
            data = images.encode(upscaled, options.output_format, options.output_quality)
        result = Result(
            engine=self._engine.name,
            format=options.output_format,
            width=upscaled.width,
            height=upscaled.height,
            size_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            seed=options.seed,
        )
        self._portal.call(self._keep, attempt, data, result)
        return result

    async def _claim(self) -> Attempt | None:
        for pause in (0.0, EMPTY_CLAIM_PAUSE_SECONDS):
            await anyio.sleep(pause)
            if (attempt := await self._claim_once()) is not None:
                self._announce_soon(attempt.job_id)
                return attempt
        return None

    async def _claim_once(self) -> Attempt | None:
        while True:
            await self._lease.register()
            try:
                async with self._parts.database.connection() as connection:
                    return await queue.claim(connection, self._lease.id, self._lease.name)
            except LeaseLost as error:
                logger.warning("%s Registering again.", error)
                self._lease.forsake()
            except BaseException:
                self._lease.forsake()  # a job may be ours by now, and we shall never know
                raise

    async def _read(self, attempt: Attempt) -> bytes:
        if attempt.image_url is not None:
            settings = self._settings
            return await self._parts.outbound.fetch(
                attempt.image_url, settings.max_input_bytes, settings.fetch_timeout_seconds
            )
        assert attempt.image_key is not None  # the schema holds exactly one of the two
        try:
            return await self._parts.storage.read(attempt.image_key)
        except NotFound as error:
            raise InputFetchFailed("The uploaded image is gone.") from error

    async def _keep(self, attempt: Attempt, data: bytes, result: Result) -> None:
        """Write the object under the attempt's own key, then complete the job with it, or take it away again."""
        key = result_key(attempt.job_id, attempt.number, result.format)
        await self._write(key, data)
        failpoints.reach("after_upload")
        ttl = timedelta(seconds=self._settings.result_ttl_seconds)
        try:
            await self._finish(attempt, lambda connection: jobs.complete(connection, attempt, result, key, ttl))
        except (LeaseLost, Stopped):
            await self._parts.storage.delete(key)
            raise
        failpoints.reach("after_commit")

    async def _write(self, key: str, data: bytes) -> None:
        """Store the finished picture, waiting for a storage that is away."""
        give_up_at = time.monotonic() + FINISH_PATIENCE_SECONDS
        while True:
            try:
                return await self._parts.storage.write(key, data)
            except StorageUnavailable as error:
                if time.monotonic() > give_up_at or self._lease.drained:
                    raise
                logger.warning("%s: %s", key, error)
                await anyio.sleep(FINISH_RETRY_SECONDS)

    def _fail(self, attempt: Attempt, error: UpscaledError) -> None:
        logger.info("job %s attempt %d: failed, %s: %s", attempt.job_id, attempt.number, error.code, error)

        async def change(connection: AsyncConnection) -> None:
            await jobs.fail(connection, attempt, error)

        try:
            self._portal.call(self._finish, attempt, change)
        except LeaseLost as lost:
            logger.info("job %s attempt %d: dropped, %s", attempt.job_id, attempt.number, lost)

    def _hand_back(self, attempt: Attempt, fault: UpscaledError | None, why: str) -> None:
        """Let the job be claimed again: at once after a drain, after a pause when something has to pass."""
        reduce = isinstance(fault, OutOfMemory)
        pause = min(self._settings.retry_seconds * RETRY_GROWTH**attempt.strikes, LONGEST_RETRY_SECONDS)
        wait = 0.0 if fault is None or reduce else pause * random.uniform(0.8, 1.2)  # noqa: S311

        async def change(connection: AsyncConnection) -> JobStatus:
            strikes, due_in = self._settings.max_strikes, timedelta(seconds=wait)
            return await jobs.hand_back(connection, attempt, strikes, fault=fault, pause=due_in, small_tiles=reduce)

        try:
            status = self._portal.call(self._finish, attempt, change)
        except LeaseLost as lost:
            logger.info("job %s attempt %d: dropped, %s", attempt.job_id, attempt.number, lost)
            return
        logger.info("job %s attempt %d: handed back, now %s, %s", attempt.job_id, attempt.number, status, why)
        if status is JobStatus.QUEUED and not wait:
            self._parts.hints.send()  # this worker may be about to end: another one is to begin at once

    async def _finish(self, attempt: Attempt, change: Callable[[AsyncConnection], Awaitable[Value]]) -> Value:
        """Change the attempt's state, waiting for a database that is away, and tell who waits for that."""
        give_up_at = time.monotonic() + FINISH_PATIENCE_SECONDS
        while True:
            try:
                async with self._parts.database.connection() as connection:
                    changed = await change(connection)
            except DatabaseUnavailable:
                if time.monotonic() > give_up_at:
                    raise
                await anyio.sleep(FINISH_RETRY_SECONDS)
            else:
                self._announce_soon(attempt.job_id)
                return changed

    def _announce_soon(self, job_id: UUID) -> None:
        self._parts.tasks.start_soon(self._announce, job_id)

    async def _announce(self, job_id: UUID) -> None:
        try:
            await notices.announce(self._parts.redis, notices.job_channel(job_id))
        except Exception:
            # It would end all that runs beside it, for a notice that nothing depends on.
            logger.exception("job %s: bug while announcing", job_id)

    def _reporter(self, held: Held) -> Callable[[float], None]:
        """Return the engine's on_progress: it never waits, and drops what comes too fast to be seen."""
        shown_at = event_at = time.monotonic()

        def report(fraction: float) -> None:
            nonlocal shown_at, event_at
            held.move()
            failpoints.reach("mid_step")
            now = time.monotonic()
            if now - shown_at < PROGRESS_INTERVAL_SECONDS:
                return
            shown_at = now
            owe_event = held.attempt.wants_progress and now - event_at >= PROGRESS_EVENT_INTERVAL_SECONDS
            event_at = now if owe_event else event_at
            # 100 is what a completed job shows: encoding and storing are still to come.
            percent = min(99, max(1, int(100 * fraction)))
            self._portal.start_task_soon(self._report, held.attempt, percent, owe_event)

        return report

    async def _report(self, attempt: Attempt, percent: int, owe_event: bool) -> None:
        try:
            await progress.report(self._parts.redis, attempt.job_id, attempt.number, percent)
            if owe_event:
                await progress.owe_event(self._parts.redis, attempt.job_id, attempt.number, percent)
        except RedisError as error:
            logger.debug("progress of job %s not shown: %s", attempt.job_id, error)


def _is_reduced(attempt: Attempt) -> bool:
    return bool(attempt.options.get("small_tiles"))
