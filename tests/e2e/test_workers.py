"""Workers that are told to end, hang, sleep, die or are called off: their jobs are done all the same, and at once."""

import signal
import subprocess
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise

import psutil
import pytest

from core.settings import Settings, load_settings
from tests.crews import LEASE_SECONDS, SWEEP_SECONDS, Crew, open_crew, until
from worker.sweeps import SETTLE_BEATS

DRAIN_SECONDS = 1.0
STALL_SECONDS = 6.0
"""More than any worker is put to sleep here: its watchdog, which sleeps as well, would end it as it wakes."""

BURIED_SECONDS = LEASE_SECONDS + 3 * SWEEP_SECONDS
"""How long a silent worker keeps its job."""

NOISE_SECONDS = 4.0
"""What a machine that does much else may add."""

SETTLE_SECONDS = SETTLE_BEATS * LEASE_SECONDS / 6
"""How long a dispatcher watches before it buries anyone."""

WATCHDOG = 1
"""The exit status of a worker whose watchdog ended it."""


@pytest.fixture(scope="module")
def _crew(tmp_path_factory: pytest.TempPathFactory) -> Generator[Crew]:
    times = {"UPSCALED_DRAIN_SECONDS": str(DRAIN_SECONDS), "UPSCALED_STALL_SECONDS": str(STALL_SECONDS)}
    with open_crew(tmp_path_factory.mktemp("workers"), **times) as crew:
        yield crew


@pytest.fixture
def crew(_crew: Crew) -> Crew:
    """Two workers, idle and registered."""
    _crew.fill_up(2)
    return _crew


def test_a_worker_told_to_end_hands_back_what_it_cannot_finish_and_another_starts_it_at_once(crew: Crew) -> None:
    job_id = crew.submit("work 30")
    leaver = crew.taker(job_id)
    told = time.monotonic()
    leaver.send_signal(signal.SIGTERM)
    taker = crew.taker(job_id, attempt=2)
    assert time.monotonic() - told < DRAIN_SECONDS + 1
    assert taker is not leaver
    assert leaver.wait(5) == 0
    assert crew.job(job_id)["strikes"] == 0
    crew.cancel(job_id)
    assert crew.end(job_id)["status"] == "CANCELLED"


def test_a_worker_told_to_end_finishes_what_it_can_however_often_it_is_told(crew: Crew) -> None:
    job_id = crew.submit("work 0.7")
    leaver = crew.taker(job_id)
    leaver.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    leaver.send_signal(signal.SIGTERM)
    job = crew.end(job_id)
    assert (job["status"], job["attempt"], job["strikes"]) == ("COMPLETED", 1, 0)
    assert leaver.wait(5) == 0
    until(lambda: len(crew.sql("SELECT FROM workers")) == 1, NOISE_SECONDS)


@pytest.mark.parametrize("order", ["hang", "clutch"])
def test_a_worker_whose_engine_hangs_ends_and_its_job_goes_elsewhere(crew: Crew, order: str) -> None:
    job_id = crew.submit(f"once {order}")
    hung = crew.taker(job_id)
    assert hung.wait(STALL_SECONDS + NOISE_SECONDS) == WATCHDOG
    job = crew.end(job_id, BURIED_SECONDS + NOISE_SECONDS)
    assert (job["status"], job["attempt"], job["strikes"]) == ("COMPLETED", 2, 1)


def test_a_worker_that_slept_past_its_lease_changes_nothing_and_works_on_under_another_name(crew: Crew) -> None:
    job_id = crew.submit("work 1")
    sleeper = crew.taker(job_id)
    before = {row["id"] for row in crew.sql("SELECT id FROM workers")}
    sleeper.send_signal(signal.SIGSTOP)
    job = crew.end(job_id, BURIED_SECONDS + 1 + NOISE_SECONDS)
    assert (job["status"], job["attempt"], job["strikes"]) == ("COMPLETED", 2, 1)
    sleeper.send_signal(signal.SIGCONT)
    until(lambda: len(crew.sql("SELECT FROM workers")) == 2, NOISE_SECONDS)
    assert len({row["id"] for row in crew.sql("SELECT id FROM workers")} & before) == 1

    for other in crew.workers:
        if other is not sleeper:
            other.terminate()
            other.wait(5)
    assert crew.end(crew.submit("nothing"))["status"] == "COMPLETED"
    assert dict(crew.job(job_id)) == dict(job)
    assert crew.objects(job_id) == ["2.png"]


def test_a_job_that_kills_every_worker_fails_and_takes_no_other_job_along_twice(crew: Crew) -> None:
    crew.fill_up(4)
    workers = crew.workers
    with _asleep(workers[1:]):
        jobs = [crew.submit(order) for order in ("nothing", "die", "nothing", "nothing")]
        poison = jobs.pop(1)
        for worker, heir in pairwise(workers):
            assert worker.wait(NOISE_SECONDS) == -signal.SIGKILL
            until(lambda: crew.status(poison) != "PROCESSING", BURIED_SECONDS + NOISE_SECONDS)
            heir.send_signal(signal.SIGCONT)
    job = crew.job(poison)
    assert (job["status"], job["error_code"], job["attempt"], job["strikes"]) == ("FAILED", "worker_lost", 3, 3)
    rows = [crew.end(job_id) for job_id in jobs]
    assert {row["status"] for row in rows} == {"COMPLETED"}
    assert max(row["strikes"] for row in rows) <= 1
    assert crew.workers == workers[3:]


