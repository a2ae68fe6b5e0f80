"""How many requests a key may make: what it is told, that all APIs count together, and that Redis may be away."""

import asyncio
import re
import socket
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from typing import Any
from uuid import uuid4

import anyio
import pytest
from starlette.testclient import TestClient

from api import rates
from api.app import create_app
from api.rates import Rates
from cli.stack import create_key
from core.errors import RateLimited
from core.settings import Settings
from db.keys import KeyRecord, Limits
from tests.broker import connect_redis
from tests.documented import DocumentedClient
from tests.requests import body_of

Sql = Callable[..., list[Any]]


def _limit(sql: Sql, requests: int) -> None:
    sql("UPDATE api_keys SET requests_per_minute = $1", requests)


def _record(limit: int) -> KeyRecord:
    values: dict[str, Any] = {**dict.fromkeys(KeyRecord.__dataclass_fields__), "id": uuid4()}
    values["requests_per_minute"] = limit
    return KeyRecord(**values)


def _left(headers: Mapping[str, str]) -> tuple[int, int]:
    """Return r and t of the policy for requests."""
    found = re.search(r'"requests";r=(\d+);t=(\d+)', headers["RateLimit"])
    assert found is not None, headers
    return int(found[1]), int(found[2])


@pytest.fixture
def other(settings: Settings) -> Generator[TestClient]:
    """Another API process: of the first it shares the database and Redis, and nothing else."""
    with DocumentedClient(create_app(settings)) as client:
        yield client


@pytest.fixture
async def counting(settings: Settings) -> AsyncGenerator[Rates]:
    counting = Rates(settings)
    yield counting
    await counting.aclose()


def test_each_answer_says_what_is_left_polls_and_errors_too(client: TestClient, sql: Sql) -> None:
    _limit(sql, 4)
    submitted = client.post("/v2/images/upscale", json=body_of("https://example.com/a.png"))
    answers = [
        submitted,
        client.get(f"/v2/jobs/{submitted.json()['jobId']}"),
        client.get(f"/v2/jobs/{uuid4()}"),
        client.post("/v2/images/upscale", json={}),
    ]
    assert [answer.status_code for answer in answers] == [202, 200, 404, 400]
    assert {answer.headers["RateLimit-Policy"] for answer in answers} == {'"requests";q=4;w=60'}
    assert [_left(answer.headers)[0] for answer in answers] == [3, 2, 1, 0]
    assert all(50 <= _left(answer.headers)[1] <= 60 for answer in answers)


def test_a_key_that_asks_too_often_is_told_when_to_come_back_and_then_may(
    settings: Settings, client: TestClient, sql: Sql
) -> None:
    _limit(sql, 1)
    assert client.get("/v2/me").status_code == 200
    refused = client.post("/v2/images/upscale", json=body_of("https://example.com/a.png"))
    assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
    left, reset = _left(refused.headers)
    assert (left, refused.headers["RateLimit-Policy"]) == (0, '"requests";q=1;w=60')
    assert 50 <= reset <= int(refused.headers["Retry-After"]) <= 60
    assert sql("SELECT count(*) FROM jobs") == [(0,)]
    with connect_redis(settings.redis_url) as broker:
        (counted,) = broker.keys("rates:*")
        broker.pexpire(counted, 1500)
        refused = client.get("/v2/me")
        assert int(refused.headers["Retry-After"]) in (2, 3)  # never too early
        broker.pexpire(counted, 20)
    time.sleep(0.03)
    assert client.get("/v2/me").status_code == 200


def test_apis_count_together_and_each_key_for_itself(
    settings: Settings, client: TestClient, other: TestClient, key: str, sql: Sql
) -> None:
    neighbour = asyncio.run(create_key(settings, "neighbour"))
    _limit(sql, 2)
    other.headers["X-API-Key"] = key
    assert [api.get("/v2/me").status_code for api in (client, other, client, other)] == [200, 200, 429, 429]
    other.headers["X-API-Key"] = neighbour
    assert _left(other.get("/v2/me").headers)[0] == 1
    with connect_redis(settings.redis_url) as broker:  # what is stored names no key that anyone could use
        ids = [str(row["id"]) for row in sql("SELECT id FROM api_keys")]
        assert sorted(broker.keys("rates:*")) == sorted(f"rates:requests/{id}/2/1/minute".encode() for id in ids)


