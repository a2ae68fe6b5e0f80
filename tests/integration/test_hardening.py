"""What every answer says, what none says, and how much a request may bring."""

import base64
import hashlib
import re
from typing import Any
from uuid import UUID

import anyio
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from api import middleware
from api.app import create_app
from api.headers import add_to_answer
from api.room import MIN_BYTES, Room
from core.errors import DeploymentError, StorageUnavailable, TransientError
from core.settings import Settings
from core.storage import LocalStorage
from tests.documented import DocumentedClient
from tests.requests import body_of, png

INTERNAL = re.compile(
    r"127\.0\.0\.1|0\.0\.0\.0|/home|/usr|/tmp|\.py|Traceback|[a-z]Error\b|Exception|SELECT|asyncpg|UPSCALED_"
)
"""What no answer may hold: addresses, paths, names of classes, SQL, settings."""


def _says_nothing_internal(response: Any, status: int, code: str) -> bool:
    assert (response.status_code, response.json()["code"]) == (status, code)
    return INTERNAL.search(response.text) is None


def _room(client: TestClient) -> Room:
    app = client.app
    assert isinstance(app, FastAPI)
    return app.state.parts.room


# Headers


def test_every_answer_says_what_a_browser_must_not_do(client: TestClient) -> None:
    for method, path, status in (
        ("GET", "/healthz", 200),
        ("GET", "/v2/me", 200),
        ("GET", "/v2/nothing", 404),
        ("DELETE", "/v2/me", 405),
        ("POST", "/v2/images/upscale", 400),
        ("GET", "/openapi.json", 200),
        ("GET", "/v2/jobs?cursor=x", 400),
    ):
        response = client.request(method, path)
        assert response.status_code == status, path
        for name, value in middleware.SAFE_HEADERS.items():
            assert response.headers.get_list(name) == [value], (path, name)
        assert "strict-transport-security" not in response.headers


def test_an_answer_to_a_bug_says_so_too_and_has_its_name(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    async def explode(*_: object) -> None:
        raise ZeroDivisionError("in /usr/lib/secret.py of 127.0.0.1")

    monkeypatch.setattr("api.keyring.KeyRing.find", explode)
    response = client.get("/v2/me", headers={"X-Request-Id": "mine"})
    assert _says_nothing_internal(response, 500, "internal")
    assert response.headers["X-Request-Id"] == response.json()["request_id"] == "mine"
    assert response.headers["X-Content-Type-Options"] == "nosniff"


def test_who_is_reached_by_https_says_that_it_always_is(settings: Settings) -> None:
    with DocumentedClient(create_app(settings.model_copy(update={"public_url": "https://up.example"}))) as client:
        assert client.get("/healthz").headers["Strict-Transport-Security"] == "max-age=31536000"


def test_a_picture_may_be_shown_on_any_page_and_kept(client: TestClient) -> None:
    url = client.post("/v2/uploads", files={"file": png(2, 2)}).json()["url"]
    headers = client.get(url).headers
    assert headers["Cross-Origin-Resource-Policy"] == "cross-origin"
    assert headers.get_list("Content-Security-Policy") == [middleware.SAFE_HEADERS["content-security-policy"]]
    assert "no-store" not in headers["Cache-Control"]


@pytest.mark.anyio
async def test_what_a_request_lets_its_answer_carry_is_on_every_answer() -> None:
    sent: list[Message] = []

    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        add_to_answer(middleware.Request(scope), {"RateLimit": '"minute";r=1', "Cache-Control": "private"})
        raise StorageUnavailable("The storage is away.")

    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"x-request-id", "é".encode("latin-1"))]}
    await middleware.Envelope(middleware.LastResort(fail), https=False)(scope, receive, send)
    headers = dict(sent[0]["headers"])
    assert sent[0]["status"] == 503
    assert headers[b"ratelimit"] == b'"minute";r=1'
    assert headers[b"cache-control"] == b"private"
    assert [name for name, _ in sent[0]["headers"]].count(b"cache-control") == 1
    assert headers[b"x-request-id"].startswith(b"req_")


