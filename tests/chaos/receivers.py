"""Receivers of webhooks on loopback: they verify every signature and remember every id; some misbehave for a while."""

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from standardwebhooks import Webhook, WebhookVerificationError

from cli.processes import LOOPBACK, free_port

MOODS = ("hangs", "answers 500", "vanishes", "cuts the line")
TERMINAL = ("completed", "failed", "cancelled")


@dataclass
class Received:
    """What arrived, over all receivers."""

    bodies: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """The body that came with each terminal webhook id, whatever was answered."""
    acknowledged: set[str] = field(default_factory=set[str])
    """The ids that were answered with 200."""
    ids_by_job: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict[str, set[str]](set))
    complaints: list[str] = field(default_factory=list[str])
    posts: int = 0
    progress: int = 0


class Receiver:
    """One address that webhooks go to."""

    def __init__(self, received: Received, secrets: dict[str, str]) -> None:
        """`secrets` are those of the API keys that the URL's path names."""
        self.port = free_port()
        self.mood: str | None = None
        self._received = received
        self._secrets = secrets
        self._recovered = asyncio.Event()
        app = web.Application()
        app.router.add_post("/{key}", self._answer)
        self._runner = web.AppRunner(app, access_log=None)
        self._site: web.TCPSite | None = None

    def url(self, key: str) -> str:
        return f"http://{LOOPBACK}:{self.port}/{key}"

    async def open(self) -> None:
        await self._runner.setup()
        await self._listen()

    async def close(self) -> None:
        self._recovered.set()
        await self._runner.cleanup()

    async def misbehave(self, mood: str) -> None:
        self.mood = mood
        self._recovered.clear()
        if mood == "vanishes" and self._site is not None:
            await self._site.stop()

    async def recover(self) -> None:
        mood, self.mood = self.mood, None
        self._recovered.set()
        if mood == "vanishes":
            await self._listen()

    async def _listen(self) -> None:
        self._site = web.TCPSite(self._runner, LOOPBACK, self.port, reuse_address=True)
        await self._site.start()

    async def _answer(self, request: web.Request) -> web.Response:
        webhook_id = self._take(request, await request.read())
        match self.mood:
            case "hangs":
                await self._recovered.wait()
                return web.Response(status=503)
            case "answers 500":
                return web.Response(status=500)
            case "cuts the line" | "vanishes":
                if request.transport is not None:
                    request.transport.abort()
                return web.Response(status=503)
            case _:
                self._received.acknowledged.add(webhook_id)
                return web.Response()

    def _take(self, request: web.Request, data: bytes) -> str:
        received, webhook_id = self._received, request.headers.get("webhook-id", "")
        received.posts += 1
        body: dict[str, Any] = json.loads(data)
        try:
            Webhook(self._secrets[request.match_info["key"]]).verify(data, dict(request.headers))
        except WebhookVerificationError as error:
            received.complaints.append(f"webhook {webhook_id}: {error}")
        if body["event"] not in TERMINAL:
            received.progress += 1
            return webhook_id
        before = received.bodies.setdefault(webhook_id, body)
        if _told(before) != _told(body):
            received.complaints.append(f"webhook {webhook_id} said two things: {_told(before)}, {_told(body)}")
        received.ids_by_job[body["jobId"]].add(webhook_id)
        return webhook_id


def _told(body: dict[str, Any]) -> tuple[Any, ...]:
    result: dict[str, Any] = body.get("result") or {}
    return body["jobId"], body["event"], body["status"], body["timestamp"], result.get("sha256")


@asynccontextmanager
async def open_receivers(count: int, secrets: dict[str, str]) -> AsyncGenerator[tuple[Received, list[Receiver]]]:
    received = Received()
    receivers = [Receiver(received, secrets) for _ in range(count)]
    try:
        for receiver in receivers:
            await receiver.open()
        yield received, receivers
    finally:
        for receiver in receivers:
            await receiver.close()
