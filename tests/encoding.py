"""Pictures for tests of encoding, cut into strips, and files for them."""

import tempfile
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from core.options import OutputFormat
from worker.upscaler.encoding import encode
from worker.upscaler.picture import Levels, Picture
from worker.upscaler.plan import Size


def noise(height: int, width: int, *channels: int) -> Levels:
    return np.random.default_rng(7).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def photo(height: int, width: int, *, alpha: bool) -> Picture:
    """Return a picture that is smooth, so that formats with losses come close."""
    y, x = np.mgrid[:height, :width] / 40
    rgb = np.stack([100 + 80 * np.sin(x), 128 + 60 * np.cos(y), 128 + 40 * np.sin(x + y)], axis=-1)
    return Picture(rgb.astype(np.uint8), (128 + 100 * np.cos(x)).astype(np.uint8) if alpha else None)


def cut(picture: Picture, height: int) -> Iterator[Picture]:
    for top in range(0, picture.height, height):
        rows = slice(top, top + height)
        yield Picture(picture.rgb[rows], None if picture.alpha is None else picture.alpha[rows])


def written(picture: Picture, output_format: OutputFormat, quality: int = 90, strip: int = 1000) -> bytes:
    with unnamed() as file:
        size = Size(width=picture.width, height=picture.height)
        encode(cut(picture, strip), size, output_format, quality, file).result()
        file.seek(0)
        return file.read()


def unnamed() -> BinaryIO:
    return tempfile.TemporaryFile(buffering=0)
