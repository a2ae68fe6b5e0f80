"""Jobs as they are read: by their callers, and by the webhooks that tell of them."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, RowMapping, Select, and_, bindparam, case, func, literal, select, true, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from db.models import ApiKey, Delivery, Job, JobStatus, WebhookEvent

OVER = (JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED)
"""The states in which nothing happens to a job any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRecord:
    """A job as it is read: the row, and how its last webhook fared."""

    id: UUID
    api_key_id: UUID
    status: JobStatus
    model: str
    input: dict[str, Any]
    created_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    expires_at: datetime | None
    expired: bool
    attempt: int
    cancel_requested_at: datetime | None
    deadline_at: datetime | None
    result_key: str | None
    result: dict[str, Any] | None
    error: str | None
    error_code: str | None
    webhook_status: str | None

    @property
    def over(self) -> bool:
        return self.status in OVER


# One row per event exists at most, and a job ends only once: its terminal delivery is the one that is no progress.
_WEBHOOK_STATUS = (
    select(Delivery.status)
    .where(Delivery.job_id == Job.id, Delivery.event != WebhookEvent.PROGRESS)
    .limit(1)
    .correlate(Job)
    .scalar_subquery()
)

_RECORD: Select[*tuple[Any, ...]] = select(
    Job.id,
    Job.api_key_id,
    Job.status,
    Job.model,
    Job.input,
    Job.created_at,
    Job.started_at,
    Job.completed_at,
    Job.expires_at,
    func.coalesce(Job.expires_at <= func.now(), False).label("expired"),
    Job.attempt,
    Job.cancel_requested_at,
    Job.deadline_at,
    Job.result_key,
    Job.result,
    Job.error,
    Job.error_code,
    case((Job.webhook_url.is_not(None), _WEBHOOK_STATUS)).label("webhook_status"),
)


def _record(row: RowMapping) -> JobRecord:
    values: dict[str, Any] = {**row, "status": JobStatus(row["status"])}
    return JobRecord(**values)


async def read(connection: AsyncConnection, job_id: UUID, api_key_id: UUID) -> JobRecord | None:
    """Return the job, or None when there is none of that id under that key."""
    found = await connection.execute(_READ, {"job_id": job_id, "owner": api_key_id})
    row = found.mappings().one_or_none()
    return None if row is None else _record(row)


_READ = _RECORD.where(Job.id == bindparam("job_id"), Job.api_key_id == bindparam("owner"))


async def read_any(connection: AsyncConnection, job_id: UUID) -> JobRecord | None:
    """Return the job whoever it belongs to: for deliveries, never for callers."""
    row = (await connection.execute(_RECORD.where(Job.id == job_id))).mappings().one_or_none()
    return None if row is None else _record(row)


async def models_used(connection: AsyncConnection, api_key_id: UUID | None) -> list[str]:
    """Return the models that a key's jobs name, or everybody's, sorted."""
    statement = select(Job.model).distinct().order_by(Job.model)
    if api_key_id is not None:
        statement = statement.where(Job.api_key_id == api_key_id)
    return list((await connection.execute(statement)).scalars())


async def browse(
    connection: AsyncConnection,
    api_key_id: UUID | None,
    *,
    limit: int,
    status: JobStatus | None = None,
    model: str | None = None,
    search: UUID | None = None,
    before: tuple[datetime, UUID] | None = None,
) -> list[JobRecord]:
    """List a key's jobs, or everybody's, newest first; `before` is the (created_at, id) after which the page begins."""
    wanted: list[ColumnElement[bool]] = []
    if status is not None:
        wanted.append(Job.status == status)
    if model is not None:
        wanted.append(Job.model == model)
    if search is not None:
        wanted.append(Job.id == search)
    if before is not None:
        wanted.append(tuple_(Job.created_at, Job.id) < tuple_(literal(before[0]), literal(before[1])))
    newest_first = Job.created_at.desc(), Job.id.desc()
    if api_key_id is None:
        # Jobs are indexed by key, then by age: of each key the newest are looked up, and of those the newest taken.
        of_key = select(Job.id).where(Job.api_key_id == ApiKey.id, *wanted).order_by(*newest_first).limit(limit)
        newest = of_key.correlate(ApiKey).lateral()
        listed = Job.id.in_(select(newest.c.id).select_from(ApiKey).join(newest, true()))
    else:
        listed = and_(Job.api_key_id == api_key_id, *wanted)
    statement = _RECORD.where(listed).order_by(*newest_first).limit(limit)
    return [_record(row) for row in (await connection.execute(statement)).mappings()]
