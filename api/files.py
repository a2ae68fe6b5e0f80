"""GET /v2/files/{key}: the objects of a local folder, by signed URL."""

import hashlib
from pathlib import PurePosixPath
from typing import Any

import anyio.to_thread
from fastapi import APIRouter, Request
from starlette.responses import FileResponse, Response

from api.dependencies import PartsDep
from api.errors import documented
from api.headers import names_tag
from core.errors import Forbidden, NotFound
from core.storage import CONTENT_TYPES, FILES_PATH, LocalStorage

router = APIRouter(prefix=FILES_PATH, tags=["files"])

_IMAGES: dict[str, dict[str, Any]] = {content_type: {} for content_type in CONTENT_TYPES.values()}

_DOCUMENTED: dict[int | str, dict[str, Any]] = {
    200: {"content": _IMAGES, "description": "The image."},
    206: {"description": "The part of the image that Range asked for."},
    304: {"description": "The image has not changed."},
    416: {"description": "Range asks for what is not there."},
    **documented(403, 404),
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
        "Cache-Control": "private, max-age=3600, immutable",
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'",
    }
    if names_tag(request.headers.getlist("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    return FileResponse(path, headers=headers, media_type=media_type)
