"""From a claim to its end: claim → read → upscale → write → complete, one job on the engine at a time.

While the engine works on a job, what is finished of its picture is written into a file, the one before is stored and
the one after is read.
"""

import hashlib
import logging
import os
import socket
import sys
import time
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar, TypeVarTuple

import anyio
from anyio.from_thread import BlockingPortal, start_blocking_portal
from redis.asyncio import Redis

from core import failpoints, progress
from core.errors import (
    ContentFlagged,
    DatabaseUnavailable,
    InputFetchFailed,
    LeaseLost,
    NotFound,
    OutOfMemory,
    SafetyCheckUnavailable,
    Stopped,
    TransientError,
    UpscaledError,
)
from core.options import SafetyCheck, UpscaleOptions
from core.outbound import Outbound
from core.queue import Hints
from core.settings import Settings
from core.storage import Storage, is_upload, open_storage
from db.jobs import Attempt, Result
from db.session import Database
from worker.claims import Claims
from worker.coming import Coming, wait_for
from worker.drafts import Draft
from worker.endings import Endings
from worker.lease import Held, Lease
from worker.puts import Putter, Sideline
from worker.reports import Reports
from worker.upscaler import encoding
from worker.upscaler.decoder import Decoder
from worker.upscaler.decoding import Header, Limits
from worker.upscaler.engine import Engine
from worker.upscaler.engines import Engines
from worker.upscaler.memory import machine_bytes
from worker.upscaler.picture import Levels, Picture
from worker.upscaler.plan import Size, check_memory, check_output, output_size

GLANCE_PIXELS = 512
"""Shorter side of what the safety check looks at: a little more than it needs."""

Value = TypeVar("Value")
Arguments = TypeVarTuple("Arguments")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Parts:
    """What lives in the worker's event loop."""

    storage: Storage
    outbound: Outbound
    redis: Redis
    lease: Lease
    claims: Claims
    endings: Endings


class SafetyChecker(Protocol):
    """What looks for sexual content in a picture."""

    def flags(self, rgb: Levels) -> bool:
        """Tell whether there is some."""
        ...


@dataclass(frozen=True)
class _Ready:
    """An attempt that waits for its engine."""

    held: Held
    options: UpscaleOptions
    engine: Engine
    picture: Picture
    claimed_at: float

    @property
    def alone(self) -> bool:
        """Whether no other job may be in the worker's hands meanwhile."""
        return self.held.attempt.strikes > 0


@dataclass(frozen=True)
class _Upscaled:
    """An attempt whose picture is finished, and the end of its file perhaps still being written."""

    held: Held
    options: UpscaleOptions
    engine: str
    size: Size
    draft: Draft
    saving: Future[None]
    claimed_at: float
    alone: bool


@dataclass(frozen=True)
class _Stored:
    """An attempt whose result is stored, and that has yet to end with it."""

    held: Held
    draft: Draft
    result: Result
    key: str
    claimed_at: float


@contextmanager
def open_worker(
    settings: Settings, engines: Engines, safety_checker: SafetyChecker | None = None
) -> Generator["Worker"]:
    """Start an event loop in a thread, connect there, and lend a Worker that reaches it through one portal."""
    with (
        start_blocking_portal(backend_options={"use_uvloop": sys.platform != "win32"}) as portal,
        portal.wrap_async_context_manager(_open_parts(settings, engines.own.name)) as parts,
        Sideline() as sideline,
        Decoder(settings.decode_seconds, settings.stall_seconds) as decoder,
    ):
        yield Worker(settings, engines, safety_checker, portal, parts, sideline, decoder)


@asynccontextmanager
async def _open_parts(settings: Settings, engine: str) -> AsyncGenerator[_Parts]:
    database, redis, hints = Database(settings), progress.connect(settings), Hints(settings)
    lease = Lease(settings, database, redis, f"{socket.gethostname()}:{os.getpid()}", engine)
    try:
        guarded = Outbound(settings.outbound_allow, settings.outbound_proxy)
        async with guarded as outbound, lease.open(), anyio.create_task_group() as tasks:
            storage, putter = open_storage(settings), Putter(settings, outbound)
            endings = Endings(settings, database, storage, redis, hints, lease, putter, tasks)
            yield _Parts(storage, outbound, redis, lease, Claims(database, lease, endings), endings)
    finally:
        hints.close()
        await redis.aclose()
        await database.close()


