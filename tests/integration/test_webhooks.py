"""Webhooks: what a receiver gets, and what happens when it does not answer as it should."""

import json
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from starlette.testclient import TestClient

from core.errors import StorageRefused, StorageUnavailable, UpscaledError
from core.outbound import Answer, Outbound
from core.settings import Settings
from core.storage import LocalStorage
from db.deliveries import Outcome
from tests.requests import body_of, png, upload
from tests.web import Reply, Web
from tests.webhooks import deliver, owe, submit_with_webhook
from worker.posts import NOT_MADE, shows_life

Sql = Callable[..., list[Any]]
Work = Callable[[], int]


@pytest.fixture
def status(sql: Sql) -> Callable[[], str]:
    """The status of the one delivery."""
    return lambda: sql("SELECT status FROM deliveries")[0]["status"]


def test_a_receiver_is_told_of_a_completed_job(
    client: TestClient, work: Work, web: Web, settings: Settings, status: Callable[[], str]
) -> None:
    job_id = submit_with_webhook(client, upload(client, png(4, 3)), web.serve("/hook"))
    work()
    assert client.get(f"/v2/jobs/{job_id}").json()["webhookStatus"] == "pending"
    deliver(settings, lambda: status() == "delivered")
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
    job_id = submit_with_webhook(client, web.url + "/nothing.png", web.serve("/hook"))
    work()
    deliver(settings, lambda: status() == "delivered")
    body = json.loads(web.seen[-1].body)
    assert (body["event"], body["status"], body["jobId"]) == ("failed", "FAILED", job_id)
    assert (body["error"], body["errorCode"]) == ("The image URL answered 404.", "input_fetch_failed")


def test_a_receiver_is_not_told_what_it_did_not_ask_for(client: TestClient, work: Work, web: Web, sql: Sql) -> None:
    submit_with_webhook(client, upload(client, png(4, 3)), web.serve("/hook"), "failed")
    work()
    assert sql("SELECT * FROM deliveries") == []


def test_a_failed_attempt_is_repeated_under_the_same_id_and_logged(
    client: TestClient, work: Work, web: Web, settings: Settings, status: Callable[[], str], sql: Sql
) -> None:
    submit_with_webhook(client, upload(client, png(4, 3)), web.serve("/hook", b"try later", status=500))
    work()
    eager = settings.model_copy(update={"webhook_retry_seconds": (0.1, 0.1, 0.1)})

    def mend_after_two() -> bool:
        if len(web.seen) >= 2:
            web.serve("/hook", b"thanks")
        return status() == "delivered"

    deliver(eager, mend_after_two)
    attempts = sql("SELECT number, status_code, excerpt FROM delivery_attempts ORDER BY number")
    assert [attempt["number"] for attempt in attempts] == list(range(1, len(attempts) + 1))
    assert (attempts[0]["status_code"], attempts[0]["excerpt"]) == (500, "try later")
    assert (attempts[-1]["status_code"], attempts[-1]["excerpt"]) == (200, "thanks")
    assert len({seen.headers["webhook-id"] for seen in web.seen}) == 1
    assert len({seen.body for seen in web.seen}) == 1


@pytest.mark.parametrize("fault", [StorageUnavailable, StorageRefused])
def test_a_delivery_waits_its_turn_while_no_url_of_the_result_can_be_made(
    *,
    client: TestClient,
    work: Work,
    web: Web,
    settings: Settings,
    sql: Sql,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: type[UpscaledError],
) -> None:
    async def url(*_: object) -> str:
        raise fault("no credentials of a role")

    submit_with_webhook(client, upload(client, png(4, 3)), web.serve("/hook"))
    work()
    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "url", url)
        deliver(settings, lambda: sql("SELECT * FROM delivery_attempts") != [])
    (attempt,) = sql("SELECT number, error, status_code FROM delivery_attempts")
    assert (attempt["number"], attempt["error"], attempt["status_code"]) == (1, NOT_MADE, None)
    assert shows_life(Outcome(duration_ms=0, error=NOT_MADE)) is None  # the receiver is not to blame
    assert "bug" not in caplog.text
    assert web.seen == []
    assert sql("UPDATE deliveries SET due_at = now() WHERE status = 'pending' AND due_at > now() RETURNING id")
    deliver(settings, lambda: len(web.seen) == 1)


def test_a_delivery_whose_attempts_are_spent_has_failed(
    client: TestClient, work: Work, web: Web, settings: Settings, status: Callable[[], str], sql: Sql
) -> None:
    job_id = submit_with_webhook(client, upload(client, png(4, 3)), web.serve("/hook", status=503))
    work()
    deliver(settings.model_copy(update={"webhook_retry_seconds": (0.1,)}), lambda: status() == "failed")
    assert len(web.seen) == 2
    assert client.get(f"/v2/jobs/{job_id}").json()["webhookStatus"] == "failed"
    assert client.get(f"/v2/jobs/{job_id}").json()["status"] == "COMPLETED"


def test_a_redirect_is_a_failure_and_not_followed(
    client: TestClient, work: Work, web: Web, settings: Settings, sql: Sql
) -> None:
    web.serve("/elsewhere")
    submit_with_webhook(client, upload(client, png(4, 3)), web.serve("/hook", status=302, Location="/elsewhere"))
    work()
    deliver(settings, lambda: sql("SELECT * FROM delivery_attempts") != [])
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
    submit_with_webhook(client, upload(client, png(4, 3)), "https://example.com/hook")
    sql("UPDATE jobs SET webhook_url = $1", url)  # as if it had been submitted under other settings
    work()
    deliver(settings, lambda: sql("SELECT * FROM delivery_attempts") != [])
    (attempt,) = sql("SELECT status_code, error FROM delivery_attempts")
    assert attempt["status_code"] is None
    assert reason in attempt["error"]


