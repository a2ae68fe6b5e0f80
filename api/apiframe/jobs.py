"""GET /v2/jobs and /v2/jobs/{id}."""

import base64
import binascii
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Query, Response

from api.apiframe import schemas
from api.apiframe.images import POLL_SECONDS
from api.dependencies import CallerDep, Parts, PartsDep
from api.errors import documented
from core import progress
from core.apiframe import result_body
from core.errors import Forbidden, NotFound, ValidationError
from db import records
from db.models import JobStatus
from db.records import JobRecord

router = APIRouter(tags=["jobs"])


@router.get(
    "/v2/jobs/{job_id}",
    response_model=schemas.JobObject,
    responses=documented(400, 401, 403, 404),
    summary="Read a job",
)
@router.get("/jobs/{job_id}", response_model=schemas.JobObject, include_in_schema=False)
async def read(job_id: UUID, caller: CallerDep, parts: PartsDep, response: Response) -> schemas.JobObject:
    """Return one job. Until it is over, Retry-After says when to ask again."""
    async with parts.database.connection() as connection:
        record = await records.read(connection, job_id, caller.id)
    if record is None:
        raise NotFound("Job not found")
    if record.status in (JobStatus.QUEUED, JobStatus.PROCESSING):
        response.headers["Retry-After"] = str(POLL_SECONDS)
    response.headers["Cache-Control"] = "no-store"
    return schemas.JobObject(input=record.input, **await _shown(parts, record))


@router.get(
    "/v2/jobs", response_model=schemas.JobList, responses=documented(400, 401, 403), response_model_exclude_unset=True
)
async def browse(
    caller: CallerDep,
    parts: PartsDep,
    status: JobStatus | None = None,
    model: Annotated[str | None, Query(max_length=200, pattern=r"^[\w./:-]+$")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
    scope: Literal["user", "team"] = "user",
    search: UUID | None = None,
    include_models: bool = False,
) -> schemas.JobList:
    """List your jobs, newest first; pass `nextCursor` as `cursor` to go on."""
    if scope == "team":
        raise Forbidden("Only an admin can list the jobs of the team.")
    before = None if cursor is None else _read_cursor(cursor)
    async with parts.database.connection() as connection:
        records = await records.browse(
            connection, caller.id, limit=limit + 1, status=status, model=model, search=search, before=before
        )
        models = {"models": await records.models_used(connection, caller.id)} if include_models else {}
    has_more, records = len(records) > limit, records[:limit]
    return schemas.JobList(
        jobs=[schemas.ListedJob(**await _shown(parts, record)) for record in records],
        nextCursor=_write_cursor(records[-1]) if has_more else None,
        hasMore=has_more,
        **models,
    )


async def _shown(parts: Parts, record: JobRecord) -> dict[str, Any]:
    """Return the fields that every view of a job has."""
    return {
        "id": record.id,
        "status": record.status,
        "model": record.model,
        "progress": await _progress(parts, record),
        "result": _result(parts, record),
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


async def _progress(parts: Parts, record: JobRecord) -> int:
    if record.status is JobStatus.PROCESSING:
        return await progress.read(parts.redis, record.id, record.attempt)
    return 100 if record.status is JobStatus.COMPLETED else 0


def _result(parts: Parts, record: JobRecord) -> dict[str, Any] | None:
    if record.result is None or record.result_key is None or record.expires_at is None:
        return None
    return result_body(record.result, parts.storage.url(record.result_key, record.expires_at))


def _write_cursor(record: JobRecord) -> str:
    return base64.urlsafe_b64encode(f"{record.created_at.isoformat()} {record.id}".encode()).decode()


def _read_cursor(cursor: str) -> tuple[datetime, UUID]:
    try:
        moment, job_id = base64.urlsafe_b64decode(cursor.encode()).decode().split(" ")
        return datetime.fromisoformat(moment).astimezone(UTC), UUID(job_id)
    except (ValueError, OverflowError, binascii.Error) as error:
        raise ValidationError({"cursor": ["is not a nextCursor of this service"]}) from error
