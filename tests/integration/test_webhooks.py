"""Webhooks: what a receiver gets, and what happens when it does not answer as it should."""

import asyncio
import json
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from starlette.testclient import TestClient

from core.outbound import Outbound
from core.settings import Settings
from core.storage import open_storage
from db.session import Database
from tests.requests import body_of, png, upload
from tests.web import Reply, Web
from worker.webhooks import WebhookSender

Sql = Callable[..., list[Any]]
Work = Callable[[], int]


def _submit(client: TestClient, image: str, url: str, *events: str) -> str:
    body = body_of(image) | {"webhookUrl": url} | ({"webhookEvents": events} if events else {})
    response = client.post("/v2/images/upscale", json=body)
    assert response.status_code == 202
    return response.json()["jobId"]


def _deliver(settings: Settings, until: Callable[[], bool], seconds: float = 10) -> None:
    """Run a sender until `until` holds."""

    async def run() -> None:
        database = Database(settings)
        async with Outbound(settings.outbound_allow) as outbound:
            sender = WebhookSender(settings, database, open_storage(settings), outbound)
            sending = asyncio.create_task(sender.run())
            give_up_at = time.monotonic() + seconds
            while not await asyncio.to_thread(until):
                assert not sending.done()
                assert time.monotonic() < give_up_at, "the delivery did not get there in time"
                await asyncio.sleep(0.05)
            sending.cancel()
            await asyncio.wait([sending])
        await database.close()

    asyncio.run(run())


@pytest.fixture
def status(sql: Sql) -> Callable[[], str]:
    """The status of the one delivery."""
    return lambda: sql("SELECT status FROM deliveries")[0]["status"]


def test_a_receiver_is_told_of_a_completed_job(
    client: TestClient, work: Work, web: Web, settings: Settings, status: Callable[[], str]
) -> None:
    job_id = _submit(client, upload(client, png(4, 3)), web.serve("/hook"))
    work()
    assert client.get(f"/v2/jobs/{job_id}").json()["webhookStatus"] == "pending"
    _deliver(settings, lambda: status() == "delivered")
    job = client.get(f"/v2/jobs/{job_id}").json()
    assert job["webhookStatus"] == "delivered"
    (seen,) = web.seen
    assert seen.method == "POST"
    assert seen.headers["Content-Type"] == "application/json"
    assert seen.headers["webhook-id"]
    assert abs(int(seen.headers["webhook-timestamp"]) - time.time()) < 60
    body = json.loads(seen.body)
    assert datetime.fromisoformat(body.pop("timestamp"))
    assert body == {
        "type": "job.completed",
        "event": "completed",
        "jobId": job_id,
        "status": "COMPLETED",
        "progress": 100,
        "result": job["result"],
        "model": "clarity-upscale",
        "creditCost": None,
        "completedAt": job["completedAt"],
    }


def test_a_receiver_is_told_of_a_failed_job(
    client: TestClient, work: Work, web: Web, settings: Settings, status: Callable[[], str]
) -> None:
    job_id = _submit(client, web.url + "/nothing.png", web.serve("/hook"))
    work()
    _deliver(settings, lambda: status() == "delivered")
    body = json.loads(web.seen[-1].body)
    assert (body["event"], body["status"], body["jobId"]) == ("failed", "FAILED", job_id)
    assert (body["error"], body["errorCode"]) == ("The image URL answered 404.", "input_fetch_failed")


def test_a_receiver_is_not_told_what_it_did_not_ask_for(client: TestClient, work: Work, web: Web, sql: Sql) -> None:
    _submit(client, upload(client, png(4, 3)), web.serve("/hook"), "failed")
    work()
    assert sql("SELECT * FROM deliveries") == []


