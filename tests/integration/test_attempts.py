"""The end of an attempt in SQL: fences, strikes, cancels, deadlines, and the delivery that is born with an end."""

from collections.abc import AsyncGenerator, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy.exc import IntegrityError

from core.errors import InputNotImage, JobNotCancellable, LeaseLost, NotFound, OutOfMemory, Stopped, StorageUnavailable
from core.settings import Settings
from db import census, jobs, workers
from db.jobs import Attempt, Changed
from db.models import JobStatus, WebhookEvent
from tests.queues import RESULT, Queue, open_queue

pytestmark = pytest.mark.anyio

HOUR = timedelta(hours=1)
LEASE = timedelta(seconds=30)
ENDS = (WebhookEvent.COMPLETED, WebhookEvent.FAILED, WebhookEvent.CANCELLED)


@pytest.fixture
async def queue(settings: Settings) -> AsyncGenerator[Queue]:
    async with open_queue(settings) as queue:
        yield queue


@pytest.fixture
async def owner(queue: Queue) -> UUID:
    return await queue.add_key()


async def _complete(queue: Queue, attempt: Attempt) -> None:
    await queue.do(jobs.complete, attempt, RESULT, f"results/a/{attempt.number}.png", HOUR)


async def _strike(queue: Queue, attempt: Attempt) -> JobStatus:
    return await queue.do(jobs.hand_back, attempt, 3, fault=StorageUnavailable("Away."))


async def _bury(queue: Queue) -> Sequence[Changed]:
    return await queue.do(jobs.bury, LEASE, 3)


async def _row(sql_async: Any, columns: str) -> tuple[Any, ...]:
    (row,) = await sql_async(f"SELECT {columns} FROM jobs")  # noqa: S608
    return tuple(row)


async def _row_count(sql_async: Any, condition: str) -> int:
    ((count,),) = await sql_async(f"SELECT count(*) FROM jobs WHERE {condition}")  # noqa: S608
    return count


async def _die(sql_async: Any, worker_id: UUID) -> None:
    """Let a worker have been silent for longer than its lease."""
    await sql_async("UPDATE workers SET beat_at = now() - interval '31 seconds' WHERE id = $1", worker_id)


async def test_a_job_ends_once(queue: Queue, owner: UUID, sql_async: Any) -> None:
    await queue.submit(owner)
    attempt = await queue.take()
    await _complete(queue, attempt)
    with pytest.raises(LeaseLost):
        await queue.do(jobs.fail, attempt, InputNotImage("late"))
    with pytest.raises(LeaseLost):
        await _strike(queue, attempt)
    assert await _row(sql_async, "status, result_key, error, strikes") == ("COMPLETED", "results/a/1.png", None, 0)


async def test_an_attempt_that_is_no_longer_current_changes_nothing(queue: Queue, owner: UUID, sql_async: Any) -> None:
    await queue.submit(owner, *ENDS)
    zombie = await queue.take()
    await queue.do(jobs.hand_back, zombie, 3)
    current = await queue.take()
    for late in (_complete, _strike):
        with pytest.raises(LeaseLost):
            await late(queue, zombie)
    with pytest.raises(LeaseLost):
        await queue.do(jobs.fail, zombie, InputNotImage("x"))
    assert await _row(sql_async, "status, attempt, strikes, (SELECT count(*) FROM deliveries)") == (
        *("PROCESSING", 2, 0, 0),
    )
    await _complete(queue, current)


async def test_an_end_that_is_said_twice_is_one_end_one_delivery_and_one_tally(
    queue: Queue, owner: UUID, sql_async: Any
) -> None:
    await queue.submit(owner, WebhookEvent.COMPLETED)
    attempt = await queue.take()
    for _ in range(2):  # as after a commit whose answer was lost
        await _complete(queue, attempt)
    (row,) = await sql_async("SELECT count(*), min(event), min(receiver) FROM deliveries")
    assert tuple(row) == (1, "completed", "https://example.com")
    assert await queue.do(census.read_tallies) == {"submitted": 1, "completed": 1}


