"""Resampling to a size: what the engine's tests do not show."""

import numpy as np
import pytest

from core.errors import OutOfMemory, Stopped
from worker.upscaler import resampling
from worker.upscaler.picture import Levels, Picture
from worker.upscaler.plan import Size
from worker.upscaler.resampling import resample, resample_alpha


def _go_on() -> None:
    pass


def _noise(*shape: int) -> Levels:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("size", [Size(width=9, height=7), Size(width=9, height=23), Size(width=31, height=8)])
@pytest.mark.parametrize("sharpen", [0, 5])
def test_each_side_may_grow_by_a_factor_of_its_own(size: Size, sharpen: float) -> None:
    picture = Picture(_noise(7, 9, 3), _noise(7, 9))
    output = resample(picture, size, _go_on, sharpen=sharpen)
    assert (output.width, output.height) == size
    assert output.alpha is not None


def test_a_picture_that_keeps_its_size_comes_back_as_it_is_unless_it_is_sharpened() -> None:
    picture = Picture(_noise(7, 9, 3))
    assert resample(picture, Size(width=9, height=7), _go_on) is picture
    assert not np.array_equal(resample(picture, Size(width=9, height=7), _go_on, sharpen=5).rgb, picture.rgb)


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
