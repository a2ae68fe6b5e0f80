"""What the embedded servers share: one folder, its lock, a port, whose process a server is, and waiting for it."""

import fcntl
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

from cli.processes import LOOPBACK, free_port
from core.errors import DeploymentError


class Server(ABC):
    """One server, one folder, one lock: what PostgreSQL and Redis have in common."""

    _title: str

    def __init__(self, folder: Path, port: int | None) -> None:
        self._folder = folder.absolute()
        self._port = port
        self._log = self._folder / "server.log"
        self._lock: IO[str] | None = None

    def start(self) -> None:
        """Start the server and wait until it answers; do nothing when it already does.

        Port and password stay what they were before a stop or a crash, unless another program took the port meanwhile.

        Raises:
            DeploymentError: a part is missing, the folder cannot be used, or the server gave up (with its last words).
        """
        if self.pid is not None and self._answers():
            return
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = self._lock or _lock(self._folder)
            self._prepare()
            self._launch_on_some_port()
        except OSError as error:
            self.stop()
            raise DeploymentError(f"{self._title} cannot be started in {self._folder}: {error}") from error
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server, politely first, and let go of the folder; do nothing when it is not ours or not running."""
        if self._lock is None:
            return
        self._stop()
        self._lock.close()
        self._lock = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    @abstractmethod
    def pid(self) -> int | None:
        """The server's process, or None when it is not running."""

    @property
    def port(self) -> int:
        if self._port is None:
            raise RuntimeError(f"{self._title} has no port before its first start")
        return self._port

    @abstractmethod
    def _prepare(self) -> None:
        """Bring the folder into a state from which the server can start."""

    @abstractmethod
    def _launch(self) -> bool:
        """Start the server on `port` and tell whether it came up; its log holds this launch only."""

    @abstractmethod
    def _answers(self) -> bool: ...

    @abstractmethod
    def _stop(self) -> None: ...

    def _launch_on_some_port(self) -> None:
        words = ""
        for port in _ports(self._port):
            self._port = port
            if self._launch():
                return
            words = self._log.read_text(errors="replace").strip()
            if "Address already in use" not in words:
                break
        raise DeploymentError(f"{self._title} did not start: {last_lines(words)} (see {self._log})")


def run(command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, out of reach of the terminal; `stdout` holds all it said."""
    options = {"env": environment(), "input": "", "start_new_session": True} | options
    return subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def environment() -> dict[str, str]:
    """Keep the person's secrets and PG* variables away from the servers; messages in English."""
    return {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ} | {"LC_ALL": "C"}


def find_wheel(package: str) -> Path | None:
    """Find where a package is installed without running any of it: its own starter makes accounts and changes modes."""
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def _lock(folder: Path) -> IO[str]:
    """Claim the folder for as long as this process lives; the kernel lets go of it even after SIGKILL."""
    lock = (folder / "lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise DeploymentError(f"{folder} is in use by another running upscaled: stop that one first") from error
    return lock


def _ports(kept: int | None) -> Iterator[int]:
    """Offer the kept port, then free ones."""
    if kept is not None:
        yield kept
    for _ in range(20):
        yield free_port()


def dwellers(folder: Path) -> set[int]:
    """Find the processes whose working directory is `folder`: unlike a pid in a file, this proves whose a server is."""
    if sys.platform != "linux":
        listed = run(["/usr/sbin/lsof", "-t", "-a", "-d", "cwd", "--", folder])
        return {int(word) for word in listed.stdout.split() if word.isdigit()}
    found: set[int] = set()
    with suppress(FileNotFoundError):
        home = folder.stat()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.path.samestat((process / "cwd").stat(), home):
                    found.add(int(process.name))
    return found


def running(pid_file: Path, folder: Path) -> int | None:
    """Read the pid of the server that works in `folder`, or None when the file is stale."""
    try:
        pid = int(pid_file.read_text().split()[0])
    except (FileNotFoundError, IndexError, ValueError):
        return None
    return pid if pid in dwellers(folder) else None


def end(pid: int, folder: Path, steps: Sequence[tuple[signal.Signals, float]]) -> None:
    """Send one signal after the other, each with its seconds to work, until the server has left `folder`."""
    for number, seconds in steps:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        if until(lambda: pid not in dwellers(folder), seconds):
            return


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for the condition and tell whether it came true within the time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def replies(port: int, request: bytes, reply: bytes) -> bool:
    """Tell whether what listens on the port answers the request with a text that begins with `reply`."""
    try:
        with socket.create_connection((LOOPBACK, port), timeout=1) as connection:
            connection.sendall(request)
            return connection.makefile("rb").read(len(reply)) == reply
    except OSError:
        return False


def last_lines(text: str) -> str:
    """Put the last three lines on one, fit for an error's sentence."""
    return " | ".join(text.strip().splitlines()[-3:])
