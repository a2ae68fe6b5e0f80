"""Serving the API until a signal ends it."""

import resource
import socket
import sys
from contextlib import suppress

import uvicorn
from fastapi import FastAPI

from api.app import create_app
from api.dependencies import Parts
from api.protocol import Protocol
from core.settings import Settings

GRACE_SECONDS = 5
"""How long requests that are under way may take once the process was told to end."""

KEEP_ALIVE_SECONDS = 15
"""How long a connection may lie idle between two requests: longer than a caller waits between two polls."""

MOST_CONNECTIONS = 10_000
FEWEST_CONNECTIONS = 10

RESERVED_FILES = 200
"""How many files the process opens for itself, to its database and the like; each connection may need one more."""


class Server(uvicorn.Server):
    """Lets those who wait for jobs go when it is told to end: some would stay for a minute, or for an hour."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self.app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        parts: Parts = self.app.state.parts
        parts.watch.close()
        await super().shutdown(sockets)


def make_server(settings: Settings, host: str, port: int) -> Server:
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        access_log=False,
        log_config=None,
        date_header=False,
        server_header=False,
        http=Protocol,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        limit_concurrency=_most_connections(),
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    return Server(config, app)


def _most_connections() -> int:
    """Return how many connections the process has room for: one more is answered 503, and does not wait in vain."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(FEWEST_CONNECTIONS, min(MOST_CONNECTIONS, (files - RESERVED_FILES) // 2))


def _ask_for_files() -> None:
    """Raise how many files the process may open, often 1024, as far as it may by itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MOST_CONNECTIONS + RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(OSError, ValueError):  # macOS allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def serve(settings: Settings, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM; exits with status 3 when the address cannot be listened on."""
    _ask_for_files()
    server = make_server(settings, host, port)
    with suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        sys.exit(3)
