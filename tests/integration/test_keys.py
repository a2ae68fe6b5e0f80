"""Keys in time: how soon a revocation bites, what is remembered of keys and of their use, and the commands for them."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import asyncpg
import pytest
from click.testing import CliRunner, Result
from sqlalchemy import make_url
from starlette.testclient import TestClient

from api.app import create_app
from api.keyring import KEY_TTL_SECONDS, KeyRing, open_key_ring
from cli.keys import create_key, is_working_key
from cli.main import cli
from core.errors import RequestError
from core.sealing import Sealer
from core.settings import Settings
from db import keys
from db.session import Database
from tests.apis import open_apis, until
from tests.chaos.proxy import open_proxy
from tests.documented import DocumentedClient
from tests.requests import body_of

Sql = Callable[..., list[Any]]
Run = Callable[..., Result]

IMAGE = "https://example.com/a.png"


@asynccontextmanager
async def _open_ring(settings: Settings) -> AsyncGenerator[KeyRing]:
    database = Database(settings)
    try:
        async with open_key_ring(database, Sealer(settings), store_digests=False) as key_ring:
            yield key_ring
    finally:
        await database.close()


async def _comes_about(holds: Callable[[], bool]) -> None:
    for _ in range(500):
        if holds():
            return
        await anyio.sleep(0.01)
    raise AssertionError("it did not come about in time")


async def _refusal(key_ring: KeyRing, key: str) -> str | None:
    try:
        await key_ring.find(key)
    except RequestError as error:
        return error.code
    return None


def test_a_revoked_key_works_for_five_seconds_at_most(
    client: TestClient, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert KEY_TTL_SECONDS < 5
    monkeypatch.setattr("api.keyring.KEY_TTL_SECONDS", 0.4)
    assert client.get("/v2/me").status_code == 200
    sql("UPDATE api_keys SET revoked_at = now()")
    assert client.get("/v2/me").status_code == 200  # it was found a moment ago
    assert until(lambda: client.get("/v2/me").status_code == 403, 2) < 1


def test_a_key_stops_working_when_it_expires(client: TestClient, sql: Sql, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.keyring.KEY_TTL_SECONDS", 0.1)
    sql("UPDATE api_keys SET expires_at = now() + interval '0.4 seconds'")
    assert client.get("/v2/me").status_code == 200
    assert until(lambda: client.get("/v2/me").status_code == 403, 2) < 1


@pytest.mark.anyio
async def test_what_a_slow_query_said_is_old_when_it_comes(
    settings: Settings, key: str, sql_async: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = keys.find

    async def find_slowly(*arguments: Any) -> Any:
        record = await find(*arguments)
        await anyio.sleep(0.2)
        return record

    monkeypatch.setattr("api.keyring.KEY_TTL_SECONDS", 0.2)
    monkeypatch.setattr(keys, "find", find_slowly)
    async with _open_ring(settings) as key_ring:
        await key_ring.find(key)
        await sql_async("UPDATE api_keys SET revoked_at = now()")
        assert await _refusal(key_ring, key) == "key_inactive"


def test_a_stream_and_an_answer_that_is_held_end_with_their_key(
    settings: Settings, key: str, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.keyring.KEY_TTL_SECONDS", 0.3)
    monkeypatch.setattr("api.apiframe.events.HEARTBEAT_SECONDS", 0.5)
    with open_apis(settings, key, 1) as (api,), ThreadPoolExecutor(1) as beside:
        job_id = api.submit()
        held = beside.submit(api.client.get, f"/v2/jobs/{job_id}", params={"wait": 20})
        with api.client.stream("GET", f"/v2/jobs/{job_id}/events") as response:
            lines = response.iter_lines()
            next(lines)
            until(lambda: api.parts.watch.waiting == 2, 2)
            sql("UPDATE api_keys SET revoked_at = now()")
            began, events = time.monotonic(), list[str]()
            for line in lines:
                events += [line] if line.startswith("event:") else []
                assert time.monotonic() - began < 5
            assert events == ["event: queued"]
        assert held.result(5).json()["code"] == "key_inactive"


def test_a_submit_that_is_held_says_no_more_than_the_id_once_its_key_is_revoked(
    settings: Settings, key: str, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.keyring.KEY_TTL_SECONDS", 0.2)
    with open_apis(settings, key, 1) as (api,), ThreadPoolExecutor(1) as beside:
        body, prefer = body_of(IMAGE), {"Prefer": "wait=20"}
        held = beside.submit(api.client.post, "/v2/images/upscale", json=body, headers=prefer)
        until(lambda: api.parts.watch.waiting == 1, 2)
        sql("UPDATE api_keys SET revoked_at = now()")
        response = held.result(5)
    assert (response.status_code, set(response.json())) == (202, {"jobId", "status"})


def test_a_key_that_was_made_a_moment_ago_works_although_it_was_unknown_before(client: TestClient, sql: Sql) -> None:
    key = keys.mint()
    assert client.get("/v2/me", headers={"X-API-Key": key}).status_code == 401
    sql(
        "INSERT INTO api_keys (id, name, prefix, hash) VALUES (gen_random_uuid(), 'new', $1, $2)",
        *(key[:12], keys.hash_key(key)),
    )
    assert client.get("/v2/me", headers={"X-API-Key": key}).json()["apiKey"]["name"] == "new"


@pytest.mark.anyio
async def test_keys_that_were_made_up_are_not_remembered(settings: Settings, key: str) -> None:
    async with _open_ring(settings) as key_ring:
        await key_ring.find(key)
        for _ in range(20):
            assert await _refusal(key_ring, keys.mint()) == "invalid_api_key"
        assert len(key_ring) == 1


@pytest.mark.anyio
async def test_of_very_many_keys_only_some_are_remembered(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.keyring.MAX_REMEMBERED", 3)
    async with _open_ring(settings) as key_ring:
        for number in range(8):
            assert (await key_ring.find(await create_key(settings, f"key {number}"))).name == f"key {number}"
            assert len(key_ring) <= 3


def test_a_key_that_was_found_works_on_for_a_moment_while_the_database_is_away(
    settings: Settings, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.keyring.KEY_TTL_SECONDS", 1.0)
    url = make_url(settings.database_url)
    assert url.port is not None
    with ExitStack() as line:
        proxy = line.enter_context(open_proxy(url.port))
        through = url.set(port=proxy.port).render_as_string(hide_password=False)
        with DocumentedClient(create_app(settings.model_copy(update={"database_url": through}))) as client:
            client.headers["X-API-Key"] = key
            assert client.get("/v2/me").status_code == 200
            line.close()
            assert client.get("/v2/me").status_code == 200
            until(lambda: client.get("/v2/me").status_code == 503, 3)


@pytest.mark.anyio
async def test_the_last_use_of_a_key_is_recorded_once_a_minute(
    settings: Settings, key: str, sql_async: Callable[..., Any]
) -> None:
    async with _open_ring(settings) as key_ring:
        await key_ring.find(key)
        await _comes_about(lambda: not key_ring.recording)
        (row,) = await sql_async("SELECT last_used_at > now() - interval '1 minute' AS noted FROM api_keys")
        assert row["noted"]
        await key_ring.find(key)
        assert not key_ring.recording


@pytest.mark.anyio
async def test_what_another_process_recorded_within_a_minute_is_enough(
    settings: Settings, key: str, sql_async: Callable[..., Any]
) -> None:
    database = Database(settings)
    async with database.connection() as connection:
        record = await keys.find(connection, key)
        assert record is not None
        for seconds, noted in ((55, False), (65, True)):
            await sql_async("UPDATE api_keys SET last_used_at = now() - make_interval(secs => $1)", float(seconds))
            await keys.note_use(connection, [record.id])
            (row,) = await sql_async("SELECT last_used_at > now() - interval '10 seconds' AS noted FROM api_keys")
            assert row["noted"] == noted
    await database.close()


@pytest.mark.anyio
async def test_nobody_waits_while_a_use_cannot_be_recorded(
    settings: Settings,
    key: str,
    database_url: str,
    sql_async: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("api.keyring.PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr("api.keyring.BATCH_SECONDS", 0.01)
    monkeypatch.setattr(keys, "USE_INTERVAL", timedelta(0))
    locker = await asyncpg.connect(database_url)
    async with _open_ring(settings) as key_ring:
        async with locker.transaction():
            await locker.execute("LOCK TABLE api_keys IN SHARE MODE")
            await key_ring.find(key)
            await key_ring.find(key)
            assert "cannot be recorded" not in caplog.text  # which comes when patience is over
            await _comes_about(lambda: "cannot be recorded: it takes too long" in caplog.text)
        await key_ring.find(key)
        await _comes_about(lambda: not key_ring.recording)
    (row,) = await sql_async("SELECT last_used_at FROM api_keys")
    assert row["last_used_at"] is not None
    await locker.close()


@pytest.mark.anyio
async def test_a_row_that_is_locked_is_passed_over_and_others_are_recorded(
    settings: Settings, database_url: str, sql_async: Callable[..., Any]
) -> None:
    for name in ("locked", "free"):
        await create_key(settings, name)
    ids = {row["name"]: row["id"] for row in await sql_async("SELECT id, name FROM api_keys")}
    database, locker = Database(settings), await asyncpg.connect(database_url)
    async with database.connection() as connection, locker.transaction():
        await locker.execute("UPDATE api_keys SET next_tag = 1 WHERE id = $1", ids["locked"])
        with anyio.fail_after(2):
            await keys.note_use(connection, list(ids.values()))
    noted = await sql_async("SELECT name FROM api_keys WHERE last_used_at IS NOT NULL")
    assert [row["name"] for row in noted] == ["free"]
    await locker.close()
    await database.close()


def test_a_database_that_only_reads_serves_what_only_reads(
    client: TestClient, settings: Settings, sql: Sql, caplog: pytest.LogCaptureFixture
) -> None:
    # Nothing has been asked of the database through the client: its connections are yet to be opened.
    name = make_url(settings.database_url).database
    sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    assert client.get("/v2/jobs").status_code == 200
    refused = client.post("/v2/images/upscale", json=body_of(IMAGE))
    assert (refused.status_code, refused.json()["code"]) == (503, "database_unavailable")
    until(lambda: "the last use of keys cannot be recorded" in caplog.text, 2)
    assert client.get("/v2/me").status_code == 200


def test_the_first_key_of_a_folder_is_replaced_when_it_no_longer_works(settings: Settings, key: str, sql: Sql) -> None:
    def works(key: str) -> bool:
        return asyncio.run(is_working_key(settings, key))

    assert works(key)
    assert not works(keys.mint())
    sql("UPDATE api_keys SET revoked_at = now()")
    assert not works(key)
    old = "upk_" + "a" * 40  # as keys were before they had checksums
    sql("UPDATE api_keys SET revoked_at = NULL, hash = $1", keys.hash_key(old))
    assert not works(old)


@pytest.fixture
def run(settings: Settings) -> Run:
    """Run `upscaled keys …` on the test's database."""
    environment = {
        "UPSCALED_DATABASE_URL": settings.database_url,
        "UPSCALED_REDIS_URL": settings.redis_url,
        "UPSCALED_SECRET_KEY": settings.secret_key.get_secret_value(),
    }
    return lambda *words: CliRunner().invoke(cli, ["keys", *words], env=environment)


