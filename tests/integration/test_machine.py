"""The protocol against everything that may go wrong, and mutants of it that the same machine must find."""

import asyncio
import os
from collections.abc import Callable, Coroutine, Generator, Sequence
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, seed
from hypothesis import settings as profile
from hypothesis.stateful import run_state_machine_as_test

from core.settings import Settings
from db.session import Database
from tests.machine import clock, protocol
from tests.machine.outside import Broker, Objects
from tests.machine.parts import BEGINNING, OWNERS
from tests.machine.protocol import Protocol
from tests.machine.rules import Machine
from tests.machine.world import World

EXAMPLES = int(os.environ.get("MACHINE_EXAMPLES", "150"))
"""How many runs the real protocol has to stand; a nightly run asks for more, and with another seed."""
SEED = int(os.environ.get("MACHINE_SEED", "1"))

STEPS = 40

Sql = Callable[..., Sequence[Any]]


class Explorer:
    """Worlds over one database, in one event loop and on two connections."""

    def __init__(self, settings: Settings, loop: asyncio.AbstractEventLoop) -> None:
        self._settings = settings
        self._loop = loop
        self._database = Database(settings)
        self._lent = self._database.connection()

    def open(self, url: str) -> None:
        self._loop.run_until_complete(clock.install(url))
        self._observer = self._loop.run_until_complete(asyncpg.connect(url))
        self._connection = self._loop.run_until_complete(self._lent.__aenter__())

    def close(self) -> None:
        self._loop.run_until_complete(self._lent.__aexit__(None, None, None))
        self._loop.run_until_complete(self._observer.close())
        self._loop.run_until_complete(self._database.close())

    def explore(self, protocol: type[Protocol], examples: int, number: int) -> None:
        """Let Hypothesis look for a run in which the protocol goes wrong; `number` is the seed."""
        factory: Any = seed(number)(lambda: Machine(self._loop, lambda: self._make_world(protocol)))
        run_state_machine_as_test(
            factory,
            settings=profile(
                max_examples=examples,
                stateful_step_count=STEPS,
                phases=[Phase.generate],
                deadline=None,
                database=None,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
            ),
        )

    def live(self, story: Callable[[World], Coroutine[Any, Any, None]]) -> None:
        """Tell one story instead."""
        self._loop.run_until_complete(story(self._make_world(Protocol)))

    def _make_world(self, protocol: type[Protocol]) -> World:
        broker, objects = Broker(), Objects()
        tested = protocol(self._settings, self._database, broker, objects)
        return World(self._connection, self._observer, broker, objects, tested)


@pytest.fixture
def explorer(settings: Settings, database_url: str) -> Generator[Explorer]:
    with asyncio.Runner() as runner:
        explorer = Explorer(settings, runner.get_loop())
        explorer.open(database_url)
        yield explorer
        explorer.close()


def test_every_job_comes_to_one_truthful_end_whatever_goes_wrong(explorer: Explorer) -> None:
    explorer.explore(Protocol, EXAMPLES, SEED)


@pytest.mark.parametrize(
    ("mutant", "number", "finding"),
    [
        (protocol.NoFence, 1, "the result is another attempt's|a worker that beats lost its attempt"),
        (protocol.NoResend, 2, "lost: "),
        (protocol.NoStrikes, 1, "a job lives on after its last strike"),
        (protocol.DeliveryApart, 3, "deliveries are wrong"),
        (protocol.NoLimits, 1, "a claim got what must not run"),
        (protocol.NoDeadlines, 1, "a claim got what must not run"),
        (protocol.NoBeats, 1, "a worker that beats lost its attempt"),
        (protocol.NoIdempotency, 2, "another request was taken for a repetition|a repetition made another job"),
        (protocol.AttemptTakenBack, 3, "an attempt's number fell"),
        (protocol.LateCancel, 5, "a job that is over could be cancelled"),
        (protocol.NoStrayObjects, 1, "objects stay for ever"),
    ],
)
def test_the_machine_finds_a_protocol_that_is_wrong(
    explorer: Explorer, mutant: type[Protocol], number: int, finding: str
) -> None:
    """The seeds are such as find it soon; with others it may take some hundred runs."""
    with pytest.raises(AssertionError, match=finding):
        explorer.explore(mutant, 500, number)


def test_in_the_machine_s_database_all_time_is_the_test_s(explorer: Explorer, sql: Sql) -> None:
    sql("UPDATE clock.face SET at = '2030-01-01'")
    sql("INSERT INTO workers (id, name, engine) VALUES (gen_random_uuid(), 'w', 'none')")
    sql("INSERT INTO api_keys (id, name, prefix, hash) VALUES (gen_random_uuid(), 'k', 'upk_', 'x')")
    told = sql("SELECT now() AS at UNION ALL SELECT beat_at FROM workers UNION ALL SELECT created_at FROM api_keys")
    assert {row["at"].year for row in told} == {2030}


def test_claims_beats_burials_and_deadlines_go_by_the_test_s_clock(explorer: Explorer, settings: Settings) -> None:
    """The world asserts what each of them does; here its clock makes them happen without any time passing."""

    async def live(world: World) -> None:
        await world.begin()
        await world.submit(OWNERS[2])
        await world.submit(OWNERS[2], cancel_after=timedelta(seconds=40))
        await world.check()
        process = world.processes[0]
        world.take_hint(process, 0)
        await world.claim(process)
        await world.check()
        assert process.attempt is not None
        process.silent = True
        await world.pass_time(settings.lease_seconds - 1)
        await world.sweep()
        await world.check()
        rows = {row["status"]: row for row in world.rows.values()}
        assert rows["PROCESSING"]["started_at"] == BEGINNING
        await world.pass_time(12)
        await world.sweep()
        await world.check()
        by_strikes = sorted((row["strikes"], row["status"]) for row in world.rows.values())
        assert by_strikes == [(0, "CANCELLED"), (1, "QUEUED")]

    explorer.live(live)
