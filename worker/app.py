"""The Celery application of a worker: one task, which works off the queue. Importing it loads no model."""

import logging
import time
from typing import Any

from celery import Celery, bootsteps
from celery.signals import worker_shutting_down
from celery.worker import state

from core import failpoints
from core.errors import DatabaseUnavailable
from core.queue import POOL, TASK, make_celery
from core.settings import Settings
from worker.upscale import Worker, open_worker
from worker.upscaler import engines

VAIN_SECONDS = 1.0
"""How long a worker waits before the next hint when the database is away."""

ATTENTION_SECONDS = 0.02
"""How long a worker that has just become idle may overlook a hint."""

logger = logging.getLogger(__name__)


def run(settings: Settings) -> None:
    """Load the engine and serve hints until SIGTERM; a running job is finished first, or handed back.

    Raises:
        DeploymentError: the engine that the settings name cannot run here.
    """
    engine = engines.load(settings.engine)
    logger.info("worker started with engine %s", engine.name)
    with open_worker(settings, engine) as worker:
        celery = make_celery(settings)
        register(celery, worker)

        def drain(**_: object) -> None:
            worker.drain()

        worker_shutting_down.connect(drain)  # pyright: ignore[reportUnknownMemberType]
        # One thread: the loop that talks to Redis stays alive beside the job, and CUDA stays in one process.
        celery.worker_main(
            [
                *("--quiet", "worker", "--pool=threads", "--concurrency=1", f"--queues={POOL}", "--loglevel=WARNING"),
                *("--without-gossip", "--without-mingle", "--without-heartbeat"),
            ]
        )


def register(celery: Celery, worker: Worker) -> None:
    """Give the application its one task: to work until the queue is empty, or the process is told to stop.

    Returning to Celery after each job would cost more than claiming it: half of a worker's time, where jobs are small.
    The hints that this leaves over find nothing, which is cheap; while anyone is busy nobody looks at them.
    """

    def work() -> None:
        failpoints.reach("after_pop")
        try:
            while worker.run_next() and not should_stop():
                pass
        except DatabaseUnavailable as error:
            logger.warning("hint spent in vain, the sweep will send another: %s", error)
            time.sleep(VAIN_SECONDS)  # or the hints that wait would all be spent in no time

    celery.task(name=TASK)(work)
    celery.steps["consumer"].add(Attention)


class Attention(bootsteps.StartStopStep):
    """Lets a worker that has run out of work take the next hint at once.

    Celery's loop does not notice the end of a task in a thread; it sleeps on, for up to a second, before it listens for
    hints again. So it is woken a little more often.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, parent: Any) -> None:
        parent.hub.call_repeatedly(ATTENTION_SECONDS, _look_up)


def _look_up() -> None:
    """Do nothing: the loop goes round, that is all."""


def should_stop() -> bool:
    """Tell whether SIGTERM has asked this process to end."""
    return state.should_stop is not None or state.should_terminate is not None
