"""What goes wrong: each fault is injected, held for a while, and undone."""

import asyncio
import os
import random
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import asyncpg
import psutil

from tests.broker import connect_redis
from tests.chaos.receivers import MOODS, Receiver
from tests.chaos.stack import LEASE_SECONDS, House

INSTANT = (0.0, 0.0)


@dataclass(frozen=True)
class Scene:
    """All that faults can be injected into."""

    house: House
    receivers: list[Receiver]


class Fault(Protocol):
    """A fault that is injected once; it draws its victim from its own dice."""

    name: str
    target: str
    """Faults of one target are not injected at the same time, unless they are over at once."""
    hold: tuple[float, float]
    """For how many seconds it lasts, at least and at most."""

    async def inject(self, scene: Scene, dice: random.Random) -> None: ...

    async def undo(self, scene: Scene) -> None: ...


class Signalled:
    """One process, or every process of its kind, gets a signal."""

    target = ""
    hold = INSTANT

    def __init__(self, name: str, command: str, number: signal.Signals, *, every: bool = False) -> None:
        self.name = name
        self._command = command
        self._number = number
        self._every = every

    async def inject(self, scene: Scene, dice: random.Random) -> None:
        names = scene.house.names(self._command)
        for name in names if self._every else [dice.choice(names)]:
            scene.house.process(name).send_signal(self._number)

    async def undo(self, scene: Scene) -> None:
        pass


class Frozen:
    """One process is stopped, and then goes on as if nothing had happened."""

    target = ""

    def __init__(self, name: str, command: str, hold: tuple[float, float]) -> None:
        self.name = name
        self.hold = hold
        self._command = command

    async def inject(self, scene: Scene, dice: random.Random) -> None:
        self._process = scene.house.process(dice.choice(scene.house.names(self._command)))
        scene.house.frozen.add(self._process.pid)
        self._process.send_signal(signal.SIGSTOP)

    async def undo(self, scene: Scene) -> None:
        self._process.send_signal(signal.SIGCONT)
        scene.house.frozen.discard(self._process.pid)


class RedisFlushed:
    name = "Redis: FLUSHALL"
    target = "redis"
    hold = INSTANT

    async def inject(self, scene: Scene, dice: random.Random) -> None:
        with connect_redis(scene.house.stack.settings.redis_url) as client:
            client.execute_command("FLUSHALL")

    async def undo(self, scene: Scene) -> None:
        pass


class RedisKilled:
    name = "Redis: killed, away, started empty"
    target = "redis"
    hold = (0.2, 4.0)

    async def inject(self, scene: Scene, dice: random.Random) -> None:
        pid = scene.house.redis.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    async def undo(self, scene: Scene) -> None:
        # In this thread, the main one, so that it ends with us.
        scene.house.redis.start()


class RedisFrozen:
    name = "Redis: frozen"
    target = "redis"
    hold = (1.0, 7.0)

    async def inject(self, scene: Scene, dice: random.Random) -> None:
        self._signal(scene, signal.SIGSTOP)

    async def undo(self, scene: Scene) -> None:
        self._signal(scene, signal.SIGCONT)

    def _signal(self, scene: Scene, number: signal.Signals) -> None:
        pid = scene.house.redis.pid
        assert pid is not None
        os.kill(pid, number)


class PostgresRestarted:
    """Stopped, away for a while, and started; `how` is what it is stopped with."""

    target = "postgres"
    hold = (0.0, 3.0)

    def __init__(self, name: str, how: signal.Signals) -> None:
        self.name = name
        self._how = how

    async def inject(self, scene: Scene, dice: random.Random) -> None:
        server = _server(scene)
        server.send_signal(self._how)
        await asyncio.to_thread(psutil.wait_procs, [server], 30)

    async def undo(self, scene: Scene) -> None:
        await asyncio.to_thread(scene.house.postgres.start)


class PostgresFrozen:
    name = "Postgres: frozen"
    target = "postgres"
    hold = (0.5, 2.5)

    async def inject(self, scene: Scene, dice: random.Random) -> None:
        server = _server(scene)
        self._frozen = [server, *server.children()]
        self._signal(signal.SIGSTOP)

    async def undo(self, scene: Scene) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._frozen:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


class BackendsTerminated:
    """Every connection to Postgres is cut, again and again."""

    name = "Postgres: pg_terminate_backend storm"
    target = "postgres"
    hold = (0.0, 2.0)

    async def inject(self, scene: Scene, dice: random.Random) -> None:
        connection = await asyncpg.connect(scene.house.postgres.url())
        await self._cut(connection)
        self._storm = asyncio.create_task(self._go_on(connection))

    async def undo(self, scene: Scene) -> None:
        self._storm.cancel()
        with suppress(asyncio.CancelledError):
            await self._storm

    async def _go_on(self, connection: asyncpg.Connection) -> None:
        try:
            while True:
                await asyncio.sleep(0.1)
                await self._cut(connection)
        finally:
            await connection.close()

    async def _cut(self, connection: asyncpg.Connection) -> None:
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'upscaled'"
        )


