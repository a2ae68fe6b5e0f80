"""Pictures to files, strip by strip, and a look back at a finished file."""

import struct
import threading
import zlib
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from queue import Queue
from typing import Any, BinaryIO, cast

import numpy as np

from core.errors import OutOfMemory, OutputTooLarge, Stopped, StorageUnavailable
from core.options import OutputFormat
from worker.upscaler.libvips import pyvips
from worker.upscaler.light import to_fractions, to_levels, to_linear
from worker.upscaler.picture import Levels, Picture
from worker.upscaler.plan import Size, check_sides

_BLOCK_PIXELS = 1 << 18
"""How many pixels are handed to libvips at once."""

_OPTIMISED_PIXELS = 1 << 25
"""Beyond this a JPEG gets the standard's code tables, a tenth larger: for its own it must be in memory as a whole."""

_MAX_ASPECT = 16
"""How many times as long as wide a thumbnail is at most."""


def encode(
    strips: Iterator[Picture],
    size: Size,
    output_format: OutputFormat,
    quality: int,
    file: BinaryIO,
    should_stop: Callable[[], bool] = lambda: False,
) -> Future[None]:
    """Write a picture whose strips come from top to bottom into an open file, without any metadata.

    A thread of its own writes while strips are made; one that is finished may wait for it. Returns when it has them
    all, and the future is done when the file is. PNG and WebP keep alpha; JPEG shows the picture on white. `quality` is
    1 to 100 and means nothing to PNG. From 90 on JPEG keeps colour at full resolution.

    What `strips` raises is raised as it is, and then nothing is written any more. What is wrong with the file ends
    `strips`, and is raised here or by the future.

    That thread asks `should_stop` at each step that it makes, dozens of them even after the last strip of a large WebP,
    and never while it waits for strips. The alpha of a WebP is one step, of up to a second for each megapixel.

    Raises:
        Stopped: `should_stop()` answered true.
        OutputTooLarge: the format cannot hold the picture.
        OutOfMemory: the work on the file does not fit.
        StorageUnavailable: the file cannot be written.
        ValueError: the strips are not those of a picture of that size, or only some of them have alpha.
    """
    check_sides(size, output_format)
    queue: Queue[Picture | None] = Queue(1)
    stream = _Stream(queue, size, should_stop, flat=output_format is OutputFormat.JPG)
    pool = ThreadPoolExecutor(1, "encoder")
    saving = pool.submit(_save, stream, size, output_format, quality, file)
    pool.shutdown(wait=False)
    try:
        for strip in strips:
            queue.put(strip)
            if stream.over.is_set():
                if isinstance(strips, Generator):
                    strips.close()
                break
    except BaseException:
        queue.put(None)
        wait([saving])
        raise
    queue.put(None)
    if stream.over.is_set():
        saving.result()
    return saving


def peak_bytes(size: Size, output_format: OutputFormat, *, alpha: bool) -> int:
    """Tell how much memory encoding a picture of that size takes at most, roughly, beside its strips.

    Measured with noise, of which all formats make most.
    """
    pixels = size.width * size.height
    passing = 4 * size.width * min(size.height, 1024) + 32 * min(pixels, _BLOCK_PIXELS)
    if output_format is OutputFormat.WEBP:
        return passing + pixels * (48 if alpha else 16)  # alpha is encoded without loss
    if output_format is OutputFormat.JPG and pixels <= _OPTIMISED_PIXELS:
        return passing + pixels * 16
    return passing


def thumbnail(file: BinaryIO, side: int) -> Levels:
    """Read what `encode` wrote, made so small that the shorter side has `side` pixels at most; alpha is left out.

    A longer side of more than 16 times as many is squeezed. The shape is (height, width, 3).
    """
    source = pyvips.Source.new_from_descriptor(file.fileno())
    image = cast("Any", pyvips.Image).new_from_source(source, "", access="sequential").extract_band(0, n=3)
    shrink = max(1, min(image.width, image.height) / side)
    width, height = (min(round(length / shrink), _MAX_ASPECT * side) for length in (image.width, image.height))
    if (width, height) != (image.width, image.height):
        image = image.thumbnail_image(width, height=height, size="force")
    return image.numpy()


