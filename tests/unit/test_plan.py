"""Sizes of a job, its passes and its batches."""

from decimal import Decimal
from math import floor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import OutputTooLarge
from core.options import MAX_SEED, ColourFix, OutputFormat, UpscaleOptions
from worker.upscaler.plan import (
    CELL_PIXELS,
    MIN_CANVAS_PIXELS,
    PRESETS,
    Size,
    Span,
    balanced_batch,
    check_memory,
    check_output,
    check_sides,
    output_size,
    passes,
    spans,
)


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


def test_an_output_that_memory_cannot_hold_is_refused_before_it_is_made() -> None:
    check_memory(Size(width=2000, height=1000), 64 << 20, 64 << 20)
    with pytest.raises(OutputTooLarge, match=r"2000 x 1000 pixels and take about 65 MiB of memory; the limit is 64\.$"):
        check_memory(Size(width=2000, height=1000), 65 << 20, 64 << 20)


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


@pytest.mark.parametrize(
    ("factor", "widths"),
    [
        (1, [1000]),
        (1.5, [1500]),
        (2, [2000]),
        (2.1, [2000, 2100]),
        (3, [2000, 3000]),
        (4, [2000, 4000]),
        (5, [2000, 4000, 5000]),
        (7.3, [2000, 4000, 7300]),
        (8, [2000, 4000, 8000]),
    ],
)
def test_a_factor_is_reached_by_doubling_and_one_pass_for_what_remains(factor: float, widths: list[int]) -> None:
    assert [planned.size.width for planned in passes(1000, 10, UpscaleOptions(scale_factor=factor))] == widths


@pytest.mark.parametrize(
    ("width", "factor", "widths"),
    [
        (1000, 2.0000001, [2000]),
        (1000, 4 * 1.0000000001, [2000, 4000]),
        (511, 1024 / 511, [1024]),
        (1000, 4.04, [2000, 4040]),
        (1000, 4.041, [2000, 4000, 4041]),
        (1, 2.4, [2]),
    ],
)
def test_no_pass_is_made_for_a_remainder_that_enlarges_by_a_hundredth_or_less(
    width: int, factor: float, widths: list[int]
) -> None:
    assert [planned.size.width for planned in passes(width, 1, UpscaleOptions(scale_factor=factor))] == widths


@settings(max_examples=100, deadline=None)
@given(width=st.integers(1, 5000), height=st.integers(1, 5000), factor=st.floats(1, 8))
def test_passes_never_more_than_double_beyond_a_hundredth_and_end_at_the_output(
    width: int, height: int, factor: float
) -> None:
    planned = passes(width, height, UpscaleOptions(scale_factor=factor))
    assert planned[-1].size == output_size(width, height, factor)
    before = Size(width=width, height=height)
    for each in planned[:-1]:
        assert each.size == (2 * before.width, 2 * before.height)
        before = each.size
    assert max(planned[-1].size) <= 2.02 * max(before)
    assert len(planned) == 1 or max(planned[-1].size) > 1.01 * max(before)


@settings(max_examples=100, deadline=None)
@given(width=st.integers(1, 5000), height=st.integers(1, 5000), factor=st.floats(1, 8))
def test_a_canvas_holds_its_pass_in_whole_cells_and_no_more_than_it_must(
    width: int, height: int, factor: float
) -> None:
    for planned in passes(width, height, UpscaleOptions(scale_factor=factor)):
        assert planned.cells == (planned.canvas.width / CELL_PIXELS, planned.canvas.height / CELL_PIXELS)
        for side, padded in zip(planned.size, planned.canvas, strict=True):
            assert padded % CELL_PIXELS == 0
            assert side <= padded
            assert padded == MIN_CANVAS_PIXELS or MIN_CANVAS_PIXELS < padded < side + CELL_PIXELS


def test_a_canvas_is_at_least_what_the_network_can_halve_three_times() -> None:
    [single] = passes(1, 65, UpscaleOptions(scale_factor=1))
    assert (single.size, single.canvas, single.cells) == ((1, 65), (64, 72), (8, 9))


def test_each_further_pass_is_weaker_and_has_the_next_seed() -> None:
    planned = passes(10, 10, UpscaleOptions(scale_factor=8, strength=0.35, pass_decay=0.8, seed=1337))
    assert [each.strength for each in planned] == [0.35, 0.28, 0.224]
    assert [each.seed for each in planned] == [1337, 1338, 1339]


def test_strengths_that_grow_stop_at_one_and_a_decay_of_zero_leaves_nothing_to_invent() -> None:
    growing = passes(10, 10, UpscaleOptions(scale_factor=8, strength=0.35, pass_decay=2))
    assert [each.strength for each in growing] == [0.35, 0.7, 1]
    ending = passes(10, 10, UpscaleOptions(scale_factor=8, strength=0.35, pass_decay=0))
    assert [each.strength for each in ending] == [0.35, 0, 0]


def test_the_seed_after_the_largest_is_zero() -> None:
    planned = passes(10, 10, UpscaleOptions(scale_factor=8, seed=MAX_SEED))
    assert [each.seed for each in planned] == [MAX_SEED, 0, 1]


@pytest.mark.parametrize(("count", "most", "size"), [(1, 8, 1), (6, 8, 6), (8, 8, 8), (9, 8, 5), (10, 8, 5), (3, 1, 1)])
def test_batches_are_balanced(count: int, most: int, size: int) -> None:
    assert balanced_batch(count, most) == size


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 200), most=st.integers(1, 20))
def test_balanced_batches_are_as_few_as_possible_and_none_smaller_would_do(count: int, most: int) -> None:
    size = balanced_batch(count, most)
    fewest = -(-count // most)
    assert size <= most
    assert size * fewest >= count > (size - 1) * fewest


def test_one_preset_has_the_originals_numbers_and_the_other_overlaps_more_and_feathers() -> None:
    assert PRESETS["compat"] == (4, False, ColourFix.OFF)
    assert PRESETS["quality"].overlap_cells >= 16
    assert PRESETS["quality"][1:] == (True, ColourFix.WAVELET)
