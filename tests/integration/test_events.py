"""Following a job by server-sent events, across processes, faults and reconnects."""

import json
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import httpx2 as httpx
import pytest
from starlette.testclient import TestClient

from cli.embedded import Redis
from core.settings import Settings
from tests.apis import Api, Event, Jobs, blocks_of, events_of, open_apis, until
from tests.requests import png, submit, upload

Sql = Callable[..., Sequence[Any]]
Work = Callable[[], int]

AT_ONCE = 5.0
"""How long what happens at once may take on a busy machine; whoever is not woken waits longer, with `only_notices`."""


@pytest.fixture
def apis(settings: Settings, key: str) -> Generator[list[Api]]:
    with open_apis(settings, key, 2) as apis:
        yield apis


@pytest.fixture(autouse=True)
def _short_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a stream that does not tell what a test waits for end, and so fail that test."""
    monkeypatch.setattr("api.apiframe.events.LIFETIME_SECONDS", 20.0)


@pytest.fixture
def only_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody look who was not woken."""
    for name in ("FIRST_PAUSE_SECONDS", "LONGEST_PAUSE_SECONDS"):
        monkeypatch.setattr(f"api.waiting.{name}", 60.0)


@pytest.fixture
def jobs(settings: Settings, sql: Sql) -> Jobs:
    return Jobs(settings, sql)


def path_of(job_id: UUID) -> str:
    return f"/v2/jobs/{job_id}/events"


def after(event_id: str | None) -> Mapping[str, str]:
    return {} if event_id is None else {"Last-Event-ID": event_id}


@contextmanager
def following(api: Api, job_id: UUID, last: str | None = None) -> Generator[Generator[Event]]:
    with api.client.stream("GET", path_of(job_id), headers=after(last)) as response:
        assert response.status_code == 200
        yield events_of(response.iter_lines())


def read_all(client: httpx.Client | TestClient, job_id: UUID, last: str | None = None) -> list[Event]:
    """Read a stream that ends by itself."""
    return list(events_of(client.get(path_of(job_id), headers=after(last)).text.splitlines()))


@pytest.mark.usefixtures("only_notices")
def test_a_job_is_told_from_its_first_state_to_its_last(client: TestClient, apis: list[Api], work: Work) -> None:
    job_id = submit(client, upload(client, png(31, 17)))
    with following(apis[0], job_id) as events:
        first = next(events)
        assert (first.id, first.name, first.data["status"]) == ("0.0", "queued", "QUEUED")
        until(lambda: work() == 1, 10)
        *between, last = events
    assert (last.id, last.name) == ("1.999", "completed")
    assert last.data == client.get(f"/v2/jobs/{job_id}").json()
    assert {event.name for event in between} <= {"processing", "progress"}


@pytest.mark.usefixtures("only_notices")
def test_every_change_is_told_at_once_with_growing_ids_by_whichever_process(apis: list[Api], jobs: Jobs) -> None:
    job_id = apis[0].submit()
    with following(apis[0], job_id) as here, following(apis[1], job_id) as there:
        told = [(next(here), next(there))]
        for change in (
            lambda: jobs.begin(job_id),
            lambda: jobs.report(job_id, 1, 10),
            lambda: jobs.report(job_id, 1, 45),
            lambda: jobs.requeue(job_id),
            lambda: jobs.begin(job_id, 2),
            lambda: jobs.report(job_id, 2, 7),
            lambda: jobs.end(job_id),
        ):
            change()
            jobs.announce(job_id)
            began = time.monotonic()
            told.append((next(here), next(there)))
            assert time.monotonic() - began < AT_ONCE
        assert list(here) == list(there) == []
    assert [one.id for one, _ in told] == ["0.0", "1.0", "1.10", "1.45", "1.990", "2.0", "2.7", "2.999"]
    assert [one.name for one, _ in told] == [
        *("queued", "processing", "progress", "progress", "queued", "processing", "progress", "failed"),
    ]
    assert all((one.id, one.name) == (other.id, other.name) for one, other in told)
    assert told[3][0].data == {
        "event": "progress",
        "jobId": str(job_id),
        "status": "PROCESSING",
        "progress": 45,
        "model": "clarity-upscale",
    }


