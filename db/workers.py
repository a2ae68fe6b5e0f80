"""Workers as the database knows them: they register, and then they beat."""

from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Double, Uuid, and_, bindparam, delete, func, insert, literal, or_, select, true, update
from sqlalchemy.ext.asyncio import AsyncConnection

from db.jobs import Attempt
from db.models import PROCESSING, Job, Worker


@dataclass(frozen=True, slots=True)
class Heard:
    """What a beat learns."""

    registered: bool
    """False: the worker was presumed dead and forgotten."""
    owns: bool
    """Whether the attempt is still current."""
    unwanted: bool
    """Whether the caller has asked to cancel the job, or its deadline has passed."""


async def register(connection: AsyncConnection, worker_id: UUID, name: str, engine: str) -> None:
    """Let a worker be known; from now on it has to beat."""
    await connection.execute(insert(Worker).values(id=worker_id, name=name, engine=engine))


async def unregister(connection: AsyncConnection, worker_id: UUID) -> None:
    """Say good-bye: a job that the worker should still hold is given to others at the next sweep."""
    await connection.execute(delete(Worker).where(Worker.id == worker_id))


async def beat(
    connection: AsyncConnection, worker_id: UUID, seconds_per_cost: float | None, attempt: Attempt | None
) -> Heard:
    """Say that the worker lives, and learn what has become of its attempt."""
    values = {
        "worker": worker_id,
        "speed": seconds_per_cost,
        "job_id": attempt.job_id if attempt else None,
        "number": attempt.number if attempt else None,
    }
    row = (await connection.execute(_BEAT, values)).one()
    return Heard(row.registered, row.owns, bool(row.unwanted))


_ALIVE = (
    update(Worker)
    .where(Worker.id == bindparam("worker", type_=Uuid))
    .values(beat_at=func.now(), seconds_per_cost=bindparam("speed", type_=Double))
    .returning(Worker.id)
    .cte("alive")
)

_OWN = and_(
    Job.id == bindparam("job_id", type_=Uuid),
    Job.attempt == bindparam("number"),
    Job.status == PROCESSING,
)

_BEAT = select(
    select(literal(1)).select_from(_ALIVE).exists().label("registered"),
    Job.id.is_not(None).label("owns"),
    or_(Job.cancel_requested_at.is_not(None), func.coalesce(Job.deadline_at <= func.now(), False)).label("unwanted"),
).select_from(select(literal(1)).subquery("one").outerjoin(Job, and_(true(), _OWN)))
