"""The Clarity engine inside the service, on small random weights: from a submit by HTTP to the webhook."""

import base64
import hashlib
import json
import os
import urllib.request
from collections.abc import Generator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cli.processes import free_port
from cli.stack import Stack
from tests import tiny
from tests.crews import until
from tests.web import Web

PARAMS = {"scale_factor": 2, "num_inference_steps": 6, "prompt": "(fur:1.2)", "seed": 11}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Generator[Stack]:
    folder = tmp_path_factory.mktemp("clarity")
    for name in ("models", "logs"):
        (folder / name).mkdir()
    tiny.save(folder / "models")
    (folder / "models/loras").mkdir()
    (folder / "models/loras/damaged.safetensors").write_bytes(b"not at all")
    environ = {
        "UPSCALED_ENGINE": "clarity",
        "UPSCALED_MODELS_DIR": str(folder / "models"),
        "UPSCALED_DEVICE": "cpu",
        "UPSCALED_OUTBOUND_ALLOW": "127.0.0.0/8",
        "UPSCALED_SWEEP_SECONDS": "0.3",
        "UPSCALED_DRAIN_SECONDS": "0",
        "OMP_NUM_THREADS": "1",
    }
    with Stack(folder / "data", port=free_port(), logs=folder / "logs", environ={**os.environ, **environ}) as stack:
        yield stack


def test_a_picture_is_diffused_and_the_webhook_tells_of_it(stack: Stack, web: Web) -> None:
    job_id = _submit(stack, _photo(48, 36), webhook=web.serve("/hook"))
    job = _end(stack, job_id)
    assert (job["status"], job["error"]) == ("COMPLETED", None)
    result = job["result"]
    assert (result["engine"], result["width"], result["height"], result["seed"]) == ("clarity", 96, 72, 11)
    with urllib.request.urlopen(result["images"][0]) as response:
        data = response.read()
    assert hashlib.sha256(data).hexdigest() == result["sha256"]
    with Image.open(BytesIO(data)) as picture:
        assert picture.size == (96, 72)
    until(lambda: any(seen.path == "/hook" for seen in web.seen))
    told = json.loads(next(seen.body for seen in web.seen if seen.path == "/hook"))
    assert (told["event"], told["result"]) == ("completed", result)
    again = _end(stack, _submit(stack, _photo(48, 36)))
    assert again["result"]["sha256"] == result["sha256"]


def test_a_running_job_is_cancelled_and_the_next_one_runs(stack: Stack) -> None:
    long = _submit(stack, _photo(160, 160), num_inference_steps=100, creativity=1)
    until(lambda: _call(stack, f"/v2/jobs/{long}")["progress"] > 2)
    _call(stack, f"/v2/jobs/{long}/cancel", {})
    assert _end(stack, long, 10)["status"] == "CANCELLED"
    assert _end(stack, _submit(stack, _photo(16, 16)))["status"] == "COMPLETED"


def test_a_lora_that_is_not_installed_fails_its_job_by_that_name(stack: Stack) -> None:
    job = _end(stack, _submit(stack, _photo(16, 16), prompt="<lora:more_details:0.5> a cat"))
    assert (job["status"], job["errorCode"]) == ("FAILED", "unknown_lora")
    assert "more_details" in job["error"]


def test_a_lora_that_cannot_be_used_fails_its_job_in_one_sentence_and_the_next_one_runs(stack: Stack) -> None:
    job = _end(stack, _submit(stack, _photo(16, 16), prompt="<lora:damaged:0.5> a cat"))
    assert (job["status"], job["errorCode"]) == ("FAILED", "deployment")
    assert job["error"] == "The LoRA damaged.safetensors cannot be used: it cannot be read."
    assert _end(stack, _submit(stack, _photo(16, 16)))["status"] == "COMPLETED"


def test_a_worker_that_is_to_end_gives_its_job_back_within_a_step(stack: Stack) -> None:
    job_id = _submit(stack, _photo(160, 160), num_inference_steps=100, creativity=1)
    until(lambda: _call(stack, f"/v2/jobs/{job_id}")["progress"] > 2)
    worker = stack.processes.pop("worker-1")
    worker.terminate()
    assert worker.wait(10) == 0
    assert _call(stack, f"/v2/jobs/{job_id}")["status"] == "QUEUED"


def _photo(width: int, height: int) -> str:
    """Return a data URI."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _submit(stack: Stack, image: str, *, webhook: str | None = None, **params: Any) -> str:
    body = {"model": "clarity-upscale", "clarityUpscaleParams": {"image": image, **PARAMS, **params}}
    return _call(stack, "/v2/images/upscale", body | {"webhookUrl": webhook})["jobId"]


def _end(stack: Stack, job_id: str, seconds: float = 30) -> dict[str, Any]:
    until(lambda: _call(stack, f"/v2/jobs/{job_id}")["status"] not in ("QUEUED", "PROCESSING"), seconds)
    return _call(stack, f"/v2/jobs/{job_id}")


def _call(stack: Stack, path: str, body: dict[str, Any] | None = None) -> Any:
    headers = {"X-API-Key": stack.key, "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(stack.url + path, data, headers), timeout=10) as response:
        return json.load(response)
