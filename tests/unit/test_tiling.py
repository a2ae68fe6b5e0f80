"""Where tiles lie and how much each counts."""

from itertools import pairwise
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.upscaler.plan import Size, Span, Tiling, fitting_batch, tiling

CLARITY_TILE = Size(width=112, height=144)

LENGTHS = st.integers(1, 600)
TILES = st.integers(1, 160)
OVERLAPS = st.integers(0, 64)


def along(length: int, tile: int, overlap: int, *, feathered: bool = False) -> Tiling:
    """Tile an axis: the columns are of interest."""
    return tiling(Size(width=length, height=1), Size(width=tile, height=1), overlap, feathered=feathered)


def shared(spans: tuple[Span, ...]) -> list[int]:
    return [before.stop - after.start for before, after in pairwise(spans)]


def totals(spans: tuple[Span, ...], weights: tuple[tuple[float, ...], ...]) -> list[float]:
    """Sum the weights over each position; fails where a weight is missing."""
    sums = [0.0] * spans[-1].stop
    for span, own in zip(spans, weights, strict=True):
        for position, weight in zip(range(*span), own, strict=True):
            sums[position] += weight
    return sums


def numbers_over(spans: tuple[Span, ...]) -> list[int]:
    return [sum(span.start <= position < span.stop for span in spans) for position in range(spans[-1].stop)]


@settings(max_examples=200, deadline=None)
@given(length=LENGTHS, tile=TILES, overlap=OVERLAPS)
def test_tiles_of_one_size_cover_an_axis_from_end_to_end(length: int, tile: int, overlap: int) -> None:
    columns = along(length, tile, overlap).columns
    assert columns[0].start == 0
    assert columns[-1].stop == length
    assert {stop - start for start, stop in columns} == {min(tile, length)}
    assert all(after.start > before.start for before, after in pairwise(columns))
    assert min(numbers_over(columns)) >= 1


