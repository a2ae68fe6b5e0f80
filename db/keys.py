"""API keys: made once, stored as a hash, found by it.

A key is `upk_`, 32 random characters of base62 (0-9, A-Z, a-z), and a checksum: the CRC-32 of the 36 characters before
it as six digits of base62, the highest first. So what was mistyped or made up costs no query, scanners for secrets know
what they found, and a double click selects all of it.
"""

import hashlib
import re
import secrets
import string
import zlib
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import (
    BigInteger,
    Interval,
    RowMapping,
    Uuid,
    any_,
    bindparam,
    case,
    cast,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection

from core.sealing import Sealer
from db import usage
from db.models import ApiKey, Scope, Usage

PREFIX = "upk_"
SHOWN_CHARACTERS = 12
"""How many characters of a key are stored and shown, for people to recognise it by."""

DEFAULT_SCOPES = (Scope.JOBS_WRITE, Scope.JOBS_READ)
USE_INTERVAL = timedelta(minutes=1)
"""How old the time of a key's last use has to be before it is written anew."""

_DIGITS = string.digits + string.ascii_uppercase + string.ascii_lowercase
_RANDOM_CHARACTERS = 32  # of 62 kinds: 190 bits, so a plain hash is enough and no guessing is slowed down on purpose
_CHECK_CHARACTERS = 6
_FORM = re.compile(f"{PREFIX}[0-9A-Za-z]{{{_RANDOM_CHARACTERS + _CHECK_CHARACTERS}}}")


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
    expires_at: datetime | None = None

    def may(self, scope: Scope) -> bool:
        """Tell whether the key has the scope, or that of admins, which includes all others."""
        return not self.scopes.isdisjoint((scope, Scope.ADMIN))


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


class KeyState(StrEnum):
    """Whether a key works, and why not."""

    ACTIVE = "active"
    EXPIRED = "expired"
    REVOKED = "revoked"


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyListing:
    """A key as its operator sees it."""

    id: UUID
    prefix: str
    name: str
    scopes: Sequence[Scope]
    state: KeyState
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    pixels_today: int
    limits: Limits


def mint() -> str:
    """Make up a key."""
    body = PREFIX + "".join(secrets.choice(_DIGITS) for _ in range(_RANDOM_CHARACTERS))
    return body + _checksum(body)


def is_well_formed(key: str) -> bool:
    """Tell whether this can be a key at all; whether it is one, only the database knows."""
    return _FORM.fullmatch(key) is not None and _checksum(key[:-_CHECK_CHARACTERS]) == key[-_CHECK_CHARACTERS:]


def _checksum(body: str) -> str:
    rest, digits = zlib.crc32(body.encode()), ""
    for _ in range(_CHECK_CHARACTERS):
        rest, digit = divmod(rest, len(_DIGITS))
        digits = _DIGITS[digit] + digits
    return digits


async def create(
    connection: AsyncConnection,
    name: str,
    limits: Limits = NO_LIMITS,
    scopes: Collection[Scope] = DEFAULT_SCOPES,
    lifetime: timedelta | None = None,
) -> str:
    """Make a key, store its hash, and return the key itself: the only time anyone sees it.

    Args:
        lifetime: after how long it expires; None: never.
    """
    key = mint()
    values: dict[str, Any] = {"id": uuid4(), "name": name, "prefix": key[:SHOWN_CHARACTERS], "hash": hash_key(key)}
    values |= asdict(limits) | {"scopes": [scope for scope in Scope if scope in scopes]}
    expires_at = None if lifetime is None else func.now() + lifetime
    await connection.execute(insert(ApiKey).values(**values, expires_at=expires_at))
    return key


async def browse(connection: AsyncConnection, which: str | None = None) -> list[KeyListing]:
    """List all keys, the oldest first; or only those of this id, or whose shown prefix is this."""
    statement = _LISTING.order_by(ApiKey.created_at, ApiKey.id)
    if which is not None:
        same_prefix = ApiKey.prefix == which
        try:
            statement = statement.where(or_(same_prefix, ApiKey.id == UUID(which)))
        except ValueError:
            statement = statement.where(same_prefix)
    return [_listing(row) for row in (await connection.execute(statement)).mappings()]


async def set_limits(connection: AsyncConnection, api_key_id: UUID, limits: Limits) -> None:
    """Change all that the key may ask for."""
    await connection.execute(update(ApiKey).where(ApiKey.id == api_key_id).values(asdict(limits)))


async def revoke(connection: AsyncConnection, api_key_id: UUID) -> bool:
    """Let the key work no more, from the next query for it; return False when it was revoked before."""
    statement = update(ApiKey).where(ApiKey.id == api_key_id, ApiKey.revoked_at.is_(None)).returning(ApiKey.id)
    return (await connection.execute(statement.values(revoked_at=func.now()))).one_or_none() is not None


async def note_use(connection: AsyncConnection, api_key_ids: Collection[UUID]) -> None:
    """Record that these keys are used now, where it was not recorded within USE_INTERVAL.

    Nobody is waited for: a row that somebody else changes at the moment is left as it is.
    """
    await connection.execute(_NOTE_USE, {"ids": list(api_key_ids), "interval": USE_INTERVAL})


async def find(connection: AsyncConnection, key: str) -> KeyRecord | None:
    """Return the record of a key, revoked or not; None when nobody was ever given it."""
    row = (await connection.execute(_FIND, {"hash": hash_key(key)})).mappings().one_or_none()
    if row is None:
        return None
    values: dict[str, Any] = {**row, "scopes": frozenset(Scope(scope) for scope in row["scopes"])}
    active = values.pop("state") == KeyState.ACTIVE
    return KeyRecord(**values, active=active)


async def store_digest(connection: AsyncConnection, sealer: Sealer, api_key_id: UUID, key: str) -> None:
    """Keep the SHA-256 of the bare key, with which Apiframe signs webhooks; sealed."""
    statement = update(ApiKey).where(ApiKey.id == api_key_id, ApiKey.apiframe_digest.is_(None))
    sealed = sealer.seal(hashlib.sha256(key.encode()).digest())
    await connection.execute(statement.values(apiframe_digest=sealed))


async def read_digest(connection: AsyncConnection, sealer: Sealer, api_key_id: UUID) -> bytes | None:
    """Return the SHA-256 of the bare key, or None where it was never stored.

    Raises:
        DeploymentError: it was sealed with a key that the settings do not name.
    """
    statement = select(ApiKey.apiframe_digest).where(ApiKey.id == api_key_id)
    sealed = (await connection.execute(statement)).scalar_one_or_none()
    return None if sealed is None else sealer.open(sealed)


def hash_key(key: str) -> bytes:
    """SHA-256 of the key behind a word for its purpose, so that the hash serves nothing else."""
    # What is looked for is a hash, so how long an index takes to find it, or not, says nothing of any key: who does not
    # know a key cannot choose the hashes that he tries.
    return hashlib.sha256(b"apikey:v1:" + key.encode()).digest()


def _listing(row: RowMapping) -> KeyListing:
    values: dict[str, Any] = {**row}
    limits = Limits(**{name: values.pop(name) for name in asdict(NO_LIMITS)})
    scopes, state = [Scope(scope) for scope in values.pop("scopes")], KeyState(values.pop("state"))
    return KeyListing(**values, scopes=scopes, state=state, limits=limits)


_STATE = case(
    (ApiKey.revoked_at.is_not(None), KeyState.REVOKED),
    (ApiKey.expires_at <= func.now(), KeyState.EXPIRED),
    else_=KeyState.ACTIVE,
).label("state")

_FIND = select(
    ApiKey.id,
    ApiKey.name,
    ApiKey.prefix,
    _STATE,
    ApiKey.apiframe_digest.is_not(None).label("has_digest"),
    ApiKey.scopes,
    ApiKey.requests_per_minute,
    ApiKey.daily_pixels,
    ApiKey.expires_at,
).where(ApiKey.hash == bindparam("hash"))

_PIXELS_TODAY = (
    select(cast(func.coalesce(func.sum(Usage.pixels), 0), BigInteger))
    .where(Usage.api_key_id == ApiKey.id, Usage.day == usage.TODAY)
    .scalar_subquery()
)

_LISTING = select(
    ApiKey.id,
    ApiKey.prefix,
    ApiKey.name,
    ApiKey.scopes,
    _STATE,
    ApiKey.created_at,
    ApiKey.expires_at,
    ApiKey.revoked_at,
    ApiKey.last_used_at,
    _PIXELS_TODAY.label("pixels_today"),
    *(getattr(ApiKey, name) for name in asdict(NO_LIMITS)),
)

# It locks many rows, in whichever order: as it passes over locked ones, no two of them wait for each other.
_NOTED_LONG_AGO = (
    select(ApiKey.id)
    .where(
        ApiKey.id == any_(bindparam("ids", type_=ARRAY(Uuid))),
        or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at <= func.now() - bindparam("interval", type_=Interval)),
    )
    .with_for_update(key_share=True, skip_locked=True)
)
_NOTE_USE = update(ApiKey).where(ApiKey.id.in_(_NOTED_LONG_AGO)).values(last_used_at=func.now())
