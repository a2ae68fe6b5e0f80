"""Whole jobs a second: every client submits one job, follows it to its end, and submits the next."""

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from bench.peers.clients import submit_patiently
from bench.peers.process import cpu_seconds
from bench.peers.server import POLL_SECONDS, Server, State, Work

WARM_SECONDS = 1.0
STUCK_SECONDS = 60.0
"""When the last jobs of a measurement have not ended so long after it, something hangs."""


@dataclass(frozen=True)
class Speed:
    """What so many clients reached; times in seconds, from the first try to submit until the end was seen."""

    rate: float
    p50: float
    p99: float
    cpu_ms: float
    """Processor time that the server took for one job: what others do on the machine hardly changes it."""


def measure(server: Server, clients: int, seconds: float) -> Speed:
    """Start the server, measure, and stop it: no measurement pays for the jobs of the one before."""
    try:
        server.start()
        return asyncio.run(_measure(server, clients, seconds))
    finally:
        server.stop()


def describe(rounds: Sequence[Speed]) -> str:
    """Put the median round, and how far the others were from it, into a cell."""
    if not rounds:
        return "broke off"
    middle = sorted(rounds, key=lambda one: one.rate)[len(rounds) // 2]
    rates = [one.rate for one in rounds]
    times = f"{1000 * middle.p50:.0f} / {1000 * middle.p99:.0f}"
    return f"**{middle.rate:.0f}** ({min(rates):.0f}–{max(rates):.0f}) · {times} · {middle.cpu_ms:.1f}"


async def _measure(server: Server, clients: int, seconds: float) -> Speed:
    async with server.connected(), asyncio.timeout(WARM_SECONDS + seconds + STUCK_SECONDS):
        await _repeat(server, "warm", clients, WARM_SECONDS)
        return await _repeat(server, "job", clients, seconds)


async def _repeat(server: Server, name: str, clients: int, seconds: float) -> Speed:
    times = list[float]()
    numbers = count()

    async def client() -> None:
        while time.monotonic() < end_at:
            began = time.perf_counter()
            ticket = await submit_patiently(server, Work(f"{name}-{next(numbers)}"), longest_pause=POLL_SECONDS)
            if not ticket.accepted or await server.finished(ticket) is not State.DONE:
                raise RuntimeError(f"{server.name} did not do a job: its submit was answered {ticket.status}.")
            times.append(time.perf_counter() - began)

    used_before = cpu_seconds(server.pids())
    began_at = time.monotonic()
    end_at = began_at + seconds
    await asyncio.gather(*(client() for _ in range(clients)))
    took = time.monotonic() - began_at
    used = cpu_seconds(server.pids()) - used_before
    percentiles = statistics.quantiles(times, n=100, method="inclusive")
    return Speed(len(times) / took, percentiles[49], percentiles[98], 1000 * used / len(times))
