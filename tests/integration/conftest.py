"""Fixtures around an API and a worker inside the test's process."""

import asyncio
from collections.abc import Callable, Generator

import pytest
from starlette.testclient import TestClient

from api.app import create_app
from cli.keys import create_key
from core.settings import Settings
from tests.documented import DocumentedClient
from worker.upscale import open_worker
from worker.upscaler.engines import Engines
from worker.upscaler.engines.lanczos import Lanczos


@pytest.fixture
def anonymous(settings: Settings) -> Generator[TestClient]:
    """A client without a key."""
    with DocumentedClient(create_app(settings)) as client:
        yield client


@pytest.fixture
def key(settings: Settings) -> str:
    return asyncio.run(create_key(settings, "tests"))


@pytest.fixture
def client(anonymous: TestClient, key: str) -> TestClient:
    """A client with a key."""
    anonymous.headers["X-API-Key"] = key
    return anonymous


@pytest.fixture
def work(settings: Settings) -> Callable[[], int]:
    """Run every job that is queued, in this process; return how many there were."""

    def run() -> int:
        with open_worker(settings, Engines(Lanczos())) as worker:
            return worker.work()

    return run
