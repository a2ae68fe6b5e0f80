"""The seven trials, each written once for every server."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf, isinf

from bench.peers.clients import Ends, serves_again, settle, submit_patiently, supervised
from bench.peers.receiver import Receiver
from bench.peers.server import REFUSALS, Client, Server, State, Ticket, Work

KILLED_WATCH_SECONDS = 60.0
RESTART_WATCH_SECONDS = 60.0
RECEIVER_AWAY_SECONDS = 60.0
RECEIVER_WATCH_SECONDS = 120.0
BURST_WATCH_SECONDS = 120.0
POLITE_WATCH_SECONDS = 60.0
BEGIN_SECONDS = 30.0
CANCELLED_JOB_SECONDS = 8.0
QUEUED, BURST, GREEDY, POLITE_ALONE, POLITE_BESIDE = 100, 1000, 500, 10, 20


@dataclass(frozen=True)
class Outcome:
    """What one trial showed: the counts where jobs are counted, and a sentence."""

    remark: str
    counts: str = ""

    def __str__(self) -> str:
        return f"{self.counts}; {self.remark}" if self.counts else self.remark


async def kill_worker(server: Server) -> Outcome:
    """SIGKILL the process that runs a job of 3 s, one second in, while two small ones wait behind it."""
    tickets = [await server.submit(Work("killed", 3.0))]
    worker = await _begun(server, "killed")
    tickets += [await server.submit(Work(f"behind-{number}", 0.2)) for number in (1, 2)]
    await asyncio.sleep(1.0)
    os.kill(worker, signal.SIGKILL)
    killed_at = time.time()
    async with supervised(server):
        ends, served_at = await asyncio.gather(
            settle(server, [ticket for ticket in tickets if ticket.accepted], KILLED_WATCH_SECONDS),
            serves_again(server, KILLED_WATCH_SECONDS),
        )
    redone = ends.done_at.get("killed")
    remark = f"serves again {_after(served_at, killed_at, KILLED_WATCH_SECONDS)}"
    if redone is not None:
        remark += f", the killed job was done {redone - killed_at:.1f} s after the kill"
    return Outcome(remark, _counts(server, tickets, ends))


async def kill_server(server: Server) -> Outcome:
    """SIGKILL all processes of the server while a job of 3 s runs and 99 of 0.1 s are queued, and start it again."""
    tickets = [await server.submit(Work("running", 3.0))]
    await _begun(server, "running")
    tickets += await asyncio.gather(*(server.submit(Work(f"queued-{number}", 0.1)) for number in range(1, QUEUED)))
    await asyncio.sleep(0.5)  # even what is held has been sent by now
    await asyncio.to_thread(server.kill)
    killed_at = time.time()
    await asyncio.to_thread(server.start)
    up_at = time.time()
    ends = await settle(server, [ticket for ticket in tickets if ticket.accepted], RESTART_WATCH_SECONDS)
    remark = f"up again after {up_at - killed_at:.1f} s"
    if ends.last_at is not None and ends.last_at > up_at:
        remark += f", the last job done after {ends.last_at - killed_at:.1f} s"
    return Outcome(remark, _counts(server, tickets, ends))


async def submit_twice(server: Server) -> Outcome:
    """Submit the same job with the same Idempotency-Key twice at once, and a third time after it has ended."""
    work = Work("same", 0.5)
    tickets = list(await asyncio.gather(*(submit_patiently(server, work, key="same-key") for _ in range(2))))
    await settle(server, tickets, BEGIN_SECONDS)
    together = server.journal.count("end", work.tag)
    tickets.append(await submit_patiently(server, work, key="same-key"))
    ends = await settle(server, tickets, BEGIN_SECONDS)
    await asyncio.sleep(2 * work.seconds)  # a server that tells of the first execution may still be at the next
    runs = server.journal.count("end", work.tag)
    ids = len({ticket.id for ticket in tickets})
    remark = f"ids given: {ids}; run {together} × by the two at once, {runs} × in all"
    return Outcome(remark, _counts(server, tickets, ends))


async def receiver_down(server: Server) -> Outcome:
    """Let nobody listen where a job's webhook goes until 60 s after the job has ended."""
    if not server.has_webhooks:
        return Outcome("no webhooks")
    async with Receiver() as receiver:
        await receiver.close()
        await server.submit(Work("told", 0.5), webhook=receiver.url("told"))
        if await server.journal.wait("told", ["end"], BEGIN_SECONDS) is None:
            return Outcome("the job never ended")
        await asyncio.sleep(RECEIVER_AWAY_SECONDS)
        await receiver.open()
        back_at = time.time()
        if not await receiver.wait("told", RECEIVER_WATCH_SECONDS):
            return Outcome(f"event **lost**: not within {RECEIVER_WATCH_SECONDS:g} s after the receiver was back")
        await asyncio.sleep(2.0)
        times = receiver.times["told"]
        return Outcome(f"event arrived {len(times)} ×, {times[0] - back_at:.1f} s after the receiver was back")


async def cancel_running(server: Server) -> Outcome:
    """Cancel a job of 8 s one second after it began."""
    ticket = await server.submit(Work("unwanted", CANCELLED_JOB_SECONDS))
    await _begun(server, "unwanted")
    await asyncio.sleep(1.0)
    asked_at = time.time()
    status = await server.cancel(ticket)
    soon = await server.state(ticket)
    following = asyncio.create_task(submit_patiently(server, Work("next")))
    entry = await server.journal.wait("unwanted", ["stopped", "end"], 2 * CANCELLED_JOB_SECONDS)
    await settle(server, [await following], 2 * CANCELLED_JOB_SECONDS)
    next_end = await server.journal.wait("next", ["end"], 1.0)
    if entry is None:
        ended = f"not stopped within {2 * CANCELLED_JOB_SECONDS:g} s"
    else:
        ended = "ran to its end" if entry.event == "end" else f"stopped after {entry.at - asked_at:.2f} s"
    following_done = _after(next_end and next_end.at, asked_at, 2 * CANCELLED_JOB_SECONDS)
    if status is None:
        return Outcome(f"no such call; the client hung up, the job {ended}; the next one was done {following_done}")
    later = await server.state(ticket)
    reported = f"reported “{soon}”" if soon is later else f"reported “{soon}”, later “{later}”"
    return Outcome(f"answered {status}, the job {ended}; {reported}; the next one was done {following_done}")


