"""API keys: made once, stored as a hash, found by it."""

import hashlib
import secrets
import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import and_, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from db.models import ApiKey, Scope

PREFIX = "upk_"
_ALPHABET = string.ascii_letters + string.digits
_RANDOM_CHARACTERS = 40  # of 62 kinds: 238 bits, so a plain hash is enough and no guessing is slowed down on purpose
_SHOWN_CHARACTERS = len(PREFIX) + 6


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as it is stored: everything but the key."""

    id: UUID
    name: str
    prefix: str
    active: bool
    """Neither revoked nor expired."""
    has_digest: bool
    """Whether what Apiframe would sign its webhooks with is stored."""
    scopes: frozenset[Scope]
    requests_per_minute: int | None
    daily_pixels: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a key may ask for; None leaves a maximum to the settings, or to the number of workers."""

    weight: float = 1.0
    """Its share of the workers while others wait too."""
    max_concurrent: int | None = None
    """How many of its jobs may run at a time."""
    max_queued: int | None = None
    """How many of its jobs may wait."""
    requests_per_minute: int | None = None
    daily_pixels: int | None = None
    """How many pixels may be made for it in a day, by UTC."""


NO_LIMITS = Limits()


async def create(connection: AsyncConnection, name: str, limits: Limits = NO_LIMITS) -> str:
    """Make a key, store its hash, and return the key itself: the only time anyone sees it."""
    key = PREFIX + "".join(secrets.choice(_ALPHABET) for _ in range(_RANDOM_CHARACTERS))
    values: dict[str, Any] = {"id": uuid4(), "name": name, "prefix": key[:_SHOWN_CHARACTERS], "hash": hash_key(key)}
    values |= asdict(limits)
    await connection.execute(insert(ApiKey), values)
    return key


async def set_limits(connection: AsyncConnection, prefix: str, limits: Limits) -> Sequence[str]:
    """Change what the keys that begin with `prefix` may ask for, and return their names."""
    changed = update(ApiKey).where(ApiKey.prefix == prefix).values(asdict(limits)).returning(ApiKey.name)
    return (await connection.execute(changed)).scalars().all()


async def find(connection: AsyncConnection, key: str) -> KeyRecord | None:
    """Return the record of a key, revoked or not; None when nobody was ever given it."""
    has_digest = ApiKey.apiframe_digest.is_not(None)
    active = and_(ApiKey.revoked_at.is_(None), or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > func.now()))
    statement = select(
        ApiKey.id,
        ApiKey.name,
        ApiKey.prefix,
        active.label("active"),
        has_digest.label("has_digest"),
        ApiKey.scopes,
        ApiKey.requests_per_minute,
        ApiKey.daily_pixels,
    )
    row = (await connection.execute(statement.where(ApiKey.hash == hash_key(key)))).mappings().one_or_none()
    if row is None:
        return None
    values: dict[str, Any] = {**row, "scopes": frozenset(Scope(scope) for scope in row["scopes"])}
    return KeyRecord(**values)


async def store_digest(connection: AsyncConnection, api_key_id: UUID, key: str) -> None:
    """Keep the SHA-256 of the bare key, with which Apiframe signs webhooks."""
    statement = update(ApiKey).where(ApiKey.id == api_key_id, ApiKey.apiframe_digest.is_(None))
    await connection.execute(statement.values(apiframe_digest=hashlib.sha256(key.encode()).digest()))


async def read_digest(connection: AsyncConnection, api_key_id: UUID) -> bytes | None:
    """Return the SHA-256 of the bare key, or None where it was never stored."""
    statement = select(ApiKey.apiframe_digest).where(ApiKey.id == api_key_id)
    return (await connection.execute(statement)).scalar_one_or_none()


def hash_key(key: str) -> bytes:
    """SHA-256 of the key behind a word for its purpose, so that the hash serves nothing else."""
    return hashlib.sha256(b"apikey:v1:" + key.encode()).digest()
