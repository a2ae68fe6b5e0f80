"""POST /v2/images/upscale."""

from contextlib import suppress
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Body, Header, Request, Response

from api.apiframe import schemas, views
from api.dependencies import KeyedRoute, Parts, PartsDep, SubmitHeadersDep, WriterDep, readmit
from api.errors import documented
from api.headers import REPLAYED, add_to_answer, preferred_wait
from api.intake import Submission
from api.waiting import hold
from core.errors import DatabaseUnavailable, KeyInactive
from db.queue import Submitted
from db.records import JobRecord

router = APIRouter(prefix="/v2/images", tags=["images"], route_class=KeyedRoute)

_LOCATION = {"description": "Where to poll.", "schema": {"type": "string"}}
_RETRY_AFTER = {"description": "Seconds to wait before polling.", "schema": {"type": "integer"}}
_PREFERENCE_APPLIED = {"description": "`wait=n`, when the answer was held for it.", "schema": {"type": "string"}}
_REPLAYED = {"description": "`true`: this Idempotency-Key made the job before.", "schema": {"type": "string"}}
_PREFER = "`wait=n`, n from 1 to 60: hold the answer for so long, until the job is over. `wait` alone means 60."


@router.post(
    "/upscale",
    status_code=202,
    response_model=schemas.JobAccepted,
    responses={
        200: {
            "model": schemas.JobObject,
            "description": "The job ended while the answer was held.",
            "headers": {"Location": _LOCATION, "Preference-Applied": _PREFERENCE_APPLIED, REPLAYED: _REPLAYED},
        },
        202: {
            "headers": {
                "Location": _LOCATION,
                "Retry-After": _RETRY_AFTER,
                "Preference-Applied": _PREFERENCE_APPLIED,
                REPLAYED: _REPLAYED,
            }
        },
        **documented(400, 401, 403, 409, 413, 429),
    },
    summary="Submit an image",
)
async def upscale(
    body: Annotated[schemas.AnyUpscaleRequest, Body(title="UpscaleRequest")],
    headers: SubmitHeadersDep,
    caller: WriterDep,
    parts: PartsDep,
    request: Request,
    prefer: Annotated[list[str] | None, Header(description=_PREFER)] = None,
) -> Response:
    """Record a job that upscales one image, and answer at once. It is committed before the answer leaves."""
    accepted = await parts.intake.submit(
        caller,
        Submission(
            model=body.model,
            options=body.to_options(),
            image=body.params.image,
            image_field=f"{body.params_field}.image",
            input=body.params.model_dump(exclude_unset=True),
            webhook_url=body.wanted_webhook(),
            webhook_field=body.webhook_field,
            webhook_events=body.wanted_events(),
            upload_url=body.uploadUrl,
            priority=body.priority,
            cancel_after=headers.cancel_after,
            idempotency=await headers.idempotency("/v2/images/upscale", body),
        ),
    )
    add_to_answer(request, accepted.headers)
    return await _answer(parts, request, caller.id, accepted.job, preferred_wait(prefer or ()))


async def _answer(parts: Parts, request: Request, caller_id: UUID, submitted: Submitted, wait: int | None) -> Response:
    """Answer 202, or 200 when the job ends within `wait` seconds."""

    async def look() -> tuple[JobRecord, bool]:
        await readmit(request)
        record = await views.find(parts, caller_id, submitted.id)
        return record, record.over

    status, headers = submitted.status, {"Location": f"/v2/jobs/{submitted.id}"}
    if submitted.replayed:
        headers[REPLAYED] = "true"
    if wait is not None:
        headers["Preference-Applied"] = f"wait={wait}"
        # The job is recorded, and its id must reach the caller even when it can no longer be read.
        with suppress(DatabaseUnavailable, KeyInactive):
            record = await hold(parts.watch, request, submitted.id, wait, look)
            if record.over:
                job = await views.show(parts, record)
                return Response(job.model_dump_json(), headers=headers, media_type="application/json")
            status = record.status
    headers["Retry-After"] = str(views.POLL_SECONDS)
    accepted = schemas.JobAccepted(jobId=submitted.id, status=status)
    return Response(accepted.model_dump_json(), 202, headers, "application/json")
