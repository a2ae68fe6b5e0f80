"""The life of a job: every change of state is one guarded statement here, and nowhere else.

Each change is a single SQL statement, so it is a transaction by itself; what must happen together with it, like the
delivery that reports it, is part of the same statement. `attempt` is the fence: whoever ends an attempt names it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    Interval,
    RowMapping,
    Select,
    Text,
    and_,
    any_,
    bindparam,
    case,
    func,
    insert,
    literal,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncConnection

from core.errors import LeaseLost, UpscaledError
from core.options import OutputFormat, UpscaleOptions
from db.models import Delivery, Job, JobStatus, WebhookEvent


@dataclass(frozen=True, kw_only=True, slots=True)
class NewJob:
    """What a dialect hands in; exactly one of `image_url` and `image_key` is set."""

    id: UUID
    api_key_id: UUID
    model: str
    input: dict[str, Any]
    options: UpscaleOptions
    image_url: str | None = None
    image_key: str | None = None
    webhook_url: str | None = None
    webhook_events: Sequence[WebhookEvent] = ()


@dataclass(frozen=True, slots=True)
class Attempt:
    """One claim of a job by one worker; `number` is the fence."""

    job_id: UUID
    number: int
    options: dict[str, Any]
    """As stored; whoever runs the attempt validates them, so that what cannot be read ends the job it belongs to."""
    image_url: str | None
    image_key: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What is known about a stored result."""

    engine: str
    format: OutputFormat
    width: int
    height: int
    size_bytes: int
    sha256: str
    seed: int


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
    result_key: str | None
    result: dict[str, Any] | None
    error: str | None
    error_code: str | None
    webhook_status: str | None


async def submit(connection: AsyncConnection, job: NewJob) -> None:
    """Record a queued job; the caller hints once this is committed."""
    values: dict[str, Any] = {
        "id": job.id,
        "api_key_id": job.api_key_id,
        "model": job.model,
        "input": job.input,
        "options": job.options.model_dump(mode="json"),
        "image_url": job.image_url,
        "image_key": job.image_key,
        "webhook_url": job.webhook_url,
        "webhook_events": [event.value for event in job.webhook_events],
    }
    await connection.execute(_SUBMIT, values)


_SUBMIT = insert(Job)


async def claim(connection: AsyncConnection, worker: str) -> Attempt | None:
    """Start an attempt at the oldest queued job that nobody else is claiming.

    None can mean that every queued row was locked by others at that moment: ask once more before going idle.
    """
    row = (await connection.execute(_CLAIM, {"claimed_by": worker})).one_or_none()
    if row is None:
        return None
    return Attempt(row.id, row.attempt, row.options, row.image_url, row.image_key)


_OLDEST = (
    select(Job.id)
    .where(Job.status == JobStatus.QUEUED)
    .order_by(Job.created_at, Job.id)
    .limit(1)
    .with_for_update(skip_locked=True)
    .scalar_subquery()
)

_CLAIM = (
    update(Job)
    .where(Job.id == _OLDEST, Job.status == JobStatus.QUEUED)
    .values(
        status=JobStatus.PROCESSING.value,
        attempt=Job.attempt + 1,
        worker=bindparam("claimed_by"),
        started_at=func.now(),
    )
    .returning(Job.id, Job.attempt, Job.options, Job.image_url, Job.image_key)
)


async def is_current(connection: AsyncConnection, attempt: Attempt) -> bool:
    """Tell whether the attempt still owns its job."""
    statement = select(literal(1)).where(_CURRENT)
    return (await connection.execute(statement, _fence(attempt))).first() is not None


async def complete(
    connection: AsyncConnection, attempt: Attempt, result: Result, result_key: str, ttl: timedelta
) -> None:
    """End the attempt with a stored result that can be read for `ttl`; saying it twice changes nothing.

    Raises:
        LeaseLost: the attempt is no longer current; nothing was changed and its object belongs to nobody.
    """
    values = {"key": result_key, "known": asdict(result), "ttl": ttl}
    await _end(connection, attempt, _COMPLETE, values, JobStatus.COMPLETED)


