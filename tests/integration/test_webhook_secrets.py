"""The secrets that webhooks are signed with: made when asked for, replaced with an overlap."""

import asyncio
import base64
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID

import anyio
import pytest
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.testclient import TestClient

from api.app import create_app
from cli.keys import create_key
from core.sealing import Sealer
from core.settings import Settings
from db import webhook_secrets
from db.session import Database
from tests.documented import DocumentedClient

Sql = Callable[..., list[Any]]
SqlAsync = Callable[..., Awaitable[list[Any]]]
HOUR = timedelta(hours=1)
T = TypeVar("T")


@asynccontextmanager
async def _connected(settings: Settings) -> AsyncGenerator[AsyncConnection]:
    database = Database(settings)
    async with database.connection() as connection:
        yield connection
    await database.close()


async def _ten_at_once(settings: Settings, ask: Callable[[AsyncConnection], Awaitable[T]]) -> list[T]:
    """Ask on ten connections at once; return all answers."""
    database = Database(settings)
    answers: list[T] = []

    async def ask_once() -> None:
        async with database.connection() as connection:
            answers.append(await ask(connection))

    async with anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(ask_once)
    await database.close()
    return answers


@pytest.fixture
def owner(settings: Settings, key: str, sql: Sql) -> UUID:
    """The id of an API key."""
    return sql("SELECT id FROM api_keys")[0]["id"]


@pytest.fixture
def sealer(settings: Settings) -> Sealer:
    return Sealer(settings)


def test_the_secret_is_made_when_it_is_first_asked_for_and_stays(client: TestClient) -> None:
    first = client.get("/v2/webhooks/secret")
    assert first.headers["Cache-Control"] == "no-store"
    assert client.get("/v2/webhooks/secret").json() == first.json()
    prefix, _, encoded = first.json()["secret"].partition("_")
    assert prefix == "whsec"
    assert len(base64.b64decode(encoded, validate=True)) == 32


def test_the_database_holds_secrets_sealed_only(client: TestClient, sealer: Sealer, sql: Sql) -> None:
    shown = [client.get("/v2/webhooks/secret").json()["secret"]]
    shown += [client.post("/v2/webhooks/secret/rotate").json()["secret"]]
    stored = [row["secret"] for row in sql("SELECT secret FROM webhook_secrets ORDER BY id")]
    assert [base64.b64decode(secret.removeprefix("whsec_")) for secret in shown] == [
        sealer.open(secret) for secret in stored
    ]
    assert not [secret for secret in stored if sealer.open(secret) in secret]


def test_a_rotation_shows_the_new_secret_and_until_when_the_former_one_signs_too(
    settings: Settings, key: str, sql: Sql
) -> None:
    with DocumentedClient(create_app(settings.model_copy(update={"webhook_secret_overlap_seconds": 3600}))) as client:
        client.headers["X-API-Key"] = key
        former = client.get("/v2/webhooks/secret").json()["secret"]
        rotated = client.post("/v2/webhooks/secret/rotate").json()
        assert rotated["secret"] != former
        assert client.get("/v2/webhooks/secret").json() == {name: rotated[name] for name in ("secret", "createdAt")}
    left = datetime.fromisoformat(rotated["previousExpiresAt"]) - datetime.now(UTC)
    assert timedelta(minutes=59) < left <= HOUR
    assert [row["current"] for row in sql("SELECT expires_at IS NULL AS current FROM webhook_secrets ORDER BY id")] == [
        False,
        True,
    ]


def test_a_rotation_without_a_former_secret_says_so(client: TestClient) -> None:
    assert client.post("/v2/webhooks/secret/rotate").json()["previousExpiresAt"] is None


def test_every_key_has_a_secret_of_its_own(client: TestClient, settings: Settings) -> None:
    mine = client.get("/v2/webhooks/secret").json()["secret"]
    other = asyncio.run(create_key(settings, "another"))
    assert client.get("/v2/webhooks/secret", headers={"X-API-Key": other}).json()["secret"] != mine
    client.post("/v2/webhooks/secret/rotate", headers={"X-API-Key": other})
    assert client.get("/v2/webhooks/secret").json()["secret"] == mine


