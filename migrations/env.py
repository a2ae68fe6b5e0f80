"""Runs the migrations, one process at a time, on the database that UPSCALED_DATABASE_URL names."""

import asyncio

from alembic import context
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine

from core.settings import load_settings
from db.models import Model

ADVISORY_LOCK = 0x75707363616C65  # "upscale": whoever migrates holds it, so that replicas starting together queue up


def run_migrations(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=Model.metadata, compare_server_default=True)
    with context.begin_transaction():
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": ADVISORY_LOCK})
        # A statement that waits for a lock blocks everyone behind it: better to give up and be run again.
        connection.execute(text("SET LOCAL lock_timeout = '10s'"))
        context.run_migrations()


async def migrate() -> None:
    url = context.config.attributes.get("database_url") or load_settings().database_url
    engine = create_async_engine(url)
    try:
        async with engine.connect() as connection:
            await connection.run_sync(run_migrations)
            await connection.commit()
    finally:
        await engine.dispose()


asyncio.run(migrate())
