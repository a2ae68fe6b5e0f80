"""The hint: a Celery message without content that says "there is work in this pool". Imports no task code."""

import logging
import threading
import time
from collections.abc import Mapping
from queue import SimpleQueue
from typing import Any

import redis
from celery import Celery
from kombu.exceptions import KombuError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from core.settings import Settings

POOL = "upscale"
"""The pool of workers that a hint is for: the name of the Celery queue and, with Redis, of its list."""

TASK = "upscaled.work"

MAX_HINTS = 1000
"""How many hints are sent at a time at most."""

ENOUGH_HINTS = 16
"""While so many hints lie waiting no more are sent. An idle worker takes a hint at once, so hints that lie there mean
that nobody is idle; and whoever is busy works until the queue is empty, hint or no hint."""

LINGER_SECONDS = 0.005
"""How long a hint waits for company; sent alone, each would cost as much as the request that owes it."""

logger = logging.getLogger(__name__)

_CELERY_SETTINGS: Mapping[str, Any] = {
    "task_default_queue": POOL,
    "task_ignore_result": True,
    "task_store_errors_even_if_ignored": False,
    "task_serializer": "json",
    "accept_content": ["json"],
    # A hint is over when it is taken, for the job is in Postgres. With a late ack, a worker whose job ended while Redis
    # was away could not acknowledge the hint, counted it as its one message for ever, and never asked for another.
    "task_acks_late": False,
    # No hoarding: a busy worker takes no hint that an idle one could act on.
    "worker_disable_prefetch": True,
    "worker_prefetch_multiplier": 1,
    # On Redis this would kill the job on a disconnect and leave its hint hidden until the visibility timeout.
    "worker_cancel_long_running_tasks_on_connection_loss": False,
    "worker_enable_remote_control": False,
    "worker_send_task_events": False,
    "worker_hijack_root_logger": False,
    "task_create_missing_queues": True,
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    "broker_pool_acquire_timeout": 2,
    "visibility_timeout": 3600,
    "broker_transport_options": {
        "visibility_timeout": 3600,
        "unacked_restore_interval": 15,
        "unacked_restore_throttle": 1,
        # Without these a half-open connection to Redis blocks for ever.
        "socket_timeout": 5,
        "socket_connect_timeout": 2,
        "socket_keepalive": True,
        "health_check_interval": 25,
    },
    "task_publish_retry_policy": {"max_retries": 2, "interval_start": 0, "interval_step": 0.1, "interval_max": 0.3},
}


def make_celery(settings: Settings) -> Celery:
    """Return a Celery application that knows the broker and no task."""
    celery = Celery("upscaled", broker=settings.redis_url, set_as_current=False)
    celery.conf.update(_CELERY_SETTINGS)
    return celery


class Hints:
    """Sends hints from a thread of its own, so that no answer to a caller ever waits for Redis.

    A hint that cannot be sent is dropped: the sweep notices the queued job and sends another.
    """

    def __init__(self, settings: Settings) -> None:
        self._celery = make_celery(settings)
        self._redis = redis.Redis.from_url(settings.redis_url, socket_timeout=5, socket_connect_timeout=2)  # pyright: ignore[reportUnknownMemberType]
        self._owed: SimpleQueue[bool] = SimpleQueue()  # True: one hint; False: nothing follows
        self._thread = threading.Thread(target=self._run, name="hints", daemon=True)
        self._thread.start()

    def send(self, count: int = 1) -> None:
        """Owe `count` hints; returns at once."""
        for _ in range(count):
            self._owed.put(True)

    def close(self) -> None:
        """Send what is owed, waiting two seconds at most."""
        self._owed.put(False)
        self._thread.join(timeout=2)

    def _run(self) -> None:
        closing = False
        while not closing:
            owed = [self._owed.get()]
            # Hints that come together go out together, in one round trip; while Redis is away they are dropped in one.
            time.sleep(LINGER_SECONDS)
            while not self._owed.empty():
                owed.append(self._owed.get())
            closing, count = not all(owed), sum(owed)
            try:
                self._send(count)
            except (KombuError, RedisError, OSError) as error:
                logger.warning("%d hints dropped, the sweep will send others: %s", count, error)
            except Exception:
                # Without this thread no hint would ever be sent again, and nobody would notice.
                logger.exception("bug while sending %d hints", count)
        self._celery.close()
        self._redis.close()

    def _send(self, count: int) -> None:
        if int(self._redis.llen(POOL)) >= ENOUGH_HINTS:  # pyright: ignore[reportArgumentType]
            return
        with self._celery.producer_pool.acquire(block=True) as producer, producer.batch():  # pyright: ignore[reportUnknownMemberType, reportAttributeAccessIssue] - new in 5.7
            for _ in range(min(count, MAX_HINTS)):
                self._celery.send_task(TASK, queue=POOL, producer=producer, ignore_result=True)


async def count_hints(client: Redis) -> int:
    """Return how many hints wait in the pool; raises redis.RedisError when Redis is down."""
    return int(await client.llen(POOL))
