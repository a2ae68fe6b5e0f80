"""The life of a delivery. Its row is born in db.jobs, inside the statement that ends the job.

`attempts` is the fence: whoever records an attempt names its number.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Double,
    Integer,
    Interval,
    Text,
    Update,
    and_,
    any_,
    bindparam,
    case,
    column,
    func,
    insert,
    literal,
    literal_column,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import InstrumentedAttribute
from sqlalchemy.sql.dml import ReturningUpdate

from db.models import PROCESSING, Delivery, DeliveryAttempt, DeliveryStatus, Job, WebhookEvent

CANDIDATES = 500
"""How far into what is due one look goes. More of one receiver than it has room for is passed over in the next."""

POSTPONED_SPREAD = 0.2
"""What waits for a receiver comes back over this part of the wait, so that it does not come all at once."""

HOPELESS_AFTER = timedelta(days=3)
"""What is owed to a dead receiver is put off no longer than this; a whole schedule of retries takes a day."""


@dataclass(frozen=True, slots=True)
class DueDelivery:
    """A delivery that is ours to attempt now; `number` counts its attempts and is their fence."""

    id: UUID
    job_id: UUID
    event: WebhookEvent
    url: str
    receiver: str
    """Scheme, host and port of the URL, in lower case."""
    number: int
    schedule_start: int
    """How many attempts had been begun when its schedule of retries started."""
    created_at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of one POST: an answer, or the reason why there was none."""

    duration_ms: int
    status_code: int | None = None
    excerpt: str | None = None
    error: str | None = None
    retry_after: float | None = None
    """How many seconds the receiver asked to be left alone."""

    @property
    def delivered(self) -> bool:
        return self.status_code is not None and 200 <= self.status_code < 300


@dataclass(frozen=True, slots=True)
class ProgressTarget:
    """Where the progress of a running job is to be told."""

    api_key_id: UUID
    model: str
    url: str
    receiver: str


async def take_due(
    connection: AsyncConnection, limit: int, lease: timedelta, rooms: Mapping[str, int], room: int
) -> list[DueDelivery]:
    """Begin an attempt at each of the deliveries that are due, oldest first.

    Until `lease` has passed no other dispatcher takes them; after that their attempt is presumed dead.

    Args:
        rooms: how many may be begun for each receiver; 0 passes it over.
        room: how many for any other.
    """
    values = {
        "receivers": list(rooms),
        "rooms": list(rooms.values()),
        "room": room,
        "at_most": limit,
        "lease": lease,
    }
    return [DueDelivery(**_delivery(row)) for row in (await connection.execute(_TAKE, values)).mappings()]


