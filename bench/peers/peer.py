"""What the three peers have in common: a venv, one command, and an HTTP server that comes up."""

import asyncio
import base64
import os
from abc import abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

from bench.peers.models.job import JOURNAL
from bench.peers.process import Process, wait_until_ready
from bench.peers.server import Answer, Client, Server, State, Ticket, Work
from bench.peers.venvs import Venv
from cli.processes import LOOPBACK, free_port

MODELS = Path(__file__).parent / "models"


class Peer(Server):
    """A server from PyPI that runs one of the files in `models/`."""

    package: ClassVar[str]
    ready_path: ClassVar[str]

    def __init__(self, folder: Path, image: bytes, venv: Venv) -> None:
        super().__init__(folder.resolve(), image)
        self._venv = venv
        self._image = "data:image/png;base64," + base64.b64encode(image).decode()
        self._process: Process | None = None
        self.port = free_port()
        self.url = f"http://{LOOPBACK}:{self.port}"

    @abstractmethod
    def command(self, bin: Path) -> Sequence[str]:
        """Name the program in the venv's `bin`, and its arguments."""

    def environment(self) -> Mapping[str, str]:
        """Name the variables that this server needs beside the usual ones."""
        return {}

    def is_ready(self, body: bytes) -> bool:
        """Read the answer of the ready path, whose status was 200."""
        return True

    def version(self) -> str:
        return self._venv.version()

    def start(self) -> None:
        temporary = self.folder / "tmp"
        temporary.mkdir(exist_ok=True)
        environ = {
            "PATH": f"{self._venv.bin}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "HOME": str(self.folder),  # none may find or leave anything in a person's home …
            "TMPDIR": str(temporary),  # … nor leave sockets and pipes behind when it is killed
            "PYTHONDONTWRITEBYTECODE": "1",
            JOURNAL: str(self.journal.path),
            **self.environment(),
        }
        log = self.folder / "server.log"
        process = Process(self.command(self._venv.bin), folder=MODELS, environ=environ, log=log)
        self._process = process
        wait_until_ready(self.url + self.ready_path, self.is_ready, lambda: process.has_ended)

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()
            self._process = None

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()

    def pids(self) -> Sequence[int]:
        assert self._process is not None
        return self._process.pids

    def revive(self) -> None:
        assert self._process is not None
        if self._process.has_ended:
            self._process.kill()  # what it left behind holds the port
            self.start()

    def input_of(self, work: Work) -> dict[str, Any]:
        """Write down a job as the models read it."""
        return {"tag": work.tag, "seconds": work.seconds, "image": self._image}


class HoldingPeer(Peer):
    """A server that has no jobs: the client holds a connection until the answer comes."""

    accepts = "held"

    def __init__(self, folder: Path, image: bytes, venv: Venv) -> None:
        super().__init__(folder, image, venv)
        self._held: dict[str, asyncio.Task[Answer]] = {}

    @abstractmethod
    async def request(self, work: Work) -> Answer:
        """Send the one request and wait for its answer."""

    @abstractmethod
    def read(self, answer: Answer) -> State:
        """Tell what the answer says about the job."""

    async def submit(
        self, work: Work, *, client: Client = Client.FIRST, key: str | None = None, webhook: str | None = None
    ) -> Ticket:
        ticket = Ticket(work, 200, id=f"{len(self._held)}")
        self._held[ticket.id] = asyncio.create_task(self.request(work))
        return ticket

    async def state(self, ticket: Ticket) -> State | None:
        task = self._held[ticket.id]
        if not task.done():
            return State.OPEN
        return State.GONE if task.cancelled() else self.read(task.result())

    async def finished(self, ticket: Ticket, longest_pause: float = 0.05) -> State:
        await asyncio.wait([self._held[ticket.id]])
        state = await self.state(ticket)
        assert state is not None
        return state

    async def cancel(self, ticket: Ticket) -> int | None:
        """Drop the connection, which is all that a client can do."""
        self._held[ticket.id].cancel()
        return None

    @asynccontextmanager
    async def connected(self) -> AsyncGenerator[None]:
        async with super().connected():
            try:
                yield
            finally:
                for task in self._held.values():
                    task.cancel()
                await asyncio.gather(*self._held.values(), return_exceptions=True)
                self._held.clear()
