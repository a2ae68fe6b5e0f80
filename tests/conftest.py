"""Fixtures that several tests share: the real servers, and one cloned database for each test."""

import asyncio
import gc
import os
from collections.abc import Awaitable, Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cli import processes
from cli.embedded import Postgres, Redis
from core.settings import Settings, load_settings
from tests.broker import connect_redis
from tests.databases import Clones, GivenPostgres, PostgresServer, execute, open_clones
from tests.distribution import Distribution
from tests.web import Web, open_web

Sql = Callable[..., Sequence[Any]]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Distribution:
    return Distribution(config, log)


def pytest_collection_finish() -> None:
    """Let the garbage collector look past what was imported: it stays to the end, and is most of what there is."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def _no_stray_settings() -> Generator[None]:
    """Keep settings of the developer's own shell out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("UPSCALED_")]:
            patch.delenv(name)
        yield


@pytest.fixture(scope="session", autouse=True)
def _ports_of_its_own() -> Generator[None]:
    """Keep two workers of one run from finding the same port free, and one of them from being late."""
    with pytest.MonkeyPatch.context() as patch:
        if worker := os.environ.get("PYTEST_XDIST_WORKER"):
            number, count = int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
            patch.setattr(processes, "PORTS", processes.PORTS[number::count])
        yield


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Generator[PostgresServer]:
    """The real PostgreSQL."""
    if given := os.environ.get("TEST_DATABASE_URL"):
        yield GivenPostgres(given)
    else:
        with Postgres(tmp_path_factory.mktemp("postgres"), durable=False) as server:
            yield server


@pytest.fixture(scope="session")
def _clones(postgres: PostgresServer) -> Generator[Clones]:
    with open_clones(postgres) as clones:
        yield clones


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Redis]:
    with Redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def database_url(postgres: PostgresServer, _clones: Clones) -> Generator[str]:
    """A database of the test's own: tests commit for real, on as many connections as they like."""
    name = _clones.take()
    yield postgres.url(name)
    _clones.give_back(name)


@pytest.fixture
def redis_url(redis_server: Redis) -> str:
    with connect_redis(redis_server.url) as client:
        client.execute_command("FLUSHALL")
    return redis_server.url


@pytest.fixture
def settings(database_url: str, redis_url: str, tmp_path: Path) -> Settings:
    return load_settings(
        database_url=database_url,
        redis_url=redis_url,
        secret_key="a secret of thirty-two characters",
        storage_dir=tmp_path / "storage",
        public_url="http://testserver",
        engine="lanczos",
        outbound_allow="127.0.0.0/8",
        sweep_seconds=0.2,
        retry_seconds=2,
    )


@pytest.fixture
def sql(database_url: str) -> Sql:
    """Ask the test's database directly, past all of our code."""

    def ask(statement: str, *arguments: object) -> Sequence[Any]:
        return asyncio.run(execute(database_url, statement, *arguments))

    return ask


@pytest.fixture
def sql_async(database_url: str) -> Callable[..., Awaitable[Sequence[Any]]]:
    """The same, for a test that is itself asynchronous."""
    return partial(execute, database_url)


@pytest.fixture
def web() -> Generator[Web]:
    """A web server for images and webhooks."""
    with open_web() as web:
        yield web
