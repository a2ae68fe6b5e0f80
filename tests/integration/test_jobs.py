"""Reading jobs: one, many, and nobody else's."""

import base64
import re
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import pytest
from starlette.testclient import TestClient

from core.settings import Settings
from tests.broker import connect_redis
from tests.requests import png, submit, upload

Sql = Callable[..., list[Any]]
Work = Callable[[], int]


def _cursor(moment: str) -> str:
    return base64.urlsafe_b64encode(f"{moment} {UUID(int=0)}".encode()).decode()


TIMESTAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


def test_a_queued_job_shows_all_fields_and_when_to_ask_again(client: TestClient) -> None:
    job_id = submit(client, "https://example.com/a.png", scale_factor=4, seed=7)
    response = client.get(f"/v2/jobs/{job_id}")
    assert response.status_code == 200
    assert int(response.headers["Retry-After"]) > 0
    job = response.json()
    assert re.fullmatch(TIMESTAMP, job.pop("createdAt"))
    assert job == {
        "id": str(job_id),
        "status": "QUEUED",
        "model": "clarity-upscale",
        "progress": 0,
        "result": None,
        "error": None,
        "errorCode": None,
        "creditCost": None,
        "webhookStatus": None,
        "startedAt": None,
        "completedAt": None,
        "expiresAt": None,
        "expired": False,
        "input": {"image": "https://example.com/a.png", "scale_factor": 4, "seed": 7},
        "queuePosition": 1,
        "estimatedStartAt": None,
        "cancelRequestedAt": None,
        "deadlineAt": None,
    }


def test_a_completed_job_shows_its_result(client: TestClient, work: Work) -> None:
    job_id = submit(client, upload(client, png(31, 17)), scale_factor=2, seed=5)
    assert work() == 1
    response = client.get(f"/v2/jobs/{job_id}")
    assert "Retry-After" not in response.headers
    job = response.json()
    assert (job["status"], job["progress"], job["error"], job["expired"]) == ("COMPLETED", 100, None, False)
    assert all(re.fullmatch(TIMESTAMP, job[name]) for name in ("startedAt", "completedAt", "expiresAt"))
    result = job["result"]
    assert (result["engine"], result["format"], result["width"], result["height"]) == ("lanczos", "png", 62, 34)
    assert result["seed"] == 5
    picture = client.get(result["images"][0])
    assert len(picture.content) == result["byteSize"]


def test_the_url_of_a_result_is_the_same_at_every_reading(client: TestClient, work: Work) -> None:
    job_id = submit(client, upload(client, png(3, 3)))
    work()
    first, second = (client.get(f"/v2/jobs/{job_id}").json()["result"]["images"] for _ in range(2))
    assert first == second


def test_a_job_can_also_be_read_where_the_owner_put_it(client: TestClient) -> None:
    job_id = submit(client, "https://example.com/a.png")
    assert client.get(f"/jobs/{job_id}").json() == client.get(f"/v2/jobs/{job_id}").json()


def test_a_running_job_shows_how_far_it_is(client: TestClient, settings: Settings, sql: Sql) -> None:
    job_id = submit(client, "https://example.com/a.png")
    sql("UPDATE jobs SET status = 'PROCESSING', attempt = 1, started_at = now()")
    assert client.get(f"/v2/jobs/{job_id}").json()["progress"] == 0
    with connect_redis(settings.redis_url) as broker:
        broker.xadd(f"progress:{job_id}", {"": ""}, id="1-45")
    assert client.get(f"/v2/jobs/{job_id}").json()["progress"] == 45


def test_an_unknown_job_is_not_found(client: TestClient) -> None:
    response = client.get(f"/v2/jobs/{uuid4()}")
    assert (response.status_code, response.json()["error"]) == (404, "Job not found")


def test_an_id_that_is_no_uuid_is_a_bad_request(client: TestClient) -> None:
    response = client.get("/v2/jobs/42")
    assert response.status_code == 400
    assert list(response.json()["details"]) == ["job_id"]


