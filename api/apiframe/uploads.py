"""POST /v2/uploads."""

from typing import Annotated

from fastapi import APIRouter, Header, Response, UploadFile

from api.apiframe import schemas
from api.dependencies import CallerDep, PartsDep
from api.errors import documented
from api.headers import REPLAYED, read_idempotency_key
from core.errors import PayloadTooLarge

router = APIRouter(prefix="/v2/uploads", tags=["uploads"])


@router.post(
    "",
    status_code=201,
    response_model=schemas.UploadObject,
    responses={
        201: {"headers": {REPLAYED: {"description": "true: it was sent before.", "schema": {"type": "string"}}}},
        **documented(400, 401, 403, 409, 413),
    },
    summary="Send an image",
)
async def upload(
    file: UploadFile,
    caller: CallerDep,
    parts: PartsDep,
    response: Response,
    idempotency_key: Annotated[str | None, Header(description="The same key and image give the same upload.")] = None,
) -> schemas.UploadObject:
    """Store an image for later jobs. What it is, its bytes tell; the declared type and name are ignored."""
    limit = parts.settings.max_input_bytes
    if file.size is not None and file.size > limit:
        raise PayloadTooLarge(f"file is larger than {limit} bytes.")
    key = read_idempotency_key(idempotency_key)
    received = await parts.intake.receive(caller.id, await file.read(), "file", key)
    if received.replayed:
        response.headers[REPLAYED] = "true"
    return schemas.UploadObject(
        id=received.id,
        url=await parts.storage.url(received.key, received.expires_at),
        contentType=received.format.content_type,
        byteSize=received.size_bytes,
        expiresAt=received.expires_at,
    )
