"""Draws a plan of faults from a seed, carries it out, and measures how long the service takes to work again."""

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.chaos.clients import Client
from tests.chaos.engine import Kind
from tests.chaos.faults import INSTANT, MAKERS, Fault, Scene

SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.3, 2.5
"""Between the beginnings of two faults; a fault lasts longer than that more often than not, so several hold at once."""

PROBE_SECONDS = 60.0
"""How long the service may take to recover, with others' faults on top."""


@dataclass(frozen=True)
class Planned:
    """One fault of the plan."""

    at: float
    """Seconds after the beginning."""
    fault: Fault
    seconds: float
    """How long it is held."""
    seed: int
    """Of the dice that draw its victim."""


@dataclass
class Injected:
    """One fault as it happened; times in seconds."""

    name: str
    held: float = 0.0
    through: float | None = None
    """From the injection until a job submitted right then was done."""
    recovery: float | None = None
    """From the end of the fault until a job submitted right then was done."""


@dataclass
class Driver:
    """Carries out a plan; `prober` submits the jobs that time is taken of."""

    scene: Scene
    prober: Client
    injected: list[Injected] = field(default_factory=list[Injected])
    complaints: list[str] = field(default_factory=list[str])
    _locks: defaultdict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))

    async def carry_out(self, plan: Sequence[Planned], *, apart: bool) -> None:
        """Return when every fault is undone and every probe is done.

        `apart` lets the service recover from each fault before the next, whatever time the plan gives it.
        """
        began = time.monotonic()
        if apart:
            for planned in plan:
                await self._carry_out(planned)
            return
        async with asyncio.TaskGroup() as tasks:
            for planned in plan:
                await asyncio.sleep(max(0.0, began + planned.at - time.monotonic()))
                tasks.create_task(self._carry_out(planned))

    async def _carry_out(self, planned: Planned) -> None:
        fault, injected = planned.fault, Injected(planned.fault.name)
        async with asyncio.TaskGroup() as probes:
            async with self._locks[fault.target or f"{planned.at}"]:
                began = time.monotonic()
                await fault.inject(self.scene, random.Random(planned.seed))  # noqa: S311 - no secret
                through = probes.create_task(self._probe())
                await asyncio.sleep(planned.seconds)
                await fault.undo(self.scene)
                injected.held = time.monotonic() - began
            recovery = through if fault.hold == INSTANT else probes.create_task(self._probe())
        injected.through, injected.recovery = through.result(), recovery.result()
        self.injected.append(injected)

    async def _probe(self) -> float:
        """Return how long it takes from now until a job is done."""
        began = time.monotonic()
        job = await self.prober.submit(Kind.PLAIN, None, priority=10)
        await self.prober.until_over(job, PROBE_SECONDS)
        if job.seen_over is None:
            self.complaints.append(f"job {job.job_id}, submitted while something went wrong, took too long")
        return time.monotonic() - began


def draw_plan(seed: int, seconds: float) -> list[Planned]:
    """Return what happens within so many seconds: every fault once, in random order, and then whatever comes."""
    dice = random.Random(seed)  # noqa: S311 - no secret
    first = dice.sample(MAKERS, len(MAKERS))
    # So that every fault has its turn however short the run.
    longest = min(LONGEST_PAUSE_SECONDS, 1.8 * seconds / len(MAKERS) - SHORTEST_PAUSE_SECONDS)
    plan: list[Planned] = []
    at = dice.uniform(0, longest)
    while at < seconds:
        fault = (first.pop() if first else dice.choice(MAKERS))()
        plan.append(Planned(at, fault, dice.uniform(*fault.hold), dice.getrandbits(32)))
        at += dice.uniform(SHORTEST_PAUSE_SECONDS, longest)
    return plan
