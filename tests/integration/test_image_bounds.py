"""Jobs whose pictures are larger than the deployment allows, and where pictures are decoded."""

from io import BytesIO
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from core.settings import Settings
from tests.requests import png, submit, upload
from worker.upscale import open_worker
from worker.upscaler import decoding
from worker.upscaler.engines import Engines
from worker.upscaler.engines.lanczos import Lanczos


def test_each_setting_that_bounds_pictures_ends_what_passes_it_and_nothing_else(
    client: TestClient, settings: Settings
) -> None:
    transparent = BytesIO()
    Image.new("RGBA", (1600, 1600)).save(transparent, "PNG")
    cases: list[tuple[bytes, dict[str, Any], str | None, str]] = [
        (png(1601, 1), {}, "input_too_large", "the limit is 1600 on a side"),
        (transparent.getvalue(), {}, "input_too_large", "MiB of memory; the limit is 40."),
        (png(800, 800), {"output_format": "webp"}, "output_too_large", "MiB of memory; the limit is 40."),
        (png(800, 800), {"output_format": "png"}, None, ""),
    ]
    jobs = [submit(client, upload(client, data), **options) for data, options, _, _ in cases]
    bounded = settings.model_copy(update={"max_input_side": 1600, "max_memory_bytes": 40 << 20})
    with open_worker(bounded, Engines(Lanczos())) as worker:
        assert worker.work() == 4
    for job_id, (_, _, code, sentence) in zip(jobs, cases, strict=True):
        job = client.get(f"/v2/jobs/{job_id}").json()
        assert job.get("errorCode") == code
        assert sentence in (job.get("error") or "")


def test_the_process_that_holds_the_engine_decodes_nothing(
    client: TestClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trap(*_: object) -> None:
        pytest.fail("a picture was decoded here")

    job_id = submit(client, upload(client, png(4, 4)), scale_factor=2)
    monkeypatch.setattr(decoding, "decode", trap)
    monkeypatch.setattr(Image.Image, "load", trap)
    with open_worker(settings, Engines(Lanczos())) as worker:
        worker.work()
    assert client.get(f"/v2/jobs/{job_id}").json()["status"] == "COMPLETED"