def test_a_key_is_made_with_all_that_it_may(run: Run, sql: Sql, anonymous: TestClient) -> None:
    options = ["--scope", "jobs:read", "--scope", "admin", "--expires", "90d", "--weight", "2", "--max-concurrent", "3"]
    more = ["--max-queued", "4", "--requests-per-minute", "5", "--daily-pixels", "6000000000"]
    made = run("create", "from the shell", *options, *more)
    assert (made.exit_code, made.stderr) == (0, "")
    key = made.stdout.strip()
    assert anonymous.get("/v2/me", headers={"X-API-Key": key}).json()["apiKey"]["scopes"] == ["jobs:read", "admin"]
    (row,) = sql("SELECT *, expires_at - created_at AS lifetime FROM api_keys")
    assert (row["name"], row["prefix"], row["lifetime"]) == ("from the shell", key[:12], timedelta(days=90))
    limits = ("weight", "max_concurrent", "max_queued", "requests_per_minute", "daily_pixels")
    assert [row[name] for name in limits] == [2, 3, 4, 5, 6_000_000_000]
    assert run("limit", key[:12], "--daily-pixels", "7").exit_code == 0
    (row,) = sql("SELECT * FROM api_keys")
    assert [row[name] for name in limits] == [1, None, None, None, 7]


