"""Everything that the database holds sealed, and sealing it anew after the settings got another first key."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import LargeBinary, bindparam, column, func, select, update
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import InstrumentedAttribute

from core.errors import DeploymentError
from core.sealing import Sealer
from db.models import ApiKey, WebhookSecret

STEP_ROWS = 500
"""How many rows one statement reads, and one rewrites."""


@dataclass(frozen=True, slots=True)
class Column:
    """Where sealed values lie, and the primary key of their rows."""

    id: InstrumentedAttribute[Any]
    value: InstrumentedAttribute[Any]


COLUMNS = (Column(WebhookSecret.id, WebhookSecret.secret), Column(ApiKey.id, ApiKey.apiframe_digest))


@dataclass(frozen=True, slots=True)
class Resealed:
    """What came of sealing everything anew."""

    sealed: int
    """How many values were under another key, or under none, and are under the first one now."""
    current: int
    """How many were under the first key already."""
    lost: int
    """How many no key of ours opens; they are left as they are."""


async def reseal(connection: AsyncConnection, sealer: Sealer) -> Resealed:
    """Put every sealed value under the first key, in steps that hold nobody up; may be broken off and run again."""
    sealed = current = lost = 0
    for kept in COLUMNS:
        last = None
        while rows := await _read(connection, kept, last):
            last = rows[-1].id
            changed: list[tuple[Any, bytes, bytes]] = []
            for row in rows:
                if sealer.is_current(row.value):
                    current += 1
                    continue
                try:
                    changed.append((row.id, row.value, sealer.seal(sealer.open(row.value))))
                except DeploymentError:
                    lost += 1
            sealed += await _replace(connection, kept, changed)
    return Resealed(sealed, current, lost)


async def _read(connection: AsyncConnection, kept: Column, last: Any) -> Sequence[Any]:
    statement = select(kept.id.label("id"), kept.value.label("value")).where(kept.value.is_not(None))
    if last is not None:
        statement = statement.where(kept.id > last)
    return (await connection.execute(statement.order_by(kept.id).limit(STEP_ROWS))).all()


async def _replace(connection: AsyncConnection, kept: Column, changed: Sequence[tuple[Any, bytes, bytes]]) -> int:
    """Exchange old values for new ones; what somebody else changed meanwhile is sealed with the first key anyway."""
    if not changed:
        return 0
    ids, old, new = (list(values) for values in zip(*changed, strict=True))
    columns = (column("id", kept.id.type), column("old", LargeBinary), column("new", LargeBinary))
    pairs = func.unnest(
        bindparam("ids", ids, ARRAY(kept.id.type)),
        bindparam("old", old, ARRAY(LargeBinary)),
        bindparam("new", new, ARRAY(LargeBinary)),
    )
    pairs = pairs.table_valued(*columns, name="pairs").render_derived()
    table = kept.id.class_
    statement = update(table).where(kept.id == pairs.c.id, kept.value == pairs.c.old)
    return (await connection.execute(statement.values({kept.value: pairs.c.new}))).rowcount
