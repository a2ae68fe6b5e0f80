"""What an `image` may be besides an upload or a URL, and what of it is shown and stored."""

import base64
import textwrap
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from starlette.testclient import TestClient

from api.app import create_app
from core.settings import Settings
from tests.documented import DocumentedClient
from tests.requests import body_of, png, submit

Sql = Callable[..., list[Any]]

FIELD = "clarityUpscaleParams.image"
WAYS = "must be an http(s) URL, upload://<id> or the id of an upload, a data URI, or base64"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _lines(data: bytes, end: str) -> str:
    return end.join(textwrap.wrap(_base64(data), 76)) + end


@pytest.mark.parametrize(
    ("image", "shown"),
    [
        ("data:image/png;base64," + _base64(png(300, 200)), "data:image/png;base64,…"),
        ("DATA:;Base64," + _lines(png(300, 200), "\n"), "DATA:;Base64,…"),
        (_base64(png(300, 200)), "base64…"),
        (_lines(png(300, 200), "\r\n"), "base64…"),
    ],
)
def test_the_data_inside_a_request_is_stored_once_and_not_shown_back(
    client: TestClient, settings: Settings, sql: Sql, image: str, shown: str
) -> None:
    job_id = submit(client, image)
    assert client.get(f"/v2/jobs/{job_id}").json()["input"]["image"] == f"{shown} ({len(image)} characters)"
    (stored,) = (settings.storage_dir / "uploads").iterdir()
    assert stored.read_bytes() == png(300, 200)
    (row,) = sql("SELECT image_url, image_key FROM jobs")
    assert (row["image_url"], row["image_key"]) == (None, f"uploads/{stored.name}")
    assert sql("SELECT stored_at FROM uploads")[0]["stored_at"] is not None


_BYTES = _base64(b"\xfb\xff" * 300)


_REFUSED = [
    ("photo.png", WAYS),
    ("//example.com/a.png", WAYS),
    ("http:/example.com/a.png", WAYS),
    ("upload://nonsense", "names an upload that does not exist or has expired"),
    ("upload://" + "0" * 32, "names an upload that does not exist or has expired"),
    ("ftp://example.com/a.png", f"must begin with http:// or https:// and name a host. It {WAYS}."),
    ("https://example.com/" + "a" * 8192, "is a URL of more than 8192 characters"),
    ("data:image/png;base64,@@", "does not hold valid base64"),
    ("data:image/png;base64," + _BYTES + "\u00e9", "does not hold valid base64"),
    ("data:image/png,abc", "must be a data URI with base64"),
    ("data:" + "x" * 1000 + ";base64,AAAA", "must be a data URI with base64"),
    ("data:image/png;base64,aGVsbG8=", "is not a PNG, JPEG or WebP image"),
    ("aGVsbG8=", "is not a PNG, JPEG or WebP image"),
    ("\n", "is empty"),
    (_BYTES.replace("/", "_").replace("+", "-"), WAYS),
    (_base64(png(2, 2) + b"\0" * ((3 - len(png(2, 2))) % 3 + 1)).rstrip("="), WAYS),
    (_BYTES + "\u00e9", WAYS),
    (_BYTES + "://example.com/", WAYS),
]


def test_an_image_that_is_nothing_we_know_is_refused_and_never_repeated(client: TestClient, sql: Sql) -> None:
    for image, complaint in _REFUSED:
        response = client.post("/v2/images/upscale", json=body_of(image))
        assert (response.status_code, list(response.json()["details"])) == (400, [FIELD]), image
        assert complaint in response.json()["details"][FIELD][0]
        assert len(response.content) < 1000
    assert sql("SELECT count(*) FROM jobs")[0]["count"] == 0


def test_data_beyond_the_limit_is_refused(settings: Settings, key: str) -> None:
    limit = len(png(2, 2))
    with DocumentedClient(create_app(settings.model_copy(update={"max_input_bytes": limit}))) as client:
        client.headers["X-API-Key"] = key
        submit(client, _lines(png(2, 2), "\r\n"))
        for head, more in product(("", "data:image/png;base64,"), (1, limit)):
            response = client.post("/v2/images/upscale", json=body_of(head + _base64(png(2, 2) + b"\0" * more)))
            assert (response.status_code, response.json()["code"]) == (413, "payload_too_large")
    assert len(list((settings.storage_dir / "uploads").iterdir())) == 1


def test_a_url_of_ours_that_was_mangled_is_just_a_url(client: TestClient) -> None:
    for rest in ["//[", "//a]b", "//\uff03a/", "//\u2102\u2100/", "x?expires=9&signature=\u00e9", "?&&=%ff"]:
        response = client.post("/v2/images/upscale", json=body_of(f"http://testserver/v2/files/{rest}"))
        assert response.status_code in (202, 400)