def test_a_failed_attempt_is_repeated_under_the_same_id_and_logged(
    client: TestClient, work: Work, web: Web, settings: Settings, status: Callable[[], str], sql: Sql
) -> None:
    _submit(client, upload(client, png(4, 3)), web.serve("/hook", b"try later", status=500))
    work()
    eager = settings.model_copy(update={"webhook_retry_seconds": (0.1, 0.1, 0.1)})

    def mend_after_two() -> bool:
        if len(web.seen) >= 2:
            web.serve("/hook", b"thanks")
        return status() == "delivered"

    _deliver(eager, mend_after_two)
    attempts = sql("SELECT number, status_code, excerpt FROM delivery_attempts ORDER BY number")
    assert [attempt["number"] for attempt in attempts] == list(range(1, len(attempts) + 1))
    assert (attempts[0]["status_code"], attempts[0]["excerpt"]) == (500, "try later")
    assert (attempts[-1]["status_code"], attempts[-1]["excerpt"]) == (200, "thanks")
    assert len({seen.headers["webhook-id"] for seen in web.seen}) == 1
    assert len({seen.body for seen in web.seen}) == 1


def test_a_delivery_whose_attempts_are_spent_has_failed(
    client: TestClient, work: Work, web: Web, settings: Settings, status: Callable[[], str], sql: Sql
) -> None:
    job_id = _submit(client, upload(client, png(4, 3)), web.serve("/hook", status=503))
    work()
    _deliver(settings.model_copy(update={"webhook_retry_seconds": (0.1,)}), lambda: status() == "failed")
    assert len(web.seen) == 2
    assert client.get(f"/v2/jobs/{job_id}").json()["webhookStatus"] == "failed"
    assert client.get(f"/v2/jobs/{job_id}").json()["status"] == "COMPLETED"


def test_a_redirect_is_a_failure_and_not_followed(
    client: TestClient, work: Work, web: Web, settings: Settings, sql: Sql
) -> None:
    web.serve("/elsewhere")
    _submit(client, upload(client, png(4, 3)), web.serve("/hook", status=302, Location="/elsewhere"))
    work()
    _deliver(settings, lambda: sql("SELECT * FROM delivery_attempts") != [])
    assert [seen.path for seen in web.seen] == ["/hook"]
    assert sql("SELECT status FROM deliveries")[0]["status"] == "pending"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:9/hook", "No answer"),
        ("http://10.0.0.1/hook", "does not reach"),
        ("http://nowhere.invalid/hook", "No answer"),
    ],
)
def test_a_receiver_that_cannot_be_reached_is_logged_with_the_reason(
    client: TestClient, work: Work, settings: Settings, sql: Sql, url: str, reason: str
) -> None:
    _submit(client, upload(client, png(4, 3)), url)
    work()
    _deliver(settings, lambda: sql("SELECT * FROM delivery_attempts") != [])
    (attempt,) = sql("SELECT status_code, error FROM delivery_attempts")
    assert attempt["status_code"] is None
    assert reason in attempt["error"]


def test_a_receiver_that_hangs_holds_up_no_other(
    client: TestClient, work: Work, web: Web, settings: Settings, sql: Sql
) -> None:
    web.replies["/slow"] = Reply(before=lambda: time.sleep(1.5))
    _submit(client, upload(client, png(4, 3)), web.url + "/slow")
    _submit(client, upload(client, png(4, 3)), web.serve("/quick"))
    work()
    hasty = settings.model_copy(update={"webhook_timeout_seconds": 0.5})
    _deliver(hasty, lambda: len(sql("SELECT * FROM delivery_attempts")) == 2)
    outcomes = sql("SELECT status_code, error FROM delivery_attempts ORDER BY status_code")
    assert [outcome["status_code"] for outcome in outcomes] == [200, None]
    assert outcomes[1]["error"] == "No answer within 0.5 seconds."


def test_an_attempt_whose_dispatcher_died_is_made_again(
    client: TestClient, work: Work, web: Web, settings: Settings, status: Callable[[], str], sql: Sql
) -> None:
    _submit(client, upload(client, png(4, 3)), web.serve("/hook"))
    work()
    # Taken by a dispatcher that is no more; its lease has just run out.
    sql("UPDATE deliveries SET attempts = 1, due_at = now()")
    _deliver(settings, lambda: status() == "delivered")
    assert sql("SELECT attempts FROM deliveries")[0]["attempts"] == 2
