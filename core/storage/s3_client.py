"""How a bucket is reached, and what its errors mean."""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import boto3.session
from botocore import exceptions
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import BotoCoreError, ClientError

from core.errors import DeploymentError, NotFound, StorageRefused, StorageUnavailable
from core.settings import PREFIX, Settings

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

THREADS = 16
"""How many requests of one process the bucket is asked at a time."""

_CONNECT_SECONDS, _READ_SECONDS = 5, 30

_PASSING_CODES = frozenset(
    {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "Throttling", "NoSuchUpload"}
)
_PASSING_STATUSES = frozenset({408, 409, 429})
_PASSING_ERRORS = (
    exceptions.ConnectionError,
    exceptions.HTTPClientError,
    exceptions.IncompleteReadError,
    exceptions.CredentialRetrievalError,
)

_AWAY = "The storage could not be reached."
_REFUSED = "The storage refuses this service: whoever runs it has to mend its settings."

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bucket:
    """A bucket as our processes reach it, and as callers do."""

    client: "S3Client"
    credentials: Credentials
    public_url: str
    """What stands in front of every key in a URL for callers, the prefix included; ends in a slash."""


def connect(settings: Settings, attempts: int) -> Bucket:
    """Make ready to use the bucket: it is asked nothing yet, though credentials may be looked for over the network.

    Args:
        attempts: how often a request is made at most, with pauses of a second or two, before it counts as failed.

    Raises:
        DeploymentError: the settings contradict each other or cannot be used, or there are no credentials.
    """
    _check(settings)
    try:
        session = boto3.session.Session(
            aws_access_key_id=settings.s3_access_key_id or None,
            aws_secret_access_key=settings.s3_secret_access_key.get_secret_value() or None,
            region_name=settings.s3_region,
        )
        credentials = session.get_credentials()
        config = _config(settings, attempts)
        client = _open_client(session, settings.s3_endpoint, config)
        public_client = client
        if settings.s3_public_endpoint:
            public_client = _open_client(session, settings.s3_public_endpoint, config)
        if credentials is None:
            raise DeploymentError(
                f"There are no credentials for the bucket: set {PREFIX}S3_ACCESS_KEY_ID and "
                f"{PREFIX}S3_SECRET_ACCESS_KEY."
            )
        return Bucket(client, credentials, _base_url(public_client, settings))
    except (BotoCoreError, ValueError) as error:
        raise DeploymentError(f"The settings {PREFIX}S3_… cannot be used: {error}") from error


@contextmanager
def translated() -> Generator[None]:
    """Sort what boto3 raises by who can mend it, time or the operator. The sentences name no address and no bucket."""
    try:
        yield
    except ClientError as error:
        status, code = told(error)
        if code == "NoSuchKey":
            raise NotFound("There is no such object.") from error
        # 501 is how a server says that it will never know what was asked of it, such as encryption.
        if code in _PASSING_CODES or status in _PASSING_STATUSES or (status >= 500 and status != 501):
            raise StorageUnavailable(_AWAY) from error
        logger.error("the bucket refuses us by %s, status %d: %s", code, status, error)  # noqa: TRY400 - no bug of ours
        raise StorageRefused(_REFUSED) from error
    except BotoCoreError as error:
        if isinstance(error, _PASSING_ERRORS) and "CERTIFICATE_VERIFY_FAILED" not in str(error):
            raise StorageUnavailable(_AWAY) from error
        logger.error("the bucket cannot be used: %s", error)  # noqa: TRY400 - no bug of ours
        raise StorageRefused(_REFUSED) from error
    except RuntimeError as error:
        if "still expired" not in str(error):  # botocore says so of credentials of a role, in no class of its own
            raise
        raise StorageUnavailable(_AWAY) from error


def told(error: ClientError) -> tuple[int, str]:
    """Return the status and the code of an answer that reports an error."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status, error.response.get("Error", {}).get("Code", "")


def _check(settings: Settings) -> None:
    """Raise DeploymentError where the settings contradict each other."""
    faults: list[str] = []
    if bool(settings.s3_access_key_id) != bool(settings.s3_secret_access_key.get_secret_value()):
        faults.append(f"{PREFIX}S3_ACCESS_KEY_ID and {PREFIX}S3_SECRET_ACCESS_KEY go together")
    if settings.s3_kms_key_id and settings.s3_encryption != "aws:kms":
        faults.append(f"{PREFIX}S3_KMS_KEY_ID is only of use where {PREFIX}S3_ENCRYPTION is aws:kms")
    if faults:
        raise DeploymentError("; ".join(faults))


def _config(settings: Settings, attempts: int) -> Config:
    return Config(
        signature_version="s3v4",
        s3={"addressing_style": settings.s3_addressing},
        request_checksum_calculation=settings.s3_checksums,
        response_checksum_validation=settings.s3_checksums,
        connect_timeout=_CONNECT_SECONDS,
        read_timeout=_READ_SECONDS,
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=THREADS,
        tcp_keepalive=True,
    )


def _open_client(session: boto3.session.Session, endpoint: str, config: Config) -> "S3Client":
    # The type of client() lists every service there is, and the types of this one only are installed.
    return session.client("s3", endpoint_url=endpoint or None, config=config)  # pyright: ignore[reportUnknownMemberType]


def _base_url(client: "S3Client", settings: Settings) -> str:
    """Ask boto3 where our objects are: it knows how a bucket stands in a URL."""
    params = {"Bucket": settings.s3_bucket, "Key": settings.s3_prefix + "x"}
    return client.generate_presigned_url("get_object", Params=params).partition("?")[0].removesuffix("x")
