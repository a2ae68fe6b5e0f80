"""A bucket that answers badly, and what it is told: against a server that answers as the test says."""

import json
import threading
from collections.abc import Generator
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import anyio
import pytest
from botocore.credentials import RefreshableCredentials

from core.errors import DeploymentError, NotFound, StorageRefused, StorageUnavailable, UpscaledError
from core.storage import open_storage
from core.storage.s3 import S3Storage
from core.storage.s3_client import THREADS, translated
from tests.buckets import Pretender, open_pretender, refusal
from tests.storages import PART, chunks, later, open_s3, storage_settings
from tests.web import Reply, Seen

pytestmark = pytest.mark.anyio

KEY = f"uploads/{uuid4()}.png"


@pytest.fixture
def pretender() -> Generator[Pretender]:
    with open_pretender() as pretender:
        yield pretender


def _open(pretender: Pretender, attempts: int = 1, **given: Any) -> S3Storage:
    return open_s3(pretender.bucket, attempts, **given)


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (404, "NoSuchKey", NotFound),
        (503, "SlowDown", StorageUnavailable),
        (500, "InternalError", StorageUnavailable),
        (507, "InsufficientCapacity", StorageUnavailable),
        (429, "TooManyRequests", StorageUnavailable),
        (400, "RequestTimeout", StorageUnavailable),
        (409, "OperationAborted", StorageUnavailable),
        (404, "NoSuchBucket", StorageRefused),
        (403, "AccessDenied", StorageRefused),
        (403, "RequestTimeTooSkewed", StorageRefused),
        (400, "AuthorizationHeaderMalformed", StorageRefused),
        (400, "ExpiredToken", StorageRefused),
        (501, "NotImplemented", StorageRefused),
    ],
)
async def test_answers_are_sorted_by_who_can_mend_them(
    pretender: Pretender, status: int, code: str, kind: type[UpscaledError]
) -> None:
    pretender.answer = lambda _seen: refusal(status, code)
    with pytest.raises(UpscaledError) as raised:
        await _open(pretender).read(KEY)
    assert type(raised.value) is kind


@pytest.mark.parametrize(
    "reply",
    [
        Reply(502, b"<html>Bad Gateway", {"Content-Type": "text/html"}),
        Reply(200, b"too short", {"Content-Length": "100"}),
    ],
    ids=["a proxy's page", "a body that breaks off"],
)
async def test_what_is_no_whole_answer_counts_as_none(pretender: Pretender, reply: Reply) -> None:
    pretender.answer = lambda _seen: reply
    with pytest.raises(StorageUnavailable):
        await _open(pretender).read(KEY)


async def test_somebody_elses_page_counts_as_no_answer_although_it_says_200(pretender: Pretender) -> None:
    pretender.answer = lambda _seen: Reply(200, b"<html>Please log in", {"Content-Type": "text/html"})
    with pytest.raises(StorageUnavailable):
        await _open(pretender).write(KEY, chunks(bytes(PART + 1)))


async def test_what_passes_is_asked_again_at_once(pretender: Pretender) -> None:
    answers = iter([refusal(503, "SlowDown"), Reply(200, b"picture", {"ETag": '"tag"'})])
    pretender.answer = lambda _seen: next(answers)
    assert await _open(pretender, attempts=2).read(KEY) == b"picture"


async def test_what_fits_into_one_part_is_put_by_one_request(pretender: Pretender) -> None:
    await _open(pretender).write(KEY, chunks(bytes(PART - 1), b"x"))
    [seen] = pretender.seen
    assert (seen.method, seen.path) == ("PUT", f"/{pretender.bucket.name}/{KEY}")
    assert len(seen.body) == PART


@pytest.mark.parametrize("failing", ["a part", "the end"])
async def test_parts_that_were_sent_are_taken_away_when_a_later_request_fails(
    pretender: Pretender, failing: str
) -> None:
    def answer(seen: Seen) -> Reply:
        query = parse_qs(urlsplit(seen.path).query, keep_blank_values=True)
        if "uploads" in query:
            return Reply(200, b"<InitiateMultipartUploadResult><UploadId>it</UploadId></InitiateMultipartUploadResult>")
        if seen.method == "DELETE":
            return Reply(204)
        fails = query.get("partNumber") == ["2"] if failing == "a part" else seen.method == "POST"
        return refusal(503, "SlowDown") if fails else Reply(200, b"", {"ETag": '"tag"'})

    pretender.answer = answer
    storage = _open(pretender)
    with pytest.raises(StorageUnavailable):
        await storage.write(KEY, chunks(bytes(PART + 1)))
    [taken_away] = [seen.path for seen in pretender.seen if seen.method == "DELETE"]
    assert taken_away.endswith(f"/{KEY}?uploadId=it")


async def test_a_bucket_that_hangs_keeps_no_other_work_from_getting_a_thread(pretender: Pretender) -> None:
    release = threading.Event()
    pretender.answer = lambda _seen: Reply(200, b"picture", before=lambda: release.wait(30))
    storage = _open(pretender)
    async with anyio.create_task_group() as tasks:
        for _ in range(2 * THREADS):
            tasks.start_soon(storage.read, KEY)
        with anyio.fail_after(20):
            while len(pretender.seen) < THREADS:  # noqa: ASYNC110 - threads make it grow
                await anyio.sleep(0.01)
            await anyio.to_thread.run_sync(int)
        assert len(pretender.seen) == THREADS
        release.set()
    assert len(pretender.seen) == 2 * THREADS


ENCRYPTIONS: list[tuple[dict[str, str], dict[str, str]]] = [
    ({"s3_encryption": "AES256"}, {"x-amz-server-side-encryption": "AES256"}),
    (
        {"s3_encryption": "aws:kms", "s3_kms_key_id": "the-key"},
        {"x-amz-server-side-encryption": "aws:kms", "x-amz-server-side-encryption-aws-kms-key-id": "the-key"},
    ),
    ({}, {}),
]


