"""Storage of inputs and results: a bucket where the settings name one, else a local folder."""

from core.settings import Settings
from core.storage.local import FILES_PATH, LocalStorage
from core.storage.objects import (
    CONTENT_TYPES,
    SNIFFED_BYTES,
    ObjectHead,
    SignedPut,
    Storage,
    result_key,
    sniff,
    upload_key,
)

__all__ = [
    "CONTENT_TYPES",
    "FILES_PATH",
    "SNIFFED_BYTES",
    "LocalStorage",
    "ObjectHead",
    "SignedPut",
    "Storage",
    "open_storage",
    "result_key",
    "sniff",
    "upload_key",
]


def open_storage(settings: Settings) -> Storage:
    """Return the storage that the settings name."""
    return LocalStorage(settings.storage_dir, settings.public_url, settings.secret_key.get_secret_value().encode())
