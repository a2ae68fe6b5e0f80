"""What an engine is."""

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

from core.options import UpscaleOptions
from worker.upscaler.picture import Picture
from worker.upscaler.plan import Size


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
    ) -> Iterator[Picture]:
        """Enlarge `picture` to exactly its `plan.output_size`, and give it in strips, each as soon as it is ready.

        Strips are as wide as the output, follow each other from top to bottom, and all have alpha or none has; an
        engine that works on the whole gives it as one. The work is done as they are asked for, so a picture need never
        be in memory as a whole. `on_progress` hears what fraction is done, 0 to 1, never falling, 1.0 at the end.
        `should_stop` is asked between tiles.

        Raises:
            Stopped: `should_stop()` answered true.
            OutOfMemory: the output, or the work on it, does not fit.
        """
        ...

    def peak_bytes(self, size: Size, options: UpscaleOptions, *, alpha: bool) -> int:
        """Tell how much memory upscaling a picture of that size takes at most, roughly, beyond the engine itself."""
        ...
