"""How a worker and its decoder talk: a length, then so many bytes; what is said is JSON, files and pixels are bare."""

import json
import struct
from io import FileIO
from typing import Any, cast

import numpy as np

from worker.upscaler.picture import Levels

LONGEST_REPORT = 1 << 16
"""More JSON than this nobody has to say."""

_LENGTH = struct.Struct("<Q")


def send(stream: FileIO, data: bytes) -> None:
    """Send a frame."""
    write(stream, _LENGTH.pack(len(data)))
    write(stream, data)


def report(stream: FileIO, **told: Any) -> None:
    """Send a frame of JSON."""
    send(stream, json.dumps(told).encode())


def receive(stream: FileIO, longest: int) -> bytearray:
    """Wait for a frame.

    Raises:
        EOFError: the other side is gone.
        ValueError: it is longer than `longest`.
    """
    head = bytearray(_LENGTH.size)
    fill(stream, head)
    (length,) = _LENGTH.unpack(head)
    if length > longest:
        raise ValueError(f"a frame of {length} bytes")
    data = bytearray(length)
    fill(stream, data)
    return data


def receive_report(stream: FileIO) -> dict[str, Any]:
    """Wait for a frame of JSON.

    Raises:
        EOFError: the other side is gone.
        ValueError: it talks nonsense.
    """
    told = json.loads(receive(stream, LONGEST_REPORT))
    if not isinstance(told, dict):
        raise ValueError("a report that is no object")  # noqa: TRY004  # as from json itself
    return cast("dict[str, Any]", told)


def write(stream: FileIO, data: bytes | Levels) -> None:
    """Write all of it, without a frame."""
    left = memoryview(data if isinstance(data, bytes) else np.ascontiguousarray(data).data).cast("B")
    while left:
        left = left[stream.write(left) :]


def fill(stream: FileIO, buffer: bytearray | Levels) -> None:
    """Read as much as the buffer holds, straight into it.

    Raises:
        EOFError: the other side is gone.
    """
    left = memoryview(buffer if isinstance(buffer, bytearray) else buffer.data).cast("B")
    while left:
        count = stream.readinto(left)
        if not count:
            raise EOFError("the other side is gone")
        left = left[count:]
