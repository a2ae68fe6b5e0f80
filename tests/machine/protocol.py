"""The protocol under test, as the processes call it, and its mutants: protocols that look right and are not."""

from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from core.errors import UploadFailed, UpscaledError
from core.settings import Settings
from db import jobs, queue
from db.jobs import Attempt, Result
from db.models import ApiKey, Delivery, Job, JobStatus
from db.queue import NewJob, Submitted
from db.session import Database
from tests.machine.outside import Broker, Objects
from worker.sweeps import Sweeper

RESULT_TTL = timedelta(hours=6)


class Protocol:
    """The real statements and the real sweep, and nothing else."""

    def __init__(self, settings: Settings, database: Database, broker: Broker, objects: Objects) -> None:
        self.settings = settings
        outside: Any = (broker, broker, objects)  # they stand for Redis, the hints and the storage
        self.sweeper = self._sweeper(settings, database, *outside)

    def _sweeper(self, settings: Settings, database: Database, *outside: Any) -> Sweeper:
        return Sweeper(settings, database, *outside)

    async def submit(self, connection: AsyncConnection, job: NewJob) -> Submitted:
        return await queue.submit(connection, job, self.settings.max_queued)

    async def claim(self, connection: AsyncConnection, worker_id: UUID) -> Attempt | None:
        return await queue.claim(connection, worker_id, "tests")

    async def complete(
        self,
        connection: AsyncConnection,
        attempt: Attempt,
        result: Result,
        key: str,
        failure: UploadFailed | None,
        *,
        dies: bool,
    ) -> None:
        """End an attempt; the process `dies` right after its first commit."""
        await jobs.complete(connection, attempt, result, key, RESULT_TTL, failure)

    async def fail(self, connection: AsyncConnection, attempt: Attempt, error: UpscaledError) -> None:
        await jobs.fail(connection, attempt, error)

    async def hand_back(
        self, connection: AsyncConnection, attempt: Attempt, fault: UpscaledError | None, pause: timedelta
    ) -> JobStatus:
        return await jobs.hand_back(connection, attempt, self.settings.max_strikes, fault=fault, pause=pause)

    async def cancel(self, connection: AsyncConnection, job_id: UUID, api_key_id: UUID) -> None:
        await jobs.cancel(connection, job_id, api_key_id)

    async def sweep(self, connection: AsyncConnection) -> None:
        await self.sweeper.bury(connection)
        await self.sweeper.sweep(connection)
        await self.sweeper.purge()


class NoFence(Protocol):
    """Whoever holds the job's number by name may end it, although another attempt is under way."""

    async def _current(self, connection: AsyncConnection, attempt: Attempt) -> Attempt:
        number = await connection.scalar(select(Job.attempt).where(Job.id == attempt.job_id))
        return replace(attempt, number=number)

    async def complete(
        self,
        connection: AsyncConnection,
        attempt: Attempt,
        result: Result,
        key: str,
        failure: UploadFailed | None,
        *,
        dies: bool,
    ) -> None:
        await super().complete(connection, await self._current(connection, attempt), result, key, failure, dies=dies)

    async def fail(self, connection: AsyncConnection, attempt: Attempt, error: UpscaledError) -> None:
        await super().fail(connection, await self._current(connection, attempt), error)

    async def hand_back(
        self, connection: AsyncConnection, attempt: Attempt, fault: UpscaledError | None, pause: timedelta
    ) -> JobStatus:
        return await super().hand_back(connection, await self._current(connection, attempt), fault, pause)


class NoResend(Protocol):
    """A hint that is lost stays lost."""

    class _Sweeper(Sweeper):
        async def resend_hints(self, connection: AsyncConnection) -> int:
            return 0

    def _sweeper(self, settings: Settings, database: Database, *outside: Any) -> Sweeper:
        return self._Sweeper(settings, database, *outside)


class NoStrikes(Protocol):
    """A job whose workers die is given to the next one, for ever."""

    def _sweeper(self, settings: Settings, database: Database, *outside: Any) -> Sweeper:
        return Sweeper(settings.model_copy(update={"max_strikes": 30_000}), database, *outside)


