"""What the worker is given: real images become results, all others clear failures."""

import hashlib
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from core.settings import Settings
from tests.requests import encoded, failure, finished, png, submit, upload
from tests.web import Web
from worker import endings
from worker.upscale import open_worker
from worker.upscaler.engines import Engines
from worker.upscaler.engines.lanczos import Lanczos

Sql = Callable[..., list[Any]]
Work = Callable[[], int]


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
    result = finished(client, job_id)["result"]
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
    assert finished(client, job_id)["status"] == "COMPLETED"
    assert [seen.path for seen in web.seen] == ["/moved", "/photo"]


def test_a_one_pixel_image_is_upscaled(client: TestClient, work: Work) -> None:
    job_id = submit(client, upload(client, png(1, 1)), scale_factor=8)
    work()
    result = finished(client, job_id)["result"]
    assert (result["width"], result["height"]) == (8, 8)


def test_an_image_url_that_answers_404_fails_the_job(client: TestClient, work: Work, web: Web) -> None:
    job_id = submit(client, web.url + "/nothing.png")
    work()
    assert failure(client, job_id) == ("FAILED", "input_fetch_failed", "The image URL answered 404.")


def test_an_image_url_that_nobody_answers_fails_the_job_at_the_third_attempt(
    client: TestClient, work: Work, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "LONGEST_RETRY_SECONDS", 0.0)
    job_id = submit(client, "http://127.0.0.1:9/a.png")
    assert work() == 3
    status, code, message = failure(client, job_id)
    assert (status, code) == ("FAILED", "input_fetch_failed")
    assert message == "The image URL could not be reached, or did not answer in time."
    assert sql("SELECT attempt, strikes FROM jobs") == [(3, 3)]


def test_what_time_may_mend_is_tried_again_after_pauses_that_grow(
    client: TestClient, work: Work, web: Web, sql: Sql
) -> None:
    job_id = submit(client, web.serve("/photo", status=503))
    for low, high in ((1.6, 2.4), (8, 12)):
        assert work() == 1
        ((pause,),) = sql("SELECT extract(epoch FROM due_at - now())::float8 FROM jobs")
        assert low - 1 < pause < high
        assert finished(client, job_id)["status"] == "QUEUED"
        assert work() == 0
        sql("UPDATE jobs SET due_at = now()")
    web.serve("/photo", png(2, 2))
    assert work() == 1
    job = finished(client, job_id)
    assert (job["status"], job["error"], job["errorCode"]) == ("COMPLETED", None, None)
    assert sql("SELECT attempt, strikes FROM jobs") == [(3, 2)]


def test_a_mistake_of_the_caller_is_never_tried_again(client: TestClient, work: Work, web: Web, sql: Sql) -> None:
    submit(client, web.url + "/nothing.png")
    submit(client, web.serve("/photo.png", b"To whom it may concern"))
    inside = submit(client, "https://example.com/a.png")
    sql("UPDATE jobs SET image_url = 'http://10.0.0.1/a.png' WHERE id = $1", inside)
    assert work() == 3
    assert sql("SELECT DISTINCT status, attempt, strikes FROM jobs") == [("FAILED", 1, 0)]


def test_an_image_url_inside_a_private_network_fails_the_job(client: TestClient, work: Work, sql: Sql) -> None:
    job_id = submit(client, "https://example.com/a.png")
    sql("UPDATE jobs SET image_url = 'http://10.0.0.1/a.png'")  # as if it had been submitted under other settings
    work()
    assert failure(client, job_id)[:2] == ("FAILED", "url_not_allowed")


def test_an_image_beyond_the_size_limit_fails_the_job(
    client: TestClient, work: Work, web: Web, settings: Settings
) -> None:
    job_id = submit(client, web.serve("/large", b"\0" * (settings.max_input_bytes + 1)))
    work()
    assert failure(client, job_id)[:2] == ("FAILED", "input_too_large")


def test_a_text_file_named_as_a_png_fails_its_job_and_not_the_worker(client: TestClient, work: Work, web: Web) -> None:
    bad = submit(client, web.serve("/photo.png", b"To whom it may concern", Content_Type="image/png"))
    good = submit(client, upload(client, png(2, 2)))
    assert work() == 2
    assert failure(client, bad)[:2] == ("FAILED", "input_not_image")
    assert finished(client, good)["status"] == "COMPLETED"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_image_fails_its_job(client: TestClient, work: Work, web: Web, format: str) -> None:
    whole = encoded(Image.effect_noise((64, 64), 80).convert("RGB"), format)
    job_id = submit(client, upload(client, whole[: len(whole) // 2]))
    work()
    assert failure(client, job_id)[:2] == ("FAILED", "input_not_image")


def test_a_picture_whose_output_would_pass_the_pixel_limit_fails_its_job(client: TestClient, work: Work) -> None:
    job_id = submit(client, upload(client, png(1300, 1300)), scale_factor=8)
    work()
    status, code, message = failure(client, job_id)
    assert (status, code) == ("FAILED", "output_too_large")
    assert "10400" in message
    assert "100" in message


def test_a_webp_wider_than_webp_can_be_fails_its_job(client: TestClient, work: Work) -> None:
    job_id = submit(client, upload(client, png(4096, 1)), scale_factor=4, output_format="webp")
    work()
    status, code, message = failure(client, job_id)
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
    assert failure(client, job_id)[:2] == ("FAILED", "input_too_large")


def test_of_an_upload_no_more_is_read_than_the_limit(
    client: TestClient, work: Work, settings: Settings, sql: Sql
) -> None:
    job_id = submit(client, upload(client, png(4, 3)))
    (key,) = (row["image_key"] for row in sql("SELECT image_key FROM jobs"))
    (settings.storage_dir / key).write_bytes(png(4, 3) + b"\0" * settings.max_input_bytes)
    work()
    assert failure(client, job_id)[:2] == ("FAILED", "input_too_large")


def test_a_result_may_be_an_input_although_no_upload_may_be_as_large(
    client: TestClient, work: Work, settings: Settings
) -> None:
    first = submit(client, upload(client, png(4, 3)))
    work()
    second = submit(client, finished(client, first)["result"]["images"][0])
    with open_worker(settings.model_copy(update={"max_input_bytes": 10}), Engines(Lanczos())) as worker:
        worker.work()
    assert finished(client, second)["status"] == "COMPLETED"


def test_an_upload_that_has_vanished_fails_its_job(client: TestClient, work: Work, settings: Settings) -> None:
    job_id = submit(client, upload(client, png(2, 2)))
    (stored,) = (settings.storage_dir / "uploads").iterdir()
    stored.unlink()
    work()
    assert failure(client, job_id) == ("FAILED", "input_fetch_failed", "The uploaded image is gone.")
