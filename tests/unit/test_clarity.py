"""What the Clarity engine makes of pictures and options, on networks of the real geometry with random weights."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from core.options import ColourFix, Sampler
from tests.clarity import QUICK, counted, difference, photo, upscale
from worker.upscaler import checkpoints, resampling, superres
from worker.upscaler.decoding import Limits, decode
from worker.upscaler.engines.clarity import Clarity
from worker.upscaler.plan import Size, output_size

# Sizes and pictures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height", "factor"),
    [(1, 1, 2.0), (16, 16, 1.0), (13, 7, 1.5), (33, 21, 2.0), (20, 9, 3.0), (9, 14, 4.0), (5, 6, 7.3), (6, 5, 8.0)],
)
def test_the_output_has_exactly_the_size_that_was_asked_for(
    engine: Clarity, width: int, height: int, factor: float
) -> None:
    upscaled = upscale(engine, photo(width, height), scale_factor=factor, steps=3)
    assert (upscaled.width, upscaled.height) == output_size(width, height, factor)


def test_a_panorama_is_worked_on_in_tiles(engine: Clarity, models: Path) -> None:
    with counted(engine.parts.unet) as batches:
        upscaled = upscale(engine, photo(2048, 32), QUICK, tile_width=32, tile_height=32, steps=1)
    assert (upscaled.width, upscaled.height) == (4096, 64)
    assert len(batches) > 16


def _encoded(mode: str, kind: str, **how: Any) -> bytes:
    rgba = np.random.default_rng(3).integers(0, 256, (18, 24, 4), np.uint8)
    image = Image.fromarray(rgba)
    image = Image.fromarray(rgba[:, :, 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    file = BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def _rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _encoded("RGB", "JPEG", exif=exif)


@pytest.mark.parametrize(
    ("data", "size", "transparent"),
    [
        (_encoded("RGB", "PNG"), (48, 36), False),
        (_encoded("RGBA", "PNG"), (48, 36), True),
        (_encoded("LA", "PNG"), (48, 36), True),
        (_encoded("P", "PNG"), (48, 36), True),
        (_encoded("L", "PNG"), (48, 36), False),
        (_encoded("1", "PNG"), (48, 36), False),
        (_encoded("I;16", "PNG"), (48, 36), False),
        (_encoded("CMYK", "JPEG"), (48, 36), False),
        (_encoded("RGBA", "WEBP"), (48, 36), True),
        (_rotated(), (36, 48), False),
    ],
    ids=["RGB", "RGBA", "LA", "P", "L", "1", "I;16", "CMYK", "WebP", "EXIF"],
)
def test_pictures_of_every_mode_go_through(
    engine: Clarity, data: bytes, size: tuple[int, int], transparent: bool
) -> None:
    picture = decode(data, Limits(pixels=10**6))
    upscaled = upscale(engine, picture, steps=3)
    assert (upscaled.width, upscaled.height) == size
    assert (upscaled.alpha is not None) == transparent
    assert upscaled.rgb.std() > 1


def test_alpha_is_enlarged_apart_and_has_no_say_in_the_colours(engine: Clarity) -> None:
    opaque = photo(24, 20)
    alpha = np.tile(np.linspace(0, 255, 24).astype(np.uint8), (20, 1))
    upscaled = upscale(engine, replace(opaque, alpha=alpha))
    assert np.array_equal(upscaled.rgb, upscale(engine, opaque).rgb)
    assert upscaled.alpha is not None
    assert np.array_equal(upscaled.alpha, resampling.resample_alpha(alpha, Size(width=48, height=40), lambda: None))


# What the options mean ------------------------------------------------------------------------------------------------


def test_at_strength_0_the_picture_is_only_enlarged_by_our_own_network(engine: Clarity) -> None:
    picture = photo(24, 20)
    with counted(engine.parts.unet) as asked:
        upscaled = upscale(engine, picture, strength=0)
    assert asked == []
    networks = checkpoints.load_own("restore", engine.parts.device)
    enlarged = superres.enlarge(picture.rgb, Size(width=48, height=40), networks, lambda: None)
    assert np.array_equal(upscaled.rgb, enlarged)


def test_more_strength_moves_farther_away(engine: Clarity) -> None:
    picture = photo(40, 40)
    next_to_none = upscale(engine, picture, strength=0.001)
    changes = [difference(upscale(engine, picture, strength=s), next_to_none).mean() for s in (0.2, 0.5, 1.0)]
    assert changes == sorted(changes)


def test_guidance_of_1_halves_what_the_networks_are_asked(engine: Clarity) -> None:
    asked: dict[float, int] = {}
    for scale in (6.0, 1.0, 0.0):
        with counted(engine.parts.unet) as unet, counted(engine.parts.controlnet) as controlnet:
            upscale(engine, photo(24, 24), guidance_scale=scale)
        assert unet == controlnet
        asked[scale] = sum(unet)
    assert asked[6.0] == 2 * asked[1.0] == 2 * asked[0.0] > 0


def test_without_control_the_control_net_is_not_asked(engine: Clarity) -> None:
    picture = photo(24, 24)
    with counted(engine.parts.controlnet) as asked:
        free = upscale(engine, picture, control_scale=0)
    assert asked == []
    assert difference(free, upscale(engine, picture, control_scale=2)).max() > 0


def test_the_prompt_and_the_negative_prompt_have_a_say(engine: Clarity) -> None:
    picture = photo(24, 24)
    plain = upscale(engine, picture)
    assert difference(plain, upscale(engine, picture, prompt="(fur:1.5)")).max() > 0
    assert difference(plain, upscale(engine, picture, negative_prompt="blur")).max() > 0


@pytest.mark.parametrize("sampler", Sampler)
def test_every_sampler_gives_a_picture(engine: Clarity, sampler: Sampler) -> None:
    picture = photo(16, 16)
    upscaled = upscale(engine, picture, sampler=sampler, steps=10)
    away = difference(upscaled, upscale(engine, picture, strength=0))
    assert 0 < away.mean() < 60


def test_sharpening_comes_last(engine: Clarity) -> None:
    picture = photo(24, 24)
    soft, sharp = upscale(engine, picture), upscale(engine, picture, sharpen=5)
    assert np.diff(sharp.rgb.astype(float), axis=0).std() > 1.2 * np.diff(soft.rgb.astype(float), axis=0).std()


def test_passes_are_jobs_of_their_own_with_less_strength_and_the_next_seed(engine: Clarity) -> None:
    picture = photo(20, 14)
    at_once = upscale(engine, picture, scale_factor=4, strength=0.5)
    first = upscale(engine, picture, scale_factor=2, strength=0.5)
    second = upscale(engine, first, scale_factor=2, strength=0.4, seed=QUICK.seed + 1)
    assert np.array_equal(at_once.rgb, second.rgb)


def test_the_colours_of_the_original_are_brought_back_unless_told_otherwise(engine: Clarity) -> None:
    picture = photo(48, 48)
    enlarged = upscale(engine, picture, strength=0)

    def shift(kind: ColourFix | None) -> float:
        upscaled = upscale(engine, picture, colour_fix=kind, strength=0.6)
        return float(abs(upscaled.rgb.mean((0, 1)) - enlarged.rgb.mean((0, 1))).max())

    assert shift(ColourFix.WAVELET) == shift(None) < 0.2 * shift(ColourFix.OFF)
    assert shift(ColourFix.ADAIN) < 0.2 * shift(ColourFix.OFF)
