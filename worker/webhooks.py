"""Webhooks: due delivery → body → post → record."""

import json
import logging
import time
from datetime import timedelta

import aiohttp
import anyio

from core.apiframe import event_body, result_body
from core.errors import DatabaseUnavailable, UrlNotAllowed
from core.outbound import Outbound
from core.settings import Settings
from core.storage import Storage
from db import deliveries, records
from db.deliveries import DueDelivery, Outcome
from db.records import JobRecord
from db.session import Database

IDLE_SECONDS = 0.5
"""How often due deliveries are looked for."""

IN_FLIGHT = 32
"""How many deliveries one dispatcher posts at once."""

LEASE_SLACK_SECONDS = 15.0
"""Beyond the timeout of a POST: time to record it before another dispatcher presumes it dead."""

logger = logging.getLogger(__name__)


class WebhookSender:
    """Delivers what is due; any number of dispatchers may."""

    def __init__(self, settings: Settings, database: Database, storage: Storage, outbound: Outbound) -> None:
        self._settings = settings
        self._database = database
        self._storage = storage
        self._outbound = outbound
        self._free = anyio.Semaphore(IN_FLIGHT)
        self._lease = timedelta(seconds=settings.webhook_timeout_seconds + LEASE_SLACK_SECONDS)

    async def run(self) -> None:
        """Deliver until cancelled; a database that is away is waited for."""
        async with anyio.create_task_group() as posts:
            while True:
                begun = 0
                try:
                    for delivery in await self._take():
                        await self._free.acquire()
                        posts.start_soon(self._deliver, delivery)
                        begun += 1
                except DatabaseUnavailable as error:
                    logger.warning("deliveries put off: %s", error)
                if not begun:
                    await anyio.sleep(IDLE_SECONDS)

    async def _take(self) -> list[DueDelivery]:
        # No more than can be posted at once: what is taken runs against its lease.
        free = self._free.value
        if not free:
            return []
        async with self._database.connection() as connection:
            return await deliveries.take_due(connection, free, self._lease)

    async def _deliver(self, delivery: DueDelivery) -> None:
        try:
            async with self._database.connection() as connection:
                record = await records.read_any(connection, delivery.job_id)
            assert record is not None  # a delivery goes with its job
            outcome = await self._post(delivery, self._body(delivery, record))
            await self._record(delivery, outcome)
        except DatabaseUnavailable as error:
            logger.warning("delivery %s: attempt %d not recorded: %s", delivery.id, delivery.number, error)
        finally:
            self._free.release()

    def _body(self, delivery: DueDelivery, record: JobRecord) -> bytes:
        result = None
        if record.result is not None and record.result_key is not None and record.expires_at is not None:
            result = result_body(record.result, self._storage.url(record.result_key, record.expires_at))
        body = event_body(
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
        return json.dumps(body, separators=(",", ":")).encode()

    async def _post(self, delivery: DueDelivery, body: bytes) -> Outcome:
        headers = {
            "Content-Type": "application/json",
            "webhook-id": str(delivery.id),
            "webhook-timestamp": str(int(time.time())),
        }
        began = time.monotonic()
        status_code = excerpt = error = None
        try:
            answer = await self._outbound.post(delivery.url, body, headers, self._settings.webhook_timeout_seconds)
            status_code, excerpt = answer.status, answer.excerpt
        except UrlNotAllowed as refusal:
            error = str(refusal)
        except TimeoutError:
            error = f"No answer within {self._settings.webhook_timeout_seconds:g} seconds."
        except (aiohttp.ClientError, ValueError) as failure:
            error = f"No answer: {type(failure).__name__}."
        duration_ms = int(1000 * (time.monotonic() - began))
        return Outcome(duration_ms=duration_ms, status_code=status_code, excerpt=excerpt, error=error)

    async def _record(self, delivery: DueDelivery, outcome: Outcome) -> None:
        pauses = self._settings.webhook_retry_seconds
        retry = timedelta(seconds=pauses[delivery.number - 1]) if delivery.number <= len(pauses) else None
        async with self._database.connection() as connection:
            await deliveries.record_attempt(connection, delivery, outcome, retry)
        logger.info(
            "delivery %s of job %s: attempt %d, %s",
            *(delivery.id, delivery.job_id, delivery.number, outcome.status_code or outcome.error),
        )
