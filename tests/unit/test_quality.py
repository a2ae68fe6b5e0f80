"""The measuring of enlarged pictures: figures that are known beforehand."""

import math

import numpy as np
import pytest

from bench.quality import FIGURES, load_measure
from worker.upscaler.picture import Levels

BORDER = 2


@pytest.fixture(scope="module")
def truth() -> Levels:
    return np.random.default_rng(5).integers(20, 200, (64, 48, 3), dtype=np.uint8)


def measured(truth: Levels, made: Levels) -> dict[str, float]:
    return dict(zip(FIGURES, load_measure()(truth, made, BORDER), strict=True))


def test_a_perfect_picture_has_perfect_figures(truth: Levels) -> None:
    figures = measured(truth, truth)
    assert math.isinf(figures.pop("PSNR-Y"))
    assert figures == pytest.approx({"SSIM": 1, "HaarPSI": 1, "GMSD": 0}, abs=1e-5)


def test_grey_levels_that_are_all_off_by_five_have_the_psnr_that_follows(truth: Levels) -> None:
    # Of 255 levels of grey, luma has 219.
    assert measured(truth, truth + np.uint8(5))["PSNR-Y"] == pytest.approx(
        -20 * math.log10(5 / 255 * 219 / 255), abs=0.01
    )


def test_each_colour_weighs_in_the_luma_as_bt_601_has_it(truth: Levels) -> None:
    red, green, blue = (measured(truth, truth + shift)["PSNR-Y"] for shift in 20 * np.eye(3, dtype=np.uint8))
    expected = [-20 * math.log10(20 / 255 * share / 255) for share in (65.481, 128.553, 24.966)]
    assert [red, green, blue] == pytest.approx(expected, abs=0.01)


def test_the_border_is_left_out(truth: Levels) -> None:
    made = truth.copy()
    made[:BORDER] = made[-BORDER:] = made[:, :BORDER] = made[:, -BORDER:] = 0
    assert math.isinf(measured(truth, made)["PSNR-Y"])


def test_noise_makes_every_figure_worse(truth: Levels) -> None:
    worse = truth + np.random.default_rng(6).integers(0, 40, truth.shape, dtype=np.uint8)
    figures = measured(truth, worse)
    assert figures["PSNR-Y"] < 30
    assert figures["SSIM"] < 0.99
    assert figures["HaarPSI"] < 0.99
    assert figures["GMSD"] > 0.01
