"""Uploads: the images that callers sent."""

from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import bindparam, func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from db.models import Upload


async def record(
    connection: AsyncConnection, upload_id: UUID, api_key_id: UUID, key: str, size_bytes: int, ttl: timedelta
) -> datetime:
    """Record a stored image and return when it expires."""
    statement = (
        insert(Upload)
        .values(id=upload_id, api_key_id=api_key_id, key=key, size_bytes=size_bytes, expires_at=func.now() + ttl)
        .returning(Upload.expires_at)
    )
    return (await connection.execute(statement)).scalar_one()


async def find_key(connection: AsyncConnection, upload_id: UUID, api_key_id: UUID) -> str | None:
    """Return where the upload lies; None when it has expired, or is not that key's, or never was."""
    found = await connection.execute(_FIND_KEY, {"upload_id": upload_id, "owner": api_key_id})
    return found.scalar_one_or_none()


_FIND_KEY = select(Upload.key).where(
    Upload.id == bindparam("upload_id"), Upload.api_key_id == bindparam("owner"), Upload.expires_at > func.now()
)
