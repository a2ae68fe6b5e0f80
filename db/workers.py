"""Workers as the database knows them: they register, and then they beat."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    Double,
    Integer,
    Text,
    Uuid,
    and_,
    bindparam,
    column,
    delete,
    func,
    literal,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from db.jobs import Attempt
from db.models import PROCESSING, Job, Worker


@dataclass(frozen=True, slots=True)
class Fate:
    """What has become of an attempt."""

    owns: bool
    """Whether it is still current."""
    unwanted: bool
    """Whether the caller has asked to cancel the job, or its deadline has passed."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What a beat learns."""

    registered: bool
    """False: the worker was presumed dead and forgotten."""
    fates: Sequence[Fate]
    """One for each attempt, in their order."""


async def register(
    connection: AsyncConnection, worker_id: UUID, name: str, engine: str, attempts: Sequence[Attempt] = ()
) -> None:
    """Let a worker be known; from now on it has to beat. It may bring attempts that it began under another id.

    Saying it twice changes nothing.
    """
    values = {"new_id": worker_id, "new_name": name, "new_engine": engine} | _fences(attempts)
    await connection.execute(_REGISTER, values)


async def unregister(connection: AsyncConnection, worker_id: UUID) -> None:
    """Say good-bye: a job that the worker should still hold is given to others at the next sweep."""
    await connection.execute(delete(Worker).where(Worker.id == worker_id))


async def beat(
    connection: AsyncConnection, worker_id: UUID, seconds_per_cost: float | None, attempts: Sequence[Attempt]
) -> Heard:
    """Say that the worker lives, and learn what has become of its attempts."""
    values = {"worker": worker_id, "speed": seconds_per_cost} | _fences(attempts)
    rows = (await connection.execute(_BEAT, values)).all()
    return Heard(rows[0].registered, [Fate(row.owns, bool(row.unwanted)) for row in rows if row.place is not None])


def _fences(attempts: Sequence[Attempt]) -> dict[str, Any]:
    return {
        "job_ids": [attempt.job_id for attempt in attempts],
        "numbers": [attempt.number for attempt in attempts],
    }


_ALIVE = (
    update(Worker)
    .where(Worker.id == bindparam("worker", type_=Uuid))
    .values(beat_at=func.now(), seconds_per_cost=bindparam("speed", type_=Double))
    .returning(Worker.id)
    .cte("alive")
)

_ATTEMPTS = (
    func.unnest(bindparam("job_ids", type_=ARRAY(Uuid)), bindparam("numbers", type_=ARRAY(Integer)))
    .table_valued(column("job_id", Uuid), column("number", Integer), with_ordinality="place")
    .render_derived(name="attempts")
)

_OWN = and_(Job.id == _ATTEMPTS.c.job_id, Job.attempt == _ATTEMPTS.c.number, Job.status == PROCESSING)

_NEW_ID = bindparam("new_id", type_=Uuid)

_NEW = (
    insert(Worker)
    .values(id=_NEW_ID, name=bindparam("new_name", type_=Text), engine=bindparam("new_engine", type_=Text))
    .on_conflict_do_nothing()
    .cte("new")
)

_REGISTER = update(Job).where(_OWN).values(worker_id=_NEW_ID).add_cte(_NEW)

_BEAT = (
    select(
        select(literal(1)).select_from(_ALIVE).exists().label("registered"),
        _ATTEMPTS.c.place,
        Job.id.is_not(None).label("owns"),
        or_(Job.cancel_requested_at.is_not(None), func.coalesce(Job.deadline_at <= func.now(), False)).label(
            "unwanted"
        ),
    )
    .select_from(select(literal(1)).subquery("one").outerjoin(_ATTEMPTS, true()).outerjoin(Job, _OWN))
    .order_by(_ATTEMPTS.c.place)
)
