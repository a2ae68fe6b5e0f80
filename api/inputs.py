"""Images that callers hand in: stored when they come as bytes, and found again by whatever names them."""

import base64
import hashlib
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import PurePosixPath
from uuid import UUID, uuid4

import anyio.to_thread

from core import storage as keys
from core.addresses import MAX_URL_CHARACTERS, check_url
from core.errors import (
    IdempotencyKeyReused,
    NotFound,
    PayloadTooLarge,
    RequestTooSlow,
    StorageUnavailable,
    UrlNotAllowed,
    ValidationError,
)
from core.options import OutputFormat
from core.settings import Settings
from core.storage import SNIFFED_BYTES, SignedPut, Storage
from db import uploads
from db.session import Database
from db.uploads import ArrivedUpload, FoundUpload, NewUpload

UPLOAD_SCHEME = "upload://"
PUT_TTL = timedelta(minutes=15)
"""How long a presigned URL takes its image."""

_WAYS = "must be an http(s) URL, upload://<id> or the id of an upload, a data URI, or base64"
_NOT_AN_IMAGE = "is not a PNG, JPEG or WebP image"
_ID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_SCHEME_CHARS = 32
_PIECE_BYTES = 1024 * 1024
_DATA_URI = re.compile(r"data:[^,]{0,128};base64,", re.IGNORECASE)


@dataclass(frozen=True)
class ReceivedUpload:
    """An image that is now stored."""

    id: UUID
    key: str
    format: OutputFormat
    size_bytes: int
    expires_at: datetime
    replayed: bool
    """Whether it was stored by an earlier request with the same idempotency key."""


@dataclass(frozen=True)
class PresignedUpload:
    """An image that may now be put where it is stored."""

    id: UUID
    target: SignedPut
    target_expires_at: datetime
    expires_at: datetime


@dataclass(frozen=True)
class LocatedImage:
    """Where the image of a request is: behind a URL, or stored under a key."""

    url: str | None
    key: str | None
    shown: str
    """What the caller wrote; of data only how much it was."""


class Inputs:
    """Takes in images of callers. Of each there is a row before there is an object: the sweep deletes by rows."""

    def __init__(self, settings: Settings, database: Database, storage: Storage) -> None:
        self._max_bytes = settings.max_input_bytes
        self._allow, self._proxied = settings.outbound_allow, bool(settings.outbound_proxy)
        self._ttl = timedelta(seconds=settings.upload_ttl_seconds)
        self._database = database
        self._storage = storage

    async def receive(
        self, caller_id: UUID, chunks: AsyncIterator[bytes], field: str, idempotency_key: str | None = None
    ) -> ReceivedUpload:
        """Store an image while it arrives, or find it where the same key brought the same image before.

        Raises:
            ValidationError: the bytes do not begin like an image that we read; nothing more of them was taken.
            PayloadTooLarge: there are more of them than the limit.
            IdempotencyKeyReused: the idempotency key came with another image before.
            RequestTooSlow: they took longer to arrive than an upload is kept.
        """
        image = _Arriving(chunks, field, self._max_bytes, hashed=idempotency_key is not None)
        format, upload_id = await image.sniff(), uuid4()
        key = keys.upload_key(upload_id, format)
        async with self._database.connection() as connection:
            await uploads.record(connection, NewUpload(id=upload_id, api_key_id=caller_id, key=key), self._ttl)
        await self._storage.write(key, image)
        arrived = ArrivedUpload(
            id=upload_id,
            api_key_id=caller_id,
            key=key,
            size_bytes=image.size_bytes,
            idempotency_key=idempotency_key,
            fingerprint=image.fingerprint,
        )
        try:
            async with self._database.connection() as connection:
                stored = await uploads.finish(connection, arrived, self._ttl)
        except IdempotencyKeyReused:
            await self._discard(key)
            raise
        if stored is None or stored.replayed:
            await self._discard(key)
        if stored is None:
            raise RequestTooSlow("The image took longer to arrive than an upload is kept.")
        return ReceivedUpload(stored.id, stored.key, format, image.size_bytes, stored.expires_at, stored.replayed)

    async def presign(self, caller_id: UUID, format: OutputFormat, size_bytes: int, field: str) -> PresignedUpload:
        """Let an image of that format and size be put into the storage directly; `field` says the size.

        Raises:
            ValidationError: it is larger than the limit.
        """
        if size_bytes > self._max_bytes:
            raise ValidationError({field: [f"must be {self._max_bytes} at most"]})
        upload_id = uuid4()
        key = keys.upload_key(upload_id, format)
        upload = NewUpload(id=upload_id, api_key_id=caller_id, key=key, size_bytes=size_bytes)
        async with self._database.connection() as connection:
            expires_at = await uploads.record(connection, upload, self._ttl)
        until = expires_at - self._ttl + min(PUT_TTL, self._ttl)
        target = await self._storage.sign_put(key, format.content_type, size_bytes, until)
        return PresignedUpload(upload_id, target, until, expires_at)

    async def locate(self, caller_id: UUID, image: str, field: str) -> LocatedImage:
        """Find out what `image` names, or store what it holds.

        Raises:
            ValidationError: it is nothing that we can use; the sentence never repeats it.
            PayloadTooLarge: it holds more than the limit.
        """
        if _ID.fullmatch(image) or image.startswith(UPLOAD_SCHEME):
            return LocatedImage(None, await self._find(caller_id, image, field), image)
        if image[:5].lower() == "data:":
            head = _DATA_URI.match(image)
            if head is None:
                raise ValidationError({field: ["must be a data URI with base64: data:image/png;base64,…"]})
            data = await self._decode(image[head.end() :], field, "does not hold valid base64")
            return await self._keep(caller_id, data, field, f"{head[0]}… ({len(image)} characters)")
        # No scheme, no URL; and one is never looked for in what may be megabytes of base64.
        if "://" not in image[:_SCHEME_CHARS]:
            data = await self._decode(image, field, _WAYS)
            return await self._keep(caller_id, data, field, f"base64… ({len(image)} characters)")
        if len(image) > MAX_URL_CHARACTERS:
            raise ValidationError({field: [f"is a URL of more than {MAX_URL_CHARACTERS} characters"]})
        if (key := await self._storage.key_of(image)) is not None:
            return LocatedImage(None, key, image)
        try:
            check_url(image, self._allow, proxied=self._proxied)
        except UrlNotAllowed as error:
            raise ValidationError({field: [f"{error} It {_WAYS}."]}) from error
        return LocatedImage(image, None, image)

    async def _decode(self, text: str, field: str, complaint: str) -> bytes:
        # Four characters hold three bytes; with line breaks it is a little more.
        if len(text) > self._max_bytes * 3 // 2 + 4:
            raise _too_large(field, self._max_bytes)
        try:
            return await anyio.to_thread.run_sync(_decode, text)
        except ValueError:  # its own words could repeat the data
            raise ValidationError({field: [complaint]}) from None

    async def _keep(self, caller_id: UUID, data: bytes, field: str, shown: str) -> LocatedImage:
        stored = await self.receive(caller_id, _in_pieces(data), field)
        return LocatedImage(None, stored.key, shown)

    async def _find(self, caller_id: UUID, image: str, field: str) -> str:
        upload_id, found = image.removeprefix(UPLOAD_SCHEME), None
        if _ID.fullmatch(upload_id):
            async with self._database.connection() as connection:
                found = await uploads.find(connection, UUID(upload_id), caller_id)
        if found is None:
            raise ValidationError({field: ["names an upload that does not exist or has expired"]})
        if not found.stored:
            await self._inspect(found, field)
        return found.key

    async def _inspect(self, upload: FoundUpload, field: str) -> None:
        """Check, when it is first used, what was put into the storage past us."""
        absent = ValidationError({field: ["names an upload whose file has not arrived yet"]})
        if upload.size_bytes is None:  # it is coming in this moment, or broke off
            raise absent
        try:
            seen = await self._storage.look(upload.key)
        except NotFound as error:
            raise absent from error
        if seen.size_bytes != upload.size_bytes:
            complaint = f"names an upload whose file has {seen.size_bytes} bytes, not {upload.size_bytes} as declared"
            raise ValidationError({field: [complaint]})
        declared = OutputFormat(PurePosixPath(upload.key).suffix[1:])
        if keys.sniff(seen.head) is not declared:
            complaint = f"names an upload whose file is not {declared.content_type} as declared"
            raise ValidationError({field: [complaint]})
        async with self._database.connection() as connection:
            await uploads.mark_stored(connection, upload.key)

    async def _discard(self, key: str) -> None:
        with suppress(StorageUnavailable):  # then the sweep does it, when the row expires
            await self._storage.delete(key)


