"""A worker that is killed at each named point of an attempt: another one finishes, once, and nothing lies around."""

import hashlib
import json
import signal
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import pytest

from core import failpoints
from tests.crews import LEASE_SECONDS, SWEEP_SECONDS, Crew, open_crew, until
from tests.engines import POINT, SIGNAL
from tests.web import Web

START_SECONDS = 6.0
"""How long a worker may take to start, on a machine that does much else."""


@dataclass(frozen=True)
class Case:
    """Where the worker dies, what the job's row says in the end, and what the dead worker's attempt leaves behind."""

    point: str
    attempt: int
    strikes: int
    left_behind: Sequence[str] = ()
    """How the names of those files begin."""


CASES = [
    Case("after_pop", 1, 0),
    Case("after_claim", 2, 1),
    Case("mid_step", 2, 1),
    Case("during_upload", 2, 1, [".1.png."]),
    Case("after_upload", 2, 1, ["1.png"]),
    Case("after_commit", 1, 0),
]


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Generator[Crew]:
    with open_crew(tmp_path_factory.mktemp("failpoints")) as crew:
        yield crew


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.point)
def test_a_worker_killed_at_any_point_costs_time_and_nothing_else(crew: Crew, web: Web, case: Case) -> None:
    victim = crew.start_worker(**{POINT: case.point, SIGNAL: "SIGKILL"})
    until(lambda: len(crew.sql("SELECT FROM workers")) == 1)
    job_id = crew.submit("work 0.1", webhook=web.serve("/hook"))
    assert victim.wait(20) == -signal.SIGKILL
    died = time.monotonic()
    assert crew.status(job_id) == {"after_pop": "QUEUED", "after_commit": "COMPLETED"}.get(case.point, "PROCESSING")
    crew.start_worker()
    job = crew.end(job_id)
    assert time.monotonic() - died < START_SECONDS + LEASE_SECONDS + 3 * SWEEP_SECONDS
    assert (job["status"], job["attempt"], job["strikes"]) == ("COMPLETED", case.attempt, case.strikes)
    assert job["result_key"] == f"results/{job_id}/{case.attempt}.png"
    assert hashlib.sha256(crew.read(job["result_key"])).hexdigest() == json.loads(job["result"])["sha256"]

    until(lambda: [row["status"] for row in _deliveries(crew, job_id)] == ["delivered"])
    assert [json.loads(seen.body)["event"] for seen in web.seen] == ["completed"]

    left = [name for name in crew.objects(job_id) if name != f"{case.attempt}.png"]
    assert len(left) == len(case.left_behind)
    assert all(name.startswith(start) for name, start in zip(left, case.left_behind, strict=True))
    crew.sql("UPDATE jobs SET purge_at = now() WHERE id = $1", job_id)
    until(lambda: crew.objects(job_id) == [])

    # What the victim registered runs out, and nobody runs the job once more.
    crew.dismiss()
    until(lambda: crew.sql("SELECT FROM workers") == [])
    assert crew.job(job_id)["attempt"] == case.attempt


def test_every_point_has_its_case() -> None:
    assert {case.point for case in CASES} == set(failpoints.POINTS)


def _deliveries(crew: Crew, job_id: UUID) -> Sequence[Any]:
    return crew.sql("SELECT status FROM deliveries WHERE job_id = $1", job_id)


@pytest.mark.parametrize("seconds", [0.1, 1.5], ids=["woken-after-the-next-attempt", "woken-during-the-next-attempt"])
def test_a_worker_that_sleeps_between_upload_and_commit_wakes_as_a_zombie_and_takes_its_object_away(
    crew: Crew, seconds: float
) -> None:
    sleeper = crew.start_worker(**{POINT: "after_upload", SIGNAL: "SIGSTOP"})
    until(lambda: len(crew.sql("SELECT FROM workers")) == 1)
    job_id = crew.submit(f"work {seconds}")
    until(lambda: crew.objects(job_id) == ["1.png"])
    crew.start_worker()
    if seconds > 1:
        crew.taker(job_id, attempt=2)
    else:
        assert crew.end(job_id)["attempt"] == 2
        assert crew.objects(job_id) == ["1.png", "2.png"]
    sleeper.send_signal(signal.SIGCONT)
    until(lambda: "1.png" not in crew.objects(job_id))
    job = crew.end(job_id)
    assert (job["status"], job["attempt"], job["strikes"]) == ("COMPLETED", 2, 1)
    assert job["result_key"] == f"results/{job_id}/2.png"
    assert crew.objects(job_id) == ["2.png"]
    crew.dismiss()
    until(lambda: crew.sql("SELECT FROM workers") == [])
