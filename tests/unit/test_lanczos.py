"""Lanczos: exact sizes, linear light, clean edges, no seams, no memory of the job before."""

import tracemalloc
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from core.errors import OutOfMemory, Stopped
from core.options import UpscaleOptions
from worker.upscaler import resampling
from worker.upscaler.engines.lanczos import Lanczos
from worker.upscaler.light import to_levels, to_linear
from worker.upscaler.picture import Levels, Picture, join
from worker.upscaler.plan import Size, output_size


def _upscaled(picture: Picture, factor: float, sharpen: float = 0) -> Picture:
    options = UpscaleOptions(scale_factor=factor, sharpen=sharpen)
    return join(Lanczos().upscale(picture, options, lambda _: None, lambda: False))


def _noise(width: int, height: int, *, alpha: bool = False) -> Picture:
    random = np.random.default_rng(width * height)
    rgb = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Picture(rgb, random.integers(0, 256, (height, width), dtype=np.uint8) if alpha else None)


def _columns(*levels: int, height: int = 8) -> Picture:
    """Grey columns of the levels given."""
    return Picture(np.tile(np.array(levels, np.uint8)[None, :, None], (height, 1, 3)))


def _furthest(left: Levels, right: Levels) -> int:
    return int(np.abs(left.astype(int) - right.astype(int)).max())


@pytest.mark.parametrize("factor", [1, 1.01, 1.13, 1.5, 2, 2.5, 3.37, 4, 7.3, 8])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 50), (50, 1), (2, 3), (37, 101)])
@pytest.mark.parametrize("sharpen", [0, 10])
def test_the_output_is_exactly_as_large_as_planned(width: int, height: int, factor: float, sharpen: float) -> None:
    output = _upscaled(_noise(width, height, alpha=True), factor, sharpen)
    assert (output.width, output.height) == output_size(width, height, factor)


@pytest.mark.parametrize(("width", "height"), [(1, 4096), (4096, 1)])
def test_a_line_of_pixels_is_enlarged(width: int, height: int) -> None:
    output = _upscaled(_noise(width, height), 8)
    assert (output.width, output.height) == (8 * width, 8 * height)


def test_at_factor_one_without_sharpening_the_same_pixels_come_back() -> None:
    picture = _noise(300, 20, alpha=True)
    output = _upscaled(picture, 1)
    assert np.array_equal(output.rgb, picture.rgb)
    assert output.alpha is not None
    assert np.array_equal(output.alpha, np.asarray(picture.alpha))


@pytest.mark.parametrize("factor", [2, 2.6])
@pytest.mark.parametrize("sharpen", [0, 7])
def test_flat_colour_stays_exactly_what_it_is_at_every_level(factor: float, sharpen: float) -> None:
    for level in range(256):
        flat = Picture(np.full((5, 9, 3), (level, 255 - level, 128), np.uint8))
        assert (_upscaled(flat, factor, sharpen).rgb == flat.rgb[0, 0]).all(), level


def test_light_is_averaged_as_light() -> None:
    # Half way between a black and a white pixel lies half the light, which sRGB writes as 188, and not as 128.
    output = _upscaled(_columns(*[0] * 8, *[255] * 8), 3)
    middle = output.rgb[12, 23:25, 0]
    assert np.isclose(to_linear(middle).mean(), 0.5, atol=0.02)
    assert _upscaled(_columns(0, 255), 5).rgb[20, 4:6].mean() > 160


def test_a_thin_line_keeps_its_light() -> None:
    # On grey there is room below for the kernel's dips, so light is only moved.
    line = _columns(*[100] * 10, 200, *[100] * 10)
    light = to_linear(line.rgb).mean()
    assert to_linear(_upscaled(line, 4).rgb).mean() == pytest.approx(light, rel=0.02)


