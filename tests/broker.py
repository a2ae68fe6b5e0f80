"""A plain client of the test's Redis."""

from typing import Any

import redis


def connect_redis(url: str) -> Any:
    """Return a client, as Any: redis-py's own types leave every command half unknown."""
    return redis.Redis.from_url(url)  # pyright: ignore[reportUnknownMemberType]