class _Stream:
    """The strips, as a run of bytes that libvips asks for.

    They look like a PNG file that is not compressed: of what libvips can read from a stream, that costs least. It reads
    and tells of its steps by callbacks, and an error that left one would only be printed.
    """

    def __init__(
        self, strips: Queue[Picture | None], size: Size, should_stop: Callable[[], bool], *, flat: bool
    ) -> None:
        self._strips = strips
        self._size = size
        self._should_stop = should_stop
        self._flat = flat
        self._blocks = self._file()
        self._left = memoryview(b"")
        self._ended = False
        self._rows = 0
        self.over = threading.Event()
        """Set when no more is read, whether the picture is whole or not."""
        self.fault: Exception | None = None
        """Why it gives no more, or is to be read no more."""

    def read(self, count: int) -> bytes | None:
        """Give at most so many bytes, or None for no more."""
        try:
            while not self._left:
                self._left = memoryview(next(self._blocks))
        except StopIteration:
            return None
        except Exception as error:  # noqa: BLE001 - whatever it is, `_save` raises it
            self.fault = error
            return None
        given, self._left = self._left[:count], self._left[count:]
        return bytes(given)

    def look(self, image: Any, _progress: object) -> None:
        """Have libvips give up at the step that it makes, if it is to."""
        try:
            if self.fault is None and self._should_stop():
                self.fault = Stopped("The encoding was told to stop.")
        except Exception as error:  # noqa: BLE001 - as above
            self.fault = error
        if self.fault is not None:
            image.set_kill(True)

    def drain(self) -> None:
        """Take what else comes, so that whoever gives it need not wait for ever."""
        self.over.set()
        while not self._ended:
            self._next()

    def _next(self) -> Picture | None:
        strip = self._strips.get()
        if strip is None:
            self._ended = True
        else:
            self._rows += strip.height
        return strip

    def _file(self) -> Iterator[bytes]:
        strip = self._next()
        transparent = strip is not None and strip.alpha is not None
        alpha = transparent and not self._flat
        header = struct.pack(">IIBBBBB", *self._size, 8, 6 if alpha else 2, 0, 0, 0)
        yield b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header)
        deflate = zlib.compressobj(0)
        step = max(1, _BLOCK_PIXELS // self._size.width)
        while strip is not None:
            if (strip.alpha is not None) != transparent:
                raise ValueError("Some strips have alpha and some have none.")
            for top in range(0, strip.height, step):
                yield _chunk(b"IDAT", deflate.compress(self._samples(strip, slice(top, top + step), alpha=alpha)))
            strip = self._next()
        if self._rows != self._size.height:
            raise ValueError(f"The strips have {self._rows} rows, and not {self._size.height}.")
        yield _chunk(b"IDAT", deflate.flush()) + _chunk(b"IEND", b"")

    def _samples(self, strip: Picture, rows: slice, *, alpha: bool) -> memoryview:
        """Return rows as a PNG has them: each pixel's bands together, and before each row a 0."""
        rgb = strip.rgb[rows]
        lines = np.zeros((len(rgb), 1 + self._size.width * (4 if alpha else 3)), np.uint8)
        pixels = lines[:, 1:].reshape(len(rgb), self._size.width, -1, copy=False)
        if strip.alpha is None or alpha:
            pixels[:, :, :3] = rgb
        else:
            opaque = to_fractions(strip.alpha[rows, :, None])
            pixels[:] = to_levels(to_linear(rgb) * opaque + 1 - opaque)
        if alpha:
            assert strip.alpha is not None
            pixels[:, :, 3] = strip.alpha[rows]
        return lines.data


def _chunk(name: bytes, data: bytes) -> bytes:
    return b"".join((struct.pack(">I", len(data)), name, data, struct.pack(">I", zlib.crc32(data, zlib.crc32(name)))))


def _save(stream: _Stream, size: Size, output_format: OutputFormat, quality: int, file: BinaryIO) -> None:
    try:
        _write(stream, size, output_format, quality, file)
    except pyvips.Error as error:
        raise stream.fault or _translated(error) from error
    else:
        if stream.fault is not None:
            raise stream.fault
    finally:
        stream.drain()


def _write(stream: _Stream, size: Size, output_format: OutputFormat, quality: int, file: BinaryIO) -> None:
    source = pyvips.SourceCustom()
    source.on_read(stream.read)
    # Without `fail_on` what is missing of a picture would be black.
    image = cast("Any", pyvips.Image).pngload_source(source, access="sequential", fail_on="warning")
    image.set_progress(True)
    image.signal_connect("eval", stream.look)
    target = pyvips.Target.new_to_descriptor(file.fileno())
    match output_format:
        case OutputFormat.PNG:
            image.pngsave_target(target, compression=4, filter="all", keep="none")
        case OutputFormat.JPG:
            optimised = size.width * size.height <= _OPTIMISED_PIXELS
            subsampling = "off" if quality >= 90 else "on"
            image.jpegsave_target(target, Q=quality, subsample_mode=subsampling, optimize_coding=optimised, keep="none")
        case OutputFormat.WEBP:
            image.webpsave_target(target, Q=quality, effort=2, keep="none")


def _translated(error: pyvips.Error) -> OutOfMemory | OutputTooLarge | StorageUnavailable:
    told = error.detail
    if "unable to encode" in told:
        # The format has 512 KiB for how each block is predicted; beyond some 100 megapixels that may not do.
        return OutputTooLarge("A webp file cannot hold so large a picture; a png file can.")
    if "memory" in told:
        return OutOfMemory("There is not enough memory to encode the picture.")
    return StorageUnavailable("The picture could not be written to a temporary file.")
