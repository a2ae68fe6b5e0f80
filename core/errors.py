"""The one tree of errors, sorted by who can mend them.

    UpscaledError
    ├── RequestError      the caller can: change the request
    ├── TransientError    time can: try again
    ├── DeploymentError   the operator can: change settings, or what is installed
    ├── LeaseLost         nobody need: another attempt owns the job
    └── Stopped           nobody need: the work was told to stop

Every leaf has a stable `code` that is shown to callers, stored on failed jobs and sent in webhooks. `docs/errors.md`
lists them. Errors of libraries are translated where the library is called.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType


class UpscaledError(Exception):
    """Root of every error this project raises on purpose; `str()` of it is one sentence fit for a caller."""

    code = "internal"

    retry_after_seconds: int | None = None
    """When it is worth trying again, where that is known."""

    headers: Mapping[str, str] = MappingProxyType({})
    """What an answer that reports it says in its headers besides."""


class RequestError(UpscaledError):
    """The caller can mend it by changing the request; retrying the same request never helps."""

    code = "bad_request"


class ValidationError(RequestError):
    """A field of the request is wrong; `details` maps the field's path to its complaints."""

    code = "validation_error"

    def __init__(self, details: Mapping[str, Sequence[str]]) -> None:
        self.details = {field: list(messages) for field, messages in details.items()}
        super().__init__("; ".join(f"{field}: {', '.join(messages)}" for field, messages in self.details.items()))


class MissingApiKey(RequestError):
    code = "missing_api_key"


class InvalidApiKey(RequestError):
    code = "invalid_api_key"


class KeyInactive(RequestError):
    code = "key_inactive"


class Forbidden(RequestError):
    code = "forbidden"


class NotFound(RequestError):
    code = "not_found"


class PayloadTooLarge(RequestError):
    code = "payload_too_large"


class IdempotencyKeyReused(RequestError):
    """The key came before, with another request."""

    code = "idempotency_key_reused"


class UploadExists(RequestError):
    """A presigned URL takes one object, once."""

    code = "upload_exists"


class JobNotCancellable(RequestError):
    code = "job_not_cancellable"


class TooManyQueued(RequestError):
    """The API key has as many jobs waiting as it may; it has to wait for some to start."""

    code = "too_many_queued"
    retry_after_seconds = 10


class RateLimited(RequestError):
    """The API key makes more requests than it may."""

    code = "rate_limited"

    def __init__(self, retry_after_seconds: int, headers: Mapping[str, str]) -> None:
        self.retry_after_seconds = retry_after_seconds
        self.headers = headers
        super().__init__("This API key makes more requests than it may: slow down.")


class DailyPixelsSpent(RequestError):
    """The API key has had as many pixels made today as it may; tomorrow, by UTC, it may go on.

    It says so without `retry_after_seconds`: there are clients that sleep for as long, were it the whole day.
    """

    code = "daily_pixels_spent"

    def __init__(self, headers: Mapping[str, str]) -> None:
        self.headers = headers
        super().__init__("This API key has had as many pixels made today as it may; a new day begins at midnight UTC.")


class RequestTooSlow(RequestError):
    """The request came in too slowly to go on waiting for it."""

    code = "request_too_slow"


class UploadFailed(RequestError):
    """The caller's `uploadUrl` did not take the result, which stays readable here."""

    code = "upload_failed"


class DeadlineExceeded(RequestError):
    """The time that the caller gave the job was too short, as things went."""

    code = "deadline_exceeded"


class UrlNotAllowed(RequestError):
    """The URL's scheme, port or address is one the service does not reach."""

    code = "url_not_allowed"


class InputFetchFailed(RequestError):
    """The image URL answered, but not with an image: 404, a redirect loop, a name that does not exist, …"""

    code = "input_fetch_failed"


class InputTooLarge(RequestError):
    code = "input_too_large"


class InputNotImage(RequestError):
    """The bytes are not a complete PNG, JPEG or WebP picture."""

    code = "input_not_image"


class OutputTooLarge(RequestError):
    """The upscaled picture would pass the pixel limit or the side limit of its format."""

    code = "output_too_large"


class UnknownLora(RequestError):
    """The prompt names a LoRA that is not installed."""

    code = "unknown_lora"


class SafetyCheckUnavailable(RequestError):
    """The request demands a safety check, and no classifier is installed."""

    code = "safety_check_unavailable"


class ContentFlagged(RequestError):
    """The safety check found sexual content in the finished picture."""

    code = "content_flagged"


class TransientError(UpscaledError):
    """Time can mend it: the same request may succeed later."""

    code = "unavailable"


class QueueFull(TransientError):
    """A job would have to wait longer than the deployment allows."""

    code = "queue_full"

    def __init__(self, sentence: str, retry_after_seconds: int) -> None:
        self.retry_after_seconds = min(60, retry_after_seconds)
        super().__init__(sentence)


class WorkerLost(TransientError):
    """The workers that took the job died, one after the other."""

    code = "worker_lost"


class OutOfMemory(TransientError):
    code = "out_of_memory"


class StorageUnavailable(TransientError):
    code = "storage_unavailable"


class DatabaseUnavailable(TransientError):
    code = "database_unavailable"


class InputUnreachable(TransientError):
    """The image URL's server did not answer in time, refused the connection or answered 5xx."""

    code = "input_fetch_failed"


class DeploymentError(UpscaledError):
    """The operator can mend it by changing a setting or installing a part.

    A process that meets it at its start stops with this line; later, a job fails by it.
    """

    code = "deployment"


class StorageRefused(DeploymentError):
    """The bucket is there and does not let us: wrong credentials, another name, a right that is missing."""

    code = "storage_refused"


class LeaseLost(UpscaledError):
    """Another attempt owns the job, or it is over: whatever this attempt made is worthless."""

    code = "lease_lost"


class Stopped(UpscaledError):
    """The attempt was told to stop, by a cancel, a deadline, a drain or a lost lease, and gave up at its next step."""

    code = "stopped"
