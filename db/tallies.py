"""The tallies: how often jobs were submitted, and how they ended."""

from collections.abc import Mapping

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from db.models import Tally


async def read(connection: AsyncConnection) -> Mapping[str, int]:
    """Return the count of each name; a name that never happened is not there."""
    rows = await connection.execute(select(Tally.name, func.sum(Tally.count)).group_by(Tally.name))
    return {row[0]: int(row[1]) for row in rows}
