"""The sweep: hints that are missing are sent, and no others."""

import time
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any
from uuid import uuid4

import anyio
import pytest
from sqlalchemy import text

from core import progress
from core.errors import DatabaseUnavailable
from core.queue import ENOUGH_HINTS, POOL, Hints
from core.settings import Settings
from db.session import Database
from tests.broker import connect_redis
from worker.sweeps import Sweeper, leading

pytestmark = pytest.mark.anyio


@pytest.fixture
def hints(settings: Settings) -> Generator[Hints]:
    hints = Hints(settings)
    yield hints
    hints.close()


@pytest.fixture
async def sweep(settings: Settings, hints: Hints) -> AsyncGenerator[Callable[[], Any]]:
    """Sweep once; return how many hints were sent."""
    database, client = Database(settings), progress.connect(settings)

    async def once() -> int:
        async with database.connection() as connection:
            return await Sweeper(settings, database, client, hints).sweep(connection)

    yield once
    await client.aclose()
    await database.close()


async def _queue_jobs(sql_async: Any, count: int, age: str) -> None:
    key = uuid4()
    await sql_async("INSERT INTO api_keys (id, name, prefix, hash) VALUES ($1, 'k', 'upk_', $2)", key, key.bytes)
    await sql_async(
        "INSERT INTO jobs (id, api_key_id, model, input, options, image_url, created_at)"
        " SELECT gen_random_uuid(), $1, 'm', '{}', '{}', 'u', now() - $2::text::interval FROM generate_series(1, $3)",
        *(key, age, count),
    )


def _hints_in(settings: Settings) -> int:
    with connect_redis(settings.redis_url) as broker:
        return broker.llen(POOL)


def _wait_for_hints(settings: Settings, count: int) -> None:
    give_up_at = time.monotonic() + 5
    while _hints_in(settings) < count and time.monotonic() < give_up_at:
        time.sleep(0.02)
    assert _hints_in(settings) == count


async def test_an_empty_queue_needs_no_hints(sweep: Any) -> None:
    assert await sweep() == 0


async def test_missing_hints_are_sent_and_only_those(settings: Settings, sweep: Any, sql_async: Any) -> None:
    await _queue_jobs(sql_async, 3, "1 minute")
    assert await sweep() == 3
    _wait_for_hints(settings, 3)
    assert await sweep() == 0
    await _queue_jobs(sql_async, 2, "1 minute")
    assert await sweep() == 2
    _wait_for_hints(settings, 5)


async def test_no_more_hints_are_sent_while_enough_lie_waiting(
    settings: Settings, hints: Hints, sweep: Any, sql_async: Any
) -> None:
    hints.send(ENOUGH_HINTS)
    _wait_for_hints(settings, ENOUGH_HINTS)
    await _queue_jobs(sql_async, 100, "1 minute")
    assert await sweep() == 0


async def test_hints_are_sent_again_once_redis_takes_them_again(settings: Settings, hints: Hints) -> None:
    hints.send()
    _wait_for_hints(settings, 1)
    with connect_redis(settings.redis_url) as broker:
        broker.config_set("maxmemory", 1)  # a full Redis: it answers, and refuses every write
        try:
            hints.send()
            await anyio.sleep(1)
        finally:
            broker.config_set("maxmemory", 0)
    hints.send()
    _wait_for_hints(settings, 2)


async def test_a_job_submitted_just_now_is_left_to_its_own_hint(sweep: Any, sql_async: Any) -> None:
    await _queue_jobs(sql_async, 3, "0 seconds")
    assert await sweep() == 0


async def test_hints_lost_with_redis_are_sent_again(settings: Settings, sweep: Any, sql_async: Any) -> None:
    await _queue_jobs(sql_async, 2, "1 minute")
    await sweep()
    _wait_for_hints(settings, 2)
    with connect_redis(settings.redis_url) as broker:
        broker.flushall()
    assert await sweep() == 2


async def test_a_leader_whose_connection_is_cut_stops_leading_and_nothing_else(
    settings: Settings, sql_async: Any
) -> None:
    database = Database(settings)
    with pytest.raises(DatabaseUnavailable):
        async with database.connection() as connection, leading(connection):
            await sql_async(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'upscaled'"
            )
            await connection.execute(text("SELECT 1"))
    async with database.connection() as connection, leading(connection) as leads:
        assert leads
    await database.close()


async def test_only_one_of_two_dispatchers_sweeps(settings: Settings) -> None:
    database = Database(settings)
    async with database.connection() as first, database.connection() as second:
        async with leading(first) as leads:
            assert leads
            async with leading(second) as also_leads:
                assert not also_leads
        async with leading(second) as now_leads:
            assert now_leads
    await database.close()