def test_a_smooth_picture_comes_out_as_pillow_resamples_it_in_linear_light() -> None:
    down, across = np.mgrid[0:40, 0:60]
    level = (127 + 90 * np.sin(across / 7) * np.cos(down / 9)).astype(np.uint8)
    output = _upscaled(Picture(np.stack([level] * 3, axis=-1)), 2.5)
    expected = Image.fromarray(to_linear(level)).resize((150, 100), Image.Resampling.LANCZOS)
    inner = slice(10, -10), slice(10, -10)
    assert _furthest(output.rgb[..., 0][inner], to_levels(np.asarray(expected).clip(0, 1))[inner]) <= 2


def test_the_dark_side_of_an_edge_does_not_turn_into_a_black_line() -> None:
    output = _upscaled(_columns(*[60] * 8, *[250] * 8), 4)
    assert output.rgb.min() > 50
    plain = Image.fromarray(to_linear(_columns(*[60] * 8, *[250] * 8).rgb[..., 0])).resize((64, 32), 1)
    assert np.asarray(plain).min() < 0


def test_a_transparent_neighbour_lends_no_colour() -> None:
    rgb = np.zeros((8, 12, 3), np.uint8)
    rgb[:, :6], rgb[:, 6:] = (255, 0, 0), (0, 255, 0)
    alpha = np.full((8, 12), 255, np.uint8)
    alpha[:, 6:] = 0
    output = _upscaled(Picture(rgb, alpha), 4, sharpen=5)
    assert output.alpha is not None
    seen = output.alpha > 0
    assert set(np.unique(output.alpha)) > {0, 255}
    assert (output.rgb[seen] == (255, 0, 0)).all()


def test_colours_of_two_half_transparent_sides_mix_by_what_they_cover() -> None:
    rgb = np.zeros((8, 16, 3), np.uint8)
    rgb[:, :8], rgb[:, 8:] = (255, 0, 0), (0, 255, 0)
    even = _upscaled(Picture(rgb, np.full((8, 16), 128, np.uint8)), 4)
    assert even.alpha is not None
    assert (even.alpha == 128).all()
    assert _furthest(even.rgb, _upscaled(Picture(rgb), 4).rgb) <= 1
    alpha = np.full((8, 16), 200, np.uint8)
    alpha[:, 8:] = 20
    assert _upscaled(Picture(rgb, alpha), 4).rgb[16, 31, 0] > even.rgb[16, 31, 0]


def test_alpha_of_255_everywhere_changes_nothing() -> None:
    opaque = _noise(40, 30)
    covered = Picture(opaque.rgb, np.full((30, 40), 255, np.uint8))
    for sharpen in (0, 6):
        output = _upscaled(covered, 2.3, sharpen)
        assert output.alpha is not None
        assert (output.alpha == 255).all()
        assert _furthest(output.rgb, _upscaled(opaque, 2.3, sharpen).rgb) <= 1


@pytest.mark.parametrize("factor", [1, 1.37, 2, 7.3])
@pytest.mark.parametrize("sharpen", [0, 4, 10])
@pytest.mark.parametrize("tile", [37, 64])
def test_where_tiles_are_cut_does_not_show(
    monkeypatch: pytest.MonkeyPatch, factor: float, sharpen: float, tile: int
) -> None:
    picture = _noise(83, 51, alpha=True)
    monkeypatch.setattr(resampling, "TILE_PIXELS", 10_000)
    whole = _upscaled(picture, factor, sharpen)
    monkeypatch.setattr(resampling, "TILE_PIXELS", tile)
    tiled = _upscaled(picture, factor, sharpen)
    assert whole.alpha is not None
    assert tiled.alpha is not None
    # The same sums, but BLAS may add the last columns of a matrix in another order.
    assert _furthest(whole.rgb, tiled.rgb) <= 1
    assert _furthest(whole.alpha, tiled.alpha) <= 1
    assert (whole.rgb != tiled.rgb).mean() < 1e-4


