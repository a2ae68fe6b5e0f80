"""Lanczos resampling in linear light to an exact size, tile by tile in strips, and sharpening."""

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from core.errors import OutOfMemory
from worker.upscaler.light import to_fractions, to_levels, to_linear
from worker.upscaler.picture import Levels, Picture, join
from worker.upscaler.plan import Size, Span, spans

Planes: TypeAlias = npt.NDArray[np.float32]
"""(channels, height, width), 0 to 1: red, green and blue in linear light, and maybe alpha, multiplied into them; or
alpha alone."""

Positions: TypeAlias = npt.NDArray[np.float64]
"""Places along one axis, in pixels of the input: 0 is the middle of the first."""

Indices: TypeAlias = npt.NDArray[np.intp]

TILE_PIXELS = 256
"""Side of an output tile; its planes fit a processor's cache. Small tiles have half of it."""

_TILE_BYTES = 160
"""What one pixel of a tile takes at most, measured: all its planes, and its margins."""

_BAND_PIXELS = 16
"""Outputs per matrix: wide enough to be quick, so narrow that BLAS keeps to the calling thread."""

_RINGING_KEPT = 0.1
"""Share of the overshoot that stays. Halved and restored, text comes closest at 0, a photograph at 0.25 by a hair."""

_BLUR_PER_SCALE = 0.7
"""Sigma of the blur that sharpening compares with, in pixels of the input."""

_DARK = np.float32(1 / 512)
"""Luminance under which sharpening fades out: it would find mostly noise there."""

_LUMINANCE = np.array([0.2126, 0.7152, 0.0722], np.float32)
"""Shares of red, green and blue (ITU-R BT.709)."""


def resample(picture: Picture, size: Size, check: Callable[[], None]) -> Picture:
    """Do as `resample_strips` does, and return the strips as one picture."""
    return join(resample_strips(picture, size, check))


def resample_alpha(alpha: Levels, size: Size, check: Callable[[], None]) -> Levels:
    """Do as `resample_alpha_strips` does, and return the strips as one plane."""
    with _bounded(size):
        return np.concatenate(list(resample_alpha_strips(alpha, size, check)))


def resample_strips(
    picture: Picture,
    size: Size,
    check: Callable[[], None],
    *,
    on_progress: Callable[[float], None] = lambda _: None,
    sharpen: float = 0,
    small_tiles: bool = False,
) -> Iterator[Picture]:
    """Enlarge to exactly `size`, no side of which is less than the picture's; give it row of tiles by row of tiles.

    Where tiles are cut does not show. Takes memory for a strip and one tile. A picture that keeps its size unsharpened
    is given as it is. `sharpen` is 0 to 10 as in the options. `check` is called before each tile, `on_progress` hears
    after each what fraction is done.

    Raises:
        OutOfMemory: a strip does not fit.
    """
    if size == (picture.width, picture.height) and not sharpen:
        on_progress(1.0)
        yield picture
        return
    blur = _BLUR_PER_SCALE if sharpen else 0
    area, side = Size(width=picture.width, height=picture.height), _tile_pixels(small=small_tiles)
    with _bounded(size):
        columns = [_axis(span, area.width, size.width, blur) for span in spans(size.width, side)]
        done, rows = 0, spans(size.height, side)
        for span in rows:
            row = _axis(span, area.height, size.height, blur)
            output = _blank(Size(width=size.width, height=len(range(*span))), with_alpha=picture.alpha is not None)
            for column in columns:
                check()
                planes = _resampled(_light(picture, row.window, column.window), row, column)
                if sharpen:
                    planes = _sharpened(planes, row, column, sharpen / 10)
                _put(planes, output, column.tile)
                done += 1
                on_progress(done / (len(rows) * len(columns)))
            yield output


def resample_alpha_strips(alpha: Levels, size: Size, check: Callable[[], None]) -> Iterator[Levels]:
    """Enlarge a (height, width) plane of alpha as `resample_strips` does that of a picture, in the same strips.

    Raises:
        OutOfMemory: a strip does not fit.
    """
    height, width = alpha.shape
    side = _tile_pixels(small=False)
    with _bounded(size):
        columns = [_axis(span, width, size.width, 0) for span in spans(size.width, side)]
        for span in spans(size.height, side):
            row = _axis(span, height, size.height, 0)
            output = np.empty((len(range(*span)), size.width), np.uint8)
            for column in columns:
                check()
                source = to_fractions(alpha[None, slice(*row.window), slice(*column.window)])
                output[:, slice(*column.tile)] = np.rint(_resampled(source, row, column)[0] * 255)
            yield output


