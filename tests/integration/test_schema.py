"""Every operation of /openapi.json, asked at random: what it answers is what the document says.

Budget and seed are fixed; SCHEMA_EXAMPLES asks for more of each operation, and SCHEMA_SEED for others.
"""

import asyncio
import os
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx2 as httpx
import pytest
import schemathesis
from schemathesis import Response
from schemathesis.core.parameters import ParameterLocation
from schemathesis.specs.openapi import checks
from schemathesis.transport.serialization import Binary

from api import waiting
from api.apiframe import events, images, jobs
from api.app import create_app
from cli.embedded import Redis
from cli.keys import create_key
from core.settings import Settings, load_settings
from tests.apis import open_apis
from tests.databases import Clones, PostgresServer, execute
from tests.population import AnyCase, Population, populate
from worker.upscale import open_worker
from worker.upscaler.engines import Engines
from worker.upscaler.engines.lanczos import Lanczos

EXAMPLES = int(os.environ.get("SCHEMA_EXAMPLES", "40"))
SEED = int(os.environ.get("SCHEMA_SEED", "1"))


def _settings(**given: Any) -> Settings:
    anywhere = {"database_url": "postgresql://me@localhost/db", "redis_url": "redis://localhost"}
    return load_settings(**{**anywhere, "secret_key": "a secret of thirty-two characters", **given})


DOCUMENT = create_app(_settings()).openapi()


def _load(examples: int) -> Any:
    schema = schemathesis.openapi.from_dict(DOCUMENT)
    schema.config.seed = SEED
    schema.config.generation.update(max_examples=examples, database="none", with_security_parameters=False)
    return schema


ALL, KEYED = _load(EXAMPLES), _load(2)
KEYED.config.phases.coverage.enabled = False


@dataclass(frozen=True)
class Service:
    """A running API."""

    url: str
    key: str
    population: Population


@pytest.fixture(scope="module")
def service(
    postgres: PostgresServer, _clones: Clones, redis_server: Redis, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Service]:
    """An API that holds something of everything, and lets nobody wait for long."""
    database = _clones.take()
    settings = _settings(
        database_url=postgres.url(database),
        redis_url=redis_server.url,
        storage_dir=tmp_path_factory.mktemp("storage"),
        outbound_allow="127.0.0.0/8",
    )
    key, other = (asyncio.run(create_key(settings, name)) for name in ("one", "other"))
    with pytest.MonkeyPatch.context() as patch, open_apis(settings, key, 1) as (api,):
        patch.setattr(events, "LIFETIME_SECONDS", 0.01)
        patch.setattr(jobs, "hold", _hold_briefly)
        patch.setattr(images, "hold", _hold_briefly)
        url = str(api.client.base_url).rstrip("/")
        with httpx.Client(base_url=url, headers={"X-API-Key": other}) as stranger:
            population = populate(api.client, stranger, lambda: _work(settings), lambda *asked: _ask(settings, *asked))
        yield Service(url, key, population)
    _clones.give_back(database)


async def _hold_briefly(watch: Any, request: Any, job_id: UUID, seconds: float, look: Any) -> Any:
    return await waiting.hold(watch, request, job_id, seconds / 1000, look)


def _work(settings: Settings) -> None:
    with open_worker(settings, Engines(Lanczos())) as worker:
        worker.work()


def _ask(settings: Settings, statement: str, *arguments: object) -> Any:
    return asyncio.run(execute(settings.database_url.replace("+asyncpg", ""), statement, *arguments))


def _needs_a_key(context: Any) -> bool:
    return "401" in context.operation.definition.raw["responses"]


# With a parameter, or all cases would have one id, of which xdist runs one only.
@ALL.parametrize()
@pytest.mark.parametrize("aimed", [True, False], ids=["aimed", "as drawn"])
def test_what_is_asked_at_random_is_answered_as_documented(case: AnyCase, service: Service, aimed: bool) -> None:
    if aimed:
        case = service.population.meet(case)
    response = case.call(service.url, headers={"X-API-Key": service.key})
    _validate(case, response)


@KEYED.include(_needs_a_key).parametrize()
@pytest.mark.parametrize("name", ["X-API-Key", "Authorization"])
def test_who_has_no_key_gets_nothing_and_is_told_so(case: AnyCase, service: Service, name: str) -> None:
    case = service.population.meet(case)
    for key in (None, "", f"upk_{38 * '0'}", f"Bearer upk_{38 * '0'}", "Bearer", b"Bearer \xff", service.key[:-1]):
        response = case.call(service.url, headers={} if key is None else {name: key})
        assert response.status_code == 401
        _validate(case, response)


def test_the_document_is_the_same_whatever_the_settings() -> None:
    others = _settings(
        s3_bucket="b", cors_origins="*", requests_per_minute=5, max_input_bytes=1000, public_url="https://example.com"
    )
    assert create_app(others).openapi() == DOCUMENT


def test_a_refused_method_is_told_all_that_there_are(service: Service) -> None:
    response = httpx.delete(f"{service.url}/v2/files/a/b")
    assert (response.status_code, response.headers["Allow"]) == (405, "GET, HEAD, PUT")


def _validate(case: AnyCase, response: Response) -> None:
    # What is valid by its schema can still be refused: an image that is none, an upload of somebody else's.
    excluded: list[Any] = [checks.positive_data_acceptance]  # pyright: ignore[reportUnknownMemberType]
    # To schemathesis bytes are never valid, nor is a word as a header that is a list; HTTP knows nothing else.
    part = case.meta and case.meta.components.get(ParameterLocation.HEADER)
    if isinstance(case.body, Binary) or (part and part.mode.is_negative):
        excluded.append(checks.negative_data_rejection)  # pyright: ignore[reportUnknownMemberType]
    case.validate_response(response, excluded_checks=excluded)  # pyright: ignore[reportUnknownMemberType]
