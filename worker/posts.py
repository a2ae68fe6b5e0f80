"""One POST of a webhook: signed, made, and what came of it."""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from core.errors import DeploymentError, UrlNotAllowed
from core.outbound import NoAnswer, Outbound
from core.sealing import Sealer
from core.settings import Settings
from core.signing import sign_apiframe, sign_webhook
from db import keys, webhook_secrets
from db.deliveries import Outcome
from db.session import Database

NOT_SIGNED = "This service could not sign the webhook; it will try again."
"""The error of an attempt that never came to a POST."""

NOT_MADE = "This service could not make the webhook's links; it will try again."
"""So is this."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Post:
    """What is to be posted; `id` stays the same however often that is tried."""

    id: UUID
    api_key_id: UUID
    event: str
    url: str
    body: Mapping[str, Any]


class Poster:
    """Signs webhooks with their API key's secrets and posts them."""

    def __init__(self, settings: Settings, database: Database, sealer: Sealer, outbound: Outbound) -> None:
        self._settings = settings
        self._database = database
        self._sealer = sealer
        self._outbound = outbound

    async def post(self, post: Post) -> Outcome:
        """Post once; raises DatabaseUnavailable when the secrets cannot be read."""
        body = json.dumps(post.body, separators=(",", ":")).encode()
        try:
            headers = await self._headers(post, body)
        except DeploymentError as error:
            # It counts as an attempt: the schedule leaves a day to mend the settings, and the owner sees it in the log.
            logger.error("webhook %s of API key %s: %s", post.id, post.api_key_id, error)  # noqa: TRY400
            return Outcome(duration_ms=0, error=NOT_SIGNED)
        began = time.monotonic()
        status_code = excerpt = error = retry_after = None
        try:
            answer = await self._outbound.post(post.url, body, headers, self._settings.webhook_timeout_seconds)
            status_code, excerpt, retry_after = answer.status, answer.excerpt, answer.retry_after
        except (UrlNotAllowed, NoAnswer) as failure:
            error = str(failure)
        return Outcome(
            duration_ms=int(1000 * (time.monotonic() - began)),
            status_code=status_code,
            excerpt=excerpt,
            error=error,
            retry_after=retry_after,
        )

    async def _headers(self, post: Post, body: bytes) -> dict[str, str]:
        form = self._settings.webhook_apiframe_signature
        async with self._database.connection() as connection:
            secrets = await webhook_secrets.valid(connection, self._sealer, post.api_key_id)
            digest = None if form == "off" else await keys.read_digest(connection, self._sealer, post.api_key_id)
        now = int(time.time())
        headers = {
            "Content-Type": "application/json",
            "webhook-id": str(post.id),
            "webhook-timestamp": str(now),
            "webhook-signature": sign_webhook(secrets, str(post.id), now, body),
        }
        if digest is not None:
            headers["X-Webhook-Event"] = post.event
            headers["X-Webhook-Signature"] = sign_apiframe(digest.hex().encode() if form == "hex" else digest, body)
        return headers


def shows_life(outcome: Outcome) -> bool | None:
    """Tell whether the receiver lives: whoever answers 404 or 410 to one URL does, and may serve another well.

    None where nobody asked it.
    """
    if outcome.error in (NOT_SIGNED, NOT_MADE):
        return None
    return outcome.status_code is not None and outcome.status_code < 500 and outcome.status_code not in (408, 429)
