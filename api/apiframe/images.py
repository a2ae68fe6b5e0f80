"""POST /v2/images/upscale."""

from fastapi import APIRouter, Response

from api.apiframe import schemas
from api.dependencies import CallerDep, PartsDep
from api.errors import documented
from api.intake import Submission
from db.models import JobStatus

POLL_SECONDS = 2
"""How long a client should wait before it asks for its job again."""

router = APIRouter(prefix="/v2/images", tags=["images"])

_ACCEPTED_HEADERS = {
    "Location": {"description": "Where to poll.", "schema": {"type": "string"}},
    "Retry-After": {"description": "Seconds to wait before polling.", "schema": {"type": "integer"}},
}


@router.post(
    "/upscale",
    status_code=202,
    response_model=schemas.JobAccepted,
    responses={202: {"headers": _ACCEPTED_HEADERS}, **documented(400, 401, 403, 413)},
    summary="Submit an image",
)
async def upscale(
    body: schemas.UpscaleRequest, caller: CallerDep, parts: PartsDep, response: Response
) -> schemas.JobAccepted:
    """Record a job that upscales one image, and answer at once. It is committed before the answer leaves."""
    params = body.clarityUpscaleParams
    job_id = await parts.intake.submit(
        caller.id,
        Submission(
            model=body.model,
            options=params.to_options(body.prompt),
            image=params.image,
            image_field=f"{schemas.PARAMS_FIELD}.image",
            input=params.model_dump(exclude_unset=True),
            webhook_url=body.wanted_webhook(),
            webhook_field=body.webhook_field,
            webhook_events=body.wanted_events(),
        ),
    )
    response.headers["Location"] = f"/v2/jobs/{job_id}"
    response.headers["Retry-After"] = str(POLL_SECONDS)
    return schemas.JobAccepted(jobId=job_id, status=JobStatus.QUEUED)
