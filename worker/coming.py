"""What comes next, begun beside what is done now."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Coming(Generic[Value]):
    """What `prepare` returns, if it has been asked for: that runs in a thread of `pool`, and once at most."""

    def __init__(self, pool: ThreadPoolExecutor, prepare: Callable[[], Value | None], *, begins: bool) -> None:
        self._pool = pool
        self._prepare = prepare
        self._may_begin = begins
        self._future: Future[Value | None] | None = None

    def begin(self) -> None:
        """Begin to prepare it, unless that has begun or may not begin."""
        if self._may_begin:
            self._may_begin = False
            self._future = self._pool.submit(self._prepare)

    def result(self) -> Value | None:
        """Wait for it; None when there is none."""
        return self._future and self._future.result()


def wait_for(future: Future[object] | None) -> None:
    """Wait for what was begun, if anything was, and raise what it raised."""
    if future is not None:
        future.result()
