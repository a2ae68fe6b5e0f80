"""Sizes of a job and where its tiles lie."""

from decimal import Decimal
from math import floor

import pytest

from core.errors import OutputTooLarge
from core.options import OutputFormat, UpscaleOptions
from worker.upscaler.plan import Size, Span, check_output, check_sides, output_size, spans


@pytest.mark.parametrize(
    ("width", "height", "factor", "size"),
    [
        (1, 1, 1.0, (1, 1)),
        (1, 1, 1.4, (1, 1)),
        (1, 1, 1.5, (2, 2)),
        (3, 5, 1.5, (5, 8)),
        (5, 7, 2.5, (13, 18)),
        (1, 4096, 8.0, (8, 32768)),
        (281, 100, 7.3, (2051, 730)),
    ],
)
def test_each_side_is_multiplied_and_halves_are_rounded_up(
    width: int, height: int, factor: float, size: tuple[int, int]
) -> None:
    assert output_size(width, height, factor) == size


def test_the_factor_counts_as_the_decimal_it_is_written_as() -> None:
    assert 50 * 1.13 < 56.5
    assert output_size(50, 10, 1.13) == (57, 11)


def test_sizes_are_exact_for_every_factor_of_two_decimals() -> None:
    for hundredths in range(100, 801):
        for side in (1, 7, 333, 4096, 65_535):
            exact = floor(Decimal(side * hundredths) / 100 + Decimal("0.5"))
            assert output_size(side, 1, hundredths / 100).width == exact


def test_an_output_at_the_pixel_limit_passes_and_one_above_is_refused_with_the_numbers() -> None:
    options = UpscaleOptions(scale_factor=2)
    check_output(50, 40, options, max_output_pixels=8000)
    with pytest.raises(OutputTooLarge, match=r"100 x 80 = 8000 pixels; the limit is 7999\.$"):
        check_output(50, 40, options, max_output_pixels=7999)


@pytest.mark.parametrize("output_format", OutputFormat)
def test_an_output_longer_than_its_format_allows_is_refused_with_the_numbers(output_format: OutputFormat) -> None:
    limit = output_format.max_side_pixels
    check_sides(Size(width=limit, height=1), output_format)
    with pytest.raises(OutputTooLarge, match=rf"1 x {limit + 1} pixels.* {output_format.value} file .* {limit} "):
        check_sides(Size(width=1, height=limit + 1), output_format)


def test_the_format_limits_the_output_and_not_the_input() -> None:
    options = UpscaleOptions(scale_factor=4, output_format=OutputFormat.WEBP)
    check_output(4095, 1, options, max_output_pixels=10**9)
    with pytest.raises(OutputTooLarge, match="webp"):
        check_output(4096, 1, options, max_output_pixels=10**9)


@pytest.mark.parametrize("length", [1, 9, 10, 11, 20, 25])
def test_spans_cover_an_axis_once_and_none_is_too_long(length: int) -> None:
    cut = spans(length, 10)
    assert [pixel for span in cut for pixel in range(*span)] == list(range(length))
    assert all(0 < stop - start <= 10 for start, stop in cut)


def test_a_span_grows_as_far_as_its_axis_and_is_found_in_what_it_became() -> None:
    grown = Span(3, 8).grown(4, 10)
    assert grown == (0, 10)
    assert list(range(*grown))[Span(3, 8).within(grown)] == [3, 4, 5, 6, 7]
