"""A result that the caller wants put somewhere: it is, or the job says why not and the result can be read here."""

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from starlette.testclient import TestClient

from core.errors import LeaseLost, Stopped, StorageUnavailable, UploadFailed
from core.queue import POOL
from core.settings import Settings
from core.storage import LocalStorage
from db import jobs
from tests.broker import connect_redis
from tests.queues import RESULT, open_queue
from tests.requests import body_of, png, upload
from tests.web import Reply, Web
from tests.webhooks import deliver
from worker import puts
from worker.upscale import Worker, open_worker
from worker.upscaler.engines import Engines
from worker.upscaler.engines.lanczos import Lanczos

Sql = Callable[..., list[Any]]

QUERY = "?X-Amz-Credential=A%2Fb&X-Amz-Signature=5ecret"


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"put_retry_seconds": (0.01, 0.02), "put_timeout_seconds": 2.0})


def _ask(client: TestClient, url: str, **fields: Any) -> Any:
    body = body_of(upload(client, png(2, 2)), output_format="webp") | {"uploadUrl": url} | fields
    return client.post("/v2/images/upscale", json=body)


def _submit(client: TestClient, url: str, **fields: Any) -> UUID:
    answer = _ask(client, url, **fields)
    assert answer.status_code == 202, answer.text
    return UUID(answer.json()["jobId"])


def _job(client: TestClient, job_id: UUID) -> dict[str, Any]:
    return client.get(f"/v2/jobs/{job_id}").json()


def _within(seconds: float, holds: Callable[[], object]) -> bool:
    give_up_at = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > give_up_at:
            return False
        time.sleep(0.01)
    return True


@contextmanager
def _working(settings: Settings) -> Generator[Worker]:
    with open_worker(settings, Engines(Lanczos())) as worker:
        yield worker


def _work(settings: Settings) -> int:
    """Run what is queued, and wait until all of it has been put."""
    with _working(settings) as worker:
        return worker.work()


def _failed_with_its_result(client: TestClient, job_id: UUID, error: str) -> None:
    job = _job(client, job_id)
    assert (job["status"], job["errorCode"]) == ("FAILED", "upload_failed")
    assert job["error"] == f"The result could not be put to the upload URL: {error}."
    assert (job["expired"], job["expiresAt"] is not None) == (False, True)
    stored = client.get(job["result"]["images"][0])
    assert hashlib.sha256(stored.content).hexdigest() == job["result"]["sha256"]


def test_the_stored_bytes_are_put_with_their_type_and_length_and_nothing_of_ours(
    client: TestClient, settings: Settings, web: Web, sql: Sql
) -> None:
    web.serve(f"/bucket/a%20b.webp{QUERY}", status=201)
    job_id = _submit(client, f"{web.url}/bucket/a%20b.webp{QUERY}")
    assert _work(settings) == 1
    job = _job(client, job_id)
    assert (job["status"], job["error"], job["errorCode"]) == ("COMPLETED", None, None)
    (seen,) = web.seen
    assert (seen.method, seen.path) == ("PUT", f"/bucket/a%20b.webp{QUERY}")
    assert seen.body == client.get(job["result"]["images"][0]).content
    assert seen.headers == {
        "Host": web.url.removeprefix("http://"),
        "User-Agent": "upscaled",
        "Content-Type": "image/webp",
        "Content-Length": str(job["result"]["byteSize"]),
    }
    assert sql("SELECT upload_url FROM jobs") == [(None,)]


@pytest.mark.parametrize("status", [429, 503])
def test_what_time_may_mend_is_put_again(client: TestClient, settings: Settings, web: Web, status: int) -> None:
    url = web.serve("/a", status=status)
    web.replies["/a"].before = lambda: len(web.seen) == 2 and web.serve("/a")
    job_id = _submit(client, url)
    _work(settings)
    assert _job(client, job_id)["status"] == "COMPLETED"
    assert len(web.seen) == 3
    assert len({seen.body for seen in web.seen}) == 1


