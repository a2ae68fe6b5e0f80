"""Who may do what: keys and their scopes, on every route and before any body is read."""

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias
from uuid import uuid4

import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from starlette.testclient import TestClient
from starlette.types import Message

from api.app import create_app
from api.dependencies import KeyedRoute, need_of
from cli.keys import create_key
from core.settings import Settings
from db import keys
from db.models import Scope
from tests.documented import DocumentedClient
from tests.requests import body_of, png, submit, upload

Sql = Callable[..., list[Any]]
Ask: TypeAlias = Callable[..., tuple[int, dict[str, Any], dict[str, str]]]

READ, WRITE, ADMIN = Scope.JOBS_READ, Scope.JOBS_WRITE, Scope.ADMIN

NEEDS = {
    ("POST", "/v2/images/upscale"): WRITE,
    ("GET", "/v2/jobs"): READ,
    ("GET", "/v2/jobs/{job_id}"): READ,
    ("GET", "/jobs/{job_id}"): READ,
    ("POST", "/v2/jobs/{job_id}/cancel"): WRITE,
    ("GET", "/v2/jobs/{job_id}/events"): READ,
    ("GET", "/v2/jobs/{job_id}/deliveries"): READ,
    ("POST", "/v2/jobs/{job_id}/deliveries/{delivery_id}/resend"): WRITE,
    ("POST", "/v2/uploads"): WRITE,
    ("POST", "/v2/uploads/presign"): WRITE,
    ("GET", "/v2/webhooks/secret"): WRITE,
    ("POST", "/v2/webhooks/secret/rotate"): WRITE,
    ("GET", "/v2/me"): READ,
    ("GET", "/metrics"): ADMIN,
}

OPEN = {
    *("/healthz", "/readyz", "/v2/models", "/v2/files/{key:path}"),
    *("/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"),
}

IMAGE = "https://example.com/a.png"


@pytest.fixture
def ask(anonymous: TestClient) -> Ask:
    """Ask the API for something with a body that must not be read; return status, body and headers of the answer."""

    def ask(method: str, path: str, *headers: tuple[str, str]) -> tuple[int, dict[str, Any], dict[str, str]]:
        sent: list[Message] = []

        async def receive() -> Message:
            raise AssertionError("the body was read")

        async def send(message: Message) -> None:
            sent.append(message)

        given = [("host", "testserver"), ("content-type", "application/json"), ("content-length", "1000"), *headers]
        path = path.replace("{job_id}", str(uuid4())).replace("{delivery_id}", str(uuid4()))
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in given],
        }
        assert anonymous.portal is not None
        anonymous.portal.call(anonymous.app, scope, receive, send)
        answered = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:])), answered

    return ask


def _key(settings: Settings, *scopes: Scope, name: str = "another") -> str:
    return asyncio.run(create_key(settings, name, scopes=scopes or keys.DEFAULT_SCOPES))


def _routes(app: FastAPI) -> Iterator[tuple[str, str, Any]]:
    """Yield method and path of every route, and what FastAPI knows of its parameters, if it is one of FastAPI's."""
    for route in iter_route_contexts(app.routes):
        for method in route.methods or ():
            yield method, route.path or "", route


def test_every_route_says_what_it_needs_or_is_known_to_be_open(settings: Settings) -> None:
    declared: dict[tuple[str, str], Scope] = {}
    for method, path, route in _routes(create_app(settings)):
        dependant = getattr(route, "dependant", None)
        need = dependant and need_of(dependant)
        if need:
            assert isinstance(route.original_route, KeyedRoute), f"{method} {path} looks at its key too late"
            declared[method, path] = need.scope
        else:
            assert path in OPEN, f"{method} {path} does not say what it needs"
    assert declared == NEEDS


