"""Jobs in a row on one worker: the last one is written and the next one read while the engine works."""

import hashlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any
from uuid import UUID

import anyio
import anyio.to_thread
import pytest
from starlette.testclient import TestClient

from core.errors import DatabaseUnavailable, InputNotImage
from core.options import UpscaleOptions
from core.settings import Settings
from db import queue
from tests.engines import Repeating
from tests.requests import png, submit, upload
from worker.lease import Watchdog
from worker.upscale import open_worker
from worker.upscaler import encoding
from worker.upscaler.decoder import Decoder
from worker.upscaler.engines import Engines
from worker.upscaler.picture import Picture

Sql = Callable[..., list[Any]]


class _Scripted(Repeating):
    """Is nearly done as soon as it begins, and then does what the script says for the job of its turn."""

    name = "scripted"

    def __init__(self, *script: Callable[[], object]) -> None:
        self._script = iter(script)

    def act(
        self,
        picture: Picture,
        options: UpscaleOptions,
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> None:
        on_progress(0.9)
        next(self._script)()


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
    with open_worker(settings, Engines(_Scripted(*script))) as worker:
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


def test_beside_a_job_that_was_lost_before_no_other_is_in_the_worker_s_hands_at_any_stage(
    client: TestClient, settings: Settings, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, struck, _ = _submit_jobs(client, 3)
    sql("UPDATE jobs SET strikes = 1 WHERE id = $1", struck)
    crowds: list[bool] = []

    def look() -> None:
        together = "SELECT count(*) > 1 AND max(strikes) > 0 FROM jobs WHERE status = 'PROCESSING'"
        crowds.append(_within(0.2, lambda: sql(together)[0][0]))

    def looking(act: Callable[..., Any]) -> Callable[..., Any]:
        def looked(*arguments: Any) -> Any:
            look()
            return act(*arguments)

        return looked

    monkeypatch.setattr(Decoder, "decode", looking(Decoder.decode))
    monkeypatch.setattr("worker.upscale.hashlib.file_digest", looking(hashlib.file_digest))
    assert _work(settings, look, look, look) == 3
    assert crowds == [False] * 9
    assert sql("SELECT DISTINCT status FROM jobs") == [("COMPLETED",)]


def test_a_claim_ahead_whose_answer_is_lost_costs_the_running_job_nothing_and_the_lost_one_falls_to_others(
    client: TestClient, settings: Settings, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, lost = _submit_jobs(client, 2)
    claim, alive = queue.claim, "SELECT workers.id FROM jobs JOIN workers ON workers.id = worker_id WHERE jobs.id = $1"
    (claims, seen) = list[int](), list[bool]()

    async def answer_lost(*arguments: Any, **named: Any) -> Any:
        claims.append(1)
        attempt = await claim(*arguments, **named)
        if len(claims) == 2:
            raise DatabaseUnavailable("The answer is lost.")
        return attempt

    def outlast_the_lease() -> None:
        ((before,),) = sql(alive, running)
        assert _within(5, lambda: _running(sql) == 2)
        seen.append(_within(5, lambda: sql(alive, running)[0][0] != before))
        seen.append(sql(alive, lost)[0][0] == before)

    monkeypatch.setattr(queue, "claim", answer_lost)
    hasty = settings.model_copy(update={"lease_seconds": 2})
    with open_worker(hasty, Engines(_Scripted(outlast_the_lease))) as worker, pytest.raises(DatabaseUnavailable):
        worker.work()
    assert seen == [True, True]
    assert client.get(f"/v2/jobs/{running}").json()["status"] == "COMPLETED"


def test_an_end_that_cannot_be_written_for_a_bug_leaves_its_job_to_others_and_lets_the_next_one_run(
    client: TestClient, settings: Settings, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, other = _submit_jobs(client, 2)

    async def explode(*_: object) -> None:
        raise ZeroDivisionError("an internal detail")

    def fail() -> None:
        assert _within(5, lambda: _running(sql) == 2)
        raise ZeroDivisionError("an internal detail")

    monkeypatch.setattr("worker.endings.jobs.fail", explode)
    hasty = settings.model_copy(update={"lease_seconds": 1})
    with open_worker(hasty, Engines(_Scripted(fail, _nothing))) as worker:
        assert worker.work() == 2
        assert client.get(f"/v2/jobs/{other}").json()["status"] == "COMPLETED"
        gone = "SELECT beat_at < now() - interval '0.5 s' FROM workers JOIN jobs ON worker_id = workers.id"
        assert _within(5, lambda: sql(f"{gone} WHERE jobs.id = $1", stuck) == [(True,)])


def test_a_job_that_was_read_ahead_of_an_engine_that_ends_its_thread_falls_to_others(
    client: TestClient, settings: Settings, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ahead = _submit_jobs(client, 2)
    claim, claims, ended = queue.claim, list[int](), threading.Event()

    async def claim_late(*arguments: Any, **named: Any) -> Any:
        claims.append(1)
        if len(claims) == 2:
            assert await anyio.to_thread.run_sync(ended.wait, 5)
            await anyio.sleep(0.5)  # until the worker has registered anew
        return await claim(*arguments, **named)

    def end() -> None:
        ended.set()
        raise SystemExit

    monkeypatch.setattr(queue, "claim", claim_late)
    hasty = settings.model_copy(update={"lease_seconds": 1})
    with open_worker(hasty, Engines(_Scripted(end))) as worker:
        with pytest.raises(SystemExit):
            worker.work()
        assert _running(sql) == 2
        gone = "SELECT beat_at < now() - interval '0.5 s' FROM workers JOIN jobs ON worker_id = workers.id"
        assert _within(5, lambda: sql(f"{gone} WHERE jobs.id = $1", ahead) == [(True,)])


def test_a_finished_picture_is_let_go_when_it_is_written(
    client: TestClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = _submit_jobs(client, 2)
    encode, made = encoding.encode, list[weakref.ref[Any]]()

    def remembered(strips: Iterator[Picture]) -> Iterator[Picture]:
        for strip in strips:
            made.append(weakref.ref(strip.rgb))
            yield strip

    def remember(strips: Iterator[Picture], *arguments: Any) -> Future[None]:
        return encode(remembered(strips), *arguments)

    def wait() -> None:
        assert _within(5, lambda: client.get(f"/v2/jobs/{first}").json()["status"] == "COMPLETED")
        assert _within(1, lambda: made[0]() is None)

    monkeypatch.setattr("worker.upscale.encoding.encode", remember)
    assert _work(settings, _nothing, wait) == 2
    assert len(made) == 2


@pytest.mark.parametrize("then", ["COMPLETED", "FAILED"])
def test_a_worker_that_is_to_end_begins_nothing_that_it_has_read_ahead(
    client: TestClient, settings: Settings, sql: Sql, then: str
) -> None:
    running, ahead = _submit_jobs(client, 2)

    def drain() -> None:
        assert _within(5, lambda: _running(sql) == 2)
        worker.drain()
        if then == "FAILED":
            raise InputNotImage("It is no picture.")

    with open_worker(settings, Engines(_Scripted(drain))) as worker:
        assert worker.work() == 2
    rows = {row["id"]: (row["status"], row["strikes"]) for row in sql("SELECT id, status, strikes FROM jobs")}
    assert rows == {running: (then, 0), ahead: ("QUEUED", 0)}


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