def test_the_secret_is_shown_to_nobody_without_a_key(anonymous: TestClient) -> None:
    assert anonymous.get("/v2/webhooks/secret").status_code == 401
    assert anonymous.post("/v2/webhooks/secret/rotate").status_code == 401


@pytest.mark.anyio
async def test_the_secrets_that_sign_are_the_current_one_and_those_that_overlap(
    settings: Settings, sealer: Sealer, owner: UUID, sql_async: SqlAsync
) -> None:
    async with _connected(settings) as connection:
        (first,) = await webhook_secrets.valid(connection, sealer, owner)
        second = (await webhook_secrets.rotate(connection, sealer, owner, HOUR)).secret
        assert await webhook_secrets.valid(connection, sealer, owner) == [second, first]
        third = (await webhook_secrets.rotate(connection, sealer, owner, timedelta(0))).secret
        assert await webhook_secrets.valid(connection, sealer, owner) == [third, first]
        await sql_async("UPDATE webhook_secrets SET expires_at = now() WHERE expires_at IS NOT NULL")
        assert await webhook_secrets.valid(connection, sealer, owner) == [third]


@pytest.mark.anyio
async def test_rotations_leave_no_expired_secrets_behind_and_few_that_sign(
    settings: Settings, sealer: Sealer, owner: UUID, sql_async: SqlAsync
) -> None:
    async with _connected(settings) as connection:
        rotated = [(await webhook_secrets.rotate(connection, sealer, owner, HOUR)).secret for _ in range(10)]
        assert await webhook_secrets.valid(connection, sealer, owner) == rotated[: -webhook_secrets.MAX_VALID - 1 : -1]
        await sql_async("UPDATE webhook_secrets SET expires_at = now() WHERE expires_at IS NOT NULL")
        await webhook_secrets.rotate(connection, sealer, owner, HOUR)
    assert len(await sql_async("SELECT * FROM webhook_secrets")) == 2


@pytest.mark.anyio
async def test_all_who_ask_for_the_first_secret_at_once_get_the_same(
    settings: Settings, sealer: Sealer, owner: UUID
) -> None:
    answers = await _ten_at_once(settings, lambda connection: webhook_secrets.current(connection, sealer, owner))
    assert len({answer.secret for answer in answers}) == 1


@pytest.mark.anyio
@pytest.mark.parametrize("had_one", [True, False])
async def test_rotations_at_once_all_succeed_and_leave_one_current_secret(
    settings: Settings, sealer: Sealer, owner: UUID, sql_async: SqlAsync, had_one: bool
) -> None:
    async with _connected(settings) as connection:
        former = (await webhook_secrets.current(connection, sealer, owner)).secret if had_one else None
        for _ in range(5):
            rotations = await _ten_at_once(settings, lambda held: webhook_secrets.rotate(held, sealer, owner, HOUR))
            current = (await webhook_secrets.current(connection, sealer, owner)).secret
            assert current != former
            assert current in {rotation.secret for rotation in rotations}
            stored = await sql_async("SELECT secret FROM webhook_secrets")
            assert {rotation.secret for rotation in rotations} <= {sealer.open(row["secret"]) for row in stored}
            former = current


@pytest.mark.anyio
async def test_a_rotation_that_waited_for_another_returns_the_others_secret(
    settings: Settings, sealer: Sealer, owner: UUID, sql_async: SqlAsync
) -> None:
    async with _connected(settings) as slow, _connected(settings) as quick:
        former = (await webhook_secrets.current(slow, sealer, owner)).secret
        # The first rotation is held back between its statement and its commit, and the second waits for its rows.
        begun = await slow.get_raw_connection()
        driver: Any = begun.driver_connection
        await driver.execute("BEGIN")
        first = await webhook_secrets.rotate(slow, sealer, owner, HOUR)
        second = asyncio.create_task(webhook_secrets.rotate(quick, sealer, owner, HOUR))
        await anyio.sleep(0.3)
        assert not second.done()
        await driver.execute("COMMIT")
        assert (await second).secret == first.secret
        assert (await second).previous_expires_at is not None
        assert await webhook_secrets.valid(quick, sealer, owner) == [first.secret, former]
