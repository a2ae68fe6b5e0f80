"""An engine that tells how far it has come, for tests that listen to it."""

import time
from collections.abc import Callable

from core.options import UpscaleOptions
from tests.engines import Repeating
from worker.upscaler.picture import Picture

STEPS = 10
SECONDS_PER_STEP = 0.25


class Stepping(Repeating):
    """Is done after some steps, each of which it reports."""

    name = "stepping"

    def act(
        self,
        picture: Picture,
        options: UpscaleOptions,
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> None:
        for step in range(STEPS):
            time.sleep(SECONDS_PER_STEP)
            on_progress((step + 1) / STEPS)
