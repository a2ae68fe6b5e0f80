"""upscaled itself, with everything it needs: API, dispatcher, worker, PostgreSQL and Redis."""

import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import aiohttp
import psutil

from bench.peers.models.job import JOURNAL
from bench.peers.process import kill, writers_of
from bench.peers.server import Client, Server, State, Ticket, Work
from cli.keys import create_key
from cli.processes import free_port
from cli.stack import Stack

_STATES = {
    "QUEUED": State.OPEN,
    "PROCESSING": State.OPEN,
    "COMPLETED": State.DONE,
    "FAILED": State.FAILED,
    "CANCELLED": State.CANCELLED,
}
_SETTINGS = {
    "UPSCALED_ENGINE": "bench.engines:Journalled",
    "UPSCALED_LEASE_SECONDS": "3",
    "UPSCALED_LOG_LEVEL": "WARNING",
    "UPSCALED_OUTBOUND_ALLOW": "127.0.0.0/8",
    "UPSCALED_WEBHOOK_RETRY_SECONDS": "1,5,15,30,60",
}


class Upscaled(Server):
    name = "upscaled"
    has_webhooks = True
    workers: ClassVar[int] = 1
    preference: ClassVar[dict[str, str]] = {}
    """What a submit asks for in its headers."""

    def __init__(self, folder: Path, image: bytes) -> None:
        super().__init__(folder.resolve(), image)
        self._stack: Stack | None = None
        self._keys = dict[Client, str]()
        self._owners = dict[str, Client]()
        self._ended = dict[str, State]()
        self._uploads = dict[Client, str]()

    def version(self) -> str:
        return version("upscaled")

    def start(self) -> None:
        port = free_port() if not self.url else int(self.url.rpartition(":")[2])
        environ = {**os.environ, **_SETTINGS, JOURNAL: str(self.journal.path)}
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        self._stack = Stack(self.folder / "data", port=port, workers=self.workers, logs=logs, environ=environ)
        self._stack.__enter__()
        self.url = self._stack.url

    def stop(self) -> None:
        if self._stack is not None:
            stack, self._stack = self._stack, None
            stack.__exit__(None, None, None)

    def kill(self) -> None:
        kill(self.pids())
        self.stop()  # what this process still holds, above all the lock of the data's folder

    def pids(self) -> Sequence[int]:
        assert self._stack is not None
        pids = list(writers_of(str(self.journal.path)))
        for server in (self._stack.postgres, self._stack.redis):
            assert server is not None
            assert server.pid is not None
            pids += [server.pid, *(child.pid for child in psutil.Process(server.pid).children(recursive=True))]
        return pids

    def revive(self) -> None:
        assert self._stack is not None
        for name, process in list(self._stack.processes.items()):
            if process.poll() is not None:
                # Only workers are killed alone; the API's address would have to be named again.
                self._stack.start(name, "worker" if name.startswith("worker") else name)

    async def submit(
        self, work: Work, *, client: Client = Client.FIRST, key: str | None = None, webhook: str | None = None
    ) -> Ticket:
        # An engine sees neither ids nor keys; the prompt is what reaches it unchanged.
        params = {"image": self._uploads[client], "scale_factor": 1, "prompt": f"{work.tag} {work.seconds}"}
        body = {"model": "clarity-upscale", "clarityUpscaleParams": params}
        headers = self._headers(client) | self.preference | ({"Idempotency-Key": key} if key else {})
        if webhook is not None:
            body["webhookUrl"] = webhook
        answer = await self.call("POST", "/v2/images/upscale", json=body, headers=headers)
        ticket = Ticket(work, answer.status, answer.body.get("jobId", answer.body.get("id", "")))
        self._owners[ticket.id] = client
        if answer.status == 200:  # the job had ended before the answer left
            self._ended[ticket.id] = _STATES[answer.body["status"]]
        return ticket

    async def state(self, ticket: Ticket) -> State | None:
        if ticket.id in self._ended:
            return self._ended[ticket.id]
        answer = await self.call("GET", f"/v2/jobs/{ticket.id}", headers=self._headers(self._owners[ticket.id]))
        if answer.status == 404:
            return State.GONE
        return _STATES[answer.body["status"]] if answer.status == 200 else None

    async def cancel(self, ticket: Ticket) -> int | None:
        headers = self._headers(self._owners[ticket.id])
        return (await self.call("POST", f"/v2/jobs/{ticket.id}/cancel", headers=headers)).status

    @asynccontextmanager
    async def connected(self) -> AsyncGenerator[None]:
        assert self._stack is not None
        async with super().connected():
            for client in Client:
                self._keys[client] = await create_key(self._stack.settings, client)
                form = aiohttp.FormData()
                form.add_field("file", self.image, filename="image.png")
                answer = await self.call("POST", "/v2/uploads", data=form, headers=self._headers(client))
                self._uploads[client] = f"upload://{answer.body['id']}"
            yield

    def _headers(self, client: Client) -> dict[str, str]:
        return {"X-API-Key": self._keys[client]}


class Waiting(Upscaled):
    """The answer to a submit is held until the job is over, so that nobody polls."""

    name = "upscaled, Prefer: wait"
    preference: ClassVar[dict[str, str]] = {"Prefer": "wait=15"}


class FourWorkers(Upscaled):
    """As many workers as docs/performance.md has."""

    name = "upscaled, 4 workers"
    workers = 4
