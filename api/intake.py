"""The one path from any dialect to a submitted job."""

import base64
import binascii
import hashlib
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import anyio.to_thread

from core import storage as keys
from core.errors import PayloadTooLarge, QueueFull, UrlNotAllowed, ValidationError
from core.options import OutputFormat, UpscaleOptions
from core.outbound import check_url
from core.queue import Hints
from core.settings import Settings
from core.storage import Storage
from db import estimates, queue, uploads
from db.estimates import State
from db.models import WebhookEvent
from db.queue import NewJob, Submitted
from db.session import Database
from db.uploads import NewUpload

UPLOAD_SCHEME = "upload://"
STATE_TTL_SECONDS = 1.0
"""How long what is known about the queue is believed."""

NOT_AN_IMAGE = "is not a PNG, JPEG or WebP image"


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A request as every dialect hands it in; fields are named as the caller knows them."""

    model: str
    options: UpscaleOptions
    image: str
    """An http(s) URL, a data URI, or upload:// and the id of an upload."""
    image_field: str
    """The path of `image` in the caller's request, for complaints."""
    input: dict[str, Any]
    """The parameters to show back; `image` is filled in here."""
    webhook_url: str | None = None
    webhook_field: str = "webhookUrl"
    webhook_events: Sequence[WebhookEvent] = ()
    priority: int = 0
    """Among the jobs of the same key, higher goes first."""
    cancel_after: timedelta | None = None
    """How long the caller is interested."""
    idempotency: "Idempotency | None" = None


@dataclass(frozen=True)
class Idempotency:
    """What tells a repeated request from another one: the caller's key, and a digest of what came with it."""

    key: str
    fingerprint: bytes


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


def draw_seed() -> int:
    """Return a seed for a caller who gave none; 32 bits, as everyone else draws them."""
    return secrets.randbelow(2**32)


