"""Progress told to webhooks: at best, once, and never in a delivery's way."""

import asyncio
import json
import time
from collections.abc import Callable
from datetime import datetime
from threading import Lock
from typing import Any
from uuid import UUID

import pytest
from standardwebhooks import Webhook
from starlette.testclient import TestClient

from core import progress
from core.settings import Settings
from tests.broker import connect_redis
from tests.requests import png, upload
from tests.web import Reply, Web
from tests.webhooks import deliver, owe, submit_with_webhook
from worker.receivers import IN_FLIGHT_PER_RECEIVER, Receivers

Sql = Callable[..., list[Any]]


def _owe(settings: Settings, job_id: str, attempt: int, *percents: int) -> None:
    async def owe_each() -> None:
        async with progress.connect(settings) as client:
            for percent in percents:
                await progress.owe_event(client, UUID(job_id), attempt, percent)

    asyncio.run(owe_each())


def _none_owed(settings: Settings) -> bool:
    with connect_redis(settings.redis_url) as client:
        return client.llen(progress.EVENTS_KEY) == 0


def _send_all(settings: Settings) -> None:
    """Send what is owed, and leave time for a post that should not be."""
    emptied_at: list[float] = []

    def quiet() -> bool:
        if _none_owed(settings):
            emptied_at.append(time.monotonic())
        return bool(emptied_at) and time.monotonic() > emptied_at[0] + 0.5

    deliver(settings, quiet)


@pytest.fixture
def running(client: TestClient, web: Web, sql: Sql) -> str:
    """The id of a job in its second attempt, whose webhook asked for progress."""
    job_id = submit_with_webhook(client, upload(client, png(4, 3)), web.serve("/hook"), "progress", "completed")
    sql("UPDATE jobs SET status = 'PROCESSING', attempt = 2, started_at = now()")
    return job_id


def test_a_receiver_is_told_how_far_a_job_has_come(
    client: TestClient, running: str, web: Web, settings: Settings
) -> None:
    _owe(settings, running, 2, 45)
    deliver(settings, lambda: web.seen != [])
    (seen,) = web.seen
    secret = client.get("/v2/webhooks/secret").json()["secret"]
    body = Webhook(secret).verify(seen.body, dict(seen.headers))
    assert abs(datetime.fromisoformat(body.pop("timestamp")).timestamp() - time.time()) < 60
    assert body == {
        "type": "job.progress",
        "event": "progress",
        "jobId": running,
        "status": "PROCESSING",
        "progress": 45,
        "model": "clarity-upscale",
    }
    assert "." not in seen.headers["webhook-id"]


def test_progress_that_is_told_twice_has_one_id(running: str, web: Web, settings: Settings) -> None:
    for percent in (45, 45, 46):
        _owe(settings, running, 2, percent)
        _send_all(settings)
    first, again, other = [seen.headers["webhook-id"] for seen in web.seen]
    assert first == again != other


def test_progress_is_posted_once_whatever_the_answer(running: str, web: Web, settings: Settings, sql: Sql) -> None:
    web.serve("/hook", status=500)
    _owe(settings, running, 2, 45)
    _send_all(settings)
    assert len(web.seen) == 1
    assert sql("SELECT * FROM deliveries") == []


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE jobs SET status = 'QUEUED'",
        "UPDATE jobs SET status = 'FAILED'",
        "UPDATE jobs SET attempt = 3",
        "UPDATE jobs SET webhook_events = '{completed}'",
        "UPDATE jobs SET webhook_url = NULL",
    ],
)
def test_nobody_is_told_of_an_attempt_that_runs_no_more_or_who_did_not_ask(
    running: str, web: Web, settings: Settings, sql: Sql, change: str
) -> None:
    sql(change)
    _owe(settings, running, 2, 45)
    _send_all(settings)
    assert web.seen == []


def test_while_a_receiver_is_slow_progress_is_dropped_and_comes_in_order(
    running: str, web: Web, settings: Settings
) -> None:
    beside: list[bool] = []
    busy = Lock()

    def hold() -> None:
        beside.append(not busy.acquire(blocking=False))
        time.sleep(0.3)
        if not beside[-1]:
            busy.release()

    web.replies["/hook"] = Reply(before=hold)
    _owe(settings, running, 2, *range(1, 100))
    _send_all(settings)
    _owe(settings, running, 2, 99)
    _send_all(settings)
    told = [json.loads(seen.body)["progress"] for seen in web.seen]
    assert not any(beside)
    assert told == sorted(told)
    assert 2 <= len(told) < 10


@pytest.mark.parametrize("room", range(IN_FLIGHT_PER_RECEIVER // 2 + 1))
def test_progress_is_dropped_where_a_receiver_is_left_alone_or_half_its_room_is_taken(
    running: str, web: Web, settings: Settings, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    def crowded(_: Receivers, name: str) -> int:
        return room

    with monkeypatch.context() as patch:
        patch.setattr(Receivers, "room", crowded)
        _owe(settings, running, 2, 45)
        _send_all(settings)
        assert web.seen == []
    _owe(settings, running, 2, 46)
    deliver(settings, lambda: web.seen != [])
    assert json.loads(web.seen[0].body)["progress"] == 46


def test_no_more_than_a_thousand_events_wait(settings: Settings, running: str) -> None:
    _owe(settings, running, 2, *range(1, 1101))
    with connect_redis(settings.redis_url) as client:
        assert client.llen(progress.EVENTS_KEY) == progress.MAX_EVENTS
        assert json.loads(client.lindex(progress.EVENTS_KEY, -1))["percent"] == 101


@pytest.mark.parametrize("nonsense", [b"{", b"[]", b'{"job": 1}', b'{"job": "x", "attempt": 1, "percent": 1, "at": 0}'])
def test_an_event_that_cannot_be_read_is_dropped(running: str, web: Web, settings: Settings, nonsense: bytes) -> None:
    with connect_redis(settings.redis_url) as client:
        client.lpush(progress.EVENTS_KEY, nonsense)
    _owe(settings, running, 2, 45)
    deliver(settings, lambda: web.seen != [])


def test_without_redis_deliveries_go_out_all_the_same(web: Web, settings: Settings, sql: Sql) -> None:
    owe(sql, web.serve("/hook"), 5)
    cut_off = settings.model_copy(update={"redis_url": "redis://127.0.0.1:9/0"})
    deliver(cut_off, lambda: sql("SELECT 1 FROM deliveries WHERE status <> 'delivered'") == [])
