"""Files to pictures: bounds, decoding, orientation, alpha, colour. `decoder.py` does it in a process of its own."""

import logging
import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import (
    ExifTags,
    Image,
    ImageCms,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from core.errors import InputNotImage, InputTooLarge, OutOfMemory
from worker.upscaler.headers import check_parts, kind, webp_size
from worker.upscaler.picture import Levels, Picture

logger = logging.getLogger(__name__)

_ = TiffImagePlugin
"""Pillow loads it to read EXIF data, when in the decoder's process no file can be opened any more."""

_BAD_FILE = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error, zlib.error),
    *(ZeroDivisionError, AttributeError, AssertionError),
)
"""What Pillow raises, format by format, when the bytes of a file are wrong."""

_READERS: dict[str, type[ImageFile.ImageFile]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
}
"""The allow-list: no other reader of Pillow's is ever asked, the one for JPEGs of several pictures neither."""

_PNG_DEPTH_AT = 24
"""Where a PNG states its bits per sample: after the signature, the first chunk's length and name, width and height."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""From the EXIF orientation to what undoes it."""

_TEXT_BYTES = 96 << 20
"""The most that Pillow inflates of a PNG's texts is 64 MiB, and as it does so it holds one of them twice."""

_BAND_PIXELS = 1 << 18
"""How much of a picture is copied at once."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a picture may be."""

    pixels: int
    side: int = sys.maxsize
    memory_bytes: int = sys.maxsize


@dataclass(frozen=True, slots=True)
class Header:
    """What is known of a picture before a pixel is decoded; a picture that lies on its side has its sides swapped."""

    width: int
    height: int
    alpha: bool
    peak_bytes: int
    """How much memory decoding it takes at most, beyond the process itself."""


def approve_all(_: Header) -> None:
    pass


def decode(data: bytes, limits: Limits, approve: Callable[[Header], None] = approve_all) -> Picture:
    """Read a PNG, JPEG or WebP file, known by its content: upright, in sRGB, 8 bit, without metadata.

    Of an animation the first frame counts. Size and memory are checked before a pixel is decoded; then `approve` may
    raise. Transparency stays, however the file says it. A colour profile that is broken or does not fit is ignored with
    a warning in the log.

    Raises:
        InputNotImage: the file is something else, damaged or incomplete.
        InputTooLarge: the picture passes the limits, or its file has more parts than honest ones.
        OutOfMemory: the decoded picture does not fit.
    """
    try:
        # What Pillow warns of is metadata that it can do without.
        with warnings.catch_warnings(action="ignore"), _opened(data, limits) as image:
            with _damage_refused():
                header = Header(*image.size, image.has_transparency_data, _peak_bytes(image, data))
            _check_memory(image.size, header.peak_bytes, limits)
            approve(header)
            with _damage_refused():
                image.load()
                return _picture(image, data)
    except MemoryError as error:
        raise OutOfMemory("There is not enough memory to decode the picture.") from error


def _opened(data: bytes, limits: Limits) -> ImageFile.ImageFile:
    """Read the header only."""
    # One limit decides, the caller's. Pillow's is a global of the process, and up to twice of it only warns.
    Image.MAX_IMAGE_PIXELS = None
    reader = _READERS.get(kind(data) or "")
    if reader is None:
        raise InputNotImage("The input is not a PNG, JPEG or WebP picture.")
    check_parts(data)
    if reader is WebPImagePlugin.WebPImageFile:
        # Pillow lets libwebp allocate the canvas while it opens the file, so here all is checked before that.
        size = webp_size(data)
        _check_size(size, limits)
        _check_memory(size, _webp_bytes(size, data), limits)
    with _damage_refused():
        try:
            image = reader(BytesIO(data))
        except SyntaxError as error:
            raise InputNotImage("The input is not a PNG, JPEG or WebP picture.") from error
    _check_size(image.size, limits)
    return image


@contextmanager
def _damage_refused() -> Generator[None]:
    try:
        yield
    except _BAD_FILE as error:
        raise InputNotImage(f"The picture is damaged or incomplete: {error}.") from error


