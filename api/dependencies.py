"""What routes ask for: the parts of the process, and who is calling."""

import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated

import anyio.to_thread
from fastapi import Depends, Header, Request
from fastapi.security import APIKeyHeader
from pydantic import BaseModel
from redis.asyncio import Redis

from api.headers import read_cancel_after, read_idempotency_key
from api.intake import Idempotency, Intake, fingerprint
from api.waiting import Watch
from core.errors import InvalidApiKey, KeyInactive, MissingApiKey
from core.settings import Settings
from core.storage import Storage
from db import keys
from db.keys import KeyRecord
from db.session import Database

KEY_TTL_SECONDS = 5.0
"""How long a key that was found is believed without asking again: a revoked one works that much longer."""

_KEYS_REMEMBERED = 10_000


class KeyRing:
    """API keys that were found lately, so that a poll costs no query for its key.

    Args:
        store_digests: keep of each key what Apiframe would sign its webhooks with; only the key itself tells that.
    """

    def __init__(self, database: Database, *, store_digests: bool = False) -> None:
        self._database = database
        self._store_digests = store_digests
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
                if self._store_digests and record is not None and record.active and not record.has_digest:
                    await keys.store_digest(connection, record.id, key)
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
    storage: Storage
    redis: Redis
    intake: Intake
    key_ring: KeyRing
    watch: Watch


async def _parts(request: Request) -> Parts:  # async, or FastAPI would hand each call to a thread
    return request.app.state.parts


PartsDep = Annotated[Parts, Depends(_parts)]

_api_key = APIKeyHeader(name="X-API-Key", auto_error=False)


async def _caller(parts: PartsDep, key: Annotated[str | None, Depends(_api_key)]) -> KeyRecord:
    if not key:
        raise MissingApiKey("API key is required")
    return await parts.key_ring.find(key)


CallerDep = Annotated[KeyRecord, Depends(_caller)]


@dataclass(frozen=True)
class SubmitHeaders:
    """What any dialect's submit can say in headers."""

    idempotency_key: str | None
    cancel_after: timedelta | None

    async def idempotency(self, path: str, body: BaseModel) -> Idempotency | None:
        """Return what tells this request from others, None when it carries no Idempotency-Key.

        The body is that which was validated, so a field that is given its default is the same as none.
        """
        if self.idempotency_key is None:
            return None
        digest = await anyio.to_thread.run_sync(lambda: fingerprint(path, body.model_dump(mode="json")))
        return Idempotency(self.idempotency_key, digest)


async def _submit_headers(
    idempotency_key: Annotated[
        str | None, Header(description="The same key and request within 24 hours give the same job.")
    ] = None,
    cancel_after: Annotated[
        str | None, Header(description="Cancel the job unless it is done in time: 90s, 5m, 1h30m.")
    ] = None,
) -> SubmitHeaders:
    return SubmitHeaders(read_idempotency_key(idempotency_key), read_cancel_after(cancel_after))


SubmitHeadersDep = Annotated[SubmitHeaders, Depends(_submit_headers)]