@pytest.mark.usefixtures("only_notices")
def test_a_stream_begins_with_the_state_as_it_is_and_does_not_go_back(apis: list[Api], jobs: Jobs) -> None:
    job_id = apis[0].submit()
    jobs.begin(job_id)
    for percent in (10, 45):
        jobs.report(job_id, 1, percent)
    with following(apis[0], job_id) as events:
        first = next(events)
        assert (first.id, first.name, first.data["progress"]) == ("1.45", "processing", 45)
        jobs.report(job_id, 1, 46)
        assert next(events).id == "1.46"


@pytest.mark.usefixtures("only_notices")
def test_a_client_that_comes_back_is_told_what_it_missed_and_nothing_twice(apis: list[Api], jobs: Jobs) -> None:
    job_id = apis[0].submit()
    jobs.begin(job_id)
    for percent in (10, 45, 80):
        jobs.report(job_id, 1, percent)
    with following(apis[1], job_id, "0.0") as events:
        assert [next(events).id for _ in range(4)] == ["1.0", "1.10", "1.45", "1.80"]
    with following(apis[0], job_id, "1.10") as events:
        assert [next(events).id for _ in range(2)] == ["1.45", "1.80"]
        jobs.end(job_id)
        jobs.announce(job_id)
        assert [event.id for event in events] == ["1.999"]
    assert [event.id for event in read_all(apis[1].client, job_id, "1.45")] == ["1.80", "1.999"]


@pytest.mark.usefixtures("only_notices")
def test_a_client_that_is_cut_off_after_every_event_is_told_all_of_them_once(apis: list[Api], jobs: Jobs) -> None:
    job_id = apis[0].submit()
    changes: list[Callable[[], None]] = [lambda: jobs.begin(job_id)]
    changes += [lambda percent=percent: jobs.report(job_id, 1, percent) for percent in range(5, 100, 10)]
    changes += [lambda: jobs.end(job_id)]

    def live() -> None:
        for change in changes:
            change()
            jobs.announce(job_id)
            time.sleep(0.03)

    living = threading.Thread(target=live)
    living.start()
    told: list[Event] = []
    while not told or told[-1].name != "failed":
        with following(apis[len(told) % 2], job_id, told[-1].id if told else None) as events:
            told.append(next(events))
    living.join()
    places = [event.place for event in told]
    assert places == sorted(set(places))
    progress = [event.data["progress"] for event in told if event.name == "progress"]
    assert progress == list(range(progress[0], 100, 10))
    assert progress[0] <= 25


@pytest.mark.usefixtures("only_notices")
def test_progress_of_an_attempt_is_not_told_before_its_beginning(apis: list[Api], jobs: Jobs) -> None:
    job_id = apis[0].submit()
    jobs.begin(job_id)
    with following(apis[0], job_id) as events:
        assert next(events).id == "1.0"
        jobs.report(job_id, 2, 30)  # before its claim can be read, as far as this process can tell
        time.sleep(0.1)
        jobs.begin(job_id, 2)
        jobs.announce(job_id)
        assert [next(events).id for _ in range(2)] == ["2.0", "2.30"]


def test_a_stream_of_a_job_that_is_over_tells_that_and_ends(client: TestClient, jobs: Jobs) -> None:
    job_id = submit(client, "https://example.com/a.png")
    jobs.end(job_id)
    response = client.get(path_of(job_id))
    assert response.headers["Content-Type"].startswith("text/event-stream")
    assert (response.headers["Cache-Control"], response.headers["X-Accel-Buffering"]) == ("no-store", "no")
    first, second = blocks_of(response.text.splitlines())
    assert first == ["retry: 2000"]
    name, data, id = second
    assert (name, id) == ("event: failed", "id: 0.999")
    assert json.loads(data.removeprefix("data: ")) == client.get(f"/v2/jobs/{job_id}").json()


def test_a_job_that_was_cancelled_ends_its_stream_too(client: TestClient, sql: Sql) -> None:
    job_id = submit(client, "https://example.com/a.png")
    sql("UPDATE jobs SET status = 'CANCELLED', completed_at = now()")
    assert [event.name for event in read_all(client, job_id)] == ["cancelled"]


