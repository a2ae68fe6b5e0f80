"""What a storage promises, held against a local folder and a real bucket, and what only a bucket does.

TEST_S3_ENDPOINT and its like (tests/buckets.py) name another server than rclone's. Nothing here depends on which it is:
where servers differ, a comment says so.
"""

import asyncio
import hashlib
import re
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import anyio
import httpx2 as httpx
import pytest
from botocore.credentials import ReadOnlyCredentials
from pydantic import SecretStr
from starlette.testclient import TestClient

from core import progress
from core.errors import InputTooLarge, NotFound, StorageRefused, StorageUnavailable, UpscaledError
from core.queue import Hints
from core.settings import Settings, load_settings
from core.storage import LocalStorage, ObjectHead, Storage, open_storage
from core.storage.presigning import MAX_SECONDS, Presigner
from core.storage.s3 import WINDOW_SECONDS, S3Storage
from db.session import Database
from tests.buckets import Bucket, begun_uploads, empty, names, open_bucket
from tests.requests import png, submit, upload
from tests.web import Web
from worker.sweeps import Sweeper

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

pytestmark = pytest.mark.anyio

PART = 5 * 1024 * 1024
"""The smallest part that every S3 takes."""

FOREIGN_KEYS = [
    "",
    "/etc/passwd",
    "uploads/../../secret.png",
    "uploads/00000000-0000-0000-0000-000000000000.html",
    "elsewhere/00000000-0000-0000-0000-000000000000.png",
    "results/00000000-0000-0000-0000-000000000000/1.png\n",
    "results/a caller's own words/1.png",
]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Generator[Bucket]:
    with open_bucket(tmp_path_factory.mktemp("bucket") / "served") as bucket:
        yield bucket


@pytest.fixture(scope="module")
def past_us(bucket: Bucket) -> "S3Client":
    """A client of the bucket that is none of ours."""
    return bucket.client()


@pytest.fixture(scope="module")
def prefix() -> str:
    """A place of our own in the bucket."""
    return f"tests/{uuid4()}/"


@pytest.fixture(scope="module")
def opened(bucket: Bucket, prefix: str) -> S3Storage:
    return _s3(bucket, prefix)


def _settings(**given: Any) -> Settings:
    """Return settings for a storage, which needs no database."""
    return load_settings(
        database_url="postgresql://nowhere/none",
        redis_url="redis://nowhere",
        secret_key="a secret of thirty-two characters",
        **given,
    )


def _s3(bucket: Bucket, prefix: str, **given: Any) -> S3Storage:
    settings = _settings(**{**bucket.settings(prefix), **given})
    return S3Storage(settings, multipart_bytes=PART, part_bytes=PART, attempts=2)


@pytest.fixture
def s3(opened: S3Storage, past_us: "S3Client", bucket: Bucket, prefix: str) -> Generator[S3Storage]:
    """A storage in the bucket: empty, and emptied again."""
    yield opened
    empty(past_us, bucket.name, prefix)


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "bucket":
        return request.getfixturevalue("s3")
    return open_storage(_settings(storage_dir=tmp_path))


@pytest.fixture
def left(request: pytest.FixtureRequest, storage: Storage, tmp_path: Path) -> Callable[[], Sequence[object]]:
    """List all that the storage holds now: objects, and what was begun."""

    def look() -> Sequence[object]:
        if isinstance(storage, LocalStorage):
            return _files(tmp_path)
        place = request.getfixturevalue("past_us"), request.getfixturevalue("bucket").name
        prefix = request.getfixturevalue("prefix")
        return [*names(*place, prefix), *begun_uploads(*place, prefix)]

    return look


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _result() -> str:
    return f"results/{uuid4()}/1.png"


def _upload() -> str:
    return f"uploads/{uuid4()}.png"


def _later(seconds: float = 60) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


async def _chunks(*sizes: int, error: Exception | None = None) -> AsyncGenerator[bytes]:
    for number, size in enumerate(sizes):
        yield bytes([number % 256]) * size
    if error is not None:
        raise error


