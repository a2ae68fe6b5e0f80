"""Webhooks: due delivery → body → post → record."""

import logging
import random
import time
from datetime import timedelta

import anyio
from anyio.abc import TaskGroup

from core.apiframe import event_body, result_body
from core.errors import DatabaseUnavailable, StorageRefused, StorageUnavailable
from core.settings import Settings
from core.storage import Storage
from db import deliveries, records
from db.deliveries import DueDelivery, Outcome
from db.records import JobRecord
from db.session import Database
from worker.posts import NOT_MADE, Post, Poster, shows_life
from worker.receivers import IN_FLIGHT_PER_RECEIVER, Receivers

IDLE_SECONDS = 0.5
"""How often due deliveries are looked for."""

LEASE_SLACK_SECONDS = 15.0
"""Beyond the timeout of a POST: time to record it before another dispatcher presumes it dead."""

POSTPONED_AT_ONCE = 1000
"""How many deliveries to receivers that seem dead one statement puts off."""

JITTER = 0.2
"""A pause is longer or shorter by up to this part of it."""

LONGEST_RETRY_AFTER_SECONDS = 24 * 3600.0
"""A receiver that asks to be left alone for longer is asked again after this."""

logger = logging.getLogger(__name__)


class WebhookSender:
    """Delivers what is due; any number of dispatchers may."""

    def __init__(
        self, settings: Settings, database: Database, storage: Storage, poster: Poster, receivers: Receivers
    ) -> None:
        self._settings = settings
        self._database = database
        self._storage = storage
        self._poster = poster
        self._receivers = receivers
        self._lease = timedelta(seconds=settings.webhook_timeout_seconds + LEASE_SLACK_SECONDS)
        self._postpone_at = 0.0

    async def run(self) -> None:
        """Deliver until cancelled; a database that is away is waited for."""
        async with anyio.create_task_group() as posts:
            while True:
                ended, begun = self._receivers.ended, 0
                try:
                    begun = await self._begin_due(posts)
                except DatabaseUnavailable as error:
                    logger.warning("deliveries put off: %s", error)
                if not begun:
                    with anyio.move_on_after(IDLE_SECONDS):
                        await ended.wait()

    async def _begin_due(self, posts: TaskGroup) -> int:
        async with self._receivers.choosing:
            # No more than can be posted at once: what is taken runs against its lease.
            if not self._receivers.free:
                return 0
            due = await self._take(self._receivers.free)
            for delivery in due:
                self._receivers.begin(delivery.receiver)
                posts.start_soon(self._deliver, delivery)
            return len(due)

    async def _take(self, free: int) -> list[DueDelivery]:
        async with self._database.connection() as connection:
            held = self._receivers.held()
            if held and time.monotonic() >= self._postpone_at:
                postponed = await deliveries.postpone(connection, held, POSTPONED_AT_ONCE)
                if postponed < POSTPONED_AT_ONCE:
                    self._postpone_at = time.monotonic() + IDLE_SECONDS
            rooms = self._receivers.rooms()
            return await deliveries.take_due(connection, free, self._lease, rooms, IN_FLIGHT_PER_RECEIVER)

    async def _deliver(self, delivery: DueDelivery) -> None:
        outcome = None
        try:
            outcome = await self._attempt(delivery)
            await self._record(delivery, outcome)
        except DatabaseUnavailable as error:
            logger.warning("delivery %s: attempt %d not recorded: %s", delivery.id, delivery.number, error)
        except Exception:
            # A bug that one delivery meets must not end all the others. Its attempt will be presumed dead.
            logger.exception("delivery %s: bug in attempt %d", delivery.id, delivery.number)
        finally:
            self._receivers.end(delivery.receiver, None if outcome is None else shows_life(outcome))

    async def _attempt(self, delivery: DueDelivery) -> Outcome:
        async with self._database.connection() as connection:
            record = await records.read_any(connection, delivery.job_id)
        assert record is not None  # a delivery goes with its job
        try:
            body = await self._body(delivery, record)
        except (StorageUnavailable, StorageRefused) as error:
            # It counts as an attempt, like one that cannot be signed: the schedule leaves a day to mend the storage.
            logger.warning("delivery %s: no URL of the result: %s (%s)", delivery.id, error, error.__cause__)
            return Outcome(duration_ms=0, error=NOT_MADE)
        return await self._poster.post(
            Post(id=delivery.id, api_key_id=record.api_key_id, event=delivery.event, url=delivery.url, body=body)
        )

    async def _body(self, delivery: DueDelivery, record: JobRecord) -> dict[str, object]:
        result = None
        if record.result is not None and record.result_key is not None and record.expires_at is not None:
            result = result_body(record.result, await self._storage.url(record.result_key, record.expires_at))
        return event_body(
            event=delivery.event,
            job_id=record.id,
            status=record.status,
            model=record.model,
            created_at=delivery.created_at,
            completed_at=record.completed_at,
            result=result,
            error=record.error,
            error_code=record.error_code,
        )

    async def _record(self, delivery: DueDelivery, outcome: Outcome) -> None:
        pause = pause_after(outcome, delivery.number - delivery.schedule_start, self._settings.webhook_retry_seconds)
        retry = None if pause is None else timedelta(seconds=pause)
        async with self._database.connection() as connection:
            await deliveries.record_attempt(connection, delivery, outcome, retry)
        logger.info(
            "delivery %s of job %s: attempt %d, %s",
            *(delivery.id, delivery.job_id, delivery.number, outcome.status_code or outcome.error),
        )


def pause_after(outcome: Outcome, place: int, pauses: tuple[float, ...]) -> float | None:
    """Return how many seconds to wait after a failed attempt; None when it was the last.

    Args:
        place: which attempt of the schedule it was, from 1.
        pauses: between the attempts of the schedule.
    """
    if outcome.status_code == 410 or place > len(pauses):  # Gone: the receiver wants no more of it
        return None
    pause = pauses[place - 1] * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 - no secret
    return max(pause, min(outcome.retry_after or 0.0, LONGEST_RETRY_AFTER_SECONDS))
