"""GET /v2/me and /v2/models."""

from typing import Literal

from fastapi import APIRouter

from api.apiframe import schemas
from api.dependencies import KeyedRoute, PartsDep, ReaderDep
from api.errors import documented
from db.models import Scope

router = APIRouter(prefix="/v2", tags=["account"], route_class=KeyedRoute)

_MODELS = [
    schemas.ModelObject(
        id="clarity-upscale",
        label="Clarity Upscaler",
        description="Upscales an image and invents as much detail as it is told to.",
        paramsKey=schemas.ClarityUpscaleRequest.params_field,
        params=schemas.ClarityUpscaleParams.model_json_schema(),
    ),
    schemas.ModelObject(
        id="superres",
        label="Super-resolution",
        description="Upscales an image by a network that sharpens what is there and invents nothing.",
        paramsKey=schemas.SuperresRequest.params_field,
        params=schemas.SuperresParams.model_json_schema(),
    ),
]


@router.get("/me", responses=documented(401, 403, 429))
async def me(caller: ReaderDep, parts: PartsDep) -> schemas.Account:
    """Return who the key belongs to. There are no users and teams here: a key is both."""
    default = parts.settings.requests_per_minute or None
    return schemas.Account(
        user=schemas.User(id=caller.id, email=None, role="ADMIN" if caller.may(Scope.ADMIN) else "MEMBER"),
        team=schemas.Team(id="default", name="default", plan="self-hosted", credits=None, customerId=None),
        apiKey=schemas.KeyObject(
            id=caller.id,
            name=caller.name,
            prefix=caller.prefix,
            scopes=[scope for scope in Scope if scope in caller.scopes],
            expiresAt=caller.expires_at,
            requestsPerMinute=default if caller.requests_per_minute is None else caller.requests_per_minute,
            dailyPixels=caller.daily_pixels,
        ),
    )


@router.get("/models", responses=documented(400))
async def models(modality: Literal["image", "video", "music"] | None = None) -> schemas.ModelList:
    """Return what can be asked for; needs no key."""
    return schemas.ModelList(models=_MODELS if modality in (None, "image") else [])
