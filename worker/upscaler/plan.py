"""Sizes of a job, its passes, and where its tiles lie: pure arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from itertools import pairwise
from math import ceil
from typing import NamedTuple

from core.errors import OutputTooLarge
from core.options import MAX_SEED, ColourFix, OutputFormat, UpscaleOptions

CELL_PIXELS = 8
"""Side of the square of pixels that one position of the latents stands for."""

MIN_CANVAS_PIXELS = 64
"""Shortest side that diffusion works on: the network halves the latents three times."""

_MAX_BATCH = 8

_MEMORY_SHARE = 0.8
"""How much of the free memory a batch may take."""

_WORTH_A_PASS = 1.01
"""What a further pass must enlarge by; for less, the pass before it goes as much beyond 2×."""


class Size(NamedTuple):
    """Width and height, in pixels unless said otherwise; build it by keyword."""

    width: int
    height: int


class Span(NamedTuple):
    """A run of pixels or cells along one axis; `stop` lies just outside it. A tile is one span across and one down."""

    start: int
    stop: int

    def grown(self, margin: int, length: int) -> "Span":
        """Add `margin` pixels at both ends, as far as an axis of `length` pixels reaches."""
        return Span(max(self.start - margin, 0), min(self.stop + margin, length))

    def within(self, outer: "Span") -> slice:
        """Tell where this span lies in an array that holds `outer`."""
        return slice(self.start - outer.start, self.stop - outer.start)


def output_size(width: int, height: int, scale_factor: float) -> Size:
    """Multiply both sides by `scale_factor`, rounding halves up; no side is less than 1.

    The factor counts as the decimal it is written as: 50 pixels times 1.13 are 56.5, hence 57, although in binary the
    product is a little less.
    """
    factor = _decimal(scale_factor)
    return Size(width=_scaled(width, factor), height=_scaled(height, factor))


def _decimal(number: float) -> Decimal:
    """Take a number as it is written, not as it is in binary."""
    return Decimal(repr(float(number)))


def _scaled(side: int, factor: Decimal) -> int:
    return max(1, int((side * factor).to_integral_value(ROUND_HALF_UP)))


def check_output(width: int, height: int, options: UpscaleOptions, max_output_pixels: int) -> None:
    """Refuse an input of `width` by `height` whose output would be too large.

    Raises:
        OutputTooLarge: the output passes `max_output_pixels` or the longest side that its file format can hold.
    """
    size = output_size(width, height, options.scale_factor)
    pixels = size.width * size.height
    if pixels > max_output_pixels:
        raise OutputTooLarge(
            f"The output would be {size.width} x {size.height} = {pixels} pixels; the limit is {max_output_pixels}."
        )
    check_sides(size, options.output_format)


def check_memory(size: Size, needed: int, max_bytes: int) -> None:
    """Refuse an output of that size when making it would take more memory than there is.

    Raises:
        OutputTooLarge: `needed` is more than `max_bytes`.
    """
    if needed > max_bytes:
        raise OutputTooLarge(
            f"The output would be {size.width} x {size.height} pixels and take about {needed >> 20} MiB of memory; the "
            f"limit is {max_bytes >> 20}."
        )


def check_sides(size: Size, output_format: OutputFormat) -> None:
    """Refuse an output that its file format has no numbers for.

    Raises:
        OutputTooLarge: a side passes `output_format.max_side_pixels`.
    """
    limit = output_format.max_side_pixels
    if max(size) > limit:
        raise OutputTooLarge(
            f"The output would be {size.width} x {size.height} pixels; a {output_format.value} file holds at most "
            f"{limit} on a side."
        )


def spans(length: int, longest: int) -> list[Span]:
    """Cut an axis of `length` pixels into spans of `longest`, the last one shorter if need be."""
    return [Span(start, min(start + longest, length)) for start in range(0, length, longest)]


class Pass(NamedTuple):
    """One round of enlarging and diffusion."""

    size: Size
    """What the pass must give, exactly."""

    canvas: Size
    """What diffusion works on: `size` padded to whole cells and to `MIN_CANVAS_PIXELS`."""

    strength: float
    """0 where nothing is to be invented."""

    seed: int

    @property
    def cells(self) -> Size:
        """The canvas in cells."""
        return Size(width=self.canvas.width // CELL_PIXELS, height=self.canvas.height // CELL_PIXELS)


def passes(width: int, height: int, options: UpscaleOptions) -> list[Pass]:
    """Divide the way from `width` by `height` to the output into passes: 2×, 2×, … and what remains.

    There is at least one, and the last gives exactly the `output_size`. Each further one has `pass_decay` times the
    strength of the one before, at most 1, and the next seed, 0 after `MAX_SEED`.
    """
    strength, decay = _decimal(options.strength), _decimal(options.pass_decay)
    planned: list[Pass] = []
    for index, size in enumerate(_pass_sizes(Size(width=width, height=height), options.scale_factor)):
        canvas = Size(width=_padded(size.width), height=_padded(size.height))
        planned.append(Pass(size, canvas, float(strength), (options.seed + index) % (MAX_SEED + 1)))
        strength = min(strength * decay, Decimal(1))
    return planned


def _pass_sizes(size: Size, scale_factor: float) -> list[Size]:
    last = output_size(*size, scale_factor)
    sizes: list[Size] = []
    doubled = Size(width=2 * size.width, height=2 * size.height)
    while max(last) > _WORTH_A_PASS * max(doubled):
        sizes.append(doubled)
        doubled = Size(width=2 * doubled.width, height=2 * doubled.height)
    return [*sizes, last]


def _padded(side: int) -> int:
    return max(ceil(side / CELL_PIXELS) * CELL_PIXELS, MIN_CANVAS_PIXELS)


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tiles of one size that cover an area, and how much each counts where several meet.

    The unit is that of the area. The weight of a tile at (y, x) is the row's at y times the column's at x; over all
    tiles these sum to 1 at every position, and none is 0.
    """

    columns: tuple[Span, ...]
    rows: tuple[Span, ...]

    column_weights: tuple[tuple[float, ...], ...]
    """One tuple per column, as long as the column."""
    row_weights: tuple[tuple[float, ...], ...]

    @property
    def tile(self) -> Size:
        column, row = self.columns[0], self.rows[0]
        return Size(width=column.stop - column.start, height=row.stop - row.start)

    @property
    def count(self) -> int:
        return len(self.columns) * len(self.rows)


