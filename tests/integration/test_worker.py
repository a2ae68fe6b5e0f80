"""The worker: real images in, results or clear failures out; no job takes it down."""

import hashlib
import io
import logging
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from PIL import Image
from starlette.testclient import TestClient

from core.options import UpscaleOptions
from core.settings import Settings
from tests.requests import encoded, png, submit, upload
from tests.web import Web
from worker import upscale
from worker.upscale import open_worker
from worker.upscaler import engines
from worker.upscaler.engine import Picture

Sql = Callable[..., list[Any]]
Work = Callable[[], int]


def _finished(client: TestClient, job_id: UUID) -> dict[str, Any]:
    return client.get(f"/v2/jobs/{job_id}").json()


def _failure(client: TestClient, job_id: UUID) -> tuple[str, str, str]:
    job = _finished(client, job_id)
    return job["status"], job["errorCode"], job["error"]


@pytest.mark.parametrize(
    ("output_format", "pillow_format", "content_type"),
    [("png", "PNG", "image/png"), ("jpg", "JPEG", "image/jpeg"), ("webp", "WEBP", "image/webp")],
)
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_the_result_is_exactly_as_large_as_asked_in_the_format_asked_for(
    client: TestClient, work: Work, output_format: str, pillow_format: str, content_type: str, factor: int
) -> None:
    job_id = submit(client, upload(client, png(37, 23)), scale_factor=factor, output_format=output_format)
    work()
    result = _finished(client, job_id)["result"]
    stored = client.get(result["images"][0])
    assert stored.headers["Content-Type"] == content_type
    assert hashlib.sha256(stored.content).hexdigest() == result["sha256"]
    with Image.open(io.BytesIO(stored.content)) as picture:
        assert (picture.format, picture.size) == (pillow_format, (37 * factor, 23 * factor))


def test_an_image_named_by_url_is_fetched_by_the_worker(client: TestClient, work: Work, web: Web) -> None:
    web.serve("/photo", png(5, 4))
    redirect = web.serve("/moved", status=302, Location="/photo")
    job_id = submit(client, redirect)
    work()
    assert _finished(client, job_id)["status"] == "COMPLETED"
    assert [seen.path for seen in web.seen] == ["/moved", "/photo"]


def test_a_one_pixel_image_is_upscaled(client: TestClient, work: Work) -> None:
    job_id = submit(client, upload(client, png(1, 1)), scale_factor=8)
    work()
    result = _finished(client, job_id)["result"]
    assert (result["width"], result["height"]) == (8, 8)


def test_an_image_url_that_answers_404_fails_the_job(client: TestClient, work: Work, web: Web) -> None:
    job_id = submit(client, web.url + "/nothing.png")
    work()
    assert _failure(client, job_id) == ("FAILED", "input_fetch_failed", "The image URL answered 404.")


def test_an_image_url_that_nobody_answers_fails_the_job(client: TestClient, work: Work) -> None:
    job_id = submit(client, "http://127.0.0.1:9/a.png")
    work()
    status, code, message = _failure(client, job_id)
    assert (status, code) == ("FAILED", "input_fetch_failed")
    assert message == "The image URL could not be reached, or did not answer in time."


def test_an_image_url_inside_a_private_network_fails_the_job(client: TestClient, work: Work) -> None:
    job_id = submit(client, "http://10.0.0.1/a.png")
    work()
    assert _failure(client, job_id)[:2] == ("FAILED", "url_not_allowed")


def test_an_image_beyond_the_size_limit_fails_the_job(
    client: TestClient, work: Work, web: Web, settings: Settings
) -> None:
    job_id = submit(client, web.serve("/large", b"\0" * (settings.max_input_bytes + 1)))
    work()
    assert _failure(client, job_id)[:2] == ("FAILED", "input_too_large")


