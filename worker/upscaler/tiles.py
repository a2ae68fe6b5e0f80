"""Networks of any architecture, run tile by tile: each has a rim that is thrown away, and fades into its neighbours."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from worker.upscaler.picture import Levels
from worker.upscaler.plan import Size, Span, tiling
from worker.upscaler.strips import Rows

TILE_PIXELS = 256
"""Side of a tile of the input, rounded up to what a network asks for."""

MIN_TILE_PIXELS = 64
"""A smaller picture is continued by its mirror image: some networks mirror it further, and need enough of it."""

CONTEXT_PIXELS = 16
"""The rim: there a network sees the cut, where the picture went on."""

FEATHER_PIXELS = 16
"""Over how many pixels of the input neighbours fade into each other, in the middle of what they have in common."""

_FEATURES = 64
"""Channels that networks of such kinds have between their layers, in most cases."""


class SizeRequirements(Protocol):
    minimum: int
    multiple_of: int
    square: bool


class Model(Protocol):
    """The part of spandrel's ImageModelDescriptor that runs."""

    scale: int
    size_requirements: SizeRequirements

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __call__(self, image: Tensor) -> Tensor: ...


class Tiled:
    """A network that is known only by what it gives."""

    def __init__(self, model: Model, *, mixed: bool = False) -> None:
        """Take a network; `mixed` lets it multiply in bfloat16, and keep what it adds and normalises in float32."""
        self.scale = model.scale
        self.mixed = mixed
        self.dtype = model.dtype
        self._model = model

    def enlarge(
        self, rows: Rows, check: Callable[[], None], on_progress: Callable[[float], None], *, small: bool = False
    ) -> Iterator[Levels]:
        """Enlarge as `superres.Network` says; `check` is called before each tile, `on_progress` after it."""
        width, height = rows.size
        tile = self._tile(rows.size, small=small)
        area = Size(width=max(width, tile.width), height=max(height, tile.height))
        layout = tiling(area, tile, 2 * CONTEXT_PIXELS + FEATHER_PIXELS, feathered=False)
        down, across = _patches(layout.rows), _patches(layout.columns)
        above = None
        for index, row in enumerate(down):

            def advance(fraction: float, done: int = index) -> None:
                on_progress((done + fraction) / len(down))

            window = rows.read(Span(row.tile.start, min(row.tile.stop, height)))
            missing = [(0, len(range(*row.tile)) - len(window)), (0, area.width - width), (0, 0)]
            strip, above = self._row(np.pad(window, missing, "reflect"), row, across, above, check, advance)
            yield strip[: (height - row.kept.start) * self.scale, : width * self.scale]

    def _tile(self, size: Size, *, small: bool) -> Size:
        needs = self._model.size_requirements
        longest = TILE_PIXELS // 2 if small else TILE_PIXELS
        sides = [max(min(length, longest), min(MIN_TILE_PIXELS, longest), needs.minimum) for length in size]
        width, height = (-(-side // needs.multiple_of) * needs.multiple_of for side in sides)
        if needs.square:
            width = height = max(width, height)
        return Size(width=width, height=height)

    @torch.inference_mode()
    def _row(
        self,
        window: Levels,
        row: "_Patch",
        across: list["_Patch"],
        above: Tensor | None,
        check: Callable[[], None],
        on_progress: Callable[[float], None],
    ) -> tuple[Levels, Tensor]:
        """Run a row of tiles; return the levels that are finished, and what fades into the row below.

        `above` is what the row above left to fade.
        """
        scale = self.scale
        ready = (len(range(*row.kept)) - row.fall) * scale
        width = across[-1].kept.stop * scale
        strip = np.empty((ready, width, 3), np.uint8)
        below = torch.empty(3, row.fall * scale, width, device=self._model.device)
        before = None
        for index, column in enumerate(across):
            check()
            tile = self._run(window[:, slice(*column.tile)])[:, row.inside(scale), column.inside(scale)]
            _fade(tile, row, scale)
            _fade(tile.transpose(1, 2), column, scale)
            if before is not None:
                tile[:, :, : column.rise * scale] += before
            end = tile.shape[2] - column.fall * scale
            before, tile = tile[:, :, end:].clone(), tile[:, :, :end]
            place = slice(column.kept.start * scale, column.kept.start * scale + end)
            if above is not None:
                tile[:, : row.rise * scale] += above[:, :, place]
            below[:, :, place] = tile[:, ready:]
            levels = (tile[:, :ready] * 255).round_().to(torch.uint8)
            strip[:, place] = levels.permute(1, 2, 0).cpu().numpy()
            on_progress((index + 1) / len(across))
        return strip, below

    def _run(self, levels: Levels) -> Tensor:
        """Enlarge one tile to (3, height, width) of 0 to 1."""
        planes = torch.tensor(levels, device=self._model.device).permute(2, 0, 1)[None].float() / 255
        with torch.autocast(self._model.device.type, torch.bfloat16, enabled=self.mixed):
            return self._model(planes.to(self._model.dtype))[0].float()

    def peak_bytes(self, width: int, *, small: bool = False) -> int:
        """Guess how much memory a picture of that width takes at most, beside itself: a tile, a strip, what fades."""
        tile = self._tile(Size(width=width, height=width), small=small)
        strip = width * tile.height * 3
        if self._model.device.type == "cuda":  # its memory is its own
            return strip * self.scale**2
        features, fading = tile.width * tile.height * 4 * _FEATURES * 4, width * FEATHER_PIXELS * 3 * 4 * 2
        return (features + strip + fading) * self.scale**2


class _Patch(NamedTuple):
    """A tile along one axis, in pixels of the input."""

    tile: Span
    kept: Span
    """What is left of it without the rims."""
    rise: int
    """Over how many pixels at the beginning of `kept` it fades in."""
    fall: int
    """Over how many at its end it fades out."""

    def inside(self, scale: int) -> slice:
        """Tell where in the enlarged tile the kept part lies."""
        inner = self.kept.within(self.tile)
        return slice(inner.start * scale, inner.stop * scale)


def _patches(cover: tuple[Span, ...]) -> list[_Patch]:
    fades: list[Span] = []
    for before, after in pairwise(cover):
        length = min(FEATHER_PIXELS, before.stop - after.start)
        start = (after.start + before.stop - length) // 2
        fades.append(Span(start, start + length))
    ends = [Span(cover[0].start, cover[0].start), *fades, Span(cover[-1].stop, cover[-1].stop)]
    return [
        _Patch(tile, Span(rise.start, fall.stop), rise.stop - rise.start, fall.stop - fall.start)
        for tile, (rise, fall) in zip(cover, pairwise(ends), strict=True)
    ]


def _fade(planes: Tensor, patch: _Patch, scale: int) -> None:
    """Let planes fade in and out along their second axis, so that what meets there sums to 1."""
    length = planes.shape[1]
    for count, backwards in ((patch.rise * scale, False), (patch.fall * scale, True)):
        ramp = ((torch.arange(count, device=planes.device) + 0.5) / max(count, 1))[:, None]
        part = planes[:, length - count :] if backwards else planes[:, :count]
        part *= ramp.flip(0) if backwards else ramp
