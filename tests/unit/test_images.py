"""Files to pictures."""

import logging
import resource
import struct
import time
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, WebPImagePlugin

from core.errors import InputNotImage, InputTooLarge, OutOfMemory
from worker.upscaler.decoding import Limits, decode
from worker.upscaler.light import to_levels, to_linear
from worker.upscaler.picture import Levels

LIMIT = Limits(pixels=1_000_000)
FORMATS: list[tuple[str, dict[str, Any]]] = [("PNG", {}), ("JPEG", {"quality": 95}), ("WEBP", {"lossless": True})]
SRGB_TO_XYZ = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
P3_TO_XYZ = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])


def _pixels(height: int, width: int, *channels: int) -> Levels:
    return np.random.default_rng(7).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def _file(image: Image.Image | Levels, file_format: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, file_format, **options)
    return file.getvalue()


def _png(size: tuple[int, int], depth: int, colour: int, rows: list[bytes], transparent: bytes = b"") -> bytes:
    """Write what Pillow cannot: 16 bit colours, 2 and 4 bit grey, a transparent colour for them."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + (transparent and chunk(b"tRNS", transparent)) + body + chunk(b"IEND", b"")


def _profile(space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """Write an ICC profile of version 2.4."""
    table, data, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, tag in tags.items():
        table += struct.pack(">4sII", name, start + len(data), len(tag))
        data += tag + b"\0" * (-len(tag) % 4)
    header = struct.pack(
        ">I4xI4s4s4s12x4s28x3i48x",
        *(start + len(data), 0x02400000, b"scnr", space, connection, b"acsp", 63190, 65536, 54061),
    )
    return header + struct.pack(">I", len(tags)) + table + data


STRAIGHT = struct.pack(">4s4xI", b"curv", 0)
D50 = struct.pack(">4s4x3i", b"XYZ ", 63190, 65536, 54061)


def _fixed(numbers: Any) -> bytes:
    return b"".join(struct.pack(">i", round(float(number) * 65536)) for number in np.ravel(numbers))


def _linear_p3() -> bytes:
    """Display P3's primaries, but samples in proportion to light."""
    columns = {name: b"XYZ \0\0\0\0" + _fixed(P3_TO_XYZ[:, at]) for at, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    return _profile(b"RGB ", b"XYZ ", columns | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), STRAIGHT))


def _inks() -> bytes:
    """Four inks that are all grey: each of cyan, magenta and yellow takes a third of lightness, black all of it."""
    nodes = np.indices((2, 2, 2, 2)).reshape(4, 16)
    lightness = 255 * (1 - nodes[:3].sum(axis=0) / 3) * (1 - nodes[3])
    grid = np.stack([lightness, np.full(16, 128), np.full(16, 128)], axis=-1).astype(np.uint8).tobytes()
    straight = bytes(range(256))
    table = b"mft1\0\0\0\0\x04\x03\x02\0" + _fixed(np.eye(3)) + 4 * straight + grid + 3 * straight
    return _profile(b"CMYK", b"Lab ", {b"A2B0": table})


def _furthest(left: Levels, right: Any) -> int:
    return int(np.abs(left.astype(int) - np.asarray(right).astype(int)).max())


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"\x89PNG", b"hello, I am photo.png", b"\xff\xd8\xff\xd9"])
def test_what_is_no_picture_is_refused_whatever_it_is_called(data: bytes) -> None:
    with pytest.raises(InputNotImage, match=r"not a PNG, JPEG or WebP picture\.$"):
        decode(data, LIMIT)


@pytest.mark.parametrize("file_format", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_other_formats_are_refused(file_format: str) -> None:
    with pytest.raises(InputNotImage):
        decode(_file(_pixels(16, 16, 3), file_format), LIMIT)


@pytest.mark.parametrize(("file_format", "options"), [*FORMATS, ("WEBP", {}), ("JPEG", {"progressive": True})])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_refused_as_not_an_image(file_format: str, options: dict[str, Any], share: float) -> None:
    data = _file(_pixels(90, 120, 3), file_format, **options)
    with pytest.raises(InputNotImage) as refused:
        decode(data[: int(len(data) * share)], LIMIT)
    assert str(refused.value).startswith("The picture is damaged or incomplete: ")
    assert refused.value.__cause__ is not None


@pytest.mark.parametrize(
    "data",
    [
        _png((60_000, 60_000), 8, 2, []),
        bytes.fromhex("ffd8ffc0001108ea60ea6003012200021101031101ffda000c03010002110311003f00"),
        b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + (59_999).to_bytes(3, "little") * 2 + bytes(8),
    ],
    ids=["PNG", "JPEG", "WEBP"],
)
def test_a_bomb_is_refused_by_its_header_at_once_and_without_memory(data: bytes) -> None:
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputTooLarge, match=r"60000 x 60000 = 3600000000 pixels; the limit is 1000000\.$"):
        decode(data, LIMIT)
    assert time.monotonic() - began < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