@settings(max_examples=200, deadline=None)
@given(length=LENGTHS, tile=TILES, overlap=OVERLAPS)
def test_neighbours_share_what_was_asked_in_as_few_tiles_as_possible(length: int, tile: int, overlap: int) -> None:
    columns = along(length, tile, overlap).columns
    asked = min(overlap, tile // 2)
    assert all(common >= asked for common in shared(columns))
    one_less = len(columns) - 1
    assert one_less == 0 or one_less * tile - (one_less - 1) * asked < length


@settings(max_examples=200, deadline=None)
@given(length=LENGTHS, tile=TILES, overlap=OVERLAPS)
def test_tiles_lie_evenly_and_mirror_each_other(length: int, tile: int, overlap: int) -> None:
    columns = along(length, tile, overlap).columns
    steps = [after.start - before.start for before, after in pairwise(columns)]
    assert not steps or max(steps) - min(steps) <= 1
    mirrored = [Span(length - stop, length - start) for start, stop in reversed(columns)]
    off = [span.start - other.start for span, other in zip(columns, mirrored, strict=True)]
    middle = len(columns) // 2
    if len(columns) % 2:
        # A middle tile over an odd rest cannot lie in the middle.
        assert abs(off.pop(middle)) <= (length - columns[0].stop) % 2
    assert not any(off)


@pytest.mark.parametrize(
    ("width", "height", "columns", "rows", "least_across", "least_down"),
    [
        (1024, 1024, 2, 1, 96, None),
        (1536, 1536, 2, 2, 32, 96),
        (2048, 2048, 3, 2, 40, 32),
        (3840, 2160, 5, 2, 20, 18),
        (4096, 4096, 5, 4, 12, 21),
    ],
)
def test_the_originals_tiles_and_overlaps_are_found_at_an_overlap_of_four(
    width: int, height: int, columns: int, rows: int, least_across: int, least_down: int | None
) -> None:
    cut = tiling(Size(width=width // 8, height=height // 8), CLARITY_TILE, 4, feathered=False)
    assert (len(cut.columns), len(cut.rows), cut.count) == (columns, rows, columns * rows)
    assert min(shared(cut.columns)) == least_across
    assert min(shared(cut.rows), default=None) == least_down


@pytest.mark.parametrize(
    ("width", "height", "at_16", "at_24"),
    [(1024, 1024, 2, 2), (1536, 1536, 4, 4), (2048, 2048, 6, 6), (3840, 2160, 10, 18), (4096, 4096, 24, 30)],
)
def test_wider_overlaps_cost_tiles_in_large_pictures_only(width: int, height: int, at_16: int, at_24: int) -> None:
    area = Size(width=width // 8, height=height // 8)
    assert tiling(area, CLARITY_TILE, 16, feathered=True).count == at_16
    assert tiling(area, CLARITY_TILE, 24, feathered=True).count == at_24


@pytest.mark.parametrize(
    ("width", "height", "overlap", "count"), [(128, 128, 8, 25), (128, 128, 0, 16), (200, 100, 2, 28)]
)
def test_as_many_tiles_are_made_as_refiners_makes(width: int, height: int, overlap: int, count: int) -> None:
    # The numbers are those of refiners' own tests. The places differ: there all steps are equal and the last tile
    # alone is drawn back to the edge, here all overlaps share what is too much.
    cut = tiling(Size(width=width, height=height), Size(width=32, height=32), overlap, feathered=False)
    assert cut.count == count


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (112, 144), (111, 3)])
def test_one_tile_covers_an_area_no_larger_than_itself(size: tuple[int, int]) -> None:
    area = Size(*size)
    cut = tiling(area, CLARITY_TILE, 16, feathered=True)
    assert (cut.count, cut.tile) == (1, area)
    assert {*cut.column_weights[0], *cut.row_weights[0]} == {1.0}


@pytest.mark.parametrize(("width", "height"), [(8, 512), (512, 8)])
def test_a_panorama_is_cut_along_and_never_taken_whole(width: int, height: int) -> None:
    cut = tiling(Size(width=width, height=height), CLARITY_TILE, 4, feathered=False)
    assert cut.tile == (min(width, 112), min(height, 144))
    assert cut.count == ceil((512 - 4) / (108 if width > height else 140))


def test_an_axis_of_prime_length_is_covered() -> None:
    columns = along(127, 32, 8).columns
    assert [span.start for span in columns] == [0, 24, 48, 71, 95]


@pytest.mark.parametrize(("tile", "overlap"), [(16, 15), (16, 16), (16, 300), (2, 5)])
def test_more_than_half_a_tile_is_never_demanded_as_overlap(tile: int, overlap: int) -> None:
    assert along(100, tile, overlap) == along(100, tile, tile // 2)


def test_tiles_of_one_position_share_nothing() -> None:
    assert along(5, 1, 4).columns == tuple(Span(position, position + 1) for position in range(5))


@settings(max_examples=200, deadline=None)
@given(length=LENGTHS, tile=TILES, overlap=OVERLAPS, feathered=st.booleans())
def test_weights_are_positive_and_sum_to_one_at_every_position(
    length: int, tile: int, overlap: int, feathered: bool
) -> None:
    cut = along(length, tile, overlap, feathered=feathered)
    assert min(min(weights) for weights in cut.column_weights) > 0
    assert totals(cut.columns, cut.column_weights) == pytest.approx([1.0] * length, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(length=LENGTHS, tile=TILES, overlap=OVERLAPS)
def test_without_feathers_all_tiles_over_a_position_count_the_same(length: int, tile: int, overlap: int) -> None:
    cut = along(length, tile, overlap)
    numbers = numbers_over(cut.columns)
    for span, weights in zip(cut.columns, cut.column_weights, strict=True):
        assert list(weights) == pytest.approx([1 / number for number in numbers[slice(*span)]])


def test_without_feathers_one_two_or_four_tiles_meet_in_a_large_picture() -> None:
    cut = tiling(Size(width=512, height=512), CLARITY_TILE, 4, feathered=False)
    met = {across * down for across in numbers_over(cut.columns) for down in numbers_over(cut.rows)}
    assert met == {1, 2, 4}


def test_a_feather_rises_by_half_positions_over_what_neighbours_really_share() -> None:
    first, second = along(12, 8, 2, feathered=True).column_weights
    ramp = [1 / 8, 3 / 8, 5 / 8, 7 / 8]
    assert second == pytest.approx([*ramp, 1, 1, 1, 1])
    assert first == pytest.approx([1, 1, 1, 1, *reversed(ramp)])


def test_a_feather_of_one_position_halves_it() -> None:
    first, second = along(7, 4, 1, feathered=True).column_weights
    assert (first, second) == ((1, 1, 1, 0.5), (0.5, 1, 1, 1))


@settings(max_examples=100, deadline=None)
@given(length=LENGTHS, tile=TILES, overlap=OVERLAPS)
def test_every_tile_fades_in_and_out_where_it_meets_a_neighbour(length: int, tile: int, overlap: int) -> None:
    cut = along(length, tile, overlap, feathered=True)
    for common, (before, after) in zip(shared(cut.columns), pairwise(cut.column_weights), strict=True):
        highest = 0.5 / common + 1e-12 if common else 1
        assert max(before[-1], after[0]) <= highest


def test_feathers_of_three_tiles_over_a_position_start_and_end_low() -> None:
    cut = along(57, 32, 8, feathered=True)
    assert max(numbers_over(cut.columns)) == 3
    _, middle, _ = cut.column_weights
    assert max(middle[0], middle[-1]) < 0.05
    assert max(middle) == max(middle[14:18])


@settings(max_examples=50, deadline=None)
@given(length=LENGTHS, tile=TILES, overlap=OVERLAPS)
def test_borders_of_the_area_have_no_feather(length: int, tile: int, overlap: int) -> None:
    cut = along(length, tile, overlap, feathered=True)
    assert (cut.column_weights[0][0], cut.column_weights[-1][-1]) == (1, 1)


def test_rows_are_cut_and_weighted_as_columns_of_the_same_measures_are() -> None:
    area, tile = Size(width=100, height=61), Size(width=32, height=24)
    cut = tiling(area, tile, 6, feathered=True)
    turned = tiling(Size(width=61, height=100), Size(width=24, height=32), 6, feathered=True)
    assert (cut.rows, cut.row_weights) == (turned.columns, turned.column_weights)
    assert (cut.columns, cut.column_weights) == (turned.rows, turned.row_weights)
    assert cut.tile == tile
    assert cut.count == len(cut.rows) * len(cut.columns) > len(cut.rows)


@pytest.mark.parametrize("feathered", [True, False])
def test_a_constant_field_comes_back_from_its_tiles(feathered: bool) -> None:
    cut = tiling(Size(width=57, height=41), Size(width=32, height=16), 8, feathered=feathered)
    field = [[0.0] * 57 for _ in range(41)]
    for row, down in zip(cut.rows, cut.row_weights, strict=True):
        for column, across in zip(cut.columns, cut.column_weights, strict=True):
            for y, down_weight in zip(range(*row), down, strict=True):
                for x, across_weight in zip(range(*column), across, strict=True):
                    field[y][x] += 0.7 * down_weight * across_weight
    assert [value for line in field for value in line] == pytest.approx([0.7] * 57 * 41, abs=1e-6)


@pytest.mark.parametrize(
    ("free", "tile", "batch"), [(100, 10, 8), (50, 10, 4), (12.5, 10, 1), (1, 10, 1), (0, 10, 1), (10**12, 1, 8)]
)
def test_a_batch_takes_four_fifths_of_the_free_memory_at_most_and_is_never_empty(
    free: float, tile: float, batch: int
) -> None:
    assert fitting_batch(free, tile) == batch
