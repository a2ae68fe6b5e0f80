"""Uploads: the images that callers sent."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import bindparam, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from core.errors import IdempotencyKeyReused
from db.models import PROCESSING, QUEUED, Job, Upload

PURGE_DELAY = timedelta(minutes=5)
"""How long after its expiry an upload is kept: a submit that found it a moment ago may still be on its way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NewUpload:
    """An image that is to be recorded, and then stored."""

    id: UUID
    api_key_id: UUID
    key: str
    size_bytes: int
    idempotency_key: str | None = None
    fingerprint: bytes | None = None


@dataclass(frozen=True, slots=True)
class StoredUpload:
    """The upload that was recorded, or the one that the same idempotency key brought before."""

    id: UUID
    key: str
    expires_at: datetime
    replayed: bool


async def record(connection: AsyncConnection, upload: NewUpload, ttl: timedelta) -> StoredUpload:
    """Record an image that is about to be stored, unless the same idempotency key brought it before.

    Raises:
        IdempotencyKeyReused: the idempotency key came with another image before.
    """
    statement = (
        insert(Upload)
        .values(
            id=upload.id,
            api_key_id=upload.api_key_id,
            key=upload.key,
            size_bytes=upload.size_bytes,
            expires_at=func.now() + ttl,
            idempotency_key=upload.idempotency_key,
            fingerprint=upload.fingerprint,
        )
        .on_conflict_do_nothing(
            index_elements=[Upload.api_key_id, Upload.idempotency_key], index_where=Upload.idempotency_key.is_not(None)
        )
        .returning(Upload.expires_at)
    )
    earlier = select(Upload.id, Upload.key, Upload.expires_at, Upload.fingerprint).where(
        Upload.api_key_id == upload.api_key_id, Upload.idempotency_key == upload.idempotency_key
    )
    if upload.idempotency_key is not None:
        await _free_expired(connection, upload.api_key_id, upload.idempotency_key)
    while True:
        if (expires_at := (await connection.execute(statement)).scalar_one_or_none()) is not None:
            return StoredUpload(upload.id, upload.key, expires_at, replayed=False)
        row = (await connection.execute(earlier)).one_or_none()
        if row is None:
            continue  # it was there a moment ago, and its idempotency key has just been freed
        if row.fingerprint != upload.fingerprint:
            raise IdempotencyKeyReused("This Idempotency-Key came with another image before.")
        return StoredUpload(row.id, row.key, row.expires_at, replayed=True)


async def _free_expired(connection: AsyncConnection, api_key_id: UUID, idempotency_key: str) -> None:
    """Let an upload that can no longer be named not stand in for a new one."""
    same = (Upload.api_key_id == api_key_id, Upload.idempotency_key == idempotency_key)
    freed = update(Upload).where(*same, Upload.expires_at <= func.now()).values(idempotency_key=None, fingerprint=None)
    await connection.execute(freed)


async def find_key(connection: AsyncConnection, upload_id: UUID, api_key_id: UUID) -> str | None:
    """Return where the upload lies; None when it has expired, or is not that key's, or never was."""
    found = await connection.execute(_FIND_KEY, {"upload_id": upload_id, "owner": api_key_id})
    return found.scalar_one_or_none()


_FIND_KEY = select(Upload.key).where(
    Upload.id == bindparam("upload_id"), Upload.api_key_id == bindparam("owner"), Upload.expires_at > func.now()
)


async def find_expired(connection: AsyncConnection, limit: int) -> Sequence[str]:
    """Return the keys of objects that nobody can name any more and no unfinished job needs.

    An upload that has expired frees its idempotency key here, too: a repetition of it would be of no use.
    """
    needed = select(Job.id).where(Job.image_key == Upload.key, Job.status.in_([QUEUED, PROCESSING])).exists()
    expired = (
        select(Upload.id)
        .where(Upload.purged_at.is_(None), Upload.expires_at < func.now() - PURGE_DELAY, ~needed)
        .order_by(Upload.expires_at)
        .limit(limit)
    )
    freed = (
        update(Upload)
        .where(Upload.id.in_(expired))
        .values(idempotency_key=None, fingerprint=None)
        .returning(Upload.key)
    )
    return (await connection.execute(freed)).scalars().all()


async def mark_purged(connection: AsyncConnection, keys: Sequence[str]) -> None:
    """Record that these objects are gone."""
    await connection.execute(update(Upload).where(Upload.key.in_(keys)).values(purged_at=func.now()))
