"""Pages of other origins: shut out, unless the settings name them."""

from collections.abc import Generator, Mapping

import pytest
from starlette.testclient import TestClient

from api.app import create_app
from core.errors import DeploymentError
from core.settings import Settings, load_settings
from tests.requests import body_of

SHOP = "https://shop.example"
PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "content-type,idempotency-key,x-api-key",
}


def _cors_of(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items() if name.lower().startswith("access-control-")}


def _serve(settings: Settings, *origins: str) -> TestClient:
    app = create_app(settings.model_copy(update={"cors_origins": origins}))
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def open_client(settings: Settings) -> Generator[TestClient]:
    """An API that pages of two origins may call."""
    with _serve(settings, SHOP, "http://localhost:3000") as client:
        yield client


def test_unless_the_settings_say_so_no_page_of_another_origin_may_call(client: TestClient) -> None:
    asked = client.options("/v2/images/upscale", headers={"Origin": SHOP, **PREFLIGHT})
    assert (asked.status_code, asked.json()["code"]) == (405, "method_not_allowed")
    answered = client.get("/v2/me", headers={"Origin": SHOP})
    assert answered.status_code == 200
    assert not _cors_of(asked.headers) and not _cors_of(answered.headers)


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT"])
def test_a_browser_that_asks_for_a_page_of_a_named_origin_needs_no_key(open_client: TestClient, method: str) -> None:
    asking = {"Origin": SHOP, **PREFLIGHT, "Access-Control-Request-Method": method}
    asked = open_client.options("/v2/images/upscale", headers=asking)
    assert asked.status_code == 200
    allowed = _cors_of(asked.headers)
    assert allowed["access-control-allow-origin"] == SHOP
    assert method in allowed["access-control-allow-methods"].split(", ")
    headers = {name.lower() for name in allowed["access-control-allow-headers"].split(", ")}
    assert headers >= {
        *("x-api-key", "authorization", "content-type", "x-request-id"),
        *("idempotency-key", "cancel-after", "prefer", "if-none-match", "last-event-id"),
    }
    assert int(allowed["access-control-max-age"]) >= 600
    assert "access-control-allow-credentials" not in allowed
    assert "Origin" in asked.headers["Vary"]


def test_a_page_of_a_named_origin_reads_answers_and_their_headers(open_client: TestClient, key: str) -> None:
    headers = {"Origin": SHOP, "X-API-Key": key}
    answer = open_client.post("/v2/images/upscale", json=body_of("https://example.com/a.png"), headers=headers)
    assert answer.status_code == 202
    allowed = _cors_of(answer.headers)
    assert allowed.pop("access-control-allow-origin") == SHOP
    assert set(allowed.pop("access-control-expose-headers").split(", ")) == {
        *("Location", "Retry-After", "ETag", "X-Request-Id", "RateLimit", "RateLimit-Policy"),
        *("Idempotent-Replayed", "Preference-Applied"),
    }
    assert not allowed
    assert "Origin" in answer.headers["Vary"]


def test_errors_and_bugs_can_be_read_as_well(open_client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object) -> None:
        raise ZeroDivisionError

    origin = {"Origin": SHOP}
    answers = [open_client.get("/v2/me", headers=origin), open_client.get("/nowhere", headers=origin)]
    answers.append(open_client.post("/v2/images/upscale", content=bytes(70_000_000), headers=origin))
    monkeypatch.setattr("api.keyring.KeyRing.find", explode)
    answers.append(open_client.get("/v2/me", headers={**origin, "X-API-Key": "upk_any"}))
    assert [answer.status_code for answer in answers] == [401, 404, 413, 500]
    assert {answer.headers.get("Access-Control-Allow-Origin") for answer in answers} == {SHOP}
    assert all("X-Request-Id" in answer.headers for answer in answers)


@pytest.mark.parametrize("origin", ["https://evil.example", f"{SHOP}.evil.example", "null", "http://shop.example"])
def test_a_page_of_any_other_origin_is_refused(open_client: TestClient, origin: str, key: str) -> None:
    asked = open_client.options("/v2/images/upscale", headers={"Origin": origin, **PREFLIGHT})
    assert asked.status_code == 400
    assert "access-control-allow-origin" not in _cors_of(asked.headers)
    answer = open_client.get("/v2/me", headers={"Origin": origin, "X-API-Key": key})
    assert "access-control-allow-origin" not in _cors_of(answer.headers)
    assert "Origin" in answer.headers["Vary"]  # no cache may give one origin's answer to another


def test_an_asterisk_names_every_origin(settings: Settings) -> None:
    with _serve(settings, "*") as client:
        asked = client.options("/v2/jobs", headers={"Origin": SHOP, "Access-Control-Request-Method": "GET"})
        answer = client.get("/v2/jobs", headers={"Origin": SHOP})
    assert [asked.status_code, answer.status_code] == [200, 401]
    for headers in (asked.headers, answer.headers):
        assert headers["Access-Control-Allow-Origin"] == "*"
        assert "Access-Control-Allow-Credentials" not in headers


@pytest.mark.parametrize("origin", ["shop.example", f"{SHOP}/", f"{SHOP},{SHOP}/cart"])
def test_what_no_browser_calls_an_origin_is_no_setting(settings: Settings, origin: str) -> None:
    given = {"database_url": settings.database_url, "redis_url": settings.redis_url, "secret_key": "x" * 32}
    assert load_settings(**given, cors_origins=f"*, {SHOP}").cors_origins == ("*", SHOP)
    with pytest.raises(DeploymentError, match="UPSCALED_CORS_ORIGINS"):
        load_settings(**given, cors_origins=origin)
