"""One run: the house, its clients, the faults, the gate."""

import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil

from cli.keys import create_key
from db.keys import Limits
from tests.chaos.clients import Client, Ledger, open_http
from tests.chaos.driver import Driver, Injected, draw_plan
from tests.chaos.faults import Scene, lay_out_storage
from tests.chaos.gate import Gate, Verdict
from tests.chaos.receivers import MOODS, open_receivers
from tests.chaos.stack import House, open_house

CLIENTS = {"first": 12, "narrow": 2}
"""How many clients use each API key."""

FICKLE_CLIENTS = 3
"""How many more do nothing but cancel."""

NARROW = Limits(max_concurrent=1, max_queued=4)
"""What the key of that name may do: so there are 429s, and places that are taken and freed."""

LAST_SUBMITS_SECONDS = 60.0
"""How long clients may take, after the faults, to bring to its end what they have begun."""

_EXPECTED_EXITS = {"api": {0, -9, -15}, "dispatcher": {0, -9, -15}, "worker": {0, -9, -15, 1}}
"""By command; a worker's watchdog ends it with 1."""


@dataclass(frozen=True)
class Outcome:
    """All that a run has to tell."""

    seed: int
    seconds: float
    jobs: int
    webhooks: int
    progress: int
    answers: Counter[str]
    exits: Counter[tuple[str, int]]
    woken: int
    injected: list[Injected]
    verdict: Verdict


def run(
    seed: int, seconds: float, folder: Path, *, apart: bool = False, say: Callable[[str], None] = lambda _: None
) -> Outcome:
    """Run the service for so many seconds under the faults that the seed draws, then judge it.

    `apart` injects the same faults one by one, each when the service has recovered from the one before, and leaves out
    the jobs that take workers with them: for the time that each recovery takes.

    From the main thread only: to the kernel, the thread that starts a process is its parent.
    """
    with open_house(folder) as house:
        lay_out_storage(house)
        names = {"first": house.stack.key}
        names["narrow"] = asyncio.run(create_key(house.stack.settings, "narrow", NARROW))
        names["probe"] = asyncio.run(create_key(house.stack.settings, "probe", Limits(weight=100)))
        outcome = asyncio.run(_run(house, names, seed, seconds, apart, say))
    outcome.verdict.complaints += _bugs(folder / "logs")
    leaked = [pid for pid in house.pids if psutil.pid_exists(pid)]
    if leaked:
        outcome.verdict.complaints.append(f"processes {leaked} outlived the service")
    return outcome


def _bugs(logs: Path) -> list[str]:
    """Return what the processes logged as errors of their own, each with the last line of its traceback."""
    entry = re.compile(r"^\S+Z ERROR (?!celery\.)(.*(?:\n(?!\d{4}-).*)*)", re.MULTILINE)
    return [
        f"{file.name} met a bug: {' … '.join(dict.fromkeys(found.splitlines()[:: max(1, found.count(chr(10)))]))}"
        for file in sorted(logs.glob("*.log"))
        for found in entry.findall(file.read_text(errors="replace"))
    ]


async def _run(
    house: House, keys: Mapping[str, str], seed: int, seconds: float, apart: bool, say: Callable[[str], None]
) -> Outcome:
    dice, ledger = random.Random(seed), Ledger()  # noqa: S311 - no secret
    secrets = {name: await _secret(house, key) for name, key in keys.items()}
    async with open_http() as http, open_receivers(len(MOODS) + 1, secrets) as (received, receivers):

        def client(name: str) -> Client:
            return Client(http, house.apis, name, keys[name], ledger, random.Random(dice.getrandbits(32)))  # noqa: S311

        driver = Driver(Scene(house, receivers), client("probe"))
        async with _supervised(house):
            stop = asyncio.Event()
            lives = [client(name).live(receivers, stop) for name, count in CLIENTS.items() for _ in range(count)]
            lives += [client("first").live_fickly(receivers, stop) for _ in range(FICKLE_CLIENTS)]
            if not apart:
                lives.append(client("first").live_dangerously(receivers, stop))
            clients = [asyncio.create_task(life) for life in lives]
            await asyncio.sleep(1)
            say(f"{len(clients)} clients are at work, the faults begin")
            began = time.monotonic()
            await driver.carry_out(draw_plan(seed, seconds), apart=apart)
            say(f"{len(driver.injected)} faults in {time.monotonic() - began:.0f} s, coming to rest")
            stop.set()
            await _end_clients(clients, ledger)
            verdict = await Gate(house, ledger, received).judge()
        for (command, status), count in house.exits.items():
            if status not in _EXPECTED_EXITS[command]:
                verdict.complaints.append(f"{command} ended by itself with status {status}, {count} times")
        verdict.complaints += driver.complaints
        jobs = len(ledger.accepted)
        posts, progress = received.posts, received.progress
        return Outcome(
            seed, seconds, jobs, posts, progress, ledger.answers, house.exits, house.woken, driver.injected, verdict
        )


async def _end_clients(clients: list[asyncio.Task[None]], ledger: Ledger) -> None:
    done, left = await asyncio.wait(clients, timeout=LAST_SUBMITS_SECONDS)
    for task in done:
        if (error := task.exception()) is not None:
            ledger.complaints.append(f"a client gave up: {error!r}")
    for task in left:
        ledger.complaints.append(f"a client was not done {LAST_SUBMITS_SECONDS:g} seconds after the faults")
        task.cancel()


@asynccontextmanager
async def _supervised(house: House) -> AsyncGenerator[None]:
    task = asyncio.create_task(house.supervise())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _secret(house: House, key: str) -> str:
    async with (
        aiohttp.ClientSession() as http,
        http.get(f"{house.apis[0]}/v2/webhooks/secret", headers={"X-API-Key": key}) as response,
    ):
        response.raise_for_status()
        return (await response.json())["secret"]
