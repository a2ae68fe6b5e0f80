"""Decoding in a process of its own, which has limits, no secrets, and nothing to lose.

Of all that a worker runs, decoders of strangers' files are the likeliest to crash, to hang or to be taken over. So
they run in a child (`decoder_child.py`), which has no GPU and no settings and may end at any time: that ends a picture.
"""

import fcntl
import logging
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import Any, Self, cast

import numpy as np

from core.errors import DeploymentError, InputNotImage, InputTooLarge, OutOfMemory, UpscaledError
from worker.upscaler import frames
from worker.upscaler.decoding import Header, Limits, approve_all
from worker.upscaler.picture import Picture

START_SECONDS = 60.0
"""How long a child may take to start."""

_PIPE_BYTES = 1 << 20
"""What a pipe holds, where the system lets us say: with the usual 64 KiB both sides mostly wait for each other."""

_TOO_SLOW = "The picture takes too long to decode."

_UNKNOWN = "The picture could not be decoded."

_REPORTED = {error.code: error for error in (InputNotImage, InputTooLarge, OutOfMemory)}

_ENVIRONMENT = {
    # Each thread of a pool, and each arena, would reserve address space, which is limited.
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    # What a large picture took goes back to the system at once, and is not there to be counted against the next one.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
}

logger = logging.getLogger(__name__)