def test_a_key_is_made_for_jobs_and_for_ever_unless_something_else_is_said(run: Run, sql: Sql) -> None:
    run("create", "plain")
    (row,) = sql("SELECT * FROM api_keys")
    assert (row["scopes"], row["expires_at"]) == (["jobs:write", "jobs:read"], None)


@pytest.mark.parametrize(
    "wrong",
    [["--scope", "root"], ["--expires", "soon"], ["--max-queued", "0"], ["--weight", "0"], ["--weight", "nan"]],
)
def test_a_key_that_makes_no_sense_is_not_made(run: Run, sql: Sql, wrong: list[str]) -> None:
    refused = run("create", "nonsense", *wrong)
    assert refused.exit_code == 2
    assert wrong[0] in refused.stderr
    assert sql("SELECT * FROM api_keys") == []


@pytest.mark.parametrize("name", ["", "two\nlines", "\x1b[31mred", "\udcff", "n" * 101])
def test_a_name_that_would_spoil_the_list_is_refused(run: Run, sql: Sql, name: str) -> None:
    refused = run("create", name)
    assert (refused.exit_code, "NAME" in refused.stderr) == (2, True)
    assert sql("SELECT * FROM api_keys") == []


def test_the_list_shows_every_key_and_never_the_key_itself(run: Run, sql: Sql) -> None:
    first, second, third = (run("create", name).stdout.strip() for name in ("first", "second one", "third"))
    sql("UPDATE api_keys SET revoked_at = now() WHERE name = 'first'")
    sql("UPDATE api_keys SET expires_at = '2026-01-02T03:04:05Z', daily_pixels = 9 WHERE name = 'second one'")
    sql("UPDATE api_keys SET last_used_at = '2026-11-22T10:11:12Z' WHERE name = 'third'")
    today = (
        "INSERT INTO usage SELECT id, (now() AT TIME ZONE 'UTC')::date + $1::int, $2, 1, $3"
        " FROM api_keys WHERE name = 'third'"
    )
    for day, shard, pixels in ((0, 0, 5), (0, 1, 7), (-1, 0, 100)):
        sql(today, day, shard, pixels)
    listed = run("list")
    assert listed.exit_code == 0
    header, *rows = listed.stdout.splitlines()
    starts = [
        header.index(word) for word in ("PREFIX", "NAME", "SCOPES", "STATE", "EXPIRES", "LAST USED", "LIMITS", "PIXELS")
    ]
    cells = [[row[start:].split("  ")[0] for start in starts] for row in rows]
    scopes = "jobs:write,jobs:read"
    assert cells == [
        [first[:12], "first", scopes, "revoked", "-", "-", "-", "0"],
        [second[:12], "second one", scopes, "expired", "2026-01-02 03:04Z", "-", "9 px/day", "0"],
        [third[:12], "third", scopes, "active", "-", "2026-11-22 10:11Z", "-", "12"],
    ]
    described = json.loads(run("list", "--json").stdout)
    assert [key["state"] for key in described] == ["revoked", "expired", "active"]
    assert described[1]["expiresAt"] == "2026-01-02T03:04:05.000Z"
    assert (described[2]["pixelsToday"], described[2]["scopes"]) == (12, ["jobs:write", "jobs:read"])
    for key in (first, second, third):
        assert key not in listed.stdout + json.dumps(described)


