"""Pictures brought to a size by super-resolution networks, in strips."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import ceil, prod
from typing import Protocol

import numpy as np
from PIL import Image

from core.errors import OutOfMemory
from worker.upscaler.devices import is_exhaustion
from worker.upscaler.picture import Levels, Picture
from worker.upscaler.plan import Size, spans
from worker.upscaler.resampling import resample
from worker.upscaler.strips import FITTED_PIXELS, Rows, fitted

MAX_RUNS = 3
"""How often networks are run on each other's output: three times 2× is the largest scale factor."""

_FITTED_BYTES = 64 << 20
"""What resampling to a size takes at most: the rows that it reads, and those that it gives."""


class Network(Protocol):
    """A network that enlarges pictures of any size by a whole factor, or restores them at 1."""

    scale: int

    def enlarge(
        self, rows: Rows, check: Callable[[], None], on_progress: Callable[[float], None], *, small: bool = False
    ) -> Iterator[Levels]:
        """Enlarge a picture by `scale`, strip by strip.

        It takes memory for a strip. `check` is called before each strip or tile: our own networks make one in a second
        or less, the heaviest of others may take minutes for it on a processor. `on_progress` hears what fraction is
        done, and `small` makes do with less memory.
        """
        ...

    def peak_bytes(self, width: int, *, small: bool = False) -> int:
        """Tell how much memory a picture of that width takes at most, roughly, beside itself."""
        ...


def enlarge(rgb: Levels, size: Size, networks: Sequence[Network], check: Callable[[], None]) -> Levels:
    """Do as `enlarge_strips` does, and return the whole; without networks by Lanczos in linear light."""
    if not networks:
        return resample(Picture(rgb), size, check).rgb
    strips = list(enlarge_strips(rgb, size, networks, check))
    if len(strips) == 1:
        return strips[0]
    try:
        return np.concatenate(strips)
    except MemoryError:
        pass
    raise _too_large(size)


def enlarge_strips(
    rgb: Levels,
    size: Size,
    networks: Sequence[Network],
    check: Callable[[], None],
    on_progress: Callable[[float], None] = lambda _: None,
    *,
    small: bool = False,
) -> Iterator[Levels]:
    """Enlarge a picture of shape (height, width, 3) to exactly `size`, no side of which is less than the picture's.

    Of the `networks` that runs whose scale suffices, else the one of the largest; and again on its output, `MAX_RUNS`
    times at most. What is too large is brought down by Pillow's Lanczos: before a further run to what this one needs,
    and at the end to `size`; as it is, not in linear light, for so were made the small pictures that such networks
    learn from. A picture that has its size is given as it is, unless the network is one of scale 1.

    What is grey throughout stays so: a network may tint it.

    Raises:
        OutOfMemory: a strip does not fit.
    """
    try:
        yield from _strips(rgb, size, networks, check, on_progress, small=small)
    except (MemoryError, RuntimeError) as error:
        if not is_exhaustion(error):
            raise
    else:
        return
    # Not while that is handled: whoever keeps this error would keep that one, and with it what filled the memory.
    raise _too_large(size)


def _strips(
    rgb: Levels,
    size: Size,
    networks: Sequence[Network],
    check: Callable[[], None],
    on_progress: Callable[[float], None],
    *,
    small: bool,
) -> Iterator[Levels]:
    reached = Size(width=rgb.shape[1], height=rgb.shape[0])
    runs = _runs(reached, size, networks)
    progress = _Progress(on_progress, [given.width * given.height for _, given in runs])
    strips: Iterator[Levels] = iter([rgb])
    for index, (network, given) in enumerate(runs):
        rows = Rows(fitted(strips, reached, given), given)
        strips = network.enlarge(rows, check, partial(progress.move, index), small=small)
        reached = Size(width=given.width * network.scale, height=given.height * network.scale)
    if runs and _is_grey(rgb):
        strips = map(_greyed, strips)
    yield from fitted(strips, reached, size)
    on_progress(1.0)


def _is_grey(rgb: Levels) -> bool:
    """Tell whether red, green and blue are the same everywhere; most colours are found out by the first rows."""
    step = max(FITTED_PIXELS // rgb.shape[1], 1)
    parts = (rgb[slice(*span)] for span in spans(len(rgb), step))
    return all(bool((part[:, :, 1:] == part[:, :, :1]).all()) for part in parts)


def _greyed(strip: Levels) -> Levels:
    """Keep the luma alone, which is exactly the level of what is grey already."""
    return np.asarray(Image.fromarray(strip).convert("L").convert("RGB"))


def _runs(size: Size, wanted: Size, networks: Sequence[Network]) -> list[tuple[Network, Size]]:
    """Choose the networks that take a picture to a size, and what each is to be given."""
    chosen: list[Network] = []
    reached = 1
    by_scale = sorted(networks, key=lambda network: network.scale)
    while by_scale and len(chosen) < MAX_RUNS and not _suffices(size, reached, wanted):
        fit = [network for network in by_scale if _suffices(size, reached * network.scale, wanted)]
        chosen.append(fit[0] if fit else by_scale[-1])
        reached *= chosen[-1].scale
        if chosen[-1].scale == 1:
            break
    if not chosen and by_scale and by_scale[-1].scale == 1:
        chosen = by_scale[-1:]
    runs: list[tuple[Network, Size]] = []
    reached_size = size
    for index, network in enumerate(chosen):
        ahead = prod(later.scale for later in chosen[index:])
        sides = zip(size, reached_size, wanted, strict=True)
        given = Size(*(min(now, max(own, ceil(last / ahead))) for own, now, last in sides))
        runs.append((network, given))
        reached_size = Size(width=given.width * network.scale, height=given.height * network.scale)
    return runs


def _suffices(size: Size, scale: int, wanted: Size) -> bool:
    return size.width * scale >= wanted.width and size.height * scale >= wanted.height


def peak_bytes(size: Size, wanted: Size, networks: Sequence[Network], *, small: bool = False) -> int:
    """Tell how much memory `enlarge_strips` takes at most, roughly, beside the picture that it is given."""
    runs = _runs(size, wanted, networks)
    return _FITTED_BYTES + sum(network.peak_bytes(given.width, small=small) for network, given in runs)


def _too_large(size: Size) -> OutOfMemory:
    return OutOfMemory(f"There is not enough memory for {size.width} x {size.height} pixels.")


class _Progress:
    """How far all runs together are; each counts by the pixels that it is given."""

    def __init__(self, on_progress: Callable[[float], None], work: Sequence[int]) -> None:
        self._on_progress = on_progress
        self._work = work
        self._done = [0.0] * len(work)

    def move(self, index: int, fraction: float) -> None:
        """Say what fraction of a run is done."""
        self._done[index] = fraction
        done = sum(work * fraction for work, fraction in zip(self._work, self._done, strict=True))
        self._on_progress(min(done / sum(self._work), 1.0))