def test_a_job_of_another_key_is_not_found(client: TestClient, sql: Sql) -> None:
    job_id = submit(client, "https://example.com/a.png")
    sql("INSERT INTO api_keys (id, name, prefix, hash) VALUES (gen_random_uuid(), 'other', 'upk_', 'x')")
    sql("UPDATE jobs SET api_key_id = (SELECT id FROM api_keys WHERE name = 'other')")
    assert client.get(f"/v2/jobs/{job_id}").status_code == 404
    assert client.get("/v2/jobs").json()["jobs"] == []


def test_pages_hold_every_job_once_newest_first(client: TestClient, sql: Sql) -> None:
    submitted = [str(submit(client, "https://example.com/a.png")) for _ in range(7)]
    sql("UPDATE jobs SET created_at = '2026-01-01'")  # ties are broken by id
    seen: list[str] = []
    cursor, pages = None, 0
    while True:
        page = client.get("/v2/jobs", params={"limit": 3} | ({"cursor": cursor} if cursor else {})).json()
        seen += [job["id"] for job in page["jobs"]]
        cursor, pages = page["nextCursor"], pages + 1
        assert page["hasMore"] == (cursor is not None)
        if cursor is None:
            break
    assert pages == 3
    assert seen == sorted(submitted, reverse=True)


def test_jobs_are_listed_newest_first_without_their_input(client: TestClient) -> None:
    older, newer = (str(submit(client, "https://example.com/a.png")) for _ in range(2))
    jobs = client.get("/v2/jobs").json()["jobs"]
    assert [job["id"] for job in jobs] == [newer, older]
    assert all("input" not in job for job in jobs)


def test_jobs_can_be_filtered(client: TestClient, sql: Sql) -> None:
    one, two = (str(submit(client, "https://example.com/a.png")) for _ in range(2))
    sql("UPDATE jobs SET status = 'FAILED', error = 'x' WHERE id = $1", two)

    def ids(**filters: str) -> list[str]:
        return [job["id"] for job in client.get("/v2/jobs", params=filters).json()["jobs"]]

    assert ids(status="FAILED") == [two]
    assert ids(status="QUEUED", model="clarity-upscale") == [one]
    assert ids(model="other") == []
    assert ids(search=one) == [one]


def test_the_models_in_use_are_listed_on_request(client: TestClient) -> None:
    submit(client, "https://example.com/a.png")
    assert "models" not in client.get("/v2/jobs").json()
    assert client.get("/v2/jobs", params={"include_models": "true"}).json()["models"] == ["clarity-upscale"]


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        *(("limit", "0"), ("limit", "101"), ("status", "DONE"), ("search", "x"), ("scope", "all"), ("model", "\0")),
        *(("cursor", "???"), ("cursor", _cursor("0001-01-01T00:00:00+14:00")), ("cursor", _cursor("today"))),
    ],
)
def test_a_wrong_filter_is_refused_by_its_name(client: TestClient, parameter: str, value: str) -> None:
    response = client.get("/v2/jobs", params={parameter: value})
    assert response.status_code == 400
    assert list(response.json()["details"]) == [parameter]


def test_the_team_s_jobs_are_for_admins(client: TestClient) -> None:
    response = client.get("/v2/jobs", params={"scope": "team"})
    assert (response.status_code, response.json()["code"]) == (403, "forbidden")


def test_models_are_listed_without_a_key_and_carry_their_parameters(anonymous: TestClient) -> None:
    clarity, superres = anonymous.get("/v2/models").json()["models"]
    creativity = clarity["params"]["properties"]["creativity"]
    assert (clarity["id"], clarity["paramsKey"]) == ("clarity-upscale", "clarityUpscaleParams")
    assert (creativity["default"], creativity["minimum"], creativity["maximum"], creativity["x-step"]) == (
        *(0.35, 0, 1, 0.05),
    )
    assert (superres["id"], superres["paramsKey"]) == ("superres", "superresParams")
    assert list(superres["params"]["properties"]) == ["image", "scale_factor", "output_format", "output_quality"]
    factor = superres["params"]["properties"]["scale_factor"]
    assert (factor["default"], factor["anyOf"][0]) == (2, {"type": "number", "minimum": 1, "maximum": 8})
    assert anonymous.get("/v2/models", params={"modality": "video"}).json()["models"] == []


def test_the_process_is_alive_and_ready(anonymous: TestClient) -> None:
    assert anonymous.get("/healthz").json() == {"status": "ok"}
    assert anonymous.get("/readyz").json() == {"status": "ok"}
