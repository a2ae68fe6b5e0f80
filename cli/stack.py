"""The whole service on one machine: PostgreSQL, Redis, and our own processes, started and stopped in order."""

import asyncio
import logging
import os
import secrets
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from cli.embedded import Postgres, Redis
from cli.keys import create_key, is_working_key
from cli.migrations import upgrade
from cli.processes import die_with_parent, stop
from core.errors import DeploymentError
from core.sealing import Sealer
from core.settings import PREFIX, load_settings
from db.models import Scope

READY_SECONDS = 60.0
STOP_SECONDS = 30.0
"""How long our processes get to finish what they do; a worker finishes its job."""

SHORTEST_LIFE_SECONDS = 5.0
"""A process that ends sooner after its start would do so again."""

DEPLOYMENT_STATUS = 2
"""With this status our processes say that they cannot run here."""

STANDARD_ERROR = 2
"""The file descriptor: our own standard output is for what a person asked for."""

logger = logging.getLogger(__name__)


class Stack:
    """A context manager around everything that one machine needs.

    Servers that the environment names (UPSCALED_DATABASE_URL, UPSCALED_REDIS_URL) are used; those it does not name are
    started. The processes are told everything by their environment, exactly as in production.
    """

    def __init__(
        self,
        folder: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        workers: int = 1,
        logs: Path | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        """`logs` takes what our processes write; without it they share our standard error."""
        self.folder = folder.resolve()
        self.logs = logs
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.postgres: Postgres | None = None
        self.redis: Redis | None = None
        self._host, self._port = host, port
        self._workers = workers
        self._given = environ
        self._stack = ExitStack()
        self._started: dict[str, tuple[tuple[str, ...], float]] = {}

    @property
    def url(self) -> str:
        return f"http://{self._host}:{self._port}"

    def __enter__(self) -> Self:
        with ExitStack() as started:
            _make_private_folder(self.folder)
            self._require_free_port()
            self.environment = self._start_servers(started)
            self.settings = load_settings(**_as_overrides(self.environment))
            upgrade(self.settings.database_url, Sealer(self.settings))
            self.key = self._first_key()
            started.callback(self._stop_processes)
            self._start_processes()
            self._wait_until_ready()
            self._stack = started.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def wait(self) -> NoReturn:
        """Wait for Ctrl-C. Meanwhile a process that dies is started again, as it would be in production.

        Raises:
            KeyboardInterrupt: that was it.
            DeploymentError: one of them cannot run at all: it said so, or died again at once.
        """
        while True:
            for name, process in list(self.processes.items()):
                if process.poll() is not None:
                    self._restart(name)
            time.sleep(0.5)

    def _restart(self, name: str) -> None:
        status, lived = self.processes[name].returncode, time.monotonic() - self._started[name][1]
        if status == DEPLOYMENT_STATUS or lived < SHORTEST_LIFE_SECONDS:
            self.require_running()
        logger.warning("%s ended by itself with status %d: starting it again", name, status)
        self.start(name, *self._started[name][0])

    def _require_free_port(self) -> None:
        # Another service there would answer /readyz in our API's place.
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self._host, self._port))
            except OSError as error:
                raise DeploymentError(f"Port {self._port} of {self._host} cannot be used: {error.strerror}.") from error

    def _start_servers(self, started: ExitStack) -> dict[str, str]:
        environment = {
            f"{PREFIX}PUBLIC_URL": self.url,
            f"{PREFIX}STORAGE_DIR": str(self.folder / "storage"),
            f"{PREFIX}SECRET_KEY": _kept_secret(self.folder / "secret-key"),
            **{name: value for name, value in self._given.items() if name.startswith(PREFIX)},
        }
        if f"{PREFIX}DATABASE_URL" not in environment:
            self.postgres = started.enter_context(Postgres(self.folder / "postgres"))
            environment[f"{PREFIX}DATABASE_URL"] = self.postgres.url()
        if f"{PREFIX}REDIS_URL" not in environment:
            self.redis = started.enter_context(Redis(self.folder / "redis"))
            environment[f"{PREFIX}REDIS_URL"] = self.redis.url
        _write_environment(self.folder, environment)
        started.callback(_environment_file(self.folder).unlink, missing_ok=True)
        return environment

    def _first_key(self) -> str:
        """Return the key of this folder's service, which may do everything; the file is for its owner's eyes only.

        Another one is made when it no longer works, or the environment names another database than last time.
        """
        file = self.folder / "api-key"
        if not file.exists() or not asyncio.run(is_working_key(self.settings, file.read_text())):
            _write_private(file, asyncio.run(create_key(self.settings, "first", scopes=Scope)))
        return file.read_text()

    def _start_processes(self) -> None:
        self.start("api", "api", "--host", self._host, "--port", str(self._port))
        self.start("dispatcher", "dispatcher")
        for number in range(1, self._workers + 1):
            self.start(f"worker-{number}", "worker")

    def start(self, name: str, command: str, *arguments: str) -> None:
        """Start one more `upscaled COMMAND …`, or one again; it is stopped with the others."""
        self._started[name] = (command, *arguments), time.monotonic()
        output = None if self.logs is None else (self.logs / f"{name}.log").open("ab")
        try:
            self.processes[name] = subprocess.Popen(
                die_with_parent([sys.executable, "-m", "cli.main", command, *arguments]),
                env={**self._given, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=output or STANDARD_ERROR,
                stderr=output,
                start_new_session=True,  # Ctrl-C is ours: we stop them, in order
            )
        finally:
            if output is not None:
                output.close()

    def _wait_until_ready(self) -> None:
        give_up_at = time.monotonic() + READY_SECONDS
        while time.monotonic() < give_up_at:
            self.require_running()
            try:
                with urllib.request.urlopen(f"{self.url}/readyz", timeout=5):  # noqa: S310 - our own address
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.1)
        raise DeploymentError(f"The API did not come up on {self.url} within {READY_SECONDS:g} seconds.")

    def require_running(self) -> None:
        """Raise DeploymentError when one of our processes has ended by itself."""
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise DeploymentError(f"{name} ended by itself with status {process.returncode}.{self._tail(name)}")

    def _tail(self, name: str) -> str:
        if self.logs is None:
            return ""
        lines = (self.logs / f"{name}.log").read_text(errors="replace").strip().splitlines()
        return f" It said: {' | '.join(lines[-3:])}"

    def _stop_processes(self) -> None:
        stop(list(self.processes.values()), STOP_SECONDS)


