"""Engines for tests that need a job to be running, or a worker to die."""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from core import failpoints
from core.errors import Stopped
from core.options import UpscaleOptions
from worker.upscaler.picture import Picture
from worker.upscaler.plan import Size, output_size

SECONDS = 3.0
STEP_SECONDS = 0.02

LAST_SECONDS = 0.4
"""How long `die` seems nearly done: the worker reads its next job meanwhile."""

MARKS = "TEST_MARKS"
"""The environment variable that names the folder in which `once` leaves its marks."""

POINT, SIGNAL = "TEST_POINT", "TEST_SIGNAL"
"""Those that name a fail-point, and the signal that the worker gets from itself the first time it is there."""


class Repeating:
    """Enlarges by repeating pixels, once `act` has done what a test is about."""

    name = "repeating"

    def upscale(
        self,
        picture: Picture,
        options: UpscaleOptions,
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> Iterator[Picture]:
        self.act(picture, options, on_progress, should_stop)
        size = output_size(picture.width, picture.height, options.scale_factor)
        rows, columns = (
            np.arange(new) * old // new for new, old in zip(size[::-1], picture.rgb.shape[:2], strict=True)
        )
        yield Picture(picture.rgb[rows][:, columns], None if picture.alpha is None else picture.alpha[rows][:, columns])

    def act(
        self,
        picture: Picture,
        options: UpscaleOptions,
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> None:
        """Do what comes before the pixels."""

    def peak_bytes(self, size: Size, options: UpscaleOptions, *, alpha: bool) -> int:
        return 0


class Slow(Repeating):
    """Is done after SECONDS."""

    name = "slow"

    def act(
        self,
        picture: Picture,
        options: UpscaleOptions,
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> None:
        time.sleep(SECONDS)


class Obedient(Repeating):
    """Does what the prompt says, and then enlarges.

    work SECONDS: in steps. hang: never comes back. clutch: the same, and no other Python thread runs meanwhile. die:
    takes the worker with it, when it seems nearly done. `once` before it: only the first time that a job of this seed
    comes by.
    """

    name = "obedient"

    def __init__(self) -> None:
        if point := os.environ.get(POINT):
            failpoints.arm(point, _signal_self)

    def act(
        self,
        picture: Picture,
        options: UpscaleOptions,
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> None:
        match options.prompt.split():
            case ["once", *_] if not _is_first(options.seed):
                pass
            case [*_, "hang"]:
                time.sleep(3600)
            case [*_, "clutch"]:
                ctypes.PyDLL(None).sleep(3600)
            case [*_, "die"]:
                on_progress(0.9)
                time.sleep(LAST_SECONDS)
                os.kill(os.getpid(), signal.SIGKILL)
            case ["work", seconds]:
                _work(float(seconds), on_progress, should_stop)
            case _:
                pass
        on_progress(1.0)


def _work(seconds: float, on_progress: Callable[[float], None], should_stop: Callable[[], bool]) -> None:
    began = time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        if should_stop():
            raise Stopped("The job was told to stop.")
        on_progress(passed / seconds)
        time.sleep(STEP_SECONDS)


def _is_first(seed: int) -> bool:
    mark = Path(os.environ[MARKS], str(seed))
    first = not mark.exists()
    mark.touch()
    return first


def _signal_self() -> None:
    failpoints.disarm()
    os.kill(os.getpid(), signal.Signals[os.environ[SIGNAL]])
