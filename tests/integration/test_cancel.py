"""Cancelling: by request, and by deadline."""

import threading
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from starlette.testclient import TestClient

from core.errors import Stopped
from core.options import UpscaleOptions
from core.settings import Settings
from tests.engines import Repeating
from tests.requests import body_of, png, submit, upload
from worker.upscale import open_worker
from worker.upscaler.engines import Engines
from worker.upscaler.picture import Picture

Sql = Callable[..., list[Any]]
Work = Callable[[], int]

IMAGE = "https://example.com/a.png"


class _UntilStopped(Repeating):
    """An engine that works until it is told to stop."""

    name = "until stopped"

    def __init__(self) -> None:
        self.begun, self.stopped = threading.Event(), threading.Event()

    def act(
        self,
        picture: Picture,
        options: UpscaleOptions,
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.begun.set()
        give_up_at = time.monotonic() + 10
        while time.monotonic() < give_up_at:
            if should_stop():
                self.stopped.set()
                raise Stopped("told to")
            time.sleep(0.01)
        raise AssertionError("nobody told the engine to stop")


def _cancel(client: TestClient, job_id: object) -> Any:
    return client.post(f"/v2/jobs/{job_id}/cancel")


def test_a_queued_job_is_cancelled_at_once_and_never_run(client: TestClient, work: Work) -> None:
    job_id = submit(client, IMAGE)
    answer = _cancel(client, job_id)
    assert (answer.status_code, answer.json()["status"]) == (200, "CANCELLED")
    assert answer.json()["completedAt"]
    assert work() == 0


def test_to_cancel_twice_does_no_harm(client: TestClient) -> None:
    job_id = submit(client, IMAGE)
    assert _cancel(client, job_id).json() == _cancel(client, job_id).json()


def test_a_running_job_stops_at_its_next_step(client: TestClient, settings: Settings) -> None:
    job_id = submit(client, upload(client, png(2, 2)))
    engine = _UntilStopped()
    with open_worker(settings, Engines(engine)) as worker:
        running = threading.Thread(target=worker.work)
        running.start()
        assert engine.begun.wait(5)
        began = time.monotonic()
        answer = _cancel(client, job_id)
        assert (answer.status_code, answer.json()["status"]) == (202, "PROCESSING")
        assert datetime.fromisoformat(answer.json()["cancelRequestedAt"])
        assert engine.stopped.wait(5)
        assert time.monotonic() - began < settings.beat_seconds / 2  # told by a notice, not found out by a beat
        running.join()
    job = client.get(f"/v2/jobs/{job_id}").json()
    assert (job["status"], job["error"], job["result"]) == ("CANCELLED", None, None)


@pytest.mark.parametrize("status", ["COMPLETED", "FAILED"])
def test_a_job_that_is_over_cannot_be_cancelled(client: TestClient, sql: Sql, status: str) -> None:
    job_id = submit(client, IMAGE)
    sql("UPDATE jobs SET status = $1, result_key = $2", status, "key" if status == "COMPLETED" else None)
    answer = _cancel(client, job_id)
    assert (answer.status_code, answer.json()["code"]) == (409, "job_not_cancellable")


def test_nobody_else_s_job_can_be_cancelled(client: TestClient, sql: Sql) -> None:
    job_id = submit(client, IMAGE)
    sql(
        "WITH other AS (INSERT INTO api_keys (id, name, prefix, hash)"
        " VALUES (gen_random_uuid(), 'b', 'upk_', 'b') RETURNING id)"
        " UPDATE jobs SET api_key_id = other.id FROM other"
    )
    assert _cancel(client, job_id).status_code == 404
    assert sql("SELECT status FROM jobs")[0]["status"] == "QUEUED"


def test_a_deadline_that_passes_in_the_queue_keeps_the_job_from_running(
    client: TestClient, work: Work, sql: Sql
) -> None:
    image = upload(client, png(2, 2))
    answer = client.post("/v2/images/upscale", json=body_of(image), headers={"Cancel-After": "1m"})
    job_id = answer.json()["jobId"]
    assert client.get(f"/v2/jobs/{job_id}").json()["deadlineAt"]
    sql("UPDATE jobs SET deadline_at = now()")
    assert work() == 0


def test_a_deadline_that_has_not_passed_changes_nothing(client: TestClient, work: Work) -> None:
    answer = client.post(
        "/v2/images/upscale", json=body_of(upload(client, png(2, 2))), headers={"Cancel-After": "1h30m"}
    )
    assert work() == 1
    assert client.get(f"/v2/jobs/{answer.json()['jobId']}").json()["status"] == "COMPLETED"


def test_a_deadline_that_passes_while_the_job_runs_stops_it(client: TestClient, settings: Settings) -> None:
    answer = client.post("/v2/images/upscale", json=body_of(upload(client, png(2, 2))), headers={"Cancel-After": "1s"})
    with open_worker(settings.model_copy(update={"lease_seconds": 2}), Engines(_UntilStopped())) as worker:
        assert worker.work()
    job = client.get(f"/v2/jobs/{answer.json()['jobId']}").json()
    assert (job["status"], job["errorCode"]) == ("CANCELLED", "deadline_exceeded")


@pytest.mark.parametrize("after", ["soon", "", "0s", "8d", "200h", "5m3", "-1"])
def test_a_cancel_after_that_is_no_time_is_refused_by_its_name(client: TestClient, after: str) -> None:
    answer = client.post("/v2/images/upscale", json=body_of(IMAGE), headers={"Cancel-After": after})
    assert answer.status_code == 400
    assert list(answer.json()["details"]) == ["Cancel-After"]
