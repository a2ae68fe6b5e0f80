"""Secrets at rest: what the database holds can be read by nobody who has the database alone."""

from base64 import urlsafe_b64encode

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from core.errors import DeploymentError
from core.settings import Settings

_PURPOSE = b"upscaled: secrets at rest, v1"

BARE_BYTES = 32
"""The release before stored secrets as they are, this many bytes, and may still run beside this one."""


class Sealer:
    """Seals with the first of the settings' encryption keys; opens what any of them sealed.

    A key made of the secret key comes last: it seals where the settings name none, and opens what was sealed until
    they did.
    """

    def __init__(self, settings: Settings) -> None:
        named = [Fernet(key.get_secret_value()) for key in settings.encryption_keys]
        keys = [*named, Fernet(_derive(settings.secret_key.get_secret_value()))]
        self._first = keys[0]
        self._all = MultiFernet(keys)

    def seal(self, secret: bytes) -> bytes:
        return self._first.encrypt(secret)

    def open(self, sealed: bytes) -> bytes:
        """Return what was sealed.

        Raises:
            DeploymentError: with none of our keys.
        """
        if len(sealed) == BARE_BYTES:
            return sealed
        try:
            return self._all.decrypt(sealed)
        except InvalidToken as error:
            raise DeploymentError(
                "A secret in the database was sealed with a key that is not in UPSCALED_ENCRYPTION_KEYS: put that key "
                "back at the end of it, or the former value into UPSCALED_SECRET_KEY."
            ) from error

    def is_current(self, sealed: bytes) -> bool:
        """Tell whether the first key sealed it."""
        try:
            self._first.decrypt(sealed)
        except InvalidToken:
            return False
        return True


def new_key() -> str:
    """Return a new key for UPSCALED_ENCRYPTION_KEYS."""
    return Fernet.generate_key().decode()


def _derive(secret_key: str) -> bytes:
    # No salt: the secret key is as random as whoever runs the service made it, and every process must derive the same.
    derived = HKDF(SHA256(), 32, salt=None, info=_PURPOSE).derive(secret_key.encode())
    return urlsafe_b64encode(derived)
