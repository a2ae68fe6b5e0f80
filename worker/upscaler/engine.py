"""What an engine is."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from core.options import UpscaleOptions
from worker.upscaler.picture import Picture


@runtime_checkable
class Engine(Protocol):
    """What turns one picture into a larger one. An object serves many jobs, one at a time, and keeps nothing of any."""

    name: str

    def upscale(
        self,
        picture: Picture,
        options: UpscaleOptions,
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> Picture:
        """Enlarge `picture` to exactly its `plan.output_size`.

        `on_progress` hears what fraction is done, 0 to 1, never falling, 1.0 at the end. `should_stop` is asked
        between tiles.

        Raises:
            Stopped: `should_stop()` answered true.
            OutOfMemory: the output, or the work on it, does not fit.
        """
        ...
