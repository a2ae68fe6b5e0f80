"""Progress of running jobs, in Redis: a short-lived stream for each job. Decoration only; the truth never reads it."""

from typing import Any
from uuid import UUID

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from core.notices import job_channel
from core.settings import Settings

TTL_SECONDS = 600


def connect(settings: Settings) -> Redis:
    """Return a client that gives up quickly: whoever asks for progress can do without."""
    return Redis.from_url(settings.redis_url, socket_timeout=0.5, socket_connect_timeout=0.5)  # pyright: ignore[reportUnknownMemberType]


async def report(client: Redis, job_id: UUID, attempt: int, percent: int) -> None:
    """Store and announce how far an attempt has come, 1 to 99; raises redis.RedisError when Redis is down.

    The entry's id is (attempt, percent), so Redis itself refuses what comes late: from a zombie, or out of order.
    """
    async with client.pipeline(transaction=False) as pipeline:
        pipeline.xadd(_key(job_id), {b"": b""}, id=f"{attempt}-{percent}")
        pipeline.expire(_key(job_id), TTL_SECONDS)
        pipeline.publish(job_channel(job_id), b"")  # pyright: ignore[reportUnknownMemberType]
        added, *_ = await pipeline.execute(raise_on_error=False)
    if isinstance(added, RedisError) and not isinstance(added, ResponseError):
        raise added


async def read(client: Redis, job_id: UUID, attempt: int) -> int:
    """Return how far the running attempt has come, in percent; 0 when nobody knows."""
    try:
        entries: Any = await client.xrevrange(_key(job_id), min=f"{attempt}-0", max=f"{attempt}-100", count=1)
    except RedisError:
        return 0
    return _read_id(entries[0][0])[1] if entries else 0


async def history(client: Redis, job_id: UUID, after: tuple[int, int]) -> list[tuple[int, int]]:
    """Return what was reported after an (attempt, percent), in order; nothing when Redis is away."""
    try:
        entries: Any = await client.xrange(_key(job_id), min=f"({after[0]}-{after[1]}")
    except RedisError:
        return []
    return [_read_id(entry[0]) for entry in entries]


def _key(job_id: UUID) -> str:
    return f"progress:{job_id}"


def _read_id(raw: bytes) -> tuple[int, int]:
    attempt, _, percent = raw.decode().partition("-")
    return int(attempt), int(percent)
