"""What becomes of the attempts of a worker, whatever goes wrong: no job takes it down."""

import hashlib
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from core.errors import DatabaseUnavailable, DeploymentError, Stopped
from core.options import UpscaleOptions
from core.queue import POOL
from core.settings import Settings
from db import queue
from tests.broker import connect_redis
from tests.engines import Repeating
from tests.requests import body_of, failure, finished, png, submit, upload
from worker import endings, reports
from worker.upscale import open_worker
from worker.upscaler.engines import Engines
from worker.upscaler.picture import Picture

Sql = Callable[..., list[Any]]
Work = Callable[[], int]


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
    assert failure(client, job_id) == ("FAILED", "internal", "Something went wrong on our side.")


def test_options_that_this_worker_cannot_read_fail_their_job_and_no_other(
    client: TestClient, work: Work, sql: Sql
) -> None:
    newer, other = (submit(client, upload(client, png(2, 2))) for _ in range(2))
    sql("UPDATE jobs SET options = options || '{\"from_the_next_release\": 1}' WHERE id = $1", newer)
    assert work() == 2
    assert failure(client, newer)[:2] == ("FAILED", "internal")
    assert finished(client, other)["status"] == "COMPLETED"


def test_an_engine_out_of_memory_is_tried_once_more_in_small_tiles_and_then_fails_its_job_by_that_name(
    client: TestClient, settings: Settings, sql: Sql
) -> None:
    job_id = submit(client, upload(client, png(2, 2)))

    def swell(_: object) -> None:
        raise MemoryError

    assert [options.small_tiles for options in _run(settings, swell)] == [False, True]
    assert failure(client, job_id)[:2] == ("FAILED", "out_of_memory")
    assert sql("SELECT attempt, strikes FROM jobs") == [(2, 1)]


def test_a_storage_that_was_away_for_a_while_costs_a_strike_and_no_job(
    client: TestClient, settings: Settings, work: Work, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "FINISH_PATIENCE_SECONDS", 0.0)
    job_id = submit(client, upload(client, png(2, 2)))
    results = settings.storage_dir / "results"
    _run(settings, lambda _: results.write_bytes(b"no folder"))
    assert finished(client, job_id)["status"] == "QUEUED"
    results.unlink()
    assert work() == 0
    sql("UPDATE jobs SET due_at = now()")
    assert work() == 1
    assert finished(client, job_id)["status"] == "COMPLETED"
    assert sql("SELECT attempt, strikes FROM jobs") == [(2, 1)]


def test_a_storage_that_stays_away_fails_the_job_by_that_name(
    client: TestClient, settings: Settings, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "LONGEST_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(endings, "FINISH_PATIENCE_SECONDS", 0.0)
    job_id = submit(client, upload(client, png(2, 2)))
    (settings.storage_dir / "results").write_bytes(b"no folder")
    assert work() == 3
    assert failure(client, job_id)[:2] == ("FAILED", "storage_unavailable")


def test_an_attempt_that_lost_its_job_leaves_nothing_behind(client: TestClient, settings: Settings, sql: Sql) -> None:
    job_id = submit(client, upload(client, png(2, 2)))
    _run(settings, lambda _: sql("UPDATE jobs SET attempt = 2"))
    assert list(settings.storage_dir.glob("results/*")) == []
    assert finished(client, job_id)["status"] == "PROCESSING"


def test_a_zombie_deletes_its_own_object_and_not_that_of_the_attempt_after_it(
    client: TestClient, settings: Settings, work: Work, sql: Sql
) -> None:
    job_id = submit(client, upload(client, png(2, 2)))

    def sleep_while_others_finish(_: object) -> None:
        sql("UPDATE jobs SET status = 'QUEUED', strikes = 1")
        assert work() == 1

    _run(settings, sleep_while_others_finish)
    result = finished(client, job_id)["result"]
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
    job = finished(client, job_id)
    assert (job["status"], job["error"], job["errorCode"]) == ("CANCELLED", None, None)


def test_a_result_that_comes_after_the_cancel_is_thrown_away(client: TestClient, settings: Settings) -> None:
    job_id = submit(client, upload(client, png(2, 2)))
    _run(settings, lambda _: client.post(f"/v2/jobs/{job_id}/cancel"))
    assert finished(client, job_id)["status"] == "CANCELLED"
    assert list(settings.storage_dir.glob("results/*")) == []


def test_a_deadline_that_passes_while_the_job_runs_cancels_it(client: TestClient, settings: Settings) -> None:
    hasty = settings.model_copy(update={"lease_seconds": 1.0})
    body = body_of(upload(client, png(2, 2)))
    job_id = client.post("/v2/images/upscale", json=body, headers={"Cancel-After": "1s"}).json()["jobId"]
    _run(hasty, _obey)
    assert failure(client, job_id)[:2] == ("CANCELLED", "deadline_exceeded")


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
    assert finished(client, job_id)["status"] == "COMPLETED"


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
    assert [finished(client, job_id)["status"] for job_id in job_ids] == ["COMPLETED", "COMPLETED"]


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
            shown.append(finished(client, job_id)["progress"])
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
    assert [finished(client, job)["result"]["engine"] for job in jobs] == ["steered", "lanczos", "steered"]
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
    assert failure(client, asking) == ("FAILED", "deployment", told)
    assert finished(client, other)["status"] == "COMPLETED"
