"""A finished picture, put where its caller wants it: again and again, until it is taken, refused, or not wanted."""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Any, Self, TypeVar

from core.errors import Stopped, UploadFailed, UrlNotAllowed
from core.outbound import NoAnswer, Outbound
from core.settings import Settings
from worker.drafts import Draft
from worker.lease import Held

PUTS_AT_ONCE = 8
"""How many results a worker holds at most that slow servers have not taken yet; with more of them its line waits."""

LONGEST_RETRY_AFTER_SECONDS = 60.0
"""A server that asks to be left alone for longer is asked again after this: a job waits for it meanwhile."""

LOOK_SECONDS = 0.1
"""How long a put goes on at most after its attempt was told to stop."""

Value = TypeVar("Value")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why one PUT failed, in words for the caller, and how long to wait at least before the next; None: there is none.

    The words hold nothing of the URL, which may be a secret, and nothing that its server wrote.
    """

    reason: str
    wait: float | None


class Putter:
    """Puts results to callers' URLs; lives in the worker's event loop."""

    def __init__(self, settings: Settings, outbound: Outbound) -> None:
        self._timeout = settings.put_timeout_seconds
        self._pauses = settings.put_retry_seconds
        self._outbound = outbound

    async def put(
        self, held: Held, draft: Draft, content_type: str, require_wanted: Callable[[], Awaitable[None]]
    ) -> UploadFailed | None:
        """Put a result to its job's upload URL; return why that failed, if it did.

        It may arrive more than once: whoever sent it may not have heard, or not have lived to tell, that it was taken.

        Args:
            require_wanted: called before each PUT; what it raises ends the matter.

        Raises:
            Stopped: the attempt was told to stop, before a PUT, in a pause or halfway through.
        """
        return await _unless_stopped(held, self._put(held, draft, content_type, require_wanted))

    async def _put(
        self, held: Held, draft: Draft, content_type: str, require_wanted: Callable[[], Awaitable[None]]
    ) -> UploadFailed | None:
        attempt = held.attempt
        assert attempt.upload_url is not None
        for place in count():
            await require_wanted()
            failure = await self._put_once(attempt.upload_url, draft, content_type)
            if failure is None:
                return None
            logger.info(
                "job %s attempt %d: PUT %d failed, %s", attempt.job_id, attempt.number, place + 1, failure.reason
            )
            if failure.wait is None or place == len(self._pauses):
                return UploadFailed(f"The result could not be put to the upload URL: {failure.reason}.")
            await asyncio.sleep(max(self._pauses[place], min(failure.wait, LONGEST_RETRY_AFTER_SECONDS)))
        raise AssertionError("count() never ends")

    async def _put_once(self, url: str, draft: Draft, content_type: str) -> _Failure | None:
        try:
            answer = await self._outbound.put(url, draft.open(), content_type, self._timeout)
        except UrlNotAllowed:
            return _Failure("it leads where this service does not go", None)
        except NoAnswer:
            return _Failure("it could not be reached, or did not answer in time", 0.0)
        if 200 <= answer.status < 300:
            return None
        if 300 <= answer.status < 400:
            return _Failure(f"it answered {answer.status}, and redirects are not followed", None)
        return _Failure(f"it answered {answer.status}", (answer.retry_after or 0.0) if answer.passing else None)


class Sideline:
    """Where attempts end whose results are put elsewhere: a caller's server that is slow keeps no engine waiting.

    A context manager; in the end it waits for them.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(PUTS_AT_ONCE, "put")
        self._room = threading.BoundedSemaphore(PUTS_AT_ONCE)
        self.held: set[Held] = set()
        """The attempts that are there."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def begin(self, held: Held, end: Callable[[], object]) -> None:
        """Let `end` run, which ends the attempt; wait while there is no room for it."""
        self._room.acquire()
        self.held.add(held)
        self._pool.submit(self._run, held, end)

    def _run(self, held: Held, end: Callable[[], object]) -> None:
        try:
            end()
        except Exception:
            # Nobody asks the pool how this ended.
            logger.exception("job %s attempt %d: bug beside the line", held.attempt.job_id, held.attempt.number)
        finally:
            self.held.discard(held)
            self._room.release()


async def _unless_stopped(held: Held, work: Coroutine[Any, Any, Value]) -> Value:
    """Wait for `work` and return what it returns; break it off when the attempt is to stop."""
    task = asyncio.create_task(work)
    try:
        while not task.done():
            if held.should_stop():
                raise Stopped("The worker is about to end, or the job is unwanted.")
            await asyncio.wait([task], timeout=LOOK_SECONDS)
        return task.result()
    finally:
        task.cancel()
        await asyncio.wait([task])
