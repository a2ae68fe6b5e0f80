"""Strips to files: what is in them, in how much memory, and what happens when one side fails the other."""

import os
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from core.errors import OutOfMemory, OutputTooLarge, Stopped, StorageUnavailable
from core.options import OutputFormat
from worker.upscaler import encoding
from worker.upscaler.decoding import Limits, decode
from worker.upscaler.encoding import encode, peak_bytes, thumbnail
from worker.upscaler.libvips import pyvips
from worker.upscaler.picture import Levels, Picture
from worker.upscaler.plan import Size

LIMIT = Limits(pixels=10_000_000)


def _pixels(height: int, width: int, *channels: int) -> Levels:
    return np.random.default_rng(7).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def _photo(height: int, width: int, *, alpha: bool) -> Picture:
    """Return a picture that is smooth, so that formats with losses come close."""
    y, x = np.mgrid[:height, :width] / 40
    rgb = np.stack([100 + 80 * np.sin(x), 128 + 60 * np.cos(y), 128 + 40 * np.sin(x + y)], axis=-1)
    return Picture(rgb.astype(np.uint8), (128 + 100 * np.cos(x)).astype(np.uint8) if alpha else None)


def _strips(picture: Picture, height: int) -> Iterator[Picture]:
    for top in range(0, picture.height, height):
        rows = slice(top, top + height)
        yield Picture(picture.rgb[rows], None if picture.alpha is None else picture.alpha[rows])


def _file(picture: Picture, output_format: OutputFormat, quality: int = 90, strip: int = 1000) -> bytes:
    with _unnamed() as file:
        size = Size(width=picture.width, height=picture.height)
        encode(_strips(picture, strip), size, output_format, quality, file).result()
        file.seek(0)
        return file.read()


def _unnamed() -> BinaryIO:
    return tempfile.TemporaryFile(buffering=0)


def _furthest(left: Levels, right: Any) -> int:
    return int(np.abs(left.astype(int) - np.asarray(right).astype(int)).max())


# What is written ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output_format", OutputFormat)
@pytest.mark.parametrize("with_alpha", [False, True])
def test_every_format_is_written_and_read_again(output_format: OutputFormat, *, with_alpha: bool) -> None:
    for size in ((1, 1), (30, 40)):
        rgb, alpha = np.full((*size, 3), (200, 100, 50), np.uint8), np.full(size, 255, np.uint8)
        data = _file(Picture(rgb, alpha if with_alpha else None), output_format, 95)
        assert Image.open(BytesIO(data)).get_format_mimetype() == output_format.content_type
        assert _furthest(decode(data, LIMIT).rgb, rgb) <= (0 if output_format is OutputFormat.PNG else 3)


@pytest.mark.parametrize("output_format", OutputFormat)
@pytest.mark.parametrize("alpha", [False, True])
def test_where_strips_are_cut_does_not_show(output_format: OutputFormat, *, alpha: bool) -> None:
    picture = _photo(83, 101, alpha=alpha)
    whole = _file(picture, output_format)
    assert [_file(picture, output_format, strip=strip) == whole for strip in (1, 7, 82)] == [True] * 3


def test_what_is_read_of_a_strip_in_blocks_is_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rgba = _pixels(53, 47, 4)
    picture = Picture(rgba[..., :3], rgba[..., 3])
    for block in (1, 47 * 10, 47 * 53):
        monkeypatch.setattr(encoding, "_BLOCK_PIXELS", block)
        assert np.array_equal(np.asarray(Image.open(BytesIO(_file(picture, OutputFormat.PNG)))), rgba)


def test_strips_that_are_views_of_something_larger_are_written_as_they_look() -> None:
    rgb = _pixels(40, 60, 3)
    assert np.array_equal(decode(_file(Picture(rgb[5:20, 10:41]), OutputFormat.PNG), LIMIT).rgb, rgb[5:20, 10:41])
    assert np.array_equal(decode(_file(Picture(rgb[::-1, ::-2]), OutputFormat.PNG), LIMIT).rgb, rgb[::-1, ::-2])


def test_png_is_lossless_and_webp_keeps_alpha_exactly() -> None:
    rgba = _pixels(30, 40, 4)
    picture = Picture(rgba[..., :3], rgba[..., 3])
    again = decode(_file(picture, OutputFormat.PNG, 1), LIMIT)
    assert np.array_equal(again.rgb, picture.rgb)
    assert np.array_equal(np.asarray(again.alpha), rgba[..., 3])
    assert np.array_equal(np.asarray(decode(_file(picture, OutputFormat.WEBP, 50), LIMIT).alpha), rgba[..., 3])