class DeliveryApart(Protocol):
    """The delivery is inserted after the commit that it reports."""

    async def complete(
        self,
        connection: AsyncConnection,
        attempt: Attempt,
        result: Result,
        key: str,
        failure: UploadFailed | None,
        *,
        dies: bool,
    ) -> None:
        this = Job.id == attempt.job_id
        row = (await connection.execute(select(Job.webhook_url, Job.webhook_events, Job.status).where(this))).one()
        await connection.execute(update(Job).where(this).values(webhook_events=[]))
        try:
            await super().complete(connection, attempt, result, key, failure, dies=dies)
        finally:
            await connection.execute(update(Job).where(this).values(webhook_events=row.webhook_events))
        event = "failed" if failure else "completed"
        if not dies and row.status == JobStatus.PROCESSING and event in row.webhook_events:
            owed = {"job_id": attempt.job_id, "event": event, "url": row.webhook_url}
            await connection.execute(insert(Delivery), owed)


class NoLimits(Protocol):
    """A claim does not look at how many jobs of a key run."""

    async def claim(self, connection: AsyncConnection, worker_id: UUID) -> Attempt | None:
        limits = (await connection.execute(select(ApiKey.id, ApiKey.max_concurrent))).all()
        await connection.execute(update(ApiKey).values(max_concurrent=None))
        try:
            return await super().claim(connection, worker_id)
        finally:
            for owner, limit in limits:
                await connection.execute(update(ApiKey).where(ApiKey.id == owner).values(max_concurrent=limit))


class NoDeadlines(Protocol):
    """A claim does not look at deadlines."""

    async def claim(self, connection: AsyncConnection, worker_id: UUID) -> Attempt | None:
        deadlines = (await connection.execute(select(Job.id, Job.deadline_at))).all()
        await connection.execute(update(Job).values(deadline_at=None))
        try:
            return await super().claim(connection, worker_id)
        finally:
            for job_id, deadline_at in deadlines:
                await connection.execute(update(Job).where(Job.id == job_id).values(deadline_at=deadline_at))


class NoBeats(Protocol):
    """The sweep takes jobs from workers that live."""

    async def sweep(self, connection: AsyncConnection) -> None:
        await jobs.bury(connection, timedelta(seconds=-1), self.settings.max_strikes)
        await super().sweep(connection)


class NoIdempotency(Protocol):
    """A submit that is said twice makes two jobs."""

    async def submit(self, connection: AsyncConnection, job: NewJob) -> Submitted:
        return await super().submit(connection, replace(job, idempotency_key=None, fingerprint=None))


class AttemptTakenBack(Protocol):
    """A drain that costs nothing, not even the attempt's number: then the fence holds nobody back."""

    async def hand_back(
        self, connection: AsyncConnection, attempt: Attempt, fault: UpscaledError | None, pause: timedelta
    ) -> JobStatus:
        status = await super().hand_back(connection, attempt, fault, pause)
        if status is JobStatus.QUEUED and fault is None:
            lowered = update(Job).where(Job.id == attempt.job_id).values(attempt=Job.attempt - 1)
            await connection.execute(lowered)
        return status


class LateCancel(Protocol):
    """A cancel that does not look at whether the job is over."""

    async def cancel(self, connection: AsyncConnection, job_id: UUID, api_key_id: UUID) -> None:
        if await connection.scalar(select(Job.status).where(Job.id == job_id)) == JobStatus.FAILED:
            await connection.execute(text("UPDATE jobs SET status = 'CANCELLED' WHERE id = :id"), {"id": job_id})
        await super().cancel(connection, job_id, api_key_id)


class NoStrayObjects(Protocol):
    """Only the object that the row names is deleted, and not what killed attempts left."""

    class _Sweeper(Sweeper):
        async def purge(self) -> int:
            async with self._database.connection() as connection:
                rows = (await connection.execute(text("SELECT id, result_key FROM jobs WHERE purge_at <= now()"))).all()
                for job_id, key in rows:
                    if key is not None:
                        await self._storage.delete(key)
                    await connection.execute(update(Job).where(Job.id == job_id).values(purge_at=None))
            return len(rows)

    def _sweeper(self, settings: Settings, database: Database, *outside: Any) -> Sweeper:
        return self._Sweeper(settings, database, *outside)