def peak_bytes(size: Size, *, alpha: bool) -> int:
    """Tell how much memory `resample_strips` takes at most for that output, roughly: a tile, and three strips.

    Two of them are those that it has given, and that have not been used up.
    """
    strip, tile = (width * min(size.height, TILE_PIXELS) for width in (size.width, min(size.width, TILE_PIXELS)))
    return 3 * strip * (4 if alpha else 3) + tile * _TILE_BYTES


def _tile_pixels(*, small: bool) -> int:
    return TILE_PIXELS // 2 if small else TILE_PIXELS


@contextmanager
def _bounded(size: Size) -> Generator[None]:
    try:
        yield
    except MemoryError as error:
        raise OutOfMemory(f"There is not enough memory for {size.width} x {size.height} pixels.") from error


class _Band(NamedTuple):
    """A run of outputs along one axis, and the matrix that makes them of a run of inputs."""

    outputs: slice
    inputs: slice
    weights: Planes
    """(outputs, inputs)."""


class _Axis(NamedTuple):
    """One axis of a tile: all that is known about it before the first pixel is read."""

    tile: Span
    field: Span
    """The tile and the margin that its blur looks at, in pixels of the output."""
    window: Span
    """What resampling the field reads, in pixels of the input."""
    before: Indices
    """For each output of the field the last input at or before its middle, counted from the window's start."""
    resample: list[_Band]
    blur: list[_Band]


def _axis(tile: Span, length: int, output_length: int, blur_per_scale: float) -> _Axis:
    """Plan one axis of a tile; `blur_per_scale` is the blur's sigma in pixels of the input, 0 for none."""
    sigma = blur_per_scale * output_length / length
    blur = _gaussian(sigma)
    field = tile.grown(blur.radius, output_length)
    centres = (np.arange(*field, dtype=np.float64) + 0.5) * (length / output_length) - 0.5
    window = Span(max(math.floor(centres[0]) - 2, 0), min(math.floor(centres[-1]) + 4, length))
    return _Axis(
        tile,
        field,
        window,
        before=np.clip(np.floor(centres).astype(np.intp), *window) - window.start,
        resample=_bands(centres, window, _lanczos()),
        blur=_bands(np.arange(*tile, dtype=np.float64), field, blur) if sigma else [],
    )


class _Kernel(NamedTuple):
    radius: int
    weigh: Callable[[Positions], Positions]
    """From distances to weights, 0 beyond the radius."""


def _lanczos() -> _Kernel:
    def weigh(distance: Positions) -> Positions:
        return np.where(abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)

    return _Kernel(3, weigh)


def _gaussian(sigma: float) -> _Kernel:
    radius = math.ceil(3 * sigma)

    def weigh(distance: Positions) -> Positions:
        return np.where(abs(distance) <= radius, np.exp(-0.5 * (distance / sigma) ** 2), 0)

    return _Kernel(radius, weigh)


def _bands(centres: Positions, window: Span, kernel: _Kernel) -> list[_Band]:
    """Weigh the inputs in `window` around each centre; beyond the picture its edge pixels go on."""
    return [
        _band(Span(first, min(first + _BAND_PIXELS, len(centres))), centres, window, kernel)
        for first in range(0, len(centres), _BAND_PIXELS)
    ]


def _band(outputs: Span, centres: Positions, window: Span, kernel: _Kernel) -> _Band:
    middles = centres[slice(*outputs), None]
    reach = np.floor(middles).astype(np.intp) + np.arange(-kernel.radius, kernel.radius + 2)
    weights = kernel.weigh(reach - middles)
    weights /= weights.sum(axis=1, keepdims=True)
    # The window ends where the picture ends, or else where all weights are 0.
    inputs = np.clip(reach, window.start, window.stop - 1) - window.start
    first, stop = int(inputs.min()), int(inputs.max()) + 1
    matrix = np.zeros((len(middles), stop - first), np.float32)
    np.add.at(matrix, (np.arange(len(middles))[:, None], inputs - first), weights.astype(np.float32))
    return _Band(slice(*outputs), slice(first, stop), matrix)


