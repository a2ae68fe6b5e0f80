"""Pictures in strips: read in windows, and resampled."""

import numpy as np
import pytest
from PIL import Image

from tests.superres import cut, furthest, noise, size_of
from worker.upscaler import strips
from worker.upscaler.plan import Size, Span
from worker.upscaler.strips import Rows, fitted


def test_rows_are_read_in_windows_from_strips_of_any_height() -> None:
    rgb = noise(3, 40)
    rows = Rows(cut(rgb, 7), size_of(rgb))
    for window in (Span(0, 3), Span(0, 18), Span(2, 18), Span(17, 40), Span(39, 40)):
        assert np.array_equal(rows.read(window), rgb[slice(*window)])


@pytest.mark.parametrize("start", [7, 8, 20, 21, 39])
def test_a_window_may_begin_below_all_that_was_read_before(start: int) -> None:
    rgb = noise(3, 40)
    rows = Rows(cut(rgb, 7), size_of(rgb))
    for window in (Span(0, 2), Span(start, 40), Span(39, 40)):
        assert np.array_equal(rows.read(window), rgb[slice(*window)])


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((75, 90), (41, 57)), ((30, 500), (77, 1100)), ((33, 17), (32, 16)), ((64, 200), (64, 97)), ((1, 1), (3, 5))],
)
def test_what_is_resampled_in_strips_is_what_it_is_as_a_whole(
    size: tuple[int, int], wanted: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strips, "FITTED_PIXELS", wanted[0] * 7)
    rgb = noise(*size)
    across = Image.fromarray(rgb).resize((wanted[0], size[1]), Image.Resampling.LANCZOS)
    whole = np.asarray(across.resize(wanted, Image.Resampling.LANCZOS))
    pieces = list(fitted(cut(rgb, 13), Size(*size), Size(*wanted)))
    assert max(map(len, pieces)) <= 7 or size[1] == wanted[1]
    assert furthest(np.concatenate(pieces), whole) <= 1
    assert (np.concatenate(pieces) != whole).mean() < 1e-3