def _check_size(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if width * height > limits.pixels:
        raise InputTooLarge(f"The input is {width} x {height} = {width * height} pixels; the limit is {limits.pixels}.")
    if max(size) > limits.side:
        raise InputTooLarge(f"The input is {width} x {height} pixels; the limit is {limits.side} on a side.")


def _check_memory(size: tuple[int, int], needed: int, limits: Limits) -> None:
    if needed > limits.memory_bytes:
        raise InputTooLarge(
            f"Decoding the input of {size[0]} x {size[1]} pixels would take {needed >> 20} MiB of memory; the limit is "
            f"{limits.memory_bytes >> 20}."
        )


# Memory ---------------------------------------------------------------------------------------------------------------


# Measured, and each copy accounted for: what a mode is stored in; a copy for the profile and one to turn it, or for
# the two the copy as RGB and the array; and of a transparent picture the copy as RGBA and its alpha. The coefficients
# of a progressive JPEG, 2 bytes for a sample, are gone before more than they took is needed.
_STORED = {"1": 1, "L": 1, "P": 1}
_STORED_OTHERWISE = 4
_FINISHED = 8
_MADE_TRANSPARENT = 5
_WEBP = 21
"""libwebp's canvas twice, the picture, and all that the others take."""


def opening_bytes(data: bytes) -> int:
    """Bound the memory that reading a header takes; a WebP's canvas is allocated by it."""
    canvas = _webp_bytes(webp_size(data), data) if kind(data) == "WEBP" else 0
    return canvas + _TEXT_BYTES + 4 * len(data)


def _peak_bytes(image: ImageFile.ImageFile, data: bytes) -> int:
    if isinstance(image, WebPImagePlugin.WebPImageFile):
        return _webp_bytes(image.size, data)
    each = _STORED.get(image.mode, _STORED_OTHERWISE) + _FINISHED
    if image.has_transparency_data:
        each += _MADE_TRANSPARENT
    return image.width * image.height * each + 3 * len(data)


def _webp_bytes(size: tuple[int, int], data: bytes) -> int:
    return size[0] * size[1] * _WEBP + 3 * len(data)


# Colour and alpha -----------------------------------------------------------------------------------------------------


def _picture(image: Image.Image, data: bytes) -> Picture:
    grey = image.mode in ("1", "L", "LA", "I;16")
    turn, profile = _UPRIGHT.get(_orientation(image)), image.info.get("icc_profile")
    image = _eight_bit(image, depth=data[_PNG_DEPTH_AT] if image.format == "PNG" else 8)
    alpha = None
    if image.has_transparency_data:
        image = _as_mode(image, "RGBA")
        alpha = _levels(image.getchannel("A"), turn)
    return Picture(_levels(_in_srgb(image, profile, grey=grey), turn), alpha)


def _as_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert, without the copy that Pillow makes of what needs no conversion."""
    return image if image.mode == mode else image.convert(mode)


def _levels(image: Image.Image, turn: Image.Transpose | None) -> Levels:
    """Turn a picture upright and copy it into an array, band by band: at once Pillow would need it twice."""
    if turn is not None:
        image = image.transpose(turn)
    levels = np.empty((image.height, image.width, *((3,) if image.mode == "RGB" else ())), np.uint8)
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        levels[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    return levels


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except _BAD_FILE as error:
        logger.warning("ignored broken EXIF data: %s", error)
        return 1


def _eight_bit(image: Image.Image, depth: int) -> Image.Image:
    """Bring samples and the transparent colour of a PNG to 8 bit.

    Pillow cuts 16 bit grey off at 255, and it leaves the transparent colour in the depth of the file, so that it
    matches nothing. Of 16 bit colours Pillow keeps the upper byte only, and so they are compared by it.
    """
    key = image.info.get("transparency")
    if image.mode == "I;16":
        samples = np.asarray(image)
        scaled = samples.astype(np.uint32)
        scaled *= 255
        scaled += 32767
        scaled //= 65535
        image = Image.fromarray(scaled.astype(np.uint8))
        if key is not None:
            image.putalpha(Image.fromarray(np.where(samples == key, 0, 255).astype(np.uint8)))
    elif image.mode == "L" and key is not None:
        image.info["transparency"] = key * 255 // (2**depth - 1)
    elif image.mode == "RGB" and key is not None and depth == 16:
        image.info["transparency"] = tuple(sample >> 8 for sample in key)
    return image


def _in_srgb(image: Image.Image, profile: bytes | None, *, grey: bool) -> Image.Image:
    """Convert to RGB, by way of the colour profile where there is one that fits."""
    colours = image if image.mode == "CMYK" else _as_mode(image, "RGB")
    if profile:
        try:
            return _through(profile, colours, grey=grey)
        except (ImageCms.PyCMSError, *_BAD_FILE) as error:
            logger.warning("ignored the picture's colour profile: %s", error)
    return _as_mode(colours, "RGB")


def _through(profile: bytes, image: Image.Image, *, grey: bool) -> Image.Image:
    """Convert from the profile's colours, relative to white and black as browsers do.

    Raises:
        ImageCms.PyCMSError, OSError: the profile is broken.
        ValueError: it is for other channels than the picture has.
    """
    space = profile[16:20].decode("ascii", "replace").strip()
    if space == "GRAY" and grey:
        image = image.getchannel("R")
    elif space != image.mode:
        raise ValueError(f"it is for {space!r}, the picture is {image.mode}")
    converted = ImageCms.profileToProfile(
        image,
        BytesIO(profile),
        ImageCms.createProfile("sRGB"),  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        "RGB",
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    assert converted is not None
    return converted
