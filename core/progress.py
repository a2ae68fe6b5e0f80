"""Progress of running jobs, in Redis: a short-lived stream for each job. Decoration only; the truth never reads it."""

import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from core.notices import job_channel
from core.settings import Settings

TTL_SECONDS = 600

EVENTS_KEY = "progress-events"
"""The list of progress that is owed to webhooks; the newest lies on the left."""

MAX_EVENTS = 1000
"""How many lie there at most: should nobody send them, the oldest are dropped."""


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """How far an attempt had come at a time, for a webhook to tell."""

    job_id: UUID
    attempt: int
    percent: int
    at: datetime


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


async def owe_event(client: Redis, job_id: UUID, attempt: int, percent: int) -> None:
    """Let a dispatcher tell the job's webhook how far it has come; raises redis.RedisError when Redis is down."""
    event = {"job": str(job_id), "attempt": attempt, "percent": percent, "at": time.time()}
    async with client.pipeline(transaction=False) as pipeline:
        pipeline.lpush(EVENTS_KEY, json.dumps(event))
        pipeline.ltrim(EVENTS_KEY, 0, MAX_EVENTS - 1)
        await pipeline.execute()


async def take_event(client: Redis, seconds: float) -> ProgressEvent | None:
    """Take the oldest event that is owed, waiting for one; it is then nobody else's.

    Args:
        seconds: less than the client's socket timeout.

    Raises:
        redis.RedisError: Redis is down.
    """
    popped: Any = await client.brpop([EVENTS_KEY], timeout=seconds)
    if popped is None:
        return None
    try:
        event = json.loads(popped[1])
        at = datetime.fromtimestamp(event["at"], UTC)
        return ProgressEvent(UUID(event["job"]), int(event["attempt"]), int(event["percent"]), at)
    except (ValueError, TypeError, KeyError, OverflowError):
        return None  # written by another release, or by nobody of ours


def _key(job_id: UUID) -> str:
    return f"progress:{job_id}"


def _read_id(raw: bytes) -> tuple[int, int]:
    attempt, _, percent = raw.decode().partition("-")
    return int(attempt), int(percent)
