"""The work of one job, the same in every server: it takes its time, and writes into a journal what happened to it."""

import os
import time
from collections.abc import Callable

STEP_SECONDS = 0.05
"""How often a running job asks whether it should stop, as an engine does between tiles."""

JOURNAL = "PEERS_JOURNAL"
"""The variable that names the journal's file; without it nothing is written."""


class Stopped(Exception):
    """The job was told to stop, and did."""


def work(
    tag: str,
    seconds: float,
    on_progress: Callable[[float], None] = lambda _fraction: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Take so many seconds.

    Raises:
        Stopped: `should_stop()` answered true.
    """
    _note("begin", tag)
    began = time.monotonic()
    try:
        while (left := began + seconds - time.monotonic()) > 0:
            _go_on(tag, should_stop)
            on_progress(1 - left / seconds)
            time.sleep(min(STEP_SECONDS, left))
    except BaseException:  # cog throws its cancellation into the running thread
        _note("stopped", tag)
        raise
    _note("end", tag)


def _go_on(tag: str, should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise Stopped(tag)


def _note(event: str, tag: str) -> None:
    path = os.environ.get(JOURNAL)
    if not path:
        return
    # One short write to a file opened for appending: lines of several processes never mix.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(descriptor, f"{event} {tag} {os.getpid()} {time.time():.6f}\n".encode())
    finally:
        os.close(descriptor)
