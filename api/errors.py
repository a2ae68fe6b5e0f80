"""Errors as answers: one table from class to status, and one body that is Apiframe's and RFC 9457's at once."""

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Match

from api.headers import add_to_answer
from core import errors

RETRY_AFTER_SECONDS = 5

STATUSES: Mapping[type[errors.UpscaledError], int] = {
    errors.MissingApiKey: 401,
    errors.InvalidApiKey: 401,
    errors.KeyInactive: 403,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.IdempotencyKeyReused: 409,
    errors.JobNotCancellable: 409,
    errors.UploadExists: 412,
    errors.PayloadTooLarge: 413,
    errors.RequestTooSlow: 408,
    errors.TooManyQueued: 429,
    errors.RateLimited: 429,
    errors.DailyPixelsSpent: 429,
    errors.RequestError: 400,
    errors.TransientError: 503,
    errors.UpscaledError: 500,
}
"""The status of an error is that of the nearest class above it."""

MAX_COMPLAINTS = 100
MAX_FIELD_CHARACTERS = 200
"""What an answer repeats of a request at most: some are made to be answered at length."""

SET_UP_WRONGLY = "The service is set up wrongly; whoever runs it finds the reason in its log."

_CODES = {404: "not_found", 405: "method_not_allowed", 413: "payload_too_large"}

# pydantic's complaints in our words, where its own would puzzle a caller.
_WORDS = {
    "missing": "is required",
    "extra_forbidden": "unknown field",
    "json_invalid": "is not valid JSON",
    "model_attributes_type": "must be a JSON object, sent as application/json",
}

logger = logging.getLogger(__name__)


class Problem(BaseModel):
    """Every answer that reports an error. `error` and `details` are Apiframe's; the rest is RFC 9457 and additive."""

    model_config = ConfigDict(title="Problem")

    error: str = Field(description="One sentence for people.")
    code: str = Field(description="A stable word for programs; docs/errors.md lists them.")
    details: dict[str, list[str]] | None = Field(
        None, description="Complaints by the path of the field; only with 400."
    )
    request_id: str = Field(description="The same as the answer's X-Request-Id.")
    type: str
    title: str
    status: int
    detail: str


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of these statuses, and of those that any operation can end in."""
    common = {429, 500, 503} if 401 in statuses else {500, 503}  # each request of a key counts against its rate
    if 413 in statuses:  # what may be too long may be too slow
        common.add(408)
    return {
        status: {"model": Problem, "description": HTTPStatus(status).phrase}
        for status in sorted(common.union(statuses))
    }


def install(app: FastAPI) -> None:
    """Let every error that a route raises leave as a Problem."""
    app.add_exception_handler(errors.UpscaledError, _on_upscaled_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


async def answer(request: Request, error: Exception) -> JSONResponse:
    """Make the answer to an error that was raised beside the routes, or is a bug."""
    if isinstance(error, errors.UpscaledError):
        return await _on_upscaled_error(request, error)
    logger.error("bug while answering %s %s", request.method, request.url.path, exc_info=error)
    return problem(request, 500, "internal", "Something went wrong on our side.")


def problem(
    request: Request,
    status: int,
    code: str,
    message: str,
    details: Mapping[str, Sequence[str]] | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Make the answer that reports an error."""
    body = describe(status, code, message, request.state.request_id)
    if details:
        body |= {"error": "Validation error", "details": details}
    # Apiframe's SDK reads a body only when its type contains application/json; a client that knows problems says so.
    wants_problem = "application/problem+json" in request.headers.get("accept", "")
    media_type = "application/problem+json" if wants_problem else "application/json"
    return JSONResponse(body, status, headers, media_type)


def describe(status: int, code: str, message: str, request_id: str) -> dict[str, Any]:
    """Return a Problem as JSON has it, for who has no Request."""
    return {
        "error": message,
        "code": code,
        "request_id": request_id,
        "type": f"urn:upscaled:error:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": message,
    }


async def _on_upscaled_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, errors.UpscaledError)
    status = next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)
    if status >= 500:
        logger.warning("%s: %s (%s)", error.code, error, error.__cause__)
    if isinstance(error, errors.DeploymentError):  # its sentence is for the operator: it names settings and files
        return problem(request, status, error.code, SET_UP_WRONGLY)
    details = error.details if isinstance(error, errors.ValidationError) else None
    retry_after = error.retry_after_seconds or (RETRY_AFTER_SECONDS if status == 503 else None)
    headers = {"Retry-After": str(retry_after)} if retry_after else None
    add_to_answer(request, error.headers)
    return problem(request, status, error.code, str(error), details, headers)


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    details: dict[str, list[str]] = {}
    for fault in error.errors()[:MAX_COMPLAINTS]:
        details.setdefault(_field(fault), []).append(_complaint(fault))
    return await _on_upscaled_error(request, errors.ValidationError(details))


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, errors.UpscaledError):  # FastAPI wraps what is raised while it reads a body
        return await _on_upscaled_error(request, error.__cause__)
    if error.status_code == 400:  # a body that could not be parsed at all, such as broken multipart
        return await _on_upscaled_error(request, errors.ValidationError({"body": [error.detail]}))
    code = _CODES.get(error.status_code, "bad_request")
    headers = {"Allow": ", ".join(_allowed(request))} if error.status_code == 405 else error.headers
    return problem(request, error.status_code, code, error.detail, headers=headers)


def _allowed(request: Request) -> list[str]:
    """Return the methods that some route has for the request's path; Starlette names those of the first one only."""
    return [
        method
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in request.app.routes)
    ]


def _field(fault: Mapping[str, Any]) -> str:
    place, *path = fault["loc"]
    if fault["type"] == "json_invalid" or not path:
        return str(place)
    return ".".join(str(step) for step in path)[:MAX_FIELD_CHARACTERS]


def _complaint(fault: Mapping[str, Any]) -> str:
    return _WORDS.get(fault["type"]) or str(fault["msg"]).removeprefix("Value error, ")