class Decoder:
    """Runs `decoding.decode` in a child process, one picture at a time; threads may share it.

    The child is started when the block is entered, and again whenever it has died. It ends with the block, and with
    this process, however that ends.
    """

    def __init__(self, seconds: float, stall_seconds: float = math.inf) -> None:
        """Allow each picture `seconds` of a processor; by the clock four times that, and less than `stall_seconds`.

        A machine may be busy with other things, so the clock alone says little; it is for what waits and never ends.
        """
        self._seconds = seconds
        self._patience_seconds = min(4 * seconds + 10, 0.8 * stall_seconds)
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def __enter__(self) -> Self:
        self._start_soon()
        return self

    def __exit__(self, *_: object) -> None:
        self._discard()

    @property
    def pid(self) -> int | None:
        """The child's, if there is one."""
        return self._child and self._child.process.pid

    def decode(self, data: bytes, limits: Limits, approve: Callable[[Header], None] = approve_all) -> Picture:
        """Do what `decoding.decode` does; `approve` is called in this process.

        Raises:
            InputNotImage: as there, or the decoder crashed.
            InputTooLarge: as there, or decoding took more time or memory than the picture is allowed.
            OutOfMemory: the system had none left, and ended the child to get some.
            DeploymentError: no child can be started.
        """
        with self._lock:
            child = self._started()
            alarm = _Alarm(child, self._patience_seconds)
            in_step = False
            try:
                with alarm:
                    picture = child.decode(data, limits, self._seconds, approve)
                in_step = True
            except UpscaledError:
                in_step = True
                raise
            except ValueError as error:
                logger.warning("the decoder talks nonsense: %s", error)
                raise InputNotImage(_UNKNOWN) from error
            except (EOFError, OSError) as error:
                raise _blame(child, late=alarm.rang) from error
            finally:
                if alarm.rang or not in_step:
                    self._discard()
                    self._start_soon()
            return picture

    def _start_soon(self) -> None:
        with suppress(OSError):  # the next picture tries again, and says so
            self._child = _Child()

    def _started(self) -> "_Child":
        if self._child is not None and self._child.process.poll() is not None:
            logger.warning("the decoder had ended, with status %d", self._child.process.returncode)
            self._discard()
        try:
            child = self._child = self._child or _Child()
        except OSError as error:
            raise OutOfMemory("There is no memory for a process that decodes pictures.") from error
        try:
            with _Alarm(child, START_SECONDS):
                child.greet()
        except (EOFError, OSError, ValueError) as error:
            self._discard()
            raise DeploymentError(
                "The process that decodes pictures does not start; the worker's log says why."
            ) from error
        return child

    def _discard(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None


def _blame(child: "_Child", *, late: bool) -> UpscaledError:
    """Say why a child was lost."""
    try:
        status = child.process.wait(1)  # its pipes close a little earlier
    except subprocess.TimeoutExpired:
        status = None
    logger.warning("the decoder was lost with status %s%s", status, ", too late" if late else "")
    if late or status == -signal.SIGXCPU:
        return InputTooLarge(_TOO_SLOW)
    if status == -signal.SIGKILL:  # not ours: the system's, which needed the memory
        return OutOfMemory("There is not enough memory to decode the picture.")
    return InputNotImage(_UNKNOWN)


class _Alarm:
    """Kills a child that is not done in time."""

    def __init__(self, child: "_Child", seconds: float) -> None:
        self.rang = False
        self._child = child
        self._timer = threading.Timer(seconds, self._ring)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._timer.join()  # so that `rang` is the last word

    def _ring(self) -> None:
        self.rang = True
        self._child.process.kill()


class _Child:
    """One process. EOFError, OSError and ValueError of its methods mean that it is of no more use."""

    def __init__(self) -> None:
        # -I keeps out what the environment and the working directory would add; so it is told where our code is.
        home = str(Path(__file__).parents[2])
        lifeline, self._lifeline = os.pipe()
        code = f"import sys; sys.path.insert(0, {home!r}); from worker.upscaler import decoder_child as child; "
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-c", f"{code}child.serve({lifeline})"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                # Where an interpreter's own libraries are is all that it needs to be told; secrets it must not hear.
                env=_ENVIRONMENT | {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
                cwd="/",
                pass_fds=[lifeline],
                start_new_session=True,  # Ctrl-C is for the worker, which may want to end its job first
            )
        except OSError:
            os.close(self._lifeline)
            raise
        finally:
            os.close(lifeline)
        self._to, self._from = cast("FileIO", self.process.stdin), cast("FileIO", self.process.stdout)
        if sys.platform == "linux":
            for pipe in (self._to, self._from):
                with suppress(OSError):  # the user's share of large pipes may be used up
                    fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._greeted = False

    def greet(self) -> None:
        """Wait until it is ready, the first time."""
        if not self._greeted:
            frames.receive_report(self._from)
            self._greeted = True

    def decode(self, data: bytes, limits: Limits, seconds: float, approve: Callable[[Header], None]) -> Picture:
        """Have a file decoded."""
        frames.report(self._to, limits=asdict(limits), seconds=seconds)
        frames.send(self._to, data)
        told = frames.receive_report(self._from)
        if "header" in told:
            try:
                approve(_header(told["header"], limits))
            except BaseException:
                frames.report(self._to, wanted=False)
                raise
            frames.report(self._to, wanted=True)
            told = frames.receive_report(self._from)
        for line in told.get("warnings", []):
            logger.warning("%s", line)
        if "bug" in told:
            raise RuntimeError(f"in the decoder: {told['bug']}")
        if "error" in told:
            raise _REPORTED[told["error"]](str(told["sentence"])[:500])
        return self._receive_picture(told, limits)

    def _receive_picture(self, told: dict[str, Any], limits: Limits) -> Picture:
        made = _header(told["picture"], limits)
        rgb = np.empty((made.height, made.width, 3), np.uint8)
        frames.fill(self._from, rgb)
        alpha = np.empty((made.height, made.width), np.uint8) if made.alpha else None
        if alpha is not None:
            frames.fill(self._from, alpha)
        return Picture(rgb, alpha)

    def end(self) -> None:
        """Let it end by itself, or kill it."""
        os.close(self._lifeline)
        self._to.close()
        try:
            self.process.wait(1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._from.close()


def _header(told: dict[str, Any], limits: Limits) -> Header:
    """Trust nothing: whoever took over the child must not make the parent allocate what he likes."""
    header = Header(**told)
    if min(header.width, header.height) < 1 or header.width * header.height > limits.pixels:
        raise ValueError("the decoder tells of impossible sizes")
    return header
