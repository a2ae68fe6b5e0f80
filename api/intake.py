"""The one path from any dialect to a submitted job."""

import hashlib
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

from api.inputs import Inputs
from api.rates import describe
from core.addresses import check_url
from core.errors import DailyPixelsSpent, QueueFull, UrlNotAllowed, ValidationError
from core.options import UpscaleOptions
from core.queue import Hints
from core.settings import Settings
from core.storage import Storage
from db import estimates, queue, usage
from db.estimates import State
from db.keys import KeyRecord
from db.models import WebhookEvent
from db.queue import NewJob, Submitted
from db.session import Database

DAY_SECONDS = 86_400
STATE_TTL_SECONDS = 1.0
"""How long what is known about the queue is believed."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A request as every dialect hands it in; fields are named as the caller knows them."""

    model: str
    options: UpscaleOptions
    image: str
    """An http(s) URL, the id of an upload, with upload:// before it or not, a data URI, or base64."""
    image_field: str
    """The path of `image` in the caller's request, for complaints."""
    input: dict[str, Any]
    """The parameters to show back; `image` is filled in here."""
    webhook_url: str | None = None
    webhook_field: str = "webhookUrl"
    webhook_events: Sequence[WebhookEvent] = ()
    upload_url: str | None = None
    """Where the result is to be put."""
    upload_field: str = "uploadUrl"
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
class Accepted:
    """A submission that was taken in."""

    job: Submitted
    headers: Mapping[str, str]
    """What the answer's headers say of the key's pixels."""


def draw_seed() -> int:
    """Return a seed for a caller who gave none; 32 bits, as everyone else draws them."""
    return secrets.randbelow(2**32)


class Intake:
    """Takes in jobs: validated, their images stored, recorded, committed, hinted, in that order."""

    def __init__(self, settings: Settings, database: Database, storage: Storage, hints: Hints) -> None:
        self._settings = settings
        self._database = database
        self.inputs = Inputs(settings, database, storage)
        self._hints = hints
        self._state: tuple[State, float] | None = None

    async def submit(self, caller: KeyRecord, submission: Submission) -> Accepted:
        """Record a job, or find the one that this very request made before; when this returns, it is committed.

        Raises:
            ValidationError: one of the URLs, or the image, is one we cannot use.
            PayloadTooLarge: the image that it holds is larger than the limit.
            IdempotencyKeyReused: the idempotency key came with another request before.
            TooManyQueued: the key has as many jobs waiting as it may.
            DailyPixelsSpent: the key has had as many pixels made today as it may.
            QueueFull: the job would have to wait longer than the settings allow.
        """
        if submission.idempotency is not None and (found := await self._find(caller.id, submission.idempotency)):
            return Accepted(found, {})  # before anything is stored, or refused for a reason that did not hold then
        self._check_url(submission.webhook_url, submission.webhook_field)
        self._check_url(submission.upload_url, submission.upload_field)
        headers = await self._require_pixels(caller)
        await self._require_room(caller.id)
        image = await self.inputs.locate(caller.id, submission.image, submission.image_field)
        job = NewJob(
            id=uuid4(),
            api_key_id=caller.id,
            model=submission.model,
            input={**submission.input, "image": image.shown},
            options=submission.options,
            image_url=image.url,
            image_key=image.key,
            webhook_url=submission.webhook_url,
            webhook_events=submission.webhook_events,
            upload_url=submission.upload_url,
            priority=submission.priority,
            cancel_after=submission.cancel_after,
            idempotency_key=submission.idempotency and submission.idempotency.key,
            fingerprint=submission.idempotency and submission.idempotency.fingerprint,
        )
        async with self._database.connection() as connection:
            submitted = await queue.submit(connection, job, self._settings.max_queued)
        if not submitted.replayed:
            self._hints.send()
        return Accepted(submitted, headers)

    def _check_url(self, url: str | None, field: str) -> None:
        try:
            if url is not None:
                check_url(url, self._settings.outbound_allow, proxied=bool(self._settings.outbound_proxy))
        except UrlNotAllowed as error:
            raise ValidationError({field: [str(error)]}) from error

    async def _find(self, caller_id: UUID, idempotency: Idempotency) -> Submitted | None:
        async with self._database.connection() as connection:
            return await queue.find(connection, caller_id, idempotency.key, idempotency.fingerprint)

    async def _require_pixels(self, caller: KeyRecord) -> Mapping[str, str]:
        """Refuse a key whose pixels of today are spent; what is under way is not counted, and will be finished."""
        if (quota := caller.daily_pixels) is None:
            return {}
        async with self._database.connection() as connection:
            today = await usage.read_today(connection, caller.id)
        left = max(0, quota - today.pixels)
        headers = describe("daily-pixels", quota, DAY_SECONDS, left, today.seconds_left, unit="pixels")
        if not left:
            raise DailyPixelsSpent(headers)
        return headers

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


def fingerprint(path: str, body: Any) -> bytes:
    """Return the SHA-256 of a validated request in canonical JSON, and of where it was sent."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"{path}\n{canonical}".encode()).digest()
