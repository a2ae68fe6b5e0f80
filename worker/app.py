"""The Celery application of a worker: one task, which works off the queue. Importing it loads no model."""

import logging
import time
from dataclasses import fields
from typing import Any

from celery import Celery, bootsteps
from celery.signals import worker_shutting_down

from core import failpoints
from core.errors import DatabaseUnavailable
from core.queue import POOL, TASK, make_celery
from core.settings import Settings
from worker.upscale import SafetyChecker, Worker, open_worker
from worker.upscaler import engines, weights

VAIN_SECONDS = 1.0
"""How long a worker waits before the next hint when the database is away."""

ATTENTION_SECONDS = 0.02
"""How long a worker that has just become idle may overlook a hint."""

logger = logging.getLogger(__name__)


def run(settings: Settings) -> None:
    """Load the engine and serve hints until SIGTERM; a running job is finished first, or handed back.

    Raises:
        DeploymentError: the engine or the network that the settings name cannot run here.
    """
    config = engines.Config(**{field.name: getattr(settings, field.name) for field in fields(engines.Config)})
    chosen = engines.Engines(engines.load(settings.engine, config), config)
    checker = _load_safety_checker(settings)
    logger.info("worker started with engine %s", chosen.own.name)
    with open_worker(settings, chosen, checker) as worker:
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


def _load_safety_checker(settings: Settings) -> SafetyChecker | None:
    """Read it if it is installed; without it no worker needs PyTorch for this."""
    folder = weights.safety_checker(settings.models_dir)
    if folder is None:
        return None
    from worker.upscaler import components, safety

    return safety.SafetyChecker.load(folder, components.choose_device(settings.device))


def register(celery: Celery, worker: Worker) -> None:
    """Give the application its one task: to work until the queue is empty, or the process is told to stop.

    Returning to Celery after each job would cost more than claiming it: half of a worker's time, where jobs are small.
    The hints that this leaves over find nothing, which is cheap; while anyone is busy nobody looks at them.
    """

    def work() -> None:
        failpoints.reach("after_pop")
        try:
            worker.work()
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
