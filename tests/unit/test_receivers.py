"""The limits and the circuit breaker of webhook receivers, by a clock that the tests move."""

import pytest

from core.outbound import read_retry_after
from db.deliveries import Outcome
from worker.posts import shows_life
from worker.receivers import FORGET_SECONDS, IN_FLIGHT, IN_FLIGHT_PER_RECEIVER, Receivers
from worker.webhooks import pause_after

NAME = "https://example.com"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def receivers(clock: Clock) -> Receivers:
    return Receivers(clock)


def _post(receivers: Receivers, *outcomes: bool | None) -> None:
    for alive in outcomes:
        receivers.begin(NAME)
        receivers.end(NAME, alive)


def _seems_dead(receivers: Receivers) -> bool:
    return receivers.room(NAME) == 0


def test_each_receiver_has_its_own_room_and_all_share_one(receivers: Receivers) -> None:
    assert receivers.rooms() == {}
    for _ in range(3):
        receivers.begin(NAME)
    assert receivers.rooms() == {NAME: IN_FLIGHT_PER_RECEIVER - 3}
    assert receivers.room("https://example.org") == IN_FLIGHT_PER_RECEIVER
    assert receivers.free == IN_FLIGHT - 3
    receivers.end(NAME, alive=True)
    assert (receivers.room(NAME), receivers.free) == (IN_FLIGHT_PER_RECEIVER - 2, IN_FLIGHT - 2)


def test_a_receiver_seems_dead_after_ten_failures_in_a_row(receivers: Receivers) -> None:
    _post(receivers, *[False] * 9)
    assert not _seems_dead(receivers)
    _post(receivers, False)
    assert _seems_dead(receivers)
    assert receivers.held() == {NAME: 30.0}


def test_what_was_chosen_before_and_begins_after_a_receiver_seemed_dead_is_no_trial(receivers: Receivers) -> None:
    _post(receivers, *[False] * 10)
    _post(receivers, False, True)
    assert receivers.held() == {NAME: 30.0}


def test_failures_in_a_row_count_however_far_apart_they_are(receivers: Receivers, clock: Clock) -> None:
    for _ in range(10):
        _post(receivers, False)
        clock.now += 400
    assert receivers.room(NAME) == 1  # dead, and by now to be tried again


def test_a_receiver_seems_dead_when_seven_of_ten_posts_in_five_minutes_failed(
    receivers: Receivers, clock: Clock
) -> None:
    _post(receivers, True, True, True, *[False] * 6)
    assert not _seems_dead(receivers)
    _post(receivers, False)
    assert _seems_dead(receivers)


def test_a_failure_of_more_than_five_minutes_ago_is_forgotten(receivers: Receivers, clock: Clock) -> None:
    _post(receivers, *[False] * 8, True)
    clock.now += 301
    _post(receivers, False, False)
    assert not _seems_dead(receivers)


def test_two_failures_of_three_are_no_death(receivers: Receivers) -> None:
    for alive in [True, False, False] * 20:
        _post(receivers, alive)
        assert not _seems_dead(receivers)


def test_after_the_pause_one_post_is_let_through_and_its_success_opens_the_way(
    receivers: Receivers, clock: Clock
) -> None:
    _post(receivers, *[False] * 10)
    clock.now += 29.9
    assert _seems_dead(receivers)
    clock.now += 0.1
    assert (receivers.room(NAME), receivers.held()) == (1, {})
    receivers.begin(NAME)
    assert _seems_dead(receivers)
    receivers.end(NAME, alive=True)
    assert receivers.rooms() == {}
    _post(receivers, False)
    assert not _seems_dead(receivers)


def test_each_trial_that_fails_doubles_the_pause_up_to_five_minutes(receivers: Receivers, clock: Clock) -> None:
    _post(receivers, *[False] * 10)
    pauses: list[float] = []
    for _ in range(6):
        pauses.append(receivers.held()[NAME])
        clock.now += pauses[-1]
        _post(receivers, False)
    assert pauses == [30, 60, 120, 240, 300, 300]


def test_a_trial_that_was_never_made_is_due_again(receivers: Receivers, clock: Clock) -> None:
    _post(receivers, *[False] * 10)
    clock.now += 30
    _post(receivers, None)
    assert receivers.room(NAME) == 1


def test_what_was_under_way_when_a_receiver_died_neither_revives_it_nor_prolongs_its_pause(
    receivers: Receivers, clock: Clock
) -> None:
    for _ in range(3):
        receivers.begin(NAME)
    _post(receivers, *[False] * 10)
    receivers.end(NAME, alive=True)
    clock.now += 31
    assert _seems_dead(receivers)  # no trial beside what is still under way
    receivers.end(NAME, alive=False)
    receivers.end(NAME, alive=False)
    assert receivers.room(NAME) == 1


def test_receivers_of_long_ago_take_no_memory(receivers: Receivers, clock: Clock) -> None:
    _post(receivers, *[False] * 10)
    clock.now += 30 + FORGET_SECONDS + 1
    assert receivers.rooms() == {}


@pytest.mark.parametrize(
    ("status", "lives"),
    [(200, True), (302, True), (404, True), (410, True), (408, False), (429, False), (503, False), (None, False)],
)
def test_an_answer_shows_life_unless_it_says_that_the_server_is_in_trouble(status: int | None, lives: bool) -> None:
    assert shows_life(Outcome(duration_ms=1, status_code=status)) is lives


PAUSES = (5.0, 300.0, 1800.0, 7200.0, 18_000.0, 36_000.0, 36_000.0)


def test_the_pauses_are_those_of_the_schedule_give_or_take_a_fifth() -> None:
    failed = Outcome(duration_ms=1, status_code=500)
    for place, pause in enumerate(PAUSES, start=1):
        drawn = [pause_after(failed, place, PAUSES) or 0 for _ in range(200)]
        assert 0.8 * pause <= min(drawn) < 0.9 * pause
        assert 1.1 * pause < max(drawn) <= 1.2 * pause
    assert pause_after(failed, 8, PAUSES) is None


def test_a_receiver_may_ask_for_a_longer_pause_but_not_for_a_shorter_or_endless_one() -> None:
    def pause(seconds: float, place: int) -> float | None:
        return pause_after(Outcome(duration_ms=1, status_code=503, retry_after=seconds), place, PAUSES)

    assert pause(100, 1) == 100
    assert (pause(100, 2) or 0) >= 240
    assert pause(10**9, 1) == 86_400
    assert pause(100, 8) is None


def test_an_address_that_is_gone_is_not_tried_again() -> None:
    assert pause_after(Outcome(duration_ms=1, status_code=410, retry_after=5), 1, PAUSES) is None


@pytest.mark.parametrize("value", ["", "soon", "-5", "1.5", "9" * 5000, "Wed, 99 Foo 2026 07:28:00 GMT"])
def test_a_retry_after_that_cannot_be_read_says_nothing(value: str) -> None:
    assert read_retry_after(value) is None


def test_retry_after_is_a_number_or_a_date() -> None:
    assert read_retry_after("120") == 120
    assert (read_retry_after("Wed, 21 Oct 2099 07:28:00 GMT") or 0) > 86_400
    assert (read_retry_after("Wed, 21 Oct 2099 07:28:00 -0000") or 0) > 86_400
    assert read_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
