"""Fixtures around an API inside the test's process: its client holds every answer against the OpenAPI document."""

import asyncio
import re
from collections.abc import Callable, Generator
from typing import Any

import httpx2 as httpx
import jsonschema
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from api.app import create_app
from cli.stack import create_key
from core.settings import Settings
from worker.upscale import open_worker
from worker.upscaler import engines


class DocumentedClient(TestClient):
    """A client that fails the test when an answer is not one that /openapi.json describes."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(app, raise_server_exceptions=False)
        self._document: dict[str, Any] = app.openapi()

    def request(self, method: str, url: Any, **arguments: Any) -> httpx.Response:
        response = super().request(method, url, **arguments)
        path = response.request.url.path
        if path.startswith("/v2") and response.status_code not in (404, 405):
            self._check("get" if method == "HEAD" else method.lower(), path, response)
        return response

    def _check(self, method: str, path: str, response: httpx.Response) -> None:
        template = next(template for template in self._document["paths"] if _matches(template, path))
        responses = self._document["paths"][template][method]["responses"]
        assert str(response.status_code) in responses, f"{response.status_code} is not documented for {method} {path}"
        schema = responses[str(response.status_code)].get("content", {}).get("application/json", {}).get("schema")
        if schema and response.headers["Content-Type"] == "application/json":
            whole = {**schema, "components": self._document["components"]}
            jsonschema.validate(response.json(), whole, jsonschema.Draft202012Validator)


def _matches(template: str, path: str) -> bool:
    pattern = re.sub(r"\\{(\w+)(:path)?\\}", lambda match: ".+" if match[1] == "key" else "[^/]+", re.escape(template))
    return re.fullmatch(pattern, path) is not None


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
        with open_worker(settings, engines.load("lanczos")) as worker:
            return sum(1 for _ in iter(worker.run_next, False))

    return run
