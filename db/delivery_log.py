"""The deliveries of a job, and their attempts, as its caller reads them."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import RowMapping, Uuid, any_, bindparam, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection

from db.models import Delivery, DeliveryAttempt, DeliveryStatus, Job, WebhookEvent

MAX_ATTEMPTS = 200
"""How many attempts are read at most, the newest: a delivery that is sent again and again has any number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptRecord:
    """One POST that was made, and what came of it."""

    number: int
    at: datetime
    """When it was over."""
    duration_ms: int
    status_code: int | None
    excerpt: str | None
    error: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class DeliveryRecord:
    """A delivery and its attempts, oldest first."""

    id: UUID
    event: WebhookEvent
    url: str
    status: DeliveryStatus
    created_at: datetime
    due_at: datetime
    attempts: list[AttemptRecord] = field(default_factory=list[AttemptRecord])


async def read(connection: AsyncConnection, job_id: UUID, api_key_id: UUID) -> list[DeliveryRecord] | None:
    """Return the deliveries of a job, oldest first; None when there is no job of that id under that key."""
    rows = (await connection.execute(_DELIVERIES, {"job_id": job_id, "owner": api_key_id})).mappings().all()
    if not rows:
        return None
    # A job without deliveries is one row of nothing but NULLs.
    found = {row["id"]: DeliveryRecord(**_values(row)) for row in rows if row["id"] is not None}
    for row in reversed((await connection.execute(_ATTEMPTS, {"ids": list(found)})).mappings().all()):
        values: dict[str, Any] = {**row}
        found[values.pop("delivery_id")].attempts.append(AttemptRecord(**values))
    return list(found.values())


def _values(row: RowMapping) -> dict[str, Any]:
    return {**row, "event": WebhookEvent(row["event"]), "status": DeliveryStatus(row["status"])}


_DELIVERIES = (
    select(Delivery.id, Delivery.event, Delivery.url, Delivery.status, Delivery.created_at, Delivery.due_at)
    .select_from(Job)
    .outerjoin(Delivery, Delivery.job_id == Job.id)
    .where(Job.id == bindparam("job_id"), Job.api_key_id == bindparam("owner"))
    .order_by(Delivery.created_at, Delivery.id)
)

_ATTEMPTS = (
    select(
        DeliveryAttempt.delivery_id,
        DeliveryAttempt.number,
        DeliveryAttempt.at,
        DeliveryAttempt.duration_ms,
        DeliveryAttempt.status_code,
        DeliveryAttempt.excerpt,
        DeliveryAttempt.error,
    )
    .where(DeliveryAttempt.delivery_id == any_(bindparam("ids", type_=ARRAY(Uuid))))
    .order_by(DeliveryAttempt.id.desc())
    .limit(MAX_ATTEMPTS)
)