class Worker:
    """Runs jobs, one at a time, in the thread that calls it."""

    def __init__(
        self,
        settings: Settings,
        engines: Engines,
        safety_checker: SafetyChecker | None,
        portal: BlockingPortal,
        parts: _Parts,
        sideline: Sideline,
        decoder: Decoder,
    ) -> None:
        self._settings = settings
        self._engines = engines
        self._portal = portal
        self._parts = parts
        self._lease = parts.lease
        self._reports = Reports(portal, parts.redis)
        self._sideline = sideline
        self._safety_checker = safety_checker
        self._decoder = decoder
        memory_bytes = settings.max_memory_bytes or machine_bytes()
        self._limits = Limits(settings.max_output_pixels, settings.max_input_side, memory_bytes)
        self._drafts: dict[Held, Draft] = {}
        self._claimed = 0
        self._free_at = 0.0
        """When the engine had last done its work."""

    def drain(self) -> None:
        """Begin to end: a job that runs is finished if it can be within the settings' time, and handed back if not."""
        self._lease.drain()

    def work(self) -> int:
        """Run jobs until none is left to claim, or the worker is to end; return how many were claimed.

        Whatever is wrong with a job ends that job. What could not be ended, because the database was away, is left to
        the sweep. A job that was lost before is alone from its claim to its end: if it is one that takes its worker
        with it, it must not do so to its neighbours again and again. What is being put to a caller's URL may outlast
        this, and is nobody's neighbour: its picture is done.
        """
        before = self._claimed
        try:
            with ThreadPoolExecutor(1, "ahead") as ahead, ThreadPoolExecutor(1, "behind") as behind:
                writing: Future[object] | None = None
                ready = self._prepare()
                while ready is not None:
                    coming = Coming(ahead, lambda: self._prepare(beside_others=True), begins=not ready.alone)
                    writing = self._run(ready, coming.begin, writing, behind)
                    ready = None if ready.alone else coming.result() or self._prepare(beside_others=True)
                    if ready is None:  # what is being written may hold the last place of its key, or have to be alone
                        wait_for(writing)
                        ready = self._prepare()
        finally:
            lost = [held for held in self._lease.held if held not in self._sideline.held]
            for held in lost:
                self._discard_draft(held)
            self._lease.abandon(*lost)
        return self._claimed - before

    def _prepare(self, *, beside_others: bool = False) -> _Ready | None:
        """Claim jobs until one can be read; None when there is none, or the worker is to end."""
        while (
            not self._lease.draining
            and (held := self._portal.call(self._parts.claims.claim, beside_others)) is not None
        ):
            self._claimed += 1
            failpoints.reach("after_claim")
            if (ready := self._stage(held, self._read_picture, held)) is not None:
                return ready
        return None

    def _run(
        self,
        ready: _Ready,
        look_ahead: Callable[[], object],
        writing: Future[object] | None,
        behind: ThreadPoolExecutor,
    ) -> Future[object] | None:
        """Upscale, and begin to write the result once the one before it is written; return what waits for that."""
        upscaled = self._stage(ready.held, self._upscale, ready, look_ahead)
        wait_for(writing)
        return None if upscaled is None else behind.submit(self._write, upscaled)

    def _stage(self, held: Held, act: Callable[[*Arguments], Value | None], *arguments: *Arguments) -> Value | None:
        """Carry an attempt a stage further; None when it has ended by that, well or badly."""
        try:
            result = self._carry(held, act, *arguments)
        except BaseException as error:
            # Whatever it is, the job must not stay with a worker that has forgotten it.
            self._discard_draft(held)
            self._lease.abandon(held)
            if not isinstance(error, Exception):
                raise
            bug = not isinstance(error, DatabaseUnavailable)
            attempt = held.attempt
            logger.warning("job %s attempt %d: left behind, %s", attempt.job_id, attempt.number, error, exc_info=bug)
            return None
        if result is None:
            self._discard_draft(held)
            self._lease.release(held)
        return result

    def _discard_draft(self, held: Held) -> None:
        if (draft := self._drafts.pop(held, None)) is not None:
            draft.close()

    def _carry(self, held: Held, act: Callable[[*Arguments], Value | None], *arguments: *Arguments) -> Value | None:
        """Run `act` for an attempt, and end the attempt by what it raises."""
        attempt = held.attempt
        try:
            return act(*arguments)
        except LeaseLost as error:
            logger.info("job %s attempt %d: dropped, %s", attempt.job_id, attempt.number, error)
            return None
        except Stopped as error:
            self._portal.call(self._parts.endings.hand_back, attempt, None, str(error))
            return None
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
        if isinstance(failure, TransientError) and not (isinstance(failure, OutOfMemory) and _is_reduced(attempt)):
            self._portal.call(self._parts.endings.hand_back, attempt, failure, f"{failure.code}: {failure}")
        else:
            self._portal.call(self._parts.endings.fail, attempt, failure)
        return None

    def _read_picture(self, held: Held) -> _Ready:
        claimed_at = time.monotonic()
        options = UpscaleOptions.model_validate(held.attempt.options)
        if options.safety_check is SafetyCheck.REQUIRED and self._safety_checker is None:
            raise SafetyCheckUnavailable("A safety check is asked for, and this deployment has no classifier for it.")
        engine = self._engines.choose(options)
        source = self._portal.call(self._read, held.attempt)

        def approve(header: Header) -> None:
            check_output(header.width, header.height, options, self._limits.pixels)
            size = output_size(header.width, header.height, options.scale_factor)
            needed = engine.peak_bytes(Size(width=header.width, height=header.height), options, alpha=header.alpha)
            needed += encoding.peak_bytes(size, options.output_format, alpha=header.alpha)
            check_memory(size, needed, self._limits.memory_bytes)

        with held.watched():
            picture = self._decoder.decode(source, self._limits, approve)
        return _Ready(held, options, engine, picture, claimed_at)

    def _upscale(self, ready: _Ready, look_ahead: Callable[[], object]) -> _Upscaled:
        held, options, picture = ready.held, ready.options, ready.picture
        if self._lease.draining or held.should_stop():
            raise Stopped("The worker is about to end, or the job is unwanted.")  # another worker begins it sooner
        size = output_size(picture.width, picture.height, options.scale_factor)
        draft = self._drafts[held] = Draft()
        with held.watched():
            report = self._reports.follow(held, look_ahead)
            strips = ready.engine.upscale(picture, options, report, held.should_stop)
            # The encoder asks, too, as it gets on: when the engine is done a large WebP has yet to be begun.
            saving = encoding.encode(
                strips, size, options.output_format, options.output_quality, draft.file, held.should_stop
            )
            held.move()
            if options.safety_check is not SafetyCheck.OFF and self._safety_checker is not None:
                saving.result()
                self._check_safety(self._safety_checker, held, draft)
        began, self._free_at = max(ready.claimed_at, self._free_at), time.monotonic()
        self._lease.learn(held.attempt.cost, self._free_at - began)
        return _Upscaled(held, options, ready.engine.name, size, draft, saving, ready.claimed_at, ready.alone)

    @staticmethod
    def _check_safety(checker: SafetyChecker, held: Held, draft: Draft) -> None:
        with draft.open() as file:
            seen = encoding.thumbnail(file, GLANCE_PIXELS)
        held.move()
        if checker.flags(seen):
            raise ContentFlagged("The safety check found sexual content in the upscaled picture.")

    def _write(self, upscaled: _Upscaled) -> None:
        stored = self._stage(upscaled.held, self._store, upscaled)
        if stored is not None and (stored.held.attempt.upload_url is None or upscaled.alone):
            self._stage(stored.held, self._complete, stored)
        elif stored is not None:
            self._sideline.begin(stored.held, partial(self._complete_aside, stored))

    def _store(self, upscaled: _Upscaled) -> _Stored:
        held, options, draft = upscaled.held, upscaled.options, upscaled.draft
        with held.watched():
            upscaled.saving.result()
        with draft.open() as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        result = Result(
            engine=upscaled.engine,
            format=options.output_format,
            width=upscaled.size.width,
            height=upscaled.size.height,
            size_bytes=draft.size_bytes,
            sha256=sha256,
            seed=options.seed,
        )
        key = self._portal.call(self._parts.endings.store, held.attempt, draft, result.format)
        return _Stored(held, draft, result, key, upscaled.claimed_at)

    def _complete_aside(self, stored: _Stored) -> None:
        self._stage(stored.held, self._complete, stored)
        # It may have held the last place of its key, and this worker may have found nothing to do because of that.
        self._portal.call(self._parts.endings.send_hint)

    def _complete(self, stored: _Stored) -> None:
        attempt, result = stored.held.attempt, stored.result
        failure = self._portal.call(self._parts.endings.complete, stored.held, stored.draft, result, stored.key)
        logger.info(
            "job %s attempt %d: %s, %dx%d by %s in %.2f s",
            *(attempt.job_id, attempt.number, failure or "completed", result.width, result.height, result.engine),
            time.monotonic() - stored.claimed_at,
        )

    async def _read(self, attempt: Attempt) -> bytes:
        if attempt.image_url is not None:
            settings = self._settings
            return await self._parts.outbound.fetch(
                attempt.image_url, settings.max_input_bytes, settings.fetch_timeout_seconds
            )
        assert attempt.image_key is not None  # the schema holds exactly one of the two
        # A result of ours may be larger than anything that callers may send.
        limit = self._settings.max_input_bytes if is_upload(attempt.image_key) else None
        try:
            return await self._parts.storage.read(attempt.image_key, limit)
        except NotFound as error:
            raise InputFetchFailed("The uploaded image is gone.") from error


def _is_reduced(attempt: Attempt) -> bool:
    return bool(attempt.options.get("small_tiles"))
