"""Fixtures around an API and a worker inside the test's process, and a bucket."""

import asyncio
from collections.abc import Callable, Generator

import pytest
from starlette.testclient import TestClient

from api.app import create_app
from cli.keys import create_key
from core.settings import Settings
from core.storage.s3 import S3Storage
from tests.buckets import Bucket, open_bucket
from tests.documented import DocumentedClient
from tests.storages import open_s3
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


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Generator[Bucket]:
    with open_bucket(tmp_path_factory.mktemp("bucket") / "served") as bucket:
        yield bucket


@pytest.fixture(scope="session")
def _opened(bucket: Bucket) -> S3Storage:
    return open_s3(bucket)


@pytest.fixture
def s3(_opened: S3Storage, bucket: Bucket) -> Generator[S3Storage]:
    """A storage in the bucket: empty, and emptied again."""
    yield _opened
    bucket.empty()
