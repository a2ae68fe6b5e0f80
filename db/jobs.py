"""The life of a job: every change of state is one guarded statement here, and nowhere else.

Each change is a single SQL statement, so it is a transaction by itself; what must happen together with it, like the
delivery that reports it, is part of the same statement. `attempt` is the fence: whoever ends an attempt names it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    Interval,
    Select,
    Text,
    and_,
    any_,
    bindparam,
    func,
    insert,
    literal,
    select,
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