@pytest.mark.parametrize(("wanted", "owed"), [(WebhookEvent.FAILED, 1), (WebhookEvent.COMPLETED, 0)])
async def test_a_delivery_is_owed_only_for_events_that_were_asked_for(
    queue: Queue, owner: UUID, sql_async: Any, wanted: WebhookEvent, owed: int
) -> None:
    await queue.submit(owner, wanted)
    await queue.do(jobs.fail, await queue.take(), InputNotImage("It is no picture."))
    assert await _row(sql_async, "status, error, error_code, (SELECT count(*) FROM deliveries)") == (
        *("FAILED", "It is no picture.", "input_not_image", owed),
    )


async def test_a_delivery_that_cannot_be_written_keeps_its_job_from_ending(
    queue: Queue, owner: UUID, sql_async: Any
) -> None:
    job_id = await queue.submit(owner, WebhookEvent.COMPLETED)
    attempt = await queue.take()
    await sql_async("INSERT INTO deliveries (job_id, event, url) VALUES ($1, 'completed', 'x')", job_id)
    with pytest.raises(IntegrityError):
        await _complete(queue, attempt)
    assert await _row(sql_async, "status") == ("PROCESSING",)
    assert await queue.do(census.read_tallies) == {"submitted": 1}


async def test_a_drain_costs_no_strike_and_keeps_the_place(queue: Queue, owner: UUID, sql_async: Any) -> None:
    first, second = await queue.submit(owner), await queue.submit(owner)
    for _ in range(5):
        attempt = await queue.take()
        assert attempt.job_id == first
        assert await queue.do(jobs.hand_back, attempt, 3) is JobStatus.QUEUED
    (row,) = await sql_async("SELECT attempt, strikes, started_at FROM jobs WHERE id = $1", first)
    assert tuple(row) == (5, 0, None)
    assert await queue.drain() == [first, second]


async def test_a_fault_lets_the_job_wait_and_may_reduce_it(queue: Queue, owner: UUID, sql_async: Any) -> None:
    await queue.submit(owner)
    attempt, fault = await queue.take(), OutOfMemory("Full.")
    pause = timedelta(minutes=1)
    await queue.do(jobs.hand_back, attempt, 3, fault=fault, pause=pause, small_tiles=True)
    assert await queue.claim() is None
    await sql_async("UPDATE jobs SET due_at = due_at - interval '1 minute'")
    again = await queue.take()
    assert (again.strikes, again.number, again.options["small_tiles"]) == (1, 2, True)
    assert again.options == {**attempt.options, "small_tiles": True}


async def test_the_last_strike_fails_the_job_with_its_fault(queue: Queue, owner: UUID, sql_async: Any) -> None:
    await queue.submit(owner, *ENDS)
    states = [await _strike(queue, await queue.take()) for _ in range(3)]
    assert states == [JobStatus.QUEUED, JobStatus.QUEUED, JobStatus.FAILED]
    assert await _row(sql_async, "error_code, error, strikes, completed_at IS NOT NULL, purge_at > now()") == (
        *("storage_unavailable", "Away.", 3, True, True),
    )
    (row,) = await sql_async("SELECT count(*), min(event) FROM deliveries")
    assert tuple(row) == (1, "failed")


async def test_a_job_that_kills_its_workers_fails_as_worker_lost(queue: Queue, owner: UUID, sql_async: Any) -> None:
    job_id = await queue.submit(owner, *ENDS)
    for state in (JobStatus.QUEUED, JobStatus.QUEUED, JobStatus.FAILED):
        worker_id = await queue.register()
        await queue.take(worker_id)
        await _die(sql_async, worker_id)
        assert await _bury(queue) == [Changed(job_id, state)]
    assert await _row(sql_async, "error_code, attempt, strikes") == ("worker_lost", 3, 3)
    assert await queue.do(census.read_tallies) == {"submitted": 1, "failed": 1}