class _Arriving:
    """An image on its way: passed on as it comes, counted, and hashed where that is asked for."""

    def __init__(self, chunks: AsyncIterator[bytes], field: str, max_bytes: int, *, hashed: bool) -> None:
        self._chunks = chunks
        self._field = field
        self._max_bytes = max_bytes
        self._digest = hashlib.sha256() if hashed else None
        self._head = b""
        self.size_bytes = 0

    @property
    def fingerprint(self) -> bytes | None:
        return self._digest and self._digest.digest()

    async def sniff(self) -> OutputFormat:
        """Wait for the first bytes; return what they begin."""
        async for chunk in self._chunks:
            self._head += self._taken(chunk)
            if len(self._head) >= SNIFFED_BYTES:
                break
        if not self._head:
            raise ValidationError({self._field: ["is empty"]})
        if (format := keys.sniff(self._head[:SNIFFED_BYTES])) is None:
            raise ValidationError({self._field: [_NOT_AN_IMAGE]})
        return format

    async def __aiter__(self) -> AsyncGenerator[bytes]:
        yield self._head
        self._head = b""
        async for chunk in self._chunks:
            yield self._taken(chunk)

    def _taken(self, chunk: bytes) -> bytes:
        self.size_bytes += len(chunk)
        if self.size_bytes > self._max_bytes:
            raise _too_large(self._field, self._max_bytes)
        if self._digest is not None:
            self._digest.update(chunk)
        return chunk


def _too_large(field: str, max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"{field} is larger than {max_bytes} bytes.")


async def _in_pieces(data: bytes) -> AsyncGenerator[bytes]:
    """Yield all of it, piece by piece: whoever gathers them holds no second copy."""
    for start in range(0, len(data), _PIECE_BYTES):
        yield data[start : start + _PIECE_BYTES]


def _decode(text: str) -> bytes:
    """Decode base64 of the ordinary alphabet, padded, broken into lines or not; raises ValueError."""
    return base64.b64decode(text.encode("ascii").translate(None, b"\r\n"), validate=True)
