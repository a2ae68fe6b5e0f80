"""API keys that were found lately, and the record of their use."""

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from uuid import UUID

import anyio

from core.errors import DatabaseUnavailable, InvalidApiKey, KeyInactive
from core.sealing import Sealer
from db import keys
from db.keys import KeyRecord
from db.session import Database

KEY_TTL_SECONDS = 4.0
"""How long what the database said of a key is believed, from when it was asked. A revoked key, or one that has expired,
works that much longer."""

MAX_REMEMBERED = 10_000
"""How many keys are remembered; then all are forgotten."""

BATCH_SECONDS = 1.0
"""The pause between two records of use, which gathers those of many keys."""
PATIENCE_SECONDS = 5.0
"""How long one record of use may take; it keeps a connection from requests."""

logger = logging.getLogger(__name__)


class KeyRing:
    """Finds whom a key belongs to, mostly without a query.

    Only keys that exist are remembered, by their hashes: what strangers make up takes no memory, and a key works from
    the moment it is made.

    Args:
        store_digests: keep of each key what Apiframe would sign its webhooks with; only the key itself tells that.
    """

    def __init__(self, database: Database, sealer: Sealer, *, store_digests: bool = False) -> None:
        self._database = database
        self._sealer = sealer
        self._store_digests = store_digests
        self._found: dict[bytes, tuple[KeyRecord, float]] = {}
        self._uses = _Uses(database)

    def __len__(self) -> int:
        return len(self._found)

    async def find(self, key: str) -> KeyRecord:
        """Return whom the key belongs to.

        Raises:
            InvalidApiKey: nobody was ever given it.
            KeyInactive: it was revoked, or has expired.
            DatabaseUnavailable: it was not found lately, and cannot be looked for.
        """
        if not keys.is_well_formed(key):
            raise InvalidApiKey("Invalid API key")
        hash = keys.hash_key(key)
        record, believed_until = self._found.get(hash, (None, 0.0))
        if record is None or time.monotonic() > believed_until:
            record = await self._look_up(key, hash)
        if not record.active:
            raise KeyInactive("API key is inactive")
        self._uses.note(record.id)
        return record

    async def _look_up(self, key: str, hash: bytes) -> KeyRecord:
        asked_at = time.monotonic()  # and not when the answer came: it may be old by then
        async with self._database.connection() as connection:
            record = await keys.find(connection, key)
            if self._store_digests and record is not None and record.active and not record.has_digest:
                await keys.store_digest(connection, self._sealer, record.id, key)
        if record is None:
            raise InvalidApiKey("Invalid API key")
        if len(self._found) >= MAX_REMEMBERED:
            self._found.clear()
        self._found[hash] = (record, asked_at + KEY_TTL_SECONDS)
        return record

    @property
    def recording(self) -> bool:
        """Whether some use of a key is yet to be recorded."""
        return self._uses.recording

    async def run(self) -> None:
        """Record the use of keys until cancelled."""
        await self._uses.run()


class _Uses:
    """Records when keys were used last, beside the requests: none waits for it, and none fails by it."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._noted_at: dict[UUID, float] = {}
        self._waiting: set[UUID] = set()
        self.recording = False
        self._stirred = anyio.Event()
        self._complained = False

    def note(self, api_key_id: UUID) -> None:
        now = time.monotonic()
        if now < self._noted_at.get(api_key_id, -float("inf")) + keys.USE_INTERVAL.total_seconds():
            return
        if len(self._noted_at) >= MAX_REMEMBERED:
            self._noted_at.clear()
        self._noted_at[api_key_id] = now
        self._waiting.add(api_key_id)
        self.recording = True
        self._stirred.set()

    async def run(self) -> None:
        while True:
            await self._stirred.wait()
            self._stirred = anyio.Event()
            noted, self._waiting = self._waiting, set()
            try:
                with anyio.fail_after(PATIENCE_SECONDS):
                    async with self._database.connection() as connection:
                        await keys.note_use(connection, noted)
                self._complained = False
            except (DatabaseUnavailable, TimeoutError) as error:
                level = logging.DEBUG if self._complained else logging.WARNING
                logger.log(level, "the last use of keys cannot be recorded: %s", str(error) or "it takes too long")
                self._complained = True
            except Exception:
                # A bug here must cost no request anything.
                logger.exception("bug while recording the last use of keys")
            self.recording = bool(self._waiting)
            await anyio.sleep(BATCH_SECONDS)


@asynccontextmanager
async def open_key_ring(database: Database, sealer: Sealer, *, store_digests: bool) -> AsyncGenerator[KeyRing]:
    """Record the use of keys in the background for as long as this `async with` lasts."""
    key_ring = KeyRing(database, sealer, store_digests=store_digests)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(key_ring.run)
        try:
            yield key_ring
        finally:
            tasks.cancel_scope.cancel()
