"""What only a bucket does, and the whole service on one.

TEST_S3_ENDPOINT and its like (tests/buckets.py) name another server than rclone's. Nothing here depends on which it is:
where servers differ, a comment says so.
"""

import asyncio
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import anyio
import httpx2 as httpx
import pytest
from botocore.credentials import ReadOnlyCredentials
from pydantic import SecretStr
from starlette.testclient import TestClient

from core import progress
from core.errors import NotFound, StorageRefused, StorageUnavailable, UpscaledError
from core.queue import Hints
from core.settings import Settings
from core.storage import Storage, open_storage
from core.storage.presigning import MAX_SECONDS, Presigner
from core.storage.s3 import WINDOW_SECONDS, S3Storage
from db.session import Database
from tests.buckets import Bucket
from tests.requests import png, submit, upload
from tests.storages import PART, chunks, later, open_s3, some_result, some_upload
from tests.web import Web
from worker.sweeps import Sweeper

pytestmark = pytest.mark.anyio


def _get(url: str) -> httpx.Response:
    return httpx.get(url, trust_env=False)


def _put(url: str, data: bytes, headers: Any) -> httpx.Response:
    return httpx.put(url, content=data, headers=headers, trust_env=False)


@pytest.mark.parametrize("size", [10, PART + 1], ids=["whole", "in parts"])
async def test_whoever_reads_an_object_is_told_a_type_of_ours_and_how_to_keep_it(s3: S3Storage, size: int) -> None:
    key = f"results/{uuid4()}/1.webp"
    await s3.write(key, chunks(bytes(size)))
    headers = _get(await s3.url(key, later())).headers
    assert headers["Content-Type"] == "image/webp"
    assert headers["Content-Disposition"] == "inline"
    assert headers["Cache-Control"] == "private, max-age=3600, immutable"


async def test_the_prefix_stands_before_every_key(s3: S3Storage, bucket: Bucket) -> None:
    upload, large = some_upload(), some_result()
    await s3.write(upload, chunks(b"x"))
    await s3.write(large, chunks(bytes(PART + 1)))
    assert sorted(bucket.names()) == sorted([upload, large])
    assert f"/{bucket.name}/{bucket.prefix}{large}?" in await s3.url(large, later())


async def test_a_url_lets_anyone_read_at_the_public_endpoint_until_it_expires(s3: S3Storage, bucket: Bucket) -> None:
    key = some_result()
    await s3.write(key, chunks(b"picture"))
    url = await s3.url(key, later(2))
    assert url.startswith(bucket.public_endpoint or bucket.endpoint)
    assert _get(url).content == b"picture"
    await anyio.sleep(2.1)
    assert _get(url).status_code in (400, 403)  # 403 everywhere but with rclone


async def test_urls_at_the_end_of_their_window_can_still_be_read(s3: S3Storage, bucket: Bucket) -> None:
    key = some_result()
    await s3.write(key, chunks(b"picture"))
    credentials = ReadOnlyCredentials(bucket.access_key_id, bucket.secret_access_key, None)
    presigner = Presigner(f"{bucket.endpoint}/{bucket.name}/{bucket.prefix}", bucket.region)
    began = datetime.now(UTC) - timedelta(seconds=WINDOW_SECONDS)
    assert _get(presigner.sign(credentials, "GET", key, as_of=began, until=later())).content == b"picture"


@pytest.mark.parametrize("date", ["99991231T235959Z", "00010101T000000Z", "20260230T000000Z", "x", ""])
async def test_a_url_with_a_date_that_cannot_be_is_not_known(s3: S3Storage, date: str) -> None:
    url = await s3.url(some_upload(), later())
    url = re.sub("X-Amz-Date=[^&]*", f"X-Amz-Date={date}", url)
    url = re.sub("X-Amz-Expires=[^&]*", f"X-Amz-Expires={MAX_SECONDS}", url)
    assert await s3.key_of(url) is None


async def test_what_somebody_else_signed_with_our_credentials_is_no_url_of_ours(s3: S3Storage, bucket: Bucket) -> None:
    credentials = ReadOnlyCredentials(bucket.access_key_id, bucket.secret_access_key, None)
    presigner = Presigner(f"{bucket.public_endpoint or bucket.endpoint}/{bucket.name}/{bucket.prefix}", bucket.region)
    now = datetime.now(UTC)
    ours, other = (
        presigner.sign(credentials, "GET", key, as_of=now, until=later()) for key in (some_upload(), "a.png")
    )
    assert await s3.key_of(ours) is not None
    assert await s3.key_of(other) is None


