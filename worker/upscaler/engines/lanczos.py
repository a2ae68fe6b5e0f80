"""The engine that needs no model: Lanczos resampling in linear light."""

from collections.abc import Callable

from core.errors import Stopped
from core.options import UpscaleOptions
from worker.upscaler.picture import Picture
from worker.upscaler.plan import output_size
from worker.upscaler.resampling import resample


class Lanczos:
    """Resample with the three-lobed Lanczos kernel."""

    name = "lanczos"

    def upscale(
        self,
        picture: Picture,
        options: UpscaleOptions,
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> Picture:
        """Enlarge as `Engine.upscale` says; of the options `scale_factor`, `sharpen` and `small_tiles` count.

        Takes memory for input, output and one tile. A picture that keeps its size unsharpened is returned as it is.

        Raises:
            Stopped: `should_stop()` answered true.
            OutOfMemory: the output does not fit.
        """

        def check() -> None:
            if should_stop():
                raise Stopped("The upscaling was told to stop.")

        return resample(
            picture,
            output_size(picture.width, picture.height, options.scale_factor),
            check,
            on_progress=on_progress,
            sharpen=options.sharpen,
            small_tiles=options.small_tiles,
        )
