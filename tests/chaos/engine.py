"""An engine that does the worst that real ones do: runs out of memory, hangs, or takes its process with it.

What it does follows from the width of the picture, so that a client chooses it by what it sends.
"""

import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from enum import IntEnum
from pathlib import Path

import numpy as np

from core import failpoints
from core.errors import Stopped
from core.options import UpscaleOptions
from worker.upscaler.picture import Picture
from worker.upscaler.plan import Size

MARKS = "CHAOS_MARKS"
"""The environment variable that names the folder in which hung attempts leave a mark."""

SHORTEST_SECONDS, LONGEST_SECONDS = 0.02, 0.3
STEP_SECONDS = 0.02
LONG_SECONDS = 1.5

HUNG_ATTEMPTS = 2
"""After so many a hanging job goes well: each costs a worker for as long as its watchdog waits."""


class Kind(IntEnum):
    """What a picture of this width does to the engine."""

    PLAIN = 16
    SWELLING = 17
    """Runs out of memory, unless it is worked on in small tiles."""
    BURSTING = 18
    """Runs out of memory whatever one does."""
    HANGING = 19
    """Never ends, for the first HUNG_ATTEMPTS."""
    POISON = 20
    """Kills its worker."""
    LONG = 21
    """Takes LONG_SECONDS."""
    DOZING = 22
    """Falls asleep with its worker, while its first attempt ends; the attempt after it takes LONG_SECONDS."""
    DYING = 23
    """Kills its worker while its first attempt ends."""


_SIGNALS = {Kind.DOZING: signal.SIGSTOP, Kind.DYING: signal.SIGKILL}
_MARKED = {Kind.HANGING, *_SIGNALS}
_ENDS = ("during_upload", "after_upload", "after_commit")


class Moody:
    """Returns its input with the seed written into the first pixel: whose result it is can be told from it."""

    name = "moody"

    def upscale(
        self,
        picture: Picture,
        options: UpscaleOptions,
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> Iterator[Picture]:
        kind = Kind(picture.width)
        number = _mark(options.seed) if kind in _MARKED else 1
        failpoints.disarm()
        if kind is Kind.HANGING and number <= HUNG_ATTEMPTS:
            time.sleep(3600)
        if kind in _SIGNALS and number == 1:
            _arm(_SIGNALS[kind], options.seed)
        long = kind is Kind.LONG or (kind is Kind.DOZING and number > 1)
        seconds = LONG_SECONDS if long else _seconds(options.seed)
        steps = max(1, int(seconds / STEP_SECONDS))
        for step in range(steps):
            if should_stop():
                raise Stopped("The job was told to stop.")
            time.sleep(STEP_SECONDS)
            if step == steps // 2:
                _break(kind, options)
            on_progress((step + 1) / steps)
        yield Picture(signed(picture, options.seed))

    def peak_bytes(self, size: Size, options: UpscaleOptions, *, alpha: bool) -> int:
        return 0


def signed(picture: Picture, seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Return the picture with the seed's three low bytes as its first pixel."""
    rgb = picture.rgb.copy()
    rgb[0, 0] = list(seed.to_bytes(8)[-3:])
    return rgb


def _break(kind: Kind, options: UpscaleOptions) -> None:
    if kind is Kind.BURSTING or (kind is Kind.SWELLING and not options.small_tiles):
        raise MemoryError
    if kind is Kind.POISON:
        os.kill(os.getpid(), signal.SIGKILL)


def _arm(number: signal.Signals, seed: int) -> None:
    """Let this process signal itself, once, at one of the points at which an attempt ends."""

    def act() -> None:
        failpoints.disarm()
        os.kill(os.getpid(), number)

    failpoints.arm(_ENDS[seed % len(_ENDS)], act)


def _seconds(seed: int) -> float:
    share = hashlib.sha256(str(seed).encode()).digest()[0] / 255
    return SHORTEST_SECONDS + share * (LONGEST_SECONDS - SHORTEST_SECONDS)


def _mark(seed: int) -> int:
    """Leave a mark and return how many there are now."""
    with Path(os.environ[MARKS], str(seed)).open("a+") as marks:
        marks.write(".")
        return marks.tell()
