"""Serving the API until a signal ends it."""

import socket
import sys
from contextlib import suppress

import uvicorn
from fastapi import FastAPI

from api.app import create_app
from api.dependencies import Parts
from core.settings import Settings

GRACE_SECONDS = 5
"""How long requests that are under way may take once the process was told to end."""


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
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    return Server(config, app)


def serve(settings: Settings, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM; exits with status 3 when the address cannot be listened on."""
    server = make_server(settings, host, port)
    with suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        sys.exit(3)
