"""A stack whose workers a test starts, signals and buries by name."""

import asyncio
import base64
import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg

from cli.processes import free_port, stop
from cli.stack import Stack
from tests import engines
from tests.requests import png

LEASE_SECONDS = 2.0
SWEEP_SECONDS = 0.2

_ENVIRONMENT = {
    "UPSCALED_ENGINE": "tests.engines:Obedient",
    "UPSCALED_LEASE_SECONDS": str(LEASE_SECONDS),
    "UPSCALED_SWEEP_SECONDS": str(SWEEP_SECONDS),
    "UPSCALED_OUTBOUND_ALLOW": "127.0.0.0/8",
    "UPSCALED_WEBHOOK_TIMEOUT_SECONDS": "2",
    "UPSCALED_LOG_LEVEL": "INFO",
}


_IMAGE = f"data:image/png;base64,{base64.b64encode(png(8, 8)).decode()}"


class Crew:
    """The workers of one stack, and a client of it."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self._numbers = count(1)

    @property
    def workers(self) -> list[subprocess.Popen[bytes]]:
        """Those that live."""
        processes = self.stack.processes.items()
        return [process for name, process in processes if name.startswith("worker") and process.poll() is None]

    def start_worker(self, **environ: str) -> subprocess.Popen[bytes]:
        """Start a worker whose environment holds `environ` as well."""
        name, common = f"worker-{next(self._numbers)}", self.stack.environment
        self.stack.environment = {**common, **environ}
        try:
            self.stack.start(name, "worker")
        finally:
            self.stack.environment = common
        return self.stack.processes[name]

    def fill_up(self, workers: int) -> None:
        """Let so many workers live, all of them registered and no others."""
        for _ in range(workers - len(self.workers)):
            self.start_worker()
        wanted = {str(process.pid) for process in self.workers}
        until(lambda: {row["name"].rpartition(":")[2] for row in self.sql("SELECT name FROM workers")} == wanted)

    def dismiss(self) -> None:
        """Let all workers end."""
        stop(self.workers, 10)

    def submit(self, prompt: str, *, webhook: str | None = None, headers: Mapping[str, str] | None = None) -> UUID:
        """Submit a job that does what the prompt says: see tests.engines."""
        params = {"image": _IMAGE, "scale_factor": 1, "prompt": prompt, "seed": next(self._numbers)}
        body = {"model": "clarity-upscale", "clarityUpscaleParams": params, "webhookUrl": webhook}
        return UUID(self.call("/v2/images/upscale", json.dumps(body).encode(), **(headers or {}))["jobId"])

    def cancel(self, job_id: UUID) -> None:
        self.call(f"/v2/jobs/{job_id}/cancel", b"")

    def job(self, job_id: UUID) -> Mapping[str, Any]:
        """Return the job's row."""
        (row,) = self.sql("SELECT * FROM jobs WHERE id = $1", job_id)
        return row

    def status(self, job_id: UUID) -> str:
        return self.job(job_id)["status"]

    def taker(self, job_id: UUID, attempt: int = 1, seconds: float = 20) -> subprocess.Popen[bytes]:
        """Wait until an attempt runs; return the worker that runs it."""
        until(lambda: (row := self.job(job_id))["status"] == "PROCESSING" and row["attempt"] == attempt, seconds)
        pid = int(self.job(job_id)["worker"].rpartition(":")[2])
        return next(process for process in self.workers if process.pid == pid)

    def end(self, job_id: UUID, seconds: float = 20) -> Mapping[str, Any]:
        """Wait until a job is over; return its row."""
        until(lambda: self.status(job_id) not in ("QUEUED", "PROCESSING"), seconds)
        return self.job(job_id)

    def objects(self, job_id: UUID) -> list[str]:
        """Return the names of all that lies in the job's folder."""
        folder = self.stack.settings.storage_dir / "results" / str(job_id)
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []

    def read(self, key: str) -> bytes:
        return (self.stack.settings.storage_dir / key).read_bytes()

    def sql(self, statement: str, *arguments: object) -> Sequence[Any]:
        assert self.stack.postgres is not None
        return asyncio.run(_fetch(self.stack.postgres.url(), statement, arguments))

    def call(self, path: str, data: bytes | None = None, **headers: str) -> Any:
        headers = {"X-API-Key": self.stack.key, "Content-Type": "application/json"} | headers
        request = urllib.request.Request(self.stack.url + path, data, headers)
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.load(response)


@contextmanager
def open_crew(folder: Path, **environ: str) -> Generator[Crew]:
    """Start a stack without workers; `environ` is for all of its processes."""
    logs, marks = folder / "logs", folder / "marks"
    logs.mkdir()
    marks.mkdir()
    environ = {**os.environ, **_ENVIRONMENT, engines.MARKS: str(marks), **environ}
    with Stack(folder / "data", port=free_port(), workers=0, logs=logs, environ=environ) as stack:
        yield Crew(stack)


def until(holds: Callable[[], bool], seconds: float = 20) -> float:
    """Wait for something to come about; return how many seconds that took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds, "it did not come about in time"
        time.sleep(0.02)
    return time.monotonic() - began


async def _fetch(url: str, statement: str, arguments: Sequence[object]) -> Sequence[Any]:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetch(statement, *arguments)
    finally:
        await connection.close()
