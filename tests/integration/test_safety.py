"""The safety check in the service: what a job ends as, with a classifier, without one, and when none was asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from core.options import SafetyCheck
from core.settings import Settings
from tests.requests import png, submit, upload
from worker.upscale import open_worker
from worker.upscaler.engines import Engines
from worker.upscaler.engines.lanczos import Lanczos
from worker.upscaler.picture import Levels

Sql = Callable[..., list[Any]]


class _Classifier:
    """Answers as it is told, and remembers what it was shown."""

    def __init__(self, *, flags: bool) -> None:
        self._flags = flags
        self.shown: list[tuple[int, ...]] = []

    def flags(self, rgb: Levels) -> bool:
        self.shown.append(rgb.shape)
        return self._flags


def _end(
    client: TestClient, settings: Settings, sql: Sql, check: SafetyCheck, classifier: _Classifier | None
) -> dict[str, Any]:
    """Run a job that wants this check, and return what its caller sees."""
    job_id = submit(client, upload(client, png(4, 3)))
    # No dialect on the wire can ask for it yet.
    sql("UPDATE jobs SET options = jsonb_set(options, '{safety_check}', to_jsonb($1::text))", check.value)
    with open_worker(settings, Engines(Lanczos()), classifier) as worker:
        assert worker.work() == 1
    return client.get(f"/v2/jobs/{job_id}").json()


def _stored(settings: Settings) -> list[Path]:
    """Return the files of results."""
    return [path for path in (settings.storage_dir / "results").rglob("*") if path.is_file()]


def test_a_check_that_is_demanded_and_cannot_be_done_fails_the_job_by_that_name_and_at_once(
    client: TestClient, settings: Settings, sql: Sql
) -> None:
    job = _end(client, settings, sql, SafetyCheck.REQUIRED, None)
    assert (job["status"], job["errorCode"], job["result"]) == ("FAILED", "safety_check_unavailable", None)
    assert job["error"] == "A safety check is asked for, and this deployment has no classifier for it."
    assert sql("SELECT attempt, strikes FROM jobs") == [(1, 0)]


@pytest.mark.parametrize("check", [SafetyCheck.REQUIRED, SafetyCheck.IF_INSTALLED])
def test_a_picture_that_is_flagged_fails_its_job_and_is_kept_nowhere(
    client: TestClient, settings: Settings, sql: Sql, check: SafetyCheck
) -> None:
    classifier = _Classifier(flags=True)
    job = _end(client, settings, sql, check, classifier)
    assert (job["status"], job["errorCode"], job["result"]) == ("FAILED", "content_flagged", None)
    assert classifier.shown == [(6, 8, 3)]
    assert _stored(settings) == []


@pytest.mark.parametrize(
    ("check", "classifier"),
    [
        (SafetyCheck.REQUIRED, _Classifier(flags=False)),
        (SafetyCheck.IF_INSTALLED, _Classifier(flags=False)),
        (SafetyCheck.IF_INSTALLED, None),
        (SafetyCheck.OFF, _Classifier(flags=True)),
    ],
)
def test_what_is_clean_unchecked_or_not_to_be_checked_completes(
    client: TestClient, settings: Settings, sql: Sql, check: SafetyCheck, classifier: _Classifier | None
) -> None:
    assert _end(client, settings, sql, check, classifier)["status"] == "COMPLETED"
    assert len(_stored(settings)) == 1
    if classifier is not None:
        assert bool(classifier.shown) is (check is not SafetyCheck.OFF)
