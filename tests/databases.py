"""One migrated database on the test server, and clones of it that are made ahead of the tests that use them."""

import asyncio
import itertools
import os
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import asyncpg

from cli.migrations import upgrade

_numbers = itertools.count(os.getpid() * 1000)  # several runs, and the workers of one, may share a given server


class PostgresServer(Protocol):
    """A server on which the tests may make and drop databases."""

    def url(self, database: str) -> str: ...


class GivenPostgres:
    """The server of TEST_DATABASE_URL, whose user can make databases: to try another version of PostgreSQL."""

    def __init__(self, url: str) -> None:
        self._url = url

    def url(self, database: str) -> str:
        return f"{self._url.rpartition('/')[0]}/{database}"


class Clones:
    """Hands out databases; while a test uses one, the next is made and the one before is dropped."""

    def __init__(self, server: PostgresServer, template: str, beside: ThreadPoolExecutor) -> None:
        self._server = server
        self._template = template
        self._beside = beside
        self._next = beside.submit(self._create)
        self._drops: list[Future[None]] = []

    def take(self) -> str:
        """Return the name of a database that nobody else has."""
        name = self._next.result()
        self._next = self._beside.submit(self._create)
        return name

    def give_back(self, name: str) -> None:
        self._drops.append(self._beside.submit(self._drop, name))

    def close(self) -> None:
        """Drop the one that nobody took; raise what went wrong with others."""
        self.give_back(self._next.result())
        for drop in self._drops:
            drop.result()

    def _create(self) -> str:
        name = f"test_{next(_numbers)}"
        self._execute(f"CREATE DATABASE {name} TEMPLATE {self._template} STRATEGY FILE_COPY")
        return name

    def _drop(self, name: str) -> None:
        self._execute(f"DROP DATABASE {name} WITH (FORCE)")

    def _execute(self, statement: str) -> None:
        asyncio.run(execute(self._server.url("postgres"), statement))


@contextmanager
def open_clones(server: PostgresServer) -> Generator[Clones]:
    template = f"template_{next(_numbers)}"
    asyncio.run(execute(server.url("postgres"), f"CREATE DATABASE {template}"))
    upgrade(server.url(template).replace("postgresql://", "postgresql+asyncpg://"))
    with ThreadPoolExecutor(2) as beside:
        clones = Clones(server, template, beside)
        yield clones
        clones.close()
    asyncio.run(execute(server.url("postgres"), f"DROP DATABASE {template} WITH (FORCE)"))


async def execute(url: str, statement: str, *arguments: object) -> Sequence[Any]:
    """Ask one thing on a connection of its own."""
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetch(statement, *arguments)
    finally:
        await connection.close()
