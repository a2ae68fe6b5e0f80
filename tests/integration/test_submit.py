"""Submitting: what is accepted, what is refused, and in which words."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from core.settings import Settings
from tests.requests import body_of, submit

Sql = Callable[..., list[Any]]


def test_a_submitted_job_is_queued_and_says_where_to_poll(client: TestClient, sql: Sql) -> None:
    response = client.post("/v2/images/upscale", json=body_of("https://example.com/a.png"))
    assert response.status_code == 202
    job_id = response.json()["jobId"]
    assert response.json() == {"jobId": job_id, "status": "QUEUED"}
    assert response.headers["Location"] == f"/v2/jobs/{job_id}"
    assert int(response.headers["Retry-After"]) > 0
    (row,) = sql("SELECT status, image_url, attempt FROM jobs")
    assert (row["status"], row["image_url"], row["attempt"]) == ("QUEUED", "https://example.com/a.png", 0)


_NOT_ON_THE_PAGE = {
    "engine": None,
    "sampler": "dpmpp_3m_sde",
    "spacing": "karras",
    "pass_decay": 0.8,
    "tile_width": 112,
    "tile_height": 144,
    "clip_skip": 0,
    "colour_fix": None,
    "safety_check": "off",
}
"""What other dialects can say."""


def test_absent_parameters_get_the_defaults_of_the_model_page(client: TestClient, sql: Sql) -> None:
    submit(client, "https://example.com/a.png")
    options = json.loads(sql("SELECT options FROM jobs")[0]["options"])
    assert 0 <= options.pop("seed") < 2**32
    assert options == {
        "scale_factor": 2,
        "strength": 0.35,
        "control_scale": 0.6,
        "guidance_scale": 6,
        "steps": 18,
        "prompt": "",
        "negative_prompt": "",
        "sharpen": 0,
        "output_format": "png",
        "output_quality": 95,
        **_NOT_ON_THE_PAGE,
    }


def test_every_parameter_reaches_the_options_under_our_own_name(client: TestClient, sql: Sql) -> None:
    params = {
        "prompt": "fur",
        "negative_prompt": "blur",
        "scale_factor": "8",
        "creativity": 0.9,
        "resemblance": 3,
        "dynamic": 50,
        "num_inference_steps": 100,
        "sharpen": 10,
        "output_format": "webp",
        "output_quality": 1,
        "seed": 1337,
    }
    submit(client, "https://example.com/a.png", **params)
    assert json.loads(sql("SELECT options FROM jobs")[0]["options"]) == {
        "scale_factor": 8,
        "strength": 0.9,
        "control_scale": 3,
        "guidance_scale": 50,
        "steps": 100,
        "prompt": "fur",
        "negative_prompt": "blur",
        "seed": 1337,
        "sharpen": 10,
        "output_format": "webp",
        "output_quality": 1,
        **_NOT_ON_THE_PAGE,
    }


@pytest.mark.parametrize("factor", [1, 2, 4, 8, "1", "2", "4", "8", 2.0])
def test_scale_factors_may_be_numbers_or_strings(client: TestClient, factor: object) -> None:
    submit(client, "https://example.com/a.png", scale_factor=factor)


def test_the_prompt_may_stand_beside_the_parameters(client: TestClient, sql: Sql) -> None:
    assert client.post("/v2/images/upscale", json=body_of("https://example.com/a.png") | {"prompt": "fur"}).is_success
    assert json.loads(sql("SELECT options FROM jobs")[0]["options"])["prompt"] == "fur"


@pytest.mark.parametrize(("url", "events"), [("webhookUrl", "webhookEvents"), ("webhook_url", "webhook_events")])
def test_webhooks_may_be_spelled_either_way(client: TestClient, sql: Sql, url: str, events: str) -> None:
    body = body_of("https://example.com/a.png") | {url: "https://example.com/hook", events: ["failed"]}
    assert client.post("/v2/images/upscale", json=body).status_code == 202
    (row,) = sql("SELECT webhook_url, webhook_events FROM jobs")
    assert (row["webhook_url"], row["webhook_events"]) == ("https://example.com/hook", ["failed"])


def test_a_webhook_without_events_is_told_how_the_job_ends(client: TestClient, sql: Sql) -> None:
    body = body_of("https://example.com/a.png") | {"webhookUrl": "https://example.com/hook"}
    assert client.post("/v2/images/upscale", json=body).status_code == 202
    assert sql("SELECT webhook_events FROM jobs")[0]["webhook_events"] == ["completed", "failed", "cancelled"]


PARAMS = "clarityUpscaleParams"
GOOD = {"image": "https://example.com/a.png"}


@pytest.mark.parametrize(
    ("params", "field", "complaint"),
    [
        (GOOD | {"scale_factor": 3}, f"{PARAMS}.scale_factor", "Input should be 1, 2, 4 or 8"),
        (GOOD | {"scale_factor": "2x"}, f"{PARAMS}.scale_factor", "Input should be 1, 2, 4 or 8"),
        (GOOD | {"scale_factor": True}, f"{PARAMS}.scale_factor", "Input should be 1, 2, 4 or 8"),
        (GOOD | {"creativity": 1.01}, f"{PARAMS}.creativity", "Input should be less than or equal to 1"),
        (GOOD | {"creativity": "0.35"}, f"{PARAMS}.creativity", "Input should be a valid number"),
        (GOOD | {"resemblance": -0.1}, f"{PARAMS}.resemblance", "Input should be greater than or equal to 0"),
        (GOOD | {"dynamic": 0}, f"{PARAMS}.dynamic", "Input should be greater than or equal to 1"),
        (GOOD | {"dynamic": 51}, f"{PARAMS}.dynamic", "Input should be less than or equal to 50"),
        (GOOD | {"num_inference_steps": 1.5}, f"{PARAMS}.num_inference_steps", "Input should be a valid integer"),
        (GOOD | {"num_inference_steps": 101}, f"{PARAMS}.num_inference_steps", "Input should be less than or equal to"),
        (GOOD | {"sharpen": 11}, f"{PARAMS}.sharpen", "Input should be less than or equal to 10"),
        (GOOD | {"output_format": "gif"}, f"{PARAMS}.output_format", "Input should be 'png', 'jpg' or 'webp'"),
        (GOOD | {"seed": -1}, f"{PARAMS}.seed", "Input should be greater than or equal to 0"),
        (GOOD | {"seed": 2**53}, f"{PARAMS}.seed", "Input should be less than or equal to"),
        (GOOD | {"prompt": "x" * 2001}, f"{PARAMS}.prompt", "String should have at most 2000 characters"),
        (GOOD | {"scale": 2}, f"{PARAMS}.scale", "unknown field"),
        ({}, f"{PARAMS}.image", "is required"),
        ({"image": ""}, f"{PARAMS}.image", "String should have at least 1 character"),
        ({"image": 7}, f"{PARAMS}.image", "Input should be a valid string"),
        (GOOD | {"prompt": "a\0b"}, f"{PARAMS}.prompt", "must not contain the character NUL"),
        (GOOD | {"prompt": "\ud800"}, f"{PARAMS}.prompt", "Input should be a valid string"),
        (GOOD | {"creativity": float("nan")}, f"{PARAMS}.creativity", "Input should be"),
        (GOOD | {"dynamic": float("inf")}, f"{PARAMS}.dynamic", "Input should be less than or equal to 50"),
        (GOOD | {"seed": 10**400}, f"{PARAMS}.seed", "Input should be"),
        ({"image": "https://example.com/\0"}, f"{PARAMS}.image", "must not contain the character NUL"),
        ({"image": "data:image/png\0;base64,AAAA"}, f"{PARAMS}.image", "must not contain the character NUL"),
        ({"image": "https://exa mple.com/"}, f"{PARAMS}.image", "must not contain spaces"),
        ({"image": "https://example.com:99999/"}, f"{PARAMS}.image", "malformed"),
        ({"image": "ftp://example.com/a.png"}, f"{PARAMS}.image", "must begin with http:// or https://"),
        ({"image": "https://me:pw@example.com/"}, f"{PARAMS}.image", "must not carry a user name or password"),
    ],
)
def test_a_wrong_parameter_is_refused_by_its_name(
    client: TestClient, sql: Sql, params: dict[str, Any], field: str, complaint: str
) -> None:
    body = json.dumps({"model": "clarity-upscale", PARAMS: params})  # as Python writes it, NaN and all
    response = client.post("/v2/images/upscale", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    answer = response.json()
    assert (answer["error"], answer["code"]) == ("Validation error", "validation_error")
    assert list(answer["details"]) == [field]
    assert complaint in answer["details"][field][0]
    assert field in answer["detail"]
    assert sql("SELECT count(*) FROM jobs")[0]["count"] == 0


@pytest.mark.parametrize(
    ("change", "field", "complaint"),
    [
        ({"model": "esrgan"}, "model", "Input should be 'clarity-upscale' or 'superres'"),
        ({"webhook": "https://example.com"}, "webhook", "unknown field"),
        ({"webhookUrl": "example.com/hook"}, "webhookUrl", "must begin with http:// or https://"),
        ({"webhook_url": "file:///etc/passwd"}, "webhook_url", "must begin with http:// or https://"),
        ({"webhookUrl": "https://example.com/\ud800"}, "webhookUrl", "Input should be a valid string"),
        ({"webhookUrl": "https://example.com/\0"}, "webhookUrl", "must not contain the character NUL"),
        ({"webhookEvents": []}, "webhookEvents", "at least 1 item"),
        ({"webhookEvents": ["started"]}, "webhookEvents.0", "Input should be 'progress', 'completed', 'failed' or "),
        ({"webhookUrl": "https://a.com", "webhook_url": "https://b.com"}, "body", "are the same field"),
        ({PARAMS: "image"}, PARAMS, "must be a JSON object"),
    ],
)
def test_a_wrong_field_beside_the_parameters_is_refused_by_its_name(
    client: TestClient, change: dict[str, Any], field: str, complaint: str
) -> None:
    body = json.dumps(body_of("https://example.com/a.png") | change)
    response = client.post("/v2/images/upscale", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert list(response.json()["details"]) == [field]
    assert complaint in response.json()["details"][field][0]


@pytest.mark.parametrize("body", [b"{", b"", b"\xff\xfe", b'{"model": NaN', b"[" * 100_000, b'{"a":' * 50_000])
def test_a_body_that_is_no_json_is_refused(client: TestClient, body: bytes) -> None:
    response = client.post("/v2/images/upscale", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert list(response.json()["details"]) == ["body"]


def test_a_body_that_is_no_object_is_refused(client: TestClient) -> None:
    response = client.post("/v2/images/upscale", json=["clarity-upscale"])
    assert response.status_code == 400
    assert response.json()["details"] == {"body": ["must be a JSON object, sent as application/json"]}


def test_a_body_beyond_the_limit_is_refused_before_it_is_read(client: TestClient, settings: Settings) -> None:
    image = "data:image/png;base64," + "A" * (settings.max_input_bytes * 4 // 3 + 2 * 1024 * 1024)
    response = client.post("/v2/images/upscale", json=body_of(image))
    assert (response.status_code, response.json()["code"]) == (413, "payload_too_large")


def test_a_request_without_a_key_is_refused(anonymous: TestClient) -> None:
    response = anonymous.post("/v2/images/upscale", json=body_of("https://example.com/a.png"))
    assert (response.status_code, response.json()["error"]) == (401, "API key is required")


def test_a_key_that_nobody_was_given_is_refused(anonymous: TestClient) -> None:
    response = anonymous.get("/v2/me", headers={"X-API-Key": "upk_nonsense"})
    assert (response.status_code, response.json()["error"]) == (401, "Invalid API key")


def test_a_revoked_key_is_refused(client: TestClient, sql: Sql) -> None:
    sql("UPDATE api_keys SET revoked_at = now()")
    response = client.get("/v2/me")
    assert (response.status_code, response.json()["error"]) == (403, "API key is inactive")


def test_only_a_hash_of_a_key_is_stored(client: TestClient, key: str, sql: Sql) -> None:
    (row,) = sql("SELECT * FROM api_keys")
    assert all(key not in str(value) for value in dict(row).values())
    assert client.get("/v2/me").json()["apiKey"]["prefix"] == key[:12]


def test_every_answer_names_its_request(client: TestClient) -> None:
    assert client.get("/v2/me", headers={"X-Request-Id": "mine-1"}).headers["X-Request-Id"] == "mine-1"
    refused = client.get("/v2/jobs/0", headers={"X-Request-Id": "<script>"})
    assert refused.headers["X-Request-Id"] == refused.json()["request_id"]
    assert refused.json()["request_id"].startswith("req_")


def test_a_client_that_knows_problems_gets_their_media_type(client: TestClient) -> None:
    plain = client.get("/v2/nothing")
    problem = client.get("/v2/nothing", headers={"Accept": "application/problem+json"})
    assert plain.headers["Content-Type"] == "application/json"
    assert problem.headers["Content-Type"] == "application/problem+json"
    assert problem.json()["title"] == "Not Found"