@pytest.mark.parametrize(("file_format", "options"), FORMATS)
def test_the_callers_limit_decides_and_not_pillows(
    monkeypatch: pytest.MonkeyPatch, file_format: str, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = _file(_pixels(20, 30, 3), file_format, **options)
    assert decode(data, Limits(pixels=600)).width == 30
    with pytest.raises(InputTooLarge, match="30 x 20 = 600 pixels; the limit is 599"):
        decode(data, Limits(pixels=599))


@pytest.mark.parametrize(("file_format", "options"), [*FORMATS, ("WEBP", {})])
def test_the_longest_side_is_limited_too(file_format: str, options: dict[str, Any]) -> None:
    data = _file(_pixels(20, 30, 3), file_format, **options)
    assert decode(data, Limits(pixels=600, side=30)).width == 30
    with pytest.raises(InputTooLarge, match=r"30 x 20 pixels; the limit is 29 on a side\.$"):
        decode(data, Limits(pixels=600, side=29))


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0"}], ids=["VP8", "VP8L", "VP8X"])
def test_a_webp_s_canvas_is_refused_before_libwebp_allocates_it(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    data = _file(_pixels(20, 30, 3), "WEBP", **options)
    monkeypatch.delattr(WebPImagePlugin, "_webp")
    with pytest.raises(InputTooLarge, match="30 x 20 = 600 pixels"):
        decode(data, Limits(pixels=599))
    with pytest.raises(InputTooLarge, match="of memory"):
        decode(data, Limits(pixels=600, memory_bytes=12_000))


def test_a_file_of_more_chunks_segments_or_scans_than_honest_ones_have_is_refused_at_once() -> None:
    rgb = _pixels(16, 16, 3)
    png, jpeg, many = _file(rgb), _file(rgb, "JPEG"), _file(rgb, "JPEG", progressive=True)
    header, scan = png.index(b"IDAT") - 4, many.index(b"\xff\xda")
    honest = decode(png, LIMIT), decode(jpeg, LIMIT), decode(many, LIMIT)
    chunk = struct.pack(">I4sI", 0, b"prVt", zlib.crc32(b"prVt"))
    next_scan = many.index(b"\xff\xc4", scan)
    cases: list[tuple[str, Callable[[int], bytes], int]] = [
        ("chunks", lambda times: png[:header] + chunk * times + png[header:], 65_000),
        ("segments", lambda times: jpeg[:2] + b"\xff\xfe\0\x03x" * times + jpeg[2:], 2_000),
        ("scans", lambda times: many[:scan] + many[scan:next_scan] * times + many[scan:], 240),
    ]
    for (named, made, enough), picture in zip(cases, honest, strict=True):
        assert np.array_equal(decode(made(enough), LIMIT).rgb, picture.rgb)
        began = time.monotonic()
        with pytest.raises(InputTooLarge, match=f"more than [0-9]+ {named}"):
            decode(made(2 * enough), LIMIT)
        assert time.monotonic() - began < 0.5


def test_what_only_looks_like_a_part_is_not_counted() -> None:
    jpeg = _file(_pixels(16, 16, 3), "JPEG", progressive=True)
    behind = jpeg + b"\xff\xc8" * 100_000
    within = jpeg[:2] + b"\xff\xfe" + struct.pack(">H", 60_002) + b"\xff\xda" * 30_000 + jpeg[2:]
    assert decode(_file(_pixels(16, 16, 3)) + bytes(1_000_000), LIMIT).width == 16
    for data in (behind, within):
        assert np.array_equal(decode(data, LIMIT).rgb, decode(jpeg, LIMIT).rgb)


@pytest.mark.parametrize("kind", ["iCCP", "zTXt", "iTXt"])
def test_a_png_s_compressed_text_or_profile_is_not_inflated_beyond_bounds(kind: str) -> None:
    bomb = {"iCCP": b"x\0\0", "zTXt": b"x\0\0", "iTXt": b"x\0\1\0\0\0"}[kind] + zlib.compress(bytes(1 << 25))
    png = _file(_pixels(4, 4, 3))
    name = kind.encode()
    chunk = struct.pack(">I", len(bomb)) + name + bomb + struct.pack(">I", zlib.crc32(name + bomb))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputNotImage, match="too large"):
        decode(png[:33] + chunk + png[33:], LIMIT)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


def test_more_samples_than_a_png_s_header_promises_are_not_inflated() -> None:
    rows = [bytes(12)] * 4 + [bytes(1 << 20)] * 64
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = _png((4, 4), 8, 2, rows)
    made = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert decode(data, LIMIT).rgb.shape == (4, 4, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - max(made, before) < 20_000


def test_exif_data_whose_entries_all_claim_the_whole_file_cost_no_more_than_the_file() -> None:
    entries = b"".join(struct.pack("<HHII", tag, 7, 400_000, 0) for tag in range(1, 40_000))
    exif = b"II*\0\x08\0\0\0" + struct.pack("<H", 39_999) + entries
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert decode(_file(_pixels(4, 4, 3), exif=b"Exif\0\0" + exif), LIMIT).width == 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000


def test_a_picture_that_memory_cannot_hold_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    data = _file(_pixels(2, 2, 3))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", full)
    with pytest.raises(OutOfMemory):
        decode(data, LIMIT)


# What is read ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("file_format", "options"), FORMATS)
@pytest.mark.parametrize("size", [(1, 1), (7, 5)])
def test_all_three_formats_are_read(file_format: str, options: dict[str, Any], size: tuple[int, int]) -> None:
    rgb = np.full((*size, 3), (200, 100, 50), np.uint8)
    picture = decode(_file(rgb, file_format, **options), LIMIT)
    assert picture.alpha is None
    assert _furthest(picture.rgb, rgb) <= (2 if file_format == "JPEG" else 0)


def test_a_picture_of_many_bands_is_copied_whole() -> None:
    rgba = _pixels(700, 900, 4)
    picture = decode(_file(rgba, compress_level=1), LIMIT)
    assert np.array_equal(picture.rgb, rgba[..., :3])
    assert np.array_equal(np.asarray(picture.alpha), rgba[..., 3])


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_pictures_without_alpha_become_what_pillow_shows(mode: str) -> None:
    image = Image.fromarray(_pixels(9, 11, 3)).convert(mode)
    picture = decode(_file(image), LIMIT)
    assert picture.alpha is None
    assert np.array_equal(picture.rgb, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(("file_format", "options"), [("PNG", {}), ("WEBP", {"lossless": True, "exact": True})])
def test_alpha_and_the_colours_under_it_are_kept(file_format: str, options: dict[str, Any]) -> None:
    rgba = _pixels(9, 11, 4)
    rgba[0, 0, 3] = 0
    picture = decode(_file(rgba, file_format, **options), LIMIT)
    assert np.array_equal(picture.rgb, rgba[..., :3])
    assert np.array_equal(np.asarray(picture.alpha), rgba[..., 3])


@pytest.mark.parametrize(
    ("data", "rgb", "alpha"),
    [
        (_file(Image.merge("LA", [Image.new("L", (1, 1), 9), Image.new("L", (1, 1), 77)])), [[9, 9, 9]], [77]),
        (_file(np.array([[3, 4]], np.uint8), transparency=4), [[3] * 3, [4] * 3], [255, 0]),
        (_file(np.array([[(1, 2, 3), (1, 2, 4)]], np.uint8), transparency=(1, 2, 3)), [[1, 2, 3], [1, 2, 4]], [0, 255]),
        (_png((2, 1), 4, 0, [b"\x3f"], b"\0\3"), [[51] * 3, [255] * 3], [0, 255]),
        (_png((2, 1), 2, 0, [b"\x70"], b"\0\1"), [[85] * 3, [255] * 3], [0, 255]),
        (_png((2, 1), 1, 0, [b"\x40"], b"\0\1"), [[0] * 3, [255] * 3], [255, 0]),
        (_png((2, 1), 16, 0, [struct.pack(">2H", 300, 65535)], struct.pack(">H", 300)), [[1] * 3, [255] * 3], [0, 255]),
        (
            _png((2, 1), 16, 2, [struct.pack(">6H", 65535, 0, 300, 9, 9, 9)], struct.pack(">3H", 65535, 0, 300)),
            [[255, 0, 1], [0, 0, 0]],
            [0, 255],
        ),
    ],
    ids=["LA", "L key", "RGB key", "4 bit key", "2 bit key", "1 bit key", "16 bit grey key", "16 bit RGB key"],
)
def test_every_way_to_say_transparent_is_understood(data: bytes, rgb: list[list[int]], alpha: list[int]) -> None:
    picture = decode(data, LIMIT)
    assert picture.rgb[0].tolist() == rgb
    assert picture.alpha is not None
    assert picture.alpha[0].tolist() == alpha


@pytest.mark.parametrize("table", [b"\x0a\xff\x80", b"\xff\x00"])
def test_a_palette_may_hold_alpha(table: bytes) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    picture = decode(_file(image, transparency=table), LIMIT)
    assert picture.rgb[0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert picture.alpha is not None
    assert picture.alpha[0].tolist() == list(table.ljust(3, b"\xff"))


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_become_eight_by_scale_and_are_not_cut_off(colour: int, channels: int) -> None:
    samples = np.linspace(0, 65535, 64 * channels).astype(">u2")
    picture = decode(_png((64, 1), 16, colour, [samples.tobytes()]), LIMIT)
    seen = picture.rgb[0] if picture.alpha is None else np.dstack((picture.rgb, picture.alpha))[0]
    exact = samples.reshape(64, channels) / 257
    exact = exact[:, {1: [0, 0, 0], 2: [0, 0, 0, 1], 3: [0, 1, 2], 4: [0, 1, 2, 3]}[channels]]
    assert np.abs(seen - exact).max() <= (0.5 if channels == 1 else 1)
    assert {seen.min(), seen.max()} == {0, 255}


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame_counts(file_format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options: dict[str, Any] = {"lossless": True} if file_format == "WEBP" else {}
    picture = decode(_file(frames[0], file_format, save_all=True, append_images=frames[1:], **options), LIMIT)
    assert (picture.rgb == (255, 0, 0)).all()


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_of_an_animation_no_further_frame_is_decoded(file_format: str) -> None:
    frames = [Image.fromarray(_pixels(40, 40, 3)).rotate(turn) for turn in (0, 90, 180)]
    options: dict[str, Any] = {"lossless": True} if file_format == "WEBP" else {}
    whole = _file(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    damaged = bytearray(whole)
    for place in range(len(damaged) - 800, len(damaged) - 100):
        damaged[place] ^= 0x55
    assert _last_frame(bytes(damaged)) != _last_frame(whole)
    assert np.array_equal(decode(bytes(damaged), LIMIT).rgb, decode(whole, LIMIT).rgb)


def _last_frame(data: bytes) -> bytes:
    with Image.open(BytesIO(data)) as image:
        image.seek(2)
        try:
            return image.tobytes()
        except (OSError, SyntaxError):
            return b"damaged"


def test_of_a_jpeg_of_several_pictures_the_first_counts_whatever_its_index_says() -> None:
    frames = [Image.fromarray(_pixels(16, 16, 3)).rotate(turn) for turn in (0, 90)]
    data = _file(frames[0], "MPO", save_all=True, append_images=frames[1:])
    index = data.index(b"MPF\0") + 4
    for broken in (
        data,
        data[:index] + bytes(40) + data[index + 40 :],
        data[:index] + b"\xff" * 60 + data[index + 60 :],
    ):
        assert np.array_equal(decode(broken, LIMIT).rgb, decode(_file(frames[0], "JPEG"), LIMIT).rgb)


def test_a_png_whose_palette_is_missing_is_refused() -> None:
    """Found by damaging files at random: Pillow asserts that there is one."""
    with pytest.raises(InputNotImage):
        decode(_png((4, 4), 8, 3, [bytes(4)] * 4), LIMIT)


@pytest.mark.parametrize("key", [b"transparency", b"icc_profile", b"interlace", b"exif", b"bbox", b"duration"])
def test_a_text_that_is_named_like_something_else_is_text(key: bytes) -> None:
    png = _file(_pixels(4, 4, 3))
    body = b"tEXt" + key + b"\0some words"
    data = png[:33] + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) + png[33:]
    try:
        assert np.array_equal(decode(data, LIMIT).rgb, _pixels(4, 4, 3))
    except InputNotImage:
        assert key in (b"transparency", b"bbox", b"interlace")


@pytest.mark.parametrize(("file_format", "options"), FORMATS)
def test_a_picture_is_turned_upright_from_all_eight_orientations(file_format: str, options: dict[str, Any]) -> None:
    upright = np.kron(np.array([[0, 60, 120], [180, 240, 90]], np.uint8), np.ones((16, 16), np.uint8))
    turned = [upright, upright[:, ::-1], upright[::-1, ::-1], upright[::-1], upright.T]
    turned += [np.rot90(upright), np.rot90(upright, 2).T, np.rot90(upright, -1)]
    for orientation, stored in enumerate(turned, start=1):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        rgba = np.dstack([stored] * (4 if file_format == "PNG" else 3))
        picture = decode(_file(rgba, file_format, exif=exif, **options), LIMIT)
        assert _furthest(picture.rgb[..., 0], upright) <= (3 if file_format == "JPEG" else 0), orientation
        assert picture.alpha is None or np.array_equal(picture.alpha, upright), orientation


def test_broken_exif_data_is_ignored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    picture = decode(_file(_pixels(4, 4, 3), exif=b"Exif\0\0no TIFF at all"), LIMIT)
    assert np.array_equal(picture.rgb, _pixels(4, 4, 3))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


# Colour ---------------------------------------------------------------------------------------------------------------


def test_samples_survive_linear_light_and_come_back_rounded_to_the_nearest() -> None:
    levels = np.arange(256, dtype=np.uint8)
    assert np.array_equal(to_levels(to_linear(levels)), levels)
    linear = np.random.default_rng(3).random(100_000, np.float32) ** 3
    exact = 255 * np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.abs(to_levels(linear) - exact).max() < 0.53


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_a_profile_of_srgb_changes_nothing(file_format: str) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
    rgba = _pixels(40, 40, 4) | np.array([0, 0, 0, 1], np.uint8)
    picture = decode(
        _file(rgba, file_format, icc_profile=srgb, **({"lossless": True} if file_format == "WEBP" else {})), LIMIT
    )
    assert _furthest(picture.rgb, rgba[..., :3]) <= 1
    assert np.array_equal(np.asarray(picture.alpha), rgba[..., 3])


def test_a_wide_profile_is_converted_to_srgb() -> None:
    stored = np.array([[[128, 100, 100], [40, 60, 50], [0, 255, 0], [255, 255, 255], [90, 90, 90]]], np.uint8)
    linear = (stored / 255) @ (np.linalg.inv(SRGB_TO_XYZ) @ P3_TO_XYZ).T
    picture = decode(_file(stored, icc_profile=_linear_p3()), LIMIT)
    assert _furthest(picture.rgb, to_levels(linear.clip(0, 1).astype(np.float32))) <= 1
    assert _furthest(picture.rgb, stored) > 40


@pytest.mark.parametrize("image", [Image.new("L", (2, 2), 100), Image.new("LA", (2, 2), (100, 9))])
def test_grey_goes_through_a_profile_of_grey_or_of_colours(image: Image.Image) -> None:
    expected = to_levels(np.float32(100 / 255) * np.ones(3, np.float32)).tolist()
    for profile in (_profile(b"GRAY", b"XYZ ", {b"kTRC": STRAIGHT, b"wtpt": D50}), _linear_p3()):
        assert decode(_file(image, icc_profile=profile), LIMIT).rgb[0, 0].tolist() == pytest.approx(expected, abs=1)


def test_inks_go_through_their_profile_and_without_one_become_what_pillow_shows() -> None:
    inks = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    red, green, blue = decode(_file(inks, "JPEG", icc_profile=_inks()), LIMIT).rgb[0, 0].tolist()
    assert red == pytest.approx(161, abs=3)
    assert max(red, green, blue) - min(red, green, blue) <= 2
    # Adobe stores inks inverted, and so does Pillow: no ink must stay white.
    assert _furthest(decode(_file(inks, "JPEG"), LIMIT).rgb, (0, 255, 255)) <= 2
    assert (decode(_file(Image.new("CMYK", (8, 8)), "JPEG"), LIMIT).rgb == 255).all()


@pytest.mark.parametrize(
    "profile", [b"garbage", b"garbage" * 99, _linear_p3()[:200], _inks(), _profile(b"Lab ", b"XYZ ", {})]
)
def test_a_profile_that_is_broken_or_does_not_fit_is_ignored_with_a_warning(
    profile: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    picture = decode(_file(_pixels(4, 4, 3), icc_profile=profile), LIMIT)
    assert np.array_equal(picture.rgb, _pixels(4, 4, 3))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
