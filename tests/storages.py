"""Storages that no service is around, and what tests put into them."""

from collections.abc import AsyncGenerator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

from core.settings import Settings, load_settings
from core.storage.s3 import S3Storage
from tests.buckets import Bucket

PART = 5 * 1024 * 1024
"""The smallest part that every S3 takes."""


def storage_settings(**given: Any) -> Settings:
    """Return settings for a storage, which needs no database."""
    return load_settings(
        database_url="postgresql://nowhere/none",
        redis_url="redis://nowhere",
        secret_key="a secret of thirty-two characters",
        **given,
    )


def open_s3(bucket: Bucket, attempts: int = 2, **given: Any) -> S3Storage:
    """Return a storage in a bucket; what is `given` of the settings holds instead of what the bucket says."""
    return S3Storage(storage_settings(**{**bucket.settings(), **given}), part_bytes=PART, attempts=attempts)


def some_result() -> str:
    """Return a key that nothing has yet."""
    return f"results/{uuid4()}/1.png"


def some_upload() -> str:
    """Return a key that nothing has yet."""
    return f"uploads/{uuid4()}.png"


def later(seconds: float = 60) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


async def chunks(*data: bytes, error: Exception | None = None) -> AsyncGenerator[bytes]:
    """Yield what is written, chunk by chunk, and then break off by the error."""
    for chunk in data:
        yield chunk
    if error is not None:
        raise error
