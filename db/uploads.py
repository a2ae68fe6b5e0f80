"""Uploads: the images that callers sent, or said that they would send."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import bindparam, func, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from core.errors import IdempotencyKeyReused
from db.models import PROCESSING, QUEUED, Job, Upload

PURGE_DELAY = timedelta(minutes=5)
"""How long after its expiry an upload is kept: a submit that found it a moment ago may still be on its way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NewUpload:
    """An image that is about to come."""

    id: UUID
    api_key_id: UUID
    key: str
    size_bytes: int | None = None
    """As it was declared, None where nothing was."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArrivedUpload:
    """An image that is now stored."""

    id: UUID
    api_key_id: UUID
    key: str
    size_bytes: int
    idempotency_key: str | None = None
    fingerprint: bytes | None = None


@dataclass(frozen=True, slots=True)
class StoredUpload:
    """The upload that was stored, or the one that the same idempotency key brought before."""

    id: UUID
    key: str
    expires_at: datetime
    replayed: bool


@dataclass(frozen=True, slots=True)
class FoundUpload:
    """An upload that can be named; one that is not `stored` was never looked at."""

    key: str
    size_bytes: int | None
    stored: bool


async def record(connection: AsyncConnection, upload: NewUpload, ttl: timedelta) -> datetime:
    """Record an image that is about to come; return when it expires. Until it is stored it cannot be used."""
    statement = (
        insert(Upload)
        .values(
            id=upload.id,
            api_key_id=upload.api_key_id,
            key=upload.key,
            size_bytes=upload.size_bytes,
            expires_at=func.now() + ttl,
        )
        .returning(Upload.expires_at)
    )
    return (await connection.execute(statement)).scalar_one()


async def finish(connection: AsyncConnection, upload: ArrivedUpload, ttl: timedelta) -> StoredUpload | None:
    """Let a recorded upload be used from now on, unless the same idempotency key brought the same image before.

    Returns:
        None when it expired while it came in; the sweep may have been there already.

    Raises:
        IdempotencyKeyReused: the idempotency key came with another image before.
    """
    statement = (
        update(Upload)
        .where(Upload.id == upload.id, Upload.expires_at > func.now())
        .values(
            size_bytes=upload.size_bytes,
            stored_at=func.now(),
            expires_at=func.now() + ttl,
            idempotency_key=upload.idempotency_key,
            fingerprint=upload.fingerprint,
        )
        .returning(Upload.expires_at)
    )
    earlier = select(Upload.id, Upload.key, Upload.expires_at, Upload.fingerprint).where(
        Upload.api_key_id == upload.api_key_id, Upload.idempotency_key == upload.idempotency_key
    )
    if upload.idempotency_key is not None:
        await _free_expired(connection, upload.api_key_id, upload.idempotency_key)
    while True:
        try:
            expires_at = (await connection.execute(statement)).scalar_one_or_none()
        except IntegrityError as error:
            if "uploads_idempotency_key_key" not in str(error.orig):
                raise
        else:
            return expires_at and StoredUpload(upload.id, upload.key, expires_at, replayed=False)
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


async def find(connection: AsyncConnection, upload_id: UUID, api_key_id: UUID) -> FoundUpload | None:
    """Return the upload; None when it has expired, or is not that key's, or never was."""
    row = (await connection.execute(_FIND, {"upload_id": upload_id, "owner": api_key_id})).one_or_none()
    return FoundUpload(row.key, row.size_bytes, row.stored_at is not None) if row else None


_FIND = select(Upload.key, Upload.size_bytes, Upload.stored_at).where(
    Upload.id == bindparam("upload_id"), Upload.api_key_id == bindparam("owner"), Upload.expires_at > func.now()
)


async def mark_stored(connection: AsyncConnection, key: str) -> None:
    """Record that the object was seen, and is what was declared."""
    await connection.execute(
        update(Upload).where(Upload.key == key, Upload.stored_at.is_(None)).values(stored_at=func.now())
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