def test_the_page_of_the_api_runs_nothing_but_the_files_it_names(anonymous: TestClient) -> None:
    response = anonymous.get("/docs")
    assert response.status_code == 200
    policy = dict(part.split(" ", 1) for part in response.headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    (inline,) = re.findall("<script>(.*?)</script>", response.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
    package, allowed = policy["script-src"].split()
    assert allowed == f"'sha256-{digest}'"
    loaded = re.findall(r'<(?:script|link rel="stylesheet") [^>]*>', response.text)
    assert len(loaded) == 2
    assert all(f'"{package}' in tag and 'integrity="sha384-' in tag for tag in loaded)
    assert re.search(r"@\d+\.\d+\.\d+/$", package)
    assert anonymous.get("/redoc").status_code == 404


# How much


def test_where_no_image_is_expected_a_body_is_short(settings: Settings) -> None:
    # A plain client: no GET documents what only a caller meets who sends a body with it.
    with TestClient(create_app(settings)) as client:
        for method, path in (
            ("GET", "/v2/me"),
            ("GET", "/healthz"),
            ("DELETE", "/v2/jobs/x"),
            ("GET", "/v2/images/upscale"),
            ("POST", "/v2/uploads/presign"),
            ("POST", "/v2/uploads/"),
        ):
            response = client.request(method, path, content=bytes(middleware.SHORT_BODY_BYTES + 1))
            assert (response.status_code, response.json()["code"]) == (413, "payload_too_large"), path


def test_a_body_that_claims_no_length_is_counted(client: TestClient) -> None:
    response = client.post("/v2/uploads/presign", content=iter([bytes(1000)] * 70))
    assert (response.status_code, response.json()["code"]) == (413, "payload_too_large")


@pytest.mark.parametrize("claimed", ["9" * 5000, "0" * 10 + "99999999"])
@pytest.mark.anyio
async def test_nothing_is_read_of_a_body_that_claims_too_much(claimed: str) -> None:
    sent: list[Message] = []

    async def untouched(*_: object) -> Any:
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    limit = middleware.BodyLimit(untouched, 1000, [])
    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-length", claimed.encode())]}
    await middleware.Envelope(limit, https=False)(scope, untouched, send)
    assert sent[0]["status"] == 413


@pytest.mark.parametrize("later", [b"", b"too much"])
@pytest.mark.anyio
async def test_an_answer_is_not_broken_off_because_of_a_body_that_nobody_reads(
    later: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "PAUSE_SECONDS", 0.05)
    coming: list[Message] = [{"type": "http.request", "body": later, "more_body": True}] if later else []

    async def receive() -> Message:
        if coming:
            return coming.pop()
        await anyio.sleep(0.1)
        return {"type": "http.disconnect"}

    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (await receive())["type"] != "http.disconnect":
            pass
        await send({"type": "http.response.body"})

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    monkeypatch.setattr(middleware, "SHORT_BODY_BYTES", 4)
    await middleware.BodyLimit(stream, 1000, [])(scope, receive, send)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]


def test_images_in_bodies_have_room(client: TestClient) -> None:
    data = png(2, 2) + bytes(middleware.SHORT_BODY_BYTES)
    assert client.post("/v2/uploads", files={"file": data}).status_code == 201
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    assert client.post("/v2/images/upscale", json=body_of(uri)).status_code == 202


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(b",".join(b'"%d": 0' % number for number in range(300_000)), id="fields"),
        pytest.param(b'"webhookEvents": [' + b",".join([b'"a"'] * 300_000) + b"]", id="items"),
    ],
)
def test_a_body_of_very_many_values_is_not_parsed(
    client: TestClient, values: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(*_: object) -> Any:
        raise AssertionError

    monkeypatch.setattr("starlette.requests.Request.json", parse)
    as_json = {"Content-Type": "application/json"}
    response = client.post("/v2/images/upscale", content=b"{" + values + b"}", headers=as_json)
    assert (response.status_code, response.json()["details"]) == (400, {"body": ["holds too many values"]})


def test_the_bodies_of_one_key_leave_room_for_those_of_others() -> None:
    room, one, other = Room(1), UUID(int=1), UUID(int=2)
    half = MIN_BYTES // 2
    with room.lend(one) as take, room.lend(one) as take_too, room.lend(other) as take_as_well:
        take(half)
        with pytest.raises(TransientError):
            take_too(1)
        take_as_well(half)
        assert room.held_bytes == 2 * half
    assert room.held_bytes == 0


def test_a_body_that_there_is_no_room_for_is_turned_away_and_leaves_no_trace(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = "data:image/png;base64," + base64.b64encode(png(2, 2) + bytes(10_000)).decode()
    room = _room(client)
    monkeypatch.setattr(room, "_max_bytes", 10_000)
    refused = client.post("/v2/images/upscale", json=body_of(image))
    assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
    assert "Retry-After" in refused.headers
    assert room.held_bytes == 0
    assert client.post("/v2/uploads", files={"file": png(2, 2) + bytes(10_000)}).status_code == 201  # not gathered
    monkeypatch.setattr(room, "_max_bytes", 40_000)
    for _ in range(4):  # each gives back what it took
        assert client.post("/v2/images/upscale", json=body_of(image)).status_code == 202


def test_a_request_is_not_repeated_at_length(client: TestClient) -> None:
    many = {f"field {number}": number for number in range(5000)}
    long = {"name" * 100_000: 1}
    for unknown in (many, long):
        response = client.post("/v2/images/upscale", json=body_of("https://example.com/a.png") | unknown)
        assert (response.status_code, response.json()["code"]) == (400, "validation_error")
        assert len(response.content) < 20_000


# What is not said


def test_a_database_that_is_away_is_not_described(settings: Settings, key: str) -> None:
    away = settings.model_copy(update={"database_url": "postgresql+asyncpg://nobody:hidden@127.0.0.1:9/nothing"})
    with DocumentedClient(create_app(away)) as client:
        for path in ("/readyz", "/v2/me"):
            response = client.get(path, headers={"X-API-Key": key})
            assert _says_nothing_internal(response, 503, "database_unavailable")


def test_a_storage_that_fails_is_not_described(client: TestClient, settings: Settings) -> None:
    settings.storage_dir.write_text("no folder")
    assert _says_nothing_internal(client.post("/v2/uploads", files={"file": png(2, 2)}), 503, "storage_unavailable")


def test_a_wrong_deployment_is_not_described(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object) -> None:
        raise DeploymentError("UPSCALED_S3_ENDPOINT is http://127.0.0.1:9000, where nobody answers.")

    monkeypatch.setattr(LocalStorage, "url", fail)
    response = client.post("/v2/uploads", files={"file": png(2, 2)})
    assert _says_nothing_internal(response, 500, "deployment")


def test_what_cannot_be_read_is_not_described_in_pythons_words(client: TestClient) -> None:
    as_json = {"Content-Type": "application/json"}
    image = {"model": "clarity-upscale"}
    unreadable: list[dict[str, Any]] = [
        {"content": b"{", "headers": as_json},
        {"content": b"\xff\xfe", "headers": as_json},
        {"content": b"[" * 50_000, "headers": as_json},
        {"content": b'{"model": "clarity-upscale", "image": "\\ud800"}', "headers": as_json},
        {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}},
        {"content": b"x", "headers": {"Content-Type": "text/plain"}},
        {"json": []},
        {"json": image | {"image": 5}},
        {"json": image | {"image": "file:///etc/passwd"}},
        {"json": image | {"image": "http://127.0.0.2:1\x00/"}},
        {"data": {"file": "no file"}},
    ]
    for path in ("/v2/images/upscale", "/v2/uploads", "/v2/uploads/presign"):
        for arguments in unreadable:
            response = client.post(path, **arguments)
            assert _says_nothing_internal(response, 400, "validation_error"), (path, arguments, response.text)
            assert "<class" not in response.text
