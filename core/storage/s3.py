"""An S3 bucket, through boto3, which is synchronous: it runs in threads of its own.

Nothing but open_storage imports this module: boto3 is slow to import, and only who has a bucket pays for that.
"""

import logging
from collections.abc import AsyncIterable, Callable
from contextlib import aclosing, closing
from datetime import UTC, datetime
from functools import partial
from pathlib import PurePosixPath
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

import anyio
import anyio.to_thread
from botocore.credentials import ReadOnlyCredentials, RefreshableCredentials
from botocore.exceptions import ClientError

from core import failpoints
from core.errors import InputTooLarge, NotFound, StorageRefused, StorageUnavailable
from core.settings import Settings
from core.storage.objects import (
    CACHE_CONTROL,
    CONTENT_TYPES,
    SNIFFED_BYTES,
    ObjectHead,
    SignedPut,
    check_key,
    gather,
    is_upload,
)
from core.storage.presigning import Presigner
from core.storage.s3_client import THREADS, connect, told, translated

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

WINDOW_SECONDS = 900
"""URLs are signed as of the beginning of such a time, so that the same one is handed out again and again in it."""

Arguments = TypeVarTuple("Arguments")
Value = TypeVar("Value")

logger = logging.getLogger(__name__)


class S3Storage:
    """A bucket. Callers read, and upload, by URLs that it honours itself.

    Args:
        part_bytes: what is longer is sent in parts of that size; S3 takes none under 5 MiB but the last.
        attempts: how often a request is made at most before the bucket counts as away.
    """

    def __init__(self, settings: Settings, *, part_bytes: int = 8 * 1024 * 1024, attempts: int = 3) -> None:
        bucket = connect(settings, attempts)
        self._client = bucket.client
        self._credentials = bucket.credentials
        self._presigner = Presigner(bucket.public_url, settings.s3_region)
        self._bucket = settings.s3_bucket
        self._prefix = settings.s3_prefix
        self._encryption = _encryption(settings)
        self._part_bytes = part_bytes
        self._limiter = anyio.CapacityLimiter(THREADS)  # a bucket that is slow keeps nobody else waiting for a thread

    async def write(self, key: str, chunks: AsyncIterable[bytes]) -> None:
        name, properties = self._name(key), self._properties(key)
        multipart: _Multipart | None = None
        held: bytes | None = None
        try:
            async with aclosing(gather(chunks, self._part_bytes)) as blocks:
                async for block in blocks:
                    if held is not None:  # or it may be all there is, and then it goes as a whole
                        if multipart is None:
                            multipart = _Multipart(self._client, self._bucket, name)
                            await self._run(multipart.begin, properties)
                        await self._run(multipart.send, held)
                    held = block
            if multipart is None:
                await self._run(self._put, name, properties, held or b"")
            else:
                await self._run(multipart.send, held or b"")
                await self._run(multipart.complete)
        except BaseException:  # a cancellation, too
            if multipart is not None:
                with anyio.CancelScope(shield=True):
                    await self._run(multipart.discard)
            raise

    def _put(self, name: str, properties: dict[str, Any], data: bytes) -> None:
        failpoints.reach("during_upload")
        self._client.put_object(Bucket=self._bucket, Key=name, Body=data, **properties)

    async def read(self, key: str, max_bytes: int | None = None) -> bytes:
        return await self._run(self._read, self._name(key), max_bytes)

    def _read(self, name: str, max_bytes: int | None) -> bytes:
        answer = self._client.get_object(Bucket=self._bucket, Key=name)
        with closing(answer["Body"]) as body:  # used as a context itself, it gives the raw stream
            if max_bytes is not None and answer["ContentLength"] > max_bytes:
                raise InputTooLarge(f"The image file is larger than {max_bytes} bytes.")
            return body.read()

    async def look(self, key: str) -> ObjectHead:
        return await self._run(self._look, self._name(key))

    def _look(self, name: str) -> ObjectHead:
        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=name, Range=f"bytes=0-{SNIFFED_BYTES - 1}")
        except ClientError as error:
            if told(error)[1] == "InvalidRange":  # of nothing there are no first bytes
                return ObjectHead(0, b"")
            raise
        with closing(answer["Body"]) as body:  # used as a context itself, it gives the raw stream
            whole = answer.get("ContentRange", "").rpartition("/")[2]
            return ObjectHead(int(whole or answer["ContentLength"]), body.read(SNIFFED_BYTES))

    async def delete(self, key: str) -> None:
        name = self._name(key)
        try:
            await self._run(partial(self._client.delete_object, Bucket=self._bucket, Key=name))
        except NotFound:
            pass
        except StorageRefused as error:
            # Whoever deletes comes again another day; by then the operator, who reads of it in the log, has mended it.
            raise StorageUnavailable(str(error)) from error

    async def url(self, key: str, expires_at: datetime) -> str:
        check_key(key)
        now = int(datetime.now(UTC).timestamp())
        window = datetime.fromtimestamp(now - now % WINDOW_SECONDS, UTC)
        return self._presigner.sign(await self._signer(), "GET", key, as_of=window, until=expires_at)

    async def sign_put(self, key: str, content_type: str, size_bytes: int, expires_at: datetime) -> SignedPut:
        check_key(key)
        headers = {"Content-Type": content_type, "Content-Length": str(size_bytes), "If-None-Match": "*"}
        if self._encryption:
            headers["x-amz-server-side-encryption"] = self._encryption["ServerSideEncryption"]
        if key_id := self._encryption.get("SSEKMSKeyId"):
            headers["x-amz-server-side-encryption-aws-kms-key-id"] = key_id
        signer, now = await self._signer(), datetime.now(UTC)
        url = self._presigner.sign(signer, "PUT", key, as_of=now, until=expires_at, headers=headers)
        return SignedPut(url, headers)

    async def key_of(self, url: str) -> str | None:
        key = self._presigner.path_of(url)
        try:
            check_key(key or "")
        except NotFound:
            return None
        return key if self._presigner.verify(await self._signer(), url, datetime.now(UTC)) else None

    async def _signer(self) -> ReadOnlyCredentials:
        """Return what URLs are signed with; credentials of a role may have to be fetched anew."""
        credentials = self._credentials
        if isinstance(credentials, RefreshableCredentials) and credentials.refresh_needed():
            return await self._run(credentials.get_frozen_credentials)
        return credentials.get_frozen_credentials()

    def _name(self, key: str) -> str:
        """Return the key that the object has in the bucket."""
        check_key(key)
        return self._prefix + key

    def _properties(self, key: str) -> dict[str, Any]:
        """Return what the bucket is to know of the object, and to tell whoever reads it."""
        return {
            "ContentType": CONTENT_TYPES[PurePosixPath(key).suffix],
            # We made the results; what callers sent us is no page to be looked at under the bucket's name.
            "ContentDisposition": "attachment" if is_upload(key) else "inline",
            "CacheControl": CACHE_CONTROL,
            **self._encryption,
        }

    async def _run(self, act: Callable[[*Arguments], Value], *arguments: *Arguments) -> Value:
        def run() -> Value:
            with translated():
                return act(*arguments)

        return await anyio.to_thread.run_sync(run, limiter=self._limiter)


