"""Waiting and following with two API processes and a real worker, and what a fault on the way costs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from api.waiting import LONGEST_BLIND_PAUSE_SECONDS
from cli.processes import LOOPBACK, die_with_parent, free_port, stop
from cli.stack import Stack
from tests.apis import Event, events_of, until
from tests.requests import body_of, png
from tests.web import Web

ROOT = Path(__file__).parents[2]
QUICK = {
    "UPSCALED_SWEEP_SECONDS": "0.3",
    "UPSCALED_OUTBOUND_ALLOW": "127.0.0.0/8",
    "UPSCALED_ENGINE": "tests.stepping:Stepping",
}


@dataclass(frozen=True)
class Pair:
    """A service whose API runs twice."""

    stack: Stack
    second: subprocess.Popen[bytes]
    here: httpx.Client
    there: httpx.Client

    def submit(self, image: str) -> str:
        return self.here.post("/v2/images/upscale", json=body_of(image)).json()["jobId"]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Generator[Stack]:
    logs = tmp_path_factory.mktemp("waiting")
    with Stack(logs / "data", port=free_port(), logs=logs, environ={**os.environ, **QUICK}) as stack:
        yield stack


@pytest.fixture
def pair(stack: Stack, tmp_path: Path) -> Generator[Pair]:
    port, headers = free_port(), {"X-API-Key": stack.key}
    with (tmp_path / "second.log").open("wb") as log:
        command = [sys.executable, "-m", "cli.main", "api", "--port", str(port)]
        environment = {**os.environ, **stack.environment}
        second = subprocess.Popen(die_with_parent(command), cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        with (
            httpx.Client(base_url=stack.url, headers=headers, timeout=60) as here,
            httpx.Client(base_url=f"http://{LOOPBACK}:{port}", headers=headers, timeout=60) as there,
        ):
            until(lambda: _ready(there), 30)
            stack.require_running()
            yield Pair(stack, second, here, there)
    finally:
        stop([second], 10)


def test_a_job_submitted_at_one_api_is_waited_for_and_followed_at_the_other(pair: Pair, web: Web) -> None:
    image = web.serve("/photo", png(8, 8))
    with ThreadPoolExecutor() as aside:
        job_id = pair.submit(image)
        followed = aside.submit(_follow, pair.there, job_id)
        response, late = _lateness(lambda: pair.there.get(f"/v2/jobs/{job_id}", params={"wait": 60}))
        events = followed.result(30)
    assert response["status"] == "COMPLETED"
    assert late < 0.5
    assert events[-1].data == response
    places = [event.place for event in events]
    assert places == sorted(set(places))
    assert [event.name for event in events if event.name != "progress"][-2:] == ["processing", "completed"]
    assert sum(event.name == "progress" for event in events) >= 5

    headers = {"Prefer": "wait=60"}
    submitted, late = _lateness(lambda: pair.there.post("/v2/images/upscale", json=body_of(image), headers=headers))
    assert submitted["status"] == "COMPLETED"
    assert late < 0.5


def test_redis_going_away_only_costs_latency(pair: Pair, web: Web) -> None:
    assert pair.stack.redis is not None
    with ThreadPoolExecutor() as aside:
        job_id = pair.submit(web.serve("/photo", png(8, 8)))
        followed = aside.submit(_follow, pair.there, job_id)
        until(lambda: pair.here.get(f"/v2/jobs/{job_id}").json()["progress"] > 0, 30)
        held = aside.submit(_lateness, lambda: pair.here.get(f"/v2/jobs/{job_id}", params={"wait": 60}))
        pair.stack.redis.stop()
        try:
            response, late = held.result(30)
            assert response["status"] == "COMPLETED"
            assert late < LONGEST_BLIND_PAUSE_SECONDS + 0.8
            assert followed.result(5)[-1].data == response
        finally:
            pair.stack.redis.start()


def test_an_api_that_is_told_to_end_lets_everybody_go_and_another_goes_on(pair: Pair, web: Web) -> None:
    with ThreadPoolExecutor() as aside:
        job_id = pair.submit(web.serve("/photo", png(8, 8)))
        held = [aside.submit(pair.there.get, f"/v2/jobs/{job_id}", params={"wait": 60}) for _ in range(5)]
        followed = aside.submit(_follow, pair.there, job_id)
        until(lambda: pair.here.get(f"/v2/jobs/{job_id}").json()["progress"] > 0, 30)
        began = time.monotonic()
        pair.second.send_signal(signal.SIGTERM)
        assert {answer.result(10).json()["status"] for answer in held} == {"PROCESSING"}
        told = followed.result(10)
        pair.second.wait(10)
        assert time.monotonic() - began < 3
    rest = _follow(pair.here, job_id, told[-1].id)
    places = [event.place for event in (*told, *rest)]
    assert places == sorted(set(places))
    assert rest[-1].name == "completed"


def _follow(client: httpx.Client, job_id: str, last: str | None = None) -> list[Event]:
    headers = {} if last is None else {"Last-Event-ID": last}
    with client.stream("GET", f"/v2/jobs/{job_id}/events", headers=headers) as response:
        return list(events_of(response.iter_lines()))


def _lateness(call: Callable[[], httpx.Response]) -> tuple[dict[str, Any], float]:
    """Return the job that was answered, and how many seconds after its end that was."""
    job = call().json()
    return job, (datetime.now(UTC) - datetime.fromisoformat(job["completedAt"])).total_seconds()


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").is_success
    except httpx.TransportError:
        return False