def test_a_text_file_named_as_a_png_fails_its_job_and_not_the_worker(client: TestClient, work: Work, web: Web) -> None:
    bad = submit(client, web.serve("/photo.png", b"To whom it may concern", Content_Type="image/png"))
    good = submit(client, upload(client, png(2, 2)))
    assert work() == 2
    assert _failure(client, bad)[:2] == ("FAILED", "input_not_image")
    assert _finished(client, good)["status"] == "COMPLETED"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_image_fails_its_job(client: TestClient, work: Work, web: Web, format: str) -> None:
    whole = encoded(Image.effect_noise((64, 64), 80).convert("RGB"), format)
    job_id = submit(client, upload(client, whole[: len(whole) // 2]))
    work()
    assert _failure(client, job_id)[:2] == ("FAILED", "input_not_image")


def test_a_picture_whose_output_would_pass_the_pixel_limit_fails_its_job(client: TestClient, work: Work) -> None:
    job_id = submit(client, upload(client, png(1300, 1300)), scale_factor=8)
    work()
    status, code, message = _failure(client, job_id)
    assert (status, code) == ("FAILED", "output_too_large")
    assert "10400" in message
    assert "100" in message


def test_a_webp_wider_than_webp_can_be_fails_its_job(client: TestClient, work: Work) -> None:
    job_id = submit(client, upload(client, png(4096, 1)), scale_factor=4, output_format="webp")
    work()
    status, code, message = _failure(client, job_id)
    assert (status, code) == ("FAILED", "output_too_large")
    assert "16383" in message.replace(",", "")


def test_a_header_that_promises_too_many_pixels_is_refused_before_they_are_decoded(
    client: TestClient, work: Work
) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    job_id = submit(client, upload(client, bomb + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")))
    work()
    assert _failure(client, job_id)[:2] == ("FAILED", "input_too_large")


def test_an_upload_that_has_vanished_fails_its_job(client: TestClient, work: Work, settings: Settings) -> None:
    job_id = submit(client, upload(client, png(2, 2)))
    (stored,) = (settings.storage_dir / "uploads").iterdir()
    stored.unlink()
    work()
    assert _failure(client, job_id) == ("FAILED", "input_fetch_failed", "The uploaded image is gone.")


class _Engine:
    """An engine that a test steers."""

    name = "steered"

    def __init__(self, act: Callable[[Callable[[], bool]], object]) -> None:
        self._act = act

    def upscale(
        self,
        picture: Picture,
        options: UpscaleOptions,
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> Picture:
        on_progress(0.5)
        self._act(should_stop)
        return picture


def _run_one(settings: Settings, act: Callable[[Callable[[], bool]], object]) -> None:
    with open_worker(settings, _Engine(act)) as worker:
        assert worker.run_next()


def test_a_bug_in_the_engine_fails_its_job_without_telling_how(client: TestClient, settings: Settings) -> None:
    job_id = submit(client, upload(client, png(2, 2)))

    def explode(_: object) -> None:
        raise ZeroDivisionError("an internal detail")

    _run_one(settings, explode)
    assert _failure(client, job_id) == ("FAILED", "internal", "Something went wrong on our side.")


def test_options_that_this_worker_cannot_read_fail_their_job_and_no_other(
    client: TestClient, work: Work, sql: Sql
) -> None:
    newer, other = (submit(client, upload(client, png(2, 2))) for _ in range(2))
    sql("UPDATE jobs SET options = options || '{\"from_the_next_release\": 1}' WHERE id = $1", newer)
    assert work() == 2
    assert _failure(client, newer)[:2] == ("FAILED", "internal")
    assert _finished(client, other)["status"] == "COMPLETED"


def test_an_engine_out_of_memory_fails_its_job_by_that_name(client: TestClient, settings: Settings) -> None:
    job_id = submit(client, upload(client, png(2, 2)))

    def swell(_: object) -> None:
        raise MemoryError

    _run_one(settings, swell)
    assert _failure(client, job_id)[:2] == ("FAILED", "out_of_memory")


def test_an_attempt_that_lost_its_job_leaves_no_object_behind(client: TestClient, settings: Settings, sql: Sql) -> None:
    job_id = submit(client, upload(client, png(2, 2)))
    _run_one(settings, lambda _: sql("UPDATE jobs SET attempt = 2"))
    assert list((settings.storage_dir / "results" / str(job_id)).iterdir()) == []
    assert _finished(client, job_id)["status"] == "PROCESSING"


def test_a_running_attempt_stops_when_its_job_is_taken_away(
    client: TestClient, settings: Settings, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upscale, "WATCH_SECONDS", 0.05)
    submit(client, upload(client, png(2, 2)))
    stopped = threading.Event()

    def wait(should_stop: Callable[[], bool]) -> None:
        sql("UPDATE jobs SET attempt = 2")
        for _ in range(200):
            if should_stop():
                stopped.set()
                return
            threading.Event().wait(0.02)

    _run_one(settings, wait)
    assert stopped.is_set()


def test_progress_is_shown_while_the_job_runs(
    client: TestClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upscale, "PROGRESS_INTERVAL_SECONDS", 0.0)
    job_id = submit(client, upload(client, png(2, 2)))
    shown: list[int] = []

    def look(_: object) -> None:
        for _ in range(100):
            shown.append(_finished(client, job_id)["progress"])
            if shown[-1] == 50:
                return
            threading.Event().wait(0.02)

    _run_one(settings, look)
    assert shown[-1] == 50


def test_without_weights_the_log_says_once_that_lanczos_stands_in(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert engines.load("auto").name == "lanczos"
    assert len([record for record in caplog.records if "weights" in record.message]) == 1


def test_results_lie_under_their_attempt(client: TestClient, work: Work, settings: Settings) -> None:
    job_id = submit(client, upload(client, png(2, 2)))
    work()
    assert Path(settings.storage_dir, "results", str(job_id), "1.png").exists()
