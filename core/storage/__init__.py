"""Storage of inputs and results: a bucket where the settings name one, else a local folder."""

from core.errors import DeploymentError
from core.settings import PREFIX, Settings
from core.storage.local import FILES_PATH, LocalStorage
from core.storage.objects import (
    CACHE_CONTROL,
    CONTENT_TYPES,
    SNIFFED_BYTES,
    ObjectHead,
    SignedPut,
    Storage,
    is_upload,
    result_key,
    sniff,
    upload_key,
)

__all__ = [
    "CACHE_CONTROL",
    "CONTENT_TYPES",
    "FILES_PATH",
    "SNIFFED_BYTES",
    "LocalStorage",
    "ObjectHead",
    "SignedPut",
    "Storage",
    "is_upload",
    "open_storage",
    "result_key",
    "sniff",
    "upload_key",
]


def open_storage(settings: Settings) -> Storage:
    """Return the storage that the settings name.

    Raises:
        DeploymentError: what they say of a bucket cannot be.
    """
    if settings.s3_bucket:
        from core.storage.s3 import S3Storage  # boto3 is slow to import

        return S3Storage(settings)
    stray = [name for name in ("s3_endpoint", "s3_public_endpoint", "s3_access_key_id") if getattr(settings, name)]
    if stray:
        raise DeploymentError(f"{PREFIX}{stray[0].upper()} is set, and {PREFIX}S3_BUCKET is not.")
    return LocalStorage(settings.storage_dir, settings.public_url, settings.secret_key.get_secret_value().encode())
