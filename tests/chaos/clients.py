"""Clients as they should be written: an idempotency key with every submit, and again after whatever goes wrong."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.chaos.engine import Kind
from tests.chaos.receivers import Receiver
from tests.requests import png

PAUSE_SECONDS = 0.8
"""How long a client rests between two jobs at most."""

RETRY_SECONDS = 0.25
HEIGHT = 8

_REQUEST_SECONDS = 20.0
_OVER = ("COMPLETED", "FAILED", "CANCELLED")

_KINDS = {Kind.PLAIN: 87, Kind.SWELLING: 4, Kind.BURSTING: 2, Kind.LONG: 4, Kind.DYING: 1, Kind.DOZING: 2}
_RARE_KINDS = (Kind.POISON, Kind.HANGING)
_RARE_AFTER_SECONDS = 40.0
"""How long apart the jobs are that take workers with them."""


@dataclass
class Ledger:
    """What the clients were told: the gate compares it with what the database says."""

    accepted: dict[str, "Accepted"] = field(default_factory=dict[str, "Accepted"])
    """By idempotency key."""
    complaints: list[str] = field(default_factory=list[str])
    answers: Counter[str] = field(default_factory=Counter[str])
    """How often which status, or which kind of failure, came back."""


@dataclass
class Accepted:
    """One job that the service took on."""

    job_id: str
    kind: Kind
    seed: int
    with_webhook: bool
    with_deadline: bool = False
    cancel_accepted: bool = False
    seen_over: str | None = None
    """The last state that a client saw."""


class Client:
    """Talks to whichever API answers, and gives up on nothing."""

    def __init__(
        self, http: aiohttp.ClientSession, apis: Sequence[str], name: str, key: str, ledger: Ledger, dice: random.Random
    ) -> None:
        """`name` is that of the API key, which the receivers know, too."""
        self._http = http
        self._apis = apis
        self._name = name
        self._headers = {"X-API-Key": key}
        self._ledger = ledger
        self._dice = dice
        self._uploads: dict[Kind, str] = {}

    async def live(self, receivers: Sequence[Receiver], stop: asyncio.Event) -> None:
        """Submit one job after the other until `stop`, and do with each what callers do."""
        while not stop.is_set():
            (kind,) = self._dice.choices(list(_KINDS), list(_KINDS.values()))
            await self._one(kind, self._dice.choice(receivers) if self._dice.random() < 0.8 else None)
            await asyncio.sleep(self._dice.uniform(0, PAUSE_SECONDS))

    async def live_dangerously(self, receivers: Sequence[Receiver], stop: asyncio.Event) -> None:
        """Submit, now and then, a job that takes workers with it."""
        while not stop.is_set():
            for kind in _RARE_KINDS:
                await self.submit(kind, self._dice.choice(receivers))
            await asyncio.wait([asyncio.create_task(stop.wait())], timeout=_RARE_AFTER_SECONDS)

    async def live_fickly(self, receivers: Sequence[Receiver], stop: asyncio.Event) -> None:
        """Submit, and cancel as soon as the job runs, or a moment later: when it is about to be done."""
        while not stop.is_set():
            job = await self.submit(Kind.PLAIN, self._dice.choice(receivers), priority=5)
            for _ in range(100):
                _, answer = await self._call("GET", f"/v2/jobs/{job.job_id}")
                self._see(job, answer)
                if answer["status"] != "QUEUED":
                    break
                await asyncio.sleep(0.03)
            await asyncio.sleep(self._dice.uniform(0, 0.2))
            await self._cancel(job)

    async def _one(self, kind: Kind, receiver: Receiver | None) -> None:
        match self._dice.randrange(6):
            case 0:
                job = await self.submit(kind, receiver)
                await asyncio.sleep(self._dice.uniform(0, 0.5))
                await self._cancel(job)
            case 1:
                await self.submit(kind, receiver, {"Cancel-After": f"{self._dice.randint(1, 3)}s"})
            case 2:
                await self.submit(kind, receiver, {"Prefer": f"wait={self._dice.randint(1, 5)}"})
            case 3:
                await self._follow(await self.submit(kind, receiver), wait=0)
            case 4:
                await self._follow(await self.submit(kind, receiver), wait=self._dice.randint(1, 3))
            case _:
                await self.submit(kind, receiver)

    async def submit(
        self, kind: Kind, receiver: Receiver | None, headers: Mapping[str, str] | None = None, priority: int = 0
    ) -> Accepted:
        """Submit a job, again and again until it is accepted."""
        seed, idempotency_key = self._dice.getrandbits(53), f"{self._dice.getrandbits(128):032x}"
        body = {
            "model": "clarity-upscale",
            "clarityUpscaleParams": {"image": await self._upload(kind), "scale_factor": 1, "seed": seed},
            "priority": priority,
        }
        if receiver is not None:
            events = ["progress", "completed", "failed", "cancelled"]
            body |= {"webhookUrl": receiver.url(self._name), "webhookEvents": events}
        headers = {"Idempotency-Key": idempotency_key, **(headers or {})}
        status, answer = await self._call("POST", "/v2/images/upscale", json=body, headers=headers)
        job = Accepted(answer.get("jobId") or answer["id"], kind, seed, receiver is not None, "Cancel-After" in headers)
        self._ledger.accepted[idempotency_key] = job
        if status == 200:
            self._see(job, answer)
        if self._dice.random() < 0.1:
            await self._repeat(job, body, headers)
        return job

    async def _repeat(self, job: Accepted, body: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        _, answer = await self._call("POST", "/v2/images/upscale", json=body, headers=headers)
        if job.job_id not in (answer.get("jobId"), answer.get("id")):
            self._ledger.complaints.append(f"a repetition of {job.job_id} made {answer}")

    async def until_over(self, job: Accepted, seconds: float) -> None:
        """Poll closely until the job is over, or so many seconds have passed."""
        give_up_at = time.monotonic() + seconds
        while job.seen_over is None and time.monotonic() < give_up_at:
            _, answer = await self._call("GET", f"/v2/jobs/{job.job_id}")
            self._see(job, answer)
            await asyncio.sleep(0.05)

    async def _follow(self, job: Accepted, wait: int) -> None:
        for _ in range(10):
            _, answer = await self._call("GET", f"/v2/jobs/{job.job_id}", params={"wait": str(wait)})
            self._see(job, answer)
            if job.seen_over is not None:
                return
            await asyncio.sleep(0 if wait else 0.3)

    async def _cancel(self, job: Accepted) -> None:
        status, answer = await self._call("POST", f"/v2/jobs/{job.job_id}/cancel")
        if status in (200, 202):
            job.cancel_accepted = True
            self._see(job, answer)

    async def _upload(self, kind: Kind) -> str:
        if kind not in self._uploads:
            headers = {"Idempotency-Key": f"{self._dice.getrandbits(128):032x}"}
            _, answer = await self._call("POST", "/v2/uploads", files=png(kind, HEIGHT), headers=headers)
            self._uploads[kind] = f"upload://{answer['id']}"
        return self._uploads[kind]

    async def _call(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, files: bytes = b"", **options: Any
    ) -> tuple[int, dict[str, Any]]:
        """Call until there is an answer that is meant; of an error of ours, the ledger complains."""
        headers = self._headers | dict(headers or {})
        while True:
            if files:
                options["data"] = aiohttp.FormData()
                options["data"].add_field("file", files, filename="picture.png")
            try:
                async with self._http.request(
                    method, self._dice.choice(self._apis) + path, headers=headers, **options
                ) as response:
                    answer = await response.json()
                    status = response.status
            except (aiohttp.ClientError, TimeoutError) as error:
                self._ledger.answers[type(error).__name__] += 1
            else:
                self._ledger.answers[str(status)] += 1
                if status in (200, 201, 202, 409):
                    return status, answer
                if status not in (429, 503):
                    self._ledger.complaints.append(f"{method} {path} was answered {status}: {answer}")
            await asyncio.sleep(self._dice.uniform(0.5, 1.5) * RETRY_SECONDS)

    def _see(self, job: Accepted, answer: Mapping[str, Any]) -> None:
        status = answer["status"]
        if job.seen_over is not None and status != job.seen_over:
            self._ledger.complaints.append(f"job {job.job_id} was {job.seen_over} and then {status}")
        if status in _OVER:
            job.seen_over = status


def open_http() -> aiohttp.ClientSession:
    """Return a session that gives up on an answer after a while: an API may have been stopped."""
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=_REQUEST_SECONDS))
