"""Notices between processes, over Redis: "look again", without content. They save time; nothing depends on them."""

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import anyio
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

logger = logging.getLogger(__name__)


def job_channel(job_id: UUID) -> str:
    """Return where a job's changes are announced, its progress among them."""
    return f"job:{job_id}"


def worker_channel(worker_id: UUID) -> str:
    """Return where a worker is asked to beat at once, and so to learn what became of its job."""
    return f"worker:{worker_id}"


async def announce(client: Redis, *channels: str) -> None:
    """Let whoever listens look again; when Redis is away they look a little later, by themselves."""
    try:
        async with client.pipeline(transaction=False) as pipeline:
            for channel in channels:
                pipeline.publish(channel, b"")  # pyright: ignore[reportUnknownMemberType]
            await pipeline.execute()
    except RedisError as error:
        logger.debug("not announced: %s", error)


class Listener:
    """One channel, listened to by one task."""

    def __init__(self, pubsub: PubSub, channel: str) -> None:
        self._pubsub = pubsub
        self._channel = channel

    async def wait(self, seconds: float) -> bool:
        """Return at the next announcement, or after `seconds`; tell which. With Redis away it is always the latter."""
        until = time.monotonic() + seconds
        try:
            await self._pubsub.subscribe(self._channel)  # pyright: ignore[reportUnknownMemberType] - a repetition does no harm
            while (left := until - time.monotonic()) > 0:
                if await self._next(left):
                    return True
        except RedisError as error:
            logger.debug("not listening on %s: %s", self._channel, error)
            await self._pubsub.aclose()
            await anyio.sleep(max(0.0, until - time.monotonic()))
        return False

    async def _next(self, seconds: float) -> bool:
        pubsub: Any = self._pubsub  # whose types leave what a message is half unknown
        return await pubsub.get_message(ignore_subscribe_messages=True, timeout=seconds) is not None


@asynccontextmanager
async def listening(client: Redis, channel: str) -> AsyncGenerator[Listener]:
    """Listen to a channel inside the block, again and again should Redis go away."""
    async with client.pubsub() as pubsub:  # pyright: ignore[reportUnknownMemberType]
        yield Listener(pubsub, channel)
