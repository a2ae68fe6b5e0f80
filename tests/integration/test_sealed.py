"""What the database holds sealed: by a migration, and anew when there is another key."""

import hashlib
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import asyncpg
import pytest
from alembic import command
from click.testing import CliRunner
from starlette.testclient import TestClient

from api.app import create_app
from cli.main import cli
from cli.migrations import config, upgrade
from core.errors import DeploymentError
from core.sealing import Sealer, new_key
from core.settings import PREFIX, Settings, load_settings
from db import sealed
from db.deliveries import Outcome
from db.session import Database
from tests.documented import DocumentedClient
from tests.requests import png, upload
from tests.web import Web
from tests.webhooks import deliver, owe, submit_with_webhook
from worker.posts import NOT_SIGNED, shows_life

Sql = Callable[..., list[Any]]
SqlAsync = Callable[..., Awaitable[list[Any]]]
BARE = secrets.token_bytes(32)
DIGEST = hashlib.sha256(b"a key").digest()


def _with_keys(settings: Settings, *encryption_keys: str) -> Settings:
    """Return the settings with other keys, checked as those of a process are."""
    given = settings.model_dump(exclude={"encryption_keys", "secret_key", "s3_secret_access_key"})
    secret_key = settings.secret_key.get_secret_value()
    return load_settings(**given, secret_key=secret_key, encryption_keys=",".join(encryption_keys))


def _store(sql: Sql, secret: bytes, digest: bytes | None = None) -> None:
    sql("UPDATE api_keys SET apiframe_digest = $1", digest)
    sql("INSERT INTO webhook_secrets (api_key_id, secret) SELECT id, $1 FROM api_keys", secret)


def _stored(sql: Sql) -> list[bytes]:
    secrets_and_digests = (
        "SELECT secret FROM webhook_secrets UNION ALL SELECT apiframe_digest FROM api_keys"
        " WHERE apiframe_digest IS NOT NULL"
    )
    return [row["secret"] for row in sql(secrets_and_digests)]


def _environment(settings: Settings, *encryption_keys: str) -> dict[str, str]:
    return {
        f"{PREFIX}DATABASE_URL": settings.database_url,
        f"{PREFIX}REDIS_URL": settings.redis_url,
        f"{PREFIX}SECRET_KEY": settings.secret_key.get_secret_value(),
        f"{PREFIX}ENCRYPTION_KEYS": ",".join(encryption_keys),
    }


def _rotate(settings: Settings, *encryption_keys: str) -> tuple[int, str]:
    ran = CliRunner(env=_environment(settings, *encryption_keys)).invoke(cli, ["secrets", "rotate"])
    return ran.exit_code, f"{ran.output}{ran.exception or ''}"


def test_a_migration_seals_what_there_is_and_leads_back(settings: Settings, key: str, sql: Sql) -> None:
    _store(sql, BARE, DIGEST)
    sealer = Sealer(_with_keys(settings, new_key()))
    # Both are bare, as the release before left them, so the way down changes nothing of them.
    command.downgrade(config(settings.database_url, sealer), "20261121")
    assert _stored(sql) == [BARE, DIGEST]
    upgrade(settings.database_url, sealer)
    stored = _stored(sql)
    assert [sealer.is_current(value) for value in stored] == [True, True]
    assert [sealer.open(value) for value in stored] == [BARE, DIGEST]
    command.downgrade(config(settings.database_url, sealer), "20261121")
    assert _stored(sql) == [BARE, DIGEST]


def test_everything_is_sealed_anew_under_the_first_key(
    settings: Settings, key: str, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealed, "STEP_ROWS", 2)
    former, first = new_key(), new_key()
    _store(sql, BARE, Sealer(settings).seal(DIGEST))
    for _ in range(4):
        owe(sql, "https://example.com/hook")  # makes a key
    sql(
        "INSERT INTO webhook_secrets (api_key_id, secret) SELECT id, $1 FROM api_keys WHERE prefix = ''",
        Sealer(_with_keys(settings, former)).seal(BARE),
    )
    status, said = _rotate(settings, first, former)
    assert (status, said.strip()) == (0, "Sealed 6 anew; 0 were under the first key already.")
    sealer = Sealer(_with_keys(settings, first))
    assert all(sealer.is_current(value) for value in _stored(sql))
    assert sorted(sealer.open(value) for value in _stored(sql)) == sorted([BARE] * 5 + [DIGEST])
    assert _rotate(settings, first)[1].strip() == "Sealed 0 anew; 6 were under the first key already."