async def test_a_url_that_was_altered_reads_nothing(s3: S3Storage) -> None:
    key, other = some_result(), some_result()
    await s3.write(key, chunks(b"picture"))
    await s3.write(other, chunks(b"another"))
    url = await s3.url(key, later(1000))
    altered = [
        url.replace(key, other),
        url.replace("Expires=1", "Expires=2"),
        url.replace("Signature=", "Signature=0"),
        url.partition("?")[0],
    ]
    assert url not in altered
    # Without any signature Ceph and Amazon say 403, rclone 400.
    assert {_get(other).status_code for other in altered} <= {400, 403}


async def test_a_url_never_outlives_what_s3_allows_nor_what_was_asked_for(s3: S3Storage) -> None:
    async def ends(seconds: float) -> float:
        query = parse_qs(urlsplit(await s3.url(some_result(), later(seconds))).query)
        began = datetime.strptime(query["X-Amz-Date"][0], "%Y%m%dT%H%M%S%z")
        assert 1 <= int(query["X-Amz-Expires"][0]) <= MAX_SECONDS
        return (began - datetime.now(UTC)).total_seconds() + int(query["X-Amz-Expires"][0])

    for asked in (-3600, -1, 0.5, 60, 3600):
        assert asked - 2 < await ends(asked) <= asked
    assert MAX_SECONDS - WINDOW_SECONDS - 2 < await ends(30 * 24 * 3600) <= MAX_SECONDS


async def test_a_promise_takes_exactly_the_size_and_type_that_it_names(s3: S3Storage) -> None:
    key, image = some_upload(), b"12345678"
    promise = await s3.sign_put(key, "image/png", len(image), later())
    signed = parse_qs(promise.url)["X-Amz-SignedHeaders"][0].split(";")
    assert {"content-length", "content-type", "host", "if-none-match"} <= set(signed)

    headers = {name: value for name, value in promise.headers.items() if name != "Content-Length"}
    refused = [
        _put(promise.url, b"1234567", headers),
        _put(promise.url, b"123456789", headers),
        _put(promise.url, image, {**headers, "Content-Type": "text/html"}),
        _put(promise.url, image, {"Content-Type": "image/png"}),  # which would overwrite
        _put(promise.url.replace(key, some_upload()), image, headers),
        _get(promise.url),
    ]
    assert [response.status_code for response in refused] == [403] * len(refused)
    with pytest.raises(NotFound):
        await s3.look(key)

    assert _put(promise.url, image, promise.headers).status_code == 200
    assert await s3.read(key) == image
    again = _put(promise.url, b"87654321", promise.headers)
    # rclone does not know If-None-Match, and overwrites.
    assert again.status_code == 200 or (again.status_code == 412 and await s3.read(key) == image)


async def test_a_promise_ends(s3: S3Storage) -> None:
    promise = await s3.sign_put(some_upload(), "image/png", 1, later(-1))
    assert _put(promise.url, b"x", promise.headers).status_code in (400, 403)


async def test_a_url_to_read_lets_nothing_be_put(s3: S3Storage) -> None:
    assert _put(await s3.url(some_upload(), later()), b"x", {}).status_code == 403


async def _faults(storage: Storage) -> list[UpscaledError]:
    """Return what each of the storage's requests raises."""
    faults: list[UpscaledError] = []
    key = some_upload()
    for act in (
        storage.read(key),
        storage.look(key),
        storage.write(key, chunks(b"x")),
        storage.write(key, chunks(bytes(PART + 1))),
        storage.delete(key),
    ):
        try:
            await act
        except UpscaledError as error:
            faults.append(error)
    return faults


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"secret_access_key": "another secret"}, "SignatureDoesNotMatch"),
        ({"access_key_id": "nobody-we-know"}, "InvalidAccessKeyId"),
        ({"name": "no-such-bucket-of-ours"}, "NoSuchBucket"),
    ],
    ids=["secret", "access key", "bucket"],
)
async def test_a_bucket_that_refuses_is_the_operators_business_and_callers_learn_no_address(
    bucket: Bucket, caplog: pytest.LogCaptureFixture, wrong: dict[str, str], code: str
) -> None:
    faults = await _faults(open_s3(replace(bucket, **wrong)))
    # Deleting is tried again and again, so it may succeed once the operator has mended it.
    assert [type(fault) for fault in faults] == [StorageRefused] * 4 + [StorageUnavailable]
    assert {str(fault) for fault in faults} == {
        "The storage refuses this service: whoever runs it has to mend its settings."
    }
    assert all(code in record.getMessage() for record in caplog.records if record.levelname == "ERROR")
    assert bucket.secret_access_key not in caplog.text


