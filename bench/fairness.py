"""Does one key's flood delay the others? The waits of 20 small keys, before one greedy key drops 5,000 jobs and after.

    .venv/bin/python -m bench.fairness [--workers 4] [--load 0.65] [--seconds 40] [--flood 5000]

A wait is the time from when a job was recorded to when it was started, by the database's clock. Both phases run in one
stack, one after the other, under arrivals of the same rate: read their ratio.
"""

import argparse
import asyncio
import heapq
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import aiohttp
import asyncpg
from PIL import Image

from bench.engines import MEAN_SECONDS
from cli.keys import create_key
from cli.processes import free_port
from cli.stack import Stack

SMALL_KEYS = 20
FLOOD_CLIENTS = 8
"""How many requests of the greedy key are under way at a time."""


@dataclass(frozen=True)
class Waits:
    """The waits of the small keys' jobs in one phase, in seconds."""

    jobs: int
    p50: float
    p95: float
    longest: float

    def __str__(self) -> str:
        return f"{self.jobs} | {self.p50:.3f} | {self.p95:.3f} | {self.longest:.3f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--load", type=float, default=0.65, help="what the small keys ask for, of what workers can do")
    parser.add_argument("--seconds", type=float, default=40.0, help="for each phase")
    parser.add_argument("--flood", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    environ = {**os.environ, "UPSCALED_ENGINE": "bench.engines:Exponential", "UPSCALED_LOG_LEVEL": "WARNING"}
    with tempfile.TemporaryDirectory(prefix="upscaled-bench-") as folder:
        logs = Path(folder, "logs")
        logs.mkdir()
        port, workers = free_port(), arguments.workers
        with Stack(Path(folder, "data"), port=port, workers=workers, logs=logs, environ=environ) as stack:
            asyncio.run(_measure(stack, arguments))


def ideal_p95(workers: int, load: float, *, flood: bool = False) -> float:
    """Return the 95th percentile of the small keys' waits in a simulation of start-time fair queueing, in seconds."""
    chance, until = random.Random(1), 20_000.0  # noqa: S311 - arrivals, not secrets
    arrivals: list[tuple[float, int]] = [(0.0, 0)] * int(flood * until * workers / MEAN_SECONDS)
    at = 0.0
    while at < until:
        at += chance.expovariate(load * workers / MEAN_SECONDS)
        arrivals.append((at, chance.randint(1, SMALL_KEYS)))
    waiting, running = (
        list[tuple[float, int, float, int]](),
        list[tuple[float, float]](),
    )  # by tag; by end, with its tag
    next_tag, virtual, waits = dict[int, float](), 0.0, list[float]()

    def start(now: float) -> None:
        nonlocal virtual
        while waiting and len(running) < workers:
            tag, _, arrived, key = heapq.heappop(waiting)
            heapq.heappush(running, (now + chance.expovariate(1 / MEAN_SECONDS), tag))
            virtual = max(virtual, tag)
            if key:
                waits.append(now - arrived)

    for number, (at, key) in enumerate(arrivals):
        while running and running[0][0] <= at:
            start(heapq.heappop(running)[0])
        tag = max(virtual, next_tag.get(key, 0.0))
        next_tag[key] = tag + 1
        heapq.heappush(waiting, (tag, number, at, key))
        start(at)
    return sorted(waits)[int(0.95 * len(waits))]


async def _measure(stack: Stack, arguments: argparse.Namespace) -> None:
    keys = [await create_key(stack.settings, f"small-{number}") for number in range(SMALL_KEYS)]
    greedy = await create_key(stack.settings, "greedy")
    rate = arguments.load * arguments.workers / MEAN_SECONDS
    traffic = Traffic(stack.url, random.Random(arguments.seed))  # noqa: S311 - arrivals, not secrets
    async with aiohttp.ClientSession() as http:
        await traffic.prepare(http, [*keys, greedy])
        await traffic.arrive(http, keys, rate, 5)  # everything connected and warm
        calm_from = time.time()
        await traffic.arrive(http, keys, rate, arguments.seconds)
        flood_from = time.time()
        flood = asyncio.create_task(traffic.drop(http, greedy, arguments.flood))
        await traffic.arrive(http, keys, rate, arguments.seconds)
        until = time.time()
        accepted = flood.result() if flood.done() else None
        flood.cancel()
        with suppress(asyncio.CancelledError):
            await flood
    calm, flooded = await _waits(stack, calm_from, flood_from), await _waits(stack, flood_from, until)
    if calm is None or flooded is None:
        raise SystemExit("Too few jobs were started to compare.")
    started = await _started_of(stack, "greedy")
    print(
        f"{os.cpu_count()} cores, {arguments.workers} workers, jobs of {MEAN_SECONDS:g} s on average (exponential), "
        f"{SMALL_KEYS} small keys, load {arguments.load:g}, {arguments.seconds:g} s for each phase\n"
    )
    print("| phase | small keys' jobs | wait p50, s | p95, s | longest, s |\n|---|---|---|---|---|")
    print(f"| without the flood | {calm} |\n| one key drops {arguments.flood} jobs | {flooded} |")
    ideal = ideal_p95(arguments.workers, arguments.load, flood=True), ideal_p95(arguments.workers, arguments.load)
    print(f"\np95 with the flood is {flooded.p95 / calm.p95:.2f} times that without.")
    print("In a simulation of the same policy, where nothing but jobs takes time,")
    print(f"it is {ideal[0] / ideal[1]:.2f} times: {ideal[1]:.3f} and {ideal[0]:.3f} s.")
    print(f"The greedy key submitted {accepted or 'not all of its jobs'} in time and had {started} of them started.")


class Traffic:
    """Clients that submit and do not look back."""

    def __init__(self, url: str, chance: random.Random) -> None:
        self._url = url
        self._chance = chance
        self._images: dict[str, str] = {}

    async def prepare(self, http: aiohttp.ClientSession, keys: Sequence[str]) -> None:
        """Send each key's image once."""
        picture = BytesIO()
        Image.new("RGB", (8, 8)).save(picture, "PNG")
        for key in keys:
            headers, data = {"X-API-Key": key}, {"file": picture.getvalue()}
            async with http.post(f"{self._url}/v2/uploads", headers=headers, data=data) as response:
                response.raise_for_status()
                self._images[key] = f"upload://{(await response.json())['id']}"

    async def arrive(self, http: aiohttp.ClientSession, keys: Sequence[str], rate: float, seconds: float) -> None:
        """Let jobs of random keys arrive, `rate` a second on average, whatever becomes of them."""
        end_at = time.monotonic() + seconds
        async with asyncio.TaskGroup() as submits:
            while time.monotonic() < end_at:
                submits.create_task(self._submit(http, self._chance.choice(keys)))
                await asyncio.sleep(self._chance.expovariate(rate))

    async def drop(self, http: aiohttp.ClientSession, key: str, count: int) -> int:
        """Submit `count` jobs as fast as FLOOD_CLIENTS clients can; return how many were accepted."""
        left = iter(range(count))

        async def client() -> int:
            return sum([await self._submit(http, key) for _ in left])

        return sum(await asyncio.gather(*(client() for _ in range(FLOOD_CLIENTS))))

    async def _submit(self, http: aiohttp.ClientSession, key: str) -> int:
        params = {"image": self._images[key], "scale_factor": 1, "seed": self._chance.getrandbits(32)}
        body = {"model": "clarity-upscale", "clarityUpscaleParams": params}
        async with http.post(f"{self._url}/v2/images/upscale", headers={"X-API-Key": key}, json=body) as response:
            response.raise_for_status()
        return 1


async def _waits(stack: Stack, begin: float, end: float) -> Waits | None:
    rows = await _ask(
        stack,
        # A job that has not been started has waited at least until now.
        "SELECT extract(epoch FROM coalesce(j.started_at, now()) - j.created_at)::float AS wait FROM jobs j"
        " JOIN api_keys k ON k.id = j.api_key_id AND k.name LIKE 'small-%'"
        " WHERE j.created_at BETWEEN to_timestamp($1) AND to_timestamp($2)",
        *(begin, end),
    )
    waits = sorted(row["wait"] for row in rows)
    if len(waits) < 100:
        return None
    percentiles = statistics.quantiles(waits, n=100, method="inclusive")
    return Waits(len(waits), percentiles[49], percentiles[94], waits[-1])


async def _started_of(stack: Stack, name: str) -> int:
    rows = await _ask(
        stack, "SELECT count(*) FROM jobs JOIN api_keys k ON k.id = api_key_id AND k.name = $1 WHERE attempt > 0", name
    )
    return rows[0][0]


async def _ask(stack: Stack, statement: str, *arguments: object) -> Sequence[asyncpg.Record]:
    connection = await asyncpg.connect(stack.settings.database_url.replace("+asyncpg", ""))
    try:
        return await connection.fetch(statement, *arguments)
    finally:
        await connection.close()


if __name__ == "__main__":
    main()
