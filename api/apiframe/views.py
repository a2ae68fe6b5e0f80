"""Jobs as Apiframe shows them, and the headers that go with them."""

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from api.apiframe import schemas
from api.dependencies import Parts
from core import progress
from core.apiframe import result_body
from core.errors import NotFound
from db import estimates, records
from db.models import JobStatus
from db.records import JobRecord

POLL_SECONDS = 2
"""How long a client should wait before it asks for its job again."""

VOLATILE = frozenset({"estimatedStartAt"})
"""Fields that move with the clock although nothing happened to the job: they do not count for its tag."""


async def find(parts: Parts, caller_id: UUID, job_id: UUID) -> JobRecord:
    """Read a job; raises NotFound when the caller has none of that id."""
    async with parts.database.connection() as connection:
        record = await records.read(connection, job_id, caller_id)
    if record is None:
        raise NotFound("Job not found")
    return record


async def show(parts: Parts, record: JobRecord) -> schemas.JobObject:
    """Show a job as GET /v2/jobs/{id} does."""
    return schemas.JobObject(
        input=record.input,
        cancelRequestedAt=record.cancel_requested_at,
        deadlineAt=record.deadline_at,
        **await _place(parts, record),
        **await _fields(parts, record),
    )


async def show_listed(parts: Parts, record: JobRecord) -> schemas.ListedJob:
    """Show a job as GET /v2/jobs lists it."""
    return schemas.ListedJob(**await _fields(parts, record))


def tag(job: schemas.JobObject) -> str:
    """Return the weak ETag of a job: it changes with whatever the caller can see but the VOLATILE."""
    return f'W/"{hashlib.sha256(job.model_dump_json(exclude=set(VOLATILE)).encode()).hexdigest()[:32]}"'


def polling_headers(record: JobRecord) -> dict[str, str]:
    """Return what every answer that tells of a job carries: while it goes on, when to ask again."""
    return {} if record.over else {"Retry-After": str(POLL_SECONDS)}


async def _fields(parts: Parts, record: JobRecord) -> dict[str, Any]:
    """Return the fields that every view of a job has."""
    return {
        "id": record.id,
        "status": record.status,
        "model": record.model,
        "progress": await _progress(parts, record),
        "result": await _result(parts, record),
        "error": record.error,
        "errorCode": record.error_code,
        "creditCost": None,
        "webhookStatus": record.webhook_status,
        "createdAt": record.created_at,
        "startedAt": record.started_at,
        "completedAt": record.completed_at,
        "expiresAt": record.expires_at,
        "expired": record.expired,
    }


async def _place(parts: Parts, record: JobRecord) -> dict[str, Any]:
    """Return where a queued job stands, and when it should start: what goes before it, done by all workers together."""
    position = start_at = None
    if record.status is JobStatus.QUEUED:
        async with parts.database.connection() as connection:
            place = await estimates.find_place(connection, record.id)
        if place is not None:
            position = place.jobs + 1
            seconds = (await parts.intake.queue_state()).seconds(place.cost)
            start_at = None if seconds is None else datetime.now(UTC) + timedelta(seconds=seconds)
    return {"queuePosition": position, "estimatedStartAt": start_at}


async def _progress(parts: Parts, record: JobRecord) -> int:
    if record.status is JobStatus.PROCESSING:
        return await progress.read(parts.redis, record.id, record.attempt)
    return 100 if record.status is JobStatus.COMPLETED else 0


async def _result(parts: Parts, record: JobRecord) -> dict[str, Any] | None:
    if record.result is None or record.result_key is None or record.expires_at is None:
        return None
    return result_body(record.result, await parts.storage.url(record.result_key, record.expires_at))
