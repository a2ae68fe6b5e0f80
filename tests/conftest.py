"""Fixtures that several tests share: the real servers, and one cloned database for each test."""

import asyncio
import itertools
import os
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import asyncpg
import pytest

from cli.embedded import Postgres, Redis
from cli.migrations import upgrade
from core.settings import Settings, load_settings
from tests.broker import connect_redis
from tests.web import Web, open_web

TEMPLATE = "upscaled_template"

Sql = Callable[..., Sequence[Any]]


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


class PostgresServer(Protocol):
    """A server on which the tests may make and drop databases."""

    def url(self, database: str) -> str: ...


class GivenPostgres:
    """The server of TEST_DATABASE_URL, whose user can make databases: to try another version of PostgreSQL."""

    def __init__(self, url: str) -> None:
        self._url = url

    def url(self, database: str) -> str:
        return f"{self._url.rpartition('/')[0]}/{database}"


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Generator[PostgresServer]:
    """The real PostgreSQL, with one migrated database to clone from."""
    with ExitStack() as started:
        if given := os.environ.get("TEST_DATABASE_URL"):
            server = GivenPostgres(given)
        else:
            server = started.enter_context(Postgres(tmp_path_factory.mktemp("postgres"), durable=False))
        asyncio.run(_execute(server.url("postgres"), f"DROP DATABASE IF EXISTS {TEMPLATE}"))
        asyncio.run(_execute(server.url("postgres"), f"CREATE DATABASE {TEMPLATE}"))
        upgrade(server.url(TEMPLATE).replace("postgresql://", "postgresql+asyncpg://"))
        yield server


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Redis]:
    with Redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


_numbers = itertools.count(os.getpid() * 1000)  # two runs may share a given server


@pytest.fixture
def database_url(postgres: PostgresServer) -> Generator[str]:
    """A database of the test's own: tests commit for real, on as many connections as they like."""
    name = f"test_{next(_numbers)}"
    asyncio.run(_execute(postgres.url("postgres"), f"CREATE DATABASE {name} TEMPLATE {TEMPLATE} STRATEGY FILE_COPY"))
    yield postgres.url(name)
    asyncio.run(_execute(postgres.url("postgres"), f"DROP DATABASE {name} WITH (FORCE)"))


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
        return asyncio.run(_execute(database_url, statement, *arguments))

    return ask


@pytest.fixture
def sql_async(database_url: str) -> Callable[..., Awaitable[Sequence[Any]]]:
    """The same, for a test that is itself asynchronous."""
    return partial(_execute, database_url)


@pytest.fixture
def web() -> Generator[Web]:
    """A web server for images and webhooks."""
    with open_web() as web:
        yield web


async def _execute(url: str, statement: str, *arguments: object) -> Sequence[Any]:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetch(statement, *arguments)
    finally:
        await connection.close()