def test_sharpening_steepens_an_edge_the_more_the_higher_it_is_and_leaves_flat_parts_alone() -> None:
    edge = _columns(*[80] * 10, 130, *[180] * 10)
    steps = [_upscaled(edge, 2, sharpen).rgb[8, :, 0].astype(int) for sharpen in (0, 1, 3, 6, 10)]
    contrasts = [int(np.abs(np.diff(step)).max()) for step in steps]
    assert all(softer < sharper for softer, sharper in pairwise(contrasts))
    assert {int(step[2]) for step in steps} == {80}
    assert {int(step[-3]) for step in steps} == {180}


def test_sharpening_keeps_the_hue() -> None:
    rgb = np.zeros((8, 20, 3), np.uint8)
    rgb[:, :10], rgb[:, 10:] = (40, 80, 160), (60, 117, 230)
    light = to_linear(_upscaled(Picture(rgb), 2, sharpen=10).rgb).reshape(-1, 3)
    assert np.allclose(light[:, 0] / light[:, 2], light[0, 0] / light[0, 2], atol=0.01)
    assert np.allclose(light[:, 1] / light[:, 2], light[0, 1] / light[0, 2], atol=0.01)


@pytest.mark.parametrize(("factor", "sharpen", "alpha"), [(4, 0, False), (4, 10, True)])
def test_beyond_the_input_memory_is_for_strips_and_a_tile_only_and_is_foretold(
    factor: float, sharpen: float, *, alpha: bool
) -> None:
    picture, options = _noise(700, 700, alpha=alpha), UpscaleOptions(scale_factor=factor, sharpen=sharpen)
    tracemalloc.start()
    try:
        for _ in Lanczos().upscale(picture, options, lambda _: None, lambda: False):
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    size = Size(width=700, height=700)
    held = 700 * 700 * (4 if alpha else 3)
    foretold = Lanczos().peak_bytes(size, options, alpha=alpha)
    assert foretold / 2 < held + peak < foretold < held * factor * factor


def test_progress_never_falls_and_ends_at_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "TILE_PIXELS", 20)
    for factor, tiles in ((1, 1), (2, 12)):
        heard: list[float] = []
        list(Lanczos().upscale(_noise(40, 30), UpscaleOptions(scale_factor=factor), heard.append, lambda: False))
        assert heard == sorted(heard)
        assert len(heard) == tiles
        assert heard[0] >= 0
        assert heard[-1] == 1.0


def _stop_after(answers: int) -> Callable[[], bool]:
    asked = iter([False] * answers)
    return lambda: next(asked, True)


@pytest.mark.parametrize("answers", [0, 5])
def test_a_stop_ends_the_work_at_the_next_tile(monkeypatch: pytest.MonkeyPatch, answers: int) -> None:
    monkeypatch.setattr(resampling, "TILE_PIXELS", 20)
    heard: list[float] = []
    with pytest.raises(Stopped):
        list(Lanczos().upscale(_noise(40, 30), UpscaleOptions(scale_factor=2), heard.append, _stop_after(answers)))
    assert len(heard) == answers


def test_one_engine_serves_many_jobs_and_remembers_none() -> None:
    engine, options = Lanczos(), UpscaleOptions(scale_factor=2.5, sharpen=3)
    picture = _noise(30, 20, alpha=True)
    before = picture.rgb.copy()
    first = join(engine.upscale(picture, options, lambda _: None, lambda: False))
    join(engine.upscale(_noise(31, 77), UpscaleOptions(scale_factor=3), lambda _: None, lambda: False))
    with pytest.raises(Stopped):
        join(engine.upscale(picture, UpscaleOptions(), lambda _: None, lambda: True))
    again = join(engine.upscale(picture, options, lambda _: None, lambda: False))
    assert np.array_equal(first.rgb, again.rgb)
    assert np.array_equal(picture.rgb, before)
    assert vars(engine) == {}


def test_an_output_that_memory_cannot_hold_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> npt.NDArray[np.uint8]:
        raise MemoryError

    monkeypatch.setattr(np, "empty", full)
    with pytest.raises(OutOfMemory, match="16 x 8 pixels"):
        _upscaled(_columns(*range(8), height=4), 2)
