"""What webhooks are signed with: one current secret per API key, and those that a rotation lets live on for a while.

The first secret is made when it is first asked for. Each change is one statement, and two at the same moment agree.
The table holds them sealed; here they come and go as they are.
"""

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Interval, LargeBinary, Uuid, bindparam, delete, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from core.errors import DeploymentError
from core.sealing import Sealer
from db.models import WebhookSecret

SECRET_BYTES = 32

MAX_VALID = 5
"""How many secrets sign a webhook at most, the newest first: each adds to a header that receivers bound."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SecretRecord:
    """A key's current secret."""

    secret: bytes
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Rotation:
    """A new secret, and until when webhooks are signed with the former one too; None where there was none."""

    secret: bytes
    created_at: datetime
    previous_expires_at: datetime | None


async def current(connection: AsyncConnection, sealer: Sealer, api_key_id: UUID) -> SecretRecord:
    """Return the current secret of a key, made now where there is none.

    Raises:
        DeploymentError: it was sealed with a key that the settings do not name.
    """
    row = (await connection.execute(_CURRENT, {"owner": api_key_id})).one_or_none()
    if row is None:
        row = (await connection.execute(_MAKE, _new(sealer, api_key_id))).one()
    return SecretRecord(sealer.open(row.secret), row.created_at)


async def valid(connection: AsyncConnection, sealer: Sealer, api_key_id: UUID) -> list[bytes]:
    """Return the secrets that sign a key's webhooks now: the current one, made where there is none, comes first.

    Raises:
        DeploymentError: all of them were sealed with keys that the settings do not name.
    """
    found = (await connection.execute(_VALID, {"owner": api_key_id})).scalars().all()
    return _open_some(sealer, found) if found else [(await current(connection, sealer, api_key_id)).secret]


async def rotate(connection: AsyncConnection, sealer: Sealer, api_key_id: UUID, overlap: timedelta) -> Rotation:
    """Replace the current secret; the former one stays valid for `overlap`. Rotations at the same moment are one."""
    row = (await connection.execute(_ROTATE, _new(sealer, api_key_id) | {"overlap": overlap})).one()
    return Rotation(sealer.open(row.secret), row.created_at, row.previous_expires_at)


def _open_some(sealer: Sealer, sealed: Sequence[bytes]) -> list[bytes]:
    """Open what can be opened: one signature that a receiver knows is enough."""
    opened: list[bytes] = []
    refusal = None
    for secret in sealed:
        try:
            opened.append(sealer.open(secret))
        except DeploymentError as error:
            refusal = error
    if refusal is not None:
        if not opened:
            raise refusal
        logger.warning("webhooks are signed with some of a key's secrets only: %s", refusal)
    return opened


def _new(sealer: Sealer, api_key_id: UUID) -> dict[str, Any]:
    return {"owner": api_key_id, "new_secret": sealer.seal(secrets.token_bytes(SECRET_BYTES))}


_OWN = WebhookSecret.api_key_id == bindparam("owner", type_=Uuid)
_IS_CURRENT = WebhookSecret.expires_at.is_(None)
_NEW = {"api_key_id": bindparam("owner", type_=Uuid), "secret": bindparam("new_secret", type_=LargeBinary)}

# What somebody else made at the same moment is kept, and returned: DO NOTHING would return no row.
_KEEP_EXISTING: dict[str, Any] = {
    "index_elements": [WebhookSecret.api_key_id],
    "index_where": _IS_CURRENT,
    "set_": {"secret": WebhookSecret.secret},
}

_CURRENT = select(WebhookSecret.secret, WebhookSecret.created_at).where(_OWN, _IS_CURRENT)

_VALID = (
    select(WebhookSecret.secret)
    .where(_OWN, or_(_IS_CURRENT, WebhookSecret.expires_at > func.now()))
    .order_by(WebhookSecret.id.desc())
    .limit(MAX_VALID)
)

_MAKE = (
    insert(WebhookSecret)
    .values(_NEW)
    .on_conflict_do_update(**_KEEP_EXISTING)
    .returning(WebhookSecret.secret, WebhookSecret.created_at)
)

_PURGED = delete(WebhookSecret).where(_OWN, WebhookSecret.expires_at <= func.now()).cte("purged")

_RETIRED = (
    update(WebhookSecret)
    .where(_OWN, _IS_CURRENT)
    .values(expires_at=func.now() + bindparam("overlap", type_=Interval))
    .returning(WebhookSecret.expires_at)
    .cte("retired")
)

# Counting what was retired makes the UPDATE come first, or the new secret would be a second current one. Of rotations
# at the same moment the later finds the row retired already, meets the other's new secret and returns that.
_ROTATED = (
    insert(WebhookSecret)
    .from_select(
        ["api_key_id", "secret"],
        select(*_NEW.values()).where(select(func.count()).select_from(_RETIRED).scalar_subquery() >= 0),
    )
    .on_conflict_do_update(**_KEEP_EXISTING)
    .returning(WebhookSecret.secret, WebhookSecret.created_at)
    .cte("rotated")
)

# The last SELECT sees the table as it was before: whether there was a secret that this, or the other, rotation retired.
_ROTATE = select(
    _ROTATED.c.secret,
    _ROTATED.c.created_at,
    select(func.now() + bindparam("overlap", type_=Interval))
    .where(_OWN, _IS_CURRENT)
    .scalar_subquery()
    .label("previous_expires_at"),
).add_cte(_PURGED)