async def fail(connection: AsyncConnection, attempt: Attempt, error: UpscaledError) -> None:
    """End the attempt with an error whose sentence and code the caller will read; saying it twice changes nothing.

    Raises:
        LeaseLost: the attempt is no longer current; nothing was changed.
    """
    await _end(connection, attempt, _FAIL, {"sentence": str(error), "code": error.code}, JobStatus.FAILED)


_CURRENT = and_(Job.id == bindparam("job_id"), Job.attempt == bindparam("number"), Job.status == JobStatus.PROCESSING)


def _fence(attempt: Attempt) -> dict[str, Any]:
    return {"job_id": attempt.job_id, "number": attempt.number}


def _ending(status: JobStatus, event: WebhookEvent, changes: dict[str, Any]) -> Select[UUID]:
    """Return the statement that ends a job and, by the same stroke, records the delivery that reports it."""
    ended = (
        update(Job)
        .where(_CURRENT)
        .values(status=status.value, completed_at=func.now(), **changes)
        .returning(Job.id, Job.webhook_url, Job.webhook_events)
        .cte("ended")
    )
    wanted = and_(ended.c.webhook_url.is_not(None), literal(event.value) == any_(ended.c.webhook_events))
    owed = (
        insert(Delivery)
        .from_select(
            ["job_id", "event", "url"], select(ended.c.id, literal(event.value), ended.c.webhook_url).where(wanted)
        )
        .cte("owed")
    )
    return select(ended.c.id).add_cte(owed)


_COMPLETE = _ending(
    JobStatus.COMPLETED,
    WebhookEvent.COMPLETED,
    {
        "result_key": bindparam("key", type_=Text),
        "result": bindparam("known", type_=JSONB),
        "expires_at": func.now() + bindparam("ttl", type_=Interval),
    },
)

_FAIL = _ending(
    JobStatus.FAILED,
    WebhookEvent.FAILED,
    {"error": bindparam("sentence", type_=Text), "error_code": bindparam("code", type_=Text)},
)


async def _end(
    connection: AsyncConnection, attempt: Attempt, ending: Select[UUID], values: dict[str, Any], status: JobStatus
) -> None:
    if (await connection.execute(ending, _fence(attempt) | values)).one_or_none() is not None:
        return
    # An earlier call may have been committed though its answer was lost: then this one is a repetition, and true.
    repeated = select(literal(1)).where(
        Job.id == attempt.job_id, Job.attempt == attempt.number, Job.status == status.value
    )
    if (await connection.execute(repeated)).first() is None:
        raise LeaseLost(f"Attempt {attempt.number} no longer owns job {attempt.job_id}.")


async def count_queued(connection: AsyncConnection, older_than: timedelta, limit: int) -> int:
    """Return how many jobs have been queued for longer than `older_than`, counting no further than `limit`."""
    waiting = (
        select(Job.id)
        .where(Job.status == JobStatus.QUEUED, Job.created_at < func.now() - older_than)
        .limit(limit)
        .subquery()
    )
    return (await connection.execute(select(func.count()).select_from(waiting))).scalar_one()


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


async def models_used(connection: AsyncConnection, api_key_id: UUID) -> list[str]:
    """Return the models that a key's jobs name, sorted."""
    statement = select(Job.model).where(Job.api_key_id == api_key_id).distinct().order_by(Job.model)
    return list((await connection.execute(statement)).scalars())


async def browse(
    connection: AsyncConnection,
    api_key_id: UUID,
    *,
    limit: int,
    status: JobStatus | None = None,
    model: str | None = None,
    search: UUID | None = None,
    before: tuple[datetime, UUID] | None = None,
) -> list[JobRecord]:
    """List a key's jobs, newest first; `before` is the (created_at, id) after which the page begins."""
    statement = _RECORD.where(Job.api_key_id == api_key_id).order_by(Job.created_at.desc(), Job.id.desc()).limit(limit)
    if status is not None:
        statement = statement.where(Job.status == status)
    if model is not None:
        statement = statement.where(Job.model == model)
    if search is not None:
        statement = statement.where(Job.id == search)
    if before is not None:
        statement = statement.where(tuple_(Job.created_at, Job.id) < tuple_(literal(before[0]), literal(before[1])))
    return [_record(row) for row in (await connection.execute(statement)).mappings()]