async def test_jobs_of_dead_workers_are_taken_back_and_those_of_live_ones_are_not(
    queue: Queue, owner: UUID, sql_async: Any
) -> None:
    lost, kept = await queue.submit(owner), await queue.submit(owner)
    dead, live = await queue.register(), await queue.register()
    zombie, current = await queue.take(dead), await queue.take(live)
    await _die(sql_async, dead)
    assert await _bury(queue) == [Changed(lost, JobStatus.QUEUED)]
    assert await _bury(queue) == []
    assert (await queue.take(live)).job_id == lost
    with pytest.raises(LeaseLost):
        await _complete(queue, zombie)
    with pytest.raises(LeaseLost):
        await queue.claim(dead)
    assert current.job_id == kept
    await _complete(queue, current)


async def test_a_worker_that_registers_anew_brings_the_attempts_it_still_has_and_no_others(
    queue: Queue, owner: UUID, sql_async: Any
) -> None:
    kept, lost, ended = [await queue.submit(owner) for _ in range(3)]
    before, after = await queue.register(), uuid4()
    attempts = {attempt.job_id: attempt for attempt in [await queue.take(before) for _ in range(3)]}
    await _complete(queue, attempts[ended])
    for _ in range(2):  # as when the answer was lost
        await queue.do(workers.register, after, "tests", "none", [attempts[kept], attempts[ended]])
    await _die(sql_async, before)
    assert await _bury(queue) == [Changed(lost, JobStatus.QUEUED)]
    rows = await sql_async("SELECT id, status FROM jobs WHERE worker_id = $1", after)
    assert [tuple(row) for row in rows] == [(kept, "PROCESSING")]
    await queue.take(after)
    await _die(sql_async, after)
    assert len(await _bury(queue)) == 2
    zombie = attempts[lost]
    await queue.do(workers.register, uuid4(), "tests", "none", [zombie, attempts[kept]])
    assert await _row_count(sql_async, "status = 'PROCESSING'") == 0


async def test_a_claim_and_a_beat_both_keep_a_worker_alive(queue: Queue, owner: UUID, sql_async: Any) -> None:
    await queue.submit(owner)
    worker_id = await queue.register()
    await _die(sql_async, worker_id)
    attempt = await queue.take(worker_id)
    assert await _bury(queue) == []
    await _die(sql_async, worker_id)
    fates = [workers.Fate(owns=True, unwanted=False)]
    assert await queue.do(workers.beat, worker_id, 2.5, [attempt]) == workers.Heard(registered=True, fates=fates)
    assert await _bury(queue) == []
    (row,) = await sql_async("SELECT seconds_per_cost FROM workers")
    assert row["seconds_per_cost"] == 2.5


async def test_a_job_of_the_release_before_is_given_up_after_an_hour(queue: Queue, owner: UUID, sql_async: Any) -> None:
    job_id = await queue.submit(owner)
    await queue.take()
    await sql_async("UPDATE jobs SET worker_id = NULL, started_at = now() - interval '50 minutes'")
    assert await _bury(queue) == []
    await sql_async("UPDATE jobs SET started_at = now() - interval '70 minutes'")
    assert await _bury(queue) == [Changed(job_id, JobStatus.QUEUED)]


async def test_a_beat_tells_whether_the_attempt_is_current_and_wanted(
    queue: Queue, owner: UUID, sql_async: Any
) -> None:
    job_id = await queue.submit(owner, cancel_after=HOUR)
    worker_id = await queue.register()
    attempt = await queue.take(worker_id)

    async def hear(by: UUID) -> tuple[bool, bool, bool]:
        heard = await queue.do(workers.beat, by, None, [attempt])
        (fate,) = heard.fates
        return heard.registered, fate.owns, fate.unwanted

    assert await hear(worker_id) == (True, True, False)
    assert await queue.do(workers.beat, worker_id, None, []) == workers.Heard(registered=True, fates=[])
    await sql_async("UPDATE jobs SET deadline_at = now() - interval '1 second'")
    assert await hear(worker_id) == (True, True, True)
    await sql_async("UPDATE jobs SET deadline_at = NULL")
    await queue.do(jobs.cancel, job_id, owner)
    assert await hear(worker_id) == (True, True, True)
    await queue.do(jobs.hand_back, attempt, 3)
    assert await hear(worker_id) == (True, False, False)
    assert await hear(uuid4()) == (False, False, False)


