"""The engine that needs no model: Lanczos resampling in linear light, tile by tile."""

import math
from collections.abc import Callable
from itertools import product
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from core.errors import OutOfMemory, Stopped
from core.options import UpscaleOptions
from worker.upscaler.engine import Picture
from worker.upscaler.images import to_fractions, to_levels, to_linear
from worker.upscaler.plan import Size, Span, output_size, spans

Planes: TypeAlias = npt.NDArray[np.float32]
"""(channels, height, width) in linear light, 0 to 1: red, green, blue, and maybe alpha, multiplied into them."""

Positions: TypeAlias = npt.NDArray[np.float64]
"""Places along one axis, in pixels of the input: 0 is the middle of the first."""

Indices: TypeAlias = npt.NDArray[np.intp]

TILE_PIXELS = 256
"""Side of an output tile; its planes fit a processor's cache. Small tiles have half of it."""

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


class Lanczos:
    """Resample with the three-lobed Lanczos kernel; where tiles are cut does not show in the output."""

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
        canvas = output_size(picture.width, picture.height, options.scale_factor)
        if canvas == (picture.width, picture.height) and not options.sharpen:
            on_progress(1.0)
            return picture
        tile = TILE_PIXELS // 2 if options.small_tiles else TILE_PIXELS
        sigma = _BLUR_PER_SCALE * options.scale_factor if options.sharpen else 0
        try:
            output = _blank(canvas, with_alpha=picture.alpha is not None)
            rows = [_strip(span, picture.height, canvas.height, sigma) for span in spans(canvas.height, tile)]
            columns = [_strip(span, picture.width, canvas.width, sigma) for span in spans(canvas.width, tile)]
            for done, (row, column) in enumerate(product(rows, columns), start=1):
                if should_stop():
                    raise Stopped("The upscaling was told to stop.")
                planes = _resampled(picture, row, column)
                if options.sharpen:
                    planes = _sharpened(planes, row, column, options.sharpen / 10)
                _put(planes, output, row.tile, column.tile)
                on_progress(done / (len(rows) * len(columns)))
        except MemoryError as error:
            raise OutOfMemory(f"There is not enough memory for {canvas.width} x {canvas.height} pixels.") from error
        return output


class _Band(NamedTuple):
    """A run of outputs along one axis, and the matrix that makes them of a run of inputs."""

    outputs: slice
    inputs: slice
    weights: Planes
    """(outputs, inputs)."""


class _Strip(NamedTuple):
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


def _strip(tile: Span, length: int, output_length: int, sigma: float) -> _Strip:
    """Plan one axis of a tile; `sigma` is that of the blur in pixels of the output, 0 for none."""
    blur = _gaussian(sigma)
    field = tile.grown(blur.radius, output_length)
    centres = (np.arange(*field, dtype=np.float64) + 0.5) * (length / output_length) - 0.5
    window = Span(max(math.floor(centres[0]) - 2, 0), min(math.floor(centres[-1]) + 4, length))
    return _Strip(
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


def _resampled(picture: Picture, row: _Strip, column: _Strip) -> Planes:
    """Resample one tile with its margin.

    Lanczos overshoots at edges, and in linear light the dark side of an edge would become a black line. What leaves
    the range of the four input pixels around it is therefore brought back most of the way, not just cut at 0 and 1.
    """
    source = _source(picture, row.window, column.window)
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


def _source(picture: Picture, row: Span, column: Span) -> Planes:
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


def _sharpened(planes: Planes, row: _Strip, column: _Strip, amount: float) -> Planes:
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


def _put(planes: Planes, output: Picture, row: Span, column: Span) -> None:
    """Bring a tile back from linear light and put it where it belongs."""
    colours, tile = planes[:3], (slice(*row), slice(*column))
    if output.alpha is not None:
        output.alpha[tile] = np.rint(planes[3] * 255)
        # Under half a level of alpha nobody sees the colour; the floor only keeps the quotient finite.
        colours = colours / np.maximum(planes[3], 0.5 / 255)
    # One channel at a time is three times as fast as one transposed copy.
    for channel, levels in enumerate(to_levels(colours)):
        output.rgb[*tile, channel] = levels
