"""The Celery application of a worker: one task, which claims the next job. Importing it loads no model."""

import logging

from celery import Celery

from core.errors import DatabaseUnavailable
from core.queue import POOL, TASK, make_celery
from core.settings import Settings
from worker.upscale import Worker, open_worker
from worker.upscaler import engines

logger = logging.getLogger(__name__)


def run(settings: Settings) -> None:
    """Load the engine and serve hints until SIGTERM; a running job is finished first.

    Raises:
        DeploymentError: the engine that the settings name cannot run here.
    """
    engine = engines.load(settings.engine)
    logger.info("worker started with engine %s", engine.name)
    with open_worker(settings, engine) as worker:
        celery = make_celery(settings)
        register(celery, worker)
        # One thread: the loop that talks to Redis stays alive beside the job, and CUDA stays in one process.
        celery.worker_main(
            [
                *("worker", "--pool=threads", "--concurrency=1", f"--queues={POOL}", "--loglevel=WARNING"),
                *("--without-gossip", "--without-mingle", "--without-heartbeat"),
            ]
        )


def register(celery: Celery, worker: Worker) -> None:
    """Give the application its one task."""

    def claim_next() -> None:
        try:
            worker.run_next()
        except DatabaseUnavailable as error:
            logger.warning("hint spent in vain, the sweep will send another: %s", error)

    celery.task(name=TASK)(claim_next)
