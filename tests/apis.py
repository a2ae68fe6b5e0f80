"""API processes, but for the process: real servers on real ports, in threads of the test; and what callers see."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx2 as httpx

from api.dependencies import Parts
from api.server import Server, make_server
from cli.processes import LOOPBACK, free_port
from core import progress
from core.notices import job_channel
from core.settings import Settings
from tests.broker import connect_redis
from tests.requests import body_of


class Api:
    """One running API, and a client of it."""

    def __init__(self, server: Server, thread: threading.Thread, client: httpx.Client) -> None:
        self.client = client
        self._server = server
        self._thread = thread

    @property
    def server(self) -> Server:
        return self._server

    @property
    def parts(self) -> Parts:
        return self._server.app.state.parts

    @property
    def ready(self) -> bool:
        return self._server.started and self.parts.watch.listening

    def submit(self) -> UUID:
        response = self.client.post("/v2/images/upscale", json=body_of("https://example.com/a.png"))
        assert response.status_code == 202, response.text
        return UUID(response.json()["jobId"])

    def tell_to_stop(self) -> None:
        self._server.should_exit = True

    def stop(self) -> float:
        """Stop as a signal does; return how many seconds that took."""
        began = time.monotonic()
        self.tell_to_stop()
        self._thread.join(timeout=30)
        return time.monotonic() - began


@contextmanager
def open_apis(settings: Settings, key: str, count: int) -> Generator[list[Api]]:
    """Run `count` APIs that share nothing but the settings' database and Redis."""
    with ExitStack() as started:
        apis: list[Api] = []
        for _ in range(count):
            port = free_port()
            server = make_server(settings, LOOPBACK, port)
            # FastAPI prepares its routes when it first needs them, and what it does to Python's warnings meanwhile must
            # not be done by two threads at a time.
            server.app.openapi()
            thread = threading.Thread(target=server.run)
            client = httpx.Client(base_url=f"http://{LOOPBACK}:{port}", headers={"X-API-Key": key}, timeout=90)
            apis.append(Api(server, thread, started.enter_context(client)))
            thread.start()
            started.callback(apis[-1].stop)
        started.callback(lambda: [api.tell_to_stop() for api in apis])
        until(lambda: all(api.ready for api in apis), 5)
        yield apis


class Jobs:
    """Changes jobs behind everybody's back, and announces it or not."""

    def __init__(self, settings: Settings, sql: Callable[..., Sequence[Any]]) -> None:
        self._settings = settings
        self._sql = sql

    def begin(self, job_id: UUID, attempt: int = 1) -> None:
        self._sql(
            "UPDATE jobs SET status = 'PROCESSING', attempt = $2, started_at = now() WHERE id = $1", *(job_id, attempt)
        )

    def requeue(self, job_id: UUID) -> None:
        self._sql("UPDATE jobs SET status = 'QUEUED', started_at = NULL WHERE id = $1", job_id)

    def end(self, job_id: UUID) -> None:
        self._sql("UPDATE jobs SET status = 'FAILED', error = 'x', completed_at = now() WHERE id = $1", job_id)

    def announce(self, job_id: UUID) -> None:
        with connect_redis(self._settings.redis_url) as broker:
            broker.publish(job_channel(job_id), b"")

    def report(self, job_id: UUID, attempt: int, percent: int) -> None:
        async def report() -> None:
            async with progress.connect(self._settings) as redis:
                await progress.report(redis, job_id, attempt, percent)

        asyncio.run(report())

    def channels(self) -> int:
        with connect_redis(self._settings.redis_url) as broker:
            return len(broker.pubsub_channels("job:*"))


@dataclass(frozen=True)
class Event:
    """One event of a stream; a comment has no id."""

    id: str
    name: str
    data: Any
    raw: str

    @property
    def place(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self.id.split("."))


def events_of(lines: Iterable[str]) -> Generator[Event]:
    """Read a stream as a browser does: comments and blocks without data are no events."""
    for block in blocks_of(lines):
        fields = dict(line.split(": ", 1) for line in block if not line.startswith(":"))
        if "data" in fields:
            yield Event(fields["id"], fields["event"], json.loads(fields["data"]), "\n".join(block))


def blocks_of(lines: Iterable[str]) -> Generator[list[str]]:
    block: list[str] = []
    for line in lines:
        if line:
            block.append(line)
        else:
            yield block
            block = []
    assert not block, "the stream ended within an event"


def until(holds: Callable[[], bool], seconds: float) -> float:
    """Wait for something to come about; return how many seconds that took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds, "it did not come about in time"
        time.sleep(0.005)
    return time.monotonic() - began
