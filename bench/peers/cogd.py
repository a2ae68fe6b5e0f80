"""cog: asynchronously with webhooks, which is how it tells of a job, and synchronously."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from bench.peers.peer import HoldingPeer, Peer
from bench.peers.receiver import Receiver
from bench.peers.server import POLL_SECONDS, REFUSALS, Answer, Client, State, Ticket, Work
from bench.peers.venvs import Venv
from cli.processes import LOOPBACK

_STATES = {"succeeded": State.DONE, "failed": State.FAILED, "canceled": State.CANCELLED}


class _Cog(Peer):
    package = "cog"
    ready_path = "/health-check"

    def command(self, bin: Path) -> Sequence[str]:
        return [str(bin / "python"), "-m", "cog.server.http", "--host", LOOPBACK]

    def environment(self) -> Mapping[str, str]:
        return {
            "PORT": str(self.port),
            "COG_THROTTLE_RESPONSE_INTERVAL": "0",
            "COG_PREDICT_TYPE_STUB": "cogd.py:Predictor",
        }

    def is_ready(self, body: bytes) -> bool:
        return b'"READY"' in body


class Cog(_Cog):
    """With `Prefer: respond-async`; it answers no polls, so what became of a job is known by webhook alone."""

    name = "cog"
    has_webhooks = True

    def __init__(self, folder: Path, image: bytes, venv: Venv) -> None:
        super().__init__(folder, image, venv)
        self._receiver = Receiver()

    @asynccontextmanager
    async def connected(self) -> AsyncGenerator[None]:
        async with super().connected(), self._receiver:
            yield

    async def submit(
        self, work: Work, *, client: Client = Client.FIRST, key: str | None = None, webhook: str | None = None
    ) -> Ticket:
        body: dict[str, Any] = {
            "input": self.input_of(work),
            "webhook": webhook or self._receiver.url(work.tag),
            "webhook_events_filter": ["completed"],
        }
        headers = {"Prefer": "respond-async"}
        if key is None:
            answer = await self.call("POST", "/predictions", json=body, headers=headers)
        else:  # an id of the client's own is cog's word for an idempotency key
            headers["Idempotency-Key"] = key
            answer = await self.call("PUT", f"/predictions/{key}", json=body, headers=headers)
        return Ticket(work, answer.status, answer.body.get("id", ""))

    async def state(self, ticket: Ticket) -> State | None:
        event = self._receiver.newest.get(ticket.work.tag)
        return State.OPEN if event is None else _STATES[event["status"]]

    async def finished(self, ticket: Ticket, longest_pause: float = 0.05) -> State:
        await self._receiver.wait(ticket.work.tag)
        return _STATES[self._receiver.newest[ticket.work.tag]["status"]]

    async def cancel(self, ticket: Ticket) -> int | None:
        return (await self.call("POST", f"/predictions/{ticket.id}/cancel")).status


class SynchronousCog(_Cog, HoldingPeer):
    """The answer comes on the connection of the request; one that is refused is sent again."""

    name = "cog, synchronous"

    async def request(self, work: Work) -> Answer:
        while True:
            answer = await self.call("POST", "/predictions", seconds=None, json={"input": self.input_of(work)})
            if answer.status not in REFUSALS:
                return answer
            await asyncio.sleep(POLL_SECONDS)

    def read(self, answer: Answer) -> State:
        if answer.status == 0:
            return State.GONE
        return _STATES.get(answer.body.get("status", ""), State.FAILED)
