"""Stable Diffusion 1.5 in its real size with random weights: `.venv/bin/pytest -s tests/manual`, a few minutes."""

import time

import numpy as np
import pytest

from bench import sd15
from core.options import ColourFix, UpscaleOptions
from worker.upscaler.components import choose_device, choose_dtype
from worker.upscaler.engines import Config
from worker.upscaler.engines.clarity import Clarity
from worker.upscaler.picture import Picture


@pytest.mark.slow
def test_the_real_architecture_gives_a_finite_picture_of_the_right_size() -> None:
    device = choose_device("auto")
    engine = Clarity(sd15.components(device, choose_dtype("auto", device)), (), Config())
    picture = Picture(np.random.default_rng(0).integers(0, 256, (250, 301, 3), np.uint8))
    began = time.monotonic()
    # What is not a number would become black, and the colour fix would hide that.
    options = UpscaleOptions(colour_fix=ColourFix.OFF)
    told: list[float] = []
    (upscaled,) = engine.upscale(picture, options, told.append, lambda: False)
    print(f"\n301 x 250 to 602 x 500 on {device}: {time.monotonic() - began:.1f} s")  # noqa: T201
    assert (upscaled.width, upscaled.height) == (602, 500)
    assert len(np.unique(upscaled.rgb)) > 10
    assert np.mean(upscaled.rgb == 0) < 0.5
    assert told == sorted(told)
