"""GET /v2/jobs and /v2/jobs/{id}."""

import base64
import binascii
from datetime import UTC, datetime
from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Header, Query, Request, Response

from api.apiframe import schemas, views
from api.dependencies import KeyedRoute, PartsDep, ReaderDep, WriterDep, readmit
from api.errors import documented
from api.headers import MAX_WAIT_SECONDS, names_tag
from api.waiting import hold
from core.errors import Forbidden, ValidationError
from core.notices import announce, job_channel, worker_channel
from db import jobs, records
from db.models import JobStatus, Scope
from db.records import JobRecord

router = APIRouter(tags=["jobs"], route_class=KeyedRoute)

_WAIT = "Hold the answer for so many seconds until the job is over or, with If-None-Match, until it changes."
_SCOPE = "`team`: everybody's jobs, for admins."

_TAG = {"description": "Changes with the job; for If-None-Match.", "schema": {"type": "string"}}
_RETRY_AFTER = {
    "description": "Seconds to wait before asking again; absent once it is over.",
    "schema": {"type": "integer"},
}


@router.get(
    "/v2/jobs/{job_id}",
    response_model=schemas.JobObject,
    responses={
        200: {"headers": {"ETag": _TAG, "Retry-After": _RETRY_AFTER}},
        304: {
            "description": "If-None-Match names it as it is.",
            "headers": {"ETag": _TAG, "Retry-After": _RETRY_AFTER},
        },
        **documented(400, 401, 403, 404, 429),
    },
    summary="Read a job",
)
@router.get("/jobs/{job_id}", response_model=schemas.JobObject, include_in_schema=False)
async def read(
    job_id: UUID,
    caller: ReaderDep,
    parts: PartsDep,
    request: Request,
    wait: Annotated[int, Query(ge=0, le=MAX_WAIT_SECONDS, description=_WAIT)] = 0,
    if_none_match: Annotated[list[str] | None, Header(description="ETags that the caller has.")] = None,
) -> Response:
    """Return one job. Until it is over, Retry-After says when to ask again."""

    async def look() -> tuple[tuple[JobRecord, schemas.JobObject | None], bool]:
        await readmit(request)
        record = await views.find(parts, caller.id, job_id)
        if not if_none_match:
            return (record, None), record.over
        job = await views.show(parts, record)
        return (record, job), not names_tag(if_none_match, views.tag(job))

    record, job = await hold(parts.watch, request, job_id, wait, look)
    job = job or await views.show(parts, record)
    tag = views.tag(job)
    headers = {"ETag": tag, **views.polling_headers(record)}
    if if_none_match and names_tag(if_none_match, tag):
        return Response(status_code=304, headers=headers)
    return Response(job.model_dump_json(), headers=headers, media_type="application/json")


@router.post(
    "/v2/jobs/{job_id}/cancel",
    response_model=schemas.JobObject,
    responses={
        200: {"description": "The job is CANCELLED."},
        202: {"model": schemas.JobObject, "description": "The job runs, and will stop at its next step."},
        **documented(400, 401, 403, 404, 409, 429),
    },
    summary="Cancel a job",
)
async def cancel(job_id: UUID, caller: WriterDep, parts: PartsDep, response: Response) -> schemas.JobObject:
    """Cancel a job that is not over. To ask again does no harm."""
    async with parts.database.connection() as connection:
        worker_id = await jobs.cancel(connection, job_id, caller.id)
    channels = [job_channel(job_id), *([worker_channel(worker_id)] if worker_id else [])]
    await announce(parts.redis, *channels)
    record = await views.find(parts, caller.id, job_id)
    response.status_code = 200 if record.over else 202
    return await views.show(parts, record)


@router.get(
    "/v2/jobs",
    response_model=schemas.JobList,
    responses=documented(400, 401, 403, 429),
    response_model_exclude_unset=True,
)
async def browse(
    caller: ReaderDep,
    parts: PartsDep,
    status: JobStatus | None = None,
    model: Annotated[str | None, Query(max_length=200, pattern=r"^[\w./:-]+$")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
    scope: Annotated[Literal["user", "team"], Query(description=_SCOPE)] = "user",
    search: UUID | None = None,
    include_models: bool = False,
) -> schemas.JobList:
    """List your jobs, newest first; pass `nextCursor` as `cursor` to go on."""
    if scope == "team" and not caller.may(Scope.ADMIN):
        raise Forbidden(f"This API key lacks the scope {Scope.ADMIN}, which lists everybody's jobs.")
    owner = None if scope == "team" else caller.id
    before = None if cursor is None else _read_cursor(cursor)
    async with parts.database.connection() as connection:
        found = await records.browse(
            connection, owner, limit=limit + 1, status=status, model=model, search=search, before=before
        )
        models = {"models": await records.models_used(connection, owner)} if include_models else {}
    has_more, found = len(found) > limit, found[:limit]
    return schemas.JobList(
        jobs=[await views.show_listed(parts, record) for record in found],
        nextCursor=_write_cursor(found[-1]) if has_more else None,
        hasMore=has_more,
        **models,
    )


def _write_cursor(record: JobRecord) -> str:
    return base64.urlsafe_b64encode(f"{record.created_at.isoformat()} {record.id}".encode()).decode()


def _read_cursor(cursor: str) -> tuple[datetime, UUID]:
    try:
        moment, job_id = base64.urlsafe_b64decode(cursor.encode()).decode().split(" ")
        return datetime.fromisoformat(moment).astimezone(UTC), UUID(job_id)
    except (ValueError, OverflowError, binascii.Error) as error:
        raise ValidationError({"cursor": ["is not a nextCursor of this service"]}) from error
