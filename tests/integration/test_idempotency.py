"""The same request again: the same job, the same upload."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from starlette.testclient import TestClient

from core.settings import Settings
from tests.requests import body_of

Sql = Callable[..., list[Any]]

IMAGE = "https://example.com/a.png"


def _submit(client: TestClient, key: str, **params: object) -> Any:
    return client.post("/v2/images/upscale", json=body_of(IMAGE, **params), headers={"Idempotency-Key": key})


def test_a_submit_that_is_repeated_finds_its_job(client: TestClient, sql: Sql) -> None:
    first, second = _submit(client, "order-7"), _submit(client, "order-7")
    assert (first.status_code, second.status_code) == (202, 202)
    assert "Idempotent-Replayed" not in first.headers
    assert second.headers["Idempotent-Replayed"] == "true"
    assert second.json() == first.json()
    assert second.headers["Location"] == first.headers["Location"]
    assert len(sql("SELECT id FROM jobs")) == 1


def test_a_repetition_says_how_far_the_job_is(client: TestClient, sql: Sql) -> None:
    _submit(client, "order-7")
    sql("UPDATE jobs SET status = 'FAILED'")
    assert _submit(client, "order-7").json()["status"] == "FAILED"


def test_a_key_with_quotes_is_the_same_as_without(client: TestClient) -> None:
    assert _submit(client, '"order-7"').json() == _submit(client, "order-7").json()


def test_spelling_makes_no_difference_to_a_request(client: TestClient) -> None:
    first, second = _submit(client, "order-7", scale_factor=2), _submit(client, "order-7", scale_factor="2")
    assert second.json() == first.json()
    assert second.headers["Idempotent-Replayed"] == "true"


def test_a_key_that_comes_with_another_request_is_refused(client: TestClient, sql: Sql) -> None:
    _submit(client, "order-7")
    answer = _submit(client, "order-7", scale_factor=4)
    assert (answer.status_code, answer.json()["code"]) == (409, "idempotency_key_reused")
    assert len(sql("SELECT id FROM jobs")) == 1


def test_a_request_that_was_refused_does_not_use_its_key_up(client: TestClient) -> None:
    assert _submit(client, "order-7", scale_factor=3).status_code == 400
    assert _submit(client, "order-7").status_code == 202


def test_keys_of_two_callers_do_not_meet(client: TestClient, sql: Sql) -> None:
    first = _submit(client, "order-7").json()
    sql(_ANOTHER_OWNER)
    assert _submit(client, "order-7").json() != first


_ANOTHER_OWNER = """
WITH other AS (INSERT INTO api_keys (id, name, prefix, hash) VALUES (gen_random_uuid(), 'b', 'upk_', 'b') RETURNING id)
UPDATE jobs SET api_key_id = other.id FROM other
"""


@pytest.mark.parametrize("given", ["", "x" * 256, '""', "a\tb"])
def test_a_key_that_is_none_is_refused_by_the_header_s_name(client: TestClient, given: str) -> None:
    answer = _submit(client, given)
    assert answer.status_code == 400
    assert list(answer.json()["details"]) == ["Idempotency-Key"]


def test_a_hundred_duplicates_at_once_make_one_job(client: TestClient, sql: Sql) -> None:
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(partial(_submit, client), ["order-7"] * 100))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["jobId"] for answer in answers}) == 1
    assert sum("Idempotent-Replayed" not in answer.headers for answer in answers) == 1
    assert [row["count"] for row in sql("SELECT count(*) FROM jobs")] == [1]


def test_an_image_inside_a_repeated_request_is_stored_once(client: TestClient, settings: Settings) -> None:
    body = body_of("data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAAB")
    for _ in range(2):
        assert client.post("/v2/images/upscale", json=body, headers={"Idempotency-Key": "a"}).status_code == 202
    assert len(list((settings.storage_dir / "uploads").iterdir())) == 1
