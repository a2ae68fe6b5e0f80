"""The sweep: missing hints are sent, dead workers buried, old objects deleted; and nothing else is."""

import time
from collections.abc import AsyncGenerator, Callable, Generator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import anyio
import pytest
from sqlalchemy import text

from core import progress
from core.errors import DatabaseUnavailable
from core.queue import ENOUGH_HINTS, POOL, Hints
from core.settings import Settings
from core.storage import open_storage
from db import jobs, retention, uploads
from db.session import Database
from db.uploads import ArrivedUpload, NewUpload
from tests.broker import connect_redis
from tests.queues import RESULT, Queue
from tests.storages import chunks
from worker.sweeps import Sweeper, leading

pytestmark = pytest.mark.anyio


@pytest.fixture
def hints(settings: Settings) -> Generator[Hints]:
    hints = Hints(settings)
    yield hints
    hints.close()


@pytest.fixture
async def database(settings: Settings) -> AsyncGenerator[Database]:
    database = Database(settings)
    yield database
    await database.close()


@pytest.fixture
async def sweeper(settings: Settings, database: Database, hints: Hints) -> AsyncGenerator[Sweeper]:
    client = progress.connect(settings)
    yield Sweeper(settings, database, client, hints, open_storage(settings))
    await client.aclose()


@pytest.fixture
def sweep(database: Database, sweeper: Sweeper) -> Callable[[], Any]:
    """Look for missing hints once; return how many were sent."""

    async def once() -> int:
        async with database.connection() as connection:
            return await sweeper.resend_hints(connection)

    return once


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


async def test_a_job_whose_key_has_no_place_free_needs_no_hint(sweep: Any, sql_async: Any, database: Database) -> None:
    queue = Queue(database)
    limited = await queue.add_key(max_concurrent=1)
    for _ in range(2):
        await queue.submit(limited)
    attempt = await queue.take()
    await sql_async("UPDATE jobs SET created_at = now() - interval '1 minute'")
    assert await sweep() == 0
    await queue.do(jobs.complete, attempt, RESULT, "results/a/1.png", timedelta(hours=1))
    assert await sweep() == 1


async def _strand(queue: Queue, sql_async: Any, silence: str) -> None:
    """Leave a job with a worker that has been silent for so long."""
    await queue.submit(await queue.add_key())
    await queue.take()
    await sql_async("UPDATE workers SET beat_at = now() - $1::text::interval", silence)


async def test_the_jobs_of_dead_workers_are_hinted_at_at_once(
    settings: Settings, database: Database, sweeper: Sweeper, sql_async: Any
) -> None:
    await _strand(Queue(database), sql_async, "1 minute")
    async with database.connection() as connection:
        await sweeper.bury(connection)
    (row,) = await sql_async("SELECT status, strikes, (SELECT count(*) FROM workers) FROM jobs")
    assert tuple(row) == ("QUEUED", 1, 0)
    _wait_for_hints(settings, 1)


async def test_nobody_is_buried_before_the_new_leader_has_watched_for_some_beats(
    settings: Settings, database: Database, sweeper: Sweeper, sql_async: Any
) -> None:
    await _strand(Queue(database), sql_async, "1 minute")

    async def strikes() -> int:
        (row,) = await sql_async("SELECT strikes FROM jobs")
        return row["strikes"]

    quick = settings.model_copy(update={"lease_seconds": 3.0})  # two beats are one second
    patient = Sweeper(quick, database, sweeper._redis, sweeper._hints, sweeper._storage)  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
    for _ in range(2):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(patient.run)
            await anyio.sleep(0.7)
            assert await strikes() == 0
            tasks.cancel_scope.cancel()  # and another leader begins anew
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(patient.run)
        await anyio.sleep(2)
        assert await strikes() == 1
        tasks.cancel_scope.cancel()


