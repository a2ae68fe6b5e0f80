"""What was made for each key on a day, by UTC. It is counted by the statement that ends a job with a result."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Date, Integer, Select, cast, delete, extract, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from db.models import Usage

KEPT_FOR = timedelta(days=35)
"""How long a day's usage is kept: long enough to settle up for a month."""

_NOW = func.timezone("UTC", func.now())
TODAY = cast(_NOW, Date)
"""The day that it is, by UTC and the database's clock."""


@dataclass(frozen=True, slots=True)
class Today:
    """What was made for a key today, and how long today still is."""

    pixels: int
    seconds_left: int
    """To midnight, rounded up: then it is another day."""


async def read_today(connection: AsyncConnection, api_key_id: UUID) -> Today:
    """Return what was made for a key today, and how long that is."""
    left = extract("epoch", func.date_trunc("day", _NOW) + timedelta(days=1) - _NOW)
    statement = select(
        func.coalesce(func.sum(Usage.pixels), 0).label("pixels"),
        cast(func.ceil(left), Integer).label("seconds_left"),
    ).where(Usage.api_key_id == api_key_id, Usage.day == TODAY)
    row = (await connection.execute(statement)).one()
    return Today(int(row.pixels), row.seconds_left)


async def forget(connection: AsyncConnection) -> None:
    """Delete what is older than KEPT_FOR; it reads the whole table, so not every sweep should."""
    await connection.execute(delete(Usage).where(Usage.day < TODAY - KEPT_FOR.days))


def added(made: Select[*tuple[Any, ...]]) -> Any:
    """Return the statement that adds rows of (key, day, shard, jobs, pixels) to the usage."""
    adding = insert(Usage).from_select(["api_key_id", "day", "shard", "jobs", "pixels"], made)
    return adding.on_conflict_do_update(
        index_elements=[Usage.api_key_id, Usage.day, Usage.shard],
        set_={"jobs": Usage.jobs + adding.excluded.jobs, "pixels": Usage.pixels + adding.excluded.pixels},
    )
