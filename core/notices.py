"""Notices between processes, over Redis: "look again", without content. They save time; nothing depends on them."""

import logging
from uuid import UUID

from redis.asyncio import Redis
from redis.exceptions import RedisError

logger = logging.getLogger(__name__)


def job_channel(job_id: UUID) -> str:
    """Return where a job's changes are announced, its progress among them."""
    return f"job:{job_id}"


def worker_channel(worker_id: UUID) -> str:
    """Return where a worker is asked to beat at once, and so to learn what became of its job."""
    return f"worker:{worker_id}"


async def announce(client: Redis, channel: str) -> None:
    """Let whoever listens look again; when Redis is away they look a little later, by themselves."""
    try:
        await client.publish(channel, b"")  # pyright: ignore[reportUnknownMemberType]
    except RedisError as error:
        logger.debug("not announced on %s: %s", channel, error)
