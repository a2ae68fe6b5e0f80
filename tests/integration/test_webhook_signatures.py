"""The signatures on webhooks, as receivers verify them."""

import hashlib
import hmac
import time
from collections.abc import Callable
from typing import Any

import pytest
from standardwebhooks import Webhook, WebhookVerificationError
from starlette.testclient import TestClient

from api.app import create_app
from core.sealing import Sealer
from core.settings import Settings
from tests.documented import DocumentedClient
from tests.requests import png, upload
from tests.web import Web
from tests.webhooks import deliver, owe, submit_with_webhook

Sql = Callable[..., list[Any]]
Work = Callable[[], int]


def _all_delivered(sql: Sql) -> bool:
    return sql("SELECT 1 FROM deliveries WHERE status <> 'delivered'") == []


def _current(client: TestClient) -> Webhook:
    return Webhook(client.get("/v2/webhooks/secret").json()["secret"])


def test_a_receiver_can_verify_what_it_gets(
    client: TestClient, work: Work, web: Web, settings: Settings, sql: Sql
) -> None:
    job_id = submit_with_webhook(client, upload(client, png(4, 3)), web.serve("/hook"))
    work()
    deliver(settings, lambda: _all_delivered(sql))
    (seen,) = web.seen
    assert _current(client).verify(seen.body, dict(seen.headers))["jobId"] == job_id
    with pytest.raises(WebhookVerificationError):
        _current(client).verify(seen.body + b" ", dict(seen.headers))
    assert not [name for name in seen.headers if name.lower().startswith("x-webhook")]


def test_every_attempt_has_its_own_time_and_one_id(
    client: TestClient, work: Work, web: Web, settings: Settings, sql: Sql
) -> None:
    submit_with_webhook(client, upload(client, png(4, 3)), web.serve("/hook", status=500))
    work()
    deliver(settings.model_copy(update={"webhook_retry_seconds": (1.5, 60)}), lambda: len(web.seen) == 2)
    first, second = web.seen
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert int(second.headers["webhook-timestamp"]) > int(first.headers["webhook-timestamp"])
    assert abs(int(second.headers["webhook-timestamp"]) - time.time()) < 60
    for seen in (first, second):
        _current(client).verify(seen.body, dict(seen.headers))


def test_while_a_rotation_overlaps_both_secrets_verify(
    client: TestClient, work: Work, web: Web, settings: Settings, sql: Sql
) -> None:
    former = _current(client)
    client.post("/v2/webhooks/secret/rotate")
    submit_with_webhook(client, upload(client, png(4, 3)), web.serve("/hook"))
    work()
    deliver(settings, lambda: _all_delivered(sql))
    for webhook in (former, _current(client)):
        webhook.verify(web.seen[0].body, dict(web.seen[0].headers))
    sql("UPDATE webhook_secrets SET expires_at = now() WHERE expires_at IS NOT NULL")
    sql("UPDATE deliveries SET status = 'pending', due_at = now()")
    deliver(settings, lambda: _all_delivered(sql))
    _current(client).verify(web.seen[1].body, dict(web.seen[1].headers))
    with pytest.raises(WebhookVerificationError):
        former.verify(web.seen[1].body, dict(web.seen[1].headers))


@pytest.mark.parametrize("form", ["digest", "hex"])
def test_apiframes_headers_are_there_where_the_settings_ask_for_them(
    settings: Settings, key: str, work: Work, web: Web, sql: Sql, form: str
) -> None:
    as_apiframe = settings.model_copy(update={"webhook_apiframe_signature": form})
    with DocumentedClient(create_app(as_apiframe)) as client:
        client.headers["X-API-Key"] = key
        submit_with_webhook(client, upload(client, png(4, 3)), web.serve("/hook"))
        work()
        deliver(as_apiframe, lambda: _all_delivered(sql))
        (seen,) = web.seen
        _current(client).verify(seen.body, dict(seen.headers))
    digest = hashlib.sha256(key.encode())
    secret = digest.digest() if form == "digest" else digest.hexdigest().encode()
    expected = "sha256=" + hmac.new(secret, seen.body, hashlib.sha256).hexdigest()
    assert (seen.headers["X-Webhook-Event"], seen.headers["X-Webhook-Signature"]) == ("completed", expected)


def test_a_key_that_was_not_seen_since_signs_as_the_standard_says_only(web: Web, settings: Settings, sql: Sql) -> None:
    owe(sql, web.serve("/hook"))
    deliver(settings.model_copy(update={"webhook_apiframe_signature": "digest"}), lambda: _all_delivered(sql))
    assert "webhook-signature" in web.seen[0].headers
    assert "X-Webhook-Signature" not in web.seen[0].headers


def test_what_apiframe_signs_with_is_stored_only_where_the_settings_ask_for_it(
    client: TestClient, settings: Settings, key: str, sql: Sql
) -> None:
    digest = "SELECT apiframe_digest FROM api_keys"
    assert client.get("/v2/me").status_code == 200
    assert sql(digest)[0]["apiframe_digest"] is None
    with DocumentedClient(create_app(settings.model_copy(update={"webhook_apiframe_signature": "hex"}))) as other:
        for _ in range(2):
            assert other.get("/v2/me", headers={"X-API-Key": key}).status_code == 200
    sealed = sql(digest)[0]["apiframe_digest"]
    assert Sealer(settings).open(sealed) == hashlib.sha256(key.encode()).digest()
    assert hashlib.sha256(key.encode()).digest() not in sealed
