"""The model: what processes do, what may happen to them, and what must hold whatever happens."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from core.errors import (
    IdempotencyKeyReused,
    InputNotImage,
    JobNotCancellable,
    LeaseLost,
    Stopped,
    StorageUnavailable,
    TooManyQueued,
    UploadFailed,
)
from core.options import UpscaleOptions
from db import census, workers
from db.jobs import Attempt
from db.models import JobStatus
from db.queue import IDEMPOTENCY_TTL, NewJob
from tests.machine import clock
from tests.machine.outside import Broker, Objects
from tests.machine.parts import BEGINNING, ENDS, EVENTS, OWNERS, Death, Order, Owner, Process, object_of, result_of
from tests.machine.protocol import Protocol


@dataclass
class World:
    """Three worker processes, a broker, a store, callers, and a database that all share."""

    connection: AsyncConnection
    observer: asyncpg.Connection
    broker: Broker
    objects: Objects
    protocol: Protocol
    now: datetime = BEGINNING
    orders: dict[UUID, Order] = field(default_factory=dict[UUID, Order])
    processes: list[Process] = field(default_factory=lambda: [Process() for _ in range(3)])
    rows: Mapping[UUID, Any] = field(default_factory=dict[UUID, Any])
    """The jobs as the latest look at the database found them."""
    claimed: set[tuple[UUID, int]] = field(default_factory=set[tuple[UUID, int]])
    _ids: int = 1000

    @property
    def lease(self) -> timedelta:
        return timedelta(seconds=self.protocol.settings.lease_seconds)

    @property
    def holders(self) -> Sequence[Process]:
        return [process for process in self.processes if process.attempt is not None]

    @property
    def zombies(self) -> Sequence[Process]:
        """Those whose attempt another one has replaced, or may have."""
        return [process for process in self.holders if process.silent or process.ended or not self._owns(process)]

    @property
    def seekers(self) -> Sequence[Process]:
        return [process for process in self.processes if process.awake and process.attempt is None]

    @property
    def sleepers(self) -> Sequence[Process]:
        return [process for process in self.processes if not process.awake and process.attempt is None]

    @property
    def repeatable(self) -> Sequence[Order]:
        """Orders whose submit can be said again."""
        return [order for order in self.orders.values() if order.new.idempotency_key is not None]

    def next_id(self) -> UUID:
        self._ids += 1
        return UUID(int=self._ids)

    async def begin(self) -> None:
        """Empty the database of what an earlier example left."""
        await self.observer.execute(
            "DELETE FROM deliveries; DELETE FROM jobs; DELETE FROM workers; DELETE FROM tallies; DELETE FROM usage;"
            "DELETE FROM api_keys;"
            "UPDATE queue_state SET virtual_time = 0"
        )
        await clock.set_to(self.observer, self.now)
        await self.observer.executemany(
            "INSERT INTO api_keys (id, name, prefix, hash, weight, max_concurrent, max_queued)"
            " VALUES ($1, 'k', 'upk_', uuid_send($1), $2, $3, $4)",
            [(owner.id, owner.weight, owner.max_concurrent, owner.max_queued) for owner in OWNERS],
        )

    # What callers do.

    async def submit(
        self,
        owner: Owner,
        *,
        poison: bool = False,
        webhook: bool = False,
        cancel_after: timedelta | None = None,
        repeatable: bool = False,
        priority: int = 0,
    ) -> None:
        job_id = self.next_id()
        new = NewJob(
            id=job_id,
            api_key_id=owner.id,
            model="m",
            input={},
            options=UpscaleOptions(),
            image_url="https://example.com/a.png",
            webhook_url="https://example.com/hook" if webhook else None,
            webhook_events=EVENTS if webhook else (),
            upload_url="https://example.com/put",
            priority=priority,
            cancel_after=cancel_after,
            idempotency_key=str(job_id) if repeatable else None,
            fingerprint=b"1" if repeatable else None,
        )
        await self._submit(Order(new, owner, poison, self.now))

    async def _submit(self, order: Order) -> None:
        row_count = self._count(order.owner, JobStatus.QUEUED)
        room = order.owner.max_queued is None or row_count < order.owner.max_queued
        try:
            submitted = await self.protocol.submit(self.connection, order.new)
        except TooManyQueued:
            assert not room, "refused although there is room"
            return
        assert room, "more jobs wait than may"
        assert (submitted.id, submitted.replayed) == (order.new.id, False)
        self.orders[order.new.id] = order
        self.broker.send()

    async def submit_again(self, order: Order, *, changed: bool) -> None:
        """Repeat a submit, as after an answer that was lost, or reuse its key for something else."""
        again = replace(order.new, id=self.next_id(), fingerprint=b"2" if changed else b"1")
        try:
            submitted = await self.protocol.submit(self.connection, again)
        except IdempotencyKeyReused:
            assert changed, "a repetition was taken for another request"
            return
        assert not changed, "another request was taken for a repetition"
        assert (submitted.id, submitted.replayed) == (order.new.id, True), "a repetition made another job"

    async def cancel(self, order: Order) -> None:
        before = self.rows[order.new.id]["status"]
        try:
            await self.protocol.cancel(self.connection, order.new.id, order.owner.id)
        except JobNotCancellable:
            assert before in (JobStatus.COMPLETED, JobStatus.FAILED), "a job that is not over could not be cancelled"
        else:
            assert before not in (JobStatus.COMPLETED, JobStatus.FAILED), "a job that is over could be cancelled"

    # What workers do.

    async def _register(self, process: Process) -> None:
        """Let a process be another worker, which brings the attempt that it has in its hands."""
        process.id, process.heard_at = self.next_id(), self.now
        attempts = [] if process.attempt is None else [process.attempt]
        await workers.register(self.connection, process.id, "tests", "none", attempts)
        if attempts and self._owns(process):
            process.claimed_as = process.id

    def take_hint(self, process: Process, index: int) -> None:
        del self.broker.hints[index % len(self.broker.hints)]
        process.awake = True

    async def claim(self, process: Process, *, answer_lost: bool = False) -> None:
        """Claim as an awake worker does: it sleeps again once the queue is empty."""
        possible = self._claimable()
        process.silent = False
        attempt = None
        for _ in range(2):
            if process.id is None:
                await self._register(process)
            assert process.id is not None
            try:
                attempt = await self.protocol.claim(self.connection, process.id)
                break
            except LeaseLost:
                assert self.now - process.heard_at > self.lease, "a worker that beats was forgotten"
                process.id = None
        process.heard_at = self.now
        if attempt is None:
            assert not possible, "a claim found nothing although something was there"
            process.awake = False
            return
        fence = (attempt.job_id, attempt.number)
        assert attempt.job_id in possible, "a claim got what must not run"
        assert attempt.number > self.rows[attempt.job_id]["attempt"], "an attempt's number does not rise"
        assert fence not in self.claimed, "two attempts have the same number"
        self.claimed.add(fence)
        if answer_lost:  # it has to give up what it may hold unknown to itself
            process.id, process.awake = None, False
        else:
            process.attempt, process.claimed_as, process.ended = attempt, process.id, None

    async def finish(self, process: Process, death: Death = Death.NOT, *, refused: bool = False) -> None:
        """Store a result and end the job with it; it fails by that when the caller's server `refused` it."""
        attempt = process.attempt
        assert attempt is not None
        if self.orders[attempt.job_id].poison or death is Death.BEFORE_UPLOAD:
            self.crash(process)
            return
        process.silent = False
        key, content = object_of(attempt.job_id, attempt.number)
        await self.objects.write(key, content)
        if death is Death.AFTER_UPLOAD:
            self.crash(process)
            return
        dies, failure = death is Death.AFTER_COMMIT, UploadFailed("It answered 403.") if refused else None
        try:
            await self.protocol.complete(self.connection, attempt, result_of(content), key, failure, dies=dies)
        except (LeaseLost, Stopped) as error:
            assert process.ended is not JobStatus.COMPLETED, "an end that was committed was refused when said again"
            await self.objects.delete(key)
            if isinstance(error, Stopped):
                await self.hand_back(process)
            process.attempt = None
        else:
            process.ended = JobStatus.FAILED if refused else JobStatus.COMPLETED
            if death is not Death.ANSWER_LOST:
                process.attempt = None
        if dies:
            self.crash(process)

    async def fail(self, process: Process, *, answer_lost: bool = False) -> None:
        attempt = process.attempt
        assert attempt is not None
        process.silent = False
        try:
            await self.protocol.fail(self.connection, attempt, InputNotImage("It is no picture."))
        except LeaseLost:
            assert process.ended is not JobStatus.FAILED, "an end that was committed was refused when said again"
            process.attempt = None
        else:
            process.ended = JobStatus.FAILED
            if not answer_lost:
                process.attempt = None

    async def hand_back(self, process: Process, *, fault: bool = False, answer_lost: bool = False) -> None:
        attempt = process.attempt
        assert attempt is not None
        process.silent = False
        error = StorageUnavailable("The storage could not be reached.") if fault else None
        pause = timedelta(seconds=2 * 5**attempt.strikes if fault else 0)
        try:
            status = await self.protocol.hand_back(self.connection, attempt, error, pause)
        except LeaseLost:
            process.attempt = None
            return
        assert status is self._after(attempt, fault=fault), "handing back led to the wrong state"
        process.ended = status
        if status is JobStatus.QUEUED and not fault:
            self.broker.send()
        if not answer_lost:
            process.attempt = None

    def crash(self, process: Process) -> None:
        self.processes[self.processes.index(process)] = Process()

    async def leave(self, process: Process) -> None:
        """End without handing back, but saying good-bye."""
        if process.id is not None:
            await workers.unregister(self.connection, process.id)
        self.crash(process)

    # What time and the dispatcher do.

    async def pass_time(self, seconds: float) -> None:
        """Let the clock run; whoever is not silent has beaten all the while."""
        self.now += timedelta(seconds=seconds)
        await clock.set_to(self.observer, self.now)
        for process in self.processes:
            if process.silent or process.id is None:
                continue
            attempts = [] if process.attempt is None else [process.attempt]
            heard = await workers.beat(self.connection, process.id, 1.0, attempts)
            for attempt, fate in zip(attempts, heard.fates, strict=True):
                assert fate.owns == self._owns(process)
                assert fate.unwanted == (fate.owns and self._unwanted(attempt.job_id))
            if heard.registered:
                process.heard_at = self.now
            else:
                await self._register(process)

    async def sweep(self) -> None:
        await self.protocol.sweep(self.connection)
        for order in self.repeatable:
            if order.submitted_at < self.now - IDEMPOTENCY_TTL:
                freed = replace(order.new, idempotency_key=None, fingerprint=None)
                self.orders[order.new.id] = replace(order, new=freed)

    # What must hold.

    async def check(self) -> None:
        """Look at the whole database and compare it with what happened."""
        before, rows = self.rows, await self.observer.fetch(_LOOK)
        self.rows = {row["id"]: row for row in rows}
        assert self.rows.keys() == self.orders.keys(), "jobs appeared or vanished"
        for row in rows:
            self._check_row(row)
            earlier = before.get(row["id"])
            if earlier is not None:
                assert row["attempt"] >= earlier["attempt"], "an attempt's number fell"
                assert earlier["status"] not in ENDS or row == earlier, "a terminal state changed"
        for owner in OWNERS:
            running = self._count(owner, JobStatus.PROCESSING)
            assert owner.max_concurrent is None or running <= owner.max_concurrent, "more jobs run than may"
        for process in self.holders:
            lives = process.id == process.claimed_as and self.now - process.heard_at <= self.lease
            assert process.ended or not lives or self._owns(process), "a worker that beats lost its attempt"
        await self._check_tallies()

    def _check_row(self, row: Any) -> None:
        order, status, max_strikes = self.orders[row["id"]], row["status"], self.protocol.settings.max_strikes
        over = status in ENDS
        event = status.lower()
        assert row["events"] == ([event] if over and event in order.new.webhook_events else []), "deliveries are wrong"
        assert (row["completed_at"] is not None) == over
        assert (status == JobStatus.PROCESSING) <= (row["started_at"] is not None)
        assert row["strikes"] <= max_strikes, "too many strikes"
        assert over or row["strikes"] < max_strikes, "a job lives on after its last strike"
        assert (row["error_code"] is not None) == (status == JobStatus.FAILED) or status == JobStatus.CANCELLED
        assert row["upload_url"] == (None if over else order.new.upload_url), "the upload URL outlives its job"
        kept = status == JobStatus.COMPLETED or row["error_code"] == UploadFailed.code
        assert (row["result_key"] is not None) == kept, "a result is missing, or should be"
        if kept:
            key, content = object_of(row["id"], row["attempt"])
            assert row["result_key"] == key, "the result is another attempt's"
            assert row["sha256"] == hashlib.sha256(content).hexdigest()
            assert row["expires_at"] <= self.now or self.objects.content.get(key) == content, "the object is not there"
            assert (row["id"], row["attempt"]) in self.claimed

    async def _check_tallies(self) -> None:
        expected = {"submitted": len(self.rows)}
        for row in self.rows.values():
            if row["status"] in ENDS:
                expected[row["status"].lower()] = expected.get(row["status"].lower(), 0) + 1
        counted = await census.read_tallies(self.connection)
        assert {name: count for name, count in counted.items() if count} == {k: v for k, v in expected.items() if v}
        used = await self.connection.execute(text("SELECT coalesce(sum(jobs), 0) FROM usage"))
        assert used.scalar_one() == sum(row["result_key"] is not None for row in self.rows.values())

    async def settle(self) -> None:
        """Let faults stop: every job must come to an end within a few sweeps, and every object go in its time."""
        self.broker.down = False
        for _ in range(5 + 3 * len(self.orders)):
            if all(row["status"] in ENDS for row in self.rows.values()) and not self.holders:
                break
            await self._work()
            await self.pass_time(self.lease.total_seconds() + 1)
            await self.sweep()
            await self.check()
        else:
            raise AssertionError(f"lost: {[tuple(row)[:3] for row in self.rows.values()]}")
        await self.pass_time(25 * 3600)
        await self.sweep()
        await self.check()
        assert not self.objects.content, "objects stay for ever"

    async def _work(self) -> None:
        """Let every process do what it can: end what it holds, then take hints until there are none."""
        for process in list(self.processes):
            if process.attempt is not None and process.ended is JobStatus.FAILED:
                await self.fail(process)
            elif process.attempt is not None:
                await self.finish(process)
            await self.check()
        while self.seekers or (self.broker.hints and self.sleepers):
            if not self.seekers:
                self.take_hint(self.sleepers[0], 0)
            process = self.seekers[0]
            await self.claim(process)
            await self.check()
            if process.attempt is not None:
                await self.finish(process)
                await self.check()

    # What can be told from the latest look.

    def _count(self, owner: Owner, status: JobStatus) -> int:
        return sum(row["status"] == status and row["api_key_id"] == owner.id for row in self.rows.values())

    def _owns(self, process: Process) -> bool:
        assert process.attempt is not None
        row = self.rows[process.attempt.job_id]
        return (row["status"], row["attempt"]) == (JobStatus.PROCESSING, process.attempt.number)

    def _unwanted(self, job_id: UUID) -> bool:
        deadline_at = self.orders[job_id].deadline_at
        return self.rows[job_id]["cancel_requested_at"] is not None or (
            deadline_at is not None and deadline_at <= self.now
        )

    def _claimable(self) -> set[UUID]:
        full = {
            owner.id
            for owner in OWNERS
            if owner.max_concurrent is not None and self._count(owner, JobStatus.PROCESSING) >= owner.max_concurrent
        }
        return {
            row["id"]
            for row in self.rows.values()
            if row["status"] == JobStatus.QUEUED
            and row["api_key_id"] not in full
            and (row["due_at"] is None or row["due_at"] <= self.now)
            and not self._unwanted(row["id"])
        }

    def _after(self, attempt: Attempt, *, fault: bool) -> JobStatus:
        """Return the state that a job has to have once its attempt was handed back."""
        if self._unwanted(attempt.job_id):
            return JobStatus.CANCELLED
        spent = fault and self.rows[attempt.job_id]["strikes"] + 1 >= self.protocol.settings.max_strikes
        return JobStatus.FAILED if spent else JobStatus.QUEUED


_LOOK = """
    SELECT id, status, attempt, strikes, api_key_id, due_at, started_at, completed_at, cancel_requested_at, expires_at,
        result_key, result->>'sha256' AS sha256, error, error_code, upload_url,
        ARRAY(SELECT event::text FROM deliveries WHERE job_id = jobs.id) AS events
    FROM jobs
"""