def test_jpeg_shows_transparency_on_white_in_linear_light() -> None:
    alpha = np.zeros((200, 16), np.uint8)
    alpha[100:], alpha[150:] = 128, 255
    rgb = decode(_file(Picture(np.zeros((200, 16, 3), np.uint8), alpha), OutputFormat.JPG, 100, 30), LIMIT).rgb
    assert rgb[[50, 120, 180], 8].tolist() == [[255] * 3, [187] * 3, [0] * 3]


def test_quality_buys_size_and_from_90_on_full_colour_resolution() -> None:
    picture = Picture(_pixels(300, 300, 3))
    for output_format in (OutputFormat.JPG, OutputFormat.WEBP):
        sizes = [len(_file(picture, output_format, quality)) for quality in (1, 30, 89, 90, 100)]
        assert sizes == sorted(sizes)
    for quality, sampling in ((89, 2), (90, 0), (100, 0)):
        image = Image.open(BytesIO(_file(picture, OutputFormat.JPG, quality)))
        assert JpegImagePlugin.get_sampling(image) == sampling


def test_files_are_about_as_small_as_pillow_makes_them_from_a_photograph() -> None:
    picture = _photo(300, 400, alpha=False)
    settings: list[tuple[OutputFormat, dict[str, Any]]] = [
        (OutputFormat.PNG, {"format": "PNG", "compress_level": 4}),
        (OutputFormat.JPG, {"format": "JPEG", "quality": 90, "subsampling": "4:4:4", "optimize": True}),
        (OutputFormat.WEBP, {"format": "WEBP", "quality": 90, "method": 2}),
    ]
    for output_format, options in settings:
        file = BytesIO()
        Image.fromarray(picture.rgb).save(file, **options)
        assert len(_file(picture, output_format)) < 1.1 * len(file.getvalue())


def test_a_large_jpeg_is_written_without_code_tables_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = _photo(300, 400, alpha=False)
    optimised = _file(picture, OutputFormat.JPG)
    monkeypatch.setattr(encoding, "_OPTIMISED_PIXELS", 300 * 400 - 1)
    standard = _file(picture, OutputFormat.JPG)
    assert len(standard) > len(optimised)
    assert np.array_equal(decode(standard, LIMIT).rgb, decode(optimised, LIMIT).rgb)


@pytest.mark.parametrize("output_format", OutputFormat)
def test_nothing_but_the_picture_is_in_the_file(output_format: OutputFormat) -> None:
    image = Image.open(BytesIO(_file(_photo(16, 16, alpha=True), output_format)))
    assert not dict(image.getexif())
    assert not {"exif", "icc_profile", "comment", "xmp", "gamma", "srgb"} & set(image.info)
    assert not getattr(image, "text", {})


# What goes wrong ------------------------------------------------------------------------------------------------------


def _encoders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("encoder")]


