"""The one path from any dialect to a submitted job."""

import base64
import binascii
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import anyio.to_thread

from core import storage as keys
from core.errors import PayloadTooLarge, UrlNotAllowed, ValidationError
from core.options import MAX_SEED, OutputFormat, UpscaleOptions
from core.outbound import check_url
from core.queue import Hints
from core.settings import Settings
from core.storage import LocalStorage
from db import jobs, uploads
from db.jobs import NewJob
from db.models import WebhookEvent
from db.session import Database

UPLOAD_SCHEME = "upload://"
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


@dataclass(frozen=True)
class ReceivedUpload:
    """An image that is now stored."""

    id: UUID
    key: str
    format: OutputFormat
    size_bytes: int
    expires_at: datetime


def draw_seed() -> int:
    """Return a seed for a caller who gave none; 32 bits, as everyone else draws them."""
    return secrets.randbelow(min(2**32, MAX_SEED + 1))


class Intake:
    """Takes in images and jobs: validated, stored, recorded, committed, hinted, in that order."""

    def __init__(self, settings: Settings, database: Database, storage: LocalStorage, hints: Hints) -> None:
        self._settings = settings
        self._database = database
        self._storage = storage
        self._hints = hints

    async def submit(self, caller_id: UUID, submission: Submission) -> UUID:
        """Record a job and return its id; when this returns, the job is committed.

        Raises:
            ValidationError: the image or the webhook URL is one we cannot use.
            PayloadTooLarge: the image inside a data URI is larger than the limit.
        """
        if submission.webhook_url is not None:
            _check_webhook(submission)
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
        )
        async with self._database.connection() as connection:
            await jobs.submit(connection, job)
        self._hints.send()
        return job.id

    async def receive(self, caller_id: UUID, data: bytes, field: str) -> ReceivedUpload:
        """Store an image that a caller sent.

        Raises:
            ValidationError: the bytes do not begin like an image that we read.
            PayloadTooLarge: there are more of them than the limit.
        """
        limit = self._settings.max_input_bytes
        if len(data) > limit:
            raise PayloadTooLarge(f"{field} is larger than {limit} bytes.")
        format = keys.sniff(data[:12])
        if format is None:
            raise ValidationError({field: [NOT_AN_IMAGE]})
        upload_id = uuid4()
        key = keys.upload_key(upload_id, format)
        await self._storage.write(key, data)
        ttl = timedelta(seconds=self._settings.upload_ttl_seconds)
        async with self._database.connection() as connection:
            expires_at = await uploads.record(connection, upload_id, caller_id, key, len(data), ttl)
        return ReceivedUpload(upload_id, key, format, len(data), expires_at)

    async def _locate(self, caller_id: UUID, submission: Submission) -> tuple[str | None, str | None]:
        """Return (URL to fetch, None) or (None, key of a stored object)."""
        image, field = submission.image, submission.image_field
        if image.startswith("data:"):
            data = await anyio.to_thread.run_sync(_decode_data_uri, image, field)
            return None, (await self.receive(caller_id, data, field)).key
        if image.startswith(UPLOAD_SCHEME):
            return None, await self._find_upload(caller_id, image, field)
        if (key := self._storage.key_of(image)) is not None:
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