@pytest.mark.parametrize(
    ("headers", "sentence"),
    [
        ([], "API key is required"),
        ([("x-api-key", "")], "API key is required"),
        ([("authorization", "Basic dXBrOnVwaw==")], "API key is required"),
        ([("x-api-key", "upk_nonsense")], "Invalid API key"),
        ([("authorization", "Bearer upk_nonsense")], "Invalid API key"),
        ([("x-api-key", keys.mint())], "Invalid API key"),
        ([("x-api-key", "upk_" + "a" * 40)], "Invalid API key"),
    ],
)
def test_a_stranger_is_turned_away_everywhere_before_the_body_is_read(
    ask: Ask, headers: Sequence[tuple[str, str]], sentence: str
) -> None:
    for method, path in NEEDS:
        status, body, answered = ask(method, path, *headers)
        assert (status, body["error"]) == (401, sentence)
        assert answered["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("over", ["revoked_at", "expires_at"])
def test_a_key_that_is_over_is_turned_away_everywhere_before_the_body_is_read(
    ask: Ask, settings: Settings, sql: Sql, over: str
) -> None:
    key = _key(settings, *Scope)
    sql(f"UPDATE api_keys SET {over} = now()")  # noqa: S608 - one of two words
    for method, path in NEEDS:
        status, body, _ = ask(method, path, ("x-api-key", key))
        assert (status, body["code"], body["error"]) == (403, "key_inactive", "API key is inactive")


@pytest.mark.parametrize("scope", [READ, WRITE])
def test_a_key_without_the_scope_is_turned_away_before_the_body_is_read(
    ask: Ask, settings: Settings, scope: Scope
) -> None:
    key = _key(settings, scope)
    for (method, path), needed in NEEDS.items():
        if needed is not scope:
            status, body, _ = ask(method, path, ("x-api-key", key))
            assert (status, body["code"]) == (403, "forbidden")
            assert body["error"] == f"This API key lacks the scope {needed}."


def test_a_key_that_comes_too_often_is_turned_away_before_the_body_is_read(
    ask: Ask, settings: Settings, sql: Sql
) -> None:
    key = _key(settings, *Scope)
    sql("UPDATE api_keys SET requests_per_minute = 1")
    status, _, answered = ask("GET", "/v2/me", ("x-api-key", key))
    assert (status, "ratelimit" in answered) == (200, True)
    for method, path in NEEDS:
        status, body, answered = ask(method, path, ("x-api-key", key))
        assert (status, body["code"]) == (429, "rate_limited")
        assert "ratelimit" in answered and "retry-after" in answered


def test_the_scopes_of_a_key_are_enough_for_what_they_name(anonymous: TestClient, settings: Settings) -> None:
    writer, reader, admin = (_key(settings, scope) for scope in (WRITE, READ, ADMIN))
    anonymous.headers["X-API-Key"] = writer
    upload(anonymous, png(2, 2))
    job_id = submit(anonymous, IMAGE)
    assert anonymous.get(f"/v2/jobs/{job_id}").status_code == 403
    assert anonymous.post(f"/v2/jobs/{job_id}/cancel").status_code == 200
    assert anonymous.get("/v2/webhooks/secret").status_code == 200
    anonymous.headers["X-API-Key"] = reader
    assert anonymous.get("/v2/jobs").status_code == anonymous.get("/v2/me").status_code == 200
    anonymous.headers["X-API-Key"] = admin
    assert anonymous.get(f"/v2/jobs/{submit(anonymous, IMAGE)}").status_code == 200
    assert anonymous.get("/metrics").status_code == 200


@pytest.mark.parametrize("form", ["Bearer {}", "bearer  {} "])
def test_a_key_can_come_as_a_bearer_token(anonymous: TestClient, key: str, form: str) -> None:
    anonymous.headers["Authorization"] = form.format(key)
    assert anonymous.get("/v2/me").json()["apiKey"]["name"] == "tests"
    submit(anonymous, IMAGE)


def test_a_key_in_its_own_header_is_not_disturbed_by_what_a_proxy_authorizes(client: TestClient) -> None:
    assert client.get("/v2/me", headers={"Authorization": "Bearer of-somebody-else"}).status_code == 200
    assert client.get("/v2/me", headers={"Authorization": "Basic dXBrOnVwaw=="}).status_code == 200


def test_the_document_names_both_ways_to_send_a_key(settings: Settings) -> None:
    document = create_app(settings).openapi()
    schemes = document["components"]["securitySchemes"]
    assert {(scheme["type"], scheme.get("name") or scheme["scheme"]) for scheme in schemes.values()} == {
        *(("apiKey", "X-API-Key"), ("http", "bearer")),
    }
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            keyed = (method.upper(), path) in NEEDS
            assert [set(way) for way in operation.get("security", [])] == (
                [{name} for name in schemes] if keyed else []
            )
            assert {"401", "403", "429"} <= set(operation["responses"]) or not keyed


def test_what_cannot_be_a_key_costs_no_query(settings: Settings) -> None:
    cut_off = settings.model_copy(update={"database_url": "postgresql+asyncpg://nobody@127.0.0.1:9/nothing"})
    with DocumentedClient(create_app(cut_off)) as client:
        good = keys.mint()
        wrong = good[:-1] + ("b" if good[-1] == "a" else "a")
        assert client.get("/v2/me", headers={"X-API-Key": wrong}).status_code == 401
        assert client.get("/v2/me", headers={"X-API-Key": good}).status_code == 503


def test_a_key_says_of_itself_what_it_may(client: TestClient, settings: Settings, sql: Sql) -> None:
    me = client.get("/v2/me").json()
    assert me["user"]["role"] == "MEMBER"
    assert me["apiKey"]["scopes"] == ["jobs:write", "jobs:read"]
    assert (me["apiKey"]["expiresAt"], me["apiKey"]["requestsPerMinute"], me["apiKey"]["dailyPixels"]) == (None,) * 3
    client.headers["X-API-Key"] = _key(settings, ADMIN)
    sql("UPDATE api_keys SET expires_at = '2126-01-01T00:00:00Z', requests_per_minute = 60, daily_pixels = 9")
    me = client.get("/v2/me").json()
    assert (me["user"]["role"], me["apiKey"]["scopes"]) == ("ADMIN", ["admin"])
    assert me["apiKey"]["expiresAt"] == "2126-01-01T00:00:00.000Z"
    assert (me["apiKey"]["requestsPerMinute"], me["apiKey"]["dailyPixels"]) == (60, 9)


def test_an_admin_lists_everybody_s_jobs_page_by_page(client: TestClient, settings: Settings, sql: Sql) -> None:
    first = submit(client, IMAGE)
    client.headers["X-API-Key"] = _key(settings)
    second = submit(client, IMAGE)
    client.headers["X-API-Key"] = _key(settings, ADMIN, name="admin")
    third = submit(client, IMAGE)
    sql("UPDATE jobs SET status = 'FAILED', error = 'x', model = 'other' WHERE id = $1", second)

    def ids(**filters: Any) -> list[str]:
        return [job["id"] for job in client.get("/v2/jobs", params={"scope": "team"} | filters).json()["jobs"]]

    pages: list[str] = []
    page: dict[str, Any] = {"nextCursor": None}
    for _ in range(3):
        cursor = {"cursor": page["nextCursor"]} if page["nextCursor"] else {}
        page = client.get("/v2/jobs", params={"scope": "team", "limit": 1} | cursor).json()
        pages += [job["id"] for job in page["jobs"]]
    assert pages == ids() == [str(third), str(second), str(first)]
    assert not page["hasMore"]
    assert ids(status="FAILED") == ids(model="other") == ids(search=second) == [str(second)]
    listed = client.get("/v2/jobs", params={"scope": "team", "include_models": "true"}).json()
    assert listed["models"] == ["clarity-upscale", "other"]
    assert [job["id"] for job in client.get("/v2/jobs").json()["jobs"]] == [str(third)]


@pytest.mark.parametrize("scopes", [keys.DEFAULT_SCOPES, [ADMIN]])
def test_nothing_of_another_key_can_be_seen_or_touched(
    client: TestClient, settings: Settings, sql: Sql, scopes: Sequence[Scope]
) -> None:
    image = upload(client, png(2, 2))
    answer = client.post("/v2/images/upscale", json=body_of(image) | {"webhookUrl": "https://example.com/hook"})
    job_id = answer.json()["jobId"]
    client.post(f"/v2/jobs/{job_id}/cancel")
    delivery_id = client.get(f"/v2/jobs/{job_id}/deliveries").json()["deliveries"][0]["id"]
    sql("UPDATE deliveries SET status = 'failed'")
    mine, foreign = client.headers["X-API-Key"], _key(settings, *scopes)

    def status(key: str, method: str, path: str) -> int:
        client.headers["X-API-Key"] = key
        return client.request(method, path.format(job_id=job_id, delivery_id=delivery_id)).status_code

    of_a_job = [(method, path) for method, path in NEEDS if "{job_id}" in path]
    assert [status(foreign, *route) for route in of_a_job] == [404] * 6
    assert sql("SELECT status FROM deliveries")[0]["status"] == "failed"
    assert client.get("/v2/jobs").json()["jobs"] == []
    assert client.get("/v2/jobs", params={"search": job_id}).json()["jobs"] == []
    refused = client.post("/v2/images/upscale", json=body_of(image))
    assert refused.status_code == 400
    assert "does not exist" in refused.json()["detail"]
    assert not {404, 403} & {status(mine, *route) for route in of_a_job}
