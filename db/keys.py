"""API keys: made once, stored as a hash, found by it."""

import hashlib
import secrets
import string
from dataclasses import dataclass
from uuid import UUID, uuid4

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from db.models import ApiKey

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


async def create(connection: AsyncConnection, name: str) -> str:
    """Make a key, store its hash, and return the key itself: the only time anyone sees it."""
    key = PREFIX + "".join(secrets.choice(_ALPHABET) for _ in range(_RANDOM_CHARACTERS))
    values = {"id": uuid4(), "name": name, "prefix": key[:_SHOWN_CHARACTERS], "hash": hash_key(key)}
    await connection.execute(insert(ApiKey), values)
    return key


async def find(connection: AsyncConnection, key: str) -> KeyRecord | None:
    """Return the record of a key, revoked or not; None when nobody was ever given it."""
    statement = select(ApiKey.id, ApiKey.name, ApiKey.prefix, ApiKey.revoked_at).where(ApiKey.hash == hash_key(key))
    row = (await connection.execute(statement)).one_or_none()
    return None if row is None else KeyRecord(row.id, row.name, row.prefix, row.revoked_at is None)


def hash_key(key: str) -> bytes:
    """SHA-256 of the key behind a word for its purpose, so that the hash serves nothing else."""
    return hashlib.sha256(b"apikey:v1:" + key.encode()).digest()
