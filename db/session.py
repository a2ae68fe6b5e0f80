"""The connection pool. Every statement on its connections is a transaction by itself."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import asyncpg
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from core.errors import DatabaseUnavailable
from core.settings import Settings

MESSAGE = "The database cannot be reached at the moment."

_PASSING = ("08", "25006", "40", "53", "57")
"""Classes of SQLSTATE, and one state, that time mends: lost connections, spent resources, a server that starts, stops
or recovers, or that only reads until a failover is over."""


class Database:
    """A pool of connections to Postgres, for one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._engine = create_async_engine(
            settings.database_url,
            # No BEGIN and COMMIT around single statements: what must happen together is one statement.
            isolation_level="AUTOCOMMIT",
            # Errors are logged, and parameters are secrets, prompts and signed URLs.
            hide_parameters=True,
            pool_size=settings.database_pool_size,
            max_overflow=0,
            pool_timeout=5,
            connect_args={"timeout": 5, "command_timeout": 30, "server_settings": {"application_name": "upscaled"}},
        )

    async def close(self) -> None:
        await self._engine.dispose()

    @asynccontextmanager
    async def connection(self) -> AsyncGenerator[AsyncConnection]:
        """Lend a connection on which each statement is its own transaction: for reads and single changes.

        Raises:
            DatabaseUnavailable: Postgres cannot be reached, or went away.
        """
        async with _translated(), self._engine.connect() as connection:
            try:
                yield connection
            except DBAPIError as error:
                if _is_stuck(error):
                    await connection.invalidate()  # or whoever gets it next would fare no better
                raise


def _is_stuck(error: DBAPIError) -> bool:
    """Tell whether asyncpg still waits on this connection for an answer that was lost, and nobody else does."""
    return "another operation" in str(error.orig)


@asynccontextmanager
async def _translated() -> AsyncGenerator[None]:
    try:
        yield
    except (OperationalError, InterfaceError, PoolTimeoutError, PendingRollbackError, OSError) as error:
        raise DatabaseUnavailable(MESSAGE) from error
    except asyncpg.InterfaceError as error:  # it was lost while SQLAlchemy set it up, where nothing is translated
        raise DatabaseUnavailable(MESSAGE) from error
    except asyncpg.PostgresError as error:
        if (error.sqlstate or "").startswith(_PASSING):
            raise DatabaseUnavailable(MESSAGE) from error
        raise
    except DBAPIError as error:
        if (
            error.connection_invalidated
            or _is_stuck(error)
            or str(getattr(error.orig, "sqlstate", "")).startswith(_PASSING)
        ):
            raise DatabaseUnavailable(MESSAGE) from error
        raise
