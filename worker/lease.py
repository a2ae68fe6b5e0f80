"""The worker's lease: it registers, beats beside the work, and tells a running attempt when to stop."""

import faulthandler
import logging
import sys
import threading
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from uuid import UUID, uuid4

import anyio
from redis.asyncio import Redis

from core import notices
from core.errors import DatabaseUnavailable
from core.settings import Settings
from db import workers
from db.jobs import Attempt
from db.session import Database

REARM_SECONDS = 1.0
"""How often the watchdog is set back at most; each time costs a system thread."""

LEARNING_RATE = 0.2
"""How much of the latest job goes into the estimate of the worker's speed."""

logger = logging.getLogger(__name__)


class Watchdog:
    """Ends the process when something that was begun makes no step for too long.

    A computation that hangs can be ended by nothing less. The lease runs out then, and the job goes elsewhere with a
    strike. The timer is not a Python thread, so not even a call that never gives back the interpreter's lock can hold
    it up; there is one of it in a process, set to whatever is due first.
    """

    def __init__(self, stall_seconds: float) -> None:
        self._stall_seconds = stall_seconds
        self._due_at: dict[object, float] = {}
        self._lock = threading.Lock()

    def expect(self, who: object) -> None:
        """Begin to wait for a step of `who`, anew if need be."""
        with self._lock:
            self._due_at[who] = time.monotonic() + self._stall_seconds
            self._set()

    def step(self, who: object) -> None:
        """Note that `who`, if waited for, has got on."""
        now = time.monotonic()
        with self._lock:
            due_at = self._due_at.get(who)
            if due_at is not None and now + self._stall_seconds - due_at >= REARM_SECONDS:
                self._due_at[who] = now + self._stall_seconds
                self._set()

    def forget(self, who: object) -> None:
        """Wait for `who` no longer."""
        with self._lock:
            self._due_at.pop(who, None)
            self._set()

    def _set(self) -> None:
        if not self._due_at:
            faulthandler.cancel_dump_traceback_later()
            return
        assert sys.__stderr__ is not None
        left = max(min(self._due_at.values()) - time.monotonic(), 0.001)
        faulthandler.dump_traceback_later(left, exit=True, file=sys.__stderr__)


class Held:
    """An attempt that this worker runs. The threads that work on it ask it, the event loop tells it."""

    def __init__(self, attempt: Attempt, lease: "Lease", watchdog: Watchdog) -> None:
        self.attempt = attempt
        self._lease = lease
        self._watchdog = watchdog
        self._stop = threading.Event()

    def stop(self) -> None:
        """Ask the engine to give up at its next step."""
        self._stop.set()

    def should_stop(self) -> bool:
        """Tell the engine whether to give up: by a cancel, a deadline, a lost lease, or a drain that took too long."""
        self.move()
        return self._stop.is_set() or self._lease.drained

    def move(self) -> None:
        """Say that the work got a step further."""
        self._watchdog.step(self)

    @contextmanager
    def watched(self) -> Generator[None]:
        """Let the watchdog wait for the attempt's steps."""
        self._watchdog.expect(self)
        try:
            yield
        finally:
            self._watchdog.forget(self)


