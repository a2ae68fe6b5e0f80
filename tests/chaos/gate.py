"""The gate: after the faults the service comes to rest in time, and everything agrees with everything."""

import asyncio
import hashlib
import io
import json
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.chaos.clients import Accepted, Ledger
from tests.chaos.engine import HUNG_ATTEMPTS, Kind
from tests.chaos.receivers import Received
from tests.chaos.stack import LEASE_SECONDS, MAX_STRIKES, STALL_SECONDS, SWEEP_SECONDS, House

JOBS_SECONDS = 2 * LEASE_SECONDS + max(
    HUNG_ATTEMPTS * (STALL_SECONDS + LEASE_SECONDS + 2 * SWEEP_SECONDS + 2),
    MAX_STRIKES * (LEASE_SECONDS + 2 * SWEEP_SECONDS + 2),
)
"""How long the last jobs may take once the faults are over: a poisonous one kills all the workers that it may."""

WEBHOOKS_SECONDS = 100.0
"""The same for webhooks: a receiver that seemed dead twice is left alone for a minute."""

SETTLE_SECONDS = 2 * LEASE_SECONDS + 4 * SWEEP_SECONDS

_FAULTS = {"worker_lost", "storage_unavailable", "out_of_memory"}
"""Why a job may fail, under faults; whatever else there is to say of its request, nothing was wrong with it."""


@dataclass
class Verdict:
    """What the gate found."""

    complaints: list[str] = field(default_factory=list[str])
    states: dict[str, int] = field(default_factory=dict[str, int])
    """How many jobs ended how."""
    strikes: dict[int, int] = field(default_factory=dict[int, int])
    jobs_seconds: float = 0.0
    webhooks_seconds: float = 0.0
    leftovers: int = 0
    """Objects that no row named, of killed attempts; the sweep found them."""


class Gate:
    """Asks the database, the storage, the receivers and the metrics, past all of our code."""

    def __init__(self, house: House, ledger: Ledger, received: Received) -> None:
        self._house = house
        self._ledger = ledger
        self._received = received
        self.verdict = Verdict()

    async def judge(self) -> Verdict:
        """Wait until everything has come to rest, then compare."""
        self._connection = await asyncpg.connect(self._house.postgres.url())
        try:
            await self._come_to_rest()
            jobs = {str(row["id"]): row for row in await self._rows("SELECT * FROM jobs")}
            self._compare_jobs(jobs)
            self._compare_objects(jobs)
            await self._compare_webhooks(jobs)
            await self._compare_metrics(jobs)
            await self._compare_register()
            await self._purge()
        finally:
            await self._connection.close()
        self.verdict.complaints += [*self._ledger.complaints, *self._received.complaints]
        return self.verdict

    async def _come_to_rest(self) -> None:
        # Pauses of minutes are over: nobody waits for them here.
        await self._connection.execute("UPDATE jobs SET due_at = now() WHERE status = 'QUEUED' AND due_at > now()")
        open_jobs = "SELECT count(*) FROM jobs WHERE status IN ('QUEUED', 'PROCESSING')"
        self.verdict.jobs_seconds = await self._until_none("jobs", open_jobs, JOBS_SECONDS)
        pending = "SELECT count(*) FROM deliveries WHERE status = 'pending'"
        self.verdict.webhooks_seconds = await self._until_none("deliveries", pending, WEBHOOKS_SECONDS)

    def _compare_jobs(self, jobs: Mapping[str, Any]) -> None:
        accepted = {job.job_id: job for job in self._ledger.accepted.values()}
        self._expect(len(accepted) == len(self._ledger.accepted), "two idempotency keys were given the same job")
        for job_id in accepted.keys() - jobs.keys():
            self._complain(f"job {job_id} was accepted and is not there")
        for job_id in jobs.keys() - accepted.keys():
            self._complain(f"job {job_id} was made for a key that was given another, or none")
        for job_id in accepted.keys() & jobs.keys():
            for complaint in _complaints_of(accepted[job_id], jobs[job_id]):
                self._complain(f"job {job_id} ({accepted[job_id].kind.name}): {complaint}")
        for job in jobs.values():
            state = job["status"] + (f" {job['error_code']}" if job["error_code"] else "")
            self.verdict.states[state] = self.verdict.states.get(state, 0) + 1
            self.verdict.strikes[job["strikes"]] = self.verdict.strikes.get(job["strikes"], 0) + 1

    def _compare_objects(self, jobs: Mapping[str, Any]) -> None:
        folder, seeds = self._storage(), {job.job_id: job.seed for job in self._ledger.accepted.values()}
        named = {job["result_key"]: job for job in jobs.values() if job["result_key"]}
        for key, job in named.items():
            file = folder / key
            data = file.read_bytes() if file.exists() else b""
            whole = hashlib.sha256(data).hexdigest() == job["result"]["sha256"]
            self._expect(whole, f"job {job['id']}: the object {key} is not what was recorded")
            if whole and str(job["id"]) in seeds:
                with Image.open(io.BytesIO(data)) as picture:
                    mine = picture.getpixel((0, 0)) == tuple(seeds[str(job["id"])].to_bytes(8)[-3:])
                self._expect(mine, f"job {job['id']}: its result is another job's")
        self.verdict.leftovers = len(self._objects() - named.keys())

    async def _compare_webhooks(self, jobs: Mapping[str, Any]) -> None:
        rows = await self._rows("SELECT * FROM deliveries")
        owed = {job.job_id for job in self._ledger.accepted.values() if job.with_webhook}
        self._expect({str(row["job_id"]) for row in rows} == owed, "deliveries are owed for other jobs than asked")
        self._expect(len(rows) == len(owed), "a job has several deliveries")
        for row in rows:
            job, webhook_id = jobs[str(row["job_id"])], str(row["id"])
            body = self._received.bodies.get(webhook_id, {})
            who = f"webhook {webhook_id} of job {job['id']}"
            self._expect(row["status"] == "delivered", f"{who} is {row['status']} after {row['attempts']} attempts")
            self._expect(webhook_id in self._received.acknowledged, f"{who} never arrived")
            self._expect(body.get("status") == job["status"], f"{who} says {body.get('status')}")
            self._expect(row["event"] == job["status"].lower(), f"{who} is about {row['event']}")
        for job_id, ids in self._received.ids_by_job.items():
            self._expect(len(ids) == 1, f"job {job_id} has {len(ids)} terminal webhook ids")

    async def _compare_metrics(self, jobs: Mapping[str, Any]) -> None:
        def count(*states: str) -> int:
            return sum(job["status"] in states for job in jobs.values())

        expected = {
            ("upscaled_jobs_submitted_total", ""): len(jobs),
            **{
                ("upscaled_jobs_finished_total", state.lower()): count(state)
                for state in ("COMPLETED", "FAILED", "CANCELLED")
            },
            **{("upscaled_jobs", state.lower()): count(state) for state in ("QUEUED", "PROCESSING")},
        }
        for api in self._house.apis:
            said = await _read_metrics(api, self._house.stack.key)
            for name, value in expected.items():
                self._expect(said.get(name) == value, f"{api} says {name} is {said.get(name)}, and it is {value}")

    async def _compare_register(self) -> None:
        """Registrations that were left behind have run out."""
        there = len(self._house.names("worker"))
        took = await self._until(lambda: self._count("SELECT count(*) FROM workers"), there, SETTLE_SECONDS)
        self._expect(took is not None, f"the register does not hold exactly the {there} workers that live")

    async def _purge(self) -> None:
        """Let all that was left behind be due for deletion: nothing may remain."""
        await self._connection.execute("UPDATE jobs SET purge_at = now() WHERE purge_at IS NOT NULL")
        unpurged = "SELECT count(*) FROM jobs WHERE purge_at IS NOT NULL"
        await self._until_none("jobs to purge", unpurged, SETTLE_SECONDS + len(self._ledger.accepted) / 50)
        for path in (self._storage() / "results").resolve().rglob("*"):
            self._complain(f"{path} lies around after everything was purged")

    async def _until_none(self, what: str, counting: str, seconds: float) -> float:
        took = await self._until(lambda: self._count(counting), 0, seconds)
        if took is None:
            self._complain(f"{await self._count(counting)} {what} left after {seconds:g} seconds")
        return seconds if took is None else took

    async def _until(self, count: Callable[[], Awaitable[int]], wanted: int, seconds: float) -> float | None:
        began = time.monotonic()
        while await count() != wanted:
            if time.monotonic() - began > seconds:
                return None
            await asyncio.sleep(0.1)
        return time.monotonic() - began

    async def _count(self, statement: str) -> int:
        return await self._connection.fetchval(statement)

    async def _rows(self, statement: str) -> Sequence[Any]:
        return [_read(dict(row)) for row in await self._connection.fetch(statement)]

    def _storage(self) -> Path:
        return self._house.stack.settings.storage_dir

    def _objects(self) -> set[str]:
        """Return the keys of all that lies under results/."""
        folder = (self._storage() / "results").resolve()
        return {f"results/{file.relative_to(folder)}" for file in folder.rglob("*") if file.is_file()}

    def _expect(self, holds: bool, complaint: str) -> None:
        if not holds:
            self._complain(complaint)

    def _complain(self, complaint: str) -> None:
        self.verdict.complaints.append(complaint)