async def test_a_queued_job_is_cancelled_at_once(queue: Queue, owner: UUID, sql_async: Any) -> None:
    job_id = await queue.submit(owner, *ENDS)
    for _ in range(2):
        assert await queue.do(jobs.cancel, job_id, owner) is None
    assert await queue.claim() is None
    assert await _row(sql_async, "status, error, (SELECT string_agg(event, ',') FROM deliveries)") == (
        *("CANCELLED", None, "cancelled"),
    )
    assert await queue.do(census.read_tallies) == {"submitted": 1, "cancelled": 1}


async def test_a_running_job_is_cancelled_when_its_attempt_stops(queue: Queue, owner: UUID, sql_async: Any) -> None:
    job_id = await queue.submit(owner, *ENDS)
    worker_id = await queue.register()
    attempt = await queue.take(worker_id)
    for _ in range(2):
        assert await queue.do(jobs.cancel, job_id, owner) == worker_id
    with pytest.raises(Stopped):
        await _complete(queue, attempt)
    assert await _row(sql_async, "status, result_key, completed_at") == ("PROCESSING", None, None)
    assert await queue.do(jobs.hand_back, attempt, 3) is JobStatus.CANCELLED
    assert await _row(sql_async, "status, error, (SELECT string_agg(event, ',') FROM deliveries)") == (
        *("CANCELLED", None, "cancelled"),
    )


async def test_a_cancelled_job_whose_worker_dies_is_not_run_again(queue: Queue, owner: UUID, sql_async: Any) -> None:
    job_id = await queue.submit(owner)
    worker_id = await queue.register()
    await queue.take(worker_id)
    await queue.do(jobs.cancel, job_id, owner)
    await queue.do(workers.unregister, worker_id)
    assert await _bury(queue) == [Changed(job_id, JobStatus.CANCELLED)]
    assert await _row(sql_async, "error_code") == (None,)


async def test_what_is_over_or_another_s_cannot_be_cancelled(queue: Queue, owner: UUID) -> None:
    job_id = await queue.submit(owner)
    with pytest.raises(NotFound):
        await queue.do(jobs.cancel, job_id, await queue.add_key())
    await _complete(queue, await queue.take())
    with pytest.raises(JobNotCancellable):
        await queue.do(jobs.cancel, job_id, owner)


async def test_a_job_whose_deadline_passes_in_the_queue_is_cancelled(queue: Queue, owner: UUID, sql_async: Any) -> None:
    job_id = await queue.submit(owner, *ENDS, cancel_after=HOUR)
    assert await queue.do(jobs.expire) == []
    await sql_async("UPDATE jobs SET deadline_at = now()")
    assert await queue.do(jobs.expire) == [Changed(job_id, JobStatus.CANCELLED)]
    assert await queue.do(jobs.expire) == []
    assert await _row(sql_async, "error_code, (SELECT string_agg(event, ',') FROM deliveries)") == (
        *("deadline_exceeded", "cancelled"),
    )


async def test_a_job_whose_deadline_passes_while_it_runs_is_cancelled_when_handed_back(
    queue: Queue, owner: UUID, sql_async: Any
) -> None:
    await queue.submit(owner, cancel_after=HOUR)
    attempt = await queue.take()
    await sql_async("UPDATE jobs SET deadline_at = now()")
    assert await queue.do(jobs.expire) == []
    assert await _strike(queue, attempt) is JobStatus.CANCELLED
    assert await _row(sql_async, "error_code") == ("deadline_exceeded",)
