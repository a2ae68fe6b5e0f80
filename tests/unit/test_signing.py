"""Signatures of webhooks, against published vectors and an independent verifier."""

import hashlib
import json
import secrets
import time

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from core.signing import show_secret, sign_apiframe, sign_webhook

BODY = b'{"jobId":"abc","status":"COMPLETED"}'


def test_a_webhook_is_signed_as_the_standard_says() -> None:
    signature = sign_webhook([bytes(range(32))], "msg_2KWPBgLlAfxdpx2AI54pPJ85f4W", 1674087231, BODY)
    assert signature == "v1,RfmQ08uSFgzrqdUL1cI4RKHhBOdtGYnLGig1OSXmfPw="
    assert show_secret(bytes(range(32))) == "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="


def test_whoever_knows_one_of_several_secrets_can_verify() -> None:
    old, new, other = (secrets.token_bytes(32) for _ in range(3))
    now = int(time.time())
    body = json.dumps({"name": "Größe 画像"}, ensure_ascii=False).encode()
    headers = {
        "webhook-id": "7c1d",
        "webhook-timestamp": str(now),
        "webhook-signature": sign_webhook([new, old], "7c1d", now, body),
    }
    for known in (old, new):
        assert Webhook(show_secret(known)).verify(body, headers) == {"name": "Größe 画像"}
    with pytest.raises(WebhookVerificationError):
        Webhook(show_secret(other)).verify(body, headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(show_secret(new)).verify(body, headers | {"webhook-id": "7c1e"})


@pytest.mark.parametrize(
    ("form", "signature"),
    [
        ("digest", "sha256=58e6d7af820911d918b1b43ade255ec260002ca8b24ba46dd057a99d192c89f4"),
        ("hex", "sha256=2cb660473e59908c969f761f7444eda6c9067d13d2d83a0057fb8fb5197c60af"),
    ],
)
def test_apiframes_signature_is_keyed_with_either_form_of_the_digest(form: str, signature: str) -> None:
    digest = hashlib.sha256(b"afk_" + 40 * b"0").digest()
    assert sign_apiframe(digest if form == "digest" else digest.hex().encode(), BODY) == signature
