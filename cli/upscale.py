"""`upscaled upscale`: one image through the whole service, seen from a client's side."""

import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import aiohttp
import click

from cli.comparison import write_comparison
from cli.processes import free_port
from cli.stack import Stack
from core.errors import UpscaledError

POLL_SECONDS = 0.1

MODELS = {"clarity-upscale": "clarityUpscaleParams", "superres": "superresParams"}
"""Where a request to each model has its parameters."""

CLARITY_SCALES = (1, 2, 4, 8)


class JobFailed(UpscaledError):
    """The service refused the request or failed the job; the message is the service's own."""

    code = "job_failed"


def upscale_file(image: Path, model: str, scale: float, output_format: str, out: Path) -> None:
    """Start the service, upscale `image` through its HTTP API, and stop the service.

    Prints the finished job and writes the result and a before/after picture into `out`. Exits with status 1 when the
    job fails.

    Raises:
        click.BadParameter: the model does not take that scale.
    """
    if model == "clarity-upscale" and scale not in CLARITY_SCALES:
        complaint = "clarity-upscale takes 1, 2, 4 or 8; --model superres any number from 1 to 8."
        raise click.BadParameter(complaint, param_hint="'--scale'")
    with tempfile.TemporaryDirectory(prefix="upscaled-") as folder:
        logs = Path(folder) / "logs"
        logs.mkdir()
        click.echo("Starting PostgreSQL, Redis, the API, a worker and the dispatcher …", err=True)
        with Stack(Path(folder) / "stack", port=free_port(), logs=logs) as stack:
            try:
                job, result = asyncio.run(_upscale(stack, image, model, scale, output_format))
            except JobFailed as error:
                click.echo(f"upscaled: {error}", err=True)
                sys.exit(1)
        _warn_of_fallback(logs)
    click.echo(json.dumps(job, indent=2))
    out.mkdir(parents=True, exist_ok=True)
    upscaled = out / f"{image.stem}-{scale:g}x.{output_format}"
    upscaled.write_bytes(result)
    comparison = out / f"{image.stem}-{scale:g}x-before-after.png"
    write_comparison(image, upscaled, comparison)
    click.echo(f"Result: {upscaled}\nBefore and after: {comparison}", err=True)


async def _upscale(
    stack: Stack, image: Path, model: str, scale: float, output_format: str
) -> tuple[dict[str, Any], bytes]:
    headers = {"X-API-Key": stack.key}
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(stack.url, headers=headers, timeout=timeout) as session:
        with image.open("rb") as file:
            upload = await _json(session.post("/v2/uploads", data={"file": file}))
        params = {"image": upload["url"], "scale_factor": scale, "output_format": output_format}
        accepted = await _json(session.post("/v2/images/upscale", json={"model": model, MODELS[model]: params}))
        job = await _follow(stack, session, accepted["jobId"])
        if job["status"] != "COMPLETED":
            raise JobFailed(job["error"])
        async with session.get(job["result"]["images"][0]) as response:
            response.raise_for_status()
            return job, await response.read()


async def _follow(stack: Stack, session: aiohttp.ClientSession, job_id: str) -> dict[str, Any]:
    with click.progressbar(length=100, label="Upscaling", file=sys.stderr, show_eta=False) as bar:
        while True:
            job = await _json(session.get(f"/v2/jobs/{job_id}"))
            bar.update(job["progress"] - bar.pos)
            if job["status"] not in ("QUEUED", "PROCESSING"):
                return job
            stack.require_running()
            await asyncio.sleep(POLL_SECONDS)


async def _json(request: Any) -> dict[str, Any]:
    async with request as response:
        body = await response.json()
        if response.status >= 400:
            raise JobFailed(f"{body['detail']}")
        return body


def _warn_of_fallback(logs: Path) -> None:
    """Repeat the worker's warnings, such as that it has no model weights."""
    for line in (logs / "worker-1.log").read_text(errors="replace").splitlines():
        if " WARNING " in line:
            click.echo(line, err=True)
