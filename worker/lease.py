"""The worker's lease: it registers, beats beside the work, and tells a running attempt when to stop."""

import faulthandler
import logging
import sys
import threading
import time
from collections.abc import AsyncGenerator, Generator
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


class Held:
    """An attempt that this worker runs. The engine's thread asks it, the event loop tells it."""

    def __init__(self, attempt: Attempt, lease: "Lease", stall_seconds: float) -> None:
        self.attempt = attempt
        self._lease = lease
        self._stall_seconds = stall_seconds
        self._stop = threading.Event()
        self._armed_at = 0.0

    def stop(self) -> None:
        """Ask the engine to give up at its next step."""
        self._stop.set()

    def should_stop(self) -> bool:
        """Tell the engine whether to give up: by a cancel, a deadline, a lost lease, or a drain that took too long."""
        self.move()
        return self._stop.is_set() or self._lease.drained

    def move(self) -> None:
        """Say that the engine got a step further."""
        if self._armed_at and time.monotonic() - self._armed_at >= REARM_SECONDS:
            self._arm()

    @contextmanager
    def watched(self) -> Generator[None]:
        """End the process when no step is done for too long: a computation that hangs can be ended by nothing less.

        The lease runs out then, and the job goes elsewhere with a strike. The timer is not a Python thread, so not even
        a call that never gives back the interpreter's lock can hold it up.
        """
        self._arm()
        try:
            yield
        finally:
            self._armed_at = 0.0
            faulthandler.cancel_dump_traceback_later()

    def _arm(self) -> None:
        self._armed_at = time.monotonic()
        assert sys.__stderr__ is not None
        faulthandler.dump_traceback_later(self._stall_seconds, exit=True, file=sys.__stderr__)


class Lease:
    """What keeps a worker's jobs its own; lives in the worker's event loop."""

    def __init__(self, settings: Settings, database: Database, redis: Redis, name: str, engine: str) -> None:
        self.id = uuid4()
        self.name = name
        self._settings = settings
        self._database = database
        self._redis = redis
        self._engine = engine
        self._registered = False
        self._registering = anyio.Lock()
        self._held: Held | None = None
        self._seconds_per_cost: float | None = None
        self._drain_until: float | None = None

    @property
    def drained(self) -> bool:
        """Whether the process was told to end and has no time left for its job."""
        return self._drain_until is not None and time.monotonic() >= self._drain_until

    def drain(self) -> None:
        """Begin to end: the job that runs may go on for a while."""
        if self._drain_until is None:
            self._drain_until = time.monotonic() + self._settings.drain_seconds

    @contextmanager
    def hold(self, attempt: Attempt) -> Generator[Held]:
        """Watch over an attempt while it runs."""
        self._held = Held(attempt, self, self._settings.stall_seconds)
        try:
            yield self._held
        finally:
            self._held = None

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
        """Let the present registration run out, and with it whatever it may still hold unknown to us.

        That is where a claim leads whose answer was lost, and a job that could not be ended.
        """
        self._registered = False

    async def register(self) -> None:
        """Make sure that the worker is known; each time it registers it is another worker."""
        async with self._registering:
            if self._registered:
                return
            worker_id: UUID = uuid4()
            async with self._database.connection() as connection:
                await workers.register(connection, worker_id, self.name, self._engine)
            self.id, self._registered = worker_id, True

    async def _unregister(self) -> None:
        try:
            async with self._database.connection() as connection:
                await workers.unregister(connection, self.id)
        except DatabaseUnavailable as error:
            logger.warning("not unregistered, the sweep will notice: %s", error)

    async def _beat_for_ever(self) -> None:
        """Beat every few seconds, and at once when asked to: whoever cancels a job asks."""
        while True:
            try:
                await self.register()
                channel = notices.worker_channel(self.id)
                async with notices.listening(self._redis, channel) as heard:
                    while self._registered and channel == notices.worker_channel(self.id):
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
        """Say that the worker lives; stop its attempt should it be lost or unwanted."""
        held, worker_id = self._held, self.id
        async with self._database.connection() as connection:
            known = await workers.beat(connection, worker_id, self._seconds_per_cost, held and held.attempt)
        if not known.registered and worker_id == self.id:
            logger.warning("presumed dead by others: registering again")
            self.forsake()
        if held is not None and (known.unwanted or not known.owns):
            held.stop()
