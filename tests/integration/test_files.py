"""Signed URLs: what they give, and to whom."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from starlette.testclient import TestClient

from core.settings import Settings
from core.storage import open_storage
from tests.requests import png, submit, upload


def _signed(settings: Settings, key: str, seconds: float) -> str:
    """Return a URL of ours that expires in so many seconds."""
    return asyncio.run(open_storage(settings).url(key, datetime.now(UTC) + timedelta(seconds=seconds)))


@pytest.fixture
def url(anonymous: TestClient, client: TestClient, work: Callable[[], int]) -> str:
    """The URL of a result, asked for by a client that sends no key."""
    job_id = submit(client, upload(client, png(8, 8)))
    work()
    result = client.get(f"/v2/jobs/{job_id}").json()["result"]["images"][0]
    del client.headers["X-API-Key"]
    return result


def test_a_result_needs_no_key_and_cannot_be_mistaken_for_a_page(anonymous: TestClient, url: str) -> None:
    response = anonymous.get(url)
    assert response.status_code == 200
    assert response.content.startswith(b"\x89PNG")
    assert response.headers["Content-Type"] == "image/png"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Content-Security-Policy"] == "default-src 'none'"


def test_a_part_of_a_result_can_be_asked_for(anonymous: TestClient, url: str) -> None:
    whole = anonymous.get(url).content
    part = anonymous.get(url, headers={"Range": "bytes=4-7"})
    assert (part.status_code, part.content) == (206, whole[4:8])
    assert part.headers["Content-Range"] == f"bytes 4-7/{len(whole)}"
    beyond = anonymous.get(url, headers={"Range": "bytes=1000000-"})
    assert beyond.status_code == 416


def test_an_unchanged_result_is_not_sent_again(anonymous: TestClient, url: str) -> None:
    etag = anonymous.get(url).headers["ETag"]
    again = anonymous.get(url, headers={"If-None-Match": f'"other", {etag}'})
    assert (again.status_code, again.content) == (304, b"")


def test_the_head_of_a_result_tells_its_size(anonymous: TestClient, url: str) -> None:
    head = anonymous.head(url)
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["Content-Length"]) == len(anonymous.get(url).content)


@pytest.mark.parametrize(
    ("old", "new"), [("signature=", "signature=0"), ("expires=1", "expires=2"), ("/results/", "/uploads/")]
)
def test_a_url_that_was_altered_is_refused(anonymous: TestClient, url: str, old: str, new: str) -> None:
    response = anonymous.get(url.replace(old, new))
    assert (response.status_code, response.json()["code"]) == (403, "forbidden")


def test_a_url_without_a_signature_is_refused(anonymous: TestClient, url: str) -> None:
    assert anonymous.get(url.partition("?")[0]).status_code == 403


def test_an_expired_url_is_refused(anonymous: TestClient, settings: Settings) -> None:
    url = _signed(settings, "results/00000000-0000-0000-0000-000000000000/1.png", -1)
    assert anonymous.get(url).status_code == 403


def test_a_signed_url_of_nothing_is_not_found(anonymous: TestClient, settings: Settings) -> None:
    url = _signed(settings, "results/00000000-0000-0000-0000-000000000000/1.png", 60)
    assert anonymous.get(url).status_code == 404


def test_no_url_leads_out_of_the_folder(anonymous: TestClient, settings: Settings) -> None:
    (settings.storage_dir.parent / "secret.png").write_bytes(b"secret")
    url = _signed(settings, "..%2fsecret.png", 60)
    assert anonymous.get(url).status_code in (403, 404)
