"""How many pixels a key may have made in a day: they are counted, refused when they are spent, and forgotten."""

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import anyio
import pytest
from starlette.testclient import TestClient

from core import progress
from core.errors import InputNotImage, LeaseLost, StorageUnavailable, UploadFailed
from core.queue import Hints
from core.settings import Settings
from core.storage import open_storage
from db import jobs, usage
from db.jobs import Attempt
from db.session import Database
from tests.queues import RESULT, Queue, open_queue
from tests.requests import body_of, png, upload
from worker.sweeps import Sweeper

Sql = Callable[..., Sequence[Any]]

HOUR = timedelta(hours=1)
TODAY = "(now() AT TIME ZONE 'utc')::date"
WIDE = replace(RESULT, width=70_000, height=60_000)  # more pixels than fit into 32 bits


@pytest.fixture
async def queue(settings: Settings) -> AsyncGenerator[Queue]:
    async with open_queue(settings) as queue:
        yield queue


async def _attempt(queue: Queue, owner: UUID, **values: Any) -> Attempt:
    await queue.submit(owner, **values)
    return await queue.take()


@pytest.mark.anyio
async def test_each_result_is_counted_once_for_its_key_and_day(queue: Queue, sql_async: Any) -> None:
    owner, other = await queue.add_key(), await queue.add_key()
    refused = UploadFailed("The caller's URL did not take it.")  # but made it was
    made = ((owner, RESULT, None), (owner, WIDE, refused), (owner, RESULT, None), (other, RESULT, None))
    for number, (key, result, failure) in enumerate(made):
        attempt = await _attempt(queue, key, id=UUID(int=(number // 2) % 2 + 16 * number))  # two share a row
        for _ in range(2):  # a worker whose answer was lost says it again
            await queue.do(jobs.complete, attempt, result, "k", HOUR, failure)
    assert (await queue.do(usage.read_today, owner)).pixels == 4 + 70_000 * 60_000 + 4
    assert (await queue.do(usage.read_today, other)).pixels == 4
    counted = await sql_async(f"SELECT api_key_id, sum(jobs) FROM usage WHERE day = {TODAY} GROUP BY 1")  # noqa: S608
    assert {row[0]: row[1] for row in counted} == {owner: 3, other: 1}


@pytest.mark.anyio
async def test_what_made_nothing_is_not_counted(queue: Queue, sql_async: Any) -> None:
    owner = await queue.add_key()
    await queue.do(jobs.fail, await _attempt(queue, owner), InputNotImage("No image."))
    await queue.do(jobs.hand_back, await _attempt(queue, owner), 1, fault=StorageUnavailable("Away."))
    lost = await _attempt(queue, owner)
    await queue.do(jobs.hand_back, lost, 3)
    with pytest.raises(LeaseLost):
        await queue.do(jobs.complete, lost, RESULT, "k", HOUR)
    assert await sql_async("SELECT * FROM usage") == []


@pytest.mark.anyio
async def test_a_day_lasts_until_midnight_of_utc_whatever_the_servers_own_clock_shows(
    settings: Settings, queue: Queue, database_url: str, sql_async: Any
) -> None:
    owner = await queue.add_key()
    for hours in ("Etc/GMT+12", "Etc/GMT-14"):  # wherever one is, in one of the two it is another day than by UTC
        name = database_url.rpartition("/")[2]
        await sql_async(f"ALTER DATABASE {name} SET timezone = '{hours}'")
        async with open_queue(settings) as elsewhere:
            attempt = await _attempt(elsewhere, owner)
            await elsewhere.do(jobs.complete, attempt, RESULT, "k", HOUR)
            today = await elsewhere.do(usage.read_today, owner)
        now = datetime.now(UTC)
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
        assert abs(today.seconds_left - (midnight - now).total_seconds()) < 5
    assert (await queue.do(usage.read_today, owner)).pixels == 8
    assert await sql_async(f"SELECT DISTINCT day = {TODAY} FROM usage") == [(True,)]  # noqa: S608
    await sql_async("UPDATE usage SET day = day - 1")
    assert (await queue.do(usage.read_today, owner)).pixels == 0


def _submit(client: TestClient, image: str = "https://example.com/a.png", **headers: str) -> Any:
    return client.post("/v2/images/upscale", json=body_of(image), headers=headers)


def test_a_key_whose_pixels_are_spent_is_refused_until_tomorrow(
    client: TestClient, sql: Sql, work: Callable[[], int]
) -> None:
    sql("UPDATE api_keys SET daily_pixels = 100")
    image = upload(client, png(4, 4))
    first, second = (_submit(client, image, **{"Idempotency-Key": name}) for name in "ab")
    assert [first.status_code, second.status_code] == [202, 202]  # what is under way does not count
    seconds = (usage_left := first.headers["RateLimit"]).rpartition("t=")[2]
    assert usage_left == f'"daily-pixels";r=100;t={seconds}'
    assert 0 < int(seconds) <= 86_400
    assert first.headers["RateLimit-Policy"] == '"daily-pixels";q=100;w=86400;qu="pixels"'

    assert work() == 2  # and is finished, although its second half is too much
    assert sql("SELECT DISTINCT status FROM jobs") == [("COMPLETED",)]
    refused = _submit(client)
    assert (refused.status_code, refused.json()["code"]) == (429, "daily_pixels_spent")
    assert refused.headers["RateLimit"].startswith('"daily-pixels";r=0;t=')
    assert "Retry-After" not in refused.headers  # some clients would sleep for hours
    assert client.get("/v2/me").status_code == 200

    replayed = _submit(client, image, **{"Idempotency-Key": "a"})
    assert (replayed.status_code, replayed.json()["jobId"]) == (202, first.json()["jobId"])
    sql("UPDATE usage SET day = day - 1")
    assert _submit(client).status_code == 202


def test_the_last_pixel_may_be_spent_and_no_more(client: TestClient, sql: Sql) -> None:
    sql("UPDATE api_keys SET daily_pixels = 100")
    sql(f"INSERT INTO usage SELECT id, {TODAY}, 3, 1, 60 FROM api_keys")  # noqa: S608
    sql(f"INSERT INTO usage SELECT id, {TODAY}, 4, 1, 39 FROM api_keys")  # noqa: S608
    accepted = _submit(client)
    assert accepted.status_code == 202
    assert accepted.headers["RateLimit"].startswith('"daily-pixels";r=1;')
    sql("UPDATE usage SET pixels = 40 WHERE shard = 4")
    assert _submit(client).status_code == 429


def test_with_a_rate_as_well_the_answer_tells_of_both(client: TestClient, sql: Sql) -> None:
    sql("UPDATE api_keys SET daily_pixels = 100, requests_per_minute = 9")
    answers = [_submit(client)]
    sql(f"INSERT INTO usage SELECT id, {TODAY}, 3, 1, 100 FROM api_keys")  # noqa: S608
    answers.append(_submit(client))
    assert [answer.status_code for answer in answers] == [202, 429]
    for answer in answers:
        assert answer.headers["RateLimit-Policy"] == '"requests";q=9;w=60, "daily-pixels";q=100;w=86400;qu="pixels"'
        assert [part.partition(";")[0] for part in answer.headers["RateLimit"].split(", ")] == [
            '"requests"',
            '"daily-pixels"',
        ]


def test_a_key_without_a_limit_is_told_nothing_and_costs_no_query(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(usage, "read_today")
    answer = _submit(client)
    assert answer.status_code == 202
    assert "RateLimit" not in answer.headers


@pytest.mark.anyio
async def test_the_sweep_forgets_usage_of_long_ago_and_looks_for_it_seldom(
    settings: Settings, queue: Queue, sql_async: Any
) -> None:
    owner = await queue.add_key()
    ages = f"INSERT INTO usage SELECT $1, {TODAY} - age, 0, 1, 1 FROM unnest(ARRAY[0, 35, 36, 400]) age"  # noqa: S608
    await sql_async(ages, owner)
    database, redis, hints = Database(settings), progress.connect(settings), Hints(settings)
    sweeper = Sweeper(settings, database, redis, hints, open_storage(settings))
    rows = f"SELECT {TODAY} - day AS age FROM usage ORDER BY 1"  # noqa: S608
    async with anyio.create_task_group() as sweeping:
        sweeping.start_soon(sweeper.run)
        for _ in range(250):
            if len(await sql_async(rows)) <= 2:
                break
            await anyio.sleep(0.02)
        sweeping.cancel_scope.cancel()
    assert [row["age"] for row in await sql_async(rows)] == [0, 35]
    await sql_async(f"INSERT INTO usage SELECT $1, {TODAY} - 36, 0, 1, 1", owner)
    await sweeper.forget_usage()
    assert len(await sql_async(rows)) == 3
    hints.close()
    await redis.aclose()
    await database.close()
