"""The dispatcher: one asyncio process that delivers webhooks and sweeps."""

import asyncio
import logging
import signal

import anyio

from core import progress
from core.outbound import Outbound
from core.queue import Hints
from core.sealing import Sealer
from core.settings import Settings
from core.storage import open_storage
from db.session import Database
from worker.posts import Poster
from worker.progress_events import ProgressSender
from worker.receivers import Receivers
from worker.sweeps import Sweeper
from worker.webhooks import WebhookSender

logger = logging.getLogger(__name__)


def run(settings: Settings) -> None:
    """Deliver and sweep until SIGTERM or SIGINT."""
    asyncio.run(_run(settings))


async def _run(settings: Settings) -> None:
    database, redis, hints = Database(settings), progress.connect(settings), Hints(settings)
    try:
        guarded = Outbound(settings.outbound_allow, settings.outbound_proxy)
        async with guarded as outbound, anyio.create_task_group() as tasks:
            poster, receivers = Poster(settings, database, Sealer(settings), outbound), Receivers()
            tasks.start_soon(WebhookSender(settings, database, open_storage(settings), poster, receivers).run)
            tasks.start_soon(ProgressSender(database, redis, poster, receivers).run)
            tasks.start_soon(Sweeper(settings, database, redis, hints, open_storage(settings)).run)
            logger.info("dispatcher started")
            with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for _ in signals:
                    tasks.cancel_scope.cancel()
                    break
    finally:
        hints.close()
        await redis.aclose()
        await database.close()
