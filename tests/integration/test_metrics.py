"""The metrics: what the database counts, in Prometheus's words."""

from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from tests.requests import png, submit, upload

Work = Callable[[], int]


def _scrape(client: TestClient) -> dict[tuple[str, str], float]:
    answer = client.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain")
    return {
        (sample.name, sample.labels.get("status", "")): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_metrics_count_what_was_submitted_and_how_it_ended(client: TestClient, work: Work) -> None:
    submit(client, upload(client, png(2, 2)))
    submit(client, "http://10.0.0.1/a.png")
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


def test_metrics_of_an_empty_service_are_zero(anonymous: TestClient) -> None:
    assert set(_scrape(anonymous).values()) == {0}