class Lease:
    """What keeps a worker's jobs its own; lives in the worker's event loop."""

    def __init__(self, settings: Settings, database: Database, redis: Redis, name: str, engine: str) -> None:
        self.id = uuid4()
        self.name = name
        self._settings = settings
        self._database = database
        self._redis = redis
        self._engine = engine
        self._registered: UUID | None = None
        self._changing = anyio.Lock()
        """Held by whoever registers or claims: a job that is claimed under one id must be known before the next one."""
        self._held: set[Held] = set()
        self._watchdog = Watchdog(settings.stall_seconds)
        self._seconds_per_cost: float | None = None
        self._drain_until: float | None = None

    @property
    def draining(self) -> bool:
        """Whether the process was told to end."""
        return self._drain_until is not None

    @property
    def drained(self) -> bool:
        """Whether the process was told to end and has no time left for its job."""
        return self._drain_until is not None and time.monotonic() >= self._drain_until

    def drain(self) -> None:
        """Begin to end: the job that runs may go on for a while."""
        if not self.draining:
            self._drain_until = time.monotonic() + self._settings.drain_seconds

    @property
    def held(self) -> Sequence[Held]:
        """The attempts that are watched over."""
        return list(self._held)

    def hold(self, attempt: Attempt) -> Held:
        """Watch over an attempt until it is released; a worker may hold several."""
        held = Held(attempt, self, self._watchdog)
        self._held.add(held)
        return held

    def release(self, held: Held) -> None:
        """Watch over an attempt no longer: it has ended."""
        self._held.discard(held)

    def abandon(self, *lost: Held) -> None:
        """Give up attempts that could not be ended: the worker registers anew without them, and they fall to others."""
        if lost:
            self._held.difference_update(lost)
            self.forsake()

    def learn(self, cost: float, seconds: float) -> None:
        """Take the time that a finished job took into the estimate that beats carry."""
        latest = seconds / cost
        before = self._seconds_per_cost
        self._seconds_per_cost = latest if before is None else before + LEARNING_RATE * (latest - before)

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[None]:
        """Beat inside the block; leave the register in the end."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._beat_for_ever)
            try:
                yield
            finally:
                tasks.cancel_scope.cancel()
                with anyio.CancelScope(shield=True):
                    await self._unregister()

    def forsake(self) -> None:
        """Let the present registration run out, and with it whatever it may hold unknown to us.

        That is where a claim leads whose answer was lost. What is known to be held goes along to the next registration.
        """
        self.id = uuid4()

    @asynccontextmanager
    async def registered(self) -> AsyncGenerator[UUID]:
        """Make sure that the worker is known, and lend its id for a claim; each time it registers it is another worker.

        What is claimed inside the block must be held there.
        """
        async with self._changing:
            worker_id = self.id
            if self._registered != worker_id:
                attempts = [held.attempt for held in self.held]
                async with self._database.connection() as connection:
                    await workers.register(connection, worker_id, self.name, self._engine, attempts)
                self._registered = worker_id
            yield worker_id

    async def _unregister(self) -> None:
        if self._registered is None:
            return
        try:
            async with self._database.connection() as connection:
                await workers.unregister(connection, self._registered)
        except DatabaseUnavailable as error:
            logger.warning("not unregistered, the sweep will notice: %s", error)

    async def _beat_for_ever(self) -> None:
        """Beat every few seconds, and at once when asked to: whoever cancels a job asks."""
        while True:
            try:
                if self._registered != self.id:
                    async with self.registered():
                        pass
                worker_id = self.id
                async with notices.listening(self._redis, notices.worker_channel(worker_id)) as heard:
                    while worker_id == self.id == self._registered:
                        await self.beat()
                        await heard.wait(self._settings.beat_seconds)
            except DatabaseUnavailable as error:
                logger.warning("beat missed: %s", error)
                await anyio.sleep(min(1.0, self._settings.beat_seconds))
            except Exception:
                # A bug that ended this task would end the tasks around it, and leave a worker that takes jobs and runs
                # none. Missed beats are what the lease is for.
                logger.exception("bug while beating")
                await anyio.sleep(min(1.0, self._settings.beat_seconds))

    async def beat(self) -> None:
        """Say that the worker lives; stop those of its attempts that are lost or unwanted."""
        holding, worker_id = self.held, self.id
        attempts = [held.attempt for held in holding]
        async with self._database.connection() as connection:
            heard = await workers.beat(connection, worker_id, self._seconds_per_cost, attempts)
        if not heard.registered and worker_id == self.id:
            logger.warning("presumed dead by others: registering again")
            self.forsake()
        for held, fate in zip(holding, heard.fates, strict=True):
            if fate.unwanted or not fate.owns:
                held.stop()
