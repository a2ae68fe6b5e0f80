"""Signatures: of the URLs that let their holder read or store one object, and of webhooks."""

import base64
import hashlib
import hmac
from collections.abc import Sequence


def sign_object(secret: bytes, key: str, expires: int) -> str:
    """Return the hex HMAC-SHA256 that lets `key` be read until `expires` (Unix seconds).

    The message names its purpose first, so that no other signature made with the same secret can stand in for it.
    """
    return hmac.new(secret, f"object\n{key}\n{expires}".encode(errors="replace"), hashlib.sha256).hexdigest()


def verify_object(secret: bytes, key: str, expires: int, signature: str) -> bool:
    """Compare in constant time; says nothing about whether `expires` has passed."""
    return hmac.compare_digest(sign_object(secret, key, expires).encode(), signature.encode(errors="replace"))


def sign_put(secret: bytes, key: str, content_type: str, size_bytes: int, expires: int) -> str:
    """Return the hex HMAC-SHA256 that lets one object of that type and size be put under `key` until `expires`."""
    message = f"put\n{key}\n{content_type}\n{size_bytes}\n{expires}"
    return hmac.new(secret, message.encode(errors="replace"), hashlib.sha256).hexdigest()


def verify_put(secret: bytes, key: str, content_type: str, size_bytes: int, expires: int, signature: str) -> bool:
    """Compare in constant time; says nothing about whether `expires` has passed."""
    signed = sign_put(secret, key, content_type, size_bytes, expires)
    return hmac.compare_digest(signed.encode(), signature.encode(errors="replace"))


def show_secret(secret: bytes) -> str:
    """Return a webhook secret as Standard Webhooks writes it: `whsec_` and base64."""
    return "whsec_" + base64.b64encode(secret).decode()


def sign_webhook(secrets: Sequence[bytes], webhook_id: str, timestamp: int, body: bytes) -> str:
    """Return Standard Webhooks' `webhook-signature`: one `v1,…` for each secret, separated by spaces.

    Args:
        webhook_id: without a full stop, which separates it from what follows in the message.
        timestamp: Unix seconds, as `webhook-timestamp` says.
        body: the very bytes that are sent.
    """
    message = f"{webhook_id}.{timestamp}.".encode() + body
    macs = (hmac.new(secret, message, hashlib.sha256).digest() for secret in secrets)
    return " ".join("v1," + base64.b64encode(mac).decode() for mac in macs)


def sign_apiframe(key: bytes, body: bytes) -> str:
    """Return Apiframe's `X-Webhook-Signature`. It proves no time: whoever saw a webhook can send it again."""
    return "sha256=" + hmac.new(key, body, hashlib.sha256).hexdigest()
