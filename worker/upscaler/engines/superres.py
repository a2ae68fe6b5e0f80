"""The superres engine: one small network, or one of the operator's, enlarges; nothing is invented."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from core.errors import DeploymentError, Stopped
from core.options import UpscaleOptions
from worker.upscaler import checkpoints
from worker.upscaler.canvas import to_levels, to_tensor
from worker.upscaler.colour import sharpen
from worker.upscaler.devices import choose_device
from worker.upscaler.engines import Config
from worker.upscaler.picture import Levels, Picture
from worker.upscaler.plan import Size, Span, output_size
from worker.upscaler.resampling import resample_alpha_strips
from worker.upscaler.strips import Rows
from worker.upscaler.superres import Network, enlarge_strips, peak_bytes

ALPHA_ROWS = 256
"""Rows of a strip of alpha at most."""

CPU = torch.device("cpu")


def load(config: Config) -> "Superres":
    """Read the networks.

    Raises:
        DeploymentError: a file is missing or unfit, or there is no such device.
    """
    return Superres(load_networks(config, choose_device(config.device)))


def load_networks(config: Config, device: torch.device) -> tuple[Network, ...]:
    """Read the network that the operator chose, else our own of the chosen variant.

    Raises:
        DeploymentError: a file is missing or unfit.
    """
    if not config.superres_weights:
        return checkpoints.load_own(config.superres_variant, device, config.precision)
    try:
        return (checkpoints.load(Path(config.superres_weights), device, config.precision),)
    except DeploymentError as error:
        raise DeploymentError(f"UPSCALED_SUPERRES_WEIGHTS cannot be used: {error}") from error


class Superres:
    """Enlarge by networks whose factors are whole, and resample to the size from there."""

    name = "superres"

    def __init__(self, networks: Sequence[Network]) -> None:
        self._networks = networks

    def upscale(
        self,
        picture: Picture,
        options: UpscaleOptions,
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> Iterator[Picture]:
        """Enlarge as `Engine.upscale` says; of the options `scale_factor`, `sharpen` and `small_tiles` count.

        Alpha is enlarged apart, by Lanczos, and has no say in the colours.

        Raises:
            Stopped: `should_stop()` answered true.
            OutOfMemory: a strip does not fit.
        """

        def check() -> None:
            if should_stop():
                raise Stopped("The upscaling was told to stop.")

        size = output_size(picture.width, picture.height, options.scale_factor)
        colours = enlarge_strips(picture.rgb, size, self._networks, check, on_progress, small=options.small_tiles)
        if options.sharpen:
            colours = _sharpened(Rows(colours, size), options.sharpen)
        if picture.alpha is None:
            yield from map(Picture, colours)
            return
        same = size == (picture.width, picture.height)
        # The colours may come as one strip then, beside which alpha in strips would be gathered, and held twice.
        alpha = Rows([picture.alpha] if same else resample_alpha_strips(picture.alpha, size, check), size)
        top = 0
        for strip in colours:
            yield Picture(strip, alpha.read(Span(top, top + len(strip))))
            top += len(strip)

    def peak_bytes(self, size: Size, options: UpscaleOptions, *, alpha: bool) -> int:
        """Tell how much memory upscaling takes at most, as `Engine.peak_bytes` says."""
        wanted = output_size(*size, options.scale_factor)
        picture = size.width * size.height * (4 if alpha else 3)
        strips = 2 * wanted.width * ALPHA_ROWS if alpha else 0
        return picture + strips + peak_bytes(size, wanted, self._networks, small=options.small_tiles)


SHARPENED_ROWS = 64


def _sharpened(rows: Rows, amount: float) -> Iterator[Levels]:
    """Sharpen as Clarity does, which looks at the next row above and below."""
    height = rows.size.height
    for top in range(0, height, SHARPENED_ROWS):
        span = Span(top, min(top + SHARPENED_ROWS, height))
        field = span.grown(1, height)
        sharpened = to_levels(sharpen(to_tensor(rows.read(field), CPU), amount))
        yield sharpened[span.within(field)]