async def test_a_bucket_that_cannot_be_reached_may_be_there_later(bucket: Bucket) -> None:
    faults = await _faults(open_s3(bucket, s3_endpoint="http://127.0.0.1:1"))
    assert [type(fault) for fault in faults] == [StorageUnavailable] * 5
    assert {str(fault) for fault in faults} == {"The storage could not be reached."}


# The whole service on a bucket.


@pytest.fixture
def settings(settings: Settings, bucket: Bucket, s3: S3Storage) -> Settings:
    given = bucket.settings()
    return settings.model_copy(update={**given, "s3_secret_access_key": SecretStr(given["s3_secret_access_key"])})


async def _sweep(settings: Settings) -> None:
    database, redis, hints = Database(settings), progress.connect(settings), Hints(settings)
    try:
        await Sweeper(settings, database, redis, hints, open_storage(settings)).purge()
    finally:
        hints.close()
        await redis.aclose()
        await database.close()


def test_a_picture_goes_through_the_bucket_and_is_swept_out_of_it(
    settings: Settings,
    client: TestClient,
    work: Callable[[], int],
    sql: Callable[..., Any],
    bucket: Bucket,
) -> None:
    job_id = submit(client, upload(client, png(8, 8)))
    assert work() == 1
    answer = client.get(f"/v2/jobs/{job_id}")
    [url] = answer.json()["result"]["images"]
    assert _get(url).content.startswith(b"\x89PNG")
    assert client.get(f"/v2/jobs/{job_id}").headers["ETag"] == answer.headers["ETag"]
    assert f"results/{job_id}/1.png" in bucket.names()

    # A result of ours is taken from the bucket, whoever can reach that.
    again = submit(client, url)
    assert sql("SELECT image_key FROM jobs WHERE id = $1", again)[0][0] == f"results/{job_id}/1.png"
    assert work() == 1

    sql("UPDATE jobs SET purge_at = now()")
    sql("UPDATE uploads SET expires_at = now() - interval '1 day'")
    asyncio.run(_sweep(settings))
    assert bucket.names() == []
    assert _get(url).status_code == 404


class TestABucketThatRefuses:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"s3_bucket": "no-such-bucket-of-ours"})

    def test_an_upload_to_it_is_answered_without_a_word_of_where_it_is(
        self, client: TestClient, bucket: Bucket
    ) -> None:
        response = client.post("/v2/uploads", files={"file": png(8, 8)})
        assert (response.status_code, response.json()["code"]) == (500, "storage_refused")
        assert urlsplit(bucket.endpoint).netloc not in response.text
        assert "no-such-bucket" not in response.text

    def test_a_sweep_goes_on_and_tries_again_later(
        self, settings: Settings, client: TestClient, sql: Callable[..., Any]
    ) -> None:
        client.post("/v2/uploads", files={"file": png(8, 8)})
        sql("UPDATE uploads SET expires_at = now() - interval '1 day'")
        asyncio.run(_sweep(settings))
        assert [row["purged_at"] for row in sql("SELECT purged_at FROM uploads")] == [None]

    def test_a_job_whose_result_it_does_not_take_fails_at_once(
        self, client: TestClient, web: Web, work: Callable[[], int]
    ) -> None:
        job_id = submit(client, web.serve("/a.png", png(8, 8)))
        assert work() == 1
        job = client.get(f"/v2/jobs/{job_id}").json()
        assert (job["status"], job["errorCode"]) == ("FAILED", "storage_refused")
        assert job["error"] == "The storage refuses this service: whoever runs it has to mend its settings."
