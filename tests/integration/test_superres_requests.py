"""Asking for the model superres: what is taken in, what is refused and in which words, and how the job is shown."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient

from cli.main import cli
from cli.upscale import MODELS
from core.settings import Settings
from tests.apis import events_of
from tests.requests import body_of, png, superres_body, upload
from tests.web import Web
from tests.webhooks import deliver

Sql = Callable[..., list[Any]]

IMAGE = "https://example.com/a.png"
PARAMS = "superresParams"


def test_a_job_of_superres_asks_for_its_engine_and_is_shown_under_its_name(client: TestClient, sql: Sql) -> None:
    body = superres_body(IMAGE, scale_factor=3.5, output_format="webp", output_quality=80)
    response = client.post("/v2/images/upscale", json=body)
    assert response.status_code == 202
    (row,) = sql("SELECT model, options, cost FROM jobs")
    options = json.loads(row["options"])
    asked = ("engine", "scale_factor", "output_format", "output_quality")
    assert tuple(options[name] for name in asked) == ("superres", 3.5, "webp", 80)
    assert row["cost"] < 1
    job = client.get(f"/v2/jobs/{response.json()['jobId']}").json()
    assert (job["model"], job["input"]) == ("superres", body[PARAMS])


def test_a_job_of_clarity_upscale_leaves_the_engine_to_the_deployment(client: TestClient, sql: Sql) -> None:
    assert client.post("/v2/images/upscale", json=body_of(IMAGE)).status_code == 202
    assert json.loads(sql("SELECT options FROM jobs")[0]["options"])["engine"] is None


@pytest.mark.parametrize("factor", [1, 8, 2.0, 1.5, "3"])
def test_factors_of_superres_are_any_numbers_or_digits_in_strings(
    client: TestClient, sql: Sql, factor: float | str
) -> None:
    assert client.post("/v2/images/upscale", json=superres_body(IMAGE, scale_factor=factor)).status_code == 202
    assert json.loads(sql("SELECT options FROM jobs")[0]["options"])["scale_factor"] == float(factor)


@pytest.mark.parametrize(
    ("body", "field", "complaint"),
    [
        (superres_body(IMAGE, scale_factor=8.5), f"{PARAMS}.scale_factor", "Input should be less than or equal to 8"),
        (superres_body(IMAGE, scale_factor=None), f"{PARAMS}.scale_factor", "Input should be a valid number"),
        (superres_body(IMAGE, scale_factor="2x"), f"{PARAMS}.scale_factor", "Input should be a valid number"),
        (superres_body(IMAGE, creativity=0.5), f"{PARAMS}.creativity", "unknown field"),
        (superres_body(IMAGE, prompt="fur"), f"{PARAMS}.prompt", "unknown field"),
        (superres_body(""), f"{PARAMS}.image", "String should have at least 1 character"),
        (superres_body("ftp://example.com/a.png"), f"{PARAMS}.image", "must begin with http:// or https://"),
        (superres_body(IMAGE) | {"prompt": "fur"}, "prompt", "unknown field"),
        (superres_body(IMAGE) | {"webhookEvents": ["x"]}, "webhookEvents.0", "Input should be 'progress'"),
        (
            superres_body(IMAGE) | {"webhookUrl": "https://a.com", "webhook_url": "https://b.com"},
            *("body", "webhookUrl and webhook_url are the same field: give one of them"),
        ),
        (superres_body(IMAGE) | {PARAMS: None}, PARAMS, "must be a JSON object"),
        ({"model": "superres"}, PARAMS, "is required"),
        ({"model": "clarity-upscale"}, "clarityUpscaleParams", "is required"),
        ({PARAMS: {"image": IMAGE}}, "model", "is required"),
        ({"model": ["superres"], PARAMS: {}}, "model", "Input should be 'clarity-upscale' or 'superres'"),
        (
            body_of(IMAGE) | {"model": "superres"},
            *("clarityUpscaleParams", "belongs to model clarity-upscale; superres takes superresParams"),
        ),
        (
            body_of(IMAGE) | superres_body(IMAGE) | {"model": "clarity-upscale"},
            *(PARAMS, "belongs to model superres; clarity-upscale takes clarityUpscaleParams"),
        ),
    ],
)
def test_what_superres_cannot_take_is_refused_by_its_name_in_one_sentence(
    client: TestClient, sql: Sql, body: dict[str, Any], field: str, complaint: str
) -> None:
    response = client.post("/v2/images/upscale", json=body)
    assert (response.status_code, response.json()["code"]) == (400, "validation_error")
    ((named, sentences),) = response.json()["details"].items()
    assert (named, len(sentences)) == (field, 1)
    assert complaint in sentences[0]
    assert sql("SELECT count(*) FROM jobs")[0]["count"] == 0


def test_jobs_can_be_told_apart_by_their_model(client: TestClient) -> None:
    bodies = (body_of(IMAGE), superres_body(IMAGE))
    _, own = (client.post("/v2/images/upscale", json=body).json()["jobId"] for body in bodies)
    page = client.get("/v2/jobs", params={"model": "superres", "include_models": "true"}).json()
    assert [job["id"] for job in page["jobs"]] == [own]
    assert page["models"] == ["clarity-upscale", "superres"]


def test_events_and_webhooks_name_the_model(client: TestClient, web: Web, settings: Settings) -> None:
    body = superres_body(upload(client, png(4, 3))) | {"webhookUrl": web.serve("/hook")}
    job_id = client.post("/v2/images/upscale", json=body).json()["jobId"]
    assert client.post(f"/v2/jobs/{job_id}/cancel").is_success
    (event,) = events_of(client.get(f"/v2/jobs/{job_id}/events").text.splitlines())
    assert (event.name, event.data["model"]) == ("cancelled", "superres")
    deliver(settings, lambda: bool(web.seen))
    assert json.loads(web.seen[0].body)["model"] == "superres"


def test_a_repeated_request_finds_its_job_however_it_spells_the_factor(client: TestClient) -> None:
    headers = {"Idempotency-Key": "order-7"}
    bodies = [superres_body(IMAGE, scale_factor=factor) for factor in (4, "4", 4.0)]
    first, *others = (client.post("/v2/images/upscale", json=body, headers=headers) for body in bodies)
    assert [other.json() for other in others] == [first.json()] * 2
    clarity = client.post("/v2/images/upscale", json=body_of(IMAGE, scale_factor=4), headers=headers)
    assert (clarity.status_code, clarity.json()["code"]) == (409, "idempotency_key_reused")


def test_the_document_describes_the_request_of_each_model(anonymous: TestClient) -> None:
    document = anonymous.get("/openapi.json").json()
    body = document["paths"]["/v2/images/upscale"]["post"]["requestBody"]
    schema = body["content"]["application/json"]["schema"]
    assert body["required"]
    assert schema["discriminator"]["propertyName"] == "model"
    named = schema["discriminator"]["mapping"]
    assert list(named) == [model["id"] for model in anonymous.get("/v2/models").json()["models"]]
    for model, reference in named.items():
        described = document["components"]["schemas"][reference.rpartition("/")[2]]
        assert described["properties"]["model"]["const"] == model
        assert {"$ref": reference} in schema["oneOf"]


def test_the_command_sends_each_model_s_parameters_where_they_belong(anonymous: TestClient) -> None:
    assert {model["id"]: model["paramsKey"] for model in anonymous.get("/v2/models").json()["models"]} == MODELS


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--scale", "3"), "clarity-upscale takes 1, 2, 4 or 8; --model superres any number from 1 to 8."),
        (("--model", "superres", "--scale", "8.1"), "8.1 is not in the range"),
        (("--scale", "nan"), "must be a number"),
        (("--model", "esrgan"), "'esrgan' is not one of"),
    ],
)
def test_the_command_refuses_what_its_model_cannot_do_before_it_starts_anything(
    words: tuple[str, ...], complaint: str
) -> None:
    done = CliRunner().invoke(cli, ["upscale", "cli/sample.jpg", *words])
    assert done.exit_code == 2
    assert complaint in done.output
    assert "Starting" not in done.output