async def test_what_is_written_can_be_read_looked_at_and_deleted(storage: Storage) -> None:
    key, data = _result(), bytes(range(256)) * 100
    await storage.write(key, data)
    assert await storage.read(key) == data
    assert await storage.look(key) == ObjectHead(25_600, data[:12])
    await storage.delete(key)
    with pytest.raises(NotFound):
        await storage.read(key)


async def test_what_is_not_there_cannot_be_read_but_may_be_deleted(storage: Storage) -> None:
    with pytest.raises(NotFound):
        await storage.read(_upload())
    with pytest.raises(NotFound):
        await storage.look(_upload())
    await storage.delete(_upload())


async def test_a_second_writing_replaces_the_first(storage: Storage) -> None:
    key = _upload()
    await storage.write(key, b"a long first writing")
    await storage.write(key, b"short")
    assert await storage.read(key) == b"short"


@pytest.mark.parametrize("data", [b"", b"few"])
async def test_an_object_shorter_than_what_is_looked_at_is_seen_whole(storage: Storage, data: bytes) -> None:
    key = _upload()
    await storage.write(key, data)
    assert await storage.look(key) == ObjectHead(len(data), data)
    assert await storage.read(key) == data


async def test_no_more_is_read_than_is_allowed(storage: Storage) -> None:
    key = _upload()
    await storage.write(key, bytes(100))
    assert len(await storage.read(key, max_bytes=100)) == 100
    with pytest.raises(InputTooLarge):
        await storage.read(key, max_bytes=99)


