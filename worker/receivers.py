"""Who may be posted to now: a few posts at a time for each receiver, and none for a while to one that seems dead.

A receiver is the scheme, host and port of a webhook's URL. All of this is one process's memory: a dispatcher that
starts trusts everybody.
"""

import logging
import time
from collections import deque
from collections.abc import Callable

import anyio

IN_FLIGHT = 32
"""How many posts one dispatcher makes at once."""

IN_FLIGHT_PER_RECEIVER = 4

FAILURES_IN_A_ROW = 10
"""After so many a receiver seems dead."""

WINDOW_SECONDS = 300.0
WINDOW_POSTS = 10
WINDOW_FAILURES = 0.7
"""So does one of whose posts in the window, when there were enough of them, this part failed."""

FIRST_PAUSE_SECONDS = 30.0
LONGEST_PAUSE_SECONDS = 300.0
"""How long a receiver that seems dead is left alone; each trial that fails doubles it."""

FORGET_SECONDS = 600.0
"""A receiver that was posted to no more is forgotten after this, dead or not."""

_SLICE_SECONDS = 10.0
"""The window moves in steps of this length."""

logger = logging.getLogger(__name__)


class Receivers:
    """Counts the posts that are under way and how those before them ended.

    Whoever looks for room and begins posts after an `await` holds `choosing` meanwhile.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[str, _Receiver] = {}
        self._in_flight = 0
        self.choosing = anyio.Lock()
        self.ended = anyio.Event()
        """Is set, and replaced by another, when a post ends."""

    @property
    def free(self) -> int:
        """How many posts may begin, whoever they are for."""
        return IN_FLIGHT - self._in_flight

    def room(self, name: str) -> int:
        """Return how many posts may begin for one receiver."""
        known = self._known.get(name)
        return IN_FLIGHT_PER_RECEIVER if known is None else known.room(self._clock())

    def rooms(self) -> dict[str, int]:
        """Return the room of each receiver that has less than IN_FLIGHT_PER_RECEIVER."""
        now = self._clock()
        self._known = {name: known for name, known in self._known.items() if not known.forgotten(now)}
        rooms = {name: known.room(now) for name, known in self._known.items()}
        return {name: room for name, room in rooms.items() if room < IN_FLIGHT_PER_RECEIVER}

    def held(self) -> dict[str, float]:
        """Return the receivers that are left alone, and for how many seconds yet."""
        now = self._clock()
        return {name: known.open_until - now for name, known in self._known.items() if known.open_until > now}

    def begin(self, name: str) -> None:
        """Count a post that begins; there was room for it."""
        self._in_flight += 1
        self._known.setdefault(name, _Receiver(name)).begin(self._clock())

    def end(self, name: str, alive: bool | None) -> None:
        """Count a post that ended, and whether the receiver showed that it lives; None: it was never made."""
        self._in_flight -= 1
        self._known[name].end(alive, self._clock())
        self.ended.set()
        self.ended = anyio.Event()


class _Receiver:
    """One receiver's posts, and its circuit breaker: closed, open for a pause, then half open for one trial."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._in_flight = 0
        self._failures_in_a_row = 0
        self._window: deque[_Slice] = deque()
        self._pause = 0.0  # while the breaker is closed
        self._on_trial = False
        self._seen_at = 0.0
        self.open_until = 0.0

    def room(self, now: float) -> int:
        if not self._pause:
            return IN_FLIGHT_PER_RECEIVER - self._in_flight
        return 1 if now >= self.open_until and not self._in_flight else 0

    def forgotten(self, now: float) -> bool:
        return not self._in_flight and now > max(self._seen_at, self.open_until) + FORGET_SECONDS

    def begin(self, now: float) -> None:
        # What was chosen while the breaker was closed, and begins a moment after it opened, is no trial.
        self._on_trial = self._pause > 0 and now >= self.open_until and not self._in_flight
        self._in_flight += 1

    def end(self, alive: bool | None, now: float) -> None:
        self._in_flight -= 1
        self._seen_at = now
        trial, self._on_trial = self._on_trial, False
        if alive is None:
            return
        if trial and alive:
            self._close()
        elif trial:
            self._open(min(2 * self._pause, LONGEST_PAUSE_SECONDS), now)
        elif not self._pause:  # what was still under way when the breaker opened changes nothing
            self._count(alive, now)
            if not alive and self._seems_dead():
                self._open(FIRST_PAUSE_SECONDS, now)

    def _count(self, alive: bool, now: float) -> None:
        self._failures_in_a_row = 0 if alive else self._failures_in_a_row + 1
        while self._window and self._window[0].began <= now - WINDOW_SECONDS:
            self._window.popleft()
        if not self._window or self._window[-1].began <= now - _SLICE_SECONDS:
            self._window.append(_Slice(now))
        self._window[-1].posts += 1
        self._window[-1].failures += not alive

    def _seems_dead(self) -> bool:
        posts, failures = sum(part.posts for part in self._window), sum(part.failures for part in self._window)
        enough = posts >= WINDOW_POSTS and failures >= WINDOW_FAILURES * posts
        return enough or self._failures_in_a_row >= FAILURES_IN_A_ROW

    def _open(self, pause: float, now: float) -> None:
        self._pause, self.open_until = pause, now + pause
        logger.warning("receiver %s seems dead: no webhooks to it for %.0f seconds", self._name, pause)

    def _close(self) -> None:
        self._pause = self.open_until = 0.0
        self._failures_in_a_row = 0
        self._window.clear()
        logger.info("receiver %s answers again", self._name)


class _Slice:
    """The posts of a few seconds."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.posts = 0
        self.failures = 0
