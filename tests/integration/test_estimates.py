"""What is told of the queue: where a job stands, and how long it will take to start."""

from collections.abc import AsyncGenerator
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from core.options import UpscaleOptions
from core.settings import Settings
from db import estimates, jobs, workers
from db.estimates import Place
from tests.queues import RESULT, Queue, open_queue

pytestmark = pytest.mark.anyio

HOUR = timedelta(hours=1)
LEASE = timedelta(seconds=30)


@pytest.fixture
async def queue(settings: Settings) -> AsyncGenerator[Queue]:
    async with open_queue(settings) as queue:
        yield queue


@pytest.fixture
async def owner(queue: Queue) -> UUID:
    return await queue.add_key()


async def test_a_job_s_place_is_what_is_claimed_before_it(queue: Queue, owner: UUID) -> None:
    other = await queue.add_key()
    large = UpscaleOptions(scale_factor=4)
    submitted = [await queue.submit(key, options=large) for key in (owner, owner, other, other, owner)]
    places = {job_id: await queue.do(estimates.find_place, job_id) for job_id in submitted}
    assert [places[job_id] for job_id in await queue.drain()] == [Place(n, 4.0 * n) for n in range(5)]


async def test_a_job_that_does_not_wait_has_no_place(queue: Queue, owner: UUID) -> None:
    job_id = await queue.submit(owner)
    await queue.submit(owner)
    await queue.take()
    assert await queue.do(estimates.find_place, job_id) is None
    assert await queue.do(estimates.find_place, uuid4()) is None


async def test_far_back_nobody_is_told_the_exact_place(
    queue: Queue, owner: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimates, "PLACES_COUNTED", 2)
    submitted = [await queue.submit(owner) for _ in range(4)]
    places = [await queue.do(estimates.find_place, job_id) for job_id in submitted]
    assert places == [Place(0, 0), Place(1, 1), Place(2, 2), None]


async def test_before_a_new_job_goes_what_has_an_earlier_turn(queue: Queue, owner: UUID) -> None:
    for _ in range(10):
        await queue.submit(owner)
    assert await queue.do(estimates.cost_before, owner) == 10
    assert await queue.do(estimates.cost_before, await queue.add_key()) == 0
    await queue.take()
    await queue.take()  # its tag is 1: the virtual time
    assert await queue.do(estimates.cost_before, await queue.add_key()) == 0
    assert await queue.do(estimates.cost_before, owner) == 8


async def test_a_measurement_counts_what_waits_and_who_works(queue: Queue, owner: UUID, sql_async: Any) -> None:
    await queue.submit(owner, options=UpscaleOptions(scale_factor=4))
    await queue.submit(owner)
    await queue.do(estimates.measure, LEASE)
    state = await queue.do(estimates.read_state)
    assert (state.fresh, state.queued, state.queued_cost, state.workers) == (True, 2, 5, 0)
    assert state.seconds(5) is None
    for speed in (0.5, 2.0, None):  # 2 and 0.5 a second; of the third as much as of the others is expected
        await queue.do(workers.beat, await queue.register(), speed, [])
    await queue.do(estimates.measure, LEASE)
    state = await queue.do(estimates.read_state)
    assert (state.workers, state.cost_per_second) == (3, 3.75)
    assert state.seconds(7.5) == 2
    await sql_async("UPDATE workers SET beat_at = now() - interval '1 minute' WHERE seconds_per_cost IS NULL")
    await queue.do(estimates.measure, LEASE)
    assert (await queue.do(estimates.read_state)).cost_per_second == 2.5


async def test_an_old_measurement_foretells_nothing(queue: Queue, sql_async: Any) -> None:
    await queue.do(workers.beat, await queue.register(), 1.0, [])
    await queue.do(estimates.measure, LEASE)
    await sql_async("UPDATE queue_state SET measured_at = now() - interval '31 seconds'")
    state = await queue.do(estimates.read_state)
    assert (state.fresh, state.seconds(1)) == (False, None)


async def test_the_virtual_time_never_falls(queue: Queue, owner: UUID, sql_async: Any) -> None:
    seen: list[float] = []

    async def measure() -> None:
        await queue.do(estimates.measure, LEASE)
        (row,) = await sql_async("SELECT virtual_time FROM queue_state")
        seen.append(row["virtual_time"])

    for _ in range(4):
        await queue.submit(owner)
        await measure()
    for _ in range(4):
        attempt = await queue.take()
        await measure()
        await queue.do(jobs.complete, attempt, RESULT, "k", HOUR)
        await measure()
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0, 4)