@pytest.mark.parametrize(
    "sizes",
    [(), (10,), (PART,), (PART - 1, 1, 1), (2 * PART + 1,), (PART // 3,) * 7],
    ids=["nothing", "little", "one part", "a byte more", "parts at once", "chunks beside parts"],
)
async def test_a_stream_is_stored_as_it_came(
    storage: Storage, left: Callable[[], Sequence[object]], sizes: tuple[int, ...]
) -> None:
    key = _upload()
    await storage.write_stream(key, _chunks(*sizes))
    whole = b"".join([chunk async for chunk in _chunks(*sizes)])
    assert hashlib.sha256(await storage.read(key)).digest() == hashlib.sha256(whole).digest()
    assert len(left()) == 1


@pytest.mark.parametrize("sizes", [(10,), (PART, PART, 10)], ids=["early", "after parts were sent"])
async def test_of_a_stream_that_fails_nothing_is_left_and_its_own_error_comes_out(
    storage: Storage, left: Callable[[], Sequence[object]], sizes: tuple[int, ...]
) -> None:
    with pytest.raises(ConnectionResetError, match="the caller"):
        await storage.write_stream(_upload(), _chunks(*sizes, error=ConnectionResetError("the caller hung up")))
    assert left() == []


async def test_a_stream_that_fails_leaves_what_was_there_before(storage: Storage) -> None:
    key = _upload()
    await storage.write(key, b"before")
    with pytest.raises(ValueError, match="bad"):
        await storage.write_stream(key, _chunks(PART, PART, error=ValueError("bad")))
    assert await storage.read(key) == b"before"


async def test_of_a_stream_whose_task_is_cancelled_nothing_is_left(
    storage: Storage, left: Callable[[], Sequence[object]]
) -> None:
    stuck = anyio.Event()

    async def chunks() -> AsyncGenerator[bytes]:
        yield bytes(2 * PART)
        stuck.set()
        await anyio.sleep_forever()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(storage.write_stream, _upload(), chunks())
        await stuck.wait()
        assert len(left()) == 1  # it was on its way
        tasks.cancel_scope.cancel()
    assert left() == []


@pytest.mark.parametrize("key", FOREIGN_KEYS)
async def test_a_key_that_is_not_of_our_making_names_nothing(
    storage: Storage, left: Callable[[], Sequence[object]], key: str
) -> None:
    with pytest.raises(NotFound):
        await storage.write(key, b"x")
    with pytest.raises(NotFound):
        await storage.write_stream(key, _chunks(1))
    with pytest.raises(NotFound):
        await storage.read(key)
    with pytest.raises(NotFound):
        await storage.delete(key)
    with pytest.raises(NotFound):
        await storage.sign_put(key, "image/png", 1, _later())
    assert left() == []


async def test_a_url_of_ours_is_known_again_and_no_other(storage: Storage) -> None:
    key = _result()
    url = await storage.url(key, _later())
    assert await storage.key_of(url) == key
    altered = [
        url.replace(key, _result()),
        url.partition("?")[0],
        url[:-1] + ("0" if url[-1] != "0" else "1"),
        url.replace("xpires=", "xpires=9"),
        url.replace("://", "://evil.example/"),
        url.replace("/results/", "/../results/"),
        url + "ü",
        "https://example.com/a.png",
        "",
    ]
    assert [await storage.key_of(other) for other in altered] == [None] * len(altered)
    promise = await storage.sign_put(_upload(), "image/png", 1, _later())
    assert await storage.key_of(promise.url) is None


@pytest.mark.parametrize("date", ["99991231T235959Z", "00010101T000000Z", "20260230T000000Z", "x", ""])
async def test_a_url_with_a_date_that_cannot_be_is_not_known(s3: S3Storage, date: str) -> None:
    url = await s3.url(_upload(), _later())
    url = re.sub("X-Amz-Date=[^&]*", f"X-Amz-Date={date}", url)
    url = re.sub("X-Amz-Expires=[^&]*", f"X-Amz-Expires={MAX_SECONDS}", url)
    assert await s3.key_of(url) is None


async def test_a_url_of_ours_that_has_expired_is_not_known(storage: Storage) -> None:
    assert await storage.key_of(await storage.url(_result(), _later(-1))) is None


async def test_an_object_has_the_same_url_for_some_time(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    key, expires_at = _result(), _later(3600)
    urls = {await storage.url(key, expires_at)}
    await anyio.sleep(1.1)  # signatures know whole seconds
    urls.add(await storage.url(key, expires_at))
    if datetime.now(UTC).timestamp() % WINDOW_SECONDS > 5:  # or a window has just ended
        assert len(urls) == 1
    assert await storage.url(key, _later(1800)) not in urls


@pytest.mark.parametrize("streamed", [True, False])
async def test_what_a_folder_could_not_take_leaves_nothing_in_it(tmp_path: Path, streamed: bool) -> None:
    key, storage = _upload(), open_storage(_settings(storage_dir=tmp_path))
    (tmp_path / key).mkdir(parents=True)  # a place that no file can take
    with pytest.raises(StorageUnavailable):
        await (storage.write_stream(key, _chunks(10)) if streamed else storage.write(key, bytes(10)))
    assert _files(tmp_path) == []


# What only a bucket does.


def _get(url: str) -> httpx.Response:
    return httpx.get(url, trust_env=False)


def _put(url: str, data: bytes, headers: Any) -> httpx.Response:
    return httpx.put(url, content=data, headers=headers, trust_env=False)


async def test_a_large_result_goes_in_parts_and_comes_out_whole(s3: S3Storage) -> None:
    key, data = _result(), bytes(range(250)) * (2 * PART // 250 + 1)
    await s3.write(key, data)
    assert await s3.read(key) == data
    assert await s3.look(key) == ObjectHead(len(data), data[:12])


@pytest.mark.parametrize("size", [10, PART + 1], ids=["whole", "in parts"])
async def test_whoever_reads_an_object_is_told_a_type_of_ours_and_how_to_keep_it(s3: S3Storage, size: int) -> None:
    key = f"results/{uuid4()}/1.webp"
    await s3.write(key, bytes(size))
    headers = _get(await s3.url(key, _later())).headers
    assert headers["Content-Type"] == "image/webp"
    assert headers["Content-Disposition"] == "inline"
    assert headers["Cache-Control"] == "private, max-age=3600, immutable"


async def test_the_prefix_stands_before_every_key(
    s3: S3Storage, past_us: "S3Client", bucket: Bucket, prefix: str
) -> None:
    upload, streamed, large = _upload(), _upload(), _result()
    await s3.write(upload, b"x")
    await s3.write_stream(streamed, _chunks(PART, 1))
    await s3.write(large, bytes(PART + 1))
    assert sorted(names(past_us, bucket.name, prefix)) == sorted(prefix + key for key in (upload, streamed, large))
    assert f"/{bucket.name}/{prefix}{large}?" in await s3.url(large, _later())


async def test_a_url_lets_anyone_read_at_the_public_endpoint_until_it_expires(s3: S3Storage, bucket: Bucket) -> None:
    key = _result()
    await s3.write(key, b"picture")
    url = await s3.url(key, _later(2))
    assert url.startswith(bucket.public_endpoint or bucket.endpoint)
    assert _get(url).content == b"picture"
    await anyio.sleep(2.1)
    assert _get(url).status_code in (400, 403)  # 403 everywhere but with rclone


async def test_urls_at_the_end_of_their_window_can_still_be_read(s3: S3Storage, bucket: Bucket, prefix: str) -> None:
    key = _result()
    await s3.write(key, b"picture")
    credentials = ReadOnlyCredentials(bucket.access_key_id, bucket.secret_access_key, None)
    presigner = Presigner(f"{bucket.endpoint}/{bucket.name}/{prefix}", bucket.region)
    began = datetime.now(UTC) - timedelta(seconds=WINDOW_SECONDS)
    assert _get(presigner.sign(credentials, "GET", key, as_of=began, until=_later())).content == b"picture"


async def test_what_somebody_else_signed_with_our_credentials_is_no_url_of_ours(
    s3: S3Storage, bucket: Bucket, prefix: str
) -> None:
    credentials = ReadOnlyCredentials(bucket.access_key_id, bucket.secret_access_key, None)
    presigner = Presigner(f"{bucket.public_endpoint or bucket.endpoint}/{bucket.name}/{prefix}", bucket.region)
    now = datetime.now(UTC)
    ours, other = (presigner.sign(credentials, "GET", key, as_of=now, until=_later()) for key in (_upload(), "a.png"))
    assert await s3.key_of(ours) is not None
    assert await s3.key_of(other) is None


async def test_a_url_that_was_altered_reads_nothing(s3: S3Storage) -> None:
    key, other = _result(), _result()
    await s3.write(key, b"picture")
    await s3.write(other, b"another")
    url = await s3.url(key, _later(1000))
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
        query = parse_qs(urlsplit(await s3.url(_result(), _later(seconds))).query)
        began = datetime.strptime(query["X-Amz-Date"][0], "%Y%m%dT%H%M%S%z")
        assert 1 <= int(query["X-Amz-Expires"][0]) <= MAX_SECONDS
        return (began - datetime.now(UTC)).total_seconds() + int(query["X-Amz-Expires"][0])

    for asked in (-3600, -1, 0.5, 60, 3600):
        assert asked - 2 < await ends(asked) <= asked
    assert MAX_SECONDS - WINDOW_SECONDS - 2 < await ends(30 * 24 * 3600) <= MAX_SECONDS


async def test_a_promise_takes_exactly_the_size_and_type_that_it_names(s3: S3Storage) -> None:
    key, image = _upload(), b"12345678"
    promise = await s3.sign_put(key, "image/png", len(image), _later())
    signed = parse_qs(promise.url)["X-Amz-SignedHeaders"][0].split(";")
    assert {"content-length", "content-type", "host", "if-none-match"} <= set(signed)

    headers = {name: value for name, value in promise.headers.items() if name != "Content-Length"}
    refused = [
        _put(promise.url, b"1234567", headers),
        _put(promise.url, b"123456789", headers),
        _put(promise.url, image, {**headers, "Content-Type": "text/html"}),
        _put(promise.url, image, {"Content-Type": "image/png"}),  # which would overwrite
        _put(promise.url.replace(key, _upload()), image, headers),
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
    promise = await s3.sign_put(_upload(), "image/png", 1, _later(-1))
    assert _put(promise.url, b"x", promise.headers).status_code in (400, 403)


async def test_a_url_to_read_lets_nothing_be_put(s3: S3Storage) -> None:
    assert _put(await s3.url(_upload(), _later()), b"x", {}).status_code == 403


async def _faults(storage: Storage) -> list[UpscaledError]:
    """Return what each of the storage's requests raises."""
    faults: list[UpscaledError] = []
    key = _upload()
    for act in (
        storage.read(key),
        storage.look(key),
        storage.write(key, b"x"),
        storage.write(key, bytes(PART + 1)),
        storage.write_stream(key, _chunks(PART, 1)),
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
    bucket: Bucket, prefix: str, caplog: pytest.LogCaptureFixture, wrong: dict[str, str], code: str
) -> None:
    faults = await _faults(_s3(replace(bucket, **wrong), prefix))
    # Deleting is tried again and again, so it may succeed once the operator has mended it.
    assert [type(fault) for fault in faults] == [StorageRefused] * 5 + [StorageUnavailable]
    assert {str(fault) for fault in faults} == {
        "The storage refuses this service: whoever runs it has to mend its settings."
    }
    assert all(code in record.getMessage() for record in caplog.records if record.levelname == "ERROR")
    assert bucket.secret_access_key not in caplog.text


async def test_a_bucket_that_cannot_be_reached_may_be_there_later(bucket: Bucket, prefix: str) -> None:
    faults = await _faults(_s3(bucket, prefix, s3_endpoint="http://127.0.0.1:1"))
    assert [type(fault) for fault in faults] == [StorageUnavailable] * 6
    assert {str(fault) for fault in faults} == {"The storage could not be reached."}


# The whole service on a bucket.


@pytest.fixture
def settings(settings: Settings, bucket: Bucket, s3: S3Storage, prefix: str) -> Settings:
    given = bucket.settings(prefix)
    return settings.model_copy(update={**given, "s3_secret_access_key": SecretStr(given["s3_secret_access_key"])})


async def _sweep(settings: Settings) -> None:
    database, redis, hints = Database(settings), progress.connect(settings), Hints(settings)
    try:
        await Sweeper(settings, database, redis, hints, open_storage(settings)).purge()
    finally:
        hints.close()
        await redis.aclose()
        await database.close()


def _names(bucket: Bucket, prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in names(bucket.client(), bucket.name, prefix)]


def test_a_picture_goes_through_the_bucket_and_is_swept_out_of_it(
    settings: Settings,
    client: TestClient,
    work: Callable[[], int],
    sql: Callable[..., Any],
    bucket: Bucket,
    prefix: str,
) -> None:
    job_id = submit(client, upload(client, png(8, 8)))
    assert work() == 1
    answer = client.get(f"/v2/jobs/{job_id}")
    [url] = answer.json()["result"]["images"]
    assert _get(url).content.startswith(b"\x89PNG")
    assert client.get(f"/v2/jobs/{job_id}").headers["ETag"] == answer.headers["ETag"]
    assert f"results/{job_id}/1.png" in _names(bucket, prefix)

    # A result of ours is taken from the bucket, whoever can reach that.
    again = submit(client, url)
    assert sql("SELECT image_key FROM jobs WHERE id = $1", again)[0][0] == f"results/{job_id}/1.png"
    assert work() == 1

    sql("UPDATE jobs SET purge_at = now()")
    sql("UPDATE uploads SET expires_at = now() - interval '1 day'")
    asyncio.run(_sweep(settings))
    assert _names(bucket, prefix) == []
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


def test_who_has_no_bucket_does_not_load_boto3() -> None:
    code = "import sys, core.storage; print([name for name in sys.modules if name.startswith('boto')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