def _delivery(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {**row, "event": WebhookEvent(row["event"])}


def _origin(url: ColumnElement[str] | InstrumentedAttribute[str | None]) -> ColumnElement[str]:
    return func.coalesce(func.substring(func.lower(url), "^[a-z]+://[^/?#]+"), url)


# The release before wrote rows without a receiver.
_RECEIVER: ColumnElement[str] = func.coalesce(func.nullif(func.lower(Delivery.receiver), ""), _origin(Delivery.url))
# Spelled out and no parameter, so that every plan of it finds the partial index.
_DUE = and_(Delivery.status == literal_column(f"'{DeliveryStatus.PENDING}'"), Delivery.due_at <= func.now())


def _taking() -> ReturningUpdate[*tuple[Any, ...]]:
    limited = (
        func.unnest(bindparam("receivers", type_=ARRAY(Text)), bindparam("rooms", type_=ARRAY(Integer)))
        .table_valued(column("receiver", Text), column("room", Integer), name="limited")
        .render_derived()
    )
    room = func.coalesce(limited.c.room, bindparam("room", type_=Integer))
    due = (
        select(Delivery.id, Delivery.due_at, _RECEIVER.label("receiver"), room.label("room"))
        .outerjoin_from(Delivery, limited, limited.c.receiver == _RECEIVER)
        .where(_DUE, room > 0)
        .order_by(Delivery.due_at)
        .limit(CANDIDATES)
        .cte("due")
    )
    place = func.row_number().over(partition_by=due.c.receiver, order_by=due.c.due_at)
    ranked = select(due.c.id, due.c.room, place.label("place")).cte("ranked")
    taken = (
        select(Delivery.id)
        .join(ranked, ranked.c.id == Delivery.id)
        .where(ranked.c.place <= ranked.c.room, _DUE)
        .order_by(Delivery.due_at)
        .limit(bindparam("at_most", type_=Integer))
        .with_for_update(skip_locked=True, of=Delivery)
        .cte("taken")  # and not a plain subquery, which a join could run, and lock by, more than once
    )
    return (
        update(Delivery)
        .where(Delivery.id.in_(select(taken.c.id)))
        .values(attempts=Delivery.attempts + 1, due_at=func.now() + bindparam("lease", type_=Interval))
        .returning(
            Delivery.id,
            Delivery.job_id,
            Delivery.event,
            Delivery.url,
            _RECEIVER.label("receiver"),
            Delivery.attempts.label("number"),
            Delivery.schedule_start,
            Delivery.created_at,
        )
    )


_TAKE = _taking()


async def postpone(connection: AsyncConnection, pauses: Mapping[str, float], limit: int) -> int:
    """Put off what is due for these receivers, by so many seconds and a little more; return how many were put off.

    It counts as no attempt. What has waited for longer than HOPELESS_AFTER fails instead, unless it was resent.
    """
    values = {"receivers": list(pauses), "pauses": list(pauses.values()), "at_most": limit}
    return (await connection.execute(_POSTPONE, values)).rowcount


def _postponing() -> Update:
    held = (
        func.unnest(bindparam("receivers", type_=ARRAY(Text)), bindparam("pauses", type_=ARRAY(Double)))
        .table_valued(column("receiver", Text), column("pause", Double), name="held")
        .render_derived()
    )
    due = (
        select(Delivery.id, held.c.pause)
        .join_from(Delivery, held, held.c.receiver == _RECEIVER)
        .where(_DUE)
        .order_by(Delivery.due_at)
        .limit(bindparam("at_most", type_=Integer))
        .with_for_update(skip_locked=True, of=Delivery)
        .cte("due")
    )
    pause = due.c.pause * (1 + POSTPONED_SPREAD * func.random())
    later = func.now() + func.make_interval(0, 0, 0, 0, 0, 0, pause)
    hopeless = and_(Delivery.schedule_start == 0, Delivery.created_at < func.now() - HOPELESS_AFTER)
    status = case((hopeless, literal(DeliveryStatus.FAILED.value)), else_=Delivery.status)
    return update(Delivery).where(Delivery.id == due.c.id).values(due_at=later, status=status)


_POSTPONE = _postponing()


async def record_attempt(
    connection: AsyncConnection, delivery: DueDelivery, outcome: Outcome, retry_after: timedelta | None
) -> None:
    """Log the attempt, and close the delivery or set its next attempt; `retry_after=None` gives up.

    Nothing but the log is changed when another attempt has begun meanwhile. When a resend was asked for meanwhile, and
    this attempt failed, another is due now.
    """
    as_begun = Delivery.schedule_start == delivery.schedule_start
    changes: dict[str, Any]
    if outcome.delivered:
        changes = {"status": DeliveryStatus.DELIVERED.value}
    elif retry_after is None:
        changes = {
            "status": case((as_begun, DeliveryStatus.FAILED.value), else_=Delivery.status),
            "due_at": case((as_begun, Delivery.due_at), else_=func.now()),
        }
    else:
        changes = {"due_at": case((as_begun, func.now() + retry_after), else_=func.now())}
    current = (
        update(Delivery)
        .where(
            Delivery.id == delivery.id,
            Delivery.attempts == delivery.number,
            Delivery.status == DeliveryStatus.PENDING,
        )
        .values(changes)
        .cte("current")
    )
    log = insert(DeliveryAttempt).values(
        delivery_id=delivery.id,
        number=delivery.number,
        duration_ms=outcome.duration_ms,
        status_code=outcome.status_code,
        excerpt=outcome.excerpt,
        error=outcome.error,
    )
    await connection.execute(log.add_cte(current))


async def resend(connection: AsyncConnection, job_id: UUID, delivery_id: UUID, api_key_id: UUID) -> bool:
    """Make a delivery due now, however it stands, with its schedule of retries from the start.

    While an attempt is under way no other is begun beside it. False when the key has no such delivery.
    """
    own = and_(Delivery.id == delivery_id, Delivery.job_id == job_id, Job.api_key_id == api_key_id)
    logged = (
        select(DeliveryAttempt.id)
        .where(DeliveryAttempt.delivery_id == Delivery.id, DeliveryAttempt.number == Delivery.attempts)
        .exists()
    )
    seen = (Delivery.status, Delivery.attempts, Delivery.due_at)
    look = select(*seen, logged.label("logged")).join_from(Delivery, Job, Job.id == Delivery.job_id).where(own)
    while (row := (await connection.execute(look)).one_or_none()) is not None:
        under_way = row.status == DeliveryStatus.PENDING and row.attempts > 0 and not row.logged
        changes = {"status": DeliveryStatus.PENDING.value, "schedule_start": row.attempts}
        # Whatever happens to the row in between changes one of those three: then look again.
        unchanged = [Delivery.id == delivery_id, *(was == value for was, value in zip(seen, row[:3], strict=True))]
        change = update(Delivery).where(*unchanged).values(changes if under_way else changes | {"due_at": func.now()})
        if (await connection.execute(change)).rowcount:
            return True
    return False


async def progress_target(connection: AsyncConnection, job_id: UUID, attempt: int) -> ProgressTarget | None:
    """Return where to tell the progress of an attempt; None when it runs no more, or nobody asked to be told."""
    statement = select(Job.api_key_id, Job.model, Job.webhook_url, _origin(Job.webhook_url)).where(
        Job.id == job_id,
        Job.status == PROCESSING,
        Job.attempt == attempt,
        Job.webhook_url.is_not(None),
        literal(WebhookEvent.PROGRESS.value) == any_(Job.webhook_events),
    )
    row = (await connection.execute(statement)).one_or_none()
    return None if row is None else ProgressTarget(*row)
