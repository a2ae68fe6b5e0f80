"""GET /v2/jobs/{id}/deliveries and POST /v2/jobs/{id}/deliveries/{delivery_id}/resend. Additions of ours."""

from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel, Field

from api.apiframe.schemas import Timestamp
from api.dependencies import KeyedRoute, PartsDep, ReaderDep, WriterDep
from api.errors import documented
from core.errors import NotFound
from db import deliveries, delivery_log
from db.delivery_log import DeliveryRecord
from db.models import DeliveryStatus, WebhookEvent

router = APIRouter(prefix="/v2/jobs/{job_id}/deliveries", tags=["webhooks"], route_class=KeyedRoute)


class DeliveryAttempt(BaseModel):
    number: int
    at: Timestamp = Field(description="When it was over.")
    durationMs: int
    statusCode: int | None = Field(description="Null when no answer came; then `error` says why.")
    excerpt: str | None = Field(description="The beginning of the receiver's answer.")
    error: str | None


class DeliveryObject(BaseModel):
    """A webhook that reports a job's end, and each attempt to deliver it."""

    id: UUID = Field(description="The same as the header webhook-id, in every attempt.")
    event: WebhookEvent
    url: str
    status: DeliveryStatus
    createdAt: Timestamp
    nextAttemptAt: Timestamp | None = Field(
        description="Null when no attempt follows. While one is under way: when it would be presumed lost."
    )
    attempts: list[DeliveryAttempt] = Field(description="Oldest first; of very many, the newest.")


class DeliveryList(BaseModel):
    deliveries: list[DeliveryObject]


@router.get("", responses=documented(400, 401, 403, 404, 429), summary="Read how a job's webhook fared")
async def read(job_id: UUID, caller: ReaderDep, parts: PartsDep) -> DeliveryList:
    """List what was, or is to be, delivered to the job's webhook. Progress is not in it: nobody keeps that."""
    async with parts.database.connection() as connection:
        found = await delivery_log.read(connection, job_id, caller.id)
    if found is None:
        raise NotFound("Job not found")
    return DeliveryList(deliveries=[_shown(record) for record in found])


@router.post(
    "/{delivery_id}/resend",
    status_code=202,
    responses=documented(400, 401, 403, 404, 429),
    summary="Send a webhook again",
)
async def resend(job_id: UUID, delivery_id: UUID, caller: WriterDep, parts: PartsDep) -> DeliveryObject:
    """Send the webhook again now, however it stands, under the same webhook-id and with all retries anew.

    An attempt that is under way counts as that: another follows only when it fails.
    """
    async with parts.database.connection() as connection:
        resent = await deliveries.resend(connection, job_id, delivery_id, caller.id)
        found = await delivery_log.read(connection, job_id, caller.id) if resent else None
    record = next((record for record in found or [] if record.id == delivery_id), None)
    if record is None:
        raise NotFound("Delivery not found")
    return _shown(record)


def _shown(record: DeliveryRecord) -> DeliveryObject:
    return DeliveryObject(
        id=record.id,
        event=record.event,
        url=record.url,
        status=record.status,
        createdAt=record.created_at,
        nextAttemptAt=record.due_at if record.status is DeliveryStatus.PENDING else None,
        attempts=[
            DeliveryAttempt(
                number=attempt.number,
                at=attempt.at,
                durationMs=attempt.duration_ms,
                statusCode=attempt.status_code,
                excerpt=attempt.excerpt,
                error=attempt.error,
            )
            for attempt in record.attempts
        ],
    )
