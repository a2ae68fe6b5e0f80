"""Engines that cost nothing, so that what is measured is everything around them."""

import random
import time
from collections.abc import Callable, Iterator

from bench.peers.models import job
from core.errors import Stopped
from core.options import UpscaleOptions
from worker.upscaler.picture import Picture
from worker.upscaler.plan import Size

MEAN_SECONDS = 0.4
"""How long a job of Exponential takes on average."""


class Copy:
    """Gives its input: for scale factor 1."""

    name = "copy"

    def upscale(
        self,
        picture: Picture,
        options: UpscaleOptions,
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> Iterator[Picture]:
        self.act(options, on_progress, should_stop)
        yield picture

    def act(
        self, options: UpscaleOptions, on_progress: Callable[[float], None], should_stop: Callable[[], bool]
    ) -> None:
        """Do what comes before the pixels."""
        on_progress(1.0)

    def peak_bytes(self, size: Size, options: UpscaleOptions, *, alpha: bool) -> int:
        return 0


class Journalled(Copy):
    """Gives its input after the seconds that the prompt asks for, and writes what happened into the peers' journal.

    The prompt is a tag and seconds, "kitten 0.5": what bench/peers gives every server.
    """

    name = "journalled"

    def act(
        self, options: UpscaleOptions, on_progress: Callable[[float], None], should_stop: Callable[[], bool]
    ) -> None:
        tag, seconds = options.prompt.split()
        try:
            job.work(tag, float(seconds), on_progress, should_stop)
        except job.Stopped as stopped:
            raise Stopped("The job was told to stop.") from stopped
        on_progress(1.0)


class Exponential(Copy):
    """Sleeps for a time that its job's seed decides, MEAN_SECONDS on average, and gives its input."""

    name = "exponential"

    def act(
        self, options: UpscaleOptions, on_progress: Callable[[float], None], should_stop: Callable[[], bool]
    ) -> None:
        time.sleep(random.Random(options.seed).expovariate(1 / MEAN_SECONDS))  # noqa: S311 - a duration, no secret
