"""The whole service as real processes: one image from submission to result and webhook, and the faults on the way."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Generator
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from cli.processes import free_port
from cli.stack import Stack
from tests.requests import body_of, png
from tests.web import Web

ROOT = Path(__file__).parents[2]
CLI = (sys.executable, "-m", "cli.main")
_IGNORING_INTERRUPTS = ("sh", "-c", "trap '' INT; exec \"$@\"", "sh")
QUICK = {
    "UPSCALED_MODELS_DIR": "no-such-folder",  # without weights, even where somebody has installed some
    "UPSCALED_SWEEP_SECONDS": "0.3",
    "UPSCALED_OUTBOUND_ALLOW": "127.0.0.0/8",
    "UPSCALED_LOG_LEVEL": "INFO",
}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Generator[Stack]:
    folder = tmp_path_factory.mktemp("service")
    logs = folder / "logs"
    logs.mkdir()
    with Stack(folder / "data", port=free_port(), logs=logs, environ={**os.environ, **QUICK}) as stack:
        yield stack


def test_an_image_goes_from_submission_to_result_and_webhook(stack: Stack, web: Web) -> None:
    image = web.serve("/photo", png(60, 40))
    job_id = _call(stack, "/v2/images/upscale", body_of(image) | {"webhookUrl": web.serve("/hook")})["jobId"]
    job = _finished(stack, job_id)
    assert (job["status"], job["result"]["engine"]) == ("COMPLETED", "superres")
    with urllib.request.urlopen(job["result"]["images"][0]) as response:
        picture = Image.open(BytesIO(response.read()))
    assert picture.size == (120, 80)
    _until(lambda: any(seen.path == "/hook" for seen in web.seen))
    told = json.loads(next(seen.body for seen in web.seen if seen.path == "/hook"))
    assert (told["jobId"], told["status"]) == (job_id, "COMPLETED")
    assert told["result"] == job["result"]
    _until(lambda: _call(stack, f"/v2/jobs/{job_id}")["webhookStatus"] == "delivered")


def test_a_caller_may_ask_for_superres_by_name_and_for_any_factor(stack: Stack, web: Web) -> None:
    params = {"image": web.serve("/photo", png(61, 41)), "scale_factor": 2.7}
    job_id = _call(stack, "/v2/images/upscale", {"model": "superres", "superresParams": params})["jobId"]
    job = _finished(stack, job_id)
    assert (job["model"], job["status"], job["result"]["engine"]) == ("superres", "COMPLETED", "superres")
    assert (job["result"]["width"], job["result"]["height"]) == (165, 111)


def test_a_job_submitted_while_redis_is_down_completes_once_it_is_back(stack: Stack, web: Web) -> None:
    assert stack.redis is not None
    stack.redis.stop()
    try:
        began = time.monotonic()
        job_id = _call(stack, "/v2/images/upscale", body_of(web.serve("/photo", png(8, 8))))["jobId"]
        assert time.monotonic() - began < 2
        assert _call(stack, f"/v2/jobs/{job_id}")["status"] == "QUEUED"
        with urllib.request.urlopen(f"{stack.url}/readyz") as response:
            assert response.status == 200
    finally:
        stack.redis.start()
    assert _finished(stack, job_id)["status"] == "COMPLETED"


def test_a_worker_whose_job_ends_while_redis_is_down_goes_on_once_it_is_back(tmp_path: Path, web: Web) -> None:
    environ = {**os.environ, **QUICK, "UPSCALED_ENGINE": "tests.engines:Slow"}
    with Stack(tmp_path / "data", port=free_port(), logs=tmp_path, environ=environ) as stack:
        request = body_of(web.serve("/photo", png(8, 8)))
        assert stack.redis is not None
        running = _call(stack, "/v2/images/upscale", request)["jobId"]
        _until(lambda: _call(stack, f"/v2/jobs/{running}")["status"] == "PROCESSING")
        stack.redis.stop()
        assert _finished(stack, running)["status"] == "COMPLETED"
        stack.redis.start()
        assert _finished(stack, _call(stack, "/v2/images/upscale", request)["jobId"])["status"] == "COMPLETED"


def test_the_log_says_once_that_superres_stands_in_for_missing_weights(stack: Stack) -> None:
    assert stack.logs is not None
    log = (stack.logs / "worker-1.log").read_text()
    assert log.count("weights") == 1


def test_keys_can_be_made_while_the_service_runs(stack: Stack) -> None:
    command = [*CLI, "keys", "create", "second", "--folder", str(stack.folder)]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    request = urllib.request.Request(f"{stack.url}/v2/me", headers={"X-API-Key": made.stdout.strip()})
    with urllib.request.urlopen(request) as response:
        assert json.load(response)["apiKey"]["name"] == "second"


def test_the_first_key_may_do_everything(stack: Stack) -> None:
    assert _call(stack, "/v2/me")["user"]["role"] == "ADMIN"
    assert _call(stack, "/v2/me")["apiKey"]["scopes"] == ["jobs:write", "jobs:read", "admin"]


def test_servers_that_the_environment_names_are_used_and_none_is_started(
    tmp_path: Path, database_url: str, redis_url: str, web: Web
) -> None:
    addresses = {"UPSCALED_DATABASE_URL": database_url, "UPSCALED_REDIS_URL": redis_url}
    environ = {**os.environ, **QUICK, **addresses}
    with Stack(tmp_path / "data", port=free_port(), logs=tmp_path, environ=environ) as stack:
        assert (stack.postgres, stack.redis) == (None, None)
        job_id = _call(stack, "/v2/images/upscale", body_of(web.serve("/photo", png(8, 8))))["jobId"]
        assert _finished(stack, job_id)["status"] == "COMPLETED"


def test_a_worker_that_must_not_fall_back_refuses_to_start(stack: Stack) -> None:
    environment = {**os.environ, **stack.environment, "UPSCALED_ENGINE": "clarity"}
    done = subprocess.run(
        [*CLI, "worker"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("upscaled: ")
    assert "UPSCALED_ENGINE" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_service_keeps_its_data_and_leaves_no_process_behind(tmp_path: Path) -> None:
    port = free_port()
    first_key, second_key = (_serve_and_stop(tmp_path / "data", port, after=after) for after in ("SIGINT", "SIGTERM"))
    assert first_key == second_key


def _serve_and_stop(folder: Path, port: int, after: str) -> str:
    """Run `upscaled serve` as a script's `&` does, until it is up, stop it by a signal, and return its API key."""
    command = [*_IGNORING_INTERRUPTS, *CLI, "serve", "--folder", str(folder), "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as serve:
        try:
            assert serve.stdout is not None
            announcement = serve.stdout.readline()
            assert f"http://127.0.0.1:{port}" in announcement
            key = next(word for word in announcement.replace(",", " ").split() if word.startswith("upk_"))
            started = psutil.Process(serve.pid).children(recursive=True)
            started += [process for process in psutil.process_iter() if str(folder) in _ask(process.cwd)]
            names = {_ask(process.name) for process in started}
            serve.send_signal(signal.Signals[after])
            assert serve.wait(60) == (0 if after == "SIGINT" else 128 + signal.SIGTERM)
        finally:
            serve.terminate()  # or what fails above would wait for it for ever
    assert {"postgres", "redis-server"} <= names
    _, alive = psutil.wait_procs(started, timeout=5)
    assert alive == []
    return key


def _ask(question: Callable[[], str]) -> str:
    try:
        return question()
    except psutil.Error:  # the process is gone already
        return ""


def test_one_command_upscales_a_photograph_and_shows_it_before_and_after(tmp_path: Path) -> None:
    done = subprocess.run(
        [*CLI, "upscale", "cli/sample.jpg", "--scale", "2", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    job: dict[str, Any] = json.loads(done.stdout)
    assert (job["status"], job["result"]["width"], job["result"]["height"]) == ("COMPLETED", 902, 600)
    assert "100%" in done.stderr or "Upscaling" in done.stderr
    assert _size(tmp_path / "sample-2x.png") == (902, 600)
    assert _size(tmp_path / "sample-2x-before-after.png")[0] == 2 * 902


def test_an_image_that_cannot_be_upscaled_ends_the_command_with_the_reason(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(png(64, 64)[:60])
    done = subprocess.run(
        [*CLI, "upscale", str(broken)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "upscaled: " in done.stderr
    assert "Traceback" not in done.stderr


def _size(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as opened:
        return opened.size


def _call(stack: Stack, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    headers = {"X-API-Key": stack.key, "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(stack.url + path, data, headers), timeout=10) as response:
        return json.load(response)


def _finished(stack: Stack, job_id: str) -> dict[str, Any]:
    _until(lambda: _call(stack, f"/v2/jobs/{job_id}")["status"] not in ("QUEUED", "PROCESSING"))
    return _call(stack, f"/v2/jobs/{job_id}")


def _until(holds: Callable[[], bool], seconds: float = 30) -> None:
    give_up_at = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < give_up_at, "it did not come about in time"
        time.sleep(0.1)