def test_the_job_of_a_killed_worker_runs_elsewhere_within_seconds(crew: Crew) -> None:
    job_id = crew.submit("work 30")
    crew.taker(job_id).kill()
    died = time.monotonic()
    crew.taker(job_id, attempt=2)
    assert time.monotonic() - died < 5
    assert crew.job(job_id)["strikes"] == 1
    crew.cancel(job_id)
    crew.end(job_id)


def test_a_running_job_that_is_cancelled_stops_within_a_second(crew: Crew) -> None:
    job_id = crew.submit("work 30")
    worker = crew.taker(job_id)
    cancelled = time.monotonic()
    crew.cancel(job_id)
    job = crew.end(job_id)
    assert time.monotonic() - cancelled < 1
    assert (job["status"], job["attempt"], job["strikes"], job["error_code"]) == ("CANCELLED", 1, 0, None)
    assert worker.poll() is None


def test_without_redis_a_cancelled_job_stops_at_the_next_beat(crew: Crew) -> None:
    assert crew.stack.redis is not None
    job_id = crew.submit("work 30")
    crew.taker(job_id)
    crew.stack.redis.stop()
    try:
        crew.cancel(job_id)
        cancelled = time.monotonic()
        assert crew.end(job_id)["status"] == "CANCELLED"
        assert time.monotonic() - cancelled < crew.stack.settings.beat_seconds + 1
    finally:
        crew.stack.redis.start()


def test_a_job_whose_deadline_passes_while_it_runs_is_cancelled(crew: Crew) -> None:
    job_id = crew.submit("work 30", headers={"Cancel-After": "3s"})
    worker = crew.taker(job_id)
    job = crew.end(job_id, 3 + crew.stack.settings.beat_seconds + NOISE_SECONDS)
    assert (job["status"], job["error_code"]) == ("CANCELLED", "deadline_exceeded")
    assert worker.poll() is None


def test_idle_workers_hear_of_jobs_again_soon_after_redis_was_away(crew: Crew) -> None:
    assert crew.stack.redis is not None
    crew.stack.redis.stop()
    time.sleep(5)
    crew.stack.redis.start()
    back = time.monotonic()
    assert crew.end(crew.submit("nothing"), 30)["status"] == "COMPLETED"
    assert time.monotonic() - back < 5


def test_a_database_that_stood_still_for_longer_than_the_lease_costs_nobody_his_job(crew: Crew) -> None:
    job_id = crew.submit("work 6")
    crew.taker(job_id)
    with _frozen_postgres(crew):
        time.sleep(LEASE_SECONDS + 1)
    job = crew.end(job_id)
    assert (job["status"], job["attempt"], job["strikes"]) == ("COMPLETED", 1, 0)


def test_a_dispatcher_that_sleeps_keeps_no_other_from_sweeping(crew: Crew) -> None:
    sleeper = crew.stack.processes["dispatcher"]
    crew.stack.start("dispatcher-2", "dispatcher")
    until(lambda: "dispatcher started" in (crew.stack.folder.parent / "logs" / "dispatcher-2.log").read_text())
    job_id = crew.submit("work 30")
    victim = crew.taker(job_id)
    sleeper.send_signal(signal.SIGSTOP)
    victim.kill()
    try:
        crew.taker(job_id, attempt=2, seconds=2 * LEASE_SECONDS + SETTLE_SECONDS + 4 * SWEEP_SECONDS + NOISE_SECONDS)
    finally:
        sleeper.send_signal(signal.SIGCONT)
        crew.cancel(job_id)
    assert crew.end(job_id)["status"] == "CANCELLED"
    assert sleeper.poll() is None


@contextmanager
def _asleep(workers: Sequence[subprocess.Popen[bytes]]) -> Generator[None]:
    """Stop workers; those that still sleep after the block are woken."""
    for worker in workers:
        worker.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for worker in workers:
            worker.send_signal(signal.SIGCONT)


@contextmanager
def _frozen_postgres(crew: Crew) -> Generator[None]:
    assert crew.stack.postgres is not None
    server = psutil.Process(crew.stack.postgres.pid)
    server.send_signal(signal.SIGSTOP)  # first: then what ends remains its child, and nothing new begins
    parts = [server, *server.children()]
    try:
        for part in parts:
            part.send_signal(signal.SIGSTOP)
        yield
    finally:
        for part in parts:
            with suppress(psutil.NoSuchProcess):  # it was about to end, and the server has noticed
                part.send_signal(signal.SIGCONT)


def test_with_the_default_settings_a_lost_job_starts_again_within_45_seconds() -> None:
    settings: Settings = load_settings(
        database_url="postgresql://me@localhost/db", redis_url="redis://localhost", secret_key="x" * 32
    )
    # The dispatcher that swept may be lost at the same moment; then another takes over, and settles first.
    settled = settings.lease_seconds + settings.sweep_seconds + SETTLE_BEATS * settings.beat_seconds
    assert settled + settings.sweep_seconds < 45
