"""The metrics: what the database counts, in Prometheus's words."""

import asyncio
from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from cli.keys import create_key
from core.settings import Settings
from db.models import Scope
from tests.requests import png, submit, upload
from tests.web import Web

Work = Callable[[], int]


@pytest.fixture
def key(settings: Settings) -> str:
    """A key that may read metrics, in place of that of the other tests."""
    return asyncio.run(create_key(settings, "admin", scopes=[Scope.ADMIN]))


def _scrape(client: TestClient) -> dict[tuple[str, str], float]:
    answer = client.get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"].startswith("text/plain")
    return {
        (sample.name, sample.labels.get("status", "")): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_metrics_count_what_was_submitted_and_how_it_ended(client: TestClient, work: Work, web: Web) -> None:
    submit(client, upload(client, png(2, 2)))
    submit(client, web.serve("/missing", status=404))
    work()
    client.post(f"/v2/jobs/{submit(client, upload(client, png(2, 2)))}/cancel")
    submit(client, upload(client, png(2, 2)))
    metrics = _scrape(client)
    assert metrics["upscaled_jobs_submitted_total", ""] == 4
    for status in ("completed", "failed", "cancelled"):
        assert metrics["upscaled_jobs_finished_total", status] == 1
    assert metrics["upscaled_jobs", "queued"] == 1
    assert metrics["upscaled_jobs", "processing"] == 0
    assert metrics["upscaled_oldest_queued_seconds", ""] >= 0
    assert metrics["upscaled_workers", ""] == 0
    assert metrics["upscaled_deliveries_pending", ""] == 0


def test_metrics_of_an_empty_service_are_zero(client: TestClient) -> None:
    assert set(_scrape(client).values()) == {0}


def test_prometheus_can_send_the_key_as_a_bearer_token(anonymous: TestClient, key: str) -> None:
    anonymous.headers["Authorization"] = f"Bearer {key}"
    assert set(_scrape(anonymous).values()) == {0}


def test_metrics_are_for_admins(anonymous: TestClient, settings: Settings) -> None:
    assert anonymous.get("/metrics").status_code == 401
    anonymous.headers["X-API-Key"] = asyncio.run(create_key(settings, "no admin"))
    refused = anonymous.get("/metrics")
    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
