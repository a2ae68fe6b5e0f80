"""Files of pictures, damaged in every way that a seed may say: by bits, by bytes, and by the parts of their format."""

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from random import Random
from typing import Any, NamedTuple

from PIL import ExifTags, Image, ImageCms, PngImagePlugin

_PNG = b"\x89PNG\r\n\x1a\n"

_EXTREMES = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x100, 0x3FFF, 0x4000, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF]


_BOMB = zlib.compress(bytes(3_000_000))


class Part(NamedTuple):
    """A chunk or a segment, without lengths and checksums; the last of a JPEG holds all from the first scan on."""

    name: bytes
    body: bytes


def files(seed: int, count: int) -> Iterator[bytes]:
    """Make `count` damaged files, the same ones for the same seed."""
    dice, whole = Random(seed), _whole()  # noqa: S311  # repeatable is what it has to be
    for turn in range(count):
        data = whole[turn % len(whole)]
        for _ in range(dice.choice((1, 1, 1, 2, 3))):
            if len(data) > 16:  # of less there is nothing left to damage
                data = dice.choice(_DAMAGES)(dice, data, whole)
        yield data


def _whole() -> list[bytes]:
    """Draw small pictures of every kind that is read."""
    rgb = Image.effect_mandelbrot((40, 24), (-2.0, -1.2, 1.0, 1.2), 30).convert("RGB").rotate(7)
    rgba, frames = rgb.copy(), [rgb.rotate(turn) for turn in (90, 180)]
    rgba.putalpha(rgb.getchannel("G"))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.XResolution] = 72.0
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
    told: dict[str, Any] = {"exif": exif, "icc_profile": profile}
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Title", "a tree")
    texts.add_text("Comment", "a tree " * 99, zip=True)
    texts.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="3"/>', zip=True)
    palette = rgb.quantize(9)
    saved: list[tuple[Image.Image, str, dict[str, Any]]] = [
        *((rgb.convert(mode), "PNG", {}) for mode in ("1", "L", "LA", "RGB", "RGBA", "I;16")),
        (rgb, "PNG", told | {"pnginfo": texts}),
        (rgb, "PNG", {"transparency": (0, 0, 0)}),
        (palette, "PNG", {"transparency": b"\0\x80", "bits": 4}),
        (rgb, "PNG", {"save_all": True, "append_images": frames}),
        (rgb, "JPEG", told | {"comment": b"a tree"}),
        *((rgb.convert(mode), "JPEG", {"progressive": True}) for mode in ("L", "RGB", "CMYK")),
        (rgb, "JPEG", {"restart_marker_blocks": 1, "subsampling": "4:2:0"}),
        (rgb, "MPO", {"save_all": True, "append_images": frames}),
        *((image, "WEBP", options) for image in (rgb, rgba) for options in (told, {"lossless": True})),
        (rgba, "WEBP", {"save_all": True, "append_images": frames}),
    ]
    return [_saved(*each) for each in saved]


def _saved(image: Image.Image, file_format: str, options: dict[str, Any]) -> bytes:
    file = BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


# Bytes ----------------------------------------------------------------------------------------------------------------


