"""Jobs in a row on one worker: the last one is written and the next one read while the engine works."""

import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from starlette.testclient import TestClient

from core.options import UpscaleOptions
from core.settings import Settings
from tests.requests import png, submit, upload
from worker.lease import Watchdog
from worker.upscale import open_worker
from worker.upscaler.engine import Picture

Sql = Callable[..., list[Any]]


class _Scripted:
    """Is nearly done as soon as it begins, and then does what the script says for the job of its turn."""

    name = "scripted"

    def __init__(self, *script: Callable[[], object]) -> None:
        self._script = iter(script)

    def upscale(
        self,
        picture: Picture,
        options: UpscaleOptions,
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> Picture:
        on_progress(0.9)
        next(self._script)()
        return picture


def _within(seconds: float, holds: Callable[[], bool]) -> bool:
    give_up_at = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > give_up_at:
            return False
        time.sleep(0.01)
    return True


def _submit_jobs(client: TestClient, count: int) -> list[UUID]:
    return [submit(client, upload(client, png(2, 2))) for _ in range(count)]


def _nothing() -> None:
    pass


def _running(sql: Sql) -> int:
    return sql("SELECT count(*) FROM jobs WHERE status = 'PROCESSING'")[0][0]


def _work(settings: Settings, *script: Callable[[], object]) -> int:
    with open_worker(settings, _Scripted(*script)) as worker:
        return worker.work()


def test_the_next_job_is_claimed_while_the_engine_ends_the_one_before(
    client: TestClient, settings: Settings, sql: Sql
) -> None:
    _submit_jobs(client, 3)
    seen: list[bool] = []
    assert _work(settings, lambda: seen.append(_within(5, lambda: _running(sql) == 2)), _nothing, _nothing) == 3
    assert seen == [True]


def test_a_result_is_written_while_the_engine_works_on_the_next_job(
    client: TestClient, settings: Settings, sql: Sql
) -> None:
    first, _ = _submit_jobs(client, 2)
    seen: list[bool] = []

    def wait() -> None:
        seen.append(_within(5, lambda: client.get(f"/v2/jobs/{first}").json()["status"] == "COMPLETED"))

    assert _work(settings, _nothing, wait) == 2
    assert seen == [True]
    assert sql("SELECT DISTINCT status FROM jobs") == [("COMPLETED",)]


def test_beside_a_job_that_was_lost_before_no_other_is_in_the_worker_s_hands(
    client: TestClient, settings: Settings, sql: Sql
) -> None:
    before, struck, after = _submit_jobs(client, 3)
    sql("UPDATE jobs SET strikes = 1 WHERE id = $1", struck)
    seen: list[Any] = []

    def look() -> None:
        seen.append(client.get(f"/v2/jobs/{before}").json()["status"])
        seen.append(_within(0.3, lambda: _running(sql) > 1))
        seen.append(client.get(f"/v2/jobs/{after}").json()["status"])

    assert _work(settings, _nothing, look, _nothing) == 3
    assert seen == ["COMPLETED", False, "QUEUED"]
    assert sql("SELECT DISTINCT status FROM jobs") == [("COMPLETED",)]


def test_a_worker_that_is_to_end_gives_back_at_once_what_it_has_read_ahead(
    client: TestClient, settings: Settings, sql: Sql
) -> None:
    running, ahead = _submit_jobs(client, 2)

    def drain() -> None:
        assert _within(5, lambda: _running(sql) == 2)
        worker.drain()

    with open_worker(settings, _Scripted(drain)) as worker:
        assert worker.work() == 2
    rows = {row["id"]: (row["status"], row["strikes"]) for row in sql("SELECT id, status, strikes FROM jobs")}
    assert rows == {running: ("COMPLETED", 0), ahead: ("QUEUED", 0)}


def test_a_job_that_is_cancelled_while_it_waits_for_the_engine_is_over_soon(
    client: TestClient, settings: Settings, sql: Sql
) -> None:
    _, ahead = _submit_jobs(client, 2)

    def cancel() -> None:
        assert _within(5, lambda: _running(sql) == 2)
        assert client.post(f"/v2/jobs/{ahead}/cancel").status_code == 202

    assert _work(settings, cancel, _nothing) == 2
    assert client.get(f"/v2/jobs/{ahead}").json()["status"] == "CANCELLED"


def test_an_input_that_cannot_be_read_ahead_fails_its_own_job_and_the_one_after_it_runs(
    client: TestClient, settings: Settings, sql: Sql
) -> None:
    jobs = _submit_jobs(client, 3)
    sql("UPDATE jobs SET image_key = 'uploads/gone.png' WHERE id = $1", jobs[1])
    assert _work(settings, _nothing, _nothing) == 3
    statuses = [client.get(f"/v2/jobs/{job}").json()["status"] for job in jobs]
    assert statuses == ["COMPLETED", "FAILED", "COMPLETED"]


def test_the_watchdog_waits_for_whoever_has_been_silent_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    now, armed = 100.0, list[float | None]()

    def arm(after: float, **_: object) -> None:
        armed.append(now + after)

    monkeypatch.setattr("worker.lease.time.monotonic", lambda: now)
    monkeypatch.setattr("worker.lease.faulthandler.dump_traceback_later", arm)
    monkeypatch.setattr("worker.lease.faulthandler.cancel_dump_traceback_later", lambda: armed.append(None))
    watchdog = Watchdog(10)
    watchdog.expect("engine")
    now = 104.0
    watchdog.expect("writer")
    now = 106.0
    watchdog.step("engine")
    assert armed == [110.0, 110.0, 114.0]
    now = 106.5
    watchdog.step("engine")  # setting the timer has its price: not for every step
    watchdog.step("nobody")
    assert len(armed) == 3
    watchdog.forget("writer")
    watchdog.forget("engine")
    assert armed[3:] == [116.0, None]
