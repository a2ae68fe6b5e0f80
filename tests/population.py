"""What a service holds while requests drawn at random come to it, and how those are made to meet it."""

import base64
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from random import Random
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit
from uuid import UUID
from zlib import crc32

import httpx2 as httpx
from schemathesis import Case
from schemathesis.core.parameters import ParameterLocation
from schemathesis.transport.serialization import Binary

from core.storage import FILES_PATH
from tests.requests import body_of, png

PICTURE = png(8, 8)
HOOK = "http://127.0.0.1:9/hook"
"""Where nobody listens."""

DRAWN = 0.1
"""How often a name stays as it was drawn."""

AnyCase = Case[Any]
Ask = Callable[..., Sequence[Any]]
File = tuple[str, dict[str, str]]
"""An object of the storage as its signed URL names it: by its key, and what the query says."""


@dataclass(frozen=True)
class Population:
    """Names of what is there, each a chance for a request to be about something."""

    jobs: Sequence[str]
    deliveries: Sequence[tuple[str, str]]
    """Each after its job."""
    images: Sequence[str]
    results: Sequence[File]
    targets: Sequence[File]
    """Each takes PICTURE, once."""
    cursors: Sequence[str]

    def meet(self, drawn: AnyCase) -> AnyCase:
        """Let most of what was drawn as a valid name be that of something that is there.

        What becomes of a case depends on nothing but the case, so it can be tried again.
        """
        case = _copy(drawn)  # schemathesis uses some of them twice
        assert case.meta is not None
        valid = {place for place, part in case.meta.components.items() if part.mode.is_positive}
        number = crc32(repr(drawn).encode(errors="replace"))
        dice = _Dice(Random(number))  # noqa: S311 - no secret
        if ParameterLocation.PATH in valid and "key" not in case.path_parameters:
            self._meet_path(case.path_parameters, dice)
        elif "key" in case.path_parameters and case.meta.generation.mode.is_positive:
            self._meet_file(case, dice)
        if ParameterLocation.QUERY in valid:
            dice.replace(case.query, "cursor", self.cursors)
        if ParameterLocation.BODY in valid and isinstance(case.body, dict):
            self._meet_body(case.body, dice)
        if ParameterLocation.HEADER in valid:
            headers: Any = case.headers  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            dice.replace(headers, "Idempotency-Key", [f"{number}", f"{number}", "one for all"])
            dice.replace(headers, "Cancel-After", ["90s", "1h30m"])
            dice.replace(headers, "Last-Event-ID", ["0.0", "1.0", "1.999"])
        return case

    def _meet_path(self, path: dict[str, Any], dice: "_Dice") -> None:
        if "delivery_id" in path:
            path["job_id"], path["delivery_id"] = dice.pick(self.deliveries, (path["job_id"], path["delivery_id"]))
        elif "job_id" in path:
            path["job_id"] = dice.pick(self.jobs, path["job_id"])

    def _meet_file(self, case: AnyCase, dice: "_Dice") -> None:
        path, drawn = case.path_parameters, (case.path_parameters["key"], case.query)
        if case.method == "GET":
            path["key"], case.query = dice.pick(self.results, drawn)
        elif case.method == "PUT":
            path["key"], case.query = dice.pick(self.targets, drawn)
            case.body, case.media_type = Binary(PICTURE), "image/png"

    def _meet_body(self, body: dict[str, Any], dice: "_Dice") -> None:
        for params in ("clarityUpscaleParams", "superresParams"):
            dice.replace(body.get(params), "image", self.images)
        for name in ("webhookUrl", "uploadUrl"):
            dice.replace(body, name, [HOOK])
        for again in ("webhook_url", "webhook_events"):  # one spelling is enough
            body.pop(again, None)
        if "file" in body:
            body["file"] = dice.pick([Binary(PICTURE), Binary(PICTURE[:60])], body["file"])


@dataclass(frozen=True)
class _Dice:
    random: Random

    def pick(self, others: Sequence[Any], drawn: Any) -> Any:
        """Choose one of them, or now and then what was drawn."""
        return drawn if self.random.random() < DRAWN else self.random.choice(others)

    def replace(self, fields: Any, name: str, others: Sequence[str]) -> None:
        """Let a field that is there, and a string, say something else."""
        if fields and isinstance(drawn := fields.get(name), str):
            fields[name] = self.pick(others, drawn)


def populate(client: httpx.Client, stranger: httpx.Client, work: Callable[[], object], ask: Ask) -> Population:
    """Let two callers use the service; `work` runs what is queued, and what is rare the database is told to be so."""
    mine, theirs = _upload(client), _upload(stranger)
    done = _submit(client, mine)
    work()
    running, failed, cancelled, queued = (_submit(client, mine) for _ in range(4))
    ask("UPDATE jobs SET status = 'PROCESSING', attempt = 1, started_at = now() WHERE id = $1", UUID(running))
    ask("UPDATE jobs SET status = 'FAILED', error = 'x', completed_at = now() WHERE id = $1", UUID(failed))
    client.post(f"/v2/jobs/{cancelled}/cancel").raise_for_status()
    strangers = _submit(stranger, theirs)
    deliveries = [(str(row["job_id"]), str(row["id"])) for row in ask("SELECT job_id, id FROM deliveries")]
    assert deliveries
    wanted = {"contentType": "image/png", "byteSize": len(PICTURE)}
    presigned = [client.post("/v2/uploads/presign", json=wanted).raise_for_status().json() for _ in range(3)]
    encoded = base64.b64encode(PICTURE).decode()
    inline = (encoded, f"data:image/png;base64,{encoded}")
    return Population(
        jobs=[done, running, failed, cancelled, queued, strangers],
        deliveries=deliveries,
        images=[mine, theirs, presigned[0]["image"], "https://example.com/a.png", "http://169.254.1.1/", *inline],
        results=[_file(client.get(f"/v2/jobs/{done}").json()["result"]["images"][0])],
        targets=[_file(made["url"]) for made in presigned],
        cursors=[client.get("/v2/jobs", params={"limit": limit}).json()["nextCursor"] for limit in (1, 3)],
    )


def _submit(client: httpx.Client, image: str) -> str:
    response = client.post("/v2/images/upscale", json=body_of(image) | {"webhookUrl": HOOK})
    assert response.status_code == 202, response.text
    return response.json()["jobId"]


def _upload(client: httpx.Client) -> str:
    response = client.post("/v2/uploads", files={"file": PICTURE})
    assert response.status_code == 201, response.text
    return f"upload://{response.json()['id']}"


def _file(url: str) -> File:
    parts = urlsplit(url)
    return unquote(parts.path).removeprefix(f"{FILES_PATH}/"), dict(parse_qsl(parts.query))


def _copy(case: AnyCase) -> AnyCase:
    names = ("path_parameters", "headers", "cookies", "query", "body", "media_type", "meta")
    parts = {name: deepcopy(getattr(case, name)) for name in names}
    return Case(case.operation, case.method, case.path, **parts)
