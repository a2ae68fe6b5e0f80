"""Strips to files: what is in them, in how much memory, and what happens when one side fails the other."""

import os
import subprocess
import sys
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from core.options import OutputFormat
from tests.encoding import cut, noise, photo, unnamed, written
from worker.upscaler import encoding
from worker.upscaler.decoding import Limits, decode
from worker.upscaler.encoding import encode, peak_bytes, thumbnail
from worker.upscaler.picture import Levels, Picture
from worker.upscaler.plan import Size

LIMIT = Limits(pixels=10_000_000)


def _furthest(left: Levels, right: Any) -> int:
    return int(np.abs(left.astype(int) - np.asarray(right).astype(int)).max())


# What is written ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output_format", OutputFormat)
@pytest.mark.parametrize("with_alpha", [False, True])
def test_every_format_is_written_and_read_again(output_format: OutputFormat, *, with_alpha: bool) -> None:
    for size in ((1, 1), (30, 40)):
        rgb, alpha = np.full((*size, 3), (200, 100, 50), np.uint8), np.full(size, 255, np.uint8)
        data = written(Picture(rgb, alpha if with_alpha else None), output_format, 95)
        assert Image.open(BytesIO(data)).get_format_mimetype() == output_format.content_type
        assert _furthest(decode(data, LIMIT).rgb, rgb) <= (0 if output_format is OutputFormat.PNG else 3)


@pytest.mark.parametrize("output_format", OutputFormat)
@pytest.mark.parametrize("alpha", [False, True])
def test_where_strips_are_cut_does_not_show(output_format: OutputFormat, *, alpha: bool) -> None:
    picture = photo(83, 101, alpha=alpha)
    whole = written(picture, output_format)
    assert [written(picture, output_format, strip=strip) == whole for strip in (1, 7, 82)] == [True] * 3


def test_what_is_read_of_a_strip_in_blocks_is_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rgba = noise(53, 47, 4)
    picture = Picture(rgba[..., :3], rgba[..., 3])
    for block in (1, 47 * 10, 47 * 53):
        monkeypatch.setattr(encoding, "_BLOCK_PIXELS", block)
        assert np.array_equal(np.asarray(Image.open(BytesIO(written(picture, OutputFormat.PNG)))), rgba)


def test_strips_that_are_views_of_something_larger_are_written_as_they_look() -> None:
    rgb = noise(40, 60, 3)
    assert np.array_equal(decode(written(Picture(rgb[5:20, 10:41]), OutputFormat.PNG), LIMIT).rgb, rgb[5:20, 10:41])
    assert np.array_equal(decode(written(Picture(rgb[::-1, ::-2]), OutputFormat.PNG), LIMIT).rgb, rgb[::-1, ::-2])


def test_png_is_lossless_and_webp_keeps_alpha_exactly() -> None:
    rgba = noise(30, 40, 4)
    picture = Picture(rgba[..., :3], rgba[..., 3])
    again = decode(written(picture, OutputFormat.PNG, 1), LIMIT)
    assert np.array_equal(again.rgb, picture.rgb)
    assert np.array_equal(np.asarray(again.alpha), rgba[..., 3])
    assert np.array_equal(np.asarray(decode(written(picture, OutputFormat.WEBP, 50), LIMIT).alpha), rgba[..., 3])


def test_jpeg_shows_transparency_on_white_in_linear_light() -> None:
    alpha = np.zeros((200, 16), np.uint8)
    alpha[100:], alpha[150:] = 128, 255
    rgb = decode(written(Picture(np.zeros((200, 16, 3), np.uint8), alpha), OutputFormat.JPG, 100, 30), LIMIT).rgb
    assert rgb[[50, 120, 180], 8].tolist() == [[255] * 3, [187] * 3, [0] * 3]


def test_quality_buys_size_and_from_90_on_full_colour_resolution() -> None:
    picture = Picture(noise(300, 300, 3))
    for output_format in (OutputFormat.JPG, OutputFormat.WEBP):
        sizes = [len(written(picture, output_format, quality)) for quality in (1, 30, 89, 90, 100)]
        assert sizes == sorted(sizes)
    for quality, sampling in ((89, 2), (90, 0), (100, 0)):
        image = Image.open(BytesIO(written(picture, OutputFormat.JPG, quality)))
        assert JpegImagePlugin.get_sampling(image) == sampling


def test_files_are_about_as_small_as_pillow_makes_them_from_a_photograph() -> None:
    picture = photo(300, 400, alpha=False)
    settings: list[tuple[OutputFormat, dict[str, Any]]] = [
        (OutputFormat.PNG, {"format": "PNG", "compress_level": 4}),
        (OutputFormat.JPG, {"format": "JPEG", "quality": 90, "subsampling": "4:4:4", "optimize": True}),
        (OutputFormat.WEBP, {"format": "WEBP", "quality": 90, "method": 2}),
    ]
    for output_format, options in settings:
        file = BytesIO()
        Image.fromarray(picture.rgb).save(file, **options)
        assert len(written(picture, output_format)) < 1.1 * len(file.getvalue())


def test_a_large_jpeg_is_written_without_code_tables_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = photo(300, 400, alpha=False)
    optimised = written(picture, OutputFormat.JPG)
    monkeypatch.setattr(encoding, "_OPTIMISED_PIXELS", 300 * 400 - 1)
    standard = written(picture, OutputFormat.JPG)
    assert len(standard) > len(optimised)
    assert np.array_equal(decode(standard, LIMIT).rgb, decode(optimised, LIMIT).rgb)


