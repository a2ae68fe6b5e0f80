"""GET /v2/webhooks/secret and POST /v2/webhooks/secret/rotate. An addition of ours: Apiframe signs with the API key."""

from datetime import timedelta

from fastapi import APIRouter
from pydantic import BaseModel, Field

from api.apiframe.schemas import Timestamp
from api.dependencies import KeyedRoute, PartsDep, WriterDep
from api.errors import documented
from core.signing import show_secret
from db import webhook_secrets

router = APIRouter(prefix="/v2/webhooks", tags=["webhooks"], route_class=KeyedRoute)


class WebhookSecret(BaseModel):
    secret: str = Field(description="What any library for Standard Webhooks verifies `webhook-signature` with.")
    createdAt: Timestamp


class RotatedSecret(WebhookSecret):
    previousExpiresAt: Timestamp | None = Field(
        description="Until then webhooks are signed with the former secret too; null when there was none."
    )


@router.get("/secret", responses=documented(401, 403, 429), summary="Read the webhook secret")
async def read(caller: WriterDep, parts: PartsDep) -> WebhookSecret:
    """Return what your webhooks are signed with. The first call makes it."""
    async with parts.database.connection() as connection:
        current = await webhook_secrets.current(connection, parts.sealer, caller.id)
    return WebhookSecret(secret=show_secret(current.secret), createdAt=current.created_at)


@router.post("/secret/rotate", responses=documented(401, 403, 429), summary="Replace the webhook secret")
async def rotate(caller: WriterDep, parts: PartsDep) -> RotatedSecret:
    """Replace the secret. Until previousExpiresAt webhooks carry a signature for each of the two."""
    overlap = timedelta(seconds=parts.settings.webhook_secret_overlap_seconds)
    async with parts.database.connection() as connection:
        rotation = await webhook_secrets.rotate(connection, parts.sealer, caller.id, overlap)
    return RotatedSecret(
        secret=show_secret(rotation.secret),
        createdAt=rotation.created_at,
        previousExpiresAt=rotation.previous_expires_at,
    )
