"""One job at a time: claim → read → upscale → write → complete."""

import hashlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta

import anyio
from anyio.from_thread import BlockingPortal, start_blocking_portal
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy.ext.asyncio import AsyncConnection

from core import progress
from core.errors import DatabaseUnavailable, InputFetchFailed, LeaseLost, NotFound, OutOfMemory, Stopped, UpscaledError
from core.options import UpscaleOptions
from core.outbound import Outbound
from core.settings import Settings
from core.storage import Storage, open_storage, result_key
from db import jobs
from db.jobs import Attempt, Result
from db.session import Database
from worker.upscaler import images
from worker.upscaler.engine import Engine
from worker.upscaler.plan import check_output

EMPTY_CLAIM_PAUSE_SECONDS = 0.005
"""A claim comes back empty when every queued row is locked by others: it is asked once more after this pause."""

WATCH_SECONDS = 5.0
"""How often a running attempt asks whether the job is still its own."""

FINISH_PATIENCE_SECONDS = 60.0
"""How long a finished attempt waits for a database that is away: the work is done, and worth keeping."""

FINISH_RETRY_SECONDS = 1.0
PROGRESS_INTERVAL_SECONDS = 0.2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Parts:
    """What lives in the worker's event loop."""

    database: Database
    storage: Storage
    outbound: Outbound
    redis: Redis


@contextmanager
def open_worker(settings: Settings, engine: Engine) -> Generator["Worker"]:
    """Start an event loop in a thread, connect there, and lend a Worker that reaches it through one portal."""
    with (
        start_blocking_portal(backend_options={"use_uvloop": sys.platform != "win32"}) as portal,
        portal.wrap_async_context_manager(_open_parts(settings)) as parts,
    ):
        worker = Worker(settings, engine, portal, parts)
        watch = portal.start_task_soon(worker.watch)
        try:
            yield worker
        finally:
            watch.cancel()


@asynccontextmanager
async def _open_parts(settings: Settings) -> AsyncGenerator[_Parts]:
    database, redis = Database(settings), progress.connect(settings)
    try:
        async with Outbound(settings.outbound_allow) as outbound:
            yield _Parts(database, open_storage(settings), outbound, redis)
    finally:
        await redis.aclose()
        await database.close()


class Worker:
    """Runs jobs with one engine, in the thread that calls it."""

    def __init__(self, settings: Settings, engine: Engine, portal: BlockingPortal, parts: _Parts) -> None:
        self._settings = settings
        self._engine = engine
        self._portal = portal
        self._parts = parts
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._running: tuple[Attempt, threading.Event] | None = None

    def run_next(self) -> bool:
        """Claim the next job and carry it to its end; return whether there was one.

        Whatever is wrong with a job ends that job. Only a database that is away ends the call: what it left undone,
        the sweep will find.
        """
        attempt = self._portal.call(self._claim)
        if attempt is None:
            return False
        try:
            self._run(attempt)
        except DatabaseUnavailable as error:
            logger.warning("job %s attempt %d: left behind, %s", attempt.job_id, attempt.number, error)
        return True

    def _run(self, attempt: Attempt) -> None:
        began = time.monotonic()
        try:
            result = self._upscale(attempt)
        except (LeaseLost, Stopped) as error:
            logger.info("job %s attempt %d: dropped, %s", attempt.job_id, attempt.number, error)
            return
        except UpscaledError as error:
            failure = error
        except MemoryError as error:
            failure = OutOfMemory("The worker ran out of memory.").with_traceback(error.__traceback__)
        except Exception:
            # The boundary of a job: a bug met by one job must end that job, and not the worker or the jobs behind it.
            logger.exception("job %s attempt %d: bug", attempt.job_id, attempt.number)
            failure = UpscaledError("Something went wrong on our side.")
        else:
            logger.info(
                "job %s attempt %d: completed, %dx%d by %s in %.2f s",
                *(attempt.job_id, attempt.number, result.width, result.height, result.engine),
                time.monotonic() - began,
            )
            return
        logger.info("job %s attempt %d: failed, %s: %s", attempt.job_id, attempt.number, failure.code, failure)
        self._portal.call(self._fail, attempt, failure)

    def _upscale(self, attempt: Attempt) -> Result:
        options = UpscaleOptions.model_validate(attempt.options)
        picture = images.decode(self._portal.call(self._read, attempt), self._settings.max_output_pixels)
        check_output(picture.width, picture.height, options, self._settings.max_output_pixels)
        lost = threading.Event()
        self._running = (attempt, lost)
        upscaled = self._engine.upscale(picture, options, self._reporter(attempt), lost.is_set)
        self._running = None
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
            async with self._parts.database.connection() as connection:
                if (attempt := await jobs.claim(connection, self._name)) is not None:
                    return attempt
        return None

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
        await self._parts.storage.write(key, data)
        ttl = timedelta(seconds=self._settings.result_ttl_seconds)
        try:
            await self._finish(lambda connection: jobs.complete(connection, attempt, result, key, ttl))
        except LeaseLost:
            await self._parts.storage.delete(key)
            raise

    async def _fail(self, attempt: Attempt, error: UpscaledError) -> None:
        try:
            await self._finish(lambda connection: jobs.fail(connection, attempt, error))
        except LeaseLost as lost:
            logger.info("job %s attempt %d: dropped, %s", attempt.job_id, attempt.number, lost)

    async def _finish(self, change: Callable[[AsyncConnection], Awaitable[None]]) -> None:
        give_up_at = time.monotonic() + FINISH_PATIENCE_SECONDS
        while True:
            try:
                async with self._parts.database.connection() as connection:
                    return await change(connection)
            except DatabaseUnavailable:
                if time.monotonic() > give_up_at:
                    raise
                await anyio.sleep(FINISH_RETRY_SECONDS)

    async def watch(self) -> None:
        """Tell the engine to stop once the job it works on is no longer ours; runs beside all jobs, until cancelled."""
        while True:
            await anyio.sleep(WATCH_SECONDS)
            if self._running is None:
                continue
            attempt, lost = self._running
            try:
                async with self._parts.database.connection() as connection:
                    if not await jobs.is_current(connection, attempt):
                        lost.set()
            except DatabaseUnavailable as error:
                logger.warning("job %s: cannot tell whether it is still ours: %s", attempt.job_id, error)

    def _reporter(self, attempt: Attempt) -> Callable[[float], None]:
        """Return the engine's on_progress: it never waits, and drops what comes too fast to be seen."""
        shown_at = time.monotonic()

        def report(fraction: float) -> None:
            nonlocal shown_at
            now = time.monotonic()
            if now - shown_at >= PROGRESS_INTERVAL_SECONDS:
                shown_at = now
                # 100 is what a completed job shows: encoding and storing are still to come.
                self._portal.start_task_soon(self._report, attempt, min(99, int(100 * fraction)))

        return report

    async def _report(self, attempt: Attempt, percent: int) -> None:
        try:
            await progress.report(self._parts.redis, attempt.job_id, attempt.number, percent)
        except RedisError as error:
            logger.debug("progress of job %s not shown: %s", attempt.job_id, error)
