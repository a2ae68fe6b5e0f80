"""Waiting for a job without asking all the time: Prefer, ?wait, ETag."""

import asyncio
import re
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from uuid import UUID

import httpx2 as httpx
import pytest
from redis.asyncio.client import PubSub
from starlette.testclient import TestClient

from api.apiframe import schemas, views
from cli.embedded import Redis
from core.errors import DatabaseUnavailable
from core.settings import Settings
from tests.apis import Api, Jobs, open_apis, until
from tests.broker import connect_redis
from tests.requests import body_of, png, submit, upload

Sql = Callable[..., Sequence[Any]]
Work = Callable[[], int]

AT_ONCE = 5.0
"""How long what happens at once may take on a busy machine; whoever is not woken waits longer, with `only_notices`."""


@pytest.fixture
def only_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody look who was not woken."""
    for name in ("FIRST_PAUSE_SECONDS", "LONGEST_PAUSE_SECONDS"):
        monkeypatch.setattr(f"api.waiting.{name}", 60.0)


@pytest.fixture
def apis(settings: Settings, key: str) -> Generator[list[Api]]:
    with open_apis(settings, key, 2) as apis:
        yield apis


@pytest.fixture
def aside() -> Generator[ThreadPoolExecutor]:
    """For requests that are held while the test goes on."""
    with ThreadPoolExecutor(32) as executor:
        yield executor


@pytest.fixture
def jobs(settings: Settings, sql: Sql) -> Jobs:
    return Jobs(settings, sql)


def timed(call: Callable[..., httpx.Response], *arguments: Any, **named: Any) -> tuple[httpx.Response, float]:
    began = time.monotonic()
    response = call(*arguments, **named)
    return response, time.monotonic() - began


# Prefer: wait ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("only_notices")
def test_a_submit_that_waits_is_answered_with_the_finished_job(
    client: TestClient, apis: list[Api], aside: ThreadPoolExecutor, work: Work
) -> None:
    image = upload(client, png(31, 17))
    held = aside.submit(
        apis[0].client.post, "/v2/images/upscale", json=body_of(image), headers={"Prefer": "respond-async, wait=30"}
    )
    until(lambda: work() == 1, 10)
    response = held.result(10)
    assert (response.status_code, response.headers["Preference-Applied"]) == (200, "wait=30")
    job = response.json()
    assert (job["status"], job["result"]["width"]) == ("COMPLETED", 62)
    assert response.headers["Location"] == f"/v2/jobs/{job['id']}"
    assert job == client.get(f"/v2/jobs/{job['id']}").json()


def test_a_submit_that_waits_in_vain_is_answered_as_any_other_with_the_job_s_state(
    apis: list[Api], aside: ThreadPoolExecutor, jobs: Jobs, sql: Sql
) -> None:
    request, headers = body_of("https://example.com/a.png"), {"Prefer": "wait=1"}
    held = aside.submit(timed, apis[0].client.post, "/v2/images/upscale", json=request, headers=headers)
    until(lambda: len(sql("SELECT FROM jobs")) == 1, 5)
    jobs.begin(sql("SELECT id FROM jobs")[0]["id"])
    response, seconds = held.result(5)
    assert (response.status_code, response.json()["status"]) == (202, "PROCESSING")
    assert response.headers["Preference-Applied"] == "wait=1"
    assert int(response.headers["Retry-After"]) > 0
    assert 1 <= seconds < AT_ONCE


@pytest.mark.parametrize("prefer", ["respond-async", "wait=61", ";;,"])
def test_a_preference_that_asks_for_no_wait_of_ours_is_passed_over(client: TestClient, prefer: str) -> None:
    request = body_of("https://example.com/a.png")
    response, seconds = timed(client.post, "/v2/images/upscale", json=request, headers={"Prefer": prefer})
    assert response.status_code == 202
    assert "Preference-Applied" not in response.headers
    assert seconds < AT_ONCE


def test_a_submit_whose_wait_loses_the_database_still_tells_the_job_s_id(
    client: TestClient, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def find(*_: object) -> None:
        raise DatabaseUnavailable("gone")

    monkeypatch.setattr("api.apiframe.views.find", find)
    request = body_of("https://example.com/a.png")
    response = client.post("/v2/images/upscale", json=request, headers={"Prefer": "wait=30"})
    assert response.status_code == 202
    assert response.json() == {"jobId": str(sql("SELECT id FROM jobs")[0]["id"]), "status": "QUEUED"}


@pytest.mark.usefixtures("only_notices")
def test_a_wait_outlasts_the_database_s_absence(
    apis: list[Api], aside: ThreadPoolExecutor, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def find(*_: object) -> None:
        raise DatabaseUnavailable("gone")

    job_id = apis[0].submit()
    held = _held(apis[0], aside, job_id)
    with monkeypatch.context() as away:
        away.setattr("api.apiframe.views.find", find)
        jobs.end(job_id)
        jobs.announce(job_id)
        time.sleep(0.1)
    jobs.announce(job_id)
    response, seconds = held.result(5)
    assert (response.status_code, response.json()["status"]) == (200, "FAILED")
    assert seconds < AT_ONCE


# ?wait ----------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("only_notices")
def test_a_read_that_waits_is_answered_when_the_job_ends_whichever_process_it_asks(
    apis: list[Api], aside: ThreadPoolExecutor, jobs: Jobs
) -> None:
    job_id = apis[0].submit()
    held = [aside.submit(api.client.get, f"/v2/jobs/{job_id}", params={"wait": 30}) for api in apis for _ in range(3)]
    until(lambda: all(api.parts.watch.waiting == 3 for api in apis), 5)
    jobs.begin(job_id)
    jobs.announce(job_id)
    time.sleep(0.1)
    assert not any(answer.done() for answer in held)
    jobs.end(job_id)
    jobs.announce(job_id)
    began = time.monotonic()
    assert {answer.result(5).json()["status"] for answer in held} == {"FAILED"}
    assert time.monotonic() - began < AT_ONCE


def test_an_end_that_nobody_announced_is_found_all_the_same(
    apis: list[Api], aside: ThreadPoolExecutor, jobs: Jobs
) -> None:
    job_id = apis[0].submit()
    held = _held(apis[0], aside, job_id)
    jobs.end(job_id)
    response, seconds = held.result(10)
    assert response.json()["status"] == "FAILED"
    assert seconds < AT_ONCE


@pytest.mark.usefixtures("only_notices")
def test_an_end_between_the_reading_and_the_subscription_is_not_missed(
    apis: list[Api], aside: ThreadPoolExecutor, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscribe, ended = PubSub.subscribe, threading.Event()

    async def subscribe_late(*arguments: Any) -> None:
        await asyncio.to_thread(ended.wait)
        await subscribe(*arguments)

    monkeypatch.setattr(PubSub, "subscribe", subscribe_late)
    job_id = apis[0].submit()
    held = _held(apis[0], aside, job_id)
    time.sleep(0.1)  # for the reading
    jobs.end(job_id)
    jobs.announce(job_id)
    ended.set()
    assert held.result(AT_ONCE)[0].json()["status"] == "FAILED"


@pytest.mark.usefixtures("only_notices")
def test_no_end_is_missed_however_close_it_is_to_the_question(
    apis: list[Api], aside: ThreadPoolExecutor, jobs: Jobs
) -> None:
    slowest = 0.0
    for attempt in range(20):
        job_id = apis[0].submit()
        held = aside.submit(timed, apis[attempt % 2].client.get, f"/v2/jobs/{job_id}", params={"wait": 10})
        time.sleep(0.001 * attempt)
        jobs.end(job_id)
        jobs.announce(job_id)
        slowest = max(slowest, held.result(10)[1])
    assert slowest < AT_ONCE


def test_a_read_that_waits_in_vain_shows_the_job_as_it_is_then_or_that_it_is_the_same(
    apis: list[Api], aside: ThreadPoolExecutor
) -> None:
    path = f"/v2/jobs/{apis[0].submit()}"
    tag = {"If-None-Match": apis[0].client.get(path).headers["ETag"]}
    held = [aside.submit(timed, apis[0].client.get, path, params={"wait": 1}, headers=headers) for headers in ({}, tag)]
    (shown, some), (same, others) = (answer.result(5) for answer in held)
    assert (shown.status_code, shown.json()["status"], same.status_code) == (200, "QUEUED", 304)
    assert 1 <= min(some, others) <= max(some, others) < AT_ONCE


def test_a_job_that_is_over_is_not_waited_for(client: TestClient, jobs: Jobs) -> None:
    job_id = submit(client, "https://example.com/a.png")
    jobs.end(job_id)
    assert timed(client.get, f"/v2/jobs/{job_id}", params={"wait": 60})[1] < AT_ONCE


@pytest.mark.parametrize("wait", ["-1", "61", "soon"])
def test_a_wrong_wait_is_refused_by_its_name(client: TestClient, wait: str) -> None:
    response = client.get(f"/v2/jobs/{UUID(int=0)}", params={"wait": wait})
    assert response.status_code == 400
    assert list(response.json()["details"]) == ["wait"]


def test_an_unknown_job_is_not_waited_for(client: TestClient) -> None:
    response, seconds = timed(client.get, f"/v2/jobs/{UUID(int=0)}", params={"wait": 60})
    assert response.status_code == 404
    assert seconds < AT_ONCE


# ETag -----------------------------------------------------------------------------------------------------------------


def test_a_poll_with_the_tag_it_got_is_answered_without_the_job_until_something_changes(
    client: TestClient, jobs: Jobs
) -> None:
    job_id = submit(client, "https://example.com/a.png")

    def poll(tag: str) -> httpx.Response:
        return client.get(f"/v2/jobs/{job_id}", headers={"If-None-Match": tag})

    tags: list[str] = []
    for change in (
        lambda: None,
        lambda: jobs.begin(job_id),
        lambda: jobs.report(job_id, 1, 40),
        lambda: jobs.report(job_id, 1, 41),
        lambda: jobs.end(job_id),
    ):
        change()
        response = poll(tags[-1] if tags else '"none"')
        assert response.status_code == 200
        tags.append(response.headers["ETag"])
        assert re.fullmatch('W/"[0-9a-f]{32}"', tags[-1])
        unchanged = poll(f'"other", {tags[-1]}')
        assert (unchanged.status_code, unchanged.content) == (304, b"")
        assert (unchanged.headers["ETag"], unchanged.headers["Cache-Control"]) == (tags[-1], "no-store")
        assert ("Retry-After" in unchanged.headers) == (response.json()["status"] != "FAILED")
        assert poll("*").status_code == 304
    assert len(set(tags)) == len(tags)


def test_every_process_gives_a_job_the_same_tag(apis: list[Api]) -> None:
    path = f"/v2/jobs/{apis[0].submit()}"
    assert len({api.client.get(path).headers["ETag"] for api in apis for _ in range(2)}) == 1


def test_a_tag_does_not_move_with_the_clock(client: TestClient) -> None:
    job = schemas.JobObject(**client.get(f"/v2/jobs/{submit(client, 'https://example.com/a.png')}").json())
    for name in views.VOLATILE:
        assert name in schemas.JobObject.model_fields
        assert views.tag(job.model_copy(update={name: job.createdAt})) == views.tag(job)


@pytest.mark.usefixtures("only_notices")
def test_a_wait_with_a_tag_ends_with_the_next_change(apis: list[Api], aside: ThreadPoolExecutor, jobs: Jobs) -> None:
    job_id = apis[0].submit()
    jobs.begin(job_id)
    tag = apis[0].client.get(f"/v2/jobs/{job_id}").headers["ETag"]
    held = _held(apis[1], aside, job_id, tag)
    jobs.report(job_id, 1, 40)
    response, _ = held.result(AT_ONCE)
    assert (response.status_code, response.json()["progress"]) == (200, 40)


def test_a_wait_with_a_tag_that_is_no_longer_true_is_over_at_once(client: TestClient) -> None:
    path = f"/v2/jobs/{submit(client, 'https://example.com/a.png')}"
    response, seconds = timed(client.get, path, params={"wait": 60}, headers={"If-None-Match": '"other"'})
    assert response.status_code == 200
    assert seconds < AT_ONCE


# What goes on behind it -----------------------------------------------------------------------------------------------


def test_who_waits_costs_one_connection_and_leaves_no_subscription_behind(
    apis: list[Api], aside: ThreadPoolExecutor, jobs: Jobs, settings: Settings
) -> None:
    job_ids = [apis[0].submit() for _ in range(5)]
    held = [_held(apis[0], aside, job_id) for job_id in job_ids for _ in range(4)]
    until(lambda: jobs.channels() == len(job_ids), 5)
    with connect_redis(settings.redis_url) as broker:
        assert sum(int(line["sub"]) > 0 for line in broker.client_list()) == 1
    for job_id in job_ids[:4]:
        jobs.end(job_id)
        jobs.announce(job_id)
    until(lambda: jobs.channels() == 1, 5)
    jobs.end(job_ids[4])
    jobs.announce(job_ids[4])
    assert all(answer.result(5)[0].is_success for answer in held)
    until(lambda: jobs.channels() == 0, 5)
    assert apis[0].parts.watch.waiting == 0


def test_a_poll_that_does_not_wait_subscribes_to_nothing(
    client: TestClient, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changes(*_: object) -> None:
        raise AssertionError("subscribed")

    monkeypatch.setattr("api.waiting.Watch.changes", changes)
    assert client.get(f"/v2/jobs/{submit(client, 'https://example.com/a.png')}").status_code == 200


def test_a_client_that_leaves_is_waited_for_no_longer(apis: list[Api], jobs: Jobs) -> None:
    job_id = apis[0].submit()
    with pytest.raises(httpx.ReadTimeout):
        apis[0].client.get(f"/v2/jobs/{job_id}", params={"wait": 60}, timeout=0.2)
    until(lambda: apis[0].parts.watch.waiting == 0 and jobs.channels() == 0, AT_ONCE)


@pytest.mark.usefixtures("only_notices")
def test_without_redis_waiting_only_takes_longer_and_once_it_is_back_it_is_quick_again(
    apis: list[Api], aside: ThreadPoolExecutor, jobs: Jobs, redis_server: Redis
) -> None:
    first, second = (apis[0].submit() for _ in range(2))
    held = [_held(api, aside, job_id) for job_id in (first, second) for api in apis]
    redis_server.stop()
    try:
        jobs.end(first)
        began = time.monotonic()
        assert {answer.result(10)[0].json()["status"] for answer in held[:2]} == {"FAILED"}
        assert time.monotonic() - began < AT_ONCE
        assert not any(api.parts.watch.listening for api in apis)
    finally:
        redis_server.start()
    until(lambda: all(api.parts.watch.listening for api in apis) and jobs.channels() == 1, 5)
    jobs.end(second)
    jobs.announce(second)
    assert {answer.result(AT_ONCE)[0].json()["status"] for answer in held[2:]} == {"FAILED"}


@pytest.mark.usefixtures("only_notices")
def test_a_connection_that_redis_closes_is_replaced_and_nothing_is_missed(
    apis: list[Api], aside: ThreadPoolExecutor, jobs: Jobs, settings: Settings
) -> None:
    job_id = apis[0].submit()
    held = _held(apis[0], aside, job_id)
    with connect_redis(settings.redis_url) as broker:
        broker.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    jobs.end(job_id)
    jobs.announce(job_id)  # in vain, unless the machine paused and the channel is subscribed again by now
    response, seconds = held.result(5)
    assert response.json()["status"] == "FAILED"
    assert seconds < AT_ONCE
    until(lambda: all(api.parts.watch.listening for api in apis), 5)


@pytest.mark.usefixtures("only_notices")
def test_a_process_that_is_to_end_answers_those_it_holds(
    apis: list[Api], aside: ThreadPoolExecutor, jobs: Jobs
) -> None:
    job_id = apis[0].submit()
    held = _held(apis[0], aside, job_id)
    assert apis[0].stop() < AT_ONCE
    response, _ = held.result(AT_ONCE)
    assert (response.status_code, response.json()["status"]) == (200, "QUEUED")


def _held(
    api: Api, aside: ThreadPoolExecutor, job_id: UUID, tag: str | None = None
) -> Future[tuple[httpx.Response, float]]:
    """Ask for a job that is not over, and return once the request is held."""
    before = api.parts.watch.waiting
    headers = {"If-None-Match": tag} if tag else {}
    held = aside.submit(timed, api.client.get, f"/v2/jobs/{job_id}", params={"wait": 60}, headers=headers)
    until(lambda: api.parts.watch.waiting == before + 1, 5)
    return held