class _Multipart:
    """An object on its way in parts. Nothing of it can be seen before it is complete.

    Its requests exclude each other: a task may be cancelled while one is under way, and what that one leaves behind
    has to be taken away after it.
    """

    def __init__(self, client: "S3Client", bucket: str, name: str) -> None:
        self._client = client
        self._place: dict[str, Any] = {"Bucket": bucket, "Key": name}
        self._id: str | None = None
        self._etags: list[str] = []
        self._lock = Lock()

    def begin(self, properties: dict[str, Any]) -> None:
        with self._lock:
            self._id = self._client.create_multipart_upload(**self._place, **properties)["UploadId"]

    def send(self, block: bytes) -> None:
        assert self._id is not None
        with self._lock:
            number = len(self._etags) + 1
            part = self._client.upload_part(**self._place, UploadId=self._id, PartNumber=number, Body=block)
            self._etags.append(part["ETag"])

    def complete(self) -> None:
        assert self._id is not None
        failpoints.reach("during_upload")
        with self._lock:
            self._client.complete_multipart_upload(
                **self._place,
                UploadId=self._id,
                MultipartUpload={
                    "Parts": [{"ETag": etag, "PartNumber": number} for number, etag in enumerate(self._etags, 1)]
                },
            )

    def discard(self) -> None:
        """Take away what was sent; where that fails, the bucket's lifecycle rule does it some day."""
        with self._lock:
            if self._id is None:
                return
            try:
                with translated():
                    self._client.abort_multipart_upload(**self._place, UploadId=self._id)
            except (StorageUnavailable, StorageRefused) as error:
                logger.warning("%s: its parts stay: %s (%s)", self._place["Key"], error, error.__cause__)


def _encryption(settings: Settings) -> dict[str, str]:
    if settings.s3_encryption == "none":
        return {}
    key_id = {"SSEKMSKeyId": settings.s3_kms_key_id} if settings.s3_kms_key_id else {}
    return {"ServerSideEncryption": settings.s3_encryption, **key_id}
