"""How far the engine is with a job: told to whoever follows it, and to the worker itself."""

import logging
import time
from collections.abc import Callable

from anyio.from_thread import BlockingPortal
from redis.asyncio import Redis
from redis.exceptions import RedisError

from core import failpoints, progress
from db.jobs import Attempt
from worker.lease import Held

AHEAD_SECONDS = 0.5
"""How long before the engine is free, by its own progress, the next job is claimed and read."""

PROGRESS_INTERVAL_SECONDS = 0.2
PROGRESS_EVENT_INTERVAL_SECONDS = 1.0
"""How often the webhook of a job is told of its progress at most."""

logger = logging.getLogger(__name__)


class Reports:
    """Tells of the progress of jobs from the engine's thread by way of the worker's event loop."""

    def __init__(self, portal: BlockingPortal, redis: Redis) -> None:
        self._portal = portal
        self._redis = redis

    def follow(self, held: Held, look_ahead: Callable[[], object]) -> Callable[[float], None]:
        """Return the engine's on_progress: it never waits, and drops what comes too fast to be seen.

        When the job is nearly done it lets the next one be claimed; sooner, and another worker could begin it first.
        """
        began = shown_at = event_at = time.monotonic()

        def report(fraction: float) -> None:
            nonlocal shown_at, event_at
            held.move()
            failpoints.reach("mid_step")
            now = time.monotonic()
            if fraction >= 0.5 and (now - began) * (1 - fraction) <= AHEAD_SECONDS * fraction:
                look_ahead()
            if now - shown_at < PROGRESS_INTERVAL_SECONDS:
                return
            shown_at = now
            owe_event = held.attempt.wants_progress and now - event_at >= PROGRESS_EVENT_INTERVAL_SECONDS
            event_at = now if owe_event else event_at
            # 100 is what a completed job shows: storing is still to come.
            percent = min(99, max(1, int(100 * fraction)))
            self._portal.start_task_soon(self._report, held.attempt, percent, owe_event)

        return report

    async def _report(self, attempt: Attempt, percent: int, owe_event: bool) -> None:
        try:
            await progress.report(self._redis, attempt.job_id, attempt.number, percent)
            if owe_event:
                await progress.owe_event(self._redis, attempt.job_id, attempt.number, percent)
        except RedisError as error:
            logger.debug("progress of job %s not shown: %s", attempt.job_id, error)
