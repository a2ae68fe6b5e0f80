"""Deliveries as they are taken, recorded, read and sent again."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID, uuid4

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.testclient import TestClient

from cli.keys import create_key
from core.settings import Settings
from db import deliveries
from db.deliveries import DueDelivery, Outcome
from db.session import Database
from tests.requests import png, upload
from tests.web import Web
from tests.webhooks import deliver, owe, submit_with_webhook

Sql = Callable[..., list[Any]]
Work = Callable[[], int]

LEASE = timedelta(seconds=30)
REFUSED = Outcome(duration_ms=12, status_code=500, excerpt="no")
ACCEPTED = Outcome(duration_ms=12, status_code=200, excerpt="")


T = TypeVar("T")
Ask = Callable[[Callable[[AsyncConnection], Awaitable[T]]], T]


@pytest.fixture
def ask(settings: Settings) -> Ask[Any]:
    """Run one of the statements of db.deliveries."""

    async def connected(question: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        database = Database(settings)
        try:
            async with database.connection() as connection:
                return await question(connection)
        finally:
            await database.close()

    return lambda question: asyncio.run(connected(question))


Take = Callable[..., list[DueDelivery]]


@pytest.fixture
def take(ask: Ask[list[DueDelivery]]) -> Take:
    """Take what is due; the rooms are by the host of the receivers."""

    def take(limit: int = 32, **rooms: int) -> list[DueDelivery]:
        named = {f"https://{host}": room for host, room in rooms.items()}
        return ask(lambda connection: deliveries.take_due(connection, limit, LEASE, named, 4))

    return take


Record = Callable[[DueDelivery, Outcome, timedelta | None], None]


@pytest.fixture
def record(ask: Ask[None]) -> Record:
    return lambda taken, outcome, retry: ask(
        lambda connection: deliveries.record_attempt(connection, taken, outcome, retry)
    )


def _receivers(taken: list[DueDelivery]) -> list[str]:
    return sorted(delivery.receiver.removeprefix("https://") for delivery in taken)


def test_no_receiver_gets_more_than_its_room(sql: Sql, take: Take) -> None:
    for name in ("a", "b", "c"):
        owe(sql, f"https://{name}/hook", 10)
    assert _receivers(take(b=1, c=0)) == ["a", "a", "a", "a", "b"]
    assert _receivers(take(a=0, b=0)) == ["c", "c", "c", "c"]
    assert _receivers(take(limit=2, a=0, b=0)) == ["c", "c"]


def test_those_passed_over_hide_no_other_however_many_they_are(sql: Sql, take: Take) -> None:
    owe(sql, "https://a/hook", 3 * deliveries.CANDIDATES)
    owe(sql, "https://b/hook", 2)
    assert _receivers(take()) == ["a"] * 4
    assert _receivers(take(a=0)) == ["b", "b"]


def test_the_oldest_go_first(sql: Sql, take: Take) -> None:
    ids = owe(sql, "https://a/hook", 4)
    for number, id in enumerate(reversed(ids)):
        sql("UPDATE deliveries SET due_at = now() - $2 * interval '1 second' WHERE id = $1", id, 60 - number)
    assert {delivery.id for delivery in take(limit=2)} == set(ids[-2:])


def test_what_is_taken_is_nobody_elses_until_its_lease_is_over(sql: Sql, take: Take, record: Record) -> None:
    owe(sql, "HTTPS://A/hook")
    (first,) = take()
    assert (first.number, first.receiver) == (1, "https://a")
    assert take() == []
    sql("UPDATE deliveries SET due_at = now()")
    (second,) = take()
    assert second.number == 2
    # The first comes back from the dead: it is logged, and decides nothing.
    record(first, REFUSED, None)
    assert sql("SELECT status FROM deliveries")[0]["status"] == "pending"
    record(second, ACCEPTED, None)
    assert sql("SELECT status FROM deliveries")[0]["status"] == "delivered"
    assert [row["number"] for row in sql("SELECT number FROM delivery_attempts ORDER BY number")] == [1, 2]


def test_what_waited_for_days_for_a_dead_receiver_fails_unless_it_was_resent(sql: Sql, ask: Ask[int]) -> None:
    owe(sql, "https://a/hook", 3)
    first, second, third = (row["id"] for row in sql("SELECT id FROM deliveries ORDER BY id"))
    sql("UPDATE deliveries SET created_at = now() - interval '4 days' WHERE id <> $1", third)
    sql("UPDATE deliveries SET schedule_start = 2 WHERE id = $1", second)
    assert ask(lambda connection: deliveries.postpone(connection, {"https://a": 60.0}, 8)) == 3
    assert [row["id"] for row in sql("SELECT id FROM deliveries WHERE status = 'failed'")] == [first]


def test_no_more_is_postponed_than_was_asked_and_nothing_of_others(sql: Sql, take: Take, ask: Ask[int]) -> None:
    owe(sql, "https://a/hook", 10)
    owe(sql, "https://b/hook", 10)
    for expected in (8, 2, 0):
        assert ask(lambda connection: deliveries.postpone(connection, {"https://a": 60.0}, 8)) == expected
    (row,) = sql(
        "SELECT min(due_at - now()) AS soonest, max(due_at - now()) AS latest, max(attempts) AS attempts"
        " FROM deliveries WHERE receiver = 'https://a'"
    )
    assert timedelta(seconds=55) < row["soonest"] < row["latest"] < timedelta(seconds=73)
    assert row["attempts"] == 0
    assert len(take()) == 4


def _log(client: TestClient, job_id: str) -> dict[str, Any]:
    (delivery,) = client.get(f"/v2/jobs/{job_id}/deliveries").json()["deliveries"]
    return delivery


def _resend(client: TestClient, job_id: str) -> dict[str, Any]:
    response = client.post(f"/v2/jobs/{job_id}/deliveries/{_log(client, job_id)['id']}/resend")
    assert response.status_code == 202, response.text
    return response.json()


@pytest.fixture
def job_id(client: TestClient, work: Work, web: Web) -> str:
    """A job that is over, and whose webhook is due."""
    job_id = submit_with_webhook(client, upload(client, png(4, 3)), web.serve("/hook", b"busy", status=500))
    work()
    return job_id


def test_the_log_tells_of_each_attempt_and_of_the_next(
    client: TestClient, job_id: str, web: Web, settings: Settings, sql: Sql
) -> None:
    untried = _log(client, job_id)
    assert (untried["status"], untried["attempts"]) == ("pending", [])
    assert datetime.fromisoformat(untried["nextAttemptAt"])
    deliver(settings, lambda: sql("SELECT * FROM delivery_attempts") != [])
    refused = _log(client, job_id)
    assert (refused["id"], refused["event"], refused["url"]) == (untried["id"], "completed", web.url + "/hook")
    (attempt,) = refused["attempts"]
    wait = datetime.fromisoformat(refused["nextAttemptAt"]) - datetime.fromisoformat(attempt.pop("at"))
    assert timedelta(seconds=3) < wait < timedelta(seconds=7)
    assert 0 <= attempt.pop("durationMs") < 5000
    assert attempt == {"number": 1, "statusCode": 500, "excerpt": "busy", "error": None}
    assert web.seen[0].headers["webhook-id"] == refused["id"]


def test_a_job_without_a_webhook_has_an_empty_log(client: TestClient) -> None:
    job_id = client.post(
        "/v2/images/upscale",
        json={"model": "clarity-upscale", "clarityUpscaleParams": {"image": "https://example.com/a.png"}},
    ).json()["jobId"]
    assert client.get(f"/v2/jobs/{job_id}/deliveries").json() == {"deliveries": []}


def test_another_keys_job_shows_no_log_and_is_not_sent_again(
    client: TestClient, job_id: str, settings: Settings, sql: Sql
) -> None:
    delivery_id = _log(client, job_id)["id"]
    sql("UPDATE deliveries SET status = 'delivered'")
    client.headers["X-API-Key"] = asyncio.run(create_key(settings, "another"))
    log = client.get(f"/v2/jobs/{job_id}/deliveries")
    assert (log.status_code, log.json()["code"]) == (404, "not_found")
    assert client.post(f"/v2/jobs/{job_id}/deliveries/{delivery_id}/resend").status_code == 404
    assert sql("SELECT status FROM deliveries")[0]["status"] == "delivered"


def test_what_is_no_id_is_refused_and_what_is_unknown_not_found(client: TestClient, job_id: str) -> None:
    assert client.get("/v2/jobs/nonsense/deliveries").status_code == 400
    assert client.get(f"/v2/jobs/{uuid4()}/deliveries").status_code == 404
    assert client.post(f"/v2/jobs/{job_id}/deliveries/nonsense/resend").status_code == 400
    assert client.post(f"/v2/jobs/{job_id}/deliveries/{uuid4()}/resend").status_code == 404
    assert client.post(f"/v2/jobs/{uuid4()}/deliveries/{_log(client, job_id)['id']}/resend").status_code == 404


def test_what_was_delivered_is_sent_again_under_the_same_id_and_with_the_same_body(
    client: TestClient, job_id: str, web: Web, settings: Settings
) -> None:
    web.serve("/hook")
    deliver(settings, lambda: _log(client, job_id)["status"] == "delivered")
    assert _log(client, job_id)["nextAttemptAt"] is None
    resent = _resend(client, job_id)
    assert (resent["status"], len(resent["attempts"])) == ("pending", 1)
    deliver(settings, lambda: _log(client, job_id)["status"] == "delivered")
    assert [attempt["number"] for attempt in _log(client, job_id)["attempts"]] == [1, 2]
    assert len(web.seen) == 2
    assert web.seen[0].headers["webhook-id"] == web.seen[1].headers["webhook-id"] == resent["id"]
    assert web.seen[0].body == web.seen[1].body


def test_what_failed_for_good_gets_all_its_attempts_anew(
    client: TestClient, job_id: str, web: Web, settings: Settings
) -> None:
    twice = settings.model_copy(update={"webhook_retry_seconds": (0.1,)})
    deliver(twice, lambda: _log(client, job_id)["status"] == "failed")
    _resend(client, job_id)
    deliver(twice, lambda: _log(client, job_id)["status"] == "failed")
    assert [attempt["number"] for attempt in _log(client, job_id)["attempts"]] == [1, 2, 3, 4]


def test_what_waits_for_its_next_attempt_is_due_at_once(
    client: TestClient, job_id: str, web: Web, settings: Settings, sql: Sql
) -> None:
    slow = settings.model_copy(update={"webhook_retry_seconds": (3600,)})
    deliver(slow, lambda: sql("SELECT * FROM delivery_attempts") != [])
    web.serve("/hook")
    _resend(client, job_id)
    deliver(slow, lambda: _log(client, job_id)["status"] == "delivered", seconds=3)


@pytest.mark.parametrize("retry", [None, timedelta(hours=1)])
def test_what_is_under_way_is_not_doubled_and_another_follows_only_a_failure(
    client: TestClient, job_id: str, take: Take, record: Record, retry: timedelta | None
) -> None:
    (taken,) = take()
    _resend(client, job_id)
    assert take() == []
    record(taken, REFUSED, retry)
    (again,) = take()
    assert (again.number, again.schedule_start) == (2, 1)
    _resend(client, job_id)
    record(again, ACCEPTED, retry)
    assert (_log(client, job_id)["status"], take()) == ("delivered", [])


def test_a_resend_that_meets_the_end_of_an_attempt_is_not_lost(
    job_id: str, sql: Sql, take: Take, ask: Ask[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    (taken,) = take()
    owner = sql("SELECT api_key_id FROM jobs")[0]["api_key_id"]
    execute, asked = AsyncConnection.execute, 0

    async def end_the_attempt_after_the_first_look(self: AsyncConnection, *arguments: Any) -> Any:
        nonlocal asked
        answer, asked = await execute(self, *arguments), asked + 1
        if asked == 1:
            await deliveries.record_attempt(self, taken, REFUSED, timedelta(hours=1))
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(AsyncConnection, "execute", end_the_attempt_after_the_first_look)
        assert ask(lambda connection: deliveries.resend(connection, UUID(job_id), taken.id, owner))
    assert [delivery.number for delivery in take()] == [2]


def test_a_log_of_very_many_attempts_shows_the_newest(client: TestClient, job_id: str, sql: Sql) -> None:
    sql(
        "INSERT INTO delivery_attempts (delivery_id, number, duration_ms, status_code)"
        " SELECT id, number, 1, 500 FROM deliveries, generate_series(1, 500) AS number"
    )
    assert [attempt["number"] for attempt in _log(client, job_id)["attempts"]] == list(range(301, 501))
