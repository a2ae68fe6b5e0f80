"""How many requests a key may make, counted in Redis for all API processes together; while Redis is away, any number.

The window is fixed: it begins with a key's first request and ends a minute later. The count is one atomic increment, so
it is exact across processes, goes by Redis's clock alone, and takes one integer for each key that is active; `r` and
`t` are then just what the draft of the RateLimit headers means. Its price: the requests of two windows can meet at the
edge between them. But those of one may come at once in any case.
"""

import logging
import math
import time
from collections.abc import Mapping

import anyio
from limits import RateLimitItem, RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from core.errors import RateLimited
from core.settings import Settings
from db.keys import KeyRecord

TIMEOUT_SECONDS = 0.5
"""How long a request waits for Redis at most."""

PAUSE_SECONDS = 5.0
"""How long nobody asks Redis again after it failed; then one request tries, and the others still do not wait for it."""

_AT_ONCE = 8
"""How many requests of one process are counted at the same time. The others wait for their turn before their patience
with Redis begins: else a burst would make Redis seem slow, and so lift its own limit."""

_WINDOWS_REMEMBERED = 10_000

logger = logging.getLogger(__name__)


class Rates:
    """Counts the requests of each key, and refuses those above its limit."""

    def __init__(self, settings: Settings) -> None:
        self._default = settings.requests_per_minute
        # No retries: what fails lets the request through, and at once.
        self._redis = Redis.from_url(settings.redis_url, retry=Retry(NoBackoff(), 0))  # pyright: ignore[reportUnknownMemberType]
        # The pool has the address; limits would read it less liberally than redis-py does.
        self._storage = RedisStorage(
            "redis://",
            implementation="redispy",
            key_prefix="rates",
            connection_pool=self._redis.connection_pool,  # pyright: ignore[reportArgumentType] - passed on as it is
        )
        self._turns = anyio.Semaphore(_AT_ONCE)
        self._ends: dict[str, float] = {}
        self._away = False
        self._ask_again_at = 0.0

    async def aclose(self) -> None:
        """Let go of the connections to Redis."""
        await self._redis.aclose()

    async def take(self, record: KeyRecord) -> Mapping[str, str]:
        """Count one request of the key, and return what the answer's headers say of its limit, if it has one.

        Raises:
            RateLimited: the key has made as many as it may; these headers go with it.
        """
        limit = self._default if record.requests_per_minute is None else record.requests_per_minute
        if not limit:
            return {}
        item = RateLimitItemPerMinute(limit, namespace="requests")
        async with self._turns:
            counted = await self._count(item, str(record.id))
        if counted is None:
            return {}
        count, seconds = counted
        headers = describe("requests", limit, item.get_expiry(), max(0, limit - count), seconds)
        if count > limit:
            raise RateLimited(seconds, headers)
        return headers

    async def _count(self, item: RateLimitItem, owner: str) -> tuple[int, int] | None:
        """Return how many requests there were in this window, and the seconds to its end; None while Redis is away."""
        now = time.monotonic()
        if now < self._ask_again_at:
            return None
        if self._away:  # this request finds out for all others
            self._ask_again_at = now + PAUSE_SECONDS
        try:
            with anyio.fail_after(TIMEOUT_SECONDS):
                count = await self._storage.incr(item.key_for(owner), item.get_expiry())
                seconds = await self._seconds_left(item, owner, count)
        except (RedisError, OSError) as error:
            self._ask_again_at = time.monotonic() + PAUSE_SECONDS
            if not self._away:
                logger.warning("requests go uncounted, Redis is away: %r", error)
            self._away = True
            return None
        if self._away:
            logger.info("requests are counted again")
        self._away, self._ask_again_at = False, 0.0
        return count, seconds

    async def _seconds_left(self, item: RateLimitItem, owner: str, count: int) -> int:
        """Return how long the window still is, at least 1; rather a second more, so that nobody comes back too early.

        Asking costs as much as counting: it is done once for each window, and when somebody is to wait for its end.
        """
        key, window, now = item.key_for(owner), item.get_expiry(), time.monotonic()
        if count == 1:
            self._ends[key] = now + window
        elif count > item.amount or now >= self._ends.get(key, 0.0):
            left = await self._storage.get_expiry(key) - time.time()  # which Redis has rounded to whole seconds
            self._ends[key] = now + left + 1
        if len(self._ends) > _WINDOWS_REMEMBERED:
            self._ends = {key: self._ends[key]}
        return max(1, min(window, math.ceil(self._ends[key] - now)))


def describe(policy: str, quota: int, window: int, remaining: int, seconds: int, unit: str = "") -> dict[str, str]:
    """Return the two headers of draft-ietf-httpapi-ratelimit-headers for one policy.

    Args:
        window: the seconds for which the quota holds.
        seconds: how long it is until there is a whole quota again.
        unit: of the quota, if not requests.
    """
    unit = f';qu="{unit}"' if unit else ""
    return {
        "RateLimit-Policy": f'"{policy}";q={quota};w={window}{unit}',
        "RateLimit": f'"{policy}";r={remaining};t={seconds}',
    }
