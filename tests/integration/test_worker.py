"""The worker: real images in, results or clear failures out; no job takes it down."""

import hashlib
import io
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from PIL import Image
from starlette.testclient import TestClient

from core.errors import DatabaseUnavailable, DeploymentError, Stopped
from core.options import UpscaleOptions
from core.queue import POOL
from core.settings import Settings
from db import queue
from tests.broker import connect_redis
from tests.engines import Repeating
from tests.requests import body_of, encoded, png, submit, upload
from tests.web import Web
from worker import endings, reports
from worker.upscale import open_worker
from worker.upscaler.engines import Engines
from worker.upscaler.engines.lanczos import Lanczos
from worker.upscaler.picture import Picture

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


def test_an_image_url_that_nobody_answers_fails_the_job_at_the_third_attempt(
    client: TestClient, work: Work, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "LONGEST_RETRY_SECONDS", 0.0)
    job_id = submit(client, "http://127.0.0.1:9/a.png")
    assert work() == 3
    status, code, message = _failure(client, job_id)
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
        assert _finished(client, job_id)["status"] == "QUEUED"
        assert work() == 0
        sql("UPDATE jobs SET due_at = now()")
    web.serve("/photo", png(2, 2))
    assert work() == 1
    job = _finished(client, job_id)
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


def test_of_an_upload_no_more_is_read_than_the_limit(
    client: TestClient, work: Work, settings: Settings, sql: Sql
) -> None:
    job_id = submit(client, upload(client, png(4, 3)))
    (key,) = (row["image_key"] for row in sql("SELECT image_key FROM jobs"))
    (settings.storage_dir / key).write_bytes(png(4, 3) + b"\0" * settings.max_input_bytes)
    work()
    assert _failure(client, job_id)[:2] == ("FAILED", "input_too_large")


def test_a_result_may_be_an_input_although_no_upload_may_be_as_large(
    client: TestClient, work: Work, settings: Settings
) -> None:
    first = submit(client, upload(client, png(4, 3)))
    work()
    second = submit(client, _finished(client, first)["result"]["images"][0])
    with open_worker(settings.model_copy(update={"max_input_bytes": 10}), Engines(Lanczos())) as worker:
        worker.work()
    assert _finished(client, second)["status"] == "COMPLETED"


def test_an_upload_that_has_vanished_fails_its_job(client: TestClient, work: Work, settings: Settings) -> None:
    job_id = submit(client, upload(client, png(2, 2)))
    (stored,) = (settings.storage_dir / "uploads").iterdir()
    stored.unlink()
    work()
    assert _failure(client, job_id) == ("FAILED", "input_fetch_failed", "The uploaded image is gone.")


