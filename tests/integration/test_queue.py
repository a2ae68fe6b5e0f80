"""The life of a job in SQL: claims, fences, and the delivery that is born with an end."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import insert
from sqlalchemy.exc import IntegrityError

from core.errors import InputNotImage, LeaseLost
from core.options import OutputFormat, UpscaleOptions
from core.settings import Settings
from db import jobs
from db.jobs import Attempt, NewJob, Result
from db.models import ApiKey, WebhookEvent
from db.session import Database

pytestmark = pytest.mark.anyio

Sql = Callable[..., list[Any]]

HOUR = timedelta(hours=1)
RESULT = Result(engine="none", format=OutputFormat.PNG, width=2, height=2, size_bytes=9, sha256="00", seed=1)


@pytest.fixture
async def database(settings: Settings) -> AsyncGenerator[Database]:
    database = Database(settings)
    yield database
    await database.close()


@pytest.fixture
async def owner(database: Database) -> UUID:
    """The id of an API key."""
    owner = uuid4()
    async with database.connection() as connection:
        await connection.execute(insert(ApiKey), {"id": owner, "name": "tests", "prefix": "upk_", "hash": b"x"})
    return owner


async def _submit(database: Database, owner: UUID, *events: WebhookEvent) -> UUID:
    job = NewJob(
        id=uuid4(),
        api_key_id=owner,
        model="clarity-upscale",
        input={},
        options=UpscaleOptions(),
        image_url="https://example.com/a.png",
        webhook_url="https://example.com/hook" if events else None,
        webhook_events=events,
    )
    async with database.connection() as connection:
        await jobs.submit(connection, job)
    return job.id


async def _claim(database: Database) -> Attempt:
    async with database.connection() as connection:
        attempt = await jobs.claim(connection, "tests")
    assert attempt is not None
    return attempt


async def test_jobs_are_claimed_oldest_first(database: Database, owner: UUID) -> None:
    submitted = [await _submit(database, owner) for _ in range(3)]
    assert [(await _claim(database)).job_id for _ in range(3)] == submitted


async def test_a_claim_finds_nothing_in_an_empty_queue(database: Database) -> None:
    async with database.connection() as connection:
        assert await jobs.claim(connection, "tests") is None


async def test_a_claim_carries_the_options_and_counts_the_attempt(database: Database, owner: UUID) -> None:
    await _submit(database, owner)
    attempt = await _claim(database)
    assert (attempt.number, attempt.image_url) == (1, "https://example.com/a.png")
    assert UpscaleOptions.model_validate(attempt.options) == UpscaleOptions()


async def test_concurrent_claims_never_share_a_job(database: Database, owner: UUID) -> None:
    submitted = {await _submit(database, owner) for _ in range(40)}

    async def claim_all() -> list[UUID]:
        claimed: list[UUID] = []
        while len(claimed) < len(submitted):
            async with database.connection() as connection:
                attempt = await jobs.claim(connection, "tests")
            if attempt is None:
                break
            claimed.append(attempt.job_id)
        return claimed

    claimed = [job_id for ids in await asyncio.gather(*(claim_all() for _ in range(8))) for job_id in ids]
    assert len(claimed) == len(set(claimed))
    while len(claimed) < len(submitted):  # a claim may come back empty while others hold the locks
        claimed.append((await _claim(database)).job_id)
    assert set(claimed) == submitted


async def test_a_job_ends_once(database: Database, owner: UUID, sql_async: Any) -> None:
    await _submit(database, owner)
    attempt = await _claim(database)
    async with database.connection() as connection:
        await jobs.complete(connection, attempt, RESULT, "results/a/1.png", HOUR)
        with pytest.raises(LeaseLost):
            await jobs.fail(connection, attempt, InputNotImage("late"))
    (row,) = await sql_async("SELECT status, result_key, error FROM jobs")
    assert tuple(row) == ("COMPLETED", "results/a/1.png", None)


async def test_an_attempt_that_is_no_longer_current_changes_nothing(
    database: Database, owner: UUID, sql_async: Any
) -> None:
    await _submit(database, owner, WebhookEvent.COMPLETED, WebhookEvent.FAILED)
    zombie = await _claim(database)
    await sql_async("UPDATE jobs SET status = 'QUEUED'")
    current = await _claim(database)
    async with database.connection() as connection:
        assert not await jobs.is_current(connection, zombie)
        assert await jobs.is_current(connection, current)
        with pytest.raises(LeaseLost):
            await jobs.complete(connection, zombie, RESULT, "results/a/1.png", HOUR)
        with pytest.raises(LeaseLost):
            await jobs.fail(connection, zombie, InputNotImage("x"))
    (row,) = await sql_async("SELECT status, attempt, (SELECT count(*) FROM deliveries) FROM jobs")
    assert tuple(row) == ("PROCESSING", 2, 0)


async def test_an_end_that_is_said_twice_is_one_end_and_one_delivery(
    database: Database, owner: UUID, sql_async: Any
) -> None:
    await _submit(database, owner, WebhookEvent.COMPLETED)
    attempt = await _claim(database)
    async with database.connection() as connection:
        for _ in range(2):  # as after a commit whose answer was lost
            await jobs.complete(connection, attempt, RESULT, "results/a/1.png", HOUR)
    (row,) = await sql_async("SELECT count(*), min(event) FROM deliveries")
    assert tuple(row) == (1, "completed")


@pytest.mark.parametrize(("wanted", "owed"), [(WebhookEvent.FAILED, 1), (WebhookEvent.COMPLETED, 0)])
async def test_a_delivery_is_owed_only_for_events_that_were_asked_for(
    database: Database, owner: UUID, sql_async: Any, wanted: WebhookEvent, owed: int
) -> None:
    await _submit(database, owner, wanted)
    attempt = await _claim(database)
    async with database.connection() as connection:
        await jobs.fail(connection, attempt, InputNotImage("It is no picture."))
    (row,) = await sql_async("SELECT status, error, error_code, (SELECT count(*) FROM deliveries) FROM jobs")
    assert tuple(row) == ("FAILED", "It is no picture.", "input_not_image", owed)


async def test_a_delivery_that_cannot_be_written_keeps_its_job_from_ending(
    database: Database, owner: UUID, sql_async: Any
) -> None:
    job_id = await _submit(database, owner, WebhookEvent.COMPLETED)
    attempt = await _claim(database)
    await sql_async("INSERT INTO deliveries (job_id, event, url) VALUES ($1, 'completed', 'x')", job_id)
    with pytest.raises(IntegrityError):
        async with database.connection() as connection:
            await jobs.complete(connection, attempt, RESULT, "results/a/1.png", HOUR)
    (row,) = await sql_async("SELECT status FROM jobs")
    assert row["status"] == "PROCESSING"


async def test_the_claim_reads_the_index_of_queued_jobs(database: Database, owner: UUID, sql_async: Any) -> None:
    await sql_async(
        "INSERT INTO jobs (id, api_key_id, status, model, input, options, image_url, created_at)"
        " SELECT gen_random_uuid(), $1, 'FAILED', 'm', '{}', '{}', 'u', now() FROM generate_series(1, 5000)",
        owner,
    )
    for _ in range(3):
        await _submit(database, owner)
    await sql_async("ANALYZE jobs")
    plan = await sql_async(
        "EXPLAIN SELECT id FROM jobs WHERE status = 'QUEUED' ORDER BY created_at, id LIMIT 1 FOR UPDATE SKIP LOCKED"
    )
    assert "jobs_queued_idx" in "\n".join(row[0] for row in plan)
