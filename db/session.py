"""The connection pool, and the two ways of using it: a transaction, or single statements."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from core.errors import DatabaseUnavailable
from core.settings import Settings

MESSAGE = "The database cannot be reached at the moment."


class Database:
    """A pool of connections to Postgres, for one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._engine = create_async_engine(
            settings.database_url,
            pool_size=settings.database_pool_size,
            max_overflow=0,
            pool_timeout=5,
            connect_args={
                "timeout": 5,
                "command_timeout": 30,
                "server_settings": {
                    "application_name": "upscaled",
                    # No transaction of ours stays open while anything else works; one that does is a bug or a
                    # partition, and would hold back every vacuum.
                    "idle_in_transaction_session_timeout": "10000",
                },
            },
        )
        # Single statements are transactions by themselves: no BEGIN and COMMIT around them.
        self._autocommit = self._engine.execution_options(isolation_level="AUTOCOMMIT")

    async def close(self) -> None:
        await self._engine.dispose()

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[AsyncConnection]:
        """Commit what the block did, or nothing of it; it is committed when the block has been left.

        Raises:
            DatabaseUnavailable: Postgres cannot be reached, or went away.
        """
        async with _translated(), self._engine.begin() as connection:
            yield connection

    @asynccontextmanager
    async def connection(self) -> AsyncGenerator[AsyncConnection]:
        """Lend a connection on which each statement is its own transaction: for reads and single changes.

        Raises:
            DatabaseUnavailable: Postgres cannot be reached, or went away.
        """
        async with _translated(), self._autocommit.connect() as connection:
            yield connection


@asynccontextmanager
async def _translated() -> AsyncGenerator[None]:
    try:
        yield
    except (OperationalError, InterfaceError, PoolTimeoutError, ConnectionError, TimeoutError) as error:
        raise DatabaseUnavailable(MESSAGE) from error
    except DBAPIError as error:
        if error.connection_invalidated:
            raise DatabaseUnavailable(MESSAGE) from error
        raise
