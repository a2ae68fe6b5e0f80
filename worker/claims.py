"""How a worker gets its jobs: it claims the next one under its lease."""

import logging

import anyio

from core.errors import LeaseLost
from db import queue
from db.session import Database
from worker.endings import Endings
from worker.lease import Held, Lease

EMPTY_CLAIM_PAUSE_SECONDS = 0.005
"""A claim comes back empty when every queued row is locked by others: it is asked once more after this pause."""

logger = logging.getLogger(__name__)


class Claims:
    """Claims jobs; lives in the worker's event loop."""

    def __init__(self, database: Database, lease: Lease, endings: Endings) -> None:
        self._database = database
        self._lease = lease
        self._endings = endings

    async def claim(self, beside_others: bool) -> Held | None:
        """Claim the next job and tell who waits for it; None when there is none, or the worker is to end.

        Args:
            beside_others: the worker has other jobs in its hands, so that one which was lost before is not for it.

        Raises:
            DatabaseUnavailable: then a job may be ours without our knowing; the worker registers as another.
        """
        for pause in (0.0, EMPTY_CLAIM_PAUSE_SECONDS):
            await anyio.sleep(pause)
            if (held := await self._claim_once(beside_others=beside_others)) is not None:
                self._endings.announce_soon(held.attempt.job_id)
                return held
        return None

    async def _claim_once(self, *, beside_others: bool) -> Held | None:
        while True:
            try:
                async with self._lease.registered() as worker_id:
                    async with self._database.connection() as connection:
                        if self._lease.draining:  # or it would take again what it has just handed back
                            return None
                        name = self._lease.name
                        attempt = await queue.claim(connection, worker_id, name, beside_others=beside_others)
                    return None if attempt is None else self._lease.hold(attempt)
            except LeaseLost as error:
                logger.warning("%s Registering again.", error)
                self._lease.forsake()
            except BaseException:
                self._lease.forsake()  # a job may be ours by now, and we shall never know
                raise
