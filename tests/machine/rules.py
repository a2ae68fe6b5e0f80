"""The machine: Hypothesis chooses which faults a run may have, and then what happens next."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from datetime import timedelta
from enum import Enum, auto
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.machine.parts import OWNERS, Death, Owner, Process
from tests.machine.world import World

Value = TypeVar("Value")


class Fault(Enum):
    """What may go wrong. A run has some of them: with all at once, each hides what the others would show."""

    LOST_HINTS = auto()
    BROKER_DOWN = auto()
    CRASH = auto()
    SILENCE = auto()
    LOST_ANSWER = auto()
    POISON = auto()
    STRIKE = auto()
    DRAIN = auto()
    CANCEL = auto()
    DEADLINE = auto()
    AGE = auto()


PICKS = range(8)
PICK = st.integers(min(PICKS), max(PICKS))
MAX_JOBS = 6


def with_fault(fault: Fault) -> Callable[[Any], bool]:
    return lambda machine: fault in machine.faults


class Machine(RuleBasedStateMachine):
    """Runs a World step by step; every step ends with a look at everything."""

    def __init__(self, loop: asyncio.AbstractEventLoop, make_world: Callable[[], World]) -> None:
        super().__init__()
        self._loop = loop
        self.world = make_world()
        self.faults: frozenset[Fault] = frozenset()
        self._sound = False

    def _do(self, step: Coroutine[Any, Any, None]) -> None:
        self._sound = False
        self._loop.run_until_complete(step)
        self._sound = True

    @initialize(
        faults=st.frozensets(st.sampled_from(Fault), min_size=1, max_size=4),
        orders=st.lists(st.tuples(st.sampled_from(OWNERS), st.booleans()), min_size=1, max_size=2),
    )
    def begin(self, faults: frozenset[Fault], orders: list[tuple[Owner, bool]]) -> None:
        self.faults = faults
        self._do(self._begin(orders))

    async def _begin(self, orders: list[tuple[Owner, bool]]) -> None:
        await self.world.begin()
        for owner, webhook in orders:
            await self.world.submit(owner, webhook=webhook)
            await self.world.check()
            await self._start_another()

    async def _start_another(self) -> None:
        """Let a worker that sleeps take a hint, so that few steps are needed to where it becomes interesting."""
        if self.world.broker.hints and self.world.sleepers and not self.world.broker.down:
            process = self.world.sleepers[0]
            self.world.take_hint(process, 0)
            await self.world.claim(process)

    @invariant()
    def all_holds(self) -> None:
        self._do(self.world.check())

    def teardown(self) -> None:
        if self._sound:
            self._do(self.world.settle())

    # Callers.

    @precondition(lambda self: len(self.world.orders) < MAX_JOBS)
    @rule(owner=st.sampled_from(OWNERS), webhook=st.booleans(), repeatable=st.booleans(), priority=st.integers(0, 2))
    def submit(self, **wanted: Any) -> None:
        self._do(self.world.submit(**wanted))

    @precondition(lambda self: Fault.POISON in self.faults and len(self.world.orders) < MAX_JOBS)
    @rule(owner=st.sampled_from(OWNERS), webhook=st.booleans())
    def submit_poison(self, **wanted: Any) -> None:
        self._do(self.world.submit(poison=True, **wanted))

    @precondition(lambda self: Fault.DEADLINE in self.faults and len(self.world.orders) < MAX_JOBS)
    @rule(owner=st.sampled_from(OWNERS), webhook=st.booleans(), seconds=st.sampled_from([5, 40, 100]))
    def submit_with_deadline(self, seconds: int, **wanted: Any) -> None:
        self._do(self.world.submit(cancel_after=timedelta(seconds=seconds), **wanted))

    @precondition(lambda self: bool(self.world.repeatable))
    @rule(which=PICK, changed=st.booleans())
    def submit_again(self, which: int, changed: bool) -> None:
        self._do(self.world.submit_again(_pick(self.world.repeatable, which), changed=changed))

    @precondition(lambda self: Fault.CANCEL in self.faults and bool(self.world.orders))
    @rule(which=PICK)
    def cancel(self, which: int) -> None:
        self._do(self.world.cancel(_pick(list(self.world.orders.values()), which)))

    # Workers.

    @precondition(lambda self: bool(self.world.broker.hints and self.world.sleepers) and not self.world.broker.down)
    @rule(which=PICK, hint=PICK)
    def take_hint(self, which: int, hint: int) -> None:
        process = _pick(self.world.sleepers, which)
        self.world.take_hint(process, hint)
        self._do(self.world.claim(process))

    @precondition(lambda self: bool(self.world.seekers))
    @rule(which=PICK)
    def claim(self, which: int) -> None:
        self._do(self.world.claim(_pick(self.world.seekers, which)))

    @precondition(lambda self: Fault.LOST_ANSWER in self.faults and bool(self.world.seekers))
    @rule(which=PICK)
    def claim_unheard(self, which: int) -> None:
        self._do(self.world.claim(_pick(self.world.seekers, which), answer_lost=True))

    @precondition(lambda self: bool(self._holders()))
    @rule(which=PICK)
    def finish(self, which: int) -> None:
        # Some results are refused where they are put. A draw of its own would change what the tests' seeds mean.
        self._do(self.world.finish(_pick(self._holders(), which), refused=which == max(PICKS)))

    @precondition(lambda self: bool(self.world.zombies))
    @rule(which=PICK, hand_back=st.booleans())
    def finish_late(self, which: int, hand_back: bool) -> None:
        zombie = _pick(self.world.zombies, which)
        self._do(self.world.hand_back(zombie) if hand_back and not zombie.ended else self.world.finish(zombie))

    @precondition(lambda self: Fault.CRASH in self.faults and bool(self._holders()))
    @rule(which=PICK, death=st.sampled_from([Death.BEFORE_UPLOAD, Death.AFTER_UPLOAD, Death.AFTER_COMMIT]))
    def die(self, which: int, death: Death) -> None:
        self._do(self.world.finish(_pick(self._holders(), which), death))

    @precondition(lambda self: Fault.CRASH in self.faults)
    @rule(which=PICK)
    def leave(self, which: int) -> None:
        self._do(self.world.leave(_pick(self.world.processes, which)))

    @precondition(lambda self: Fault.LOST_ANSWER in self.faults and bool(self._holders()))
    @rule(which=PICK)
    def finish_unheard(self, which: int) -> None:
        self._do(self.world.finish(_pick(self._holders(), which), Death.ANSWER_LOST))

    @precondition(lambda self: bool(self._holders()))
    @rule(which=PICK, answer_lost=st.booleans())
    def fail(self, which: int, answer_lost: bool) -> None:
        lost = answer_lost and Fault.LOST_ANSWER in self.faults
        self._do(self.world.fail(_pick(self._holders(), which), answer_lost=lost))

    @precondition(lambda self: Fault.STRIKE in self.faults and bool(self._holders()))
    @rule(which=PICK, answer_lost=st.booleans())
    def strike(self, which: int, answer_lost: bool) -> None:
        lost = answer_lost and Fault.LOST_ANSWER in self.faults
        self._do(self.world.hand_back(_pick(self._holders(), which), fault=True, answer_lost=lost))

    @precondition(lambda self: Fault.DRAIN in self.faults and bool(self._holders()))
    @rule(which=PICK)
    def drain(self, which: int) -> None:
        self._do(self.world.hand_back(_pick(self._holders(), which)))

    @precondition(lambda self: Fault.SILENCE in self.faults and bool(self._holders()))
    @rule(which=PICK)
    def fall_silent(self, which: int) -> None:
        """A worker stops for longer than its lease, and another one takes its job."""
        self._do(self._outlast(_pick(self._holders(), which)))

    async def _outlast(self, process: Process) -> None:
        process.silent = True
        await self.world.pass_time(self.world.lease.total_seconds() + 1)
        await self.world.sweep()
        await self.world.check()
        await self._start_another()

    # The broker, the sweep, the clock.

    @precondition(lambda self: Fault.LOST_HINTS in self.faults and bool(self.world.broker.hints))
    @rule(which=PICK)
    def lose_hint(self, which: int) -> None:
        self.world.broker.hints.remove(_pick(self.world.broker.hints, which))

    @precondition(lambda self: bool(self.world.broker.hints))
    @rule(which=PICK)
    def repeat_hint(self, which: int) -> None:
        self.world.broker.hints.append(_pick(self.world.broker.hints, which))

    @precondition(lambda self: Fault.LOST_HINTS in self.faults and bool(self.world.broker.hints))
    @rule()
    def wipe_broker(self) -> None:
        self.world.broker.hints.clear()

    @precondition(with_fault(Fault.BROKER_DOWN))
    @rule()
    def stop_or_start_broker(self) -> None:
        self.world.broker.down = not self.world.broker.down

    @rule(seconds=st.sampled_from([1, 12, 31]))
    def pass_time(self, seconds: int) -> None:
        self._do(self.world.pass_time(seconds))

    @rule()
    def sweep(self) -> None:
        self._do(self.world.sweep())

    @precondition(with_fault(Fault.AGE))
    @rule(hours=st.sampled_from([2, 7, 25]))
    def age(self, hours: int) -> None:
        """Nobody is silent for hours: a zombie that old would leave what nobody deletes."""
        for zombie in self.world.zombies:
            self.world.crash(zombie)
        self._do(self.world.pass_time(hours * 3600))

    def _holders(self) -> Sequence[Process]:
        """Processes that may end their attempt as they like; who has ended it once can only say it again."""
        return [process for process in self.world.holders if not process.ended]


def _pick(some: Sequence[Value], which: int) -> Value:
    return some[which % len(some)]
