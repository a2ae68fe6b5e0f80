"""Connections to Postgres, and what becomes of those that are of no use any more."""

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, InternalError

from core.errors import DatabaseUnavailable
from core.settings import Settings
from db.session import Database

pytestmark = pytest.mark.anyio


async def test_a_connection_that_waits_for_a_lost_answer_is_given_up_and_nobody_gets_it_again(
    settings: Settings,
) -> None:
    # asyncpg says this when a query was given up while the server stood still; make chaos met it.
    lost = asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress")
    database = Database(settings.model_copy(update={"database_pool_size": 1}))
    try:
        before = await _backend(database)
        assert await _backend(database) == before  # the pool has one connection, and keeps it
        with pytest.raises(DatabaseUnavailable):
            async with database.connection():
                raise InternalError("SELECT 1", {}, lost)
        assert await _backend(database) != before
    finally:
        await database.close()


async def _backend(database: Database) -> int:
    """Return which process of Postgres serves the pool's connection."""
    async with database.connection() as connection:
        return (await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one()


async def test_a_bug_is_not_taken_for_a_database_that_is_away(settings: Settings) -> None:
    database = Database(settings)
    try:
        with pytest.raises(DBAPIError):
            async with database.connection():
                raise InternalError("SELECT 1", {}, asyncpg.InternalClientError("cannot encode this"))
    finally:
        await database.close()
