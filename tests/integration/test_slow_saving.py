"""A file that is still being written when the engine is done: no stall while it gets on, and a cancel is heard."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from core.settings import Settings
from tests.engines import Repeating
from tests.requests import png, submit, upload
from worker.lease import Watchdog
from worker.upscale import open_worker
from worker.upscaler import encoding
from worker.upscaler.engines import Engines

STEP_SECONDS = 0.02

STEPS = 20
"""How many a WebP takes at least, all of them when the last strip is there."""


def _slow_down(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, list[bool]]:
    """Let each step of the encoder take its time; return what is set at the first, and what each is answered."""
    encode: Callable[..., Any] = encoding.encode
    begun, answers = threading.Event(), list[bool]()

    def encode_slowly(*arguments: Any) -> Any:
        *others, should_stop = arguments

        def ask() -> bool:
            begun.set()
            time.sleep(STEP_SECONDS)
            answers.append(should_stop())
            return answers[-1]

        return encode(*others, ask)

    monkeypatch.setattr(encoding, "encode", encode_slowly)
    return begun, answers


def _work(settings: Settings) -> threading.Thread:
    def work() -> None:
        with open_worker(settings, Engines(Repeating())) as worker:
            worker.work()

    running = threading.Thread(target=work)
    running.start()
    return running


def test_a_cancel_ends_the_writing_of_a_file(
    client: TestClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, answers = _slow_down(monkeypatch)
    job_id = submit(client, upload(client, png(300, 300)), output_format="webp")
    running = _work(settings)
    assert begun.wait(5)
    client.post(f"/v2/jobs/{job_id}/cancel")
    running.join()
    job = client.get(f"/v2/jobs/{job_id}").json()
    assert (job["status"], job["error"], job["result"]) == ("CANCELLED", None, None)
    assert answers[-1]
    assert len(answers) < STEPS


def test_the_watchdog_sees_each_step_of_a_file_that_is_written(
    client: TestClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, answers = _slow_down(monkeypatch)
    seen: list[int] = []
    step: Callable[..., None] = Watchdog.step

    def note(watchdog: Watchdog, who: object) -> None:
        seen.append(len(answers))
        step(watchdog, who)

    monkeypatch.setattr(Watchdog, "step", note)
    job_id = submit(client, upload(client, png(300, 300)), output_format="webp")
    _work(settings).join()
    assert client.get(f"/v2/jobs/{job_id}").json()["status"] == "COMPLETED"
    assert set(range(STEPS)) <= set(seen)
