"""What is counted for operators: the tallies, and what is waiting or running now."""

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from db.models import PROCESSING, QUEUED, Delivery, DeliveryStatus, Job, Tally, Worker


@dataclass(frozen=True, slots=True)
class Census:
    """One look at the whole service."""

    tallies: Mapping[str, int]
    """How often jobs were submitted, and how they ended: by `submitted` or the last state in lower case."""
    queued: int
    processing: int
    oldest_queued_seconds: float
    workers: int
    pending_deliveries: int


async def read_tallies(connection: AsyncConnection) -> Mapping[str, int]:
    """Return the count of each name; a name that never happened is not there."""
    rows = await connection.execute(select(Tally.name, func.sum(Tally.count)).group_by(Tally.name))
    return {row[0]: int(row[1]) for row in rows}


async def take(connection: AsyncConnection) -> Census:
    """Count; only partial indexes and small tables are read."""
    queued, processing = (
        select(func.count()).select_from(Job).where(Job.status == status).scalar_subquery()
        for status in (QUEUED, PROCESSING)
    )
    oldest = select(func.min(Job.created_at)).where(Job.status == QUEUED).scalar_subquery()
    row = (
        await connection.execute(
            select(
                queued,
                processing,
                func.coalesce(func.extract("epoch", func.now() - oldest), 0.0),
                select(func.count()).select_from(Worker).scalar_subquery(),
                select(func.count())
                .select_from(Delivery)
                .where(Delivery.status == DeliveryStatus.PENDING)
                .scalar_subquery(),
            )
        )
    ).one()
    return Census(await read_tallies(connection), row[0], row[1], float(row[2]), row[3], row[4])
