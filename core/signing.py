"""Signatures: the HMAC that lets whoever holds a URL read one stored object until a time."""

import hashlib
import hmac


def sign_object(secret: bytes, key: str, expires: int) -> str:
    """Return the hex HMAC-SHA256 that lets `key` be read until `expires` (Unix seconds).

    The message names its purpose first, so that no other signature made with the same secret can stand in for it.
    """
    return hmac.new(secret, f"object\n{key}\n{expires}".encode(errors="replace"), hashlib.sha256).hexdigest()


def verify_object(secret: bytes, key: str, expires: int, signature: str) -> bool:
    """Compare in constant time; says nothing about whether `expires` has passed."""
    return hmac.compare_digest(sign_object(secret, key, expires).encode(), signature.encode(errors="replace"))