async def greedy_client(server: Server) -> Outcome:
    """Let a polite client submit a job of 0.05 s each second, alone and beside one that sends 500 at once."""
    alone = await _polite_waits(server, "alone", POLITE_ALONE)
    greedy = [
        asyncio.create_task(submit_patiently(server, Work(f"greedy-{number}", 0.05), client=Client.GREEDY))
        for number in range(GREEDY)
    ]
    await asyncio.sleep(1.0)
    beside = await _polite_waits(server, "beside", POLITE_BESIDE)
    submitted, refused = await asyncio.wait(greedy, timeout=POLITE_WATCH_SECONDS)
    for task in refused:
        task.cancel()
    tickets = [task.result() for task in submitted]
    ends = await settle(server, [ticket for ticket in tickets if ticket.accepted], POLITE_WATCH_SECONDS)
    unserved = sum(isinf(wait) for wait in beside)
    remark = f"polite p95 (p50) {_waits(alone)} alone, {_waits(beside)} beside the greedy one"
    remark += f" ({unserved} of {POLITE_BESIDE} not served in {POLITE_WATCH_SECONDS:g} s)" if unserved else ""
    remark += f", {len(refused)} of the greedy one refused until we gave up" if refused else ""
    return Outcome(remark, f"greedy: {_counts(server, tickets, ends)}")


async def burst(server: Server) -> Outcome:
    """Submit 1,000 jobs at once that take no time."""
    began_at = time.time()
    tickets = await asyncio.gather(*(server.submit(Work(f"burst-{number}")) for number in range(BURST)))
    answered_at = time.time()
    ends = await settle(server, [ticket for ticket in tickets if ticket.accepted], BURST_WATCH_SECONDS)
    answered = "" if server.accepts == "held" else f"all answered after {answered_at - began_at:.1f} s, "
    remark = f"{answered}the last done {_after(ends.last_at, began_at, BURST_WATCH_SECONDS)}"
    return Outcome(remark, _counts(server, tickets, ends))


@dataclass(frozen=True)
class Trial:
    """One of the seven, and its name in the table."""

    title: str
    run: Callable[[Server], Awaitable[Outcome]]


TRIALS: Mapping[int, Trial] = {
    1: Trial("kill -9 the worker in mid-job", kill_worker),
    2: Trial("kill -9 everything with 100 queued, start again", kill_server),
    3: Trial("the same submit three times, one Idempotency-Key", submit_twice),
    4: Trial("webhook receiver down for 60 s after the end", receiver_down),
    5: Trial("cancel a running job", cancel_running),
    6: Trial("one greedy client (500 at once), one polite", greedy_client),
    7: Trial("1,000 submits at once", burst),
}


async def _begun(server: Server, tag: str) -> int:
    """Wait until a job has begun; return the process that runs it."""
    entry = await server.journal.wait(tag, ["begin"], BEGIN_SECONDS)
    if entry is None:
        raise RuntimeError(f"The job {tag} did not begin within {BEGIN_SECONDS:g} seconds.")
    return entry.pid


async def _polite_waits(server: Server, name: str, jobs: int) -> Sequence[float]:
    """Submit a job each second; return how long the client waited for each, infinite when it gave up."""

    async def wait(number: int) -> float:
        began = time.monotonic()
        try:
            async with asyncio.timeout(POLITE_WATCH_SECONDS):
                ticket = await submit_patiently(server, Work(f"{name}-{number}", 0.05), client=Client.POLITE)
                done = ticket.accepted and await server.finished(ticket) is State.DONE
        except TimeoutError:
            return inf
        return time.monotonic() - began if done else inf

    waits = list[asyncio.Task[float]]()
    for number in range(jobs):
        waits.append(asyncio.create_task(wait(number)))
        await asyncio.sleep(1.0)
    return await asyncio.gather(*waits)


def _counts(server: Server, tickets: Sequence[Ticket], ends: Ends) -> str:
    accepted = sum(ticket.accepted for ticket in tickets)
    refused = sum(ticket.status in REFUSALS for ticket in tickets)
    broken = len(tickets) - accepted - refused
    done, failed = ends.states.get(State.DONE, 0), ends.states.get(State.FAILED, 0)
    numbers = {
        server.accepts: accepted,
        "refused": refused,
        "no or a wrong answer": broken,
        "done": done,
        "failed and said so": failed,
        "**lost**": accepted - done - failed,
        "done twice": server.journal.done_twice(),
    }
    always = (server.accepts, "done", "done twice")
    return ", ".join(f"{name} {number}" for name, number in numbers.items() if number or name in always)


def _waits(waits: Sequence[float]) -> str:
    return f"{_percentile(waits, 0.95)} ({_percentile(waits, 0.5)}) s"


def _percentile(waits: Sequence[float], share: float) -> str:
    wait = sorted(waits)[ceil(share * len(waits)) - 1]
    return f"over {POLITE_WATCH_SECONDS:g}" if isinf(wait) else f"{wait:.2f}"


def _after(at: float | None, since: float, watched: float) -> str:
    return f"not within {watched:g} s" if at is None else f"after {at - since:.1f} s"