def test_a_receiver_that_hangs_holds_up_no_other(
    client: TestClient, work: Work, web: Web, settings: Settings, sql: Sql
) -> None:
    web.replies["/slow"] = Reply(before=lambda: time.sleep(1.5))
    submit_with_webhook(client, upload(client, png(4, 3)), web.url + "/slow")
    submit_with_webhook(client, upload(client, png(4, 3)), web.serve("/quick"))
    work()
    hasty = settings.model_copy(update={"webhook_timeout_seconds": 0.5})
    deliver(hasty, lambda: len(sql("SELECT * FROM delivery_attempts")) == 2)
    outcomes = sql("SELECT status_code, error FROM delivery_attempts ORDER BY status_code")
    assert [outcome["status_code"] for outcome in outcomes] == [200, None]
    assert outcomes[1]["error"] == "No answer within 0.5 seconds."


def test_an_attempt_whose_dispatcher_died_is_made_again(
    client: TestClient, work: Work, web: Web, settings: Settings, status: Callable[[], str], sql: Sql
) -> None:
    submit_with_webhook(client, upload(client, png(4, 3)), web.serve("/hook"))
    work()
    # Taken by a dispatcher that is no more; its lease has just run out.
    sql("UPDATE deliveries SET attempts = 1, due_at = now()")
    deliver(settings, lambda: status() == "delivered")
    assert sql("SELECT attempts FROM deliveries")[0]["attempts"] == 2


def test_a_receiver_is_told_of_a_cancelled_job(
    client: TestClient, web: Web, settings: Settings, status: Callable[[], str], sql: Sql
) -> None:
    job_id = submit_with_webhook(client, upload(client, png(4, 3)), web.serve("/hook"))
    _end(sql, "CANCELLED", "cancelled", error=None)
    deliver(settings, lambda: status() == "delivered")
    body = json.loads(web.seen[0].body)
    assert datetime.fromisoformat(body.pop("timestamp"))
    assert body == {
        "type": "job.cancelled",
        "event": "cancelled",
        "jobId": job_id,
        "status": "CANCELLED",
        "model": "clarity-upscale",
        "creditCost": None,
        "completedAt": client.get(f"/v2/jobs/{job_id}").json()["completedAt"],
    }


def _end(sql: Sql, status: str, event: str, error: str | None) -> None:
    """End the one job and owe its delivery."""
    sql("UPDATE jobs SET status = $1, completed_at = now(), error = $2, error_code = $2", status, error)
    sql("INSERT INTO deliveries (job_id, event, url) SELECT id, $1, webhook_url FROM jobs", event)


def test_a_cancelled_job_tells_why_when_there_is_a_reason(
    client: TestClient, web: Web, settings: Settings, status: Callable[[], str], sql: Sql
) -> None:
    submit_with_webhook(client, upload(client, png(4, 3)), web.serve("/hook"))
    _end(sql, "CANCELLED", "cancelled", error="deadline_exceeded")
    deliver(settings, lambda: status() == "delivered")
    body = json.loads(web.seen[0].body)
    assert (body["error"], body["errorCode"]) == ("deadline_exceeded", "deadline_exceeded")


def test_who_names_no_events_is_told_of_every_end_and_of_no_progress(client: TestClient, web: Web, sql: Sql) -> None:
    image = upload(client, png(4, 3))
    submit_with_webhook(client, image, web.serve("/hook"))
    assert sql("SELECT webhook_events FROM jobs")[0]["webhook_events"] == ["completed", "failed", "cancelled"]
    submit_with_webhook(client, image, web.serve("/hook"), "progress", "cancelled")
    assert client.post(
        "/v2/images/upscale", json=body_of(image) | {"webhookUrl": web.url, "webhookEvents": ["started"]}
    ).is_client_error


def test_an_address_that_is_gone_is_given_up_at_once(
    client: TestClient, work: Work, web: Web, settings: Settings, status: Callable[[], str]
) -> None:
    submit_with_webhook(client, upload(client, png(4, 3)), web.serve("/hook", status=410))
    work()
    deliver(settings, lambda: status() == "failed")
    assert len(web.seen) == 1


def test_a_receiver_that_asks_for_time_gets_it(
    client: TestClient, work: Work, web: Web, settings: Settings, sql: Sql
) -> None:
    submit_with_webhook(client, upload(client, png(4, 3)), web.serve("/hook", status=429, Retry_After="1000"))
    work()
    deliver(settings, lambda: sql("SELECT * FROM delivery_attempts") != [])
    assert 990 < sql("SELECT due_at - now() AS left FROM deliveries")[0]["left"].total_seconds() <= 1000


def test_a_bug_that_one_delivery_meets_ends_no_other(
    client: TestClient, web: Web, settings: Settings, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    owe(sql, web.serve("/odd"))
    owe(sql, web.serve("/hook"), 3)
    post = Outbound.post

    async def stumble(self: Outbound, url: str, *arguments: Any) -> Answer:
        if url.endswith("/odd"):
            raise ZeroDivisionError
        return await post(self, url, *arguments)

    monkeypatch.setattr(Outbound, "post", stumble)
    deliver(settings, lambda: len(sql("SELECT * FROM deliveries WHERE status = 'delivered'")) == 3)
    assert sql("SELECT status FROM deliveries WHERE url LIKE '%odd'")[0]["status"] == "pending"