async def test_of_two_dispatchers_one_sweeps_until_it_ends(
    settings: Settings, database: Database, sweeper: Sweeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept: list[Sweeper] = []

    async def note(self: Sweeper, _: object) -> None:
        swept.append(self)

    monkeypatch.setattr(Sweeper, "sweep", note)
    other = Sweeper(settings, database, sweeper._redis, sweeper._hints, sweeper._storage)  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
    async with anyio.create_task_group() as tasks:
        async with anyio.create_task_group() as first:
            first.start_soon(sweeper.run)
            await anyio.sleep(0.3)
            tasks.start_soon(other.run)
            await anyio.sleep(0.7)
            assert {*swept} == {sweeper}
            first.cancel_scope.cancel()
        await anyio.sleep(1)
        assert other in swept
        tasks.cancel_scope.cancel()


async def _store(settings: Settings, *keys: str) -> None:
    for key in keys:
        await open_storage(settings).write(key, chunks(b"x"))


def _stored(settings: Settings) -> set[str]:
    return {str(path.relative_to(settings.storage_dir)) for path in settings.storage_dir.rglob("*.png")}


async def test_results_are_deleted_once_they_have_expired_and_so_is_what_killed_attempts_left(
    settings: Settings, database: Database, sweeper: Sweeper, sql_async: Any
) -> None:
    queue = Queue(database)
    owner = await queue.add_key()
    ended = {state: await queue.submit(owner) for state in ("expired", "readable")}
    keys = {state: [f"results/{job_id}/{number}.png" for number in (1, 2)] for state, job_id in ended.items()}
    for state, job_id in ended.items():
        await queue.do(jobs.hand_back, await queue.take(), 3)
        attempt = await queue.take()
        assert (attempt.job_id, attempt.number) == (job_id, 2)
        await queue.do(jobs.complete, attempt, RESULT, keys[state][1], timedelta(hours=1))
        await _store(settings, *keys[state])
    await sql_async("UPDATE jobs SET purge_at = now() WHERE id = $1", ended["expired"])
    await sweeper.purge()
    assert _stored(settings) == {*keys["readable"]}
    rows = await sql_async("SELECT id, purge_at IS NULL AS purged FROM jobs")
    assert {row["id"]: row["purged"] for row in rows} == {ended["expired"]: True, ended["readable"]: False}


async def test_what_a_job_left_that_is_not_over_stays(
    settings: Settings, database: Database, sweeper: Sweeper, sql_async: Any
) -> None:
    queue = Queue(database)
    job_id = await queue.submit(await queue.add_key())
    await queue.take()
    await _store(settings, f"results/{job_id}/1.png")
    await sql_async("UPDATE jobs SET created_at = now() - interval '9 days'")
    await sweeper.purge()
    assert _stored(settings) == {f"results/{job_id}/1.png"}


async def test_an_upload_that_has_expired_is_deleted_unless_a_job_waits_for_it(
    settings: Settings, database: Database, sweeper: Sweeper, sql_async: Any
) -> None:
    queue = Queue(database)
    owner = await queue.add_key()

    async def add(age: str) -> str:
        upload_id = uuid4()
        key = f"uploads/{upload_id}.png"
        await queue.do(uploads.record, NewUpload(id=upload_id, api_key_id=owner, key=key), timedelta(hours=1))
        stored = ArrivedUpload(
            id=upload_id, api_key_id=owner, key=key, size_bytes=1, idempotency_key=key, fingerprint=b"1"
        )
        await queue.do(uploads.finish, stored, timedelta(hours=1))
        await sql_async("UPDATE uploads SET expires_at = now() - $1::text::interval WHERE id = $2", age, upload_id)
        await _store(settings, key)
        return key

    needed, old, recent = await add("1 day"), await add("1 day"), await add("1 minute")
    await queue.submit(owner, image_url=None, image_key=needed)
    await queue.submit(owner)
    await sweeper.purge()
    assert _stored(settings) == {needed, recent}
    rows = await sql_async("SELECT key FROM uploads WHERE purged_at IS NOT NULL AND idempotency_key IS NULL")
    assert [row["key"] for row in rows] == [old]
    await queue.do(jobs.complete, await queue.take(), RESULT, "k", timedelta(hours=1))
    await sweeper.purge()
    assert _stored(settings) == {recent}


async def test_an_upload_that_never_came_in_whole_is_deleted_too(
    settings: Settings, database: Database, sweeper: Sweeper, sql_async: Any
) -> None:
    queue = Queue(database)
    owner, upload_id = await queue.add_key(), uuid4()
    late = NewUpload(id=upload_id, api_key_id=owner, key=f"uploads/{upload_id}.png", size_bytes=1)
    await queue.do(uploads.record, late, timedelta(0))
    await sql_async("UPDATE uploads SET expires_at = now() - interval '1 day'")
    await _store(settings, late.key)  # put there, and never named
    assert await sweeper.purge() == 1
    assert _stored(settings) == set()


async def test_an_object_that_cannot_be_deleted_is_tried_again(
    settings: Settings, database: Database, sweeper: Sweeper, sql_async: Any
) -> None:
    queue = Queue(database)
    job_id = await queue.submit(await queue.add_key())
    await queue.do(jobs.complete, await queue.take(), RESULT, f"results/{job_id}/1.png", timedelta(hours=1))
    await sql_async("UPDATE jobs SET purge_at = now()")
    stubborn = settings.storage_dir / f"results/{job_id}/1.png"
    stubborn.mkdir(parents=True)  # a folder is not deleted as a file is
    other = await queue.submit(await queue.add_key())
    await queue.do(jobs.complete, await queue.take(), RESULT, f"results/{other}/1.png", timedelta(hours=1))
    await _store(settings, f"results/{other}/1.png")
    await sql_async("UPDATE jobs SET purge_at = now() WHERE id = $1", other)
    assert await sweeper.purge() == 1  # nobody else has to wait for that
    assert _stored(settings) == {f"results/{job_id}/1.png"}
    stubborn.rmdir()
    await sql_async("UPDATE jobs SET purge_at = purge_at - $1::interval", retention.PUT_OFF)
    assert await sweeper.purge() == 1
    assert {row["purge_at"] for row in await sql_async("SELECT purge_at FROM jobs")} == {None}