class _Engine(Repeating):
    """An engine that a test steers."""

    name = "steered"

    def __init__(self, act: Callable[[Callable[[], bool]], object]) -> None:
        self._steered = act
        self.options: list[UpscaleOptions] = []

    def act(
        self,
        picture: Picture,
        options: UpscaleOptions,
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.options.append(options)
        on_progress(0.5)
        self._steered(should_stop)


def _run(settings: Settings, act: Callable[[Callable[[], bool]], object]) -> list[UpscaleOptions]:
    """Run what is queued; return what the engine was told, each time."""
    engine = _Engine(act)
    with open_worker(settings, Engines(engine)) as worker:
        assert worker.work()
    return engine.options


def _obey(should_stop: Callable[[], bool]) -> None:
    """Work until told to stop, as an engine with many steps does."""
    for _ in range(500):
        if should_stop():
            raise Stopped("The job was told to stop.")
        time.sleep(0.01)


def test_a_bug_in_the_engine_fails_its_job_without_telling_how(client: TestClient, settings: Settings) -> None:
    job_id = submit(client, upload(client, png(2, 2)))

    def explode(_: object) -> None:
        raise ZeroDivisionError("an internal detail")

    _run(settings, explode)
    assert _failure(client, job_id) == ("FAILED", "internal", "Something went wrong on our side.")


def test_options_that_this_worker_cannot_read_fail_their_job_and_no_other(
    client: TestClient, work: Work, sql: Sql
) -> None:
    newer, other = (submit(client, upload(client, png(2, 2))) for _ in range(2))
    sql("UPDATE jobs SET options = options || '{\"from_the_next_release\": 1}' WHERE id = $1", newer)
    assert work() == 2
    assert _failure(client, newer)[:2] == ("FAILED", "internal")
    assert _finished(client, other)["status"] == "COMPLETED"


def test_an_engine_out_of_memory_is_tried_once_more_in_small_tiles_and_then_fails_its_job_by_that_name(
    client: TestClient, settings: Settings, sql: Sql
) -> None:
    job_id = submit(client, upload(client, png(2, 2)))

    def swell(_: object) -> None:
        raise MemoryError

    assert [options.small_tiles for options in _run(settings, swell)] == [False, True]
    assert _failure(client, job_id)[:2] == ("FAILED", "out_of_memory")
    assert sql("SELECT attempt, strikes FROM jobs") == [(2, 1)]


def test_a_storage_that_was_away_for_a_while_costs_a_strike_and_no_job(
    client: TestClient, settings: Settings, work: Work, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "FINISH_PATIENCE_SECONDS", 0.0)
    job_id = submit(client, upload(client, png(2, 2)))
    results = settings.storage_dir / "results"
    _run(settings, lambda _: results.write_bytes(b"no folder"))
    assert _finished(client, job_id)["status"] == "QUEUED"
    results.unlink()
    assert work() == 0
    sql("UPDATE jobs SET due_at = now()")
    assert work() == 1
    assert _finished(client, job_id)["status"] == "COMPLETED"
    assert sql("SELECT attempt, strikes FROM jobs") == [(2, 1)]


def test_a_storage_that_stays_away_fails_the_job_by_that_name(
    client: TestClient, settings: Settings, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "LONGEST_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(endings, "FINISH_PATIENCE_SECONDS", 0.0)
    job_id = submit(client, upload(client, png(2, 2)))
    (settings.storage_dir / "results").write_bytes(b"no folder")
    assert work() == 3
    assert _failure(client, job_id)[:2] == ("FAILED", "storage_unavailable")


def test_an_attempt_that_lost_its_job_leaves_nothing_behind(client: TestClient, settings: Settings, sql: Sql) -> None:
    job_id = submit(client, upload(client, png(2, 2)))
    _run(settings, lambda _: sql("UPDATE jobs SET attempt = 2"))
    assert list(settings.storage_dir.glob("results/*")) == []
    assert _finished(client, job_id)["status"] == "PROCESSING"


def test_a_zombie_deletes_its_own_object_and_not_that_of_the_attempt_after_it(
    client: TestClient, settings: Settings, work: Work, sql: Sql
) -> None:
    job_id = submit(client, upload(client, png(2, 2)))

    def sleep_while_others_finish(_: object) -> None:
        sql("UPDATE jobs SET status = 'QUEUED', strikes = 1")
        assert work() == 1

    _run(settings, sleep_while_others_finish)
    result = _finished(client, job_id)["result"]
    assert [file.name for file in (settings.storage_dir / "results" / str(job_id)).iterdir()] == ["2.png"]
    assert hashlib.sha256(client.get(result["images"][0]).content).hexdigest() == result["sha256"]
    assert result["engine"] == "lanczos"


def test_a_running_attempt_stops_when_its_job_is_taken_away(client: TestClient, settings: Settings, sql: Sql) -> None:
    hasty = settings.model_copy(update={"lease_seconds": 0.3})
    submit(client, upload(client, png(2, 2)))

    def lose(should_stop: Callable[[], bool]) -> None:
        sql("UPDATE jobs SET attempt = 2")
        _obey(should_stop)
        pytest.fail("it was not told to stop")

    _run(hasty, lose)
    assert sql("SELECT status, attempt, strikes FROM jobs") == [("PROCESSING", 2, 0)]


def test_a_cancelled_job_stops_at_its_next_step(client: TestClient, settings: Settings) -> None:
    job_id = submit(client, upload(client, png(2, 2)))

    def cancel(should_stop: Callable[[], bool]) -> None:
        time.sleep(0.3)  # until the worker listens
        assert client.post(f"/v2/jobs/{job_id}/cancel").status_code == 202
        began = time.monotonic()
        with pytest.raises(Stopped):
            _obey(should_stop)
        assert time.monotonic() - began < 1
        raise Stopped("The job was told to stop.")

    _run(settings, cancel)
    job = _finished(client, job_id)
    assert (job["status"], job["error"], job["errorCode"]) == ("CANCELLED", None, None)


def test_a_result_that_comes_after_the_cancel_is_thrown_away(client: TestClient, settings: Settings) -> None:
    job_id = submit(client, upload(client, png(2, 2)))
    _run(settings, lambda _: client.post(f"/v2/jobs/{job_id}/cancel"))
    assert _finished(client, job_id)["status"] == "CANCELLED"
    assert list(settings.storage_dir.glob("results/*")) == []


def test_a_deadline_that_passes_while_the_job_runs_cancels_it(client: TestClient, settings: Settings) -> None:
    hasty = settings.model_copy(update={"lease_seconds": 1.0})
    body = body_of(upload(client, png(2, 2)))
    job_id = client.post("/v2/images/upscale", json=body, headers={"Cancel-After": "1s"}).json()["jobId"]
    _run(hasty, _obey)
    assert _failure(client, job_id)[:2] == ("CANCELLED", "deadline_exceeded")


def test_a_drain_without_time_hands_the_job_back_without_a_strike(
    client: TestClient, settings: Settings, sql: Sql
) -> None:
    submit(client, upload(client, png(2, 2)))

    def drain_and_obey(should_stop: Callable[[], bool]) -> None:
        worker.drain()
        _obey(should_stop)

    with open_worker(settings.model_copy(update={"drain_seconds": 0.0}), Engines(_Engine(drain_and_obey))) as worker:
        assert worker.work()
    assert sql("SELECT status, attempt, strikes, due_at <= now() FROM jobs") == [("QUEUED", 1, 0, True)]
    with connect_redis(settings.redis_url) as broker:
        _wait_for(lambda: broker.llen(POOL) >= 1)


def test_a_drain_with_time_lets_the_job_finish(client: TestClient, settings: Settings, sql: Sql) -> None:
    job_id = submit(client, upload(client, png(2, 2)))

    def work_on(should_stop: Callable[[], bool]) -> None:
        worker.drain()
        assert not should_stop()

    with open_worker(settings, Engines(_Engine(work_on))) as worker:
        assert worker.work()
    assert _finished(client, job_id)["status"] == "COMPLETED"


def test_a_worker_that_ends_leaves_the_register(client: TestClient, settings: Settings, sql: Sql) -> None:
    submit(client, upload(client, png(2, 2)))
    _run(settings, lambda _: sql("INSERT INTO tallies SELECT 'seen', 0, count(*) FROM workers"))
    assert sql("SELECT count FROM tallies WHERE name = 'seen'") == [(1,)]
    assert sql("SELECT count(*) FROM workers") == [(0,)]


def test_a_worker_that_ends_after_a_claim_whose_answer_was_lost_leaves_the_register_too(
    client: TestClient, settings: Settings, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(client, upload(client, png(2, 2)))
    claim = queue.claim

    async def answer_lost(*arguments: Any, **named: Any) -> None:
        await claim(*arguments, **named)
        raise DatabaseUnavailable("The answer is lost.")

    monkeypatch.setattr(queue, "claim", answer_lost)
    with open_worker(settings, Engines(_Engine(lambda _: None))) as worker, pytest.raises(DatabaseUnavailable):
        worker.work()
    assert sql("SELECT status, (SELECT count(*) FROM workers) FROM jobs") == [("PROCESSING", 0)]


def test_a_bug_in_what_runs_beside_the_jobs_costs_no_job(
    client: TestClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def explode(*_: object) -> None:
        raise ZeroDivisionError("an internal detail")

    job_ids = [submit(client, upload(client, png(2, 2))) for _ in range(2)]
    monkeypatch.setattr("worker.lease.workers.beat", explode)
    monkeypatch.setattr("core.notices.announce", explode)
    hasty = settings.model_copy(update={"lease_seconds": 0.3})
    with open_worker(hasty, Engines(_Engine(lambda _: time.sleep(0.2)))) as worker:
        assert worker.work() == 2
    assert [_finished(client, job_id)["status"] for job_id in job_ids] == ["COMPLETED", "COMPLETED"]


def _wait_for(holds: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < give_up_at, "it did not come about in time"
        time.sleep(0.02)


def test_progress_is_shown_while_the_job_runs(
    client: TestClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "PROGRESS_INTERVAL_SECONDS", 0.0)
    job_id = submit(client, upload(client, png(2, 2)))
    shown: list[int] = []

    def look(_: object) -> None:
        for _ in range(100):
            shown.append(_finished(client, job_id)["progress"])
            if shown[-1] == 50:
                return
            threading.Event().wait(0.02)

    _run(settings, look)
    assert shown[-1] == 50


def test_results_lie_under_their_attempt(client: TestClient, work: Work, settings: Settings) -> None:
    job_id = submit(client, upload(client, png(2, 2)))
    work()
    assert Path(settings.storage_dir, "results", str(job_id), "1.png").exists()


def _open_drafts() -> list[str]:
    """Return the temporary files without names that this process has open."""
    names: list[str] = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            names.append(str(descriptor.readlink()))
    return [name for name in names if name.startswith(f"{tempfile.gettempdir()}/") and name.endswith("(deleted)")]


def test_whatever_becomes_of_a_job_the_file_that_held_its_picture_is_gone(
    client: TestClient, settings: Settings, sql: Sql, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(endings, "FINISH_PATIENCE_SECONDS", 0.0)
    seen: list[int] = []

    def complete(_: object) -> None:
        pass

    def fail(_: object) -> None:
        raise ZeroDivisionError("an internal detail")

    def lose(_: object) -> None:
        sql("UPDATE jobs SET attempt = attempt + 1")

    def take_storage_away(_: object) -> None:
        (settings.storage_dir / "results").rename(settings.storage_dir / "away")
        (settings.storage_dir / "results").write_bytes(b"no folder")

    for ending in (complete, fail, lose, take_storage_away):

        def look(should_stop: Callable[[], bool], end: Callable[[object], object] = ending) -> None:
            seen.append(len(_open_drafts()))
            end(should_stop)

        submit(client, upload(client, png(2, 2)))
        with open_worker(settings, Engines(_Engine(look))) as worker:
            assert worker.work()
            assert _open_drafts() == []
    assert seen == [1] * 4


def test_a_job_may_ask_for_an_engine_by_its_name_and_its_result_tells_which_it_was(
    client: TestClient, work: Work, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def load(name: str, _: object) -> _Engine:
        asked.append(name)
        return _Engine(lambda _: None)

    monkeypatch.setattr("worker.upscaler.engines.load", load)
    jobs = [submit(client, upload(client, png(2, 2))) for _ in range(3)]
    sql("UPDATE jobs SET options = jsonb_set(options, '{engine}', '\"superres\"') WHERE id <> $1", jobs[1])
    assert work() == 3
    assert [_finished(client, job)["result"]["engine"] for job in jobs] == ["steered", "lanczos", "steered"]
    assert asked == ["superres"]


def test_an_engine_that_is_asked_for_and_cannot_run_fails_its_job_by_that_name_and_no_other(
    client: TestClient, work: Work, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise DeploymentError("Its weights are missing.")

    monkeypatch.setattr("worker.upscaler.engines.load", refuse)
    asking, other = (submit(client, upload(client, png(2, 2))) for _ in range(2))
    sql("UPDATE jobs SET options = jsonb_set(options, '{engine}', '\"superres\"') WHERE id = $1", asking)
    assert work() == 2
    told = "The superres engine cannot run here; the service's log says why."
    assert _failure(client, asking) == ("FAILED", "deployment", told)
    assert _finished(client, other)["status"] == "COMPLETED"
