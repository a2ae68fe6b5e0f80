"""Receivers that are slow or dead, and the others, whom that must not concern."""

import socket
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack
from threading import Lock
from typing import Any

import pytest

from core.settings import Settings
from tests.web import Reply, Web, open_web
from tests.webhooks import deliver, owe
from worker import receivers

Sql = Callable[..., list[Any]]


@pytest.fixture
def hanging() -> Generator[str]:
    """The URL of a receiver that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/hook"


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receivers, "FIRST_PAUSE_SECONDS", 0.5)
    monkeypatch.setattr(receivers, "LONGEST_PAUSE_SECONDS", 1.0)


def _delivered(sql: Sql, url: str) -> int:
    return sql("SELECT count(*) FROM deliveries WHERE status = 'delivered' AND url = $1", url)[0]["count"]


def test_three_hundred_deliveries_to_a_receiver_that_hangs_slow_no_other(
    web: Web, hanging: str, settings: Settings, sql: Sql
) -> None:
    owe(sql, hanging, 300)
    owe(sql, web.serve("/hook"), 20)
    began = time.monotonic()
    deliver(settings, lambda: _delivered(sql, web.url + "/hook") == 20)
    assert time.monotonic() - began < 5
    assert sql("SELECT sum(attempts) FROM deliveries WHERE url = $1", hanging)[0]["sum"] == 4


def test_seven_receivers_that_hang_slow_no_other(web: Web, settings: Settings, sql: Sql) -> None:
    with ExitStack() as servers:
        for _ in range(7):
            server = servers.enter_context(socket.create_server(("127.0.0.1", 0)))
            owe(sql, f"http://127.0.0.1:{server.getsockname()[1]}/", 40)
        owe(sql, web.serve("/hook"), 20)
        deliver(settings, lambda: _delivered(sql, web.url + "/hook") == 20, seconds=5)


def test_a_receiver_gets_four_posts_at_a_time(web: Web, settings: Settings, sql: Sql) -> None:
    lock, now, most = Lock(), 0, 0

    def count() -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.1)
        with lock:
            now -= 1

    web.replies["/hook"] = Reply(before=count)
    owe(sql, web.url + "/hook", 20)
    deliver(settings, lambda: _delivered(sql, web.url + "/hook") == 20)
    assert most == 4


@pytest.mark.usefixtures("short_pauses")
def test_a_receiver_that_recovers_gets_everything(web: Web, settings: Settings, sql: Sql) -> None:
    owe(sql, web.serve("/hook", status=503), 100)
    # Dead for two seconds, in which it is tried less and less.
    eager = settings.model_copy(update={"webhook_retry_seconds": (0.1,) * 30})
    began = time.monotonic()
    posts_while_dead = 0

    def mend_later() -> bool:
        nonlocal posts_while_dead
        if not posts_while_dead and time.monotonic() - began > 2:
            posts_while_dead = len(web.seen)
            web.serve("/hook")
        return _delivered(sql, web.url + "/hook") == 100

    deliver(eager, mend_later)
    assert 10 <= posts_while_dead <= 10 + 3 + 4
    assert len(web.seen) <= 100 + posts_while_dead + 1
    assert len({seen.headers["webhook-id"] for seen in web.seen}) == 100


@pytest.mark.usefixtures("short_pauses")
def test_what_waits_for_a_dead_receiver_is_put_off_and_counts_no_attempt(
    web: Web, settings: Settings, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receivers, "FIRST_PAUSE_SECONDS", 30.0)
    owe(sql, web.serve("/hook", status=500), 50)
    deliver(settings, lambda: sql("SELECT count(*) FROM deliveries WHERE due_at <= now()")[0]["count"] == 0)
    untried = "SELECT due_at - now() AS left, status FROM deliveries WHERE attempts = 0"
    rows = sql(untried)
    assert len(rows) >= 50 - 13
    assert {row["status"] for row in rows} == {"pending"}
    assert all(25 < row["left"].total_seconds() < 37 for row in rows)


def test_a_receiver_that_refuses_what_it_is_told_is_not_taken_for_dead(web: Web, settings: Settings, sql: Sql) -> None:
    owe(sql, web.serve("/gone", status=404), 20)
    owe(sql, web.serve("/hook"), 5)
    deliver(settings, lambda: _delivered(sql, web.url + "/hook") == 5)
    deliver(settings, lambda: len([seen for seen in web.seen if seen.path == "/gone"]) >= 20)


def test_a_delivery_without_a_receiver_goes_by_its_url(web: Web, hanging: str, settings: Settings, sql: Sql) -> None:
    owe(sql, hanging, 100)
    owe(sql, web.serve("/hook"), 10)
    sql("UPDATE deliveries SET receiver = ''")
    deliver(settings, lambda: _delivered(sql, web.url + "/hook") == 10, seconds=5)
    assert sql("SELECT sum(attempts) FROM deliveries WHERE url = $1", hanging)[0]["sum"] == 4


def test_two_dispatchers_deliver_each_once(web: Web, settings: Settings, sql: Sql) -> None:
    owe(sql, web.serve("/hook"), 100)
    with open_web() as other:
        owe(sql, other.serve("/hook"), 100)
        deliver(settings, lambda: sql("SELECT 1 FROM deliveries WHERE status <> 'delivered'") == [], dispatchers=2)
        seen = [seen.headers["webhook-id"] for seen in (*web.seen, *other.seen)]
    assert (len(seen), len(set(seen))) == (200, 200)