class Intake:
    """Takes in images and jobs: validated, stored, recorded, committed, hinted, in that order."""

    def __init__(self, settings: Settings, database: Database, storage: Storage, hints: Hints) -> None:
        self._settings = settings
        self._database = database
        self._storage = storage
        self._hints = hints
        self._state: tuple[State, float] | None = None

    async def submit(self, caller_id: UUID, submission: Submission) -> Submitted:
        """Record a job, or find the one that this very request made before; when this returns, it is committed.

        Raises:
            ValidationError: the image or the webhook URL is one we cannot use.
            PayloadTooLarge: the image inside a data URI is larger than the limit.
            IdempotencyKeyReused: the idempotency key came with another request before.
            TooManyQueued: the key has as many jobs waiting as it may.
            QueueFull: the job would have to wait longer than the settings allow.
        """
        if submission.idempotency is not None and (found := await self._find(caller_id, submission.idempotency)):
            return found  # before anything is stored, or refused for a reason that did not hold then
        if submission.webhook_url is not None:
            _check_webhook(submission)
        await self._require_room(caller_id)
        image_url, image_key = await self._locate(caller_id, submission)
        job = NewJob(
            id=uuid4(),
            api_key_id=caller_id,
            model=submission.model,
            input={**submission.input, "image": _shown(submission.image)},
            options=submission.options,
            image_url=image_url,
            image_key=image_key,
            webhook_url=submission.webhook_url,
            webhook_events=submission.webhook_events,
            priority=submission.priority,
            cancel_after=submission.cancel_after,
            idempotency_key=submission.idempotency and submission.idempotency.key,
            fingerprint=submission.idempotency and submission.idempotency.fingerprint,
        )
        async with self._database.connection() as connection:
            submitted = await queue.submit(connection, job, self._settings.max_queued)
        if not submitted.replayed:
            self._hints.send()
        return submitted

    async def _find(self, caller_id: UUID, idempotency: Idempotency) -> Submitted | None:
        async with self._database.connection() as connection:
            return await queue.find(connection, caller_id, idempotency.key, idempotency.fingerprint)

    async def _require_room(self, caller_id: UUID) -> None:
        """Refuse what would wait too long, by an estimate that a sweep made lately; without one nothing is refused."""
        state, limit = await self.queue_state(), self._settings.max_wait_seconds
        if (state.seconds(state.queued_cost) or 0) <= limit:
            return
        # The whole queue is too long; but the turn of a key that asks for little comes sooner.
        async with self._database.connection() as connection:
            wait = state.seconds(await estimates.cost_before(connection, caller_id)) or 0
        if wait > limit:
            raise QueueFull("The queue is full: a job would have to wait too long.", int(wait - limit) + 1)

    async def queue_state(self) -> State:
        """Return the queue as the last sweep saw it, or as it was a moment ago."""
        if self._state is None or time.monotonic() > self._state[1] + STATE_TTL_SECONDS:
            async with self._database.connection() as connection:
                self._state = await estimates.read_state(connection), time.monotonic()
        return self._state[0]

    async def receive(
        self, caller_id: UUID, data: bytes, field: str, idempotency_key: str | None = None
    ) -> ReceivedUpload:
        """Store an image that a caller sent, or find it where the same key brought the same image before.

        Raises:
            ValidationError: the bytes do not begin like an image that we read.
            PayloadTooLarge: there are more of them than the limit.
            IdempotencyKeyReused: the idempotency key came with another image before.
        """
        limit = self._settings.max_input_bytes
        if len(data) > limit:
            raise PayloadTooLarge(f"{field} is larger than {limit} bytes.")
        format = keys.sniff(data[:12])
        if format is None:
            raise ValidationError({field: [NOT_AN_IMAGE]})
        upload_id = uuid4()
        key = keys.upload_key(upload_id, format)
        new = NewUpload(
            id=upload_id,
            api_key_id=caller_id,
            key=key,
            size_bytes=len(data),
            idempotency_key=idempotency_key,
            fingerprint=await anyio.to_thread.run_sync(_digest, data) if idempotency_key else None,
        )
        ttl = timedelta(seconds=self._settings.upload_ttl_seconds)
        # The row comes first: an object without a row would never be deleted. And the object is written in any case,
        # for the request that this one repeats may have died in between.
        async with self._database.connection() as connection:
            stored = await uploads.record(connection, new, ttl)
        await self._storage.write(stored.key, data)
        return ReceivedUpload(stored.id, stored.key, format, len(data), stored.expires_at, stored.replayed)

    async def _locate(self, caller_id: UUID, submission: Submission) -> tuple[str | None, str | None]:
        """Return (URL to fetch, None) or (None, key of a stored object)."""
        image, field = submission.image, submission.image_field
        if image.startswith("data:"):
            data = await anyio.to_thread.run_sync(_decode_data_uri, image, field)
            return None, (await self.receive(caller_id, data, field)).key
        if image.startswith(UPLOAD_SCHEME):
            return None, await self._find_upload(caller_id, image, field)
        if (key := await self._storage.key_of(image)) is not None:
            return None, key
        try:
            check_url(image)
        except UrlNotAllowed as error:
            raise ValidationError({field: [f"{error} A data URI or upload://<id> will do as well."]}) from error
        return image, None

    async def _find_upload(self, caller_id: UUID, image: str, field: str) -> str:
        complaint = ValidationError({field: ["names an upload that does not exist or has expired"]})
        try:
            upload_id = UUID(image.removeprefix(UPLOAD_SCHEME))
        except ValueError:
            raise complaint from None
        async with self._database.connection() as connection:
            key = await uploads.find_key(connection, upload_id, caller_id)
        if key is None:
            raise complaint
        return key


def fingerprint(path: str, body: Any) -> bytes:
    """Return the SHA-256 of a validated request in canonical JSON, and of where it was sent."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return _digest(f"{path}\n{canonical}".encode())


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _check_webhook(submission: Submission) -> None:
    assert submission.webhook_url is not None
    try:
        check_url(submission.webhook_url)
    except UrlNotAllowed as error:
        raise ValidationError({submission.webhook_field: [str(error)]}) from error


def _decode_data_uri(uri: str, field: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValidationError({field: ["must be a data URI with base64: data:image/png;base64,…"]})
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValidationError({field: ["does not hold valid base64"]}) from error


def _shown(image: str) -> str:
    """Shorten what would fill the row: the data of a data URI."""
    if not image.startswith("data:"):
        return image
    return f"{image.partition(',')[0]},… ({len(image)} characters)"
