"""Engines that cost nothing, so that what is measured is everything around them."""

from collections.abc import Callable

from core.options import UpscaleOptions
from worker.upscaler.engine import Picture


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
