"""Waiting for jobs to change, without asking the database all the time.

The row is the truth and a notice only wakes: whoever waits reads the row again. So notices may be lost, repeated or
late, and Redis may be away; then whoever waits reads again after a pause, and what that costs is latency.
"""

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar
from uuid import UUID

import anyio
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from starlette.requests import Request

from core.errors import DatabaseUnavailable
from core.notices import job_channel

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 5.0
"""How long nobody looks when nothing is announced; the pauses grow from the first to the longest."""
LONGEST_BLIND_PAUSE_SECONDS = 2.0
"""The same while announcements cannot be heard."""
PAUSE_GROWTH = 1.5

RECONNECT_SECONDS = 0.5
PING_SECONDS = 5.0
SILENCE_SECONDS = 12.0
"""A connection on which not even a ping was answered for so long is dead, whatever the kernel thinks of it."""

Seen = TypeVar("Seen")

logger = logging.getLogger(__name__)


class Changes:
    """One waiter's view of one job: a way to sleep until it may have changed."""

    def __init__(self, watch: "Watch") -> None:
        self._watch = watch
        self._woken = anyio.Event()
        self._pause = FIRST_PAUSE_SECONDS

    async def wait(self, until: float) -> bool:
        """Return True when it is time to look at the job again, which need not have changed.

        That is at `until`, a time of anyio.current_time(), at the latest; after that, and in a process that is about
        to end, return False at once.
        """
        left = until - anyio.current_time()
        if left <= 0 or self._watch.closed:
            return False
        longest = LONGEST_PAUSE_SECONDS if self._watch.listening else LONGEST_BLIND_PAUSE_SECONDS
        with anyio.move_on_after(min(left, self._pause, longest)):
            await self._woken.wait()
        self._pause = FIRST_PAUSE_SECONDS if self._woken.is_set() else min(self._pause * PAUSE_GROWTH, longest)
        self._woken = anyio.Event()
        return True

    def wake(self) -> None:
        self._woken.set()


class Watch:
    """Hears the notices of all jobs that somebody in this process waits for, over one connection to Redis.

    Whoever waits never touches that connection: one task keeps Redis's list of channels equal to ours, another reads,
    and when either fails both begin anew with another connection.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._waiting: dict[str, set[Changes]] = {}
        self._stirred = anyio.Event()
        self._complained = False
        self.listening = False
        """Whether notices can be heard at the moment."""
        self.closed = False

    @property
    def waiting(self) -> int:
        """How many wait, whether held requests or streams."""
        return sum(map(len, self._waiting.values()))

    @contextmanager
    def changes(self, job_id: UUID) -> Generator[Changes]:
        """Wait for a job inside this `with`. Read the row after entering: so nothing is missed in between."""
        channel, changes = job_channel(job_id), Changes(self)
        if channel not in self._waiting:
            self._waiting[channel] = set()
            self._stirred.set()
        self._waiting[channel].add(changes)
        try:
            yield changes
        finally:
            self._waiting[channel].discard(changes)
            if not self._waiting[channel]:
                del self._waiting[channel]
                self._stirred.set()

    def close(self) -> None:
        """Send everyone who waits, or will, on their way: the process is about to end."""
        self.closed = True
        self._wake_all()

    async def run(self) -> None:
        """Listen until cancelled."""
        while True:
            try:
                await self._listen()
            # RuntimeError: redis-py connects anew by itself when a subscription cannot be sent, and finds the other
            # task reading from that connection already.
            except* (RedisError, OSError, RuntimeError) as errors:
                level = logging.DEBUG if self._complained else logging.WARNING
                logger.log(level, "notices cannot be heard, waiting takes longer: %s", errors.exceptions[0])
                self._complained = True
            except* Exception:
                # A bug here must cost latency only: the pauses go on without us.
                logger.exception("bug while listening for notices")
            await anyio.sleep(RECONNECT_SECONDS)

    async def _listen(self) -> None:
        pubsub: PubSub = self._redis.pubsub()  # pyright: ignore[reportUnknownMemberType]
        try:
            await pubsub.connect()
            self.listening = True
            if self._complained:
                logger.info("notices are heard again")
                self._complained = False
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._subscribe, pubsub)
                tasks.start_soon(self._hear, pubsub)
        finally:
            if self.listening:
                self.listening = False
                self._wake_all()
            with anyio.move_on_after(1, shield=True):
                await pubsub.aclose()

    async def _subscribe(self, pubsub: PubSub) -> None:
        subscribed: set[str] = set()
        while True:
            self._stirred = anyio.Event()
            wanted = set(self._waiting)
            if begun := wanted - subscribed:
                await pubsub.subscribe(*begun)
            if ended := subscribed - wanted:
                await pubsub.unsubscribe(*ended)  # pyright: ignore[reportUnknownMemberType]
            subscribed = wanted
            with anyio.move_on_after(PING_SECONDS) as idle:
                await self._stirred.wait()
            if idle.cancelled_caught:
                await pubsub.ping()  # pyright: ignore[reportUnknownMemberType]

    async def _hear(self, pubsub: PubSub) -> None:
        while True:
            # The timeout is given, or that of the client would hold: it is meant for commands.
            message: Any = await pubsub.get_message(timeout=SILENCE_SECONDS)  # pyright: ignore[reportUnknownVariableType]
            if message is None:
                raise RedisConnectionError(f"nothing was heard for {SILENCE_SECONDS:g} seconds")
            # A subscription that has begun wakes too: what was announced before, those who wait have not heard.
            if message["type"] in ("subscribe", "message"):
                for changes in self._waiting.get(message["channel"].decode(), ()):
                    changes.wake()

    def _wake_all(self) -> None:
        for waiting in self._waiting.values():
            for changes in waiting:
                changes.wake()


@asynccontextmanager
async def open_watch(redis: Redis) -> AsyncGenerator[Watch]:
    """Listen in the background for as long as this `async with` lasts."""
    watch = Watch(redis)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch.run)
        try:
            yield watch
        finally:
            watch.close()
            tasks.cancel_scope.cancel()


async def hold(
    watch: Watch, request: Request, job_id: UUID, seconds: float, look: Callable[[], Awaitable[tuple[Seen, bool]]]
) -> Seen:
    """Look at a job until that is enough, `seconds` have passed or the client has left; return what was seen last.

    `look` returns what it sees, and whether that is enough; what it raises the first time is raised.
    """
    if not seconds:
        return (await look())[0]
    with watch.changes(job_id) as changes:
        until = anyio.current_time() + seconds
        seen, enough = await look()
        while not enough and not await request.is_disconnected() and await changes.wait(until):
            with suppress(DatabaseUnavailable):  # it may be back before the time is up
                seen, enough = await look()
        return seen
