"""Compiled networks; takes minutes, most of them the compiler's."""

from pathlib import Path

import numpy as np
import pytest

from core.options import UpscaleOptions
from tests import tiny
from worker.upscaler.engines import Config, clarity
from worker.upscaler.picture import Picture


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_compiled_networks_give_the_same_picture(tmp_path: Path) -> None:
    tiny.save(tmp_path)
    plain, compiled = (clarity.load(Config(models_dir=tmp_path, clarity_compile=how)) for how in (False, True))
    picture = Picture(np.random.default_rng(0).integers(0, 256, (60, 76, 3), np.uint8))
    for changed in ({}, {"guidance_scale": 1.0}, {"control_scale": 0.0}, {"scale_factor": 4.0}):
        options = UpscaleOptions(steps=6, tile_width=16, tile_height=16).model_copy(update=changed)
        pictures = [
            next(engine.upscale(picture, options, lambda _: None, lambda: False)) for engine in (plain, compiled)
        ]
        assert np.abs(pictures[0].rgb.astype(int) - pictures[1].rgb).max() <= 2
