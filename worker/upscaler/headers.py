"""What a file says of itself before a decoder has touched it: its format, and how many parts it is made of."""

import re
from typing import Literal, TypeAlias

from core.errors import InputTooLarge

Kind: TypeAlias = Literal["PNG", "JPEG", "WEBP"]

MAX_CHUNKS = 65_536
"""Chunks of a PNG; encoders that write one for each row of pixels stay below."""

MAX_SEGMENTS = 2_048
"""Segments of a JPEG; the longest profile takes 255, and 25 MiB of metadata 400."""

MAX_SCANS = 256
"""Scans of a progressive JPEG, each of which goes over the whole picture; encoders write 10, optimisers up to 64."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
"""A marker of JPEG that is neither an escaped sample nor a restart."""

_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9

_BARE = {0xC8, 0xD8, _END_OF_IMAGE, *range(0xF0, 0xFE)}
"""Markers that no length follows, as Pillow reads them."""


def kind(data: bytes) -> Kind | None:
    """Tell the format by the first bytes; None for all that is not read here."""
    if data.startswith(_PNG_SIGNATURE):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    return None


def check_parts(data: bytes) -> None:
    """Refuse a file of so many parts that reading it would take minutes, whatever the size of the picture.

    What lies behind the end of the picture, a film or further pictures, is nobody's concern.

    Raises:
        InputTooLarge: there are more chunks, segments or scans than honest files have.
    """
    match kind(data):
        case "PNG":
            _check_chunks(data)
        case "JPEG":
            _check_segments(data)
        case _:
            pass  # WebP's are read by C code, which has no time for minutes


def _check_chunks(data: bytes) -> None:
    position, count = len(_PNG_SIGNATURE), 0
    while position + 8 <= len(data):
        count += 1
        if count > MAX_CHUNKS:
            raise InputTooLarge(f"The picture's file has more than {MAX_CHUNKS} chunks.")
        if data[position + 4 : position + 8] == b"IEND":
            return
        position += 12 + int.from_bytes(data[position : position + 4])


def _check_segments(data: bytes) -> None:
    position, segments, scans = 0, 0, 0
    while found := _MARKER.search(data, position):
        marker, position = found[1][0], found.end()
        if marker == _END_OF_IMAGE and scans:
            return
        segments, scans = segments + 1, scans + (marker == _START_OF_SCAN)
        if segments > MAX_SEGMENTS or scans > MAX_SCANS:
            parts = f"{MAX_SCANS} scans" if scans > MAX_SCANS else f"{MAX_SEGMENTS} segments"
            raise InputTooLarge(f"The picture's file has more than {parts}.")
        if marker not in _BARE:
            position += int.from_bytes(data[position : position + 2])


def webp_size(data: bytes) -> tuple[int, int]:
    """Read the size of a WebP's canvas (RFC 9649, RFC 6386); 0 by 0 where there is none to be found."""
    match data[12:16]:
        case b"VP8X" if len(data) >= 30:
            return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
        case b"VP8L" if len(data) >= 25:
            sides = int.from_bytes(data[21:25], "little")
            return (sides & 0x3FFF) + 1, (sides >> 14 & 0x3FFF) + 1
        case b"VP8 " if len(data) >= 30:
            return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
        case _:
            return 0, 0