def _resampled(source: Planes, row: _Axis, column: _Axis) -> Planes:
    """Resample one tile with its margin from the windows of its row and column.

    Lanczos overshoots at edges, and in linear light the dark side of an edge would become a black line. What leaves
    the range of the four input pixels around it is therefore brought back most of the way, not just cut at 0 and 1.
    """
    planes = _transformed(source, row.resample, column.resample)
    low = _extreme_around(source, row.before, column.before, np.minimum)
    high = _extreme_around(source, row.before, column.before, np.maximum)
    # np.clip takes four times as long when its bounds are arrays.
    limited = np.minimum(np.maximum(planes, low), high)
    planes -= limited
    planes *= _RINGING_KEPT
    planes += limited
    np.clip(planes, 0, 1, out=planes)
    if len(planes) == 4:
        # Colour and alpha ring apart; no pixel may shine more than it covers.
        np.minimum(planes[:3], planes[3], out=planes[:3])
    return planes


def _light(picture: Picture, row: Span, column: Span) -> Planes:
    """Cut a window out of the picture and bring it into linear light."""
    window = slice(*row), slice(*column)
    colours = to_linear(picture.rgb[window].transpose(2, 0, 1))
    if picture.alpha is None:
        return colours
    alpha = to_fractions(picture.alpha[None, *window])
    return np.concatenate([colours * alpha, alpha])


def _transformed(planes: Planes, down: list[_Band], across: list[_Band]) -> Planes:
    """Apply the matrices across, then those down."""
    channels, height, _ = planes.shape
    wide = np.empty((channels, height, across[-1].outputs.stop), np.float32)
    for band in across:
        np.matmul(planes[:, :, band.inputs], band.weights.T, out=wide[:, :, band.outputs])
    result = np.empty((channels, down[-1].outputs.stop, wide.shape[2]), np.float32)
    for band in down:
        np.matmul(band.weights, wide[:, band.inputs], out=result[:, band.outputs])
    return result


def _extreme_around(source: Planes, down: Indices, across: Indices, extreme: np.ufunc) -> Planes:
    """Take the extreme of the two by two inputs that begin at each place down and across."""
    pairs = extreme(source[:, :, :-1], source[:, :, 1:]) if source.shape[2] > 1 else source
    wide = pairs[:, :, np.minimum(across, pairs.shape[2] - 1)]
    pairs = extreme(wide[:, :-1], wide[:, 1:]) if wide.shape[1] > 1 else wide
    return pairs.take(np.minimum(down, pairs.shape[1] - 1), axis=1)


def _sharpened(planes: Planes, row: _Axis, column: _Axis, amount: float) -> Planes:
    """Sharpen a tile by an unsharp mask on ratios of luminance, and drop its margin.

    With Y the luminance of a pixel, B its Gaussian blur and k = sharpen / 10, the colours are multiplied by
    ((1 + k)Y + (1 - k)B) / ((1 - k)Y + (1 + k)B): by 1 at k = 0, by Y / B at k = 1, and by the inverse where Y and B
    change places. So both sides of an edge gain alike and nothing turns negative. Hue stays, for the gain ends where
    the brightest of the three is full. Y and B are of the visible part of half transparent pixels.
    """
    light = np.tensordot(_LUMINANCE, planes[:3], axes=1)
    blurred = _transformed(np.stack([light, *planes[3:]]), row.blur, column.blur)
    inner = row.tile.within(row.field), column.tile.within(column.field)
    planes, own, around, floor, full = planes[:, *inner], light[inner], blurred[0], _DARK, np.float32(1)
    if len(planes) == 4:
        # Each is multiplied by the other's alpha: that compares the visible parts without a division.
        full = planes[3]
        own, around, floor = own * blurred[1], around * full, _DARK * full * blurred[1] + np.float32(1e-12)
    more, less = np.float32(1 + amount), np.float32(1 - amount)
    gain = (more * own + less * around + floor) / (less * own + more * around + floor)
    planes[:3] *= np.minimum(gain, full / np.maximum(planes[:3].max(axis=0), 1e-6))
    return planes


def _blank(canvas: Size, *, with_alpha: bool) -> Picture:
    rgb = np.empty((canvas.height, canvas.width, 3), np.uint8)
    return Picture(rgb, np.empty((canvas.height, canvas.width), np.uint8) if with_alpha else None)


def _put(planes: Planes, output: Picture, column: Span) -> None:
    """Bring a tile back from linear light and put it where it belongs in its strip."""
    colours, across = planes[:3], slice(*column)
    if output.alpha is not None:
        output.alpha[:, across] = np.rint(planes[3] * 255)
        # Under half a level of alpha nobody sees the colour; the floor only keeps the quotient finite.
        colours = colours / np.maximum(planes[3], 0.5 / 255)
    # One channel at a time is three times as fast as one transposed copy.
    for channel, levels in enumerate(to_levels(colours)):
        output.rgb[:, across, channel] = levels