def tiling(area: Size, tile: Size, overlap: int, *, feathered: bool) -> Tiling:
    """Cover `area` with as few tiles as give neighbours at least `overlap` positions in common.

    On each axis the tile is cut to the area, and the overlap to half the tile: more would multiply the tiles. The
    tiles lie evenly, so neighbours mostly have more in common than they must. Feathered weights rise linearly over all
    of it; else all tiles over a position count the same.
    """
    columns, rows = _cover(area.width, tile.width, overlap), _cover(area.height, tile.height, overlap)
    return Tiling(columns, rows, _weights(columns, feathered=feathered), _weights(rows, feathered=feathered))


def _cover(length: int, longest: int, overlap: int) -> tuple[Span, ...]:
    tile = min(longest, length)
    overlap = min(overlap, tile // 2)
    gaps = ceil((length - overlap) / (tile - overlap)) - 1
    slack = length - tile
    # Each start is the whole position nearest to its even place; the second half mirrors the first, for rounding
    # alone would not be symmetric.
    half = [(2 * index * slack + gaps) // (2 * gaps) if gaps else 0 for index in range(gaps // 2 + 1)]
    starts = half + [slack - start for start in reversed(half[: (gaps + 1) // 2])]
    return tuple(Span(start, start + tile) for start in starts)


def _weights(cover: tuple[Span, ...], *, feathered: bool) -> tuple[tuple[float, ...], ...]:
    shared = [0, *(before.stop - after.start for before, after in pairwise(cover)), 0]
    tile = cover[0].stop
    profiles = [_ramps(tile, *ends) if feathered else [1.0] * tile for ends in pairwise(shared)]
    totals = [0.0] * cover[-1].stop
    for span, profile in zip(cover, profiles, strict=True):
        for position, weight in zip(range(*span), profile, strict=True):
            totals[position] += weight
    return tuple(
        tuple(weight / total for weight, total in zip(profile, totals[slice(*span)], strict=True))
        for span, profile in zip(cover, profiles, strict=True)
    )


def _ramps(tile: int, rise: int, fall: int) -> list[float]:
    """Rise over the first positions and fall over the last, in steps of which none is 0 and none is 1.

    So two ramps that meet sum to 1 at each position. Where the rise and the fall meet, the lower one counts.
    """
    rising = [(index + 0.5) / rise for index in range(rise)] + [1.0] * (tile - rise)
    falling = [1.0] * (tile - fall) + [(index + 0.5) / fall for index in reversed(range(fall))]
    return [min(pair) for pair in zip(rising, falling, strict=True)]


def fitting_batch(free_bytes: float, tile_bytes: float) -> int:
    """Tell how many tiles may go through the networks together, by what one takes; by 8 a device is full."""
    return min(max(int(_MEMORY_SHARE * free_bytes / tile_bytes), 1), _MAX_BATCH)


def balanced_batch(count: int, most: int) -> int:
    """Return how many of `count` tiles go into a batch, in as few batches of at most `most` as hold them, all alike."""
    return ceil(count / ceil(count / most))


class Preset(NamedTuple):
    """What the caller does not choose and decides how tiles meet and which colours they take."""

    overlap_cells: int
    """What neighbouring tiles have in common at least, in cells."""
    feathered: bool
    colour_fix: ColourFix
    """Where the caller leaves it to the deployment."""


PRESETS: Mapping[str, Preset] = {
    "compat": Preset(overlap_cells=4, feathered=False, colour_fix=ColourFix.OFF),
    "quality": Preset(overlap_cells=16, feathered=True, colour_fix=ColourFix.WAVELET),
}
"""By name: "compat" has the original's numbers, "quality" leaves no seams in large pictures."""
