"""Apiframe's words where the API and the webhooks must say the same: results, times, events."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID


def timestamp(moment: datetime) -> str:
    """Format as 2026-03-15T10:00:00.000Z: UTC, milliseconds."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def result_body(result: Mapping[str, Any], url: str) -> dict[str, Any]:
    """Return `result` of a completed job: Apiframe's `images`, and beside it what we know of the picture."""
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
    """Return a webhook's body: Apiframe's flat fields, and the `type` and `timestamp` of Standard Webhooks.

    `created_at` is when the event happened; it is the same in every attempt.
    """
    body: dict[str, Any] = {
        "type": f"job.{event}",
        "timestamp": timestamp(created_at),
        "event": event,
        "jobId": str(job_id),
        "status": status,
        "model": model,
        "creditCost": None,
        "completedAt": timestamp(completed_at) if completed_at else None,
    }
    if error is None:
        return body | {"progress": 100, "result": result}
    return body | {"error": error, "errorCode": error_code}
