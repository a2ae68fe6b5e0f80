"""What callers see while a server is away."""

import time
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest
from sqlalchemy.exc import DBAPIError
from starlette.testclient import TestClient

from api.app import create_app
from core.settings import Settings
from db import keys
from tests.documented import DocumentedClient
from tests.requests import body_of, png, submit, upload

Sql = Callable[..., list[Any]]
NOWHERE = "127.0.0.1:9"


def test_without_its_database_the_api_is_alive_and_not_ready(settings: Settings) -> None:
    cut_off = settings.model_copy(update={"database_url": f"postgresql+asyncpg://nobody@{NOWHERE}/nothing"})
    with DocumentedClient(create_app(cut_off)) as client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").status_code == 503
        response = client.post(
            "/v2/images/upscale", json=body_of("https://example.com/a.png"), headers={"X-API-Key": keys.mint()}
        )
    assert (response.status_code, response.json()["code"]) == (503, "database_unavailable")
    assert int(response.headers["Retry-After"]) > 0
    assert NOWHERE not in response.text


def test_without_redis_jobs_are_accepted_and_read_at_once(settings: Settings, key: str, sql: Sql) -> None:
    cut_off = settings.model_copy(update={"redis_url": f"redis://{NOWHERE}/0"})
    with DocumentedClient(create_app(cut_off)) as client:
        client.headers["X-API-Key"] = key
        began = time.monotonic()
        job_id = submit(client, "https://example.com/a.png")
        sql("UPDATE jobs SET status = 'PROCESSING', attempt = 1")
        assert client.get(f"/v2/jobs/{job_id}").json()["progress"] == 0
        assert time.monotonic() - began < 2


def test_connections_that_were_cut_are_replaced(client: TestClient, sql: Sql) -> None:
    job_id = submit(client, upload(client, png(2, 2)))
    sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'upscaled'")
    answers = [client.get(f"/v2/jobs/{job_id}").status_code for _ in range(5)]
    assert set(answers) <= {200, 503}
    assert answers[-1] == 200


@pytest.mark.parametrize("state", ["57P03", "53300", "08006"])
def test_a_database_that_is_starting_or_full_is_one_that_is_away(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    class Refused(Exception):
        sqlstate = state

    def refuse(*_: object, **__: object) -> None:
        raise DBAPIError("SELECT 1", None, Refused())

    monkeypatch.setattr("db.records.browse", refuse)
    response = client.get("/v2/jobs")
    assert (response.status_code, response.json()["code"]) == (503, "database_unavailable")


@pytest.mark.parametrize(
    "lost", [asyncpg.InterfaceError("connection is closed"), asyncpg.AdminShutdownError("terminating connection")]
)
def test_a_connection_that_is_lost_while_it_is_set_up_is_a_database_that_is_away(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, lost: Exception
) -> None:
    async def lose(*_: object, **__: object) -> None:
        raise lost

    monkeypatch.setattr(asyncpg.Connection, "set_type_codec", lose)
    response = client.get("/v2/jobs")
    assert (response.status_code, response.json()["code"]) == (503, "database_unavailable")


@pytest.mark.parametrize("path", ["/v2/me", "/v2/jobs"])
def test_a_bug_is_answered_without_its_details(client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    def explode(*_: object) -> None:
        raise ZeroDivisionError("an internal detail")

    monkeypatch.setattr("api.keyring.KeyRing.find", explode)
    response = client.get(path)
    assert (response.status_code, response.json()["code"]) == (500, "internal")
    assert "an internal detail" not in response.text
