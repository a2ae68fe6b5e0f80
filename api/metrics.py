"""GET /metrics: the queue and how jobs ended, in the words of Prometheus.

All of it is read from the database, whose counts are part of the statements that they count: it is the same whichever
process answers, and no crash makes it wrong.
"""

from collections.abc import Iterable

from fastapi import APIRouter, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from api.dependencies import AdminDep, KeyedRoute, PartsDep
from api.errors import documented
from db import census
from db.census import Census
from db.models import JobStatus
from db.records import OVER

router = APIRouter(tags=["health"], route_class=KeyedRoute)


class _Collected(Collector):
    def __init__(self, census: Census) -> None:
        self._census = census

    def collect(self) -> Iterable[Metric]:
        census, tallies = self._census, self._census.tallies
        submitted = tallies.get("submitted", 0)
        yield CounterMetricFamily("upscaled_jobs_submitted", "Jobs that were accepted.", submitted)
        finished = CounterMetricFamily("upscaled_jobs_finished", "Jobs that are over, by how.", labels=["status"])
        for name in (status.lower() for status in OVER):
            finished.add_metric([name], tallies.get(name, 0))
        yield finished
        jobs = GaugeMetricFamily("upscaled_jobs", "Jobs that are not over.", labels=["status"])
        jobs.add_metric([JobStatus.QUEUED.lower()], census.queued)
        jobs.add_metric([JobStatus.PROCESSING.lower()], census.processing)
        yield jobs
        age = census.oldest_queued_seconds
        yield GaugeMetricFamily("upscaled_oldest_queued_seconds", "How long the oldest queued job has waited.", age)
        yield GaugeMetricFamily("upscaled_workers", "Workers that are registered.", census.workers)
        pending = census.pending_deliveries
        yield GaugeMetricFamily("upscaled_deliveries_pending", "Webhook deliveries that are still owed.", pending)


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {"content": {"text/plain": {}}, "description": "Prometheus's text format."},
        **documented(401, 403, 429),
    },
)
async def metrics(_caller: AdminDep, parts: PartsDep) -> Response:
    """Return the metrics. Prometheus sends the key of an admin as a bearer token."""
    async with parts.database.connection() as connection:
        counted = await census.take(connection)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(counted))
    return Response(generate_latest(registry), media_type="text/plain; version=0.0.4; charset=utf-8")
