"""What every server under trial can be asked: to start and to die, to take a job and to tell what became of it."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

import aiohttp

from bench.peers.journal import Journal

CALL_SECONDS = 20.0
"""How long one call may take before the server counts as out of reach."""

POLL_SECONDS, POLL_GROWTH = 0.02, 1.5
REFUSALS = {409, 429, 503}
"""Answers that ask the client to come again."""


class State(StrEnum):
    """What a server says about a job."""

    OPEN = "open"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    GONE = "unknown to the server"
    """It knows no such job, or it broke the connection on which the answer should have come."""


class Client(StrEnum):
    """Who submits: a server that knows clients apart is told."""

    FIRST = "first"
    GREEDY = "greedy"
    POLITE = "polite"


@dataclass(frozen=True)
class Work:
    """One job: `tag` is its name in the journal."""

    tag: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Ticket:
    """What came back from a submit."""

    work: Work
    status: int
    """Of HTTP; 0 when there was no answer."""
    id: str = ""

    @property
    def accepted(self) -> bool:
        return 200 <= self.status < 300


@dataclass(frozen=True)
class Answer:
    """Of one call: a status, 0 when there was none, and a JSON object, empty when the body was something else."""

    status: int
    body: Mapping[str, Any]


class Server(ABC):
    """One server with one worker process, on a folder and a port of its own."""

    name: ClassVar[str]
    has_webhooks: ClassVar[bool] = False
    accepts: ClassVar[str] = "accepted"
    """What taking a job is called in the tables."""

    def __init__(self, folder: Path, image: bytes) -> None:
        """`folder` takes data and logs; `image` is the PNG that every job is given."""
        folder.mkdir(parents=True)
        self.folder = folder
        self.image = image
        self.journal = Journal(folder / "journal")
        self.url = ""
        self._http: aiohttp.ClientSession | None = None

    @abstractmethod
    def version(self) -> str:
        """Tell which release this is."""

    @abstractmethod
    def start(self) -> None:
        """Start on the same folder and port as before, and return when the server is ready for jobs."""

    @abstractmethod
    def stop(self) -> None:
        """End everything that was started; do nothing when nothing runs."""

    @abstractmethod
    def kill(self) -> None:
        """Send SIGKILL to every process of the server."""

    @abstractmethod
    def pids(self) -> Sequence[int]:
        """Find every process of the server, what it keeps its data in included."""

    @abstractmethod
    def revive(self) -> None:
        """Start again what has ended by itself, as systemd or Kubernetes would; leave alone what still runs."""

    @abstractmethod
    async def submit(
        self, work: Work, *, client: Client = Client.FIRST, key: str | None = None, webhook: str | None = None
    ) -> Ticket:
        """Hand in a job once; `key` is an Idempotency-Key, `webhook` a URL."""

    @abstractmethod
    async def state(self, ticket: Ticket) -> State | None:
        """Tell what the server says about a job; None when it does not answer."""

    @abstractmethod
    async def cancel(self, ticket: Ticket) -> int | None:
        """Ask for a job's end and return the answer's status; None when the server has no such call."""

    async def finished(self, ticket: Ticket, longest_pause: float = 0.05) -> State:
        """Wait, however long, for a job's end: polling, as the official clients of such services do."""
        pause = POLL_SECONDS
        while (state := await self.state(ticket)) in (State.OPEN, None):
            await asyncio.sleep(pause)
            pause = min(pause * POLL_GROWTH, longest_pause)
        assert state is not None
        return state

    @asynccontextmanager
    async def connected(self) -> AsyncGenerator[None]:
        """Have client connections to the server."""
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=CALL_SECONDS)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as self._http:
            yield

    async def call(self, method: str, path: str, seconds: float | None = CALL_SECONDS, **options: Any) -> Answer:
        """Send one request; that there is no answer is an answer, too."""
        assert self._http is not None
        timeout = aiohttp.ClientTimeout(total=seconds)
        try:
            async with self._http.request(method, self.url + path, timeout=timeout, **options) as response:
                is_json = response.content_type == "application/json"
                return Answer(response.status, await response.json() if is_json else {})
        except (aiohttp.ClientError, TimeoutError, ConnectionError):
            return Answer(0, {})
