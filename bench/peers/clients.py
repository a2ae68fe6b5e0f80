"""What the trials let clients do: come again when refused, wait for many jobs, count what became of them."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

from bench.peers.server import POLL_SECONDS, REFUSALS, Client, Server, State, Ticket, Work

REVIVE_SECONDS = 0.5
RETRY_GROWTH, RETRY_MAX_SECONDS = 1.5, 1.0
PROBE_SECONDS = 10.0
"""How long a probe may take before another one is sent."""

_POLLERS = 4
_LAST_LOOK_SECONDS = 10.0


@dataclass(frozen=True)
class Ends:
    """What became of some jobs."""

    states: Mapping[State | None, int]
    last_at: float | None
    """When the last job that was done was seen to be, as time.time() tells it."""
    done_at: Mapping[str, float]
    """The same of every job, by tag."""


async def submit_patiently(
    server: Server,
    work: Work,
    *,
    client: Client = Client.FIRST,
    key: str | None = None,
    longest_pause: float = RETRY_MAX_SECONDS,
) -> Ticket:
    """Submit, and again after a pause that grows for as long as the server says that it has no room."""
    pause = POLL_SECONDS
    while (ticket := await server.submit(work, client=client, key=key)).status in REFUSALS:
        await asyncio.sleep(pause)
        pause = min(pause * RETRY_GROWTH, longest_pause)
    return ticket


async def settle(server: Server, tickets: Sequence[Ticket], seconds: float) -> Ends:
    """Wait until all jobs have ended or the time is over, and tell what became of each.

    Few are asked about at a time, and those in the order of submission: the asking must not become the load.
    """
    waiting = deque(tickets)
    states = dict[int, State | None]()
    done_at = dict[str, float]()

    async def follow() -> None:
        while waiting:
            ticket = waiting.popleft()
            await look(ticket, await server.finished(ticket, longest_pause=0.2))

    async def look(ticket: Ticket, state: State | None) -> None:
        states[id(ticket)] = state
        if state is State.DONE:
            done_at[ticket.work.tag] = time.time()

    await _within(seconds, [follow() for _ in range(_POLLERS)])
    rest = [ticket for ticket in tickets if id(ticket) not in states]

    async def look_once(ticket: Ticket) -> None:
        await look(ticket, await server.state(ticket))

    await _within(_LAST_LOOK_SECONDS, [look_once(ticket) for ticket in rest])
    counts = Counter(states.get(id(ticket)) for ticket in tickets)
    return Ends(counts, max(done_at.values(), default=None), done_at)


@asynccontextmanager
async def supervised(server: Server) -> AsyncGenerator[None]:
    """Meanwhile start again what ends by itself, as a service manager would."""

    async def supervise() -> None:
        while True:
            await asyncio.sleep(REVIVE_SECONDS)
            with suppress(RuntimeError):  # it did not come up: another try
                await asyncio.to_thread(server.revive)

    supervisor = asyncio.create_task(supervise())
    try:
        yield
    finally:
        supervisor.cancel()
        await asyncio.gather(supervisor, return_exceptions=True)


async def serves_again(server: Server, seconds: float) -> float | None:
    """Send a small job now and then until one is done; return when, as time.time() tells it, or None."""

    async def probe() -> float:
        for number in count():
            try:
                async with asyncio.timeout(PROBE_SECONDS):
                    ticket = await server.submit(Work(f"probe-{number}"))
                    if ticket.accepted and await server.finished(ticket) is State.DONE:
                        return time.time()
            except TimeoutError:
                continue
            await asyncio.sleep(0.2)
        raise AssertionError

    try:
        return await asyncio.wait_for(probe(), seconds)
    except TimeoutError:
        return None


async def _within(seconds: float, work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Let coroutines run together for so long; what has not ended by then is cancelled."""
    tasks = [asyncio.create_task(one) for one in work]
    if not tasks:
        return
    _, pending = await asyncio.wait(tasks, timeout=seconds)
    for task in pending:
        task.cancel()
    for error in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(error, Exception):
            raise error