def test_the_settings_limit_a_key_that_has_no_rate_of_its_own(settings: Settings, key: str) -> None:
    with DocumentedClient(create_app(settings.model_copy(update={"requests_per_minute": 1}))) as client:
        client.headers["X-API-Key"] = key
        assert [client.get("/v2/me").status_code for _ in range(2)] == [200, 429]
        client.headers["X-API-Key"] = asyncio.run(create_key(settings, "another", Limits(requests_per_minute=5)))
        assert _left(client.get("/v2/me").headers)[0] == 4


def test_without_a_limit_nothing_is_counted_or_said(settings: Settings, client: TestClient) -> None:
    answer = client.get("/v2/me")
    assert answer.status_code == 200
    assert not {name for name in answer.headers if name.lower().startswith("ratelimit")}
    with connect_redis(settings.redis_url) as broker:
        assert broker.keys("rates:*") == []


@pytest.mark.anyio
async def test_of_many_requests_at_once_exactly_as_many_pass_as_may(settings: Settings, counting: Rates) -> None:
    elsewhere, record, passed = Rates(settings), _record(70), list[int]()

    async def ask(where: Rates) -> None:
        try:
            passed.append(_left(await where.take(record))[0])
        except RateLimited:
            return

    async with anyio.create_task_group() as asking:
        for number in range(300):
            asking.start_soon(ask, (counting, elsewhere)[number % 2])
    await elsewhere.aclose()
    assert sorted(passed) == list(range(70))


@pytest.mark.anyio
@pytest.mark.parametrize("hangs", [False, True])
async def test_without_redis_every_request_passes_and_none_but_the_first_waits(
    settings: Settings, caplog: pytest.LogCaptureFixture, hangs: bool
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # who takes connections, and says nothing
        port = deaf.getsockname()[1]
        if not hangs:
            deaf.close()
        away = Rates(settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{port}/0"}))
        began = time.monotonic()
        assert await away.take(_record(1)) == {}
        assert time.monotonic() - began < rates.TIMEOUT_SECONDS + (0.2 if hangs else -0.1)
        began = time.monotonic()
        assert [await away.take(_record(1)) for _ in range(200)] == [{}] * 200
        assert time.monotonic() - began < 0.1
        await away.aclose()
    assert [entry.levelname for entry in caplog.records if entry.name == "api.rates"] == ["WARNING"]


@pytest.mark.anyio
async def test_requests_are_counted_again_once_redis_is_back_and_one_of_them_finds_that_out(
    settings: Settings, counting: Rates, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "api.rates")
    monkeypatch.setattr(rates, "TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr(rates, "PAUSE_SECONDS", 0.2)
    record = _record(50)
    assert _left(await counting.take(record))[0] == 49
    with connect_redis(settings.redis_url) as broker:
        broker.client_pause(700)
    waited: list[bool] = []

    async def ask() -> None:
        began = time.monotonic()
        assert await counting.take(record) == {}
        waited.append(time.monotonic() - began > 0.09)

    await ask()
    await anyio.sleep(0.25)
    async with anyio.create_task_group() as asking:
        for _ in range(100):
            asking.start_soon(ask)
    assert sum(waited) == 2  # the first, and one that tried again
    await anyio.sleep(0.7)
    lefts = [_left(await counting.take(record))[0] for _ in range(3)]
    assert 49 > lefts[0] == lefts[1] + 1 == lefts[2] + 2
    assert [entry.levelname for entry in caplog.records if entry.name == "api.rates"] == ["WARNING", "INFO"]


@pytest.mark.anyio
async def test_a_redis_that_refuses_to_count_is_one_that_is_away(settings: Settings, counting: Rates) -> None:
    record = _record(1)
    with connect_redis(settings.redis_url) as broker:
        broker.set(f"rates:requests/{record.id}/1/1/minute", "no number")
    assert await counting.take(record) == {}


def test_while_redis_is_away_the_api_answers_without_a_word_of_rates(settings: Settings, key: str, sql: Sql) -> None:
    _limit(sql, 1)
    with DocumentedClient(create_app(settings.model_copy(update={"redis_url": "redis://127.0.0.1:9/0"}))) as client:
        client.headers["X-API-Key"] = key
        answers = [client.get("/v2/me") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert not any("RateLimit" in answer.headers for answer in answers)
