"""A server's main process and all that it started, so that a trial can kill them together."""

import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from bench.peers.models.job import JOURNAL
from cli.processes import die_with_parent

READY_SECONDS = 90.0
STOP_SECONDS = 10.0


class Process:
    """One command, and whatever it starts: their environment tells them from all other processes."""

    def __init__(self, command: Sequence[str], *, folder: Path, environ: Mapping[str, str], log: Path) -> None:
        """`folder` is where it runs; `environ` names a journal of its own; the command's first word is a path."""
        self._journal = environ[JOURNAL]
        with log.open("ab") as output:
            self._main = subprocess.Popen(
                die_with_parent(command),
                cwd=folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def has_ended(self) -> bool:
        return self._main.poll() is not None

    @property
    def pids(self) -> Sequence[int]:
        return sorted({self._main.pid, *writers_of(self._journal)})

    def kill(self) -> None:
        """Send SIGKILL to all of it, and wait until it is gone."""
        kill(self.pids)
        kill(writers_of(self._journal))  # what was started between the look and the kill
        self._main.wait()

    def stop(self) -> None:
        """Ask it to end; kill what has not ended after STOP_SECONDS, or outlived it."""
        self._main.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._main.wait(STOP_SECONDS)
        self.kill()


def writers_of(journal: str) -> Sequence[int]:
    """Find the processes that would write into this journal.

    Neither children nor a session would do: some servers put their workers into sessions of their own, and a worker
    that has lost its parent is nobody's child.
    """
    return [process.pid for process in psutil.process_iter() if _environment(process).get(JOURNAL) == journal]


def kill(pids: Iterable[int]) -> None:
    """Send SIGKILL to all, and wait until they have gone: zombies that others must reap count as gone."""
    processes = list[psutil.Process]()
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(pid))
            os.kill(pid, signal.SIGKILL)
    give_up_at = time.monotonic() + STOP_SECONDS
    while any(_lives(process) for process in processes) and time.monotonic() < give_up_at:
        time.sleep(0.01)


def wait_until_ready(url: str, is_ready: Callable[[bytes], bool], has_ended: Callable[[], bool]) -> None:
    """Return once the URL answers 200 with a body that says so.

    Raises:
        RuntimeError: the server ended, or READY_SECONDS are over.
    """
    give_up_at = time.monotonic() + READY_SECONDS
    while time.monotonic() < give_up_at and not has_ended():
        with suppress(OSError), urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310 - our own address
            if is_ready(response.read()):
                return
        time.sleep(0.05)
    raise RuntimeError(f"Nothing was ready at {url} within {READY_SECONDS:g} seconds.")


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return what the processes have used of the processors so far."""
    used = 0.0
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            times = psutil.Process(pid).cpu_times()
            used += times.user + times.system
    return used


def _environment(process: psutil.Process) -> Mapping[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
