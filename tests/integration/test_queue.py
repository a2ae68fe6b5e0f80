"""The queue in SQL: how a job gets in, and whose turn it is."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import anyio
import pytest

from core.errors import IdempotencyKeyReused, LeaseLost, TooManyQueued
from core.options import UpscaleOptions
from core.settings import Settings
from db import census, estimates, jobs, queue, uploads, workers
from db.models import JobStatus
from db.uploads import NewUpload
from tests.queues import RESULT, Queue, open_queue

pytestmark = pytest.mark.anyio

HOUR = timedelta(hours=1)
LEASE = timedelta(seconds=30)


@pytest.fixture
async def tested(settings: Settings) -> AsyncGenerator[Queue]:
    async with open_queue(settings) as queue:
        yield queue


@pytest.fixture
async def owner(tested: Queue) -> UUID:
    return await tested.add_key()


async def _together(count: int, act: Callable[[], Any]) -> list[Any]:
    return await asyncio.gather(*(act() for _ in range(count)), return_exceptions=True)


async def test_jobs_of_one_key_are_claimed_oldest_first(tested: Queue, owner: UUID) -> None:
    submitted = [await tested.submit(owner) for _ in range(3)]
    assert await tested.drain() == submitted


async def test_a_claim_finds_nothing_in_an_empty_queue(tested: Queue) -> None:
    assert await tested.claim() is None


async def test_a_claim_carries_the_options_and_counts_the_attempt(tested: Queue, owner: UUID) -> None:
    options = UpscaleOptions(scale_factor=4)
    await tested.submit(owner, options=options)
    attempt = await tested.take()
    assert (attempt.number, attempt.strikes, attempt.cost) == (1, 0, 4)
    assert (attempt.image_url, attempt.wants_progress) == ("https://example.com/a.png", False)
    assert UpscaleOptions.model_validate(attempt.options) == options


async def test_a_claim_by_a_worker_that_was_forgotten_takes_nothing(tested: Queue, owner: UUID, sql_async: Any) -> None:
    await tested.submit(owner)
    with pytest.raises(LeaseLost):
        await tested.claim(uuid4())
    (row,) = await sql_async("SELECT status, attempt FROM jobs")
    assert tuple(row) == ("QUEUED", 0)


async def test_the_turn_of_a_job_that_was_lost_before_waits_for_a_worker_with_empty_hands(
    tested: Queue, owner: UUID, sql_async: Any
) -> None:
    struck = await tested.submit(owner)
    await tested.submit(owner)
    await sql_async("UPDATE jobs SET strikes = 1, priority = 1 WHERE id = $1", struck)
    busy = await tested.register()
    for first in (struck, None):  # also when it is the first by its priority only
        if first is None:
            await sql_async("UPDATE jobs SET tag = 9 WHERE id = $1", struck)
        assert await tested.do(queue.claim, busy, "tests", beside_others=True) is None
    tags = await sql_async("SELECT tag FROM jobs WHERE id = $1", struck)
    assert [row["tag"] for row in tags] == [9]
    assert (await tested.take()).job_id == struck
    assert await tested.do(queue.claim, busy, "tests", beside_others=True) is not None


async def test_concurrent_claims_never_share_a_job(tested: Queue, owner: UUID) -> None:
    submitted = {await tested.submit(owner) for _ in range(40)}
    claimed = [job_id for ids in await _together(8, tested.drain) for job_id in ids]
    claimed += await tested.drain()  # a claim may come back empty while others hold the locks
    assert len(claimed) == len(set(claimed))
    assert set(claimed) == submitted


async def test_submits_of_one_key_that_come_together_never_lock_each_other_out(tested: Queue, owner: UUID) -> None:
    async def submit_many() -> None:
        for _ in range(40):
            await tested.submit(owner)

    async def upload_many() -> None:  # whose rows share a lock on the key's
        for _ in range(40):
            name = uuid4()
            upload = NewUpload(id=name, api_key_id=owner, key=f"uploads/{name}.png", size_bytes=1)
            await tested.do(uploads.record, upload, timedelta(hours=1))

    await asyncio.gather(*(submit_many() for _ in range(6)), *(upload_many() for _ in range(4)))


async def test_a_flood_of_one_key_does_not_delay_another(tested: Queue, owner: UUID) -> None:
    for _ in range(20):
        await tested.submit(owner)
    late = await tested.submit(await tested.add_key())
    assert late in (await tested.drain())[:2]


async def test_a_key_of_twice_the_weight_gets_twice_as_much(tested: Queue, owner: UUID) -> None:
    heavy = await tested.add_key(weight=2)
    owners = {await tested.submit(key): key for _ in range(20) for key in (owner, heavy)}
    shares = Counter(owners[job_id] for job_id in (await tested.drain())[:15])
    assert abs(shares[heavy] - 10) <= 1


async def test_a_costly_job_counts_as_much_as_several_cheap_ones(tested: Queue, owner: UUID) -> None:
    costly = await tested.add_key()
    large = UpscaleOptions(scale_factor=4)  # four times the area
    owners = {await tested.submit(owner): owner for _ in range(16)}
    owners |= {await tested.submit(costly, options=large): costly for _ in range(16)}
    shares = Counter(owners[job_id] for job_id in (await tested.drain())[:15])
    assert abs(shares[costly] - 3) <= 1


async def test_a_key_that_was_idle_has_saved_nothing_up(tested: Queue, owner: UUID) -> None:
    for _ in range(20):
        await tested.submit(owner)
    for _ in range(15):
        attempt = await tested.take()
        await tested.do(jobs.complete, attempt, RESULT, "results/a/1.png", HOUR)
    await tested.take()  # the queue's virtual time is that of what runs
    idle = await tested.add_key()
    owners = {await tested.submit(idle): idle for _ in range(10)}
    shares = Counter(owners.get(job_id, owner) for job_id in (await tested.drain())[:6])
    assert abs(shares[idle] - 3) <= 1


async def test_once_everything_is_done_it_is_forgotten_who_did_how_much(tested: Queue, owner: UUID) -> None:
    for _ in range(20):
        await tested.submit(owner)
    for _ in range(20):
        await tested.do(jobs.complete, await tested.take(), RESULT, "results/a/1.png", HOUR)
    await tested.do(estimates.measure, LEASE)
    fresh = await tested.add_key()
    owners = {await tested.submit(key): key for _ in range(4) for key in (fresh, owner)}
    shares = Counter(owners[job_id] for job_id in (await tested.drain())[:4])
    assert shares == {owner: 2, fresh: 2}


async def test_a_job_of_higher_priority_goes_before_the_others_of_its_key(tested: Queue, owner: UUID) -> None:
    low, high = await tested.submit(owner), await tested.submit(owner, priority=5)
    assert await tested.drain() == [high, low]


async def test_priorities_change_nothing_between_keys(tested: Queue, owner: UUID) -> None:
    other = await tested.add_key()
    owners: dict[UUID, UUID] = {}
    for number in range(8):
        owners[await tested.submit(owner, priority=number)] = owner
        owners[await tested.submit(other)] = other
    taken = [owners[job_id] for job_id in await tested.drain()]
    assert all({*taken[turn : turn + 2]} == {owner, other} for turn in range(0, 16, 2))


async def test_a_job_that_is_due_later_is_not_claimed_before(tested: Queue, owner: UUID, sql_async: Any) -> None:
    await tested.submit(owner)
    await sql_async("UPDATE jobs SET due_at = now() + interval '1 minute'")
    assert await tested.claim() is None
    assert await tested.do(queue.count_claimable, timedelta(0), 10) == 0
    await sql_async("UPDATE jobs SET due_at = now() - interval '1 second'")
    assert await tested.do(queue.count_claimable, timedelta(0), 10) == 1
    await tested.take()


async def test_a_job_whose_deadline_has_passed_is_never_claimed(tested: Queue, owner: UUID, sql_async: Any) -> None:
    await tested.submit(owner, cancel_after=HOUR, priority=9)
    await sql_async("UPDATE jobs SET deadline_at = now() - interval '1 second'")
    assert await tested.claim() is None
    assert await tested.do(queue.count_claimable, timedelta(0), 10) == 0
    other = await tested.submit(owner)
    assert await tested.drain() == [other]


async def test_no_more_jobs_of_a_key_run_than_may_however_many_claim_at_once(tested: Queue, sql_async: Any) -> None:
    limited = await tested.add_key(max_concurrent=3)
    for _ in range(30):
        await tested.submit(limited)
    claims = await _together(20, tested.claim)
    assert sum(isinstance(attempt, jobs.Attempt) for attempt in claims) <= 3
    await tested.drain()
    rows = await sql_async("SELECT slot FROM jobs WHERE status = 'PROCESSING' ORDER BY slot")
    assert [row["slot"] for row in rows] == [1, 2, 3]


async def test_a_key_at_its_limit_does_not_hold_up_the_others(tested: Queue, owner: UUID) -> None:
    limited = await tested.add_key(max_concurrent=1)
    waiting = [await tested.submit(limited) for _ in range(3)]
    others = {await tested.submit(owner) for _ in range(3)}
    first = await tested.take()
    assert {first.job_id, *await tested.drain()} == {waiting[0], *others}
    assert await tested.do(queue.count_claimable, timedelta(0), 10) == 0
    await tested.do(jobs.complete, first if first.job_id == waiting[0] else _of(waiting[0]), RESULT, "k", HOUR)
    assert await tested.drain() == [waiting[1]]


def _of(job_id: UUID) -> jobs.Attempt:
    return jobs.Attempt(job_id, 1, {}, None, None, 1, 0, wants_progress=False)


async def test_a_limit_that_is_set_while_jobs_run_counts_them(tested: Queue, owner: UUID, sql_async: Any) -> None:
    for _ in range(5):
        await tested.submit(owner)
    running = [await tested.take() for _ in range(2)]
    await sql_async("UPDATE api_keys SET max_concurrent = 2")
    assert await tested.claim() is None
    await tested.do(jobs.complete, running[0], RESULT, "k", HOUR)
    assert len(await tested.drain()) == 1


async def test_a_key_may_have_so_many_jobs_waiting_and_no_more(tested: Queue, owner: UUID, sql_async: Any) -> None:
    limited = await tested.add_key(max_queued=2)
    for _ in range(2):
        await tested.submit(limited)
    with pytest.raises(TooManyQueued):
        await tested.submit(limited)
    await tested.submit(owner)
    await tested.take()
    await tested.take()
    await tested.submit(limited)
    (row,) = await sql_async("SELECT count(*) FROM jobs")
    assert row["count"] == 4


async def test_the_settings_limit_holds_for_keys_without_their_own(tested: Queue, owner: UUID) -> None:
    await tested.submit(owner, max_queued=1)
    with pytest.raises(TooManyQueued):
        await tested.submit(owner, max_queued=1)
    generous = await tested.add_key(max_queued=2)
    for _ in range(2):
        await tested.submit(generous, max_queued=1)


async def test_a_refused_submit_does_not_move_its_key_s_turn(tested: Queue, sql_async: Any) -> None:
    limited = await tested.add_key(max_queued=1)
    await tested.submit(limited)
    await _together(5, lambda: tested.submit(limited))
    (row,) = await sql_async("SELECT next_tag FROM api_keys")
    assert row["next_tag"] == 1


async def test_a_hundred_submits_with_one_idempotency_key_make_one_job(
    tested: Queue, owner: UUID, sql_async: Any
) -> None:
    submitted = await _together(100, lambda: tested.ask(owner, idempotency_key="k", fingerprint=b"1"))
    assert len({answer.id for answer in submitted}) == 1
    assert sum(not answer.replayed for answer in submitted) == 1
    (row,) = await sql_async("SELECT count(*) FROM jobs")
    assert row["count"] == 1
    assert await tested.do(census.read_tallies) == {"submitted": 1}


async def test_submits_that_come_together_get_one_turn_after_the_other(
    tested: Queue, owner: UUID, sql_async: Any
) -> None:
    await _together(50, lambda: tested.submit(owner))
    rows = await sql_async("SELECT tag, (SELECT next_tag FROM api_keys) AS next FROM jobs ORDER BY tag")
    assert [(row["tag"], row["next"]) for row in rows] == [(number, 50) for number in range(50)]


async def test_a_repeated_submit_does_not_move_its_key_s_turn(tested: Queue, owner: UUID, sql_async: Any) -> None:
    await _together(20, lambda: tested.ask(owner, idempotency_key="k", fingerprint=b"1"))
    await tested.ask(owner, idempotency_key="k", fingerprint=b"1")
    (row,) = await sql_async("SELECT next_tag FROM api_keys")
    assert row["next_tag"] == 1


async def test_an_idempotency_key_that_comes_with_another_request_is_refused(tested: Queue, owner: UUID) -> None:
    await tested.ask(owner, idempotency_key="k", fingerprint=b"1")
    with pytest.raises(IdempotencyKeyReused):
        await tested.ask(owner, idempotency_key="k", fingerprint=b"2")


async def test_a_repetition_says_what_has_become_of_its_job_even_when_there_is_no_room(tested: Queue) -> None:
    limited = await tested.add_key(max_queued=1)
    job_id = await tested.submit(limited, idempotency_key="k", fingerprint=b"1")
    await tested.take()
    await tested.submit(limited)
    again = await tested.ask(limited, idempotency_key="k", fingerprint=b"1")
    assert (again.id, again.status, again.replayed) == (job_id, JobStatus.PROCESSING, True)


async def test_an_idempotency_key_is_free_after_a_day(tested: Queue, owner: UUID, sql_async: Any) -> None:
    first = await tested.submit(owner, idempotency_key="k", fingerprint=b"1")
    await sql_async("UPDATE jobs SET created_at = now() - interval '23 hours'")
    await tested.do(queue.free_idempotency_keys)
    assert await tested.submit(owner, idempotency_key="k", fingerprint=b"1") == first
    await sql_async("UPDATE jobs SET created_at = now() - interval '25 hours'")
    await tested.do(queue.free_idempotency_keys)
    assert await tested.submit(owner, idempotency_key="k", fingerprint=b"2") != first


async def test_what_is_asked_every_moment_reads_no_job_that_is_over(
    settings: Settings, tested: Queue, owner: UUID, sql_async: Any
) -> None:
    await sql_async(
        "INSERT INTO jobs (id, api_key_id, status, model, input, options, image_url, completed_at)"
        " SELECT gen_random_uuid(), $1, 'FAILED', 'm', '{}', '{}', 'u', now() FROM generate_series(1, 5000)",
        owner,
    )
    for _ in range(3):
        await tested.submit(owner, cancel_after=HOUR)
    dead = await tested.register()
    await tested.take(dead)
    await tested.do(workers.unregister, dead)
    await sql_async("ANALYZE")
    await sql_async("SELECT pg_stat_reset()")
    async with open_queue(settings) as busy:
        await busy.do(queue.count_claimable, timedelta(0), 10)
        assert len(await busy.do(jobs.bury, LEASE, 3)) == 1
        await busy.do(jobs.expire)
        await busy.do(estimates.measure, LEASE)
        await busy.do(estimates.cost_before, owner)
        place = await busy.submit(owner)
        await busy.do(estimates.find_place, place)
        attempt = await busy.take()
        await busy.do(workers.beat, uuid4(), None, [attempt])
        await busy.do(jobs.complete, attempt, RESULT, "k", HOUR)
        await busy.do(queue.free_idempotency_keys)
    await anyio.sleep(0.5)  # a connection that ends tells what it read
    (row,) = await sql_async("SELECT seq_tup_read, idx_tup_fetch FROM pg_stat_user_tables WHERE relname = 'jobs'")
    assert row["seq_tup_read"] == 0
    assert 0 < row["idx_tup_fetch"] < 200
