"""GET and PUT /v2/files/{key}: the objects of a local folder, by signed URL."""

import hashlib
import time
from collections.abc import AsyncGenerator
from pathlib import PurePosixPath
from typing import Any

import anyio.to_thread
from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, Response

from api.dependencies import PartsDep
from api.errors import documented
from api.headers import names_tag
from core.errors import Forbidden, NotFound, RequestError, RequestTooSlow, ValidationError
from core.storage import CACHE_CONTROL, CONTENT_TYPES, FILES_PATH, LocalStorage

router = APIRouter(prefix=FILES_PATH, tags=["files"])

LATE_SECONDS = 240.0
"""How long after its URL has expired an upload may still be on its way. It is to be there before the sweep deletes what
the expired upload left, five minutes after its expiry: nothing would look for it again."""

_IMAGES: dict[str, dict[str, Any]] = {content_type: {} for content_type in CONTENT_TYPES.values()}

_DOCUMENTED: dict[int | str, dict[str, Any]] = {
    200: {"content": _IMAGES, "description": "The image."},
    206: {"description": "The part of the image that Range asked for."},
    304: {"description": "The image has not changed."},
    416: {"description": "Range asks for what is not there."},
    **documented(403, 404),
}

_TAKEN: dict[int | str, dict[str, Any]] = {
    200: {"description": "The upload is stored."},
    **documented(400, 403, 404, 408, 412, 413),
}

_SENT = {
    "required": True,
    "content": {
        content_type: {"schema": {"type": "string", "format": "binary"}} for content_type in CONTENT_TYPES.values()
    },
}


@router.head("/{key:path}", include_in_schema=False)
@router.get("/{key:path}", response_class=FileResponse, responses=_DOCUMENTED)
async def read(key: str, parts: PartsDep, request: Request, expires: str = "", signature: str = "") -> Response:
    """Return an object to whoever holds its signed URL; no API key is needed."""
    if not isinstance(parts.storage, LocalStorage):
        raise NotFound("There is no such object.")
    if not parts.storage.allows(key, expires, signature):
        raise Forbidden("This URL's signature is not valid, or it has expired.")
    path = parts.storage.path(key)
    media_type = CONTENT_TYPES.get(PurePosixPath(key).suffix)
    if media_type is None or not await anyio.to_thread.run_sync(path.is_file):
        raise NotFound("There is no such object.")
    # An object never changes under its key, so the key is tag enough.
    etag = f'"{hashlib.sha256(key.encode()).hexdigest()[:32]}"'
    headers = {
        "ETag": etag,
        "Cache-Control": CACHE_CONTROL,
        "Cross-Origin-Resource-Policy": "cross-origin",  # pictures may be shown on any page
    }
    if names_tag(request.headers.getlist("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    return FileResponse(path, headers=headers, media_type=media_type)


@router.put("/{key:path}", response_class=Response, responses=_TAKEN, openapi_extra={"requestBody": _SENT})
async def put(
    key: str,
    parts: PartsDep,
    request: Request,
    type: str = "",
    size: str = "",
    expires: str = "",
    signature: str = "",
) -> Response:
    """Take the one upload that a presigned URL promises: of exactly its type and size, and only once."""
    if not isinstance(parts.storage, LocalStorage):
        raise NotFound("There is no such object.")
    if not parts.storage.allows_put(key, type, size, expires, signature):
        raise Forbidden("This URL's signature is not valid, or it has expired.")
    if request.headers.get("content-type") != type:
        raise ValidationError({"Content-Type": [f"must be {type}"]})
    if request.headers.get("content-length", size) != size:
        raise _wrong_size(size)
    await parts.storage.create(key, _exactly(int(size), request, int(expires) + LATE_SECONDS))
    return Response()


async def _exactly(size: int, request: Request, until: float) -> AsyncGenerator[bytes]:
    """Yield the request's body; raises as soon as it is longer than `size`, or late, or when it ends too early."""
    missing = size
    try:
        async for chunk in request.stream():
            missing -= len(chunk)
            if missing < 0:
                break
            if time.time() > until:
                raise RequestTooSlow("The upload took too long: its URL has expired.")
            yield chunk
    except ClientDisconnect as error:
        raise RequestError("The connection was closed before all of the body came.") from error
    if missing:
        raise _wrong_size(str(size))


def _wrong_size(size: str) -> ValidationError:
    return ValidationError({"body": [f"must have exactly {size} bytes"]})