def read_environment(folder: Path) -> dict[str, str]:
    """Return the settings of the service that runs on `folder`; nothing when ours name a database, or none runs."""
    file = _environment_file(folder)
    if f"{PREFIX}DATABASE_URL" in os.environ or not file.exists():
        return {}
    pairs = (shlex.split(line)[0].partition("=") for line in file.read_text().splitlines())
    return _as_overrides({name: value for name, _, value in pairs})


def _as_overrides(environment: Mapping[str, str]) -> dict[str, str]:
    return {name.removeprefix(PREFIX).lower(): value for name, value in environment.items()}


def _environment_file(folder: Path) -> Path:
    return folder / "environment"


def _write_environment(folder: Path, environment: Mapping[str, str]) -> None:
    lines = (f"{name}={shlex.quote(value)}\n" for name, value in sorted(environment.items()))
    _write_private(_environment_file(folder), "".join(lines))


def _kept_secret(file: Path) -> str:
    if not file.exists():
        _write_private(file, secrets.token_urlsafe(48))
    return file.read_text()


def _make_private_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DeploymentError(f"The folder {folder} cannot be made: {error.strerror}.") from error


def _write_private(file: Path, content: str) -> None:
    part = file.with_name(f"{file.name}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as opened:
        opened.write(content)
    part.replace(file)
