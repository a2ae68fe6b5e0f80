"""POST /v2/uploads, /v2/uploads/presign."""

from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, Header, Request, Response

from api.apiframe import schemas
from api.dependencies import KeyedRoute, PartsDep, WriterDep
from api.errors import documented
from api.headers import REPLAYED, read_idempotency_key
from api.inputs import UPLOAD_SCHEME
from api.multipart import read_file
from core.options import OutputFormat

router = APIRouter(prefix="/v2/uploads", tags=["uploads"], route_class=KeyedRoute)

# FastAPI itself would gather the whole form, in a temporary file, before it called us.
_FORM = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"file": {"type": "string", "format": "binary"}},
                "required": ["file"],
            }
        }
    },
}


@router.post(
    "",
    status_code=201,
    response_model=schemas.UploadObject,
    responses={
        201: {"headers": {REPLAYED: {"description": "true: it was sent before.", "schema": {"type": "string"}}}},
        **documented(400, 401, 403, 408, 409, 413, 429),
    },
    openapi_extra={"requestBody": _FORM},
    summary="Send an image",
)
async def upload(
    request: Request,
    caller: WriterDep,
    parts: PartsDep,
    response: Response,
    idempotency_key: Annotated[str | None, Header(description="The same key and image give the same upload.")] = None,
) -> schemas.UploadObject:
    """Store an image for later jobs. What it is, its bytes tell; the declared type and name are ignored."""
    key = read_idempotency_key(idempotency_key)
    async with aclosing(read_file(request, "file")) as file:
        received = await parts.intake.inputs.receive(caller.id, file, "file", key)
    if received.replayed:
        response.headers[REPLAYED] = "true"
    return schemas.UploadObject(
        id=received.id,
        url=await parts.storage.url(received.key, received.expires_at),
        contentType=received.format.content_type,
        byteSize=received.size_bytes,
        expiresAt=received.expires_at,
    )


@router.post(
    "/presign",
    status_code=201,
    response_model=schemas.PresignedUpload,
    responses=documented(400, 401, 403, 413, 429),
    summary="Get a URL to put an image to",
)
async def presign(body: schemas.PresignRequest, caller: WriterDep, parts: PartsDep) -> schemas.PresignedUpload:
    """Let an image be put into the storage without a detour through the API; it is looked at when it is first used."""
    format = next(format for format in OutputFormat if format.content_type == body.contentType)
    presigned = await parts.intake.inputs.presign(caller.id, format, body.byteSize, "byteSize")
    return schemas.PresignedUpload(
        id=presigned.id,
        image=f"{UPLOAD_SCHEME}{presigned.id}",
        url=presigned.target.url,
        headers=dict(presigned.target.headers),
        expiresAt=presigned.target_expires_at,
        imageExpiresAt=presigned.expires_at,
    )