def _wait_for(holds: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < give_up_at, "it did not come about in time"
        time.sleep(0.01)


@pytest.mark.parametrize("output_format", OutputFormat)
@pytest.mark.parametrize("strips", [0, 1, 5])
def test_an_error_among_the_strips_is_raised_as_it_is_and_leaves_no_thread(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, output_format: OutputFormat, strips: int
) -> None:
    def failing() -> Iterator[Picture]:
        yield from _strips(Picture(_pixels(strips * 8, 64, 3)), 8) if strips else ()
        raise stopped

    stopped = Stopped("Enough.")
    with _unnamed() as file, pytest.raises(Stopped) as raised:
        encode(failing(), Size(width=64, height=800), output_format, 90, file)
    assert raised.value is stopped
    _wait_for(lambda: not _encoders())
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_nothing_is_written_any_more_when_an_error_among_the_strips_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    save, ended = vars(encoding)["_save"], threading.Event()

    def save_slowly(*arguments: Any) -> None:
        try:
            save(*arguments)
        finally:
            time.sleep(0.1)
            ended.set()

    def failing() -> Iterator[Picture]:
        yield Picture(_pixels(8, 64, 3))
        raise Stopped("Enough.")

    monkeypatch.setattr(encoding, "_save", save_slowly)
    with _unnamed() as file:
        with pytest.raises(Stopped):
            encode(failing(), Size(width=64, height=800), OutputFormat.PNG, 90, file)
        assert ended.is_set()
        file.seek(0)
        assert b"IEND" not in file.read()


@pytest.mark.parametrize("output_format", OutputFormat)
def test_a_disk_that_is_full_is_unavailable_storage(
    capfd: pytest.CaptureFixture[str], output_format: OutputFormat
) -> None:
    size = Size(width=64, height=64)
    with Path("/dev/full").open("wb", buffering=0) as full, pytest.raises(StorageUnavailable) as raised:
        encode(iter([Picture(_pixels(64, 64, 3))]), size, output_format, 90, full).result()
    assert isinstance(raised.value.__cause__, pyvips.Error)
    _wait_for(lambda: not _encoders())
    assert capfd.readouterr() == ("", "")


def test_a_disk_that_is_full_ends_the_making_of_strips() -> None:
    given: list[int] = []

    def strips() -> Iterator[Picture]:
        try:
            for number in range(1000):
                given.append(number)
                yield Picture(_pixels(16, 2048, 3))
        finally:
            given.append(-1)

    making = strips()
    with Path("/dev/full").open("wb", buffering=0) as full, pytest.raises(StorageUnavailable):
        encode(making, Size(width=2048, height=16_000), OutputFormat.PNG, 90, full)
    assert given[-1] == -1
    assert len(given) < 100


@pytest.mark.parametrize("output_format", OutputFormat)
@pytest.mark.parametrize("rows", [24, 31, 33, 40, 3200])
def test_strips_of_another_height_than_the_picture_s_are_a_bug_that_is_told(
    output_format: OutputFormat, rows: int
) -> None:
    with _unnamed() as file, pytest.raises(ValueError, match="rows, and not 32"):
        encode(_strips(Picture(_pixels(rows, 9, 3)), 8), Size(width=9, height=32), output_format, 90, file).result()


def test_strips_of_another_width_than_the_picture_s_are_a_bug_that_is_told() -> None:
    with _unnamed() as file, pytest.raises(ValueError, match="broadcast"):
        encode(_strips(Picture(_pixels(32, 9, 3)), 8), Size(width=8, height=32), OutputFormat.PNG, 90, file).result()


def test_a_picture_that_its_format_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputTooLarge, match="16384 x 1 pixels; a webp file holds at most 16383"):
        _file(Picture(np.zeros((1, 16384, 3), np.uint8)), OutputFormat.WEBP)

    def fail(saying: str) -> Callable[..., None]:
        def save(*_: object, **__: object) -> None:
            raise pyvips.Error("unable to call webpsave_target", saying)

        return save

    monkeypatch.setattr(pyvips.Image, "webpsave_target", fail("webpsave: unable to encode\n"), raising=False)
    with pytest.raises(OutputTooLarge, match="A webp file cannot hold so large a picture; a png file can"):
        _file(Picture(_pixels(2, 2, 3)), OutputFormat.WEBP)
    monkeypatch.setattr(pyvips.Image, "webpsave_target", fail("vips_tracked: out of memory --- size == 48MB\n"))
    with pytest.raises(OutOfMemory):
        _file(Picture(_pixels(2, 2, 3)), OutputFormat.WEBP)


def test_memory_that_runs_out_on_the_way_to_the_encoder_is_no_truncated_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> Levels:
        raise MemoryError

    monkeypatch.setattr(encoding, "to_levels", full)
    with pytest.raises(MemoryError):
        _file(_photo(9, 9, alpha=True), OutputFormat.JPG)


def test_a_strip_is_made_while_the_one_before_waits_for_the_one_that_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    third, seen = threading.Event(), list[bool]()
    pack = zlib.crc32

    def wait(*arguments: Any) -> int:
        seen.append(third.wait(5))
        return pack(*arguments)

    def strips() -> Iterator[Picture]:
        yield Picture(_pixels(4, 9, 3))
        yield Picture(_pixels(4, 9, 3))
        third.set()
        yield Picture(_pixels(4, 9, 3))

    monkeypatch.setattr(encoding.zlib, "crc32", wait)
    with _unnamed() as file:
        encode(strips(), Size(width=9, height=12), OutputFormat.PNG, 90, file).result()
    assert set(seen) == {True}


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
    picture = _photo(size[1], size[0], alpha=True)
    with _unnamed() as file:
        encode(iter([picture]), Size(width=size[0], height=size[1]), output_format, 95, file).result()
        seen = thumbnail(file, 50)
    assert (seen.shape, seen.dtype) == ((expected[1], expected[0], 3), np.uint8)


def test_a_thumbnail_looks_like_its_picture_and_shows_what_is_transparent_too() -> None:
    rgb = np.zeros((400, 300, 3), np.uint8)
    rgb[:200, :, 0], rgb[200:, :, 2] = 250, 120
    with _unnamed() as file:
        picture = Picture(rgb, np.zeros((400, 300), np.uint8))
        encode(_strips(picture, 64), Size(width=300, height=400), OutputFormat.PNG, 90, file).result()
        seen = thumbnail(file, 30)
    assert seen.shape == (40, 30, 3)
    assert seen[5, 5].tolist() == [250, 0, 0]
    assert seen[35, 25].tolist() == [0, 0, 120]