@pytest.mark.parametrize("output_format", OutputFormat)
def test_nothing_but_the_picture_is_in_the_file(output_format: OutputFormat) -> None:
    image = Image.open(BytesIO(written(photo(16, 16, alpha=True), output_format)))
    assert not dict(image.getexif())
    assert not {"exif", "icc_profile", "comment", "xmp", "gamma", "srgb"} & set(image.info)
    assert not getattr(image, "text", {})


# Memory ---------------------------------------------------------------------------------------------------------------

_PROGRAM = """
import sys, tempfile
import numpy as np
from core.options import OutputFormat
from worker.upscaler.encoding import encode, peak_bytes
from worker.upscaler.picture import Picture
from worker.upscaler.plan import Size
width, height = int(sys.argv[2]), int(sys.argv[3])
size, output_format = Size(width=width, height=height), OutputFormat(sys.argv[1])
bands = int(sys.argv[4])
strip = np.tile(np.random.default_rng(0).integers(0, 256, (256, 64, bands), np.uint8), (1, width // 64, 1))
strip = strip if sys.argv[5] == "noise" else np.full_like(strip, 99)
def strips():
    for _ in range(height // 256):
        yield Picture(strip[..., :3].copy(), strip[..., 3].copy() if bands == 4 else None)
def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
with tempfile.TemporaryFile() as file:
    encode(iter([Picture(strip[:1, :64, :3])]), Size(width=64, height=1), output_format, 90, file).result()
    before = peak()
    encode(strips(), size, output_format, 95, file).result()
print(peak() - before, peak_bytes(size, output_format, alpha=bands == 4) + 4 * strip.nbytes)
"""


def _measured(*arguments: object) -> tuple[int, int]:
    """Return how much memory encoding a picture took in a process of its own, and what was foretold, strips and all."""
    command = [sys.executable, "-c", _PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": "."})
    taken, foretold = done.stdout.split()
    assert not done.stderr
    return int(taken), int(foretold)


@pytest.mark.parametrize("output_format", ["png", "jpg"])
def test_a_tall_picture_is_encoded_in_the_memory_of_some_strips(output_format: str) -> None:
    taken, foretold = _measured(output_format, 2048, 16_640, 3, "flat")
    assert taken < foretold
    assert taken < 2048 * 16_640 * 3 / 4


@pytest.mark.parametrize(("output_format", "bands"), [("jpg", 3), ("webp", 4)])
def test_what_memory_encoding_a_whole_picture_takes_is_foretold(output_format: str, bands: int) -> None:
    taken, foretold = _measured(output_format, 512, 512, bands, "noise")
    assert foretold / 8 < taken < foretold


def test_what_is_foretold_grows_with_the_picture_and_is_small_for_a_small_one() -> None:
    for output_format in OutputFormat:
        small, large = (Size(width=side, height=side) for side in (100, 10_000))
        assert peak_bytes(small, output_format, alpha=False) < 1 << 20
        assert peak_bytes(small, output_format, alpha=True) < peak_bytes(large, output_format, alpha=True)
    assert peak_bytes(Size(width=16_384, height=16_384), OutputFormat.JPG, alpha=False) < 1 << 28


@pytest.mark.parametrize(
    ("output_format", "alpha", "measured"),
    [(OutputFormat.JPG, False, 13.6), (OutputFormat.WEBP, False, 13.4), (OutputFormat.WEBP, True, 40.7)],
)
def test_what_is_foretold_is_what_noise_took_and_a_little_more(
    output_format: OutputFormat, measured: float, *, alpha: bool
) -> None:
    size = Size(width=4096, height=4096)
    assert measured < peak_bytes(size, output_format, alpha=alpha) / 4096**2 < 1.5 * measured


# Thumbnails -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output_format", OutputFormat)
@pytest.mark.parametrize(
    ("size", "expected"), [((8, 6), (8, 6)), ((300, 200), (75, 50)), ((200, 300), (50, 75)), ((4, 900), (4, 800))]
)
def test_a_thumbnail_is_as_small_as_asked_and_never_enlarged(
    output_format: OutputFormat, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    picture = photo(size[1], size[0], alpha=True)
    with unnamed() as file:
        encode(iter([picture]), Size(width=size[0], height=size[1]), output_format, 95, file).result()
        seen = thumbnail(file, 50)
    assert (seen.shape, seen.dtype) == ((expected[1], expected[0], 3), np.uint8)


def test_a_thumbnail_looks_like_its_picture_and_shows_what_is_transparent_too() -> None:
    rgb = np.zeros((400, 300, 3), np.uint8)
    rgb[:200, :, 0], rgb[200:, :, 2] = 250, 120
    with unnamed() as file:
        picture = Picture(rgb, np.zeros((400, 300), np.uint8))
        encode(cut(picture, 64), Size(width=300, height=400), OutputFormat.PNG, 90, file).result()
        seen = thumbnail(file, 30)
    assert seen.shape == (40, 30, 3)
    assert seen[5, 5].tolist() == [250, 0, 0]
    assert seen[35, 25].tolist() == [0, 0, 120]
