"""Sizes of a job and where its tiles lie: pure arithmetic."""

from decimal import ROUND_HALF_UP, Decimal
from typing import NamedTuple

from core.errors import OutputTooLarge
from core.options import OutputFormat, UpscaleOptions


class Size(NamedTuple):
    """Width and height in pixels; build it by keyword."""

    width: int
    height: int


class Span(NamedTuple):
    """A run of pixels along one axis; `stop` lies just outside it. A tile is one span across and one down."""

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
    factor = Decimal(repr(float(scale_factor)))
    return Size(width=_scaled(width, factor), height=_scaled(height, factor))


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
