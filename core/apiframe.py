"""Apiframe's words where the API and the webhooks must say the same: results, times, events."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID


def timestamp(moment: datetime) -> str:
    """Format as 2026-03-15T10:00:00.000Z: UTC, milliseconds."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def result_body(result: Mapping[str, Any], url: str) -> dict[str, Any]:
    """Return a job's `result`: Apiframe's `images`, and beside it what we know of the picture."""
    return {
        "images": [url],
        "engine": result["engine"],
        "format": result["format"],
        "width": result["width"],
        "height": result["height"],
        "byteSize": result["size_bytes"],
        "sha256": result["sha256"],
        "seed": result["seed"],
    }


def event_body(
    *,
    event: str,
    job_id: UUID,
    status: str,
    model: str,
    created_at: datetime,
    completed_at: datetime | None,
    result: Mapping[str, Any] | None,
    error: str | None,
    error_code: str | None,
) -> dict[str, Any]:
    """Return the body of a webhook that reports a job's end.

    `created_at` is when the event happened; it is the same in every attempt.
    """
    body = _common(event, job_id, status, model, created_at) | {
        "creditCost": None,
        "completedAt": timestamp(completed_at) if completed_at else None,
    }
    if event == "completed":
        return body | {"progress": 100, "result": result}
    if result is not None:  # it failed because its result could not be put where the caller wanted it
        body["result"] = result
    return body if error is None else body | {"error": error, "errorCode": error_code}


def progress_body(*, job_id: UUID, status: str, model: str, percent: int, at: datetime) -> dict[str, Any]:
    """Return the body of a webhook that tells how far a running job has come."""
    return _common("progress", job_id, status, model, at) | {"progress": percent}


def _common(event: str, job_id: UUID, status: str, model: str, at: datetime) -> dict[str, Any]:
    """Return Apiframe's flat fields, and the `type` and `timestamp` of Standard Webhooks."""
    return {
        "type": f"job.{event}",
        "timestamp": timestamp(at),
        "event": event,
        "jobId": str(job_id),
        "status": status,
        "model": model,
    }
