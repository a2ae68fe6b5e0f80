"""Progress of running jobs, in Redis: a short-lived key and a message. Decoration only; the truth never reads it."""

from uuid import UUID

from redis.asyncio import Redis
from redis.exceptions import RedisError

from core.settings import Settings

TTL_SECONDS = 600


def connect(settings: Settings) -> Redis:
    """Return a client that gives up quickly: whoever asks for progress can do without."""
    return Redis.from_url(settings.redis_url, socket_timeout=0.5, socket_connect_timeout=0.5)  # pyright: ignore[reportUnknownMemberType]


async def report(client: Redis, job_id: UUID, attempt: int, percent: int) -> None:
    """Store and publish how far the job has come; raises redis.RedisError when Redis is down."""
    async with client.pipeline(transaction=False) as pipeline:
        pipeline.set(_key(job_id), percent, ex=TTL_SECONDS)
        pipeline.publish(_key(job_id), f"{attempt} {percent}")  # pyright: ignore[reportUnknownMemberType]
        await pipeline.execute()


async def read(client: Redis, job_id: UUID) -> int:
    """Return how far the running job has come, in percent; 0 when nobody knows."""
    try:
        value = await client.get(_key(job_id))
    except RedisError:
        return 0
    return int(value) if value is not None else 0


def _key(job_id: UUID) -> str:
    return f"progress:{job_id}"
