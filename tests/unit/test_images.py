"""Files to pictures and back."""

import logging
import random
import struct
import time
import tracemalloc
import warnings
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import ExifTags, Image, ImageCms

from core.errors import InputNotImage, InputTooLarge, OutOfMemory, OutputTooLarge
from core.options import OutputFormat
from worker.upscaler.engine import Levels, Picture
from worker.upscaler.images import decode, encode, to_levels, to_linear

FORMATS = ("PNG", "JPEG", "WEBP")
LIMIT = 1_000_000


def _pixels(height: int, width: int, *channels: int) -> Levels:
    return np.random.default_rng(7).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def _file(image: Image.Image | Levels, file_format: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, file_format, **options)
    return file.getvalue()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(size: tuple[int, int], depth: int, colour: int, rows: list[bytes], *extra: bytes) -> bytes:
    """Write by hand what Pillow does not: 16 bit colours, 2 and 4 bit grey with a transparent one."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    body = _chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + body + _chunk(b"IEND", b"")


def _profile(space: bytes, **tags: bytes) -> bytes:
    """Write an ICC profile (ICC.1:2001-04) of the given colour space and tags."""
    table, data, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, tag in tags.items():
        table += struct.pack(">4sII", name.encode(), start + len(data), len(tag))
        data += tag + b"\0" * (-len(tag) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(data), b"lcms", 0x02400000, b"mntr", space, b"XYZ " * (space != b"CMYK"))
    head = head[:12] + (b"prtr" if space == b"CMYK" else b"mntr") + space + (b"Lab " if space == b"CMYK" else b"XYZ ")
    white = struct.pack(">iii", 63190, 65536, 54061)
    return head.ljust(36, b"\0") + (b"acsp".ljust(32, b"\0") + white).ljust(92, b"\0") + struct.pack(">I", len(tags)) + table + data