def test_who_comes_back_after_the_last_event_is_told_to_stay_away(client: TestClient, jobs: Jobs) -> None:
    job_id = submit(client, "https://example.com/a.png")
    jobs.end(job_id)
    response = client.get(path_of(job_id), headers={"Last-Event-ID": "0.999"})
    assert (response.status_code, response.content) == (204, b"")


def test_an_id_that_was_never_given_counts_as_none(client: TestClient, jobs: Jobs) -> None:
    job_id = submit(client, "https://example.com/a.png")
    jobs.end(job_id)
    for last in ("", "x", "1", "1.x", "-1.0", "1.0.0", "1.1000", "1e3.1", "7.999", "9" * 30 + ".1"):
        assert [event.id for event in read_all(client, job_id, last)] == ["0.999"]


def test_nobody_can_follow_a_job_that_is_not_there_or_another_s(client: TestClient, sql: Sql) -> None:
    job_id = submit(client, "https://example.com/a.png")
    assert client.get(path_of(UUID(int=0))).json()["code"] == "not_found"
    assert client.get("/v2/jobs/x/events").status_code == 400
    assert client.get(path_of(job_id), headers={"X-API-Key": "upk_wrong"}).status_code == 401
    sql("INSERT INTO api_keys (id, name, prefix, hash) VALUES (gen_random_uuid(), 'other', 'upk_', 'x')")
    sql("UPDATE jobs SET api_key_id = (SELECT id FROM api_keys WHERE name = 'other')")
    assert client.get(path_of(job_id)).status_code == 404


def test_a_silent_stream_carries_a_heartbeat(apis: list[Api], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.apiframe.events.HEARTBEAT_SECONDS", 0.1)
    job_id = apis[0].submit()
    with apis[0].client.stream("GET", path_of(job_id)) as response:
        blocks = blocks_of(response.iter_lines())
        assert next(blocks) == ["retry: 2000"]
        next(blocks)
        began = time.monotonic()
        assert [next(blocks) for _ in range(3)] == [[": ping"]] * 3
        assert 0.2 < time.monotonic() - began < AT_ONCE


def test_a_stream_does_not_live_for_ever(apis: list[Api], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.apiframe.events.LIFETIME_SECONDS", 0.2)
    assert [event.id for event in read_all(apis[0].client, apis[0].submit())] == ["0.0"]


@pytest.mark.usefixtures("only_notices")
def test_a_client_that_leaves_frees_what_it_took(apis: list[Api], jobs: Jobs) -> None:
    job_id = apis[0].submit()
    for _ in range(3):
        with following(apis[0], job_id) as events:
            next(events)
            until(lambda: jobs.channels() == 1, 5)
        until(lambda: apis[0].parts.watch.waiting == 0 and jobs.channels() == 0, AT_ONCE)


def test_without_redis_states_are_told_a_little_later(apis: list[Api], jobs: Jobs, redis_server: Redis) -> None:
    job_id = apis[0].submit()
    with following(apis[0], job_id) as events:
        assert next(events).id == "0.0"
        redis_server.stop()
        try:
            jobs.begin(job_id)
            began = time.monotonic()
            assert next(events).id == "1.0"
            assert time.monotonic() - began < AT_ONCE
        finally:
            redis_server.start()
        jobs.report(job_id, 1, 45)
        assert next(events).id == "1.45"
        jobs.end(job_id)
        jobs.announce(job_id)
        assert [event.id for event in events] == ["1.999"]


def test_a_stream_survives_its_connections_to_the_database(apis: list[Api], jobs: Jobs, sql: Sql) -> None:
    job_id = apis[0].submit()
    with following(apis[0], job_id) as events:
        assert next(events).id == "0.0"
        for _ in range(5):
            sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'upscaled'")
            jobs.announce(job_id)
            time.sleep(0.02)
        jobs.end(job_id)
        jobs.announce(job_id)
        assert [event.id for event in events] == ["0.999"]


@pytest.mark.usefixtures("only_notices")
def test_a_process_that_is_to_end_ends_its_streams(apis: list[Api]) -> None:
    with following(apis[0], apis[0].submit()) as events:
        assert next(events).id == "0.0"
        assert apis[0].stop() < AT_ONCE
        assert list(events) == []
