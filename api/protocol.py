"""One connection: how long its client may take, how much it may send without a body, and how it is turned away.

uvicorn itself times only what is idle between requests. A client that sends its headers, or takes its answer, a byte at
a time would keep its connection for ever; a header would grow as long as memory lasts.
"""

import asyncio
import json
import logging
import socket
import struct
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, cast

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.flow_control import service_unavailable
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from api.errors import RETRY_AFTER_SECONDS, describe
from api.middleware import SAFE_HEADERS, new_request_id

HEAD_SECONDS = 10.0
"""How long a request's line and headers may take, from the connection on, or from their first byte."""

STALLED_SECONDS = 60.0
"""An answer of which nothing more could be sent for so long is given up."""

LINGER_SECONDS = 5.0
"""How long we read, and throw away, what is still being sent of a request that was answered already. Closed at once,
the connection would take the answer with it, before the client looks for one."""

MAX_URL_BYTES = 8 * 1024
MAX_HEADERS = 100
MAX_HEAD_BYTES = 32 * 1024
"""How much of a request may come without any of its body; also of what follows a body."""

logger = logging.getLogger(__name__)


class _Refused(Exception):
    """What the parser has read so far is enough to turn it down."""


class Protocol(HttpToolsProtocol):
    """uvicorn's connection, with limits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._head_bytes = 0
        self._unread_bytes = 0
        """How many came since the last piece of a body, or the last whole request."""
        self._refusal = (400, "This is not a valid HTTP request.")
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._ended = False
        """Whether what comes now belongs to no request."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timing_head()
        self._stop_watching_writes()
        super().connection_lost(exc)

    # What comes in

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        self._unread_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing() or not self._unread_bytes:
            return
        if self._unread_bytes > MAX_HEAD_BYTES:
            self._refusal = _HEAD_TOO_LARGE
            self.send_400_response("")
        elif self._in_head:
            self._time_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        self._time_head()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > MAX_URL_BYTES:
            self._refuse(414, f"The URL is longer than {MAX_URL_BYTES} bytes.")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > MAX_HEAD_BYTES or len(self.headers) >= MAX_HEADERS:
            self._refuse(*_HEAD_TOO_LARGE)
        if self._in_head:  # what follows a chunked body is not to pass for a header
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._unread_bytes = False, 0
        self._stop_timing_head()
        upgrade = self.parser.should_upgrade()  # pyright: ignore[reportOptionalMemberAccess] - it calls us
        if upgrade and _announces_body(self.headers):
            self._refuse(400, "A request that asks for another protocol cannot have a body.")
        super().on_headers_complete()
        if upgrade:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._unread_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_head, self._unread_bytes = True, 0
        super().on_message_complete()

    def _refuse(self, status: int, message: str) -> None:
        """Make the parser stop; uvicorn then calls send_400_response."""
        self._refusal = (status, message)
        raise _Refused

    def _unsupported_upgrade_warning(self) -> None:
        """Answer the request as if it had not asked for the upgrade, and nothing after it.

        The parser has passed over its body, if there is one: read on, and that would be taken for the next request.
        """
        self._ended = True

    # How long that takes

    def _time_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._end_slow_head)

    def _stop_timing_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_slow_head(self) -> None:
        self._head_timer = None
        if self.flow.read_paused:  # it is we who do not read on
            self._time_head()
        elif self._unread_bytes:
            self._refusal = (408, "The request came in too slowly.")
            self.send_400_response("")
        else:
            self.transport.close()

    # What goes out

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        answering = _answer_busy if app is service_unavailable else cast("ASGIApp", app)
        super()._start_asgi_task(cycle, cast("Any", _lingering(cycle, answering)))

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn says it, we know better
        """Turn away what is no request, or too much of one, unless an answer is on its way already."""
        answering = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete  # pyright: ignore[reportUnnecessaryComparison]
        if not answering and not self.pipeline:
            self.transport.write(_turn_away(*self._refusal))
        self.transport.close()
        self._watch_writes()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._stop_watching_writes()
        self._watch_writes()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writes()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_watching_writes()

    def _watch_writes(self) -> None:
        left = self.transport.get_write_buffer_size()
        if left and self._write_timer is None:
            self._write_timer = self.loop.call_later(STALLED_SECONDS, self._end_stalled, left)

    def _stop_watching_writes(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _end_stalled(self, left: int) -> None:
        self._write_timer = None
        if self.transport.get_write_buffer_size() < left:
            self._watch_writes()
        else:
            logger.info("a client stopped reading its answer")
            opened = self.transport.get_extra_info("socket")
            # Else the kernel would go on holding what the client does not read.
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()


def _announces_body(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0")) for name, value in headers
    )


_HEAD_TOO_LARGE = (431, f"The headers are more than {MAX_HEADERS}, or longer than {MAX_HEAD_BYTES} bytes.")


def _lingering(cycle: RequestResponseCycle, app: ASGIApp) -> ASGIApp:
    """Let `app` answer before the request is whole: its connection is closed then, but no sooner than it must be."""

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        leaving = False

        async def send_and_linger(message: Message) -> None:
            nonlocal leaving
            if message["type"] == "http.response.start" and cycle.more_body:
                leaving = True
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            elif leaving and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await _discard_rest(receive)
                message = {"type": "http.response.body"}
            await send(message)

        await app(scope, receive, send_and_linger)

    return run


async def _discard_rest(receive: Receive) -> None:
    with anyio.move_on_after(LINGER_SECONDS):
        while (await receive()).get("more_body", False):
            pass


async def _answer_busy(_scope: Scope, _receive: Receive, send: Send) -> None:
    """Answer in place of the application, which has more connections than it may."""
    body, headers = _describe(503, "unavailable", "The service has too many connections at the moment.")
    headers |= {"retry-after": str(RETRY_AFTER_SECONDS), "connection": "close"}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 503, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def _turn_away(status: int, message: str) -> bytes:
    """Return a whole answer, for a client that sent no request that could be answered otherwise."""
    body, headers = _describe(status, "request_too_slow" if status == 408 else "bad_request", message)
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", "connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _describe(status: int, code: str, message: str) -> tuple[bytes, dict[str, str]]:
    """Return a Problem and its headers."""
    request_id = new_request_id()
    body = json.dumps(describe(status, code, message, request_id)).encode()
    own: Mapping[str, str] = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "x-request-id": request_id,
    }
    return body, {**own, **SAFE_HEADERS}
