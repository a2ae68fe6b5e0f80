"""How much one key may ask for, and how long a job may have to wait."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from starlette.testclient import TestClient

from api import intake
from api.app import create_app
from cli.keys import create_key, limit_key
from core.settings import Settings
from db.keys import Limits
from tests.documented import DocumentedClient
from tests.requests import body_of, submit

Sql = Callable[..., list[Any]]

IMAGE = "https://example.com/a.png"


@pytest.fixture(autouse=True)
def _nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "STATE_TTL_SECONDS", -1)


def _post(client: TestClient, **fields: object) -> Any:
    return client.post("/v2/images/upscale", json=body_of(IMAGE) | fields)


def _measured(sql: Sql, queued_cost: float, cost_per_second: float | None) -> None:
    """Let the last sweep have seen this."""
    sql(
        "UPDATE queue_state SET measured_at = now(), workers = 1, queued_cost = $1, cost_per_second = $2",
        *(queued_cost, cost_per_second),
    )


def test_a_key_with_too_many_jobs_waiting_is_told_to_come_back(client: TestClient, sql: Sql) -> None:
    sql("UPDATE api_keys SET max_queued = 2")
    assert [_post(client).status_code for _ in range(2)] == [202, 202]
    refused = _post(client)
    assert (refused.status_code, refused.json()["code"]) == (429, "too_many_queued")
    assert 0 < int(refused.headers["Retry-After"]) <= 60
    sql("UPDATE jobs SET status = 'PROCESSING' WHERE id = (SELECT id FROM jobs LIMIT 1)")
    assert _post(client).status_code == 202


def test_the_settings_limit_a_key_that_has_no_limit_of_its_own(settings: Settings, key: str) -> None:
    strict = settings.model_copy(update={"max_queued": 1})
    with DocumentedClient(create_app(strict)) as client:
        client.headers["X-API-Key"] = key
        assert [_post(client).status_code for _ in range(2)] == [202, 429]


def test_limits_are_set_when_a_key_is_made_and_changed_later(settings: Settings, sql: Sql) -> None:
    key = asyncio.run(create_key(settings, "small", Limits(weight=0.5, max_concurrent=2, max_queued=3)))
    assert [tuple(row) for row in sql("SELECT weight, max_concurrent, max_queued FROM api_keys")] == [(0.5, 2, 3)]
    assert asyncio.run(limit_key(settings, key[:12], Limits(weight=2))).name == "small"
    assert [tuple(row) for row in sql("SELECT weight, max_concurrent, max_queued FROM api_keys")] == [(2, None, None)]


def test_a_job_that_would_wait_too_long_is_refused(client: TestClient, settings: Settings, sql: Sql) -> None:
    submit(client, IMAGE)
    sql("UPDATE jobs SET cost = 1e6")
    sql("UPDATE api_keys SET next_tag = 1e6")
    _measured(sql, queued_cost=1e6, cost_per_second=1)
    refused = _post(client)
    assert (refused.status_code, refused.json()["code"]) == (503, "queue_full")
    assert int(refused.headers["Retry-After"]) == 60


def test_a_key_whose_turn_comes_soon_is_not_refused_for_another_key_s_flood(
    client: TestClient, settings: Settings, sql: Sql
) -> None:
    submit(client, IMAGE)
    sql("UPDATE jobs SET cost = 1e6, tag = 500")
    _measured(sql, queued_cost=1e6, cost_per_second=1)
    polite = asyncio.run(create_key(settings, "polite"))
    client.headers["X-API-Key"] = polite
    assert _post(client).status_code == 202


def test_nobody_is_refused_while_nobody_knows_how_long_it_takes(client: TestClient, sql: Sql) -> None:
    submit(client, IMAGE)
    sql("UPDATE jobs SET cost = 1e6")
    _measured(sql, queued_cost=1e6, cost_per_second=None)
    assert _post(client).status_code == 202


def test_a_waiting_job_says_where_it_stands_and_when_it_should_start(client: TestClient, sql: Sql) -> None:
    ahead, job_id = submit(client, IMAGE, scale_factor=4), submit(client, IMAGE)
    _measured(sql, queued_cost=5, cost_per_second=0.1)
    asked_at = datetime.now(UTC)
    job = client.get(f"/v2/jobs/{job_id}").json()
    assert job["queuePosition"] == 2
    assert 35 <= (datetime.fromisoformat(job["estimatedStartAt"]) - asked_at).total_seconds() <= 45  # cost 4, at 0.1/s
    assert client.get(f"/v2/jobs/{ahead}").json()["queuePosition"] == 1
    sql("UPDATE jobs SET status = 'PROCESSING'")
    job = client.get(f"/v2/jobs/{job_id}").json()
    assert (job["queuePosition"], job["estimatedStartAt"]) == (None, None)


def test_a_job_of_higher_priority_goes_before_the_others_of_its_key(client: TestClient, sql: Sql) -> None:
    assert _post(client, priority=3).status_code == 202
    assert [row["priority"] for row in sql("SELECT priority FROM jobs")] == [3]
    refused = _post(client, priority=11)
    assert (refused.status_code, list(refused.json()["details"])) == (400, ["priority"])
