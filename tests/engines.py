"""An engine that takes its time, for tests that need a job to be running."""

import time
from collections.abc import Callable

from core.options import UpscaleOptions
from worker.upscaler.engine import Picture

SECONDS = 3.0


class Slow:
    """Returns its input after SECONDS."""

    name = "slow"

    def upscale(
        self,
        picture: Picture,
        options: UpscaleOptions,
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> Picture:
        time.sleep(SECONDS)
        return picture
