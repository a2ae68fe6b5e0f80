"""What is to be deleted: the objects that jobs left. Objects go first, then their rows say so; nothing else deletes."""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from core.options import OutputFormat
from core.storage import result_key
from db.models import Job


@dataclass(frozen=True, slots=True)
class Leavings:
    """The objects that the attempts of one job may have left."""

    job_id: UUID
    keys: Sequence[str]


async def find_leavings(connection: AsyncConnection, limit: int) -> list[Leavings]:
    """Return what is due to be deleted, oldest first.

    A worker that was killed may have left an object that no row names. Its key follows from the number of its attempt,
    so every attempt's key is listed, written or not.
    """
    format = Job.options["output_format"].astext
    due = (
        select(Job.id, Job.attempt, format.label("format"))
        # A format that this release does not know is left to the next one, which wrote it.
        .where(Job.purge_at <= func.now(), format.in_(list(OutputFormat)))
        .order_by(Job.purge_at)
        .limit(limit)
    )
    return [
        Leavings(
            row.id,
            [result_key(row.id, number, OutputFormat(row.format)) for number in range(1, row.attempt + 1)],
        )
        for row in await connection.execute(due)
    ]


async def mark_purged(connection: AsyncConnection, job_ids: Sequence[UUID]) -> None:
    """Record that what these jobs left is gone."""
    await connection.execute(update(Job).where(Job.id.in_(job_ids)).values(purge_at=None))