def test_a_refusal_fails_the_job_at_once_and_the_result_stays_readable(
    client: TestClient, settings: Settings, web: Web, sql: Sql
) -> None:
    job_id = _submit(client, web.serve(f"/a{QUERY}", b"<secret/>", status=403))
    _work(settings)
    _failed_with_its_result(client, job_id, "it answered 403")
    assert len(web.seen) == 1
    assert sql("SELECT upload_url, strikes, purge_at = expires_at FROM jobs") == [(None, 0, True)]


def test_a_redirect_is_a_refusal_and_is_not_followed(client: TestClient, settings: Settings, web: Web) -> None:
    job_id = _submit(client, web.serve("/a", status=307, Location="/b"))
    _work(settings)
    _failed_with_its_result(client, job_id, "it answered 307, and redirects are not followed")
    assert [seen.path for seen in web.seen] == ["/a"]


def test_when_the_retries_are_spent_the_job_fails_and_the_result_stays_readable(
    client: TestClient, settings: Settings, web: Web
) -> None:
    job_id = _submit(client, web.serve("/a", status=503))
    _work(settings)
    _failed_with_its_result(client, job_id, "it answered 503")
    assert len(web.seen) == 3


def test_a_server_that_cannot_be_reached_is_tried_as_often(
    client: TestClient, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = _submit(client, f"http://127.0.0.1:9/a{QUERY}")
    with caplog.at_level(logging.INFO):
        _work(settings)
    _failed_with_its_result(client, job_id, "it could not be reached, or did not answer in time")
    assert [f"PUT {number} failed" in caplog.text for number in (1, 2, 3, 4)] == [True, True, True, False]
    assert "5ecret" not in caplog.text


@pytest.mark.parametrize(("asked", "waited"), [("1", 1.0), ("3600", 0.3)])
def test_a_retry_after_is_honoured_within_limits(
    client: TestClient, settings: Settings, web: Web, monkeypatch: pytest.MonkeyPatch, asked: str, waited: float
) -> None:
    monkeypatch.setattr(puts, "LONGEST_RETRY_AFTER_SECONDS", max(waited, 0.3))
    at: list[float] = []
    web.replies["/a"] = Reply(503, headers={"Retry-After": asked}, before=lambda: at.append(time.monotonic()))
    _submit(client, f"{web.url}/a")
    _work(settings.model_copy(update={"put_retry_seconds": (0.0,)}))
    assert waited <= at[1] - at[0] < waited + 0.5


def test_the_webhook_of_a_failed_put_carries_the_result(
    client: TestClient, settings: Settings, web: Web, sql: Sql
) -> None:
    job_id = _submit(client, web.serve("/a", status=403), webhookUrl=web.serve("/hook"))
    _work(settings)
    deliver(settings, lambda: sql("SELECT status FROM deliveries") == [("delivered",)])
    told = json.loads(web.seen[-1].body)
    assert (told["event"], told["status"], told["errorCode"]) == ("failed", "FAILED", "upload_failed")
    assert client.get(told["result"]["images"][0]).status_code == 200
    assert told["result"] == _job(client, job_id)["result"]


def test_nobody_is_shown_the_upload_url(
    client: TestClient, settings: Settings, web: Web, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = _submit(client, web.serve(f"/a{QUERY}", status=403))
    shown = [client.get(f"/v2/jobs/{job_id}").text, client.get("/v2/jobs").text]
    with caplog.at_level(logging.DEBUG):
        _work(settings)
    shown += [client.get(f"/v2/jobs/{job_id}").text, client.get("/v2/jobs").text, caplog.text]
    assert [place for place, text in enumerate(shown) if "5ecret" in text or "X-Amz" in text] == []


HOSTILE = [
    *("http://10.0.0.1/a", "http://[::1]/a", "http://169.254.169.254/a", "http://0x7f.1/a", "ftp://example.com/a"),
    *("https://a:b@example.com/a", "https://example.com\\@10.0.0.1/", "/a", "https://example.com/".ljust(8193, "a")),
]


def test_an_upload_url_that_is_not_reached_is_refused_at_submit(client: TestClient) -> None:
    image = upload(client, png(2, 2))
    for url in HOSTILE:
        answer = client.post("/v2/images/upscale", json=body_of(image) | {"uploadUrl": url})
        assert (answer.status_code, list(answer.json()["details"])) == (400, ["uploadUrl"])
        assert url == "/a" or url not in answer.text


def test_a_signed_url_may_be_long(client: TestClient) -> None:
    assert _ask(client, "https://example.com/".ljust(8192, "a")).status_code == 202


def test_a_name_that_leads_inside_fails_the_job_without_a_connection(
    client: TestClient, settings: Settings, web: Web
) -> None:
    port = web.url.rpartition(":")[2]
    job_id = _submit(client, f"http://localhost:{port}/a")
    # Still some network is allowed, so that ports are left to the addresses.
    _work(settings.model_copy(update={"outbound_allow": settings.outbound_allow[:0]}))
    _failed_with_its_result(client, job_id, "it leads where this service does not go")
    assert web.seen == []


def test_another_upload_url_is_another_request(client: TestClient) -> None:
    body = body_of("https://example.com/a.png") | {"uploadUrl": "https://example.com/1"}
    headers = {"Idempotency-Key": "k"}
    assert client.post("/v2/images/upscale", json=body, headers=headers).status_code == 202
    assert client.post("/v2/images/upscale", json=body, headers=headers).status_code == 202
    body["uploadUrl"] = "https://example.com/2"
    assert client.post("/v2/images/upscale", json=body, headers=headers).status_code == 409


def _hanging(web: Web) -> threading.Event:
    """Let PUTs to /a wait until the event is set."""
    waiting = threading.Event()
    web.replies["/a"] = Reply(before=lambda: waiting.wait(10))
    return waiting


def _objects(settings: Settings) -> list[str]:
    folder = settings.storage_dir / "results"
    return [str(path) for path in folder.rglob("*.webp")] if folder.exists() else []


@pytest.mark.parametrize("hangs", [True, False], ids=["in a PUT", "in a pause"])
def test_a_job_that_is_cancelled_while_it_is_put_is_cancelled_soon_and_leaves_nothing(
    client: TestClient, settings: Settings, web: Web, sql: Sql, *, hangs: bool
) -> None:
    waiting = _hanging(web)
    if not hangs:
        web.serve("/a", status=503)
    patient = settings.model_copy(update={"put_retry_seconds": (30.0,), "put_timeout_seconds": 30.0})
    job_id = _submit(client, f"{web.url}/a")
    with _working(patient) as worker:
        worker.work()
        assert _within(5, lambda: web.seen)
        assert len(_objects(settings)) == 1
        assert client.post(f"/v2/jobs/{job_id}/cancel").status_code == 202
        assert _within(3, lambda: _job(client, job_id)["status"] == "CANCELLED")
    waiting.set()
    assert _objects(settings) == []
    assert sql("SELECT upload_url, result, error_code FROM jobs") == [(None, None, None)]


def test_a_worker_that_is_to_end_hands_back_what_it_could_not_put_in_time(
    client: TestClient, settings: Settings, web: Web, sql: Sql
) -> None:
    web.serve("/a", status=503)
    patient = settings.model_copy(update={"put_retry_seconds": (30.0,), "drain_seconds": 0.2})
    job_id = _submit(client, f"{web.url}/a")
    began = time.monotonic()
    with _working(patient) as worker:
        worker.work()
        assert _within(5, lambda: web.seen)
        worker.drain()
    assert time.monotonic() - began < 5
    assert sql("SELECT status, strikes, upload_url FROM jobs") == [("QUEUED", 0, f"{web.url}/a")]
    assert _objects(settings) == []
    web.serve("/a")
    assert _work(settings) == 1
    assert _job(client, job_id)["status"] == "COMPLETED"


def test_a_result_that_cannot_be_taken_away_costs_a_worker_that_is_to_end_no_strike(
    client: TestClient, settings: Settings, web: Web, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: object) -> None:
        raise StorageUnavailable("The storage could not be reached.")

    monkeypatch.setattr(LocalStorage, "delete", away)
    web.serve("/a", status=503)
    patient = settings.model_copy(update={"put_retry_seconds": (30.0,), "drain_seconds": 0.0})
    _submit(client, f"{web.url}/a")
    with _working(patient) as worker:
        worker.work()
        assert _within(5, lambda: web.seen)
        worker.drain()
    assert sql("SELECT status, strikes, due_at <= now() FROM jobs") == [("QUEUED", 0, True)]


def test_an_attempt_that_was_lost_puts_nothing_more_and_completes_nothing(
    client: TestClient, settings: Settings, web: Web, sql: Sql
) -> None:
    web.replies["/a"] = Reply(503, before=lambda: sql("UPDATE jobs SET attempt = attempt + 1"))
    _submit(client, f"{web.url}/a")
    _work(settings)
    assert len(web.seen) == 1
    assert sql("SELECT status, attempt, result_key FROM jobs") == [("PROCESSING", 2, None)]
    assert _objects(settings) == []


def test_the_engine_goes_on_while_a_result_waits_for_a_slow_server(
    client: TestClient, settings: Settings, web: Web
) -> None:
    waiting, slow = _hanging(web), settings.model_copy(update={"put_timeout_seconds": 30.0})
    stuck, plain = _submit(client, f"{web.url}/a"), _submit(client, web.serve("/b"))
    with _working(slow) as worker:
        assert worker.work() == 2
        assert _within(5, lambda: _job(client, plain)["status"] == "COMPLETED")
        later = _submit(client, web.serve("/c"))
        assert worker.work() == 1
        assert _within(5, lambda: _job(client, later)["status"] == "COMPLETED")
        assert _job(client, stuck)["status"] == "PROCESSING"
        waiting.set()
    assert _job(client, stuck)["status"] == "COMPLETED"


def test_a_job_that_had_to_wait_for_its_key_s_last_place_is_hinted_at_when_the_put_is_over(
    client: TestClient, settings: Settings, web: Web, sql: Sql
) -> None:
    waiting = _hanging(web)
    _submit(client, f"{web.url}/a")
    waits = _submit(client, web.serve("/b"))
    sql("UPDATE api_keys SET max_concurrent = 1")
    with _working(settings) as worker, connect_redis(settings.redis_url) as broker:
        assert worker.work() == 1
        broker.delete(POOL)
        waiting.set()
        assert _within(5, lambda: broker.llen(POOL))
        assert worker.work() == 1
    assert _job(client, waits)["status"] == "COMPLETED"


def test_no_more_results_than_there_is_room_for_wait_for_slow_servers(
    client: TestClient, settings: Settings, web: Web, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(puts, "PUTS_AT_ONCE", 2)
    waiting, slow = _hanging(web), settings.model_copy(update={"put_timeout_seconds": 30.0})
    for _ in range(8):
        _submit(client, f"{web.url}/a")
    with _working(slow) as worker:
        running = threading.Thread(target=worker.work)
        running.start()
        assert _within(5, lambda: len(web.seen) == 2)
        # One more waits to be put, one for the engine's line, and one is read ahead.
        assert not _within(0.5, lambda: sql("SELECT count(*) FROM jobs WHERE attempt > 0")[0][0] > 5)
        assert len(web.seen) == 2
        waiting.set()
        running.join()
    assert len(web.seen) == 8


def test_a_job_that_was_lost_before_is_alone_until_it_is_put(
    client: TestClient, settings: Settings, web: Web, sql: Sql
) -> None:
    waiting, slow = _hanging(web), settings.model_copy(update={"put_timeout_seconds": 30.0})
    _submit(client, f"{web.url}/a")
    sql("UPDATE jobs SET strikes = 1")
    _submit(client, web.serve("/b"))
    with _working(slow) as worker:
        running = threading.Thread(target=worker.work)
        running.start()
        assert _within(5, lambda: web.seen)
        assert not _within(0.3, lambda: sql("SELECT 1 FROM jobs WHERE attempt = 1 AND strikes = 0"))
        waiting.set()
        running.join()
    assert sql("SELECT DISTINCT status FROM jobs") == [("COMPLETED",)]


def test_a_put_outlasts_what_the_watchdog_takes_for_a_stall(client: TestClient, settings: Settings, web: Web) -> None:
    waiting = _hanging(web)
    job_id = _submit(client, f"{web.url}/a")
    threading.Timer(0.8, waiting.set).start()
    _work(settings.model_copy(update={"stall_seconds": 0.5}))  # or this process would be no more
    assert _job(client, job_id)["status"] == "COMPLETED"


@pytest.mark.anyio
async def test_the_end_of_a_failed_put_is_said_once_and_by_the_current_attempt(
    settings: Settings, sql_async: Any
) -> None:
    failure, hour = UploadFailed("It answered 403."), timedelta(hours=1)
    async with open_queue(settings) as queue:
        await queue.submit(await queue.add_key(), upload_url="https://example.com/put")
        zombie = await queue.take()
        assert zombie.upload_url == "https://example.com/put"
        await queue.do(jobs.hand_back, zombie, 3)
        attempt = await queue.take()
        with pytest.raises(LeaseLost):
            await queue.do(jobs.require_wanted, zombie)
        with pytest.raises(LeaseLost):
            await queue.do(jobs.complete, zombie, RESULT, "results/a/1.png", hour, failure)
        await queue.do(jobs.require_wanted, attempt)
        for _ in range(2):  # as after a commit whose answer was lost
            await queue.do(jobs.complete, attempt, RESULT, "results/a/2.png", hour, failure)
        with pytest.raises(LeaseLost):
            await queue.do(jobs.complete, attempt, RESULT, "results/a/2.png", hour)
    (row,) = await sql_async("SELECT status, error, error_code, result_key, upload_url FROM jobs")
    assert tuple(row) == ("FAILED", "It answered 403.", "upload_failed", "results/a/2.png", None)


@pytest.mark.anyio
@pytest.mark.parametrize("why", ["cancel_requested_at = now()", "deadline_at = now()"])
async def test_what_nobody_wants_is_not_put(settings: Settings, sql_async: Any, why: str) -> None:
    async with open_queue(settings) as queue:
        await queue.submit(await queue.add_key(), upload_url="https://example.com/put")
        attempt = await queue.take()
        await sql_async(f"UPDATE jobs SET {why}")  # noqa: S608
        with pytest.raises(Stopped):
            await queue.do(jobs.require_wanted, attempt)


@pytest.mark.anyio
async def test_whichever_way_a_job_ends_its_upload_url_goes(settings: Settings, sql_async: Any) -> None:
    async with open_queue(settings) as queue:
        owner, url = await queue.add_key(), "https://example.com/put"

        async def begin() -> tuple[UUID, jobs.Attempt]:
            job_id = await queue.submit(owner, upload_url=url)
            return job_id, await queue.take()

        _, attempt = await begin()
        await queue.do(jobs.complete, attempt, RESULT, "k", timedelta(hours=1))
        _, attempt = await begin()
        await queue.do(jobs.fail, attempt, UploadFailed("x"))
        _, attempt = await begin()
        await queue.do(jobs.hand_back, attempt, 1, fault=UploadFailed("x"))
        job_id, attempt = await begin()
        await queue.do(jobs.cancel, job_id, owner)
        (kept,) = await sql_async("SELECT upload_url FROM jobs WHERE id = $1", job_id)
        assert kept["upload_url"] == url  # it still runs
        await queue.do(jobs.hand_back, attempt, 3)
        await queue.do(jobs.cancel, await queue.submit(owner, upload_url=url), owner)
        await queue.submit(owner, upload_url=url, cancel_after=timedelta(0))
        await queue.do(jobs.expire)
        waits = await queue.submit(owner, upload_url=url)
    rows = {row["id"]: row["upload_url"] for row in await sql_async("SELECT id, upload_url FROM jobs")}
    assert rows.pop(waits) == url
    assert list(rows.values()) == [None] * 6
