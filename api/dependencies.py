"""What routes ask for: the parts of the process, and who is calling."""

import time
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader
from redis.asyncio import Redis

from api.intake import Intake
from core.errors import InvalidApiKey, KeyInactive, MissingApiKey
from core.settings import Settings
from core.storage import LocalStorage
from db import keys
from db.keys import KeyRecord
from db.session import Database

KEY_TTL_SECONDS = 5.0
"""How long a key that was found is believed without asking again: a revoked one works that much longer."""

_KEYS_REMEMBERED = 10_000


class KeyRing:
    """API keys that were found lately, so that a poll costs no query for its key."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._found: dict[str, tuple[KeyRecord, float]] = {}

    async def find(self, key: str) -> KeyRecord:
        """Return whom the key belongs to.

        Raises:
            InvalidApiKey: nobody was ever given it.
            KeyInactive: it was revoked.
        """
        record, believed_until = self._found.get(key, (None, 0.0))
        if record is None or time.monotonic() > believed_until:
            async with self._database.connection() as connection:
                record = await keys.find(connection, key)
            if record is None:
                raise InvalidApiKey("Invalid API key")
            if len(self._found) >= _KEYS_REMEMBERED:
                self._found.clear()
            self._found[key] = (record, time.monotonic() + KEY_TTL_SECONDS)
        if not record.active:
            raise KeyInactive("API key is inactive")
        return record


@dataclass(frozen=True)
class Parts:
    """The parts of one API process; `app.state.parts` holds them."""

    settings: Settings
    database: Database
    storage: LocalStorage
    redis: Redis
    intake: Intake
    key_ring: KeyRing


async def _parts(request: Request) -> Parts:  # async, or FastAPI would hand each call to a thread
    return request.app.state.parts


PartsDep = Annotated[Parts, Depends(_parts)]

_api_key = APIKeyHeader(name="X-API-Key", auto_error=False)


async def _caller(parts: PartsDep, key: Annotated[str | None, Depends(_api_key)]) -> KeyRecord:
    if not key:
        raise MissingApiKey("API key is required")
    return await parts.key_ring.find(key)


CallerDep = Annotated[KeyRecord, Depends(_caller)]
