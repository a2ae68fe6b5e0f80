"""What is to be deleted: the objects that jobs left. Objects go first, then their rows say so; nothing else deletes."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import aliased

from core.options import OutputFormat
from core.storage import result_key
from db.models import PROCESSING, QUEUED, Job

PUT_OFF = timedelta(minutes=10)
"""When to try again to delete what could not be deleted."""


@dataclass(frozen=True, slots=True)
class Leavings:
    """The objects that the attempts of one job may have left."""

    job_id: UUID
    keys: Sequence[str]


async def find_leavings(connection: AsyncConnection, limit: int) -> list[Leavings]:
    """Return what is due to be deleted, oldest first.

    A result that an unfinished job has as its input stays. A worker that was killed may have left an object that no row
    names: its key follows from the number of its attempt, so every attempt's key is listed, written or not.
    """
    reader = aliased(Job, name="reader")
    needed = (
        select(reader.id).where(reader.image_key == Job.result_key, reader.status.in_([QUEUED, PROCESSING])).exists()
    )
    format = Job.options["output_format"].astext
    due = (
        select(Job.id, Job.attempt, format.label("format"))
        # A format that this release does not know is left to the next one, which wrote it.
        .where(Job.purge_at <= func.now(), ~needed, format.in_(list(OutputFormat)))
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


async def put_off(connection: AsyncConnection, job_ids: Sequence[UUID]) -> None:
    """Try again later what these jobs left: it must not keep others waiting."""
    await connection.execute(update(Job).where(Job.id.in_(job_ids)).values(purge_at=func.now() + PUT_OFF))
