"""What runs in the decoder's process: it gives up what it does not need, then decodes one file after the other.

The parent sends its orders and the file, the child what the header says, the parent whether the picture is wanted, and
the child the outcome, with the pixels behind it.
"""

import fcntl
import logging
import math
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import Any, NoReturn

from core.errors import InputTooLarge, OutOfMemory, UpscaledError
from worker.upscaler import decoding, frames
from worker.upscaler.decoding import Header, Limits
from worker.upscaler.picture import Picture

SLACK_BYTES = 64 << 20
"""What decoding may take beyond what is predicted."""

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that a whole service gets: the worker may want to end its job first, and takes its child along."""

_LIMITS_MEMORY = sys.platform == "linux"
"""Elsewhere the limit of address space is not kept, or how much is used cannot be read."""


class _Unwanted(Exception):
    """The parent does not want the picture."""


def serve(lifeline: int) -> NoReturn:
    """Decode what comes in by standard input, until that ends, or the pipe `lifeline` does: with the parent."""
    incoming, outgoing = FileIO(0), FileIO(1, "w")
    confinement = _Confinement(lifeline)
    frames.report(outgoing)
    with suppress(EOFError, BrokenPipeError):
        while True:
            _serve_picture(incoming, outgoing, confinement)
    os._exit(0)  # nothing needs tidying up, and the parent may wait


def _serve_picture(incoming: FileIO, outgoing: FileIO, confinement: "_Confinement") -> None:
    orders = frames.receive_report(incoming)
    data = bytes(frames.receive(incoming, sys.maxsize))

    def ask(header: Header) -> None:
        frames.report(outgoing, header=asdict(header))
        if not frames.receive_report(incoming)["wanted"]:
            raise _Unwanted
        confinement.allow_bytes(header.peak_bytes)

    confinement.allow_seconds(orders["seconds"])
    warned: list[str] = []
    try:
        with _warnings_go_to(warned), confinement.memory(decoding.opening_bytes(data)):
            picture = decoding.decode(data, Limits(**orders["limits"]), ask)
    except _Unwanted:
        return
    except UpscaledError as error:
        frames.report(outgoing, **_told(error), warnings=warned)
    except Exception:  # noqa: BLE001  # raised again on the other side
        frames.report(outgoing, bug=traceback.format_exc()[-8000:])
    else:
        made = Header(picture.width, picture.height, picture.alpha is not None, peak_bytes=0)
        frames.report(outgoing, picture=asdict(made), warnings=warned)
        _write_picture(outgoing, picture)


def _told(error: UpscaledError) -> dict[str, Any]:
    if _LIMITS_MEMORY and isinstance(error, OutOfMemory):  # what was allowed is enough for any honest file
        error = InputTooLarge("Decoding the picture takes far more memory than its size lets expect.")
    return {"error": error.code, "sentence": str(error)[:500]}


def _write_picture(outgoing: FileIO, picture: Picture) -> None:
    frames.write(outgoing, picture.rgb)
    if picture.alpha is not None:
        frames.write(outgoing, picture.alpha)


@contextmanager
def _warnings_go_to(lines: list[str]) -> Generator[None]:
    """Collect what is logged inside the block, for the parent's log."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage()[:300]) if len(lines) < 10 else None
    logging.root.addHandler(handler)
    try:
        yield
    finally:
        logging.root.removeHandler(handler)


class _Confinement:
    """The limits of this process."""

    def __init__(self, lifeline: int) -> None:
        """Give up, for good, what decoding does not need: files, processes, and to be spared when memory runs out."""
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        last = lifeline
        if _LIMITS_MEMORY:
            # When the parent's end is closed, which is never written to, the system sends SIGIO, and that is deadly:
            # so nothing that is being computed outlives the parent.
            fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
            fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC)
            with suppress(OSError):
                Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
            self._statm = os.open("/proc/self/statm", os.O_RDONLY)
            last = max(lifeline, self._statm)
        for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
            resource.setrlimit(limit, (0, 0))
        # No number is left for a further file or connection. All modules are loaded: see the imports of `decoding`.
        resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, last + 1))

    def allow_seconds(self, seconds: float) -> None:
        """Have the system end this process after so many seconds of a processor from now on, and up to one more."""
        _set_soft(resource.RLIMIT_CPU, math.ceil(time.process_time() + seconds))

    def allow_bytes(self, more: int) -> None:
        """Limit memory to so much more than is used now, and some slack."""
        if _LIMITS_MEMORY:
            used = int(os.pread(self._statm, 100, 0).split()[0]) * resource.getpagesize()
            _set_soft(resource.RLIMIT_AS, used + more + SLACK_BYTES)

    @contextmanager
    def memory(self, more: int) -> Generator[None]:
        """Limit memory inside the block, to begin with to so much more."""
        self.allow_bytes(more)
        try:
            yield
        finally:
            _set_soft(resource.RLIMIT_AS, resource.RLIM_INFINITY)


def _set_soft(limit: int, soft: int) -> None:
    _, hard = resource.getrlimit(limit)
    within = soft if hard == resource.RLIM_INFINITY or 0 <= soft <= hard else hard
    resource.setrlimit(limit, (within, hard))
