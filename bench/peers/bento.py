"""BentoML tasks: submit and poll; results in an SQLite file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.peers.peer import Peer
from bench.peers.server import Client, State, Ticket, Work
from cli.processes import LOOPBACK

_STATES = {
    "completed": State.DONE,
    "failed": State.FAILED,
    "canceled": State.CANCELLED,
    "in_progress": State.OPEN,
    "pending": State.OPEN,
}


class Bento(Peer):
    name = "BentoML"
    package = "bentoml"
    ready_path = "/readyz"

    def command(self, bin: Path) -> Sequence[str]:
        return [str(bin / "bentoml"), "serve", "bento:Noop", "--host", LOOPBACK, "--port", str(self.port)]

    def environment(self) -> Mapping[str, str]:
        return {
            "BENTOML_DO_NOT_TRACK": "True",
            "BENTOML_HOME": str(self.folder / "bentoml"),
            "BENTOML_RESULT_STORE": str(self.folder / "tasks.db"),
        }

    async def submit(
        self, work: Work, *, client: Client = Client.FIRST, key: str | None = None, webhook: str | None = None
    ) -> Ticket:
        headers = {} if key is None else {"Idempotency-Key": key}
        answer = await self.call("POST", "/run/submit", json=self.input_of(work), headers=headers)
        return Ticket(work, answer.status, answer.body.get("task_id", ""))

    async def state(self, ticket: Ticket) -> State | None:
        answer = await self.call("GET", "/run/status", params={"task_id": ticket.id})
        if answer.status == 404:
            return State.GONE
        return _STATES[answer.body["status"]] if answer.status == 200 else None

    async def cancel(self, ticket: Ticket) -> int | None:
        return (await self.call("PUT", "/run/cancel", params={"task_id": ticket.id})).status
