"""LitServe: one held request for each job."""

from collections.abc import Sequence
from pathlib import Path

from bench.peers.peer import HoldingPeer
from bench.peers.server import Answer, State, Work


class Lit(HoldingPeer):
    name = "LitServe"
    package = "litserve"
    ready_path = "/health"

    def command(self, bin: Path) -> Sequence[str]:
        return [str(bin / "python"), "lit.py", str(self.port)]

    async def request(self, work: Work) -> Answer:
        return await self.call("POST", "/predict", seconds=None, json=self.input_of(work))

    def read(self, answer: Answer) -> State:
        if answer.status == 0:
            return State.GONE
        return State.DONE if answer.status == 200 else State.FAILED
