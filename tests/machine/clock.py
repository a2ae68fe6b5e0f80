"""A clock that a test sets: in a database that has it, `now()` is what the test says, on every connection."""

from datetime import datetime

import asyncpg

from db.models import Model

_FACE = """
    CREATE SCHEMA clock;
    CREATE TABLE clock.face (at timestamptz NOT NULL) WITH (fillfactor = 10);
    INSERT INTO clock.face VALUES (pg_catalog.now());
    CREATE FUNCTION clock.now() RETURNS timestamptz LANGUAGE sql STABLE AS 'SELECT at FROM clock.face';
"""


async def install(url: str) -> None:
    """Put the clock into a database; connections that are open already keep the real one."""
    defaults = [
        f"ALTER TABLE {table.name} ALTER COLUMN {column.name} SET DEFAULT clock.now();"
        for table in Model.metadata.tables.values()
        for column in table.columns
        if "now()" in str(getattr(column.server_default, "arg", ""))
    ]
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(_FACE + "".join(defaults))
        # PostgreSQL looks into pg_catalog first, unless the path names it later.
        name = url.rpartition("/")[2]
        await connection.execute(f"ALTER DATABASE {name} SET search_path = clock, pg_catalog, public")
    finally:
        await connection.close()


async def set_to(connection: asyncpg.Connection, at: datetime) -> None:
    await connection.execute("UPDATE clock.face SET at = $1", at)
