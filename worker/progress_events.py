"""Progress told to webhooks, best effort: event from Redis → body → one post. What finds no room is dropped."""

import logging
from uuid import UUID, uuid5

import anyio
from anyio.abc import TaskGroup
from redis.asyncio import Redis
from redis.exceptions import RedisError

from core import progress
from core.apiframe import progress_body
from core.errors import DatabaseUnavailable
from core.progress import ProgressEvent
from db import deliveries
from db.deliveries import ProgressTarget
from db.models import JobStatus, WebhookEvent
from db.session import Database
from worker.posts import Post, Poster, shows_life
from worker.receivers import IN_FLIGHT, IN_FLIGHT_PER_RECEIVER, Receivers

WAIT_SECONDS = 0.25
"""How long Redis is asked to wait for an event; less than its client's patience."""

AWAY_SECONDS = 2.0
"""How long to leave Redis, or the database, alone when it is away."""

logger = logging.getLogger(__name__)


class ProgressSender:
    """Posts progress in what room the deliveries leave."""

    def __init__(self, database: Database, redis: Redis, poster: Poster, receivers: Receivers) -> None:
        self._database = database
        self._redis = redis
        self._poster = poster
        self._receivers = receivers
        self._under_way: set[UUID] = set()

    async def run(self) -> None:
        """Post until cancelled; whatever is away is waited for."""
        async with anyio.create_task_group() as posts:
            while True:
                try:
                    event = await progress.take_event(self._redis, WAIT_SECONDS)
                    if event is not None:
                        await self._begin(posts, event)
                except (RedisError, DatabaseUnavailable) as error:
                    logger.debug("progress not told: %s", error)
                    await anyio.sleep(AWAY_SECONDS)

    async def _begin(self, posts: TaskGroup, event: ProgressEvent) -> None:
        # One at a time for each job: a receiver never learns of 40 percent after 50.
        if event.job_id in self._under_way:
            return
        async with self._database.connection() as connection:
            target = await deliveries.progress_target(connection, event.job_id, event.attempt)
        if target is None:
            return
        async with self._receivers.choosing:
            # Half of everything is kept for deliveries, and the trial of a receiver that seemed dead is always one.
            few_in_flight = self._receivers.free > IN_FLIGHT // 2
            if few_in_flight and self._receivers.room(target.receiver) > IN_FLIGHT_PER_RECEIVER // 2:
                self._receivers.begin(target.receiver)
                self._under_way.add(event.job_id)
                posts.start_soon(self._post, event, target)

    async def _post(self, event: ProgressEvent, target: ProgressTarget) -> None:
        alive = None
        try:
            outcome = await self._poster.post(_post_of(event, target))
            alive = shows_life(outcome)
        except DatabaseUnavailable as error:
            logger.debug("progress not told: %s", error)
        except Exception:
            logger.exception("progress of job %s: bug", event.job_id)
        finally:
            self._under_way.discard(event.job_id)
            self._receivers.end(target.receiver, alive)


def _post_of(event: ProgressEvent, target: ProgressTarget) -> Post:
    body = progress_body(
        job_id=event.job_id,
        status=JobStatus.PROCESSING,
        model=target.model,
        percent=event.percent,
        at=event.at,
    )
    return Post(
        id=uuid5(event.job_id, f"progress {event.attempt} {event.percent}"),
        api_key_id=target.api_key_id,
        event=WebhookEvent.PROGRESS,
        url=target.url,
        body=body,
    )
