"""Resampling to a size: what the engine's tests do not show."""

import numpy as np
import pytest

from core.errors import OutOfMemory, Stopped
from worker.upscaler import resampling
from worker.upscaler.picture import Levels, Picture, join
from worker.upscaler.plan import Size
from worker.upscaler.resampling import resample, resample_alpha, resample_alpha_strips, resample_strips


def _go_on() -> None:
    pass


def _noise(*shape: int) -> Levels:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("size", [Size(width=9, height=7), Size(width=9, height=23), Size(width=31, height=8)])
@pytest.mark.parametrize("sharpen", [0, 5])
def test_each_side_may_grow_by_a_factor_of_its_own(size: Size, sharpen: float) -> None:
    picture = Picture(_noise(7, 9, 3), _noise(7, 9))
    output = join(resample_strips(picture, size, _go_on, sharpen=sharpen))
    assert (output.width, output.height) == size
    assert output.alpha is not None


def test_a_picture_that_keeps_its_size_comes_back_as_it_is_unless_it_is_sharpened() -> None:
    picture = Picture(_noise(7, 9, 3))
    assert resample(picture, Size(width=9, height=7), _go_on) is picture
    (sharpened,) = resample_strips(picture, Size(width=9, height=7), _go_on, sharpen=5)
    assert not np.array_equal(sharpened.rgb, picture.rgb)


def test_strips_are_rows_of_tiles_and_made_as_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "TILE_PIXELS", 20)
    picture, size = Picture(_noise(25, 20, 3), _noise(25, 20)), Size(width=40, height=50)
    calls: list[None] = []
    strips = resample_strips(picture, size, lambda: calls.append(None))
    assert len(calls) == 0
    first = next(strips)
    assert len(calls) == 2
    rest = list(strips)
    assert [(strip.width, strip.height) for strip in (first, *rest)] == [(40, 20), (40, 20), (40, 10)]
    small = list(resample_strips(picture, size, _go_on, small_tiles=True))
    assert [strip.height for strip in small] == [10] * 5
    assert np.array_equal(join(small).rgb, join([first, *rest]).rgb)
    assert picture.alpha is not None
    for alpha, strip in zip(resample_alpha_strips(picture.alpha, size, _go_on), [first, *rest], strict=True):
        assert np.array_equal(alpha, np.asarray(strip.alpha))


@pytest.mark.parametrize("size", [Size(width=31, height=42), Size(width=100, height=21), Size(width=300, height=520)])
def test_a_plane_of_alpha_becomes_what_it_becomes_with_its_picture(size: Size) -> None:
    alpha = _noise(21, 31)
    whole = resample(Picture(_noise(21, 31, 3), alpha), size, _go_on)
    assert np.array_equal(resample_alpha(alpha, size, _go_on), np.asarray(whole.alpha))


def test_alpha_that_keeps_its_size_keeps_its_levels() -> None:
    alpha = _noise(40, 50)
    assert np.array_equal(resample_alpha(alpha, Size(width=50, height=40), _go_on), alpha)


def test_check_is_called_before_each_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "TILE_PIXELS", 20)
    size, alpha = Size(width=50, height=40), _noise(20, 25)
    calls: list[None] = []
    resample_alpha(alpha, size, lambda: calls.append(None))
    resample(Picture(_noise(20, 25, 3)), size, lambda: calls.append(None))
    assert len(calls) == 2 * 6

    def stop() -> None:
        raise Stopped("Enough.")

    with pytest.raises(Stopped):
        resample_alpha(alpha, size, stop)


def test_alpha_that_memory_cannot_hold_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Levels:
        raise MemoryError

    alpha = _noise(20, 25)
    monkeypatch.setattr(np, "empty", full)
    with pytest.raises(OutOfMemory, match="50 x 40 pixels"):
        resample_alpha(alpha, Size(width=50, height=40), _go_on)
