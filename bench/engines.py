"""Engines that cost nothing, so that what is measured is everything around them."""

import random
import time
from collections.abc import Callable

from bench.peers.models import job
from core.errors import Stopped
from core.options import UpscaleOptions
from worker.upscaler.picture import Picture

MEAN_SECONDS = 0.4
"""How long a job of Exponential takes on average."""


class Copy:
    """Returns its input: for scale factor 1."""

    name = "copy"

    def upscale(
        self,
        picture: Picture,
        options: UpscaleOptions,
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> Picture:
        on_progress(1.0)
        return picture


class Journalled:
    """Returns its input after the seconds that the prompt asks for, and writes what happened into the peers' journal.

    The prompt is a tag and seconds, "kitten 0.5": what bench/peers gives every server.
    """

    name = "journalled"

    def upscale(
        self,
        picture: Picture,
        options: UpscaleOptions,
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> Picture:
        tag, seconds = options.prompt.split()
        try:
            job.work(tag, float(seconds), on_progress, should_stop)
        except job.Stopped as stopped:
            raise Stopped("The job was told to stop.") from stopped
        on_progress(1.0)
        return picture


class Exponential:
    """Sleeps for a time that its job's seed decides, MEAN_SECONDS on average, and returns its input."""

    name = "exponential"

    def upscale(
        self,
        picture: Picture,
        options: UpscaleOptions,
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> Picture:
        time.sleep(random.Random(options.seed).expovariate(1 / MEAN_SECONDS))  # noqa: S311 - a duration, no secret
        return picture
