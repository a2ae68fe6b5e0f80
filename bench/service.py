"""How fast is everything around the engine? Submits, polls and whole jobs, and beside them the floor.

    .venv/bin/python -m bench.service [--workers 4] [--seconds 8] [--clients 1 8 32]

Starts the embedded stack with an engine that returns its input, measures, prints one table, and stops everything.
Machines are shared and noisy: read the ratios, which come from one run, and not the figures.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import psutil
from PIL import Image

from bench.floor import Floor, measure_floor
from cli.processes import free_port
from cli.stack import Stack

POLL_SECONDS, POLL_GROWTH, POLL_MAX_SECONDS = 0.02, 1.5, 0.05
"""How a client polls: as Apiframe's SDK does (2 s, growing by half up to 5 s), a hundred times faster."""

IMAGE_SIDE_PIXELS = 64


@dataclass(frozen=True)
class Measured:
    """How often something was done, and how long it took, in seconds."""

    count: int
    rate: float
    p50: float
    p99: float

    def __str__(self) -> str:
        return f"{self.rate:.0f} | {1000 * self.p50:.1f} / {1000 * self.p99:.1f}"


@dataclass(frozen=True)
class Row:
    """What one number of clients reached."""

    clients: int
    submits: Measured
    polls: Measured
    jobs: Measured
    floor: Floor
    cpu_ms: Mapping[str, float]
    """Processor time of one job, by part."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each measurement")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="upscaled-bench-") as folder:
        rows = [_measure(Path(folder), count, arguments.workers, arguments.seconds) for count in arguments.clients]
    _print(rows, arguments.workers, arguments.seconds)


def _measure(folder: Path, clients: int, workers: int, seconds: float) -> Row:
    """Measure one number of clients, on stacks of its own: no row pays for the jobs of the row before."""
    with _stack(folder / f"api-{clients}", workers=0) as stack:
        session = Session(stack, clients)
        submits = asyncio.run(session.repeat(session.submit, seconds))
        polls = asyncio.run(session.repeat(session.poll, seconds))
        # What was just submitted stays queued meanwhile: a claim that came back empty would end pgbench.
        floor = measure_floor(stack.settings, session.key_id, clients, seconds)
    with _stack(folder / f"whole-{clients}", workers) as stack:
        session = Session(stack, clients)
        asyncio.run(session.repeat(session.run_job, 1.0))  # everything connected and warm
        before = _cpu_seconds(stack)
        jobs = asyncio.run(session.repeat(session.run_job, seconds))
        spent = {name: _cpu_seconds(stack)[name] - before[name] for name in before}
    cpu = {name: 1000 * value / jobs.count for name, value in spent.items()}
    return Row(clients, submits, polls, jobs, floor, cpu)


@contextmanager
def _stack(folder: Path, workers: int) -> Generator[Stack]:
    logs = folder / "logs"
    logs.mkdir(parents=True)
    environ = {**os.environ, "UPSCALED_ENGINE": "bench.engines:Copy", "UPSCALED_LOG_LEVEL": "WARNING"}
    with Stack(folder / "data", port=free_port(), workers=workers, logs=logs, environ=environ) as stack:
        yield stack


class Session:
    """Clients of one stack, each of which does one thing after the other."""

    def __init__(self, stack: Stack, clients: int) -> None:
        self._stack = stack
        self._clients = clients
        image = asyncio.run(self._once(self._upload))
        self._request = {"model": "clarity-upscale", "clarityUpscaleParams": {"image": image, "scale_factor": 1}}
        self._polled = asyncio.run(self._once(self.submit))
        self.key_id = UUID(asyncio.run(self._once(lambda http: self._get(http, "/v2/me")))["apiKey"]["id"])

    async def repeat(self, act: Callable[[aiohttp.ClientSession], Awaitable[Any]], seconds: float) -> Measured:
        """Let every client repeat `act` for so many seconds, and count and time each."""
        times: list[float] = []

        async def client(http: aiohttp.ClientSession) -> None:
            while time.monotonic() < end_at:
                began = time.perf_counter()
                await act(http)
                times.append(time.perf_counter() - began)

        async with self._http() as http:
            began_at = time.monotonic()
            end_at = began_at + seconds
            await asyncio.gather(*(client(http) for _ in range(self._clients)))
            took = time.monotonic() - began_at
        percentiles = statistics.quantiles(times, n=100, method="inclusive")
        return Measured(len(times), len(times) / took, percentiles[49], percentiles[98])

    async def submit(self, http: aiohttp.ClientSession) -> str:
        """Submit one job and return its id."""
        async with http.post("/v2/images/upscale", json=self._request) as response:
            response.raise_for_status()
            return (await response.json())["jobId"]

    async def poll(self, http: aiohttp.ClientSession) -> None:
        """Read one queued job."""
        await self._get(http, f"/v2/jobs/{self._polled}")

    async def run_job(self, http: aiohttp.ClientSession) -> None:
        """Submit one job and poll until it is over."""
        job_id = await self.submit(http)
        pause = POLL_SECONDS
        while (job := await self._get(http, f"/v2/jobs/{job_id}"))["status"] != "COMPLETED":
            if job["status"] == "FAILED":
                raise RuntimeError(job["error"])
            await asyncio.sleep(pause)
            pause = min(pause * POLL_GROWTH, POLL_MAX_SECONDS)

    async def _upload(self, http: aiohttp.ClientSession) -> str:
        picture = BytesIO()
        Image.linear_gradient("L").resize((IMAGE_SIDE_PIXELS, IMAGE_SIDE_PIXELS)).convert("RGB").save(picture, "PNG")
        async with http.post("/v2/uploads", data={"file": picture.getvalue()}) as response:
            response.raise_for_status()
            return f"upload://{(await response.json())['id']}"

    async def _get(self, http: aiohttp.ClientSession, path: str) -> dict[str, Any]:
        async with http.get(path) as response:
            response.raise_for_status()
            return await response.json()

    async def _once(self, act: Callable[[aiohttp.ClientSession], Awaitable[Any]]) -> Any:
        async with self._http() as http:
            return await act(http)

    def _http(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=0)
        return aiohttp.ClientSession(self._stack.url, headers={"X-API-Key": self._stack.key}, connector=connector)


def _cpu_seconds(stack: Stack) -> dict[str, float]:
    """Return what each part has used of the processors so far."""
    assert stack.postgres is not None
    assert stack.redis is not None
    workers = [process.pid for name, process in stack.processes.items() if name.startswith("worker")]
    parts = {
        "api": [stack.processes["api"].pid],
        "workers": workers,
        "dispatcher": [stack.processes["dispatcher"].pid],
        "postgres": [stack.postgres.pid, *(child.pid for child in psutil.Process(stack.postgres.pid).children())],
        "redis": [stack.redis.pid],
        "clients": [os.getpid()],
    }
    return {name: sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids) for name, pids in parts.items()}


def _print(rows: Sequence[Row], workers: int, seconds: float) -> None:
    print(
        f"{os.cpu_count()} cores, {workers} workers, {seconds:g} s for each measurement, latencies in ms (p50 / p99)\n"
    )
    print("| clients | submits/s | submit | of floor | polls/s | poll | jobs/s | job | of floor |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.clients} | {row.submits} | {row.submits.rate / row.floor.submits_per_second:.2f}"
            f" | {row.polls} | {row.jobs} | {row.jobs.rate / row.floor.lives_per_second:.2f} |"
        )
    print("\nThe floor (pgbench, the same statements): inserts/s and whole lives/s")
    for row in rows:
        print(f"  {row.clients} clients: {row.floor.submits_per_second:.0f} and {row.floor.lives_per_second:.0f}")
    print("\nProcessor time of one job, ms")
    for row in rows:
        print(f"  {row.clients} clients: " + ", ".join(f"{name} {value:.2f}" for name, value in row.cpu_ms.items()))


if __name__ == "__main__":
    main()
