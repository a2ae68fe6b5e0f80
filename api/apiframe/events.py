"""GET /v2/jobs/{id}/events: what becomes of a job, as server-sent events.

An event's id is where in the job's life it stands, `{attempt}.{step}`. Places only grow and every process numbers them
alike, so a client may go on anywhere with the last id it has seen.
"""

import json
import logging
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated
from uuid import UUID

import anyio
from fastapi import APIRouter, Header, Request, Response
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from starlette.responses import StreamingResponse
from starlette.types import Send

from api.apiframe import schemas, views
from api.dependencies import KeyedRoute, Parts, PartsDep, ReaderDep, readmit
from api.errors import documented
from core import progress
from core.errors import DatabaseUnavailable, KeyInactive, NotFound
from db.models import JobStatus, WebhookEvent
from db.records import JobRecord

RETRY_MILLISECONDS = 2000
"""How long a client should wait before it connects again."""

HEARTBEAT_SECONDS = 15.0
LIFETIME_SECONDS = 3600.0
"""A stream ends after so long, whatever the job does; the client connects again by itself, perhaps to another of us."""

Place = tuple[int, int]
"""(attempt, step). Step 0: queued for the first time, or claimed; 1 to 99: percent; the others below."""
QUEUED_AGAIN = 990
OVER = 999

_UNBUFFERED = {"description": "Always `no`: proxies shall not hold events back.", "schema": {"type": "string"}}
_HEADERS = {"X-Accel-Buffering": "no"}
_EVENT = {
    "type": "object",
    "properties": {
        "event": {"enum": ["queued", "processing", "progress", "completed", "failed", "cancelled"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
        "id": {"type": "string"},
    },
    "required": ["event", "data", "id"],
}
_EXAMPLE = """retry: 2000

event: processing
data: {"id":"7c1d…","status":"PROCESSING","progress":0,…}
id: 1.0

event: progress
data: {"event":"progress","jobId":"7c1d…","status":"PROCESSING","progress":45,"model":"clarity-upscale"}
id: 1.45

: ping

event: completed
data: {"id":"7c1d…","status":"COMPLETED","progress":100,"result":{…},…}
id: 1.999
"""

logger = logging.getLogger(__name__)

router = APIRouter(tags=["jobs"], route_class=KeyedRoute)


class _Stream(EventSourceResponse):
    """Closes its generator when the client leaves, and not whenever the garbage collector comes by."""

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        super().__init__(events, headers=_HEADERS)
        self._events = events

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._events):
            await super().stream_response(send)


@router.get(
    "/v2/jobs/{job_id}/events",
    response_class=StreamingResponse,  # not EventSourceResponse: FastAPI would take the route for a generator
    responses={
        200: {
            "description": "Events until the job is over: queued, processing, progress, completed, failed, cancelled.",
            "content": {"text/event-stream": {"itemSchema": _EVENT, "example": _EXAMPLE}},
            "headers": {"X-Accel-Buffering": _UNBUFFERED},
        },
        204: {"description": "Last-Event-ID is that of the last event: there is nothing to come back for."},
        **documented(400, 401, 403, 404, 429),
    },
    summary="Follow a job",
)
async def follow(
    job_id: UUID,
    caller: ReaderDep,
    parts: PartsDep,
    request: Request,
    last_event_id: Annotated[
        str | None, Header(alias="Last-Event-ID", description="The last id seen: go on after it.")
    ] = None,
) -> Response:
    """Stream a job's events.

    The first one tells how the job is now; with Last-Event-ID it is the first that came after that one. Events of a
    state carry the job as GET shows it, events of progress what a webhook would say.
    """
    record = await views.find(parts, caller.id, job_id)
    last = _parse(last_event_id)
    if last is not None and last[0] > record.attempt:
        last = None  # an id of some other job
    if record.over and last == _place(record):
        return Response(status_code=204, headers=_HEADERS)
    return _Stream(_stream(parts, request, caller.id, job_id, last))


async def _stream(
    parts: Parts, request: Request, caller_id: UUID, job_id: UUID, last: Place | None
) -> AsyncGenerator[bytes]:
    yield format_sse_event(retry=RETRY_MILLISECONDS)
    until = anyio.current_time() + LIFETIME_SECONDS
    beat_at = anyio.current_time() + HEARTBEAT_SECONDS
    with parts.watch.changes(job_id) as changes:
        while True:
            news, over = await _look(parts, request, caller_id, job_id, last)
            if not news and not over and anyio.current_time() >= beat_at:
                yield KEEPALIVE_COMMENT
                beat_at = anyio.current_time() + HEARTBEAT_SECONDS
            for place, event in news:
                yield event
                last, beat_at = place, anyio.current_time() + HEARTBEAT_SECONDS
            if over or not await changes.wait(min(until, beat_at)):
                return


async def _look(
    parts: Parts, request: Request, caller_id: UUID, job_id: UUID, last: Place | None
) -> tuple[list[tuple[Place, bytes]], bool]:
    """Return the events after a place, in order, and whether there will be no more."""
    try:
        await readmit(request)
        record = await views.find(parts, caller_id, job_id)
        return await _news(parts, record, last), record.over
    except DatabaseUnavailable as error:
        logger.debug("events of job %s are late: %s", job_id, error)
        return [], False
    except (NotFound, KeyInactive):
        return [], True


async def _news(parts: Parts, record: JobRecord, last: Place | None) -> list[tuple[Place, bytes]]:
    place = _place(record)
    if last is None:
        job = await views.show(parts, record)
        # What it says of progress has been told with it.
        place = (record.attempt, job.progress) if record.status is JobStatus.PROCESSING else place
        return [(place, _state_event(place, job))]
    news = [
        (reported, _progress_event(reported, record))
        for reported in await progress.history(parts.redis, record.id, last)
        # A later attempt may have reported after the row was read: its beginning is to be told first.
        if reported[0] <= record.attempt
    ]
    if place > last:
        news.append((place, _state_event(place, await views.show(parts, record))))
    return sorted(news)


def _place(record: JobRecord) -> Place:
    """Return where a job stands, but for its progress."""
    if record.over:
        return record.attempt, OVER
    return record.attempt, QUEUED_AGAIN if record.status is JobStatus.QUEUED and record.attempt else 0


def _state_event(place: Place, job: schemas.JobObject) -> bytes:
    return format_sse_event(event=job.status.lower(), data_str=job.model_dump_json(), id=_id(place))


def _progress_event(place: Place, record: JobRecord) -> bytes:
    data = {
        "event": WebhookEvent.PROGRESS,
        "jobId": str(record.id),
        "status": JobStatus.PROCESSING,
        "progress": place[1],
        "model": record.model,
    }
    return format_sse_event(event=WebhookEvent.PROGRESS, data_str=json.dumps(data), id=_id(place))


def _id(place: Place) -> str:
    return f"{place[0]}.{place[1]}"


def _parse(event_id: str | None) -> Place | None:
    """Read an id that a client sent back; one that is none of ours counts as none."""
    if event_id is None or re.fullmatch(r"[0-9]{1,9}\.[0-9]{1,3}", event_id) is None:
        return None
    attempt, _, step = event_id.partition(".")
    return int(attempt), int(step)