@pytest.mark.parametrize("by", ["prefix", "id"])
def test_a_key_is_revoked_by_its_prefix_or_its_id_once_or_twice(run: Run, sql: Sql, by: str) -> None:
    run("create", "kept")
    run("create", "leaked")
    (row,) = sql("SELECT id, prefix FROM api_keys WHERE name = 'leaked'")
    first = run("revoke", str(row[by]))
    sql("UPDATE api_keys SET revoked_at = revoked_at - interval '1 second'")
    (revoked,) = sql("SELECT * FROM api_keys WHERE revoked_at IS NOT NULL")
    second = run("revoke", str(row[by]))
    assert first.exit_code == second.exit_code == 0
    assert f"leaked ({row['prefix']}, {row['id']})" in first.stdout
    assert "before" in second.stdout and "before" not in first.stdout
    assert sql("SELECT * FROM api_keys WHERE revoked_at IS NOT NULL") == [revoked]
    assert (revoked["name"], datetime.now(UTC) - revoked["revoked_at"] < timedelta(minutes=1)) == ("leaked", True)


@pytest.mark.parametrize("command", ["revoke", "limit"])
def test_a_prefix_of_no_key_or_of_several_changes_nothing(run: Run, sql: Sql, command: str) -> None:
    key = run("create", "one").stdout.strip()
    unknown = run(command, "upk_xxxxxxxx")
    assert (unknown.exit_code, "no API key" in unknown.stderr) == (2, True)
    assert run(command, key[:11]).exit_code == run(command, key).exit_code == run(command, "").exit_code == 2
    assert run(command, "\udcff").exit_code == 2
    run("create", "two")
    sql("UPDATE api_keys SET prefix = $1, weight = 5", key[:12])
    ambiguous = run(command, key[:12])
    assert ambiguous.exit_code == 2
    assert all(str(row["id"]) in ambiguous.stderr for row in sql("SELECT id FROM api_keys"))
    assert {(row["weight"], row["revoked_at"]) for row in sql("SELECT * FROM api_keys")} == {(5, None)}