def test_what_no_key_opens_is_left_and_reported(settings: Settings, key: str, sql: Sql) -> None:
    lost = Sealer(_with_keys(settings, new_key())).seal(BARE)
    _store(sql, lost, DIGEST)
    status, said = _rotate(settings, first := new_key())
    assert status != 0
    assert "Sealed 1 anew" in said
    assert "1 could not be opened: name the key that sealed them in UPSCALED_ENCRYPTION_KEYS" in said
    assert _stored(sql)[0] == lost
    assert Sealer(_with_keys(settings, first)).open(_stored(sql)[1]) == DIGEST


def test_a_database_that_is_away_is_a_wrong_deployment_and_no_bug(settings: Settings) -> None:
    away = settings.model_copy(update={"database_url": "postgresql://nobody:hidden@127.0.0.1:9/nothing"})
    ran = CliRunner(env=_environment(away)).invoke(cli, ["secrets", "rotate"])
    assert isinstance(ran.exception, DeploymentError)


@pytest.mark.anyio
async def test_what_changes_while_it_is_sealed_anew_stays_as_it_was_changed(
    settings: Settings, database_url: str, sql_async: SqlAsync
) -> None:
    await sql_async("INSERT INTO api_keys (id, name, prefix, hash) VALUES (gen_random_uuid(), '', '', '')")
    await sql_async("INSERT INTO webhook_secrets (api_key_id, secret) SELECT id, $1 FROM api_keys", BARE)
    sealer, database = Sealer(settings), Database(settings)
    newer = sealer.seal(b"newer")
    other = await asyncpg.connect(database_url)
    held = other.transaction()
    await held.start()
    await other.execute("UPDATE webhook_secrets SET secret = $1", newer)

    async def commit_later() -> None:
        await anyio.sleep(0.2)
        await held.commit()

    async with anyio.create_task_group() as tasks, database.connection() as connection:
        tasks.start_soon(commit_later)
        assert (await sealed.reseal(connection, sealer)).sealed == 0
    await other.close()
    await database.close()
    assert [row["secret"] for row in await sql_async("SELECT secret FROM webhook_secrets")] == [newer]


def test_a_new_key_is_one_that_the_settings_take(settings: Settings) -> None:
    printed = CliRunner().invoke(cli, ["secrets", "new-key"]).output.strip()
    assert _with_keys(settings, printed).encryption_keys[0].get_secret_value() == printed


def test_a_webhook_whose_secret_cannot_be_opened_waits_until_it_can(
    client: TestClient, work: Callable[[], int], web: Web, settings: Settings, sql: Sql
) -> None:
    key, other = new_key(), new_key()
    submit_with_webhook(client, upload(client, png(4, 3)), web.serve("/hook"))
    work()
    sql(
        "INSERT INTO webhook_secrets (api_key_id, secret) SELECT id, $1 FROM api_keys",
        Sealer(_with_keys(settings, key)).seal(BARE),
    )
    attempts = "SELECT error FROM delivery_attempts"
    deliver(_with_keys(settings, other), lambda: len(sql(attempts)) > 0)
    assert web.seen == []
    assert {row["error"] for row in sql(attempts)} == {NOT_SIGNED}
    assert shows_life(Outcome(duration_ms=0, error=NOT_SIGNED)) is None  # the receiver is not to blame
    assert sql("UPDATE deliveries SET due_at = now() WHERE status = 'pending' RETURNING id")
    deliver(_with_keys(settings, other, key), lambda: len(web.seen) == 1)


def test_a_webhook_is_signed_with_those_secrets_that_can_be_opened(web: Web, settings: Settings, sql: Sql) -> None:
    owe(sql, web.serve("/hook"))
    insert = "INSERT INTO webhook_secrets (api_key_id, secret, expires_at) SELECT id, $1, $2 FROM api_keys"
    sql(insert.replace("$2", "now() + interval '1 day'"), Sealer(settings).seal(BARE))
    sql(insert.replace("$2", "NULL"), Sealer(_with_keys(settings, new_key())).seal(BARE))
    deliver(settings, lambda: len(web.seen) == 1)
    assert len(web.seen[0].headers["webhook-signature"].split()) == 1


def test_a_secret_that_cannot_be_opened_is_not_shown_and_can_be_replaced(
    settings: Settings, key: str, sql: Sql
) -> None:
    _store(sql, Sealer(_with_keys(settings, new_key())).seal(BARE))
    with DocumentedClient(create_app(settings)) as client:
        client.headers["X-API-Key"] = key
        refused = client.get("/v2/webhooks/secret")
        assert (refused.status_code, refused.json()["code"]) == (500, "deployment")
        assert PREFIX not in refused.text
        rotated = client.post("/v2/webhooks/secret/rotate").json()
        assert client.get("/v2/webhooks/secret").json()["secret"] == rotated["secret"]