def _flip_bits(dice: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    flipped = bytearray(data)
    for _turn in range(dice.choice((1, 2, 4, 16))):
        flipped[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    return bytes(flipped)


def _set_number(dice: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    size = dice.choice((1, 2, 4))
    number = (dice.choice(_EXTREMES) & (256**size - 1)).to_bytes(size, dice.choice(("big", "little")))
    place = dice.randrange(min(len(data), dice.choice((40, len(data)))))  # most that matters stands in front
    return data[:place] + number + data[place + size :]


def _truncate(dice: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    return data[: dice.randrange(16, max(17, len(data)))]


def _repeat(dice: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    start, stop = sorted((dice.randrange(len(data)), dice.randrange(len(data))))
    return data[:stop] + data[start:stop][:500] * dice.choice((1, 3, 30)) + data[stop:]


def _cut_out(dice: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    start = dice.randrange(16, max(17, len(data)))
    return data[:start] + data[start + dice.choice((1, 2, 50)) :]


def _splice(dice: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    other = dice.choice(others)
    return data[: dice.randrange(12, len(data))][:9999] + other[dice.randrange(len(other)) :]


# Parts ----------------------------------------------------------------------------------------------------------------


def _shuffle_parts(dice: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    parts = _parts(data)
    if not parts:
        return _flip_bits(dice, data, others)
    at, to = dice.randrange(len(parts)), dice.randrange(len(parts) + 1)
    match dice.randrange(5):
        case 0:
            parts.insert(to, parts[at])
        case 1:
            parts.insert(to, parts.pop(at))
        case 2:
            parts.pop(at)
        case 3:
            parts[at:at] = [parts[at]] * dice.choice((10, 300))
        case _:
            stranger = _parts(dice.choice(others))
            parts.insert(to, dice.choice(stranger or parts))
    return _joined(data, parts)


def _edit_part(dice: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    parts = [part for part in _parts(data) if part.body] and _parts(data)
    if not parts:
        return _flip_bits(dice, data, others)
    at = dice.randrange(len(parts))
    name, body = parts[at]
    if body:
        edit = dice.choice((_flip_bits, _set_number, _set_number, _truncate, _repeat))
        body = edit(dice, body, others)
    parts[at] = Part(name, body)
    return _joined(data, parts)


def _add_part(dice: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    parts = _parts(data)
    if not parts:
        return _flip_bits(dice, data, others)
    noise = dice.randbytes(dice.choice((0, 1, 30, 3000)))
    exif = b"II*\0\x08\0\0\0" + struct.pack("<H", dice.choice(_EXTREMES) & 0xFFFF) + noise
    if data.startswith(_PNG):
        key = dice.choice((b"transparency", b"icc_profile", b"interlace", b"exif", b"bbox", b"Raw profile type exif"))
        names = {
            b"iCCP": b"x\0\0" + dice.choice((zlib.compress(noise), _BOMB, noise)),
            b"zTXt": b"x\0\0" + dice.choice((_BOMB, noise)),
            b"iTXt": b"x\0\1\0\0\0" + dice.choice((_BOMB, noise)),
            b"tEXt": key + b"\0" + dice.choice((noise, b"1", b"\n\n\n4949")),
            b"eXIf": exif,
            b"tRNS": noise[:6],
            b"PLTE": noise[:768],
            b"acTL": struct.pack(">II", dice.choice(_EXTREMES), 0),
            b"fcTL": struct.pack(">7I", 0, *(dice.choice(_EXTREMES) for _ in range(4)), 0, 0)[:26],
            b"IHDR": struct.pack(">II", *(dice.choice(_EXTREMES) for _ in range(2))) + bytes([8, 6, 0, 0, 0]),
        }
    elif data.startswith(b"RIFF"):
        canvas = struct.pack("<I", dice.choice(_EXTREMES))[:3] + struct.pack("<I", dice.choice(_EXTREMES))[:3]
        flags = bytes([dice.randrange(256), 0, 0, 0])
        names = {b"ICCP": noise, b"EXIF": exif, b"XMP ": noise, b"ALPH": noise, b"ANMF": noise, b"VP8X": flags + canvas}
    else:
        sides = struct.pack(">HH", *(dice.choice(_EXTREMES) & 0xFFFF for _ in range(2)))
        names = {
            b"\xe1": b"Exif\0\0" + exif,
            b"\xe2": dice.choice((b"ICC_PROFILE\0\1\1" + noise, b"MPF\0" + exif)),
            b"\xed": b"Photoshop 3.0\x008BIM" + noise,
            b"\xee": b"Adobe" + noise,
            b"\xc0": b"\x08" + sides + b"\x03\x01\x22\0\x02\x11\1\x03\x11\1",
            b"\xc2": b"\x08" + sides + b"\x01\x01\x11\0",
            b"\xdb": noise[:65],
            b"\xc4": noise[:200],
            b"\xdd": noise[:2],
            b"\xdc": sides[:2],
        }
    name = dice.choice(sorted(names))
    parts.insert(dice.randrange(len(parts)), Part(name, names[name]))
    return _joined(data, parts)


def _parts(data: bytes) -> list[Part]:
    """Take a file apart; what cannot be told apart any more has none."""
    if data.startswith(_PNG):
        return list(_chunks(data[8:], ">I4s", 4, even=False))
    if data.startswith(b"RIFF"):
        return [Part(name, body) for name, body in _chunks(data[12:], "<4sI", 0, even=True)]
    return list(_segments(data)) if data.startswith(b"\xff\xd8") else []


def _chunks(data: bytes, head: str, checksum: int, *, even: bool) -> Iterator[Part]:
    while len(data) >= 8:
        first, second = struct.unpack(head, data[:8])
        name, length = (first, second) if isinstance(first, bytes) else (second, first)
        yield Part(name, data[8 : 8 + length])
        data = data[8 + length + (length % 2 if even else 0) + checksum :]


def _segments(data: bytes) -> Iterator[Part]:
    data = data[2:]
    while len(data) >= 4 and data[0] == 0xFF and data[1] != 0xDA:
        length = int.from_bytes(data[2:4])
        yield Part(data[1:2], data[4 : 2 + length])
        data = data[2 + max(length, 2) :]
    yield Part(b"", data)


def _joined(data: bytes, parts: Sequence[Part]) -> bytes:
    """Put parts together again, with right lengths and checksums."""
    if data.startswith(_PNG):
        return _PNG + b"".join(
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
            for name, body in parts
        )
    if data.startswith(b"RIFF"):
        body = b"".join(struct.pack("<4sI", name, len(body)) + body + bytes(len(body) % 2) for name, body in parts)
        return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
    return b"\xff\xd8" + b"".join(
        b"\xff" + name + struct.pack(">H", min(len(body) + 2, 0xFFFF)) + body if name else body for name, body in parts
    )


_DAMAGES: list[Callable[[Random, bytes, Sequence[bytes]], bytes]] = [
    *(_flip_bits, _set_number, _truncate, _repeat, _cut_out, _splice),
    *(_shuffle_parts, _edit_part, _edit_part, _add_part, _add_part),
]
