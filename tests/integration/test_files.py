"""Signed URLs: what they give, and to whom."""

import asyncio
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from starlette.testclient import TestClient

from core.settings import Settings
from core.storage import SignedPut, open_storage
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
    assert response.headers["Content-Security-Policy"] == "default-src 'none'; frame-ancestors 'none'"


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


def _promise(settings: Settings, size: int, key: str = "", seconds: float = 60) -> SignedPut:
    """Return a URL of ours to which a PNG of that size may be put."""
    expires_at = datetime.now(UTC) + timedelta(seconds=seconds)
    key = key or f"uploads/{uuid4()}.png"
    return asyncio.run(open_storage(settings).sign_put(key, "image/png", size, expires_at))


def _stored(settings: Settings) -> list[Path]:
    return [path for path in settings.storage_dir.rglob("*") if path.is_file()]


def test_what_a_url_promises_can_be_put_without_a_key(anonymous: TestClient, settings: Settings) -> None:
    image = png(8, 8)
    promise = _promise(settings, len(image))
    response = anonymous.put(promise.url, content=image, headers=promise.headers)
    assert (response.status_code, response.content) == (200, b"")
    [path] = _stored(settings)
    assert path.read_bytes() == image


def test_what_was_put_is_never_overwritten(anonymous: TestClient, settings: Settings) -> None:
    image = png(8, 8)
    promise = _promise(settings, len(image))
    anonymous.put(promise.url, content=image, headers=promise.headers)
    again = anonymous.put(promise.url, content=bytes(len(image)), headers=promise.headers)
    assert (again.status_code, again.json()["code"]) == (412, "upload_exists")
    [path] = _stored(settings)
    assert path.read_bytes() == image


@pytest.mark.parametrize("size", [0, 7, 9, 100_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_another_size_than_was_promised_is_refused(
    anonymous: TestClient, settings: Settings, size: int, chunked: bool
) -> None:
    promise = _promise(settings, 8)
    headers = {name: value for name, value in promise.headers.items() if name != "Content-Length"}
    body: bytes | Iterator[bytes] = iter([bytes(size // 2), bytes(size - size // 2)]) if chunked else bytes(size)
    response = anonymous.put(promise.url, content=body, headers=headers)
    assert response.status_code == 400
    assert response.json()["details"] == {"body": ["must have exactly 8 bytes"]}
    assert _stored(settings) == []


def test_another_type_than_was_promised_is_refused(anonymous: TestClient, settings: Settings) -> None:
    promise = _promise(settings, 8)
    response = anonymous.put(promise.url, content=bytes(8), headers={"Content-Type": "text/html"})
    assert (response.status_code, list(response.json()["details"])) == (400, ["Content-Type"])
    assert _stored(settings) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [("signature=", "signature=0"), ("expires=1", "expires=2"), ("size=8", "size=9"), ("png&", "webp&"), ("/4", "/5")],
)
def test_a_promise_that_was_altered_is_refused(anonymous: TestClient, settings: Settings, old: str, new: str) -> None:
    promise = _promise(settings, 8, "uploads/40000000-0000-0000-0000-000000000000.png")
    assert old in promise.url
    response = anonymous.put(promise.url.replace(old, new), content=bytes(8), headers=promise.headers)
    assert (response.status_code, response.json()["code"]) == (403, "forbidden")
    assert _stored(settings) == []


def test_a_promise_that_has_expired_is_refused(anonymous: TestClient, settings: Settings) -> None:
    promise = _promise(settings, 8, seconds=-1)
    assert anonymous.put(promise.url, content=bytes(8), headers=promise.headers).status_code == 403


def test_no_promise_lets_a_result_be_put(anonymous: TestClient, settings: Settings) -> None:
    promise = _promise(settings, 8, "results/00000000-0000-0000-0000-000000000000/1.png")
    assert anonymous.put(promise.url, content=bytes(8), headers=promise.headers).status_code == 403


def test_a_url_to_read_does_not_let_anything_be_put_and_the_other_way_round(
    anonymous: TestClient, settings: Settings
) -> None:
    key = f"uploads/{uuid4()}.png"
    promise, url = _promise(settings, 8, key), _signed(settings, key, 60)
    assert anonymous.put(url, content=bytes(8), headers=promise.headers).status_code == 403
    assert anonymous.put(promise.url, content=bytes(8), headers=promise.headers).status_code == 200
    assert anonymous.get(promise.url).status_code == 403
    assert anonymous.get(url).content == bytes(8)
