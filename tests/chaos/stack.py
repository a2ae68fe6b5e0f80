"""The service under test: the embedded stack with several of each process, and a supervisor as Kubernetes would be."""

import asyncio
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cli.embedded import Postgres, Redis
from cli.processes import LOOPBACK, free_port
from cli.stack import Stack
from tests.chaos import engine
from tests.chaos.proxy import Proxy, open_proxy

WORKERS = 4
LEASE_SECONDS = 3.0
SWEEP_SECONDS = 0.5
STALL_SECONDS = 5.0
MAX_STRIKES = 6

_LOOK_SECONDS = 0.1

SLEEP_SECONDS = LEASE_SECONDS + 0.8
"""After this, workers that stopped themselves are woken: their jobs run elsewhere by then."""

_ENVIRONMENT = {
    "UPSCALED_ENGINE": "tests.chaos.engine:Moody",
    "UPSCALED_LEASE_SECONDS": str(LEASE_SECONDS),
    "UPSCALED_SWEEP_SECONDS": str(SWEEP_SECONDS),
    "UPSCALED_DRAIN_SECONDS": "1",
    "UPSCALED_STALL_SECONDS": str(STALL_SECONDS),
    "UPSCALED_MAX_STRIKES": str(MAX_STRIKES),
    "UPSCALED_WEBHOOK_TIMEOUT_SECONDS": "1",
    "UPSCALED_RETRY_SECONDS": "1",
    "UPSCALED_WEBHOOK_RETRY_SECONDS": ",".join(["0.5", "0.5", "1", "1", *["2"] * 16]),
    "UPSCALED_OUTBOUND_ALLOW": "127.0.0.0/8",
    "UPSCALED_LOG_LEVEL": "INFO",
}


@dataclass
class House:
    """The stack, its second API, and what was seen of its processes."""

    stack: Stack
    postgres: Postgres
    redis: Redis
    line: Proxy
    """Between our processes and Postgres."""
    apis: tuple[str, ...]
    """Addresses of the APIs."""
    commands: dict[str, tuple[str, ...]]
    """What starts each process again, by its name."""
    pids: set[int] = field(default_factory=set[int])
    """Of every process that there ever was."""
    exits: Counter[tuple[str, int]] = field(default_factory=Counter[tuple[str, int]])
    """How often a command ended with a status."""
    frozen: set[int] = field(default_factory=set[int])
    """The processes that a fault has stopped, and will wake."""
    woken: int = 0
    """How often a worker was woken that had stopped itself."""

    def names(self, command: str) -> list[str]:
        return sorted(name for name, words in self.commands.items() if words[0] == command)

    def process(self, name: str) -> subprocess.Popen[bytes]:
        return self.stack.processes[name]

    def start_all(self) -> None:
        """Start what the stack itself has not started."""
        for name, words in self.commands.items():
            if name not in self.stack.processes:
                self.stack.start(name, *words)
        self.pids |= {process.pid for process in self.stack.processes.values()}

    async def supervise(self) -> None:
        """Start again whatever ends, and wake what sleeps, until cancelled.

        In the main thread: with its thread a process would end, too.
        """
        asleep_since: dict[int, float] = {}
        while True:
            asleep = {process.pid for process in self.stack.processes.values() if _sleeps(process)} - self.frozen
            asleep_since = {pid: asleep_since.get(pid, time.monotonic()) for pid in asleep}
            for pid in [pid for pid, since in asleep_since.items() if time.monotonic() - since > SLEEP_SECONDS]:
                psutil.Process(pid).send_signal(signal.SIGCONT)
                self.woken += 1
            for name, words in self.commands.items():
                status = self.process(name).poll()
                if status is not None:
                    self.exits[words[0], status] += 1
                    self.stack.start(name, *words)
                    self.pids.add(self.process(name).pid)
            await asyncio.sleep(_LOOK_SECONDS)

    def wake_all(self) -> None:
        """Let whatever was stopped go on, so that it can be told to end."""
        for process in self.stack.processes.values():
            process.send_signal(signal.SIGCONT)


def _sleeps(process: subprocess.Popen[bytes]) -> bool:
    try:
        return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


@contextmanager
def open_house(folder: Path) -> Generator[House]:
    """Run everything on loopback, with its data and logs under `folder`."""
    logs, marks = folder / "logs", folder / "marks"
    logs.mkdir(parents=True)
    marks.mkdir()
    ports = free_port(), free_port()
    commands = {
        "api": ("api", "--host", LOOPBACK, "--port", str(ports[0])),
        "api-2": ("api", "--host", LOOPBACK, "--port", str(ports[1])),
        "dispatcher": ("dispatcher",),
        "dispatcher-2": ("dispatcher",),
        **{f"worker-{number}": ("worker",) for number in range(1, WORKERS + 1)},
    }
    with ExitStack() as started:
        postgres = started.enter_context(Postgres(folder / "postgres"))
        redis = started.enter_context(Redis(folder / "redis"))
        line = started.enter_context(open_proxy(postgres.port))
        environ = {
            **os.environ,
            **_ENVIRONMENT,
            engine.MARKS: str(marks),
            # Without TLS: a server that goes away while asyncpg asks it for that leaves an exception that nobody takes.
            "UPSCALED_DATABASE_URL": postgres.url().replace(f":{postgres.port}/", f":{line.port}/") + "?ssl=disable",
            "UPSCALED_REDIS_URL": redis.url,
        }
        stack = started.enter_context(Stack(folder / "data", port=ports[0], workers=0, logs=logs, environ=environ))
        apis = tuple(f"http://{LOOPBACK}:{port}" for port in ports)
        house = House(stack, postgres, redis, line, apis, commands)
        house.start_all()
        try:
            yield house
        finally:
            house.wake_all()
