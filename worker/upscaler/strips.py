"""Pictures as strips of rows that come from above, so that none need be in memory as a whole."""

from collections.abc import Iterable, Iterator
from math import ceil, floor

import numpy as np
from PIL import Image

from worker.upscaler.picture import Levels
from worker.upscaler.plan import Size, Span, spans

FITTED_PIXELS = 1 << 20
"""How many pixels are resampled at once."""

_REACH = 3
"""How far Lanczos looks, in pixels of whichever is coarser, the input or the output."""


class Rows:
    """The rows of a picture that arrives in strips; what lies above the last rows read is forgotten."""

    def __init__(self, strips: Iterable[Levels], size: Size) -> None:
        self.size = size
        self._strips = iter(strips)
        self._held: Levels | None = None
        self._top = 0

    def read(self, span: Span) -> Levels:
        """Return the rows of `span`, one at least, which begins nowhere above the one before."""
        held = next(self._strips) if self._held is None else self._held
        while self._top + len(held) <= span.start:
            self._top += len(held)
            held = next(self._strips)
        held = held[span.start - self._top :]
        self._top = span.start
        parts, count = [held], len(held)
        while count < span.stop - span.start:
            parts.append(next(self._strips))
            count += len(parts[-1])
        self._held = np.concatenate(parts) if len(parts) > 1 else held
        return self._held[: span.stop - span.start]


def fitted(strips: Iterator[Levels], size: Size, wanted: Size) -> Iterator[Levels]:
    """Bring a picture of `size` to another by Pillow's Lanczos, across and then down.

    Where strips begin does not show: each pixel is what it would be in the whole, but for rare roundings by one level.
    """
    if size.width != wanted.width:
        strips = (_resized(strip, Size(width=wanted.width, height=len(strip))) for strip in strips)
    if size.height == wanted.height:
        return strips
    return _fitted_down(Rows(strips, Size(width=wanted.width, height=size.height)), wanted.height)


def _fitted_down(rows: Rows, height: int) -> Iterator[Levels]:
    ratio = rows.size.height / height
    reach = _REACH * max(ratio, 1.0) + 1
    for span in spans(height, max(FITTED_PIXELS // rows.size.width, 1)):
        top, bottom = span.start * ratio, min(span.stop * ratio, rows.size.height)
        window = Span(max(floor(top - reach), 0), min(ceil(bottom + reach), rows.size.height))
        size = Size(width=rows.size.width, height=span.stop - span.start)
        yield _resized(rows.read(window), size, (top - window.start, bottom - window.start))


def _resized(rgb: Levels, size: Size, between: tuple[float, float] | None = None) -> Levels:
    """Resample what lies `between` two places down, or all."""
    height, width = rgb.shape[:2]
    top, bottom = between or (0, height)
    return np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.LANCZOS, (0, top, width, bottom)))
