"""The life of a delivery. Its row is born in db.jobs, inside the statement that ends the job."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from db.models import Delivery, DeliveryAttempt, DeliveryStatus, WebhookEvent


@dataclass(frozen=True, slots=True)
class DueDelivery:
    """A delivery that is ours to attempt now; `number` counts its attempts and is their fence."""

    id: UUID
    job_id: UUID
    event: WebhookEvent
    url: str
    number: int
    created_at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of one POST: an answer, or the reason why there was none."""

    duration_ms: int
    status_code: int | None = None
    excerpt: str | None = None
    error: str | None = None

    @property
    def delivered(self) -> bool:
        return self.status_code is not None and 200 <= self.status_code < 300


async def take_due(connection: AsyncConnection, limit: int, lease: timedelta) -> list[DueDelivery]:
    """Begin an attempt at each of the deliveries that are due, oldest first.

    Until `lease` has passed no other dispatcher takes them; after that their attempt is presumed dead.
    """
    due = (
        select(Delivery.id)
        .where(Delivery.status == DeliveryStatus.PENDING, Delivery.due_at <= func.now())
        .order_by(Delivery.due_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .cte("due")  # and not a plain subquery, which a join could run, and lock by, more than once
    )
    statement = (
        update(Delivery)
        .where(Delivery.id.in_(select(due.c.id)))
        .values(attempts=Delivery.attempts + 1, due_at=func.now() + lease)
        .returning(Delivery.id, Delivery.job_id, Delivery.event, Delivery.url, Delivery.attempts, Delivery.created_at)
    )
    return [
        DueDelivery(row.id, row.job_id, WebhookEvent(row.event), row.url, row.attempts, row.created_at)
        for row in await connection.execute(statement)
    ]


async def record_attempt(
    connection: AsyncConnection, delivery: DueDelivery, outcome: Outcome, retry_after: timedelta | None
) -> None:
    """Log the attempt, and close the delivery or set its next attempt; `retry_after=None` gives up.

    Nothing but the log is changed when another attempt has begun meanwhile.
    """
    if outcome.delivered:
        changes = {"status": DeliveryStatus.DELIVERED.value}
    elif retry_after is None:
        changes = {"status": DeliveryStatus.FAILED.value}
    else:
        changes = {"due_at": func.now() + retry_after}
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