@pytest.mark.parametrize(("given", "headers"), ENCRYPTIONS, ids=["AES256", "aws:kms", "none"])
async def test_the_bucket_is_asked_to_encrypt_what_it_is_given(
    pretender: Pretender, given: dict[str, Any], headers: dict[str, str]
) -> None:
    storage = _open(pretender, **given)

    def asked(seen: Seen) -> dict[str, str]:
        return {name.lower(): value for name, value in seen.headers.items() if "encryption" in name.lower()}

    await storage.write(KEY, chunks(b"picture"))
    assert asked(pretender.seen[-1]) == headers
    pretender.answer = lambda _seen: Reply(200, b"<Result><UploadId>it</UploadId></Result>", {"ETag": '"tag"'})
    await storage.write(KEY, chunks(bytes(PART + 1)))
    [begun] = [seen for seen in pretender.seen if seen.path.endswith("?uploads")]
    assert asked(begun) == headers
    promise = await storage.sign_put(KEY, "image/png", 8, later())
    assert headers.items() <= promise.headers.items()
    assert set(headers) <= set(parse_qs(promise.url)["X-Amz-SignedHeaders"][0].split(";"))


@pytest.mark.parametrize(
    ("key", "disposition"), [(KEY, "attachment"), (f"results/{uuid4()}/1.png", "inline")], ids=["upload", "result"]
)
async def test_the_bucket_is_told_what_an_object_is_and_how_to_show_it(
    pretender: Pretender, key: str, disposition: str
) -> None:
    await _open(pretender).write(key, chunks(b"picture"))
    headers = pretender.seen[-1].headers
    assert headers["Content-Type"] == "image/png"
    assert headers["Content-Disposition"] == disposition
    assert headers["Cache-Control"] == "private, max-age=3600, immutable"


@pytest.mark.parametrize(("checksums", "sent"), [("when_required", False), ("when_supported", True)])
async def test_checksums_that_not_every_server_knows_are_sent_on_request_only(
    pretender: Pretender, checksums: str, sent: bool
) -> None:
    await _open(pretender, s3_checksums=checksums).write(KEY, chunks(b"picture"))
    assert any("checksum" in name.lower() for name in pretender.seen[-1].headers) is sent
    assert pretender.seen[-1].headers["Authorization"].startswith("AWS4-HMAC-SHA256 ")


async def test_credentials_of_a_role_are_renewed_beside_other_work(
    pretender: Pretender, monkeypatch: pytest.MonkeyPatch
) -> None:
    renewing, ticked, opened = threading.Event(), threading.Event(), False

    def answer(_seen: Seen) -> Reply:
        role = {
            "AccessKeyId": "role",
            "SecretAccessKey": "a secret of nobody",
            "Token": "new" if opened else "old",
            "Expiration": later(3600 if opened else 60).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        if opened:
            renewing.set()
            assert ticked.wait(1.5)  # what comes from the event loop while this request is under way
        return Reply(200, json.dumps(role).encode())

    pretender.answer = answer
    for name, value in _NOBODY.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", pretender.bucket.endpoint + "/role")
    storage = S3Storage(storage_settings(s3_bucket="pictures", s3_endpoint=pretender.bucket.endpoint))
    opened = True
    urls: list[str] = []

    async def make_url() -> None:
        urls.append(await storage.url(KEY, later()))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(make_url)
        while not renewing.is_set():  # noqa: ASYNC110 - a thread sets it
            await anyio.sleep(0.01)
        ticked.set()
    assert parse_qs(urlsplit(urls[0]).query)["X-Amz-Security-Token"] == ["new"]
    assert await storage.key_of(urls[0]) == KEY


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"s3_secret_access_key": ""}, "UPSCALED_S3_SECRET_ACCESS_KEY"),
        ({"s3_access_key_id": ""}, "UPSCALED_S3_ACCESS_KEY_ID"),
        ({"s3_kms_key_id": "the-key"}, "UPSCALED_S3_KMS_KEY_ID"),
        ({"s3_kms_key_id": "the-key", "s3_encryption": "AES256"}, "UPSCALED_S3_KMS_KEY_ID"),
        ({"s3_bucket": "no such name"}, "UPSCALED_S3_"),
        ({"s3_bucket": ""}, "UPSCALED_S3_ENDPOINT"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_at_the_start(given: dict[str, Any], named: str) -> None:
    pretender = Pretender(1)
    with pytest.raises(DeploymentError, match=named) as raised:
        open_storage(storage_settings(**{**pretender.bucket.settings(), **given}))
    assert pretender.bucket.secret_access_key not in str(raised.value)


_NOBODY = {
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    "AWS_CONFIG_FILE": "/dev/null",
}
"""An environment in which boto3 finds no credentials."""


def test_a_bucket_without_credentials_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in _NOBODY.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DeploymentError, match="no credentials"):
        open_storage(storage_settings(s3_bucket="pictures"))


def test_credentials_of_a_role_that_come_too_old_are_waited_for() -> None:
    spent = {"access_key": "a", "secret_key": "b", "token": "c", "expiry_time": "2020-01-01T00:00:00Z"}
    credentials = RefreshableCredentials.create_from_metadata(spent, refresh_using=lambda: spent, method="role")
    with pytest.raises(StorageUnavailable), translated():
        credentials.get_frozen_credentials()


def test_a_bug_is_not_taken_for_a_bucket_that_is_away() -> None:
    with pytest.raises(RuntimeError), translated():
        raise RuntimeError("no bucket's fault")
