"""What a caller may want to know of the queue: how long a job will take to start, and where it stands."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import Interval, Uuid, bindparam, case, func, literal, or_, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from db.models import PROCESSING, QUEUED, ApiKey, Job, QueueState, Worker
from db.queue import processing_tag

PLACES_COUNTED = 10_000
"""Beyond so many places nobody is told exactly how far back in the queue a job is."""

FRESH = timedelta(seconds=30)
"""How old a measurement may be: without a sweep nobody is refused, and nothing is foretold."""


@dataclass(frozen=True, slots=True)
class State:
    """The whole queue, as the last sweep saw it."""

    measured_at: datetime
    fresh: bool
    """Whether that was lately enough to act on it."""
    queued: int
    queued_cost: float
    workers: int
    cost_per_second: float | None

    def seconds(self, cost: float) -> float | None:
        """Estimate how long all workers together need for so much work; None while nobody knows."""
        return cost / self.cost_per_second if self.fresh and self.cost_per_second else None


async def read_state(connection: AsyncConnection) -> State:
    """Return the queue as the last sweep saw it."""
    row = (
        await connection.execute(
            select(
                QueueState.measured_at,
                (QueueState.measured_at > func.now() - FRESH).label("fresh"),
                QueueState.queued,
                QueueState.queued_cost,
                QueueState.workers,
                QueueState.cost_per_second,
            )
        )
    ).one()
    return State(*row)


async def measure(connection: AsyncConnection, lease: timedelta) -> None:
    """Refresh the one row of `queue_state`: the sweep's part."""
    await connection.execute(_MEASURE, {"lease": lease})


_waiting_now = (
    select(func.count().label("jobs"), func.coalesce(func.sum(Job.cost), 0.0).label("cost"))
    .where(Job.status == QUEUED)
    .cte("waiting")
)
_live = (
    select(
        func.count().label("workers"),
        # Of workers that have not finished a job yet the others' speed is expected.
        (func.sum(1 / Worker.seconds_per_cost) * func.count() / func.count(Worker.seconds_per_cost)).label("speed"),
    )
    .where(Worker.beat_at > func.now() - bindparam("lease", type_=Interval))
    .cte("live")
)
# Two questions: each has a partial index, and both in one have none.
_busy = or_(*(select(literal(1)).where(Job.status == status).exists() for status in (QUEUED, PROCESSING)))

_MEASURE = update(QueueState).values(
    measured_at=func.now(),
    virtual_time=func.greatest(
        QueueState.virtual_time,
        processing_tag(),
        # Once everything is done, it is forgotten who did how much.
        case((~_busy, select(func.max(ApiKey.next_tag)).scalar_subquery())),
    ),
    queued=select(_waiting_now.c.jobs).scalar_subquery(),
    queued_cost=select(_waiting_now.c.cost).scalar_subquery(),
    workers=select(_live.c.workers).scalar_subquery(),
    cost_per_second=select(_live.c.speed).scalar_subquery(),
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the queue a job stands: how many go first, and how much work they are."""

    jobs: int
    cost: float


async def find_place(connection: AsyncConnection, job_id: UUID) -> Place | None:
    """Return where a queued job stands, None when it is not queued or has more than PLACES_COUNTED before it.

    Limits of keys are not looked at: a job may be passed by others while its key has no place free.
    """
    jobs, cost, found = (await connection.execute(_PLACE, {"job_id": job_id})).one()
    return Place(jobs, cost) if found and jobs <= PLACES_COUNTED else None


_THIS = bindparam("job_id", type_=Uuid)
# A subquery and no join: its value is known before the index is read, and bounds how far.
_TAG = select(Job.tag).where(Job.id == _THIS, Job.status == QUEUED).scalar_subquery()
_EARLIER = (
    select(Job.cost)
    .where(Job.status == QUEUED, tuple_(Job.tag, Job.id) < tuple_(_TAG, _THIS))
    .limit(PLACES_COUNTED + 1)
    .subquery()
)
_PLACE = select(
    func.count(),
    func.coalesce(func.sum(_EARLIER.c.cost), 0.0),
    select(Job.id).where(Job.id == _THIS, Job.status == QUEUED).exists(),
).select_from(_EARLIER)


async def cost_before(connection: AsyncConnection, api_key_id: UUID) -> float:
    """Return how much queued work would go before a job that this key submitted now."""
    turn = func.greatest(
        select(ApiKey.next_tag).where(ApiKey.id == api_key_id).scalar_subquery(),
        select(QueueState.virtual_time).scalar_subquery(),
        processing_tag(),
    )
    earlier = select(func.coalesce(func.sum(Job.cost), 0.0)).where(Job.status == QUEUED, Job.tag < turn)
    return (await connection.execute(earlier)).scalar_one()