class LineCut:
    """Every connection to Postgres is reset; before that, for a while, its answers were lost.

    What was asked of it is done all the same: a claim nobody knows of, an end that has to be said twice.
    """

    target = "postgres"

    def __init__(self, name: str, hold: tuple[float, float]) -> None:
        self.name = name
        self.hold = hold

    async def inject(self, scene: Scene, dice: random.Random) -> None:
        if self.hold == INSTANT:
            scene.house.line.cut_all()
        else:
            scene.house.line.loses_answers = True

    async def undo(self, scene: Scene) -> None:
        if scene.house.line.loses_answers:
            scene.house.line.loses_answers = False
            scene.house.line.cut_all()


class StorageAway:
    """A folder of the storage is a file for a while: whatever is read or written there fails, for root too.

    The folder itself is a link from the beginning, so that it goes and comes back at once and nothing falls between.
    """

    target = "storage"
    hold = (0.3, 2.5)

    def __init__(self, part: str) -> None:
        self.name = f"Storage: {part} away"
        self._part = part

    async def inject(self, scene: Scene, dice: random.Random) -> None:
        self._replace(scene, lambda path: path.write_bytes(b""))

    async def undo(self, scene: Scene) -> None:
        self._replace(scene, lambda path: path.symlink_to(_kept(scene.house, self._part), target_is_directory=True))

    def _replace(self, scene: Scene, make: Callable[[Path], object]) -> None:
        folder = scene.house.stack.settings.storage_dir
        make(folder / f"{self._part}.next")
        (folder / f"{self._part}.next").replace(folder / self._part)


def _server(scene: Scene) -> psutil.Process:
    pid = scene.house.postgres.pid
    assert pid is not None
    return psutil.Process(pid)


def lay_out_storage(house: House) -> None:
    """Make the storage's folders links, which StorageAway needs; before anything is written."""
    folder = house.stack.settings.storage_dir
    folder.mkdir(exist_ok=True)
    for part in ("results", "uploads"):
        _kept(house, part).mkdir(parents=True)
        (folder / part).symlink_to(_kept(house, part), target_is_directory=True)


def _kept(house: House, part: str) -> Path:
    return house.stack.folder / "objects" / part


class ReceiverMisbehaves:
    hold = (1.0, 3.0)

    def __init__(self, mood: str) -> None:
        self.name = f"Receiver: {mood}"
        self.target = f"receiver {mood}"
        self._mood = mood

    async def inject(self, scene: Scene, dice: random.Random) -> None:
        # Each mood has a receiver of its own, whose breaker then opens for one fault at a time.
        self._receiver = scene.receivers[MOODS.index(self._mood) % len(scene.receivers)]
        await self._receiver.misbehave(self._mood)

    async def undo(self, scene: Scene) -> None:
        await self._receiver.recover()


MAKERS: tuple[Callable[[], Fault], ...] = (
    lambda: Signalled("Worker: SIGKILL", "worker", signal.SIGKILL),
    lambda: Signalled("Worker: SIGTERM", "worker", signal.SIGTERM),
    lambda: Signalled("Worker: all SIGKILL", "worker", signal.SIGKILL, every=True),
    lambda: Frozen("Worker: frozen, within its lease", "worker", (0.3, LEASE_SECONDS / 2)),
    lambda: Frozen("Worker: frozen, past its lease", "worker", (LEASE_SECONDS + 0.3, LEASE_SECONDS + 3)),
    lambda: Signalled("API: SIGKILL", "api", signal.SIGKILL),
    lambda: Signalled("API: SIGTERM", "api", signal.SIGTERM),
    lambda: Signalled("Dispatcher: SIGKILL", "dispatcher", signal.SIGKILL),
    lambda: Signalled("Dispatcher: all SIGKILL", "dispatcher", signal.SIGKILL, every=True),
    lambda: Frozen("Dispatcher: frozen", "dispatcher", (1.0, LEASE_SECONDS + 2)),
    RedisFlushed,
    RedisKilled,
    RedisFrozen,
    lambda: PostgresRestarted("Postgres: restarted", signal.SIGINT),
    lambda: PostgresRestarted("Postgres: crashed", signal.SIGQUIT),
    PostgresFrozen,
    BackendsTerminated,
    lambda: LineCut("Postgres: connections reset", INSTANT),
    lambda: LineCut("Postgres: answers lost, then reset", (0.05, 1.0)),
    lambda: StorageAway("results"),
    lambda: StorageAway("uploads"),
    *((lambda mood=mood: ReceiverMisbehaves(mood)) for mood in MOODS),
)
