"""The engine that needs no model: Lanczos resampling in linear light."""

from collections.abc import Callable, Iterator

from core.errors import Stopped
from core.options import UpscaleOptions
from worker.upscaler.picture import Picture
from worker.upscaler.plan import Size, output_size
from worker.upscaler.resampling import peak_bytes, resample_strips


class Lanczos:
    """Resample with the three-lobed Lanczos kernel."""

    name = "lanczos"

    def upscale(
        self,
        picture: Picture,
        options: UpscaleOptions,
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> Iterator[Picture]:
        """Enlarge as `Engine.upscale` says; of the options `scale_factor`, `sharpen` and `small_tiles` count.

        A picture that keeps its size unsharpened is given as it is.

        Raises:
            Stopped: `should_stop()` answered true.
            OutOfMemory: a strip does not fit.
        """

        def check() -> None:
            if should_stop():
                raise Stopped("The upscaling was told to stop.")

        return resample_strips(
            picture,
            output_size(picture.width, picture.height, options.scale_factor),
            check,
            on_progress=on_progress,
            sharpen=options.sharpen,
            small_tiles=options.small_tiles,
        )

    def peak_bytes(self, size: Size, options: UpscaleOptions, *, alpha: bool) -> int:
        """Tell how much memory upscaling a picture of that size takes at most, roughly: itself, and a row of tiles."""
        output = output_size(*size, options.scale_factor)
        return size.width * size.height * (4 if alpha else 3) + peak_bytes(output, alpha=alpha)
