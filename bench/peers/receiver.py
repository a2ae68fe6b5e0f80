"""A receiver of webhooks that can go away and come back on the same port."""

import asyncio
import json
import time
from collections import defaultdict
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from cli.processes import LOOPBACK, free_port


class Receiver:
    """`url(tag)` is where events about one job go; the newest is kept, and all are counted."""

    def __init__(self) -> None:
        self._port = free_port()
        self._runner: web.AppRunner | None = None
        self._arrived: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.newest: dict[str, dict[str, Any]] = {}
        self.times: dict[str, list[float]] = defaultdict(list)
        """When each event arrived, as time.time() tells it, by tag."""

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def url(self, tag: str) -> str:
        return f"http://{LOOPBACK}:{self._port}/{tag}"

    async def open(self) -> None:
        """Listen."""
        application = web.Application()
        application.router.add_post("/{tag}", self._take)
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, LOOPBACK, self._port, shutdown_timeout=1).start()

    async def close(self) -> None:
        """Go away: whoever connects is refused."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def wait(self, tag: str, seconds: float | None = None) -> bool:
        """Wait for the first event about a job; tell whether it came within the time."""
        try:
            await asyncio.wait_for(self._arrived[tag].wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _take(self, request: web.Request) -> web.Response:
        tag = request.match_info["tag"]
        self.newest[tag] = json.loads(await request.read())
        self.times[tag].append(time.time())
        self._arrived[tag].set()
        return web.Response()
