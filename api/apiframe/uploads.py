"""POST /v2/uploads."""

from fastapi import APIRouter, UploadFile

from api.apiframe import schemas
from api.dependencies import CallerDep, PartsDep
from api.errors import documented
from core.errors import PayloadTooLarge

router = APIRouter(prefix="/v2/uploads", tags=["uploads"])


@router.post(
    "",
    status_code=201,
    response_model=schemas.UploadObject,
    responses=documented(400, 401, 403, 413),
    summary="Send an image",
)
async def upload(file: UploadFile, caller: CallerDep, parts: PartsDep) -> schemas.UploadObject:
    """Store an image for later jobs. What it is, its bytes tell; the declared type and name are ignored."""
    limit = parts.settings.max_input_bytes
    if file.size is not None and file.size > limit:
        raise PayloadTooLarge(f"file is larger than {limit} bytes.")
    received = await parts.intake.receive(caller.id, await file.read(), "file")
    return schemas.UploadObject(
        id=received.id,
        url=parts.storage.url(received.key, received.expires_at),
        contentType=received.format.content_type,
        byteSize=received.size_bytes,
        expiresAt=received.expires_at,
    )