def _complaints_of(accepted: Accepted, job: Mapping[str, Any]) -> Iterator[str]:
    """Compare one job with what its client did and was told."""
    status = job["status"]
    if accepted.seen_over not in (None, status):
        yield f"was seen {accepted.seen_over} and is {status}"
    if job["strikes"] > MAX_STRIKES:
        yield f"has {job['strikes']} strikes"
    match status:
        case "COMPLETED":
            yield from _complaints_of_completed(accepted, job)
        case "FAILED":
            yield from _complaints_of_failed(accepted.kind, job["error_code"], job["strikes"])
        case "CANCELLED":
            late = accepted.with_deadline and job["error_code"] == "deadline_exceeded"
            if not accepted.cancel_accepted and not late:
                yield f"was cancelled although nobody asked for it, {job['error_code']}"
        case _:
            yield f"is {status}"


def _complaints_of_completed(accepted: Accepted, job: Mapping[str, Any]) -> Iterator[str]:
    if accepted.cancel_accepted:
        yield "was completed after its cancel was accepted"
    if accepted.kind in (Kind.BURSTING, Kind.POISON):
        yield "was completed, which it cannot be"
    if job["result_key"] != f"results/{job['id']}/{job['attempt']}.png":
        yield f"attempt {job['attempt']} ended it with {job['result_key']}"


def _complaints_of_failed(kind: Kind, code: str, strikes: int) -> Iterator[str]:
    if code not in _FAULTS or (code == "out_of_memory" and kind not in (Kind.SWELLING, Kind.BURSTING)):
        yield f"failed with {code}"
    if code == "worker_lost" and strikes != MAX_STRIKES:
        yield f"failed with {code} after {strikes} strikes"


def _read(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"result": json.loads(row["result"])} if row.get("result") else row


async def _read_metrics(api: str, key: str) -> dict[tuple[str, str], float]:
    headers = {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(headers=headers) as http, http.get(f"{api}/metrics") as response:
        response.raise_for_status()
        families = text_string_to_metric_families(await response.text())
    return {
        (sample.name, sample.labels.get("status", "")): sample.value for family in families for sample in family.samples
    }
