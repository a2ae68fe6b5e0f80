"""The queue: how a job gets in, and whose turn it is.

Between keys the order is start-time fair: a job's tag is where its key's turn stood when it was submitted, and each job
moves its key's turn on by its cost over the key's weight. A key that was idle starts from the queue's virtual time, so
nobody saves up turns. Source: Goyal, Vin, Cheng: Start-time Fair Queuing (SIGCOMM 1996).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    Boolean,
    ColumnElement,
    Double,
    Integer,
    Interval,
    LargeBinary,
    SmallInteger,
    Text,
    Uuid,
    and_,
    bindparam,
    func,
    literal,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import aliased

from core.errors import IdempotencyKeyReused, LeaseLost, TooManyQueued
from core.options import UpscaleOptions
from db.jobs import Attempt, tally
from db.models import PROCESSING, QUEUED, ApiKey, Job, JobStatus, QueueState, WebhookEvent, Worker

IDEMPOTENCY_TTL = timedelta(hours=24)
"""How long a repeated submit is recognised."""

_COLLISIONS = 20
"""How often a claim may meet another one at the last place of a key with a limit, before it comes back empty."""


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
    upload_url: str | None = None
    priority: int = 0
    cancel_after: timedelta | None = None
    idempotency_key: str | None = None
    fingerprint: bytes | None = None


@dataclass(frozen=True, slots=True)
class Submitted:
    """The job that a submit made, or, being a repetition, found."""

    id: UUID
    status: JobStatus
    replayed: bool


async def submit(connection: AsyncConnection, job: NewJob, max_queued: int) -> Submitted:
    """Record a queued job, or find the one that the same idempotency key made; the caller hints once this returns.

    `max_queued` holds for keys that have no limit of their own; it may be passed by as many submits as arrive at the
    same moment.

    Raises:
        TooManyQueued: the key has as many jobs waiting as it may.
        IdempotencyKeyReused: the idempotency key came with another request before.
    """
    while True:
        row = (await connection.execute(_SUBMIT, _values(job, max_queued))).one()
        if row.id is not None:
            return Submitted(row.id, JobStatus.QUEUED, replayed=False)
        if row.admitted:  # but nothing was made: a repetition must not push back what the key submits next
            await connection.execute(_GIVE_BACK, {"owner": job.api_key_id, "new_cost": job.options.cost})
        if job.idempotency_key is not None and job.fingerprint is not None:
            found = await find(connection, job.api_key_id, job.idempotency_key, job.fingerprint)
            if found is not None:
                return found
        if not row.admitted:
            raise TooManyQueued("This API key has as many jobs waiting as it may: wait until some have started.")
        # The job of before was there a moment ago and its idempotency key has just been freed: now it goes in.


async def find(
    connection: AsyncConnection, api_key_id: UUID, idempotency_key: str, fingerprint: bytes
) -> Submitted | None:
    """Return the job that the same idempotency key made before, if any.

    Raises:
        IdempotencyKeyReused: it came with another request then.
    """
    statement = select(Job.id, Job.status, Job.fingerprint).where(
        Job.api_key_id == api_key_id, Job.idempotency_key == idempotency_key
    )
    row = (await connection.execute(statement)).one_or_none()
    if row is None:
        return None
    if row.fingerprint != fingerprint:
        raise IdempotencyKeyReused("This Idempotency-Key came with another request before.")
    return Submitted(row.id, JobStatus(row.status), replayed=True)


def _values(job: NewJob, max_queued: int) -> dict[str, Any]:
    return {
        "new_id": job.id,
        "owner": job.api_key_id,
        "new_model": job.model,
        "new_input": job.input,
        # What only the worker sets is left out: a worker of the release before need not know of it.
        "new_options": job.options.model_dump(mode="json", exclude={"small_tiles"}),
        "new_image_url": job.image_url,
        "new_image_key": job.image_key,
        "new_webhook_url": job.webhook_url,
        "new_webhook_events": [event.value for event in job.webhook_events],
        "new_upload_url": job.upload_url,
        "new_priority": job.priority,
        "new_cost": job.options.cost,
        "cancel_after": job.cancel_after,
        "new_idempotency_key": job.idempotency_key,
        "new_fingerprint": job.fingerprint,
        "default_max_queued": max_queued,
        "shard": job.id.int % 16,
    }


def processing_tag() -> ColumnElement[float]:
    """Return the latest tag that runs: the virtual time, while anything runs."""
    return func.coalesce(
        select(func.max(Job.tag)).where(Job.status == PROCESSING).scalar_subquery(), literal(0.0, Double)
    )


def _the(column: ColumnElement[Any]) -> Any:
    """Return the value in the only row, or NULL."""
    return select(column).scalar_subquery()


_COST = bindparam("new_cost", type_=Double)

# One UPDATE and no lock taken before it: after waiting for a lock, an UPDATE in the same statement would still start
# from the row as it was, and queue up behind those who wait for the lock: a deadlock.
_TURN = (
    update(ApiKey)
    .where(
        ApiKey.id == bindparam("owner", type_=Uuid),
        # Not a count: the place that is one too many must not be taken, and looking for it stops there.
        ~select(Job.id)
        .where(Job.status == QUEUED, Job.api_key_id == bindparam("owner", type_=Uuid))
        .offset(func.coalesce(ApiKey.max_queued, bindparam("default_max_queued", type_=Integer)) - 1)
        .limit(1)
        .correlate(ApiKey)
        .exists(),
    )
    .values(
        next_tag=func.greatest(ApiKey.next_tag, select(QueueState.virtual_time).scalar_subquery(), processing_tag())
        + _COST / ApiKey.weight
    )
    .returning((ApiKey.next_tag - _COST / ApiKey.weight).label("tag"))
    .cte("turn")
)

_NEW = (
    insert(Job)
    .from_select(
        [
            *("id", "api_key_id", "model", "input", "options", "image_url", "image_key", "webhook_url"),
            *("webhook_events", "upload_url", "priority", "cost", "deadline_at", "idempotency_key", "fingerprint"),
            "tag",
        ],
        select(
            bindparam("new_id", type_=Uuid),
            bindparam("owner", type_=Uuid),
            bindparam("new_model", type_=Text),
            bindparam("new_input", type_=JSONB),
            bindparam("new_options", type_=JSONB),
            bindparam("new_image_url", type_=Text),
            bindparam("new_image_key", type_=Text),
            bindparam("new_webhook_url", type_=Text),
            bindparam("new_webhook_events", type_=ARRAY(Text)),
            bindparam("new_upload_url", type_=Text),
            bindparam("new_priority", type_=SmallInteger),
            _COST,
            func.now() + bindparam("cancel_after", type_=Interval),
            bindparam("new_idempotency_key", type_=Text),
            bindparam("new_fingerprint", type_=LargeBinary),
            _TURN.c.tag,
        ),
    )
    .on_conflict_do_nothing(
        index_elements=[Job.api_key_id, Job.idempotency_key], index_where=Job.idempotency_key.is_not(None)
    )
    .returning(Job.id)
    .cte("new")
)

_GIVE_BACK = (
    update(ApiKey)
    .where(ApiKey.id == bindparam("owner", type_=Uuid))
    .values(next_tag=ApiKey.next_tag - _COST / ApiKey.weight)
)

_SUBMIT = select(
    select(literal(1)).select_from(_TURN).exists().label("admitted"), select(_NEW.c.id).scalar_subquery().label("id")
).add_cte(
    tally(select(literal("submitted"), bindparam("shard", type_=SmallInteger), literal(1)).select_from(_NEW)).cte(
        "tallied"
    ),
)


async def claim(
    connection: AsyncConnection, worker_id: UUID, worker: str, *, beside_others: bool = False
) -> Attempt | None:
    """Start an attempt at the job whose turn it is, and that nobody else is claiming; this is a beat, too.

    A worker that has other jobs in its hands says so: when it is the turn of a job that was lost before, it gets none.
    None can also mean that every queued row was locked by others at that moment: ask once more before going idle.

    Raises:
        LeaseLost: the worker was presumed dead and forgotten; it has to register again.
    """
    values = {"claimant": worker_id, "claimed_by": worker, "beside_others": beside_others}
    for _ in range(_COLLISIONS):
        try:
            row = (await connection.execute(_CLAIM, values)).one()
        except IntegrityError as error:
            if "jobs_processing_slot_key" not in str(error.orig):
                raise
            continue  # another claim was quicker at the last place of a key with a limit
        if not row.registered:
            raise LeaseLost("This worker was presumed dead.")
        if row.id is None:
            return None
        return Attempt(
            row.id,
            row.attempt,
            row.options,
            row.image_url,
            row.image_key,
            row.cost,
            row.strikes,
            WebhookEvent.PROGRESS in row.webhook_events,
            row.upload_url,
        )
    return None


def _waiting(job: Any) -> ColumnElement[bool]:
    """Queued, and neither due later nor too late."""
    return and_(
        job.status == QUEUED,
        or_(job.due_at.is_(None), job.due_at <= func.now()),
        or_(job.deadline_at.is_(None), job.deadline_at > func.now()),
    )


def _running(api_key_id: Any) -> Any:
    return (
        select(func.count())
        .select_from(Job)
        .where(Job.status == PROCESSING, Job.api_key_id == api_key_id)
        .correlate(ApiKey)
        .scalar_subquery()
    )


# Keys that have as many jobs running as they may.
_FULL = select(ApiKey.id).where(ApiKey.max_concurrent <= _running(ApiKey.id))

_ALIVE = (
    update(Worker)
    .where(Worker.id == bindparam("claimant", type_=Uuid))
    .values(beat_at=func.now())
    .returning(Worker.id)
    .cte("alive")
)

# Whose turn it is …
_FIRST = (
    select(Job.id, Job.api_key_id, Job.tag, Job.cost)
    .where(_waiting(Job), Job.api_key_id.not_in(_FULL))
    .order_by(Job.tag, Job.id)
    .limit(1)
    .with_for_update(skip_locked=True)
    .cte("first")
)

# … and which of that key's jobs it shall be. It takes over the place of the first, which in exchange gets its place.
# It must cost no more than the first, or priorities would change something between keys: a place is worth what it cost.
_Own = aliased(Job, name="own")
_PICK = (
    select(_Own.id, _Own.tag, _Own.strikes)
    .where(_waiting(_Own), _Own.api_key_id == _the(_FIRST.c.api_key_id), _Own.cost <= _the(_FIRST.c.cost))
    .order_by(_Own.priority.desc(), _Own.tag, _Own.id)
    .limit(1)
    .with_for_update(skip_locked=True)
    .cte("pick")
)

# A job that kills its worker would take those beside it along, again and again: one that was lost before runs alone.
_CLAIMABLE = and_(
    _the(_ALIVE.c.id).is_not(None),
    or_(~bindparam("beside_others", type_=Boolean), _the(_PICK.c.strikes) == 0),
)

_EXCHANGED = (
    update(Job)
    .where(Job.id == _the(_FIRST.c.id), Job.id != _the(_PICK.c.id), _CLAIMABLE)
    .values(tag=_the(_PICK.c.tag))
    .cte("exchanged")
)

_place = func.generate_series(1, ApiKey.max_concurrent).table_valued("value", name="place").render_derived()
_Held = aliased(Job, name="held")
_FREE_SLOT = (
    select(func.min(_place.c.value))
    .select_from(ApiKey)
    .join(_place, true())
    .where(
        ApiKey.id == Job.api_key_id,
        ~select(_Held.id)
        .where(_Held.status == PROCESSING, _Held.api_key_id == ApiKey.id, _Held.slot == _place.c.value)
        .exists(),
    )
    .correlate(Job)
    .scalar_subquery()
)

_CLAIMED = (
    update(Job)
    .where(Job.id == _the(_PICK.c.id), Job.status == QUEUED, _CLAIMABLE)
    .values(
        status=JobStatus.PROCESSING.value,
        attempt=Job.attempt + 1,
        tag=_the(_FIRST.c.tag),
        slot=_FREE_SLOT,
        worker=bindparam("claimed_by", type_=Text),
        worker_id=_the(_ALIVE.c.id),
        started_at=func.now(),
    )
    .returning(
        *(Job.id, Job.attempt, Job.options, Job.image_url, Job.image_key, Job.cost, Job.strikes),
        *(Job.webhook_events, Job.upload_url),
    )
    .cte("claimed")
)

_CLAIM = (
    select(select(literal(1)).select_from(_ALIVE).exists().label("registered"), _CLAIMED)
    .select_from(select(literal(1)).subquery("one").outerjoin(_CLAIMED, true()))
    .add_cte(_EXCHANGED)
)


async def count_claimable(connection: AsyncConnection, older_than: timedelta, limit: int) -> int:
    """Return how many jobs could have been claimed for longer than `older_than`, counting no further than `limit`."""
    ripe_at = func.coalesce(Job.due_at, Job.created_at)
    waiting = (
        select(Job.id)
        .where(_waiting(Job), ripe_at < func.now() - older_than, Job.api_key_id.not_in(_FULL))
        .limit(limit)
        .subquery()
    )
    return (await connection.execute(select(func.count()).select_from(waiting))).scalar_one()


async def free_idempotency_keys(connection: AsyncConnection) -> None:
    """Let go of the idempotency keys that are older than IDEMPOTENCY_TTL."""
    old = and_(Job.idempotency_key.is_not(None), Job.created_at < func.now() - IDEMPOTENCY_TTL)
    await connection.execute(update(Job).where(old).values(idempotency_key=None, fingerprint=None))
